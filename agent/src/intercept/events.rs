//! What the programs tell as it happens.
//!
//! Owns the ring buffer's reading; never acts on an event. What the programs could not tell for want of room is in
//! [`Counter::EventsDropped`].

use std::{fmt, ptr};

use agent_common::{abi::map, counter::Counter, event::Event};
use aya::maps::{MapData, RingBuf};
use tokio::io::{Interest, unix::AsyncFd};

use super::Error;

/// The events, oldest first. They wait in the kernel while nobody reads; there is room for some thousands.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
    skipped: u64,
}

// === impl Events ===

impl Events {
    #[expect(unsafe_code, reason = "tokio takes no descriptor on trust")]
    pub(super) fn new(ring: RingBuf<MapData>) -> Result<Self, Error> {
        // SAFETY: the ring buffer owns its map's descriptor, and closes or changes it no sooner than it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) };
        Ok(Self { ring: ring.map_err(|error| failed(error.into()))?, skipped: 0 })
    }

    /// The next event and the branch it is about. Loses nothing when it is canceled.
    pub async fn next(&mut self) -> Result<(Counter, Event), Error> {
        loop {
            while let Some(record) = self.ring.get_mut().next() {
                match decode(&record) {
                    Some(event) => return Ok(event),
                    None => self.skipped += 1,
                }
            }
            self.ring.readable_mut().await.map_err(failed)?.clear_ready();
        }
    }

    /// How many records were none that this agent knows.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("skipped", &self.skipped).finish_non_exhaustive()
    }
}

/// The record, if it is one and of a kind that this agent knows.
#[expect(unsafe_code, reason = "the record comes as bytes")]
pub(crate) fn decode(record: &[u8]) -> Option<(Counter, Event)> {
    if record.len() != size_of::<Event>() {
        return None;
    }
    // SAFETY: as long as an event; an event has no padding (asserted in `abi`), and every bit pattern is one.
    let event = unsafe { ptr::read_unaligned(record.as_ptr().cast::<Event>()) };
    Some((Counter::from_slot(event.kind)?, event))
}

fn failed(source: std::io::Error) -> Error {
    Error::Map { action: "reading", map: map::EVENTS, source: source.into() }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use agent_common::{counter, net::Endpoint};

    use super::*;

    #[expect(unsafe_code, reason = "the kernel's side of it")]
    fn bytes(event: &Event) -> &[u8] {
        // SAFETY: an event has no padding.
        unsafe { slice::from_raw_parts(ptr::from_ref(event).cast(), size_of::<Event>()) }
    }

    #[test]
    fn what_is_no_known_event_is_not_taken_for_one() {
        let event = Event {
            cgroup_id: 1,
            pod_cgroup_id: 2,
            netns_cookie: 3,
            at_ns: 4,
            address: Endpoint::new([169, 254, 169, 254].into(), 80),
            kind: Counter::Denied as u32,
            tgid: 5,
            tid: 6,
            comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
        };
        assert_eq!(decode(bytes(&event)), Some((Counter::Denied, event)));
        // Also where it is not aligned, as in the middle of the ring buffer.
        let shifted = [&[0], bytes(&event)].concat();
        assert_eq!(decode(&shifted[1..]), Some((Counter::Denied, event)));

        assert_eq!(decode(&bytes(&event)[1..]), None);
        assert_eq!(decode(&shifted), None);
        assert_eq!(decode(&[]), None);
        assert_eq!(decode(bytes(&Event { kind: counter::COUNT, ..event })), None);
    }
}
