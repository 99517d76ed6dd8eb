//! A client's body that nobody wants to the end: an app answers before it has read it, or the edge does.
//!
//! Closing the connection on a client that still sends would cost it the answer: it sees a reset before it reads.
//! So what is left is taken and thrown away, within bounds; then the connection can even go on.

use bytes::Bytes;
use http::{Version, header::EXPECT, request::Parts};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{runtime::Handle, time::timeout};

/// How much of an unwanted body is taken, and for how long.
const UNWANTED_BYTES: usize = 16 * 1024 * 1024;
const UNWANTED_TIME: Duration = Duration::from_secs(10);

/// The body of a request. Dropped before its end, it goes on being taken for a while.
pub(crate) struct Upload {
    /// `None`: dropped.
    incoming: Option<Incoming>,
    /// The client sends it only when it is asked for (RFC 9110, 10.1.1), and was not asked yet.
    unasked: bool,
    /// Over HTTP/2 hyper takes a reset without an error for the end of the body.
    may_be_reset: bool,
}

impl Upload {
    pub(crate) fn new(incoming: Incoming, request: &Parts) -> Self {
        Self {
            unasked: !incoming.is_end_stream() && request.headers.contains_key(EXPECT),
            incoming: Some(incoming),
            may_be_reset: request.version == Version::HTTP_2,
        }
    }

    /// Whether a body that has nothing more to give was broken off.
    pub(crate) fn is_broken_off(&self) -> bool {
        self.may_be_reset && !self.is_end_stream()
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        this.unasked = false;
        this.incoming.as_mut().map_or(Poll::Ready(None), |incoming| Pin::new(incoming).poll_frame(cx))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if self.unasked || self.is_end_stream() {
            return;
        }
        // None while the worker itself ends.
        if let (Some(incoming), Ok(worker)) = (self.incoming.take(), Handle::try_current()) {
            worker.spawn(timeout(UNWANTED_TIME, take(incoming)));
        }
    }
}

async fn take(mut incoming: Incoming) {
    let mut left = UNWANTED_BYTES;
    while let Some(Ok(frame)) = incoming.frame().await {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
        if left == 0 {
            return;
        }
    }
}
