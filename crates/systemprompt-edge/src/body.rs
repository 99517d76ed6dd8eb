//! Bodies on their way through the edge: never collected, only counted and watched.

use crate::{config::Limits, exchange::Exchange, unread::Unread, upload::Upload};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep};

/// The body of a request, from a client to an upstream. Trailers are left out (RFC 9110, 6.5.1 allows
/// it), so that they cannot carry fields past the hygiene of heads.
pub(crate) struct RequestBody {
    /// `None`: the request has no body.
    stream: Option<Box<Stream>>,
}

struct Stream {
    upload: Upload,
    progress: Arc<Progress>,
    limits: BodyLimits,
    received: u64,
    /// Time spent waiting for the client; time spent waiting for the upstream does not count.
    waited: Duration,
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

/// Bounds of one body.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BodyLimits {
    /// `None`: as large as the upstream likes.
    pub(crate) bytes: Option<u64>,
    pub(crate) grace: Duration,
    pub(crate) bytes_per_second: u64,
}

impl BodyLimits {
    pub(crate) fn new(limits: &Limits, bytes: Option<u64>) -> Self {
        Self { bytes, grace: limits.body_grace, bytes_per_second: limits.body_bytes_per_second.max(1) }
    }

    fn patience(&self, received: u64) -> Duration {
        self.grace + Duration::from_secs(received / self.bytes_per_second)
    }
}

/// How far the body of a request came; shared with the exchange that answers it.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    sent: AtomicBool,
    moved: AtomicBool,
    failure: AtomicU8,
}

/// Why a body was cut by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BodyFailure {
    #[error("the client broke the body off")]
    Aborted,
    #[error("the body is larger than the limit")]
    TooLarge,
    #[error("the body comes too slowly")]
    TooSlow,
}

impl Progress {
    /// Whether the last byte was handed to the upstream's connection.
    pub(crate) fn is_sent(&self) -> bool {
        self.sent.load(Relaxed)
    }

    /// Whether bytes were handed on since this was asked last.
    pub(crate) fn has_moved(&self) -> bool {
        self.moved.swap(false, Relaxed)
    }

    pub(crate) fn failure(&self) -> Option<BodyFailure> {
        match self.failure.load(Relaxed) {
            0 => None,
            1 => Some(BodyFailure::Aborted),
            2 => Some(BodyFailure::TooLarge),
            _ => Some(BodyFailure::TooSlow),
        }
    }

    fn fail(&self, failure: BodyFailure) -> BodyFailure {
        let code = match failure {
            BodyFailure::Aborted => 1,
            BodyFailure::TooLarge => 2,
            BodyFailure::TooSlow => 3,
        };
        self.failure.store(code, Relaxed);
        failure
    }
}

impl RequestBody {
    /// No body at all.
    pub(crate) fn none() -> Self {
        Self { stream: None }
    }

    /// The client's body, and where to see how far it came.
    pub(crate) fn stream(upload: Upload, limits: BodyLimits) -> (Self, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        let stream = Stream {
            upload,
            progress: Arc::clone(&progress),
            limits,
            received: 0,
            waited: Duration::ZERO,
            waiting: None,
        };
        (Self { stream: Some(Box::new(stream)) }, progress)
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyFailure;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        match &mut self.get_mut().stream {
            Some(stream) => stream.poll(cx),
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.as_ref().is_none_or(|stream| stream.upload.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        self.stream.as_ref().map_or_else(|| SizeHint::with_exact(0), |stream| stream.upload.size_hint())
    }
}

impl Stream {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyFailure>>> {
        loop {
            let Poll::Ready(frame) = Pin::new(&mut self.upload).poll_frame(cx) else {
                ready!(self.poll_patience(cx));
                return Poll::Ready(Some(Err(self.progress.fail(BodyFailure::TooSlow))));
            };
            if let Some((since, _)) = self.waiting.take() {
                self.waited += since.elapsed();
            }
            return Poll::Ready(match frame {
                None if self.upload.is_broken_off() => Some(Err(self.progress.fail(BodyFailure::Aborted))),
                None => {
                    self.progress.sent.store(true, Relaxed);
                    None
                }
                Some(Err(_)) => Some(Err(self.progress.fail(BodyFailure::Aborted))),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => Some(self.count(data)),
                    Err(_trailers) => continue,
                },
            });
        }
    }

    fn count(&mut self, data: Bytes) -> Result<Frame<Bytes>, BodyFailure> {
        self.received += data.len() as u64;
        self.progress.moved.store(true, Relaxed);
        if self.limits.bytes.is_some_and(|limit| self.received > limit) {
            return Err(self.progress.fail(BodyFailure::TooLarge));
        }
        if self.upload.is_end_stream() {
            self.progress.sent.store(true, Relaxed);
        }
        Ok(Frame::data(data))
    }

    /// Ready when the client has kept us waiting for too long.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let left = self.limits.patience(self.received).saturating_sub(self.waited);
        let (_, sleep) = self.waiting.get_or_insert_with(|| (Instant::now(), Box::pin(tokio::time::sleep(left))));
        sleep.as_mut().poll(cx)
    }
}

/// The body of an answer: the edge's own, or an upstream's on its way to the client.
pub(crate) struct ResponseBody {
    content: Content,
    unread: Option<Arc<Unread>>,
}

enum Content {
    Own(Option<Bytes>),
    Upstream { incoming: Incoming, exchange: Option<Exchange> },
}

impl From<Bytes> for ResponseBody {
    fn from(bytes: Bytes) -> Self {
        Self { content: Content::Own(Some(bytes).filter(|bytes| !bytes.is_empty())), unread: None }
    }
}

impl ResponseBody {
    /// An upstream's body; the exchange is over with its last byte, or broken off when this is dropped.
    pub(crate) fn upstream(incoming: Incoming, exchange: Exchange) -> Self {
        Self { content: Content::Upstream { incoming, exchange: Some(exchange) }, unread: None }
    }

    /// From now on the client is expected to take what it asked for.
    pub(crate) fn watch(&mut self, unread: Option<Arc<Unread>>) {
        if let Some(unread) = &unread {
            unread.handed_on();
        }
        self.unread = unread;
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.get_mut();
        let Some(unread) = &this.unread else { return this.content.poll(cx) };
        unread.asked();
        let frame = this.content.poll(cx);
        if frame.is_ready() {
            unread.handed_on();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(bytes) => bytes.is_none(),
            Content::Upstream { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Content::Upstream { incoming, .. } => incoming.size_hint(),
        }
    }
}

impl Content {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match self {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Upstream { incoming, exchange } => loop {
                let Some(open) = exchange else { return Poll::Ready(None) };
                match ready!(open.link.poll_body(cx, incoming)) {
                    None => {
                        if let Some(exchange) = exchange.take() {
                            exchange.complete();
                        }
                        return Poll::Ready(None);
                    }
                    Some(Ok(frame)) if frame.is_trailers() => {}
                    frame => return Poll::Ready(frame),
                }
            },
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        // hyper does not poll a body of known length once more after its last byte.
        if let Content::Upstream { incoming, exchange } = &mut self.content
            && incoming.is_end_stream()
            && let Some(exchange) = exchange.take()
        {
            exchange.complete();
        }
    }
}
