//! The framing gate: stands between TLS and hyper on HTTP/1.1 connections and lets only those bytes
//! through that can be read in one way.
//!
//! What is refused is replaced by a NUL byte, which no HTTP parser accepts: hyper answers what was
//! asked before, then 400, and closes. Nothing of a refused head reaches routing, and a body that turns
//! out malformed ends as an aborted request upstream.

mod framing;

pub(crate) use framing::FIELD_SLOTS;
pub use framing::{Framing, Refusal, Step};

use crate::connection::Connection;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// Stands in for a refused message. The empty line makes hyper parse a head at once, of which it may
/// have the beginning already.
const POISON: &[u8] = b"\0\r\n\r\n";

/// How long, and how many bytes, are read and thrown away after the answer to a refused message, so
/// that the client reads the answer and not a reset connection.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;

/// See the module.
pub(crate) struct Gate<S> {
    io: S,
    framing: Framing,
    connection: Arc<Connection>,
    /// Bytes that came behind an upgrade request, kept until its answer.
    held: Vec<u8>,
    /// What is left of [`POISON`] to hand on.
    poison: &'static [u8],
    linger: Option<Linger>,
}

struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl<S> Gate<S> {
    pub(crate) fn new(io: S, connection: Arc<Connection>, head_bytes: usize) -> Self {
        Self { io, framing: Framing::new(head_bytes), connection, held: Vec::new(), poison: &[], linger: None }
    }

    fn pour(&mut self, buf: &mut ReadBuf<'_>) {
        let (now, later) = self.poison.split_at(self.poison.len().min(buf.remaining()));
        buf.put_slice(now);
        self.poison = later;
    }

    fn judge(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let step = self.framing.feed(&buf.filled()[before..]);
        match step {
            Step::Pass => {}
            Step::Hold(index) => {
                let rest = buf.filled()[before + index..].to_vec();
                self.held.splice(0..0, rest);
                buf.set_filled(before + index);
            }
            // hyper counts by itself and answers 431; the rest of the head is never read.
            Step::Refuse(_, Refusal::TooLarge) => {
                tracing::debug!(reason = %Refusal::TooLarge, "request refused");
            }
            Step::Refuse(index, refusal) => {
                tracing::debug!(reason = %refusal, "request refused");
                buf.set_filled(before + index);
                self.poison = POISON;
                self.pour(buf);
            }
        }
        self.connection.inside_head(self.framing.inside_head());
    }
}

impl<S: AsyncRead + Unpin> Gate<S> {
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match ready!(self.connection.poll_upgrade(cx, self.framing.heads())) {
            Upgrade::Refused => self.framing.resume(),
            Upgrade::Accepted => self.framing.tunnel(),
        }
        Poll::Ready(())
    }

    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let linger = self
            .linger
            .get_or_insert_with(|| Linger { until: Box::pin(tokio::time::sleep(LINGER)), left: LINGER_BYTES });
        let mut scratch = [0; 4096];
        while linger.left > 0 && linger.until.as_mut().poll(cx).is_pending() {
            let mut buf = ReadBuf::new(&mut scratch);
            match ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => linger.left = linger.left.saturating_sub(buf.filled().len()),
                _ => break,
            }
        }
        Poll::Ready(())
    }
}

/// How an upgrade request was answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upgrade {
    /// 101: the connection is a tunnel now.
    Accepted,
    /// Anything else: HTTP goes on.
    Refused,
}

impl<S: AsyncRead + Unpin> AsyncRead for Gate<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.framing.is_refused() {
            this.pour(buf);
            return Poll::Ready(Ok(()));
        }
        if this.framing.is_waiting() {
            ready!(this.poll_answer(cx));
        }
        let before = buf.filled().len();
        if this.held.is_empty() {
            ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        } else {
            let length = this.held.len().min(buf.remaining());
            buf.put_slice(&this.held[..length]);
            this.held.drain(..length);
        }
        this.judge(buf, before);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.io).poll_shutdown(cx))?;
        }
        if this.framing.is_refused() {
            ready!(this.poll_linger(cx));
        }
        Poll::Ready(Ok(()))
    }
}
