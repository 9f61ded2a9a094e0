//! The socket of a connection, which ends with a reset where it must not outlive its pod.
//!
//! Owns how a socket is closed; never reads a byte of what passes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// A connection's socket.
#[derive(Debug)]
pub(super) struct Stream {
    socket: TcpStream,
    /// Dropped before it was shut down, it is reset: what is not acknowledged would keep it, and with it the network of a pod
    /// that has ended, for up to two minutes.
    resets: bool,
}

// === impl Stream ===

impl Stream {
    /// `resets` for one in a pod's own network.
    pub(super) fn new(socket: TcpStream, resets: bool) -> Self {
        Self { socket, resets }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_read(context, buffer)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.resets = false;
        Pin::new(&mut self.socket).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.resets {
            // It is closed all the same.
            let _ = self.socket.set_zero_linger();
        }
    }
}
