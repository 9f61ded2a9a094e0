//! Network namespaces: their cookies, by which the eBPF programs know them, and the thread that works in them.
//!
//! Owns the entering of other namespaces; never changes one by itself.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd},
    process::abort,
    sync::mpsc,
    thread,
};

use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::sync::oneshot;
use tracing::error;

/// The network namespace of the thread that opens it.
const OWN: &str = "/proc/thread-self/ns/net";

/// What is done in a namespace.
type Work = Box<dyn FnOnce() + Send>;

/// A thread that enters other network namespaces, one after the other, and comes back from each: one that stays costs a
/// twentieth of one for each visit. Ends with the last handle.
#[derive(Clone, Debug)]
pub struct NetnsThread(mpsc::Sender<(OwnedFd, Work)>);

// === impl NetnsThread ===

impl NetnsThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When it cannot be started, or cannot find its way back.
    pub fn spawn() -> io::Result<Self> {
        let own = File::open(OWN)?;
        let (sender, received) = mpsc::channel();
        let run = move || {
            for (namespace, work) in received {
                visit(namespace, &own, work);
            }
        };
        thread::Builder::new().name("netns".to_owned()).spawn(run)?;
        Ok(Self(sender))
    }

    /// Does something in a namespace that is open as a file, such as `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// When the namespace cannot be entered: it takes `CAP_SYS_ADMIN` in the user namespace that owns it.
    pub async fn run<T: Send + 'static>(
        &self,
        namespace: OwnedFd,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let (sender, done) = oneshot::channel();
        let work: Work = Box::new(move || {
            // Nobody may wait for it any more.
            let _ = sender.send(work());
        });
        self.0.send((namespace, work)).map_err(|_| ended())?;
        done.await.map_err(|_| io::Error::other("the namespace cannot be entered"))
    }
}

/// Enters, works, and comes back. Elsewhere the agent's sockets would be a pod's: a thread that cannot come back ends the
/// agent.
fn visit(namespace: OwnedFd, own: &File, work: Work) {
    if let Err(error) = enter(namespace.as_fd()) {
        error!(%error, "cannot enter the network namespace of a pod");
        return;
    }
    // An open descriptor keeps the namespace and the pod's interface alive.
    drop(namespace);
    work();
    if let Err(error) = enter(own.as_fd()) {
        error!(%error, "cannot leave the network namespace of a pod: fatal error");
        abort();
    }
}

fn enter(namespace: impl AsFd) -> io::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}

fn ended() -> io::Error {
    io::Error::other("BUG: the thread for network namespaces has ended")
}

/// The cookie of this thread's network namespace.
pub fn own_cookie() -> io::Result<u64> {
    cookie(socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// The cookie of a namespace that is open as a file, such as `/proc/PID/ns/net`. A thread enters it and exits.
pub fn cookie_of(namespace: File) -> io::Result<u64> {
    let thread = thread::Builder::new().name("netns".to_owned()).spawn(move || {
        enter(namespace)?;
        own_cookie()
    })?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}

/// The cookie of the network namespace that a socket was made in. `SO_NETNS_COOKIE`, Linux 5.14:
/// <https://github.com/torvalds/linux/commit/e8b9eab99232c4e62ada9d7976c80fd5e8118289>
#[expect(unsafe_code, reason = "neither rustix nor nix has this socket option")]
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of_val(&cookie)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open, the value is as large as said.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// Opens the network namespace of a socket, without a process in it; needs `CAP_NET_ADMIN`. `SIOCGSKNS`, Linux 4.10:
/// <https://github.com/torvalds/linux/blob/v6.1/net/socket.c>
#[expect(unsafe_code, reason = "neither rustix nor nix has this request")]
pub fn of_socket(socket: impl AsFd) -> io::Result<OwnedFd> {
    /// `include/uapi/linux/sockios.h`.
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: the descriptor is open; the request takes no argument.
    let namespace = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), SIOCGSKNS) };
    if namespace < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(namespace) })
}
