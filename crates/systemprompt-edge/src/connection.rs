//! What the edge knows about one client connection while it lives, and the sweep that ends the ones
//! that misbehave.
//!
//! No connection has timers of its own: each marks what it waits for, and one sweep a tick looks at all
//! of them. That keeps clocks and timers off the request path.

use crate::{
    config::Limits,
    gate::{Refusal, Refused, Upgrade},
    input::Input,
};
use futures_util::task::AtomicWaker;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::Notify;

/// Shared by the connection's task, its requests, its gate and the sweep. One thread uses it, but for
/// the counters read by [`EdgeHandle`](crate::EdgeHandle), so nothing here is ever contended.
#[derive(Debug, Default)]
pub(crate) struct Connection {
    pub(crate) input: Arc<Input>,
    /// Requests that are not answered to the last byte yet.
    active: AtomicUsize,
    /// Requests ever begun.
    begun: AtomicU64,
    /// Final answers other than 101; tells the gate that an upgrade was refused.
    answered: AtomicU64,
    upgraded: AtomicBool,
    /// What the gate refused, after how many whole heads.
    refusal: OnceLock<(u64, Refused, Refusal)>,
    gate_waits: AtomicBool,
    gate: AtomicWaker,
    inside_head: AtomicBool,
    write_stalled: AtomicBool,
    written: AtomicU64,
    verdict: AtomicU8,
    task: AtomicWaker,
}

/// What a connection's task has been told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Verdict {
    /// Go on.
    Live = 0,
    /// Finish what is in flight, then close.
    Close = 1,
    /// Close now.
    Cut = 2,
}

impl Connection {
    /// A request begins.
    pub(crate) fn begin(&self) {
        self.active.fetch_add(1, Relaxed);
        self.begun.fetch_add(1, Relaxed);
    }

    /// A request is over: its last byte was handed on, or it was given up.
    pub(crate) fn end(&self) {
        self.active.fetch_sub(1, Relaxed);
    }

    /// The head of a final answer other than 101 is ready.
    pub(crate) fn answered(&self) {
        self.answered.fetch_add(1, Relaxed);
        if self.gate_waits.load(Relaxed) {
            self.gate.wake();
        }
    }

    /// The answer is 101.
    pub(crate) fn upgraded(&self) {
        self.upgraded.store(true, Relaxed);
        self.gate.wake();
    }

    /// The gate refuses a part of a message after this many whole heads.
    pub(crate) fn refuse(&self, heads: u64, part: Refused, refusal: Refusal) {
        let _ = self.refusal.set((heads, part, refusal));
    }

    /// Why that part of the request that is to be answered next was refused, if it was.
    pub(crate) fn refusal(&self, part: Refused) -> Option<Refusal> {
        let (heads, refused, refusal) = self.refusal.get()?;
        let before = heads - u64::from(*refused == Refused::Body);
        (*refused == part && before == self.answered.load(Relaxed)).then_some(*refusal)
    }

    /// Waits until the request with this number (from 1) was answered.
    pub(crate) fn poll_upgrade(&self, cx: &mut Context<'_>, number: u64) -> Poll<Upgrade> {
        self.gate_waits.store(true, Relaxed);
        self.gate.register(cx.waker());
        let outcome = if self.upgraded.load(Relaxed) {
            Upgrade::Accepted
        } else if self.answered.load(Relaxed) >= number {
            Upgrade::Refused
        } else {
            return Poll::Pending;
        };
        self.gate_waits.store(false, Relaxed);
        Poll::Ready(outcome)
    }

    /// A head has begun and not ended, or not.
    pub(crate) fn inside_head(&self, inside: bool) {
        if self.inside_head.load(Relaxed) != inside {
            self.inside_head.store(inside, Relaxed);
        }
    }

    /// The client takes no bytes.
    pub(crate) fn write_stalled(&self) {
        self.write_stalled.store(true, Relaxed);
    }

    /// The client took bytes.
    pub(crate) fn wrote(&self) {
        if self.write_stalled.load(Relaxed) {
            self.write_stalled.store(false, Relaxed);
            self.written.fetch_add(1, Relaxed);
        }
    }

    /// Registers the task that drives the connection; to be called before the first [`Self::verdict`].
    pub(crate) fn register(&self, cx: &Context<'_>) {
        self.task.register(cx.waker());
    }

    pub(crate) fn verdict(&self) -> Verdict {
        match self.verdict.load(Relaxed) {
            0 => Verdict::Live,
            1 => Verdict::Close,
            _ => Verdict::Cut,
        }
    }

    /// Waits for any verdict but [`Verdict::Live`].
    pub(crate) async fn told_to_close(&self) {
        std::future::poll_fn(|cx| {
            self.register(cx);
            if self.verdict() == Verdict::Live { Poll::Pending } else { Poll::Ready(()) }
        })
        .await;
    }

    /// Waits for [`Verdict::Cut`].
    pub(crate) async fn told_to_cut(&self) {
        std::future::poll_fn(|cx| {
            self.register(cx);
            if self.verdict() == Verdict::Cut { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Ends the connection at once.
    pub(crate) fn cut(&self) {
        self.tell(Verdict::Cut);
    }

    fn tell(&self, verdict: Verdict) {
        if self.verdict() != verdict {
            self.verdict.fetch_max(verdict as u8, Relaxed);
            self.task.wake();
        }
    }
}

/// All client connections of one worker.
#[derive(Debug, Default)]
pub(crate) struct Connections {
    inner: Mutex<Open>,
    /// Signalled whenever one ends.
    ended: Notify,
}

#[derive(Debug, Default)]
struct Open {
    next: u64,
    by_number: HashMap<u64, Entry>,
}

#[derive(Debug)]
struct Entry {
    connection: Arc<Connection>,
    idle: Since<u64>,
    head: Since<u64>,
    stall: Since<u64>,
}

/// How long something has been the same.
#[derive(Debug, Default)]
struct Since<T> {
    value: Option<T>,
    since: Duration,
}

impl<T: PartialEq> Since<T> {
    /// For how long `value` has been this one; `None` has no length.
    fn lasts(&mut self, value: Option<T>, now: Duration) -> Option<Duration> {
        if self.value != value {
            self.value = value;
            self.since = now;
        }
        self.value.as_ref().map(|_| now.saturating_sub(self.since))
    }
}

impl Connections {
    /// Enters a new connection; it counts as open until the guard is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Registered {
        let connection = Arc::new(Connection::default());
        let mut open = self.open();
        let number = open.next;
        open.next += 1;
        let entry = Entry {
            connection: Arc::clone(&connection),
            idle: Since::default(),
            head: Since::default(),
            stall: Since::default(),
        };
        open.by_number.insert(number, entry);
        Registered { connection, number, connections: Arc::clone(self) }
    }

    pub(crate) fn count(&self) -> usize {
        self.open().by_number.len()
    }

    /// Tells all connections the same.
    pub(crate) fn tell_all(&self, verdict: Verdict) {
        for entry in self.open().by_number.values() {
            entry.connection.tell(verdict);
        }
    }

    /// Ends the connections that have been idle, in the middle of a head, or unable to write for too long.
    /// `now` is any clock that never goes back.
    pub(crate) fn sweep(&self, now: Duration, limits: &Limits) {
        for entry in self.open().by_number.values_mut() {
            let connection = Arc::clone(&entry.connection);
            let begun = connection.begun.load(Relaxed);
            let at_rest = (connection.active.load(Relaxed) == 0).then_some(begun);
            // While an answer is on its way, nobody waits for the next head.
            let in_head = at_rest.filter(|_| connection.inside_head.load(Relaxed));
            let stalled = connection.write_stalled.load(Relaxed).then(|| connection.written.load(Relaxed));
            let idle = entry.idle.lasts(at_rest, now);
            if entry.head.lasts(in_head, now) > Some(limits.head_timeout)
                || entry.stall.lasts(stalled, now) > Some(limits.write_stall)
                // What is over for us may still lie in the protocol's queues, for a client that takes nothing.
                || idle > Some(limits.idle + limits.write_stall)
            {
                connection.tell(Verdict::Cut);
            } else if idle > Some(limits.idle) {
                connection.tell(Verdict::Close);
            }
        }
    }

    /// Waits until no connection is left. Cancel-safe.
    pub(crate) async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Waits until fewer than `limit` are open. Cancel-safe.
    pub(crate) async fn room(&self, limit: usize) {
        loop {
            let ended = self.ended.notified();
            if self.count() < limit {
                return;
            }
            ended.await;
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        // A panic while the lock is held leaves the map whole: every change is one call.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among the open ones.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) connection: Arc<Connection>,
    number: u64,
    connections: Arc<Connections>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.open().by_number.remove(&self.number);
        self.connections.ended.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn idle_connections_close_and_stuck_ones_are_cut() {
        let limits =
            Limits { idle: seconds(60), head_timeout: seconds(10), write_stall: seconds(20), ..Limits::default() };
        let connections = Arc::new(Connections::default());
        let [idle, busy, head, stalled] = [(); 4].map(|()| connections.enter());
        busy.connection.begin();
        head.connection.inside_head(true);
        stalled.connection.begin();
        stalled.connection.write_stalled();
        let verdicts = || [&idle, &busy, &head, &stalled].map(|entry| entry.connection.verdict());
        for (now, expected) in [
            (0, [Verdict::Live; 4]),
            (10, [Verdict::Live; 4]),
            (11, [Verdict::Live, Verdict::Live, Verdict::Cut, Verdict::Live]),
            (21, [Verdict::Live, Verdict::Live, Verdict::Cut, Verdict::Cut]),
            (61, [Verdict::Close, Verdict::Live, Verdict::Cut, Verdict::Cut]),
            (80, [Verdict::Close, Verdict::Live, Verdict::Cut, Verdict::Cut]),
            (81, [Verdict::Cut, Verdict::Live, Verdict::Cut, Verdict::Cut]),
        ] {
            connections.sweep(seconds(now), &limits);
            assert_eq!(verdicts(), expected, "after {now} s");
        }
        drop(idle);
        assert_eq!(connections.count(), 3);
    }

    #[test]
    fn a_request_between_two_sweeps_starts_the_idle_time_anew() {
        let limits = Limits { idle: seconds(60), ..Limits::default() };
        let connections = Arc::new(Connections::default());
        let entry = connections.enter();
        connections.sweep(seconds(0), &limits);
        entry.connection.begin();
        entry.connection.end();
        connections.sweep(seconds(50), &limits);
        connections.sweep(seconds(100), &limits);
        assert_eq!(entry.connection.verdict(), Verdict::Live);
        connections.sweep(seconds(111), &limits);
        assert_eq!(entry.connection.verdict(), Verdict::Close);
    }
}
