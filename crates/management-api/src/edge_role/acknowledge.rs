//! When an edge may say that it serves a generation.

use std::{collections::VecDeque, time::Duration};
use systemprompt_contract::Hostname;
use systemprompt_edge::{EdgeHandle, Route, RouteTable, Upstream};
use tokio::{sync::watch, time::Instant};

/// How long an acknowledgement waits for the requests on a replaced upstream to end.
pub(super) const DRAIN_BOUND: Duration = Duration::from_secs(10);
/// Between looks at what is in flight.
const LOOK: Duration = Duration::from_millis(5);

/// What a new table took away from requests.
struct Publication {
    generation: i64,
    replaced: Vec<Upstream>,
    /// From here on requests on what was replaced hold nothing up.
    give_up: Instant,
}

/// What was published and is not acknowledged yet. All drain at once; acknowledged is the newest generation up to
/// which everything is done.
pub(super) struct Acknowledgements {
    acknowledged: i64,
    pending: VecDeque<Publication>,
}

/// What an edge says of itself.
pub(super) struct Serving<'a> {
    pub(super) edge: &'a EdgeHandle,
    /// Generation of the snapshot on disk.
    pub(super) kept: &'a watch::Receiver<u64>,
}

impl Acknowledgements {
    /// Of an edge that starts with a table of this generation, from its snapshot.
    pub(super) fn new(generation: u64) -> Self {
        Self { acknowledged: generation.cast_signed(), pending: VecDeque::new() }
    }

    pub(super) fn acknowledged(&self) -> i64 {
        self.acknowledged
    }

    /// Notes a table that the edge was given.
    pub(super) fn published(&mut self, generation: i64, replaced: Vec<Upstream>) {
        self.pending.push_back(Publication { generation, replaced, give_up: Instant::now() + DRAIN_BOUND });
    }

    /// Waits until more can be acknowledged than was. Cancel-safe.
    pub(super) async fn advance(&mut self, serving: Serving<'_>) {
        loop {
            let done = |next: &Publication| {
                let generation = next.generation.cast_unsigned();
                serving.edge.serving_generation() >= generation
                    && *serving.kept.borrow() >= generation
                    && drained(next, |upstream| serving.edge.in_flight(upstream), Instant::now())
            };
            if self.take(done) {
                return;
            }
            if self.pending.is_empty() {
                return std::future::pending().await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Takes from the front what is done.
    fn take(&mut self, done: impl Fn(&Publication) -> bool) -> bool {
        let mut moved = false;
        while self.pending.front().is_some_and(&done) {
            if let Some(next) = self.pending.pop_front() {
                self.acknowledged = next.generation;
                moved = true;
            }
        }
        moved
    }
}

fn drained(publication: &Publication, in_flight: impl Fn(&Upstream) -> usize, now: Instant) -> bool {
    now >= publication.give_up || publication.replaced.iter().all(|upstream| in_flight(upstream) == 0)
}

/// The upstreams of `hosts` that no longer serve after a change.
pub(super) fn replaced<'a>(
    before: &RouteTable,
    after: &RouteTable,
    hosts: impl IntoIterator<Item = &'a Hostname>,
) -> Vec<Upstream> {
    let upstream = |table: &RouteTable, host| match table.lookup(host) {
        Some(Route::Tenant { upstream, .. }) => Some(upstream.clone()),
        _ => None,
    };
    hosts
        .into_iter()
        .filter_map(|host| upstream(before, host).filter(|old| upstream(after, host).as_ref() != Some(old)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::edge_role::snapshot::table_of;

    fn upstream(port: u16) -> Upstream {
        Upstream::Tcp(([127, 0, 0, 1], port).into())
    }

    fn tenant(name: &str, port: u16) -> (Hostname, Route) {
        let route = Route::Tenant { slug: "0123456789ab".parse().unwrap(), upstream: upstream(port) };
        (name.parse().unwrap(), route)
    }

    #[test]
    fn a_table_read_anew_is_told_from_the_one_before_by_what_it_took_away() {
        let before = table_of(3, [tenant("a.example", 1), tenant("b.example", 2), tenant("c.example", 3)]);
        let after = table_of(9, [tenant("a.example", 1), tenant("b.example", 4), tenant("d.example", 5)]);
        let mut gone = replaced(&before, &after, before.iter().map(|(host, _)| host));
        gone.sort_unstable();
        assert_eq!(gone, [upstream(2), upstream(3)]);
    }

    #[tokio::test]
    async fn drains_run_at_once_and_are_acknowledged_in_order() {
        let mut acknowledgements = Acknowledgements::new(4);
        acknowledgements.published(5, vec![upstream(1)]);
        acknowledgements.published(6, vec![upstream(2)]);
        acknowledgements.published(7, vec![]);
        let now = Instant::now();
        let idle = |busy: &'static [u16]| {
            move |asked: &Upstream| busy.iter().filter(|port| *asked == upstream(**port)).count()
        };
        assert!(!acknowledgements.take(|next| drained(next, idle(&[1]), now)), "5 still drains");
        assert_eq!(acknowledgements.acknowledged(), 4);
        assert!(acknowledgements.take(|next| drained(next, idle(&[2]), now)));
        assert_eq!(acknowledgements.acknowledged(), 5);
        // The bound counts from the publication, for all of them at once.
        assert!(acknowledgements.take(|next| drained(next, idle(&[2]), now + DRAIN_BOUND)));
        assert_eq!(acknowledgements.acknowledged(), 7);
    }
}
