//! The worker: claims what is due, keeps its leases alive, runs the operations, hands them back when it stops.

use crate::{
    Db, Step, Workflow,
    listen::{Heard, listen},
    run::{Registration, Runner, Ticket, Tools},
    store::{self, CHANNEL, ClaimRequest, Claimed, Standing},
};
use sqlx::PgPool;
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use systemprompt_contract::OperationId;
use tokio::{
    sync::Notify,
    task::{AbortHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

/// How a worker works.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Who holds a lease, for people who read the table and for [`crate::release_leases`]. Fences, not names, keep
    /// workers apart: engines of one process may share one.
    pub worker_id: String,
    /// After this long without a heartbeat another worker may adopt the operation.
    pub lease: Duration,
    /// How often leases are extended; a third of `lease` leaves room for two failures.
    pub heartbeat: Duration,
    /// Operations run at once.
    pub concurrency: usize,
    /// The longest time without looking for work, should a notification be lost.
    pub poll: Duration,
}

impl EngineConfig {
    /// A lease of 10 s, a heartbeat every 3 s, 16 operations at once, a look at the table every 2 s.
    pub fn new(worker_id: impl Into<String>) -> Self {
        Self {
            worker_id: worker_id.into(),
            lease: Duration::from_secs(10),
            heartbeat: Duration::from_secs(3),
            concurrency: 16,
            poll: Duration::from_secs(2),
        }
    }
}

impl Default for EngineConfig {
    /// [`EngineConfig::new`] with an id of this process.
    fn default() -> Self {
        Self::new(format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple()))
    }
}

/// Runs operations of the workflows it knows and leaves all others alone.
pub struct Engine {
    db: Db,
    config: EngineConfig,
    runners: HashMap<String, Arc<dyn Runner>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("config", &self.config)
            .field("workflows", &self.runners.keys())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// A worker that knows no workflow yet.
    pub fn new(db: Db, config: EngineConfig) -> Self {
        Self { db, config, runners: HashMap::new() }
    }

    /// Teaches the worker a workflow and hands over what its steps act upon.
    ///
    /// # Panics
    /// The workflow has no steps, or two of one name: a bug that the first start shows.
    #[must_use]
    pub fn register<W: Workflow>(self, context: W::Context) -> Self {
        self.register_steps(context, W::steps())
    }

    /// The same with other steps than the workflow's own: how the test helpers break it.
    pub(crate) fn register_steps<W: Workflow>(mut self, context: W::Context, steps: Vec<Step<W>>) -> Self {
        let mut names: Vec<_> = steps.iter().map(|step| step.name).collect();
        names.sort_unstable();
        assert!(!names.is_empty(), "workflow {} has no steps", W::NAME);
        assert!(names.windows(2).all(|pair| pair[0] != pair[1]), "workflow {} has two steps of one name", W::NAME);
        self.runners.insert(W::NAME.to_owned(), Arc::new(Registration::new(steps, context)));
        self
    }

    /// Works until `stop`, then lets each running step come to its end (for five seconds), gives the leases back
    /// between steps, and returns. A database that is away is waited for.
    ///
    /// Dropping the future is as a crash: the operations are adopted when their leases lapse.
    pub async fn run(self, stop: CancellationToken) {
        let names: Vec<String> = self.runners.keys().cloned().collect();
        let held = Arc::new(Held::default());
        let wake = Arc::new(Notify::new());
        let side = self.db.side_pool(2);
        let _background = [self.spawn_heartbeat(&side, &held), spawn_listener(side.clone(), &held, &wake)];

        let mut runs = JoinSet::new();
        while !stop.is_cancelled() {
            while runs.try_join_next().is_some() {}
            let free = self.config.concurrency.saturating_sub(runs.len());
            let claimed = self.claim(&names, free).await;
            let full = claimed.len() == free;
            for operation in claimed {
                self.spawn(&mut runs, operation, &held, &stop);
            }
            let pause = if full { self.config.poll } else { self.pause(&names).await };
            tokio::select! {
                () = stop.cancelled() => {}
                () = wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                // A slot is free, or a step backs off and its pause has to be looked up.
                Some(_) = runs.join_next() => {}
            }
        }
        while runs.join_next().await.is_some() {}
    }

    async fn claim(&self, names: &[String], limit: usize) -> Vec<(Claimed, Instant)> {
        if limit == 0 || names.is_empty() {
            return Vec::new();
        }
        let asked_at = Instant::now();
        let request =
            ClaimRequest { workflows: names, worker: &self.config.worker_id, lease: self.config.lease, limit };
        match store::claim(&self.db, request).await {
            Ok(claimed) => claimed.into_iter().map(|claimed| (claimed, asked_at)).collect(),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "no work can be claimed now");
                Vec::new()
            }
        }
    }

    fn spawn(
        &self,
        runs: &mut JoinSet<()>,
        (claimed, asked_at): (Claimed, Instant),
        held: &Arc<Held>,
        stop: &CancellationToken,
    ) {
        let Some(runner) = self.runners.get(&claimed.workflow).cloned() else { return };
        let ticket = Arc::new(Ticket::new(claimed.lease, asked_at));
        if claimed.cancel_requested {
            ticket.cancel.cancel();
        }
        let holding = Holding::new(held.clone(), ticket.clone());
        let tools = Tools { db: self.db.clone(), ticket, stop: stop.clone() };
        runs.spawn(async move {
            let _holding = holding;
            runner.run(claimed, tools).await;
        });
    }

    /// Until the next backoff ends or a lease lapses, but not longer than a poll.
    async fn pause(&self, names: &[String]) -> Duration {
        match store::next_due(&self.db, names).await {
            // Not zero: what is due now but was not claimed is locked by another worker at this moment.
            Ok(Some(due)) => due.clamp(Duration::from_millis(10), self.config.poll),
            Ok(None) | Err(_) => self.config.poll,
        }
    }

    fn spawn_heartbeat(&self, side: &PgPool, held: &Arc<Held>) -> AbortOnDrop {
        let heart =
            Heart { side: side.clone(), held: held.clone(), lease: self.config.lease, interval: self.config.heartbeat };
        AbortOnDrop(tokio::spawn(heart.beat_for_ever()).abort_handle())
    }
}

fn spawn_listener(side: PgPool, held: &Arc<Held>, wake: &Arc<Notify>) -> AbortOnDrop {
    let (held, wake) = (held.clone(), wake.clone());
    let listener = listen(side, CHANNEL, move |heard| {
        if heard != Heard::Payload("") {
            held.look.notify_one();
        }
        wake.notify_one();
    });
    AbortOnDrop(tokio::spawn(listener).abort_handle())
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The leases this worker holds.
#[derive(Default)]
struct Held {
    tickets: Mutex<HashMap<(OperationId, i64), Arc<Ticket>>>,
    /// A lease came, which may lapse before the next beat.
    arrived: Notify,
    /// Somebody may have asked for an operation to end: beat now.
    look: Notify,
}

impl Held {
    fn tickets(&self) -> Vec<Arc<Ticket>> {
        self.tickets.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// A ticket's place among the held ones, for as long as its run lives.
struct Holding {
    held: Arc<Held>,
    key: (OperationId, i64),
}

impl Holding {
    fn new(held: Arc<Held>, ticket: Arc<Ticket>) -> Self {
        let key = (ticket.lease.operation, ticket.lease.fence);
        held.tickets.lock().unwrap_or_else(PoisonError::into_inner).insert(key, ticket);
        held.arrived.notify_one();
        Self { held, key }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.held.tickets.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Keeps the leases alive, and ends the runs whose lease may be gone.
struct Heart {
    side: PgPool,
    held: Arc<Held>,
    lease: Duration,
    interval: Duration,
}

impl Heart {
    async fn beat_for_ever(self) {
        let mut last_beat = Instant::now();
        loop {
            let next = last_beat + self.interval;
            let first_end = self.held.tickets().iter().map(|ticket| ticket.valid_until()).min();
            let wake_at = first_end.map_or(next, |end| end.min(next));
            let look = tokio::select! {
                () = tokio::time::sleep_until(wake_at.into()) => false,
                () = self.held.arrived.notified() => false,
                () = self.held.look.notified() => true,
            };
            self.give_up_lapsed();
            if look || Instant::now() >= next {
                last_beat = Instant::now();
                self.beat().await;
            }
        }
    }

    /// A lease that may have lapsed is treated as lost, whatever the database would say.
    fn give_up_lapsed(&self) {
        let now = Instant::now();
        let mut tickets = self.held.tickets.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|_, ticket| {
            let valid = now < ticket.valid_until();
            if !valid {
                ticket.lost.cancel();
            }
            valid
        });
    }

    async fn beat(&self) {
        let tickets = self.held.tickets();
        if tickets.is_empty() {
            return;
        }
        let leases: Vec<_> = tickets.iter().map(|ticket| ticket.lease).collect();
        let asked_at = Instant::now();
        let answer = store::heartbeat(&self.side, &leases, self.lease);
        let beats = match tokio::time::timeout(self.interval, answer).await {
            Ok(Ok(beats)) => beats,
            Ok(Err(error)) => return tracing::warn!(%error, "a heartbeat failed"),
            Err(_) => return tracing::warn!("a heartbeat was not answered"),
        };
        for beat in beats {
            let mine =
                |ticket: &&Arc<Ticket>| (ticket.lease.operation, ticket.lease.fence) == (beat.operation, beat.fence);
            let Some(ticket) = tickets.iter().find(mine) else { continue };
            match beat.standing {
                Standing::Extended => ticket.extend(asked_at),
                Standing::Locked => {}
                Standing::Lost => ticket.lost.cancel(),
            }
            if beat.cancel_requested {
                ticket.cancel.cancel();
            }
        }
    }
}
