//! How often somebody may try to sign in: a bucket of tries per address and one per client.
//! None is shared by all, or one stranger could shut everybody out; how much work there is at once, `password` bounds.
//!
//! In memory on purpose: a restart gives an attacker one more handful of tries, a table would give him a way to
//! write to the database. The price of a bucket per address is that a stranger can slow its owner's sign-in down;
//! tokens that exist keep working.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Tries left, per address and per client. Clones share one state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Limits(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    by_client: HashMap<String, Bucket>,
    /// By normalised address. Each entry costs a try of its client's, and a recovered one is dropped.
    by_address: HashMap<String, Bucket>,
}

impl Limits {
    /// Takes one try of `client` for `address`, or says how long to wait for the next.
    pub(crate) fn admit(&self, client: &str, address: &str, now: Instant) -> Result<(), Duration> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.by_address.retain(|_, bucket| !bucket.has_recovered(now, &PER_ADDRESS));
        state.by_client.retain(|_, bucket| !bucket.has_recovered(now, &PER_CLIENT));
        let of_client = state.by_client.get(client).and_then(|bucket| bucket.wait(now, &PER_CLIENT));
        let wait = state.by_address.get(address).and_then(|bucket| bucket.wait(now, &PER_ADDRESS));
        if let Some(wait) = wait.or(of_client) {
            return Err(wait);
        }
        state.by_client.entry(client.to_owned()).or_default().take(now, &PER_CLIENT);
        state.by_address.entry(address.to_owned()).or_default().take(now, &PER_ADDRESS);
        Ok(())
    }

    /// Forgets the tries of `address`, whose owner got in.
    pub(crate) fn forgive(&self, address: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).by_address.remove(address);
    }
}

/// A bucket that leaks: `level` counts tries that have not run out yet.
#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    level: f64,
    measured: Option<Instant>,
}

struct Rate {
    burst: f64,
    one_per: Duration,
}

impl Bucket {
    fn level_at(&self, now: Instant, rate: &Rate) -> f64 {
        let elapsed = self.measured.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        (self.level - elapsed.as_secs_f64() / rate.one_per.as_secs_f64()).max(0.0)
    }

    fn wait(&self, now: Instant, rate: &Rate) -> Option<Duration> {
        let excess = self.level_at(now, rate) + 1.0 - rate.burst;
        (excess > 0.0).then(|| rate.one_per.mul_f64(excess))
    }

    fn take(&mut self, now: Instant, rate: &Rate) {
        *self = Self { level: self.level_at(now, rate) + 1.0, measured: Some(now) };
    }

    fn has_recovered(&self, now: Instant, rate: &Rate) -> bool {
        self.level_at(now, rate) <= 0.0
    }
}

const PER_ADDRESS: Rate = Rate { burst: 8.0, one_per: Duration::from_secs(30) };
const PER_CLIENT: Rate = Rate { burst: 30.0, one_per: Duration::from_secs(2) };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_a_handful_of_tries_and_then_one_in_a_while() {
        let (limits, start) = (Limits::default(), Instant::now());
        for _ in 0..8 {
            limits.admit("1", "a@b.c", start).unwrap();
        }
        let wait = limits.admit("1", "a@b.c", start).unwrap_err();
        assert!(wait <= PER_ADDRESS.one_per && wait > PER_ADDRESS.one_per / 2, "{wait:?}");
        limits.admit("1", "other@b.c", start).expect("another address has its own");
        limits.admit("1", "a@b.c", start + wait).expect("after the wait");
        limits.admit("1", "a@b.c", start + wait).unwrap_err();
        limits.forgive("a@b.c");
        limits.admit("1", "a@b.c", start + wait).expect("forgiven");
    }

    #[test]
    fn one_client_runs_out_alone_and_is_forgotten() {
        let (limits, start) = (Limits::default(), Instant::now());
        let admitted = (0..1000).filter(|n| limits.admit("1", &format!("{n}@b.c"), start).is_ok()).count();
        assert_eq!(admitted, 30);
        limits.admit("2", "owner@b.c", start).expect("another client has its own");
        assert_eq!(limits.0.lock().unwrap().by_address.len(), 31, "a refused address costs no memory");
        limits.admit("1", "last@b.c", start + Duration::from_secs(61)).unwrap();
        assert_eq!(limits.0.lock().unwrap().by_address.len(), 1);
    }
}
