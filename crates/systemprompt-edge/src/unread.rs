//! HTTP/2 streams whose client takes nothing: reset, as the socket's stall ends an HTTP/1.1 connection.
//!
//! A client that grants no flow-control window leaves the socket idle and would hold its upstream's
//! connection for ever. hyper takes one part of an answer ahead and asks for the next only when there was
//! room for that, so an answer that is not asked waits for its client.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};
use tokio::time::{Instant, Sleep};

tokio::task_local! {
    /// The watch of the stream whose task runs.
    static STREAM: Arc<Unread>;
}

/// How many times the answer of a stream went to its client, doubled; odd while the client has not come for
/// more. One task uses it.
#[derive(Debug, Default)]
pub(crate) struct Unread(AtomicU64);

impl Unread {
    /// Of the stream whose task runs; none on HTTP/1.1.
    pub(crate) fn current() -> Option<Arc<Self>> {
        STREAM.try_with(Arc::clone).ok()
    }

    /// A part of the answer goes to the client.
    pub(crate) fn handed_on(&self) {
        self.0.store((self.0.load(Relaxed) + 1) | 1, Relaxed);
    }

    /// The client has room for more.
    pub(crate) fn asked(&self) {
        self.0.store((self.0.load(Relaxed) + 1) & !1, Relaxed);
    }

    fn waits_for_client(&self) -> Option<u64> {
        Some(self.0.load(Relaxed)).filter(|count| count % 2 == 1)
    }
}

/// Runs the streams of one HTTP/2 connection, each until its client has taken nothing for `limit`.
#[derive(Debug, Clone)]
pub(crate) struct Streams {
    pub(crate) limit: Duration,
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let (unread, limit) = (Arc::new(Unread::default()), self.limit);
        let watched = watch(stream, Arc::clone(&unread), limit);
        tokio::spawn(STREAM.scope(unread, watched));
    }
}

/// Dropping the stream's future resets the stream.
async fn watch(stream: impl Future<Output = ()>, unread: Arc<Unread>, limit: Duration) {
    let mut stream = pin!(stream);
    // Armed for one part of the answer; most answers are over before they need it.
    let mut patience: Option<(u64, Pin<Box<Sleep>>)> = None;
    poll_fn(|cx| {
        if stream.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let Some(part) = unread.waits_for_client() else {
            patience = None;
            return Poll::Pending;
        };
        let (armed, sleep) = patience.get_or_insert_with(|| (part, Box::pin(tokio::time::sleep(limit))));
        while sleep.as_mut().poll(cx).is_ready() {
            if *armed == part {
                tracing::debug!("a client takes nothing: stream reset");
                return Poll::Ready(());
            }
            *armed = part;
            sleep.as_mut().reset(Instant::now() + limit);
        }
        Poll::Pending
    })
    .await;
}
