//! Upgraded connections: bytes both ways, until either side ends, both are silent, or the drain cuts.

use crate::{connection::Registered, exchange::Activity, pool::Claim};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional};

/// What a tunnel holds while it lasts.
pub(crate) struct Tunnel {
    pub(crate) client: OnUpgrade,
    pub(crate) upstream: OnUpgrade,
    pub(crate) claim: Claim,
    /// Counts as a client connection of its own, so that a drain waits for it and may cut it.
    pub(crate) place: Registered,
    pub(crate) idle: Duration,
}

impl Tunnel {
    /// Carries bytes until the end.
    pub(crate) async fn run(self) {
        let _activity = Activity::begin(&self.place.connection);
        let reads = Arc::new(AtomicU64::new(0));
        let carry = async {
            let (client, upstream) = tokio::try_join!(self.client, self.upstream).map_err(io::Error::other)?;
            let mut client = Counted { io: TokioIo::new(client), reads: Arc::clone(&reads) };
            let mut upstream = Counted { io: TokioIo::new(upstream), reads: Arc::clone(&reads) };
            copy_bidirectional(&mut client, &mut upstream).await
        };
        tokio::select! {
            ended = carry => if let Err(error) = ended {
                tracing::debug!(%error, "tunnel ended");
            },
            () = silence(&reads, self.idle) => tracing::debug!("tunnel was silent for too long"),
            () = self.place.connection.told_to_cut() => {}
        }
        drop(self.claim);
    }
}

/// Returns when nothing was read for the whole of `limit`.
async fn silence(reads: &AtomicU64, limit: Duration) {
    let mut before = reads.load(Relaxed);
    loop {
        tokio::time::sleep(limit).await;
        let now = reads.load(Relaxed);
        if now == before {
            return;
        }
        before = now;
    }
}

struct Counted<S> {
    io: S,
    reads: Arc<AtomicU64>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.io).poll_read(cx, buf);
        if result.is_ready() {
            this.reads.fetch_add(1, Relaxed);
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
