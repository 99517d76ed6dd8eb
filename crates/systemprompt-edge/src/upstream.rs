//! Connections to upstreams: opened here, for forwarding and for probes alike.

use crate::{body::RequestBody, config::Upstream};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// Largest read buffer on either leg: hyper's default grows to 400 KiB, which costs page faults and
/// memory for nothing.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// A connection that can carry one request at a time.
pub(crate) struct Link {
    pub(crate) sender: SendRequest<RequestBody>,
    /// Set by the first byte that comes back; cleared before each request.
    pub(crate) answered: Arc<AtomicBool>,
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    Io(io::Error),
    Http(hyper::Error),
}

/// Opens a connection and starts the task that drives it; it ends with the connection.
pub(crate) async fn connect(upstream: &Upstream) -> Result<Link, ConnectError> {
    let answered = Arc::new(AtomicBool::new(false));
    let io = match upstream {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await.map_err(ConnectError::Io)?;
            stream.set_nodelay(true).map_err(ConnectError::Io)?;
            Socket::Tcp(stream)
        }
        Upstream::Unix(path) => Socket::Unix(UnixStream::connect(path).await.map_err(ConnectError::Io)?),
    };
    let io = TokioIo::new(Watched { io, answered: Arc::clone(&answered) });
    let (sender, connection) =
        http1::Builder::new().max_buf_size(BUFFER_BYTES).handshake(io).await.map_err(ConnectError::Http)?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "upstream connection ended");
        }
    });
    Ok(Link { sender, answered })
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

struct Watched {
    io: Socket,
    answered: Arc<AtomicBool>,
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = match &mut this.io {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        };
        if buf.filled().len() > before {
            this.answered.store(true, Relaxed);
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.get_mut().io {
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Sockets have no buffer of ours.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
