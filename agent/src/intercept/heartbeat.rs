//! The sign of life that the programs look at before they send a pod to the agent.
//!
//! Owns HEARTBEAT and which generation this agent is; never waits for the owner of the interceptor, nor for the lock
//! on the pins.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use agent_common::abi::map;
use aya::maps::{Array, MapData};
use parking_lot::{Mutex, MutexGuard};
use rustix::time::{ClockId, clock_gettime};

use super::{
    Error,
    links::Attachment,
    maps::{is_removed, reading, writing},
};

/// Writes the heartbeat while this agent is active, and tells who is. Clones are the same heartbeat.
#[derive(Clone)]
pub struct Heartbeat(Arc<Shared>);

/// Which agent is active on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// This one.
    Active,
    /// None: `podgate detach` has removed the programs.
    Detached,
    /// Another took over; or none has been active yet.
    Superseded {
        /// The age of the last heartbeat; since boot if the active agent has stopped.
        silent: Duration,
    },
}

struct Shared {
    /// Held for one or two map operations: never while anything waits.
    state: Mutex<State>,
    /// Pins of the maps that agents of all ABIs share, with the maps' ids.
    pins: Vec<(PathBuf, u32)>,
    /// The program whose absence means that an operator has detached podgate.
    connect4: Attachment,
}

struct State {
    /// The generation that this agent became when it last took over; 0 before that, while it takes over, and after it
    /// has stopped.
    own: u64,
    active: Array<MapData, u64>,
    heartbeat: Array<MapData, u64>,
}

// === impl Heartbeat ===

impl Heartbeat {
    pub(super) fn new(
        heartbeat: Array<MapData, u64>,
        active: Array<MapData, u64>,
        pins: Vec<(PathBuf, u32)>,
        connect4: Attachment,
    ) -> Self {
        let state = Mutex::new(State { own: 0, active, heartbeat });
        Self(Arc::new(Shared { state, pins, connect4 }))
    }

    /// Says that this agent is alive, if it is active. Due several times in
    /// [`HEARTBEAT_LIMIT_NS`](agent_common::target::HEARTBEAT_LIMIT_NS).
    pub fn write(&self) -> Result<Standing, Error> {
        self.look(State::set_heartbeat)
    }

    /// Which agent is active. Writes nothing.
    pub fn standing(&self) -> Result<Standing, Error> {
        self.look(|_, _| Ok(()))
    }

    /// Makes [`write`](Self::write) write nothing more, until this agent takes over again.
    pub fn silence(&self) {
        self.state().own = 0;
    }

    /// Whether this agent is active. Another may take over at any time that the pins are not locked: the kernel knows.
    pub(super) fn is_active(&self) -> Result<bool, Error> {
        self.state().is_active()
    }

    /// The generation that this agent is, if it has taken over.
    pub(super) fn generation(&self) -> u64 {
        self.state().own
    }

    /// The generation that is active; 0 where none has been.
    pub(super) fn active_generation(&self) -> Result<u64, Error> {
        self.state().active()
    }

    /// Makes a generation the active one. The pins must be locked.
    pub(super) fn set_active_generation(&self, generation: u64) -> Result<(), Error> {
        self.state().active.set(0, generation, 0).map_err(writing(map::GENERATION))
    }

    /// Makes this agent a generation, which may write the heartbeat from now on.
    pub(super) fn start(&self, generation: u64) {
        self.state().own = generation;
    }

    /// Writes the current time for a generation that is about to be this agent's. The pins must be locked.
    pub(super) fn set_now(&self) -> Result<(), Error> {
        self.state().set_heartbeat(now()?)
    }

    /// Says that no agent is alive: pods are refused at once. The pins must be locked.
    ///
    /// No heartbeat that is under way can undo it: it is written and silenced under one lock.
    pub(super) fn stop(&self) -> Result<(), Error> {
        let mut state = self.state();
        state.own = 0;
        state.set_heartbeat(0)
    }

    fn look(&self, if_active: impl FnOnce(&mut State, u64) -> Result<(), Error>) -> Result<Standing, Error> {
        // First of all: an agent that is suspended between here and its write, and superseded meanwhile, claims no
        // moment at which it was not active.
        let now = now()?;
        if self.0.pins.iter().any(|(path, id)| is_removed(path, *id)) {
            return Ok(Standing::Detached);
        }
        let mut state = self.state();
        if !state.is_active()? {
            let last = state.heartbeat.get(&0, 0).map_err(reading(map::HEARTBEAT))?;
            return Ok(Standing::Superseded { silent: Duration::from_nanos(now.saturating_sub(last)) });
        }
        if_active(&mut state, now)?;
        drop(state);
        Ok(if self.0.connect4.is_attached() { Standing::Active } else { Standing::Detached })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock()
    }
}

impl fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Heartbeat").field("generation", &self.generation()).finish_non_exhaustive()
    }
}

// === impl State ===

impl State {
    fn is_active(&self) -> Result<bool, Error> {
        Ok(self.own != 0 && self.active()? == self.own)
    }

    fn active(&self) -> Result<u64, Error> {
        self.active.get(&0, 0).map_err(reading(map::GENERATION))
    }

    fn set_heartbeat(&mut self, at_ns: u64) -> Result<(), Error> {
        self.heartbeat.set(0, at_ns, 0).map_err(writing(map::HEARTBEAT))
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds.
fn now() -> Result<u64, Error> {
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic)).map_err(|_| Error::Clock)?;
    u64::try_from(now.as_nanos()).map_err(|_| Error::Clock)
}
