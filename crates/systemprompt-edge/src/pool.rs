//! Idle connections to upstreams, and who is using which upstream. One pool for each worker.

use crate::{
    config::{Limits, Upstream},
    upstream::{Clock, Link},
};
use foldhash::fast::RandomState;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// The upstreams one worker talks to. Used by that worker's thread; only counters are read by others.
pub(crate) struct Pool {
    origins: Mutex<HashMap<Upstream, Arc<Origin>, RandomState>>,
    shared: Arc<Shared>,
}

struct Shared {
    clock: Arc<Clock>,
    idle: AtomicUsize,
    idle_max: usize,
    idle_per_upstream: usize,
}

/// One upstream.
pub(crate) struct Origin {
    upstream: Upstream,
    in_flight: AtomicUsize,
    /// No route leads here any more: connections are not kept.
    retired: AtomicBool,
    /// The last in is the first out: what is not needed ages at the bottom.
    idle: Mutex<Vec<Idle>>,
    shared: Arc<Shared>,
}

struct Idle {
    link: Link,
    /// Sweeps survived since it was last used.
    sweeps: u32,
}

impl Pool {
    pub(crate) fn new(limits: &Limits) -> Self {
        let shared = Shared {
            clock: Arc::default(),
            idle: AtomicUsize::new(0),
            idle_max: limits.idle_upstreams,
            idle_per_upstream: limits.idle_per_upstream,
        };
        Self { origins: Mutex::default(), shared: Arc::new(shared) }
    }

    /// Claims an upstream for one request or tunnel. To be called in the same breath as the route
    /// lookup: whoever sees the count of an unrouted upstream at zero may stop it.
    pub(crate) fn claim(&self, upstream: &Upstream) -> Claim {
        let mut origins = lock(&self.origins);
        let origin = if let Some(origin) = origins.get(upstream) {
            Arc::clone(origin)
        } else {
            let origin = Arc::new(Origin {
                upstream: upstream.clone(),
                in_flight: AtomicUsize::new(0),
                retired: AtomicBool::new(false),
                idle: Mutex::default(),
                shared: Arc::clone(&self.shared),
            });
            origins.insert(upstream.clone(), Arc::clone(&origin));
            origin
        };
        origin.in_flight.fetch_add(1, Relaxed);
        Claim { origin }
    }

    /// Claims on an upstream that are not over yet.
    pub(crate) fn in_flight(&self, upstream: &Upstream) -> usize {
        lock(&self.origins).get(upstream).map_or(0, |origin| origin.in_flight.load(Relaxed))
    }

    /// Drops the idle connections of all upstreams that are not routed to any more.
    pub(crate) fn retain(&self, routed: impl Fn(&Upstream) -> bool) {
        lock(&self.origins).retain(|upstream, origin| {
            let routed = routed(upstream);
            origin.retired.store(!routed, Relaxed);
            if !routed {
                origin.keep(|_| false);
            }
            routed || origin.in_flight.load(Relaxed) > 0
        });
    }

    /// Drops idle connections that were closed by the upstream or have survived `sweeps` calls, and gives
    /// up requests that have waited for an answer for more than `patience` calls.
    pub(crate) fn sweep(&self, sweeps: u32, patience: u32) {
        self.shared.clock.tick(u64::from(patience));
        lock(&self.origins).retain(|_, origin| {
            origin.keep(|idle| {
                idle.sweeps += 1;
                idle.sweeps <= sweeps && !idle.link.is_closed()
            });
            origin.in_flight.load(Relaxed) > 0 || !lock(&origin.idle).is_empty()
        });
    }

    /// How many calls of [`Self::sweep`], one every `tick`, make the age at which a connection goes.
    pub(crate) fn sweeps(age: Duration, tick: Duration) -> u32 {
        u32::try_from(age.as_millis() / tick.as_millis().max(1)).unwrap_or(u32::MAX)
    }
}

impl Origin {
    fn keep(&self, mut wanted: impl FnMut(&mut Idle) -> bool) {
        let mut idle = lock(&self.idle);
        let before = idle.len();
        idle.retain_mut(&mut wanted);
        self.shared.idle.fetch_sub(before - idle.len(), Relaxed);
    }
}

/// A request's or tunnel's hold on an upstream, until it is dropped.
pub(crate) struct Claim {
    origin: Arc<Origin>,
}

impl Claim {
    pub(crate) fn upstream(&self) -> &Upstream {
        &self.origin.upstream
    }

    /// What requests on this upstream wait by.
    pub(crate) fn clock(&self) -> &Arc<Clock> {
        &self.origin.shared.clock
    }

    /// The idle connection used last. It may have been closed since.
    pub(crate) fn take_idle(&self) -> Option<Link> {
        let link = lock(&self.origin.idle).pop()?.link;
        self.origin.shared.idle.fetch_sub(1, Relaxed);
        Some(link)
    }

    /// Keeps a connection whose last exchange came to its regular end.
    pub(crate) fn give_back(&self, link: Link) {
        let shared = &self.origin.shared;
        let mut idle = lock(&self.origin.idle);
        let room = idle.len() < shared.idle_per_upstream && shared.idle.load(Relaxed) < shared.idle_max;
        if room && !self.origin.retired.load(Relaxed) {
            shared.idle.fetch_add(1, Relaxed);
            idle.push(Idle { link, sweeps: 0 });
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.origin.in_flight.fetch_sub(1, Relaxed);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is one call, so a panic leaves them whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(port: u16) -> Upstream {
        Upstream::Tcp(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn an_unrouted_upstream_is_counted_until_its_last_claim_ends() {
        let pool = Pool::new(&Limits::default());
        let first = pool.claim(&upstream(1));
        let second = pool.claim(&upstream(1));
        pool.retain(|_| false);
        assert_eq!(pool.in_flight(&upstream(1)), 2);
        drop(first);
        assert_eq!(pool.in_flight(&upstream(1)), 1);
        drop(second);
        assert_eq!(pool.in_flight(&upstream(1)), 0);
        pool.retain(|_| false);
        assert!(lock(&pool.origins).is_empty());
    }

    #[test]
    fn connections_age_by_sweeps() {
        assert_eq!(Pool::sweeps(Duration::from_mins(1), Duration::from_secs(1)), 60);
        assert_eq!(Pool::sweeps(Duration::from_millis(10), Duration::from_millis(25)), 0);
    }
}
