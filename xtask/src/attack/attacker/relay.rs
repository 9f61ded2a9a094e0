//! Passing connections on, as a mesh's sidecar does that connects again for its pod.

use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use super::stay;

/// Accepts connections and makes one for each, until told to stop.
pub(super) fn relay(at: SocketAddr, to: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(at)?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            if let Ok(server) = TcpStream::connect(to) {
                // Connections that end early are their clients' business.
                let _ = pass_on(&client, &server);
            }
        }
    });
    stay()
}

fn pass_on(client: &TcpStream, server: &TcpStream) -> io::Result<()> {
    let (mut requests, mut upstream) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || io::copy(&mut requests, &mut upstream));
    io::copy(&mut &*server, &mut &*client)?;
    client.shutdown(std::net::Shutdown::Both)
}
