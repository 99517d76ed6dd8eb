//! The framing gate: stands between TLS and hyper on HTTP/1.1 connections and lets only those bytes
//! through that can be read in one way.
//!
//! hyper sees whole heads only. In the place of a refused one it gets a request of ours, so that the
//! refusal is answered in its turn, like any other problem, and the connection closes. A body that turns
//! out malformed ends in an error: the request is aborted upstream, and answered the same way.

mod framing;

pub(crate) use framing::FIELD_SLOTS;
pub use framing::{Framing, Refusal, Refused, Step};

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

/// Stands in for a refused head; the service knows it by [`Connection::refusal`].
const SUBSTITUTE: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

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
    /// Judged bytes that hyper had no room for yet.
    passed: Passed,
    linger: Option<Linger>,
}

#[derive(Default)]
struct Passed {
    bytes: Vec<u8>,
    read: usize,
}

impl Passed {
    fn is_empty(&self) -> bool {
        self.read == self.bytes.len()
    }

    fn pour(&mut self, buf: &mut ReadBuf<'_>) {
        let now = (self.bytes.len() - self.read).min(buf.remaining());
        buf.put_slice(&self.bytes[self.read..self.read + now]);
        self.read += now;
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

struct Linger {
    until: Pin<Box<Sleep>>,
    left: usize,
}

impl<S> Gate<S> {
    pub(crate) fn new(io: S, connection: Arc<Connection>, head_bytes: usize) -> Self {
        Self {
            io,
            framing: Framing::new(head_bytes),
            connection,
            held: Vec::new(),
            passed: Passed::default(),
            linger: None,
        }
    }

    /// Judges what was read into `buf` from `before` on, and leaves in it what may go on now.
    fn judge(&mut self, buf: &mut ReadBuf<'_>, before: usize) {
        let step = self.framing.feed(&buf.filled()[before..]);
        let end = match step {
            Step::Pass => buf.filled().len().saturating_sub(self.framing.withheld()).max(before),
            Step::Hold(index) => {
                let rest = buf.filled()[before + index..].to_vec();
                self.held.splice(0..0, rest);
                before + index
            }
            Step::Refuse(index, refusal) => {
                tracing::debug!(reason = refusal.message(), "request refused");
                if let Some(part) = self.framing.refused() {
                    self.connection.refuse(self.framing.heads(), part, refusal);
                }
                before + index
            }
        };
        let mut behind = self.framing.take_released();
        let stand_in = match self.framing.refused() {
            Some(Refused::Head) => SUBSTITUTE,
            Some(Refused::Body) | None => &[][..],
        };
        if behind.is_empty() && stand_in.is_empty() {
            // The usual case: what was read is left where it is.
            buf.set_filled(end);
        } else {
            behind.extend_from_slice(&buf.filled()[before..end]);
            behind.extend_from_slice(stand_in);
            buf.set_filled(before);
            self.passed = Passed { bytes: behind, read: 0 };
            self.passed.pour(buf);
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
        let before = buf.filled().len();
        loop {
            if !this.passed.is_empty() {
                this.passed.pour(buf);
                return Poll::Ready(Ok(()));
            }
            match this.framing.refused() {
                // Not the end: hyper would drop what it has not answered yet. It closes after the answer.
                Some(Refused::Head) => return Poll::Pending,
                Some(Refused::Body) => return Poll::Ready(Err(io::ErrorKind::InvalidData.into())),
                None => {}
            }
            if this.framing.is_waiting() {
                ready!(this.poll_answer(cx));
            }
            if this.held.is_empty() {
                if this.connection.input.is_quiet(cx) {
                    return Poll::Pending;
                }
                ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
                this.connection.input.stir();
                if buf.filled().len() == before {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let length = this.held.len().min(buf.remaining());
                buf.put_slice(&this.held[..length]);
                this.held.drain(..length);
            }
            this.judge(buf, before);
            // Nothing for hyper in it: no bytes would mean the end.
            if buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// What hyper would see of `bytes` that come in pieces of `piece`, read `room` at a time.
    async fn through(bytes: &[u8], piece: usize, room: usize) -> Vec<u8> {
        let (mut client, server) = tokio::io::duplex(piece);
        let bytes = bytes.to_vec();
        tokio::spawn(async move {
            client.write_all(&bytes).await.ok();
        });
        let mut gate = Gate::new(server, Arc::default(), 1024);
        let mut seen = Vec::new();
        let mut buf = vec![0; room];
        loop {
            let read = tokio::time::timeout(Duration::from_secs(10), gate.read(&mut buf)).await.expect("bytes");
            match read {
                Ok(length) => seen.extend_from_slice(&buf[..length]),
                Err(error) => return [&seen[..], error.to_string().as_bytes()].concat(),
            }
            if matches!(read, Ok(0)) || seen.ends_with(SUBSTITUTE) {
                return seen;
            }
        }
    }

    #[tokio::test]
    async fn heads_go_on_whole_or_not_at_all() {
        let get = "GET /a HTTP/1.1\r\nHost: a\r\n\r\n";
        let post = "POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n";
        let two_hosts = "GET /c HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n";
        let whole = format!("{get}{post}{get}");
        let refused = format!("{get}{post}{two_hosts}{get}");
        let substituted = [get.as_bytes(), post.as_bytes(), SUBSTITUTE].concat();
        for piece in [1, 2, 7, 30, 1000] {
            for room in [1, 5, 64, 4096] {
                let seen = through(whole.as_bytes(), piece, room).await;
                assert_eq!(seen, whole.as_bytes(), "{piece} {room}");
                let seen = through(refused.as_bytes(), piece, room).await;
                assert_eq!(seen, substituted, "{piece} {room}: {}", String::from_utf8_lossy(&seen));
            }
        }
        let unfinished = format!("{get}GET /b HT");
        assert_eq!(through(unfinished.as_bytes(), 3, 64).await, get.as_bytes());
        let broken = through(post.replace("3\r\n", "3\n").as_bytes(), 1000, 4096).await;
        let head = post.find("3\r\n").expect("a chunk");
        assert_eq!(broken, [&post.as_bytes()[..head], b"invalid data"].concat());
    }
}
