//! A budget for HTTP/2 frames that carry no work.
//!
//! hyper and h2 bound streams, resets and header sizes, but answer PING, SETTINGS, PRIORITY, empty DATA
//! and window updates for as long as a client likes to send them. [`Meter`] counts those frames; work
//! earns them back: bytes sent to the client (whose window updates then have a reason) and time.

use crate::connection::Connection;
use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Instant,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes of the client's connection preface (RFC 9113, 3.4).
const PREFACE: u32 = 24;
const FRAME_HEAD: usize = 9;
/// Bytes sent to the client that pay for one frame.
const BYTES_PER_FRAME: u64 = 1024;
/// Frames that time pays for.
const FRAMES_PER_SECOND: u64 = 10;
/// What one reset stream costs: it made us work before.
const RESET_COST: u64 = 5;

/// Counts the frames of one connection.
#[derive(Debug)]
struct Meter {
    limit: u64,
    left: u64,
    sent: u64,
    refilled: Instant,
    /// Bytes to skip before the next frame head.
    skip: u32,
    head: [u8; FRAME_HEAD],
    filled: usize,
}

/// The client sent too many frames that carry no work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many HTTP/2 frames that carry no work")]
struct Flood;

impl Meter {
    fn new(limit: u32, now: Instant) -> Self {
        let limit = u64::from(limit);
        Self { limit, left: limit, sent: 0, refilled: now, skip: PREFACE, head: [0; FRAME_HEAD], filled: 0 }
    }

    fn received(&mut self, mut bytes: &[u8], now: impl Fn() -> Instant) -> Result<(), Flood> {
        loop {
            let skip = (self.skip as usize).min(bytes.len());
            bytes = &bytes[skip..];
            self.skip -= u32::try_from(skip).unwrap_or(u32::MAX);
            if bytes.is_empty() {
                return Ok(());
            }
            let part = (FRAME_HEAD - self.filled).min(bytes.len());
            self.head[self.filled..self.filled + part].copy_from_slice(&bytes[..part]);
            self.filled += part;
            bytes = &bytes[part..];
            if self.filled == FRAME_HEAD {
                self.filled = 0;
                let length = u32::from_be_bytes([0, self.head[0], self.head[1], self.head[2]]);
                self.skip = length;
                self.spend(cost(self.head[3], self.head[4], length), &now)?;
            }
        }
    }

    fn spend(&mut self, cost: u64, now: impl Fn() -> Instant) -> Result<(), Flood> {
        if self.left < cost {
            // The clock is read only here: an honest client hardly ever comes this far.
            let now = now();
            let earned = now.saturating_duration_since(self.refilled).as_secs() * FRAMES_PER_SECOND;
            if earned > 0 {
                self.refilled = now;
                self.left = (self.left + earned).min(self.limit);
            }
        }
        self.left = self.left.checked_sub(cost).ok_or(Flood)?;
        Ok(())
    }

    fn wrote(&mut self, bytes: usize) {
        self.sent += bytes as u64;
        self.left = (self.left + self.sent / BYTES_PER_FRAME).min(self.limit);
        self.sent %= BYTES_PER_FRAME;
    }
}

/// What a frame costs, by its type, flags and length (RFC 9113, 6).
fn cost(kind: u8, flags: u8, length: u32) -> u64 {
    const END_STREAM: u8 = 1;
    match kind {
        // DATA: free when it brings bytes or ends a stream.
        0 => u64::from(length == 0 && flags & END_STREAM == 0),
        // HEADERS: bounded by the number of streams.
        1 => 0,
        // RST_STREAM.
        3 => RESET_COST,
        // PRIORITY, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, and what nobody knows.
        _ => 1,
    }
}

/// An HTTP/2 connection's stream with its meter: reading fails once the budget is spent.
pub(crate) struct Metered<S> {
    io: S,
    meter: Meter,
    connection: Arc<Connection>,
}

impl<S> Metered<S> {
    pub(crate) fn new(io: S, limit: u32, connection: Arc<Connection>) -> Self {
        Self { io, meter: Meter::new(limit, Instant::now()), connection }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if let Err(flood) = this.meter.received(&buf.filled()[before..], Instant::now) {
            tracing::debug!(reason = %flood, "connection refused");
            this.connection.cut();
            return Poll::Ready(Err(io::Error::other(flood)));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, buf))?;
        this.meter.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs))?;
        this.meter.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PING: u8 = 6;

    fn frame(kind: u8, flags: u8, length: u8) -> Vec<u8> {
        let mut frame = vec![0, 0, length, kind, flags, 0, 0, 0, 1];
        frame.resize(FRAME_HEAD + usize::from(length), 0);
        frame
    }

    /// How many repetitions of a frame pass a budget of 100, cut into pieces of `piece` bytes.
    fn passes(frame: &[u8], piece: usize) -> usize {
        let begun = Instant::now();
        let mut meter = Meter::new(100, begun);
        meter.received(&[b'x'; PREFACE as usize], || begun).expect("preface");
        let one = |meter: &mut Meter| frame.chunks(piece).try_for_each(|bytes| meter.received(bytes, || begun));
        (0..1000).take_while(|_| one(&mut meter).is_ok()).count()
    }

    #[test]
    fn frames_without_work_are_counted_and_others_are_not() {
        for (what, frame, expected) in [
            ("PING", frame(PING, 0, 8), 100),
            ("SETTINGS", frame(4, 0, 0), 100),
            ("PRIORITY", frame(2, 0, 5), 100),
            ("WINDOW_UPDATE", frame(8, 0, 4), 100),
            ("CONTINUATION", frame(9, 0, 3), 100),
            ("unknown", frame(200, 0, 3), 100),
            ("empty DATA", frame(0, 0, 0), 100),
            ("RST_STREAM", frame(3, 0, 4), 20),
            ("DATA", frame(0, 0, 50), 1000),
            ("the end of a stream", frame(0, 1, 0), 1000),
            ("HEADERS", frame(1, 4, 50), 1000),
        ] {
            for piece in [1, 2, 5, 9, 10, 100] {
                assert_eq!(passes(&frame, piece), expected, "{what} in pieces of {piece}");
            }
        }
    }

    #[test]
    fn work_and_time_earn_frames_back() {
        let begun = Instant::now();
        let mut meter = Meter::new(10, begun);
        meter.skip = 0;
        let ping = frame(PING, 0, 8);
        let spend = |meter: &mut Meter, now: Instant| {
            let mut passed = 0;
            while meter.received(&ping, || now).is_ok() {
                passed += 1;
            }
            // A refused frame ends the connection; here its bytes are forgotten instead.
            meter.skip = 0;
            passed
        };
        assert_eq!(spend(&mut meter, begun), 10);
        (0..4).for_each(|_| meter.wrote(512));
        assert_eq!(spend(&mut meter, begun), 2);
        assert_eq!(spend(&mut meter, begun + Duration::from_secs(1)), 10);
        assert_eq!(spend(&mut meter, begun + Duration::from_secs(1)), 0);
        meter.wrote(1024 * 1024);
        assert_eq!(spend(&mut meter, begun + Duration::from_secs(1)), 10, "never more than the limit");
    }
}
