//! The origin of an accepted socket: the one thing the accept stage asks the kernel.
//!
//! Owns the look-up; never interprets an origin.

use std::os::fd::BorrowedFd;

use agent_common::{abi::map, origin::Origin};
use aya::maps::{MapData, MapError, SkStorage};

use super::Error;

/// Finds the origin of an accepted connection.
pub trait OriginLookup: Send + Sync + 'static {
    /// The origin that the kernel has put on the socket; `None` for an anonymous caller.
    fn origin(&self, socket: BorrowedFd<'_>) -> Result<Option<Origin>, Error>;
}

/// The kernel's origins: one map look-up by socket.
#[derive(Debug)]
pub struct SocketOrigins {
    accepted: SkStorage<MapData, Origin>,
}

// === impl SocketOrigins ===

impl SocketOrigins {
    pub(super) fn new(accepted: SkStorage<MapData, Origin>) -> Self {
        Self { accepted }
    }
}

impl OriginLookup for SocketOrigins {
    fn origin(&self, socket: BorrowedFd<'_>) -> Result<Option<Origin>, Error> {
        match self.accepted.get(&socket, 0) {
            Ok(origin) => Ok(Some(origin)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(source) => Err(Error::Map { action: "reading", map: map::ACCEPTED, source: source.into() }),
        }
    }
}
