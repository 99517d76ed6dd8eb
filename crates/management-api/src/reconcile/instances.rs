//! Every live release has an instance, and its route points at it, also while a deploy or anything else works on the
//! tenant: an operation has only its own new instance and, behind its pivot, the one it replaced.
//!
//! An instance that ended is started again, each start a growing pause after the one before; the exit's reason is kept
//! for its owner.

use crate::{
    app::Infrastructure,
    tenants::{
        deploy, routes,
        store::{self, Deployment, Tenant},
    },
};
use chrono::{DateTime, Utc};
use sqlx::PgTransaction;
use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};
use systemprompt_compute::{ExitReason, InstanceHandle, InstanceState};
use systemprompt_contract::{DeploymentId, TenantId};
use systemprompt_edge::{Route, Upstream};
use systemprompt_workflow::Db;
use tokio::{
    sync::{Mutex, OwnedMutexGuard, Semaphore},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

const PASS: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// An instance that lived so long has its starts forgiven.
const STEADY: Duration = Duration::from_mins(2);
/// How many instances are started at a time: unpacking an image takes disk and processor from what runs.
const STARTS_AT_ONCE: usize = 16;

/// What is remembered about a tenant from one look to the next.
#[derive(Debug, Default)]
struct Watch {
    /// The release that the rest is about.
    release: Option<DeploymentId>,
    /// Whether it was seen running: then its end is a crash, however it ended.
    seen: bool,
    /// Starts since it last was steady, failed ones included.
    starts: u32,
    not_before: Option<Instant>,
}

impl Watch {
    /// Forgets everything when it was about another release.
    fn on(&mut self, release: DeploymentId) {
        if self.release != Some(release) {
            *self = Self { release: Some(release), ..Self::default() };
        }
    }
    fn runs(&mut self, since: DateTime<Utc>) {
        self.seen = true;
        if (Utc::now() - since).to_std().is_ok_and(|lived| lived >= STEADY) {
            (self.starts, self.not_before) = (0, None);
        }
    }
    fn may_start(&self, now: Instant) -> bool {
        self.not_before.is_none_or(|at| now >= at)
    }
    /// A start was tried, with or without success.
    fn started(&mut self, now: Instant) {
        self.starts = self.starts.saturating_add(1);
        self.not_before = Some(now + pause(self.starts));
    }
}

/// The pause between start number `starts` and the next.
fn pause(starts: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2u32.saturating_pow(starts.saturating_sub(1))).min(LONGEST_PAUSE)
}

/// Whether an end is to be told to the owner. What ended well, by SIGTERM or with the host before this process
/// looked after it was stopped with the cloud, which is nobody's crash.
fn is_crash(reason: &ExitReason, at: DateTime<Utc>, seen: bool, supervised_since: DateTime<Utc>) -> bool {
    let with_the_cloud = matches!(reason, ExitReason::Unknown | ExitReason::Code(0) | ExitReason::Signal(15));
    !with_the_cloud || seen || at >= supervised_since
}

/// Looks after all tenants, one task a tenant, so that none waits for another.
struct Watches {
    tenants: HashMap<TenantId, Arc<Mutex<Watch>>>,
    looks: JoinSet<()>,
}

impl Watches {
    fn new() -> Self {
        Self { tenants: HashMap::new(), looks: JoinSet::new() }
    }

    /// Starts a look at each tenant that is not being looked at already, and forgets those that are not listed.
    fn look<T, F>(
        &mut self,
        tenants: impl IntoIterator<Item = (TenantId, T)>,
        look: impl Fn(T, OwnedMutexGuard<Watch>) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        while self.looks.try_join_next().is_some() {}
        let mut listed = HashMap::new();
        for (id, tenant) in tenants {
            let watch = self.tenants.remove(&id).unwrap_or_default();
            if let Ok(free) = watch.clone().try_lock_owned() {
                self.looks.spawn(look(tenant, free));
            }
            listed.insert(id, watch);
        }
        // One that is being looked at stays: its next look has to wait for this one.
        listed.extend(self.tenants.drain().filter(|(_, watch)| watch.try_lock().is_err()));
        self.tenants = listed;
    }
}

/// Looks after every live release until `stop`.
pub(crate) async fn run(db: Db, infrastructure: Infrastructure, stop: CancellationToken) {
    let since = Utc::now();
    let supervisor = Arc::new(Supervisor { db, infrastructure, since, starts: Semaphore::new(STARTS_AT_ONCE) });
    let mut watches = Watches::new();
    let mut ticks = tokio::time::interval(PASS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        match store::serving(supervisor.db.pool()).await {
            Ok(tenants) => watches.look(tenants.into_iter().map(|tenant| (tenant.id, tenant)), |tenant, mut watch| {
                let supervisor = supervisor.clone();
                async move {
                    if let Err(error) = supervisor.look(&tenant, &mut watch).await {
                        let error = format!("{error:#}");
                        tracing::warn!(tenant.slug = %tenant.slug(), error, "an instance could not be brought up; trying again");
                    }
                }
            }),
            Err(error) => tracing::warn!(%error, "reading the tenants to be served"),
        }
    }
}

struct Supervisor {
    db: Db,
    infrastructure: Infrastructure,
    since: DateTime<Utc>,
    starts: Semaphore,
}

impl Supervisor {
    async fn look(&self, tenant: &Tenant, watch: &mut Watch) -> anyhow::Result<()> {
        let Some(live) = store::live_deployment(self.db.pool(), tenant.id).await? else { return Ok(()) };
        watch.on(live.id);
        let state = match &live.instance {
            Some(handle) => self.infrastructure.driver.inspect(&InstanceHandle::new(handle.clone())).await?,
            None => InstanceState::Absent,
        };
        match state {
            InstanceState::Starting => return Ok(()),
            InstanceState::Running { address, since } => {
                watch.runs(since);
                return point_route(&self.db, &self.infrastructure, tenant, &live, address).await;
            }
            InstanceState::Exited { reason, at } if is_crash(&reason, at, watch.seen, self.since) => {
                if let Some(restarts) = store::note_exit(self.db.pool(), live.id, &reason.to_string(), at).await? {
                    tracing::warn!(tenant.slug = %tenant.slug(), %reason, restarts, starts = watch.starts, "an instance ended and will be started again");
                }
            }
            InstanceState::Exited { .. } | InstanceState::Absent => {}
        }
        if !watch.may_start(Instant::now()) {
            return Ok(());
        }
        let _turn = self.starts.acquire().await?;
        let launch = async {
            let launched = deploy::launch_release(&self.infrastructure, self.db.pool(), tenant, &live).await;
            watch.started(Instant::now());
            Ok(launched?)
        };
        if let Some(late) = launch_while_live(&self.db, tenant.id, live.id, launch).await? {
            self.infrastructure.driver.stop(&late, self.infrastructure.limits.stop_grace).await?;
        }
        Ok(())
    }
}

/// Launches a release only while it is live, and gives the instance back to be stopped when it is that no longer
/// afterwards: whoever replaced or deleted it may have stopped what ran before the launch.
async fn launch_while_live(
    db: &Db,
    tenant: TenantId,
    release: DeploymentId,
    launch: impl Future<Output = anyhow::Result<InstanceHandle>>,
) -> anyhow::Result<Option<InstanceHandle>> {
    if !serves(&mut db.begin().await?, tenant, release).await? {
        return Ok(None);
    }
    let handle = launch.await?;
    let mut tx = db.begin().await?;
    if !serves(&mut tx, tenant, release).await? {
        return Ok(Some(handle));
    }
    store::set_instance(&mut tx, release, Some(handle.as_str())).await?;
    tx.commit().await?;
    Ok(None)
}

/// Whether `release` is what the tenant serves; it stays that until the transaction ends.
async fn serves(tx: &mut PgTransaction<'_>, tenant: TenantId, release: DeploymentId) -> Result<bool, sqlx::Error> {
    Ok(store::lock(tx, tenant).await?.is_some_and(|tenant| tenant.serves(release)))
}

/// Publishes a route only when it says something else, and only while the release is live.
async fn point_route(
    db: &Db,
    infrastructure: &Infrastructure,
    tenant: &Tenant,
    live: &Deployment,
    address: SocketAddr,
) -> anyhow::Result<()> {
    let slug = tenant.slug();
    let host = slug.hostname(&infrastructure.site.zone);
    let wanted = Route::Tenant { slug, upstream: Upstream::Tcp(address) };
    let stored = sqlx::query_scalar!("SELECT target FROM routes WHERE host = $1", host.as_str())
        .fetch_optional(db.pool())
        .await?
        .flatten();
    if stored == Some(serde_json::to_value(&wanted)?) {
        return Ok(());
    }
    let mut tx = db.begin().await?;
    if serves(&mut tx, tenant.id, live.id).await? {
        routes::publish(&mut tx, tenant.id, &host, Some(&wanted)).await?;
        tx.commit().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::testing::TestDatabase,
        tenants::testing::{release, tenant_row},
    };
    use tokio::sync::mpsc;

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<u128> = [1, 2, 3, 8, 9, 100].into_iter().map(|starts| pause(starts).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 60_000, 60_000, 60_000]);
    }

    #[test]
    fn starts_are_a_growing_pause_apart_until_one_is_steady() {
        let (mut watch, now, release) = (Watch::default(), Instant::now(), DeploymentId::new());
        watch.on(release);
        assert!(watch.may_start(now));
        // Whether they succeed is not asked.
        watch.started(now);
        watch.started(now);
        watch.on(release);
        assert!(!watch.may_start(now + FIRST_PAUSE) && watch.may_start(now + FIRST_PAUSE * 2));
        watch.runs(Utc::now());
        assert!(!watch.may_start(now), "not steady yet");
        watch.runs(Utc::now() - STEADY);
        assert!(watch.may_start(now));
        watch.started(now);
        watch.on(DeploymentId::new());
        assert!(watch.may_start(now) && !watch.seen, "another release starts anew");
    }

    #[test]
    fn a_restart_of_the_host_or_the_cloud_is_no_crash() {
        let since = Utc::now();
        let (before, after) = (since - Duration::from_secs(1), since + Duration::from_secs(1));
        for quiet in [ExitReason::Unknown, ExitReason::Code(0), ExitReason::Signal(15)] {
            assert!(!is_crash(&quiet, before, false, since), "{quiet:?}");
            assert!(is_crash(&quiet, after, false, since), "{quiet:?}: nobody but itself ended it");
            assert!(is_crash(&quiet, before, true, since), "{quiet:?}: it was seen running");
        }
        assert!(is_crash(&ExitReason::OutOfMemory, before, false, since));
    }

    #[tokio::test]
    async fn a_tenant_that_takes_long_holds_up_nobody_and_is_not_looked_at_twice() {
        let (slow, quick) = (TenantId::new(), TenantId::new());
        let (sender, mut looked) = mpsc::unbounded_channel();
        let mut watches = Watches::new();
        let look = |tenant, watch: OwnedMutexGuard<Watch>| {
            let sender = sender.clone();
            async move {
                let _watch = watch;
                sender.send(tenant).unwrap();
                if tenant == slow {
                    std::future::pending::<()>().await;
                }
            }
        };
        watches.look([(slow, slow)], look);
        assert_eq!(looked.recv().await, Some(slow));
        for _ in 0..3 {
            watches.look([(quick, quick)], look);
            assert_eq!(looked.recv().await, Some(quick));
            let _ended = watches.tenants[&quick].lock().await;
        }
        watches.look([(slow, slow), (quick, quick)], look);
        assert_eq!(looked.recv().await, Some(quick));
        watches.looks.abort_all();
        while watches.looks.join_next().await.is_some() {}
        assert!(looked.try_recv().is_err(), "the slow one was looked at once");
        watches.look([], look);
        assert!(watches.tenants.is_empty());
    }

    #[tokio::test]
    async fn what_is_replaced_meanwhile_is_not_started_or_is_stopped_again() {
        let database = TestDatabase::start().await;
        let db = &database.db;
        let tenant = tenant_row(&database).await;
        let [old, new] = [release(&database, tenant).await.id, release(&database, tenant).await.id];
        let handle = || InstanceHandle::new("i");
        let stale = launch_while_live(db, tenant, old, async { Err(anyhow::anyhow!("it was launched")) }).await;
        assert_eq!(stale.unwrap(), None);
        assert_eq!(launch_while_live(db, tenant, new, async { Ok(handle()) }).await.unwrap(), None);
        assert_eq!(store::deployment(db.pool(), new).await.unwrap().unwrap().instance.as_deref(), Some("i"));
        let replaced = async {
            release(&database, tenant).await;
            Ok(handle())
        };
        assert_eq!(launch_while_live(db, tenant, new, replaced).await.unwrap(), Some(handle()));
    }
}
