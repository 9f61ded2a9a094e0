//! Asks a network namespace for its number.
//!
//! Owns the thread that enters it; never changes a namespace.

use std::{fs::File, io, os::fd::AsFd as _};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::intercept::netns::own_cookie;

/// The cookie of a namespace that is open as a file, such as `/proc/PID/ns/net`. A thread enters it and ends.
pub fn cookie_of(namespace: File) -> io::Result<u64> {
    let thread = std::thread::Builder::new().name("netns".to_owned()).spawn(move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        own_cookie()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}
