//! Every live release has an instance, and its route points at it.
//!
//! An instance that ended is started again with a growing pause; the exit's reason is kept for its owner.

use crate::{
    app::Infrastructure,
    tenants::{
        deploy, routes,
        store::{self, Deployment, Tenant},
    },
};
use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};
use systemprompt_compute::{ExitReason, InstanceHandle, InstanceState};
use systemprompt_contract::DeploymentId;
use systemprompt_edge::{Route, Upstream};
use systemprompt_workflow::Db;
use tokio::{
    sync::Mutex,
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

const PASS: Duration = Duration::from_millis(500);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// An instance that lived so long has its crashes forgiven.
const STEADY: Duration = Duration::from_mins(2);

/// How often an instance ended lately, and when it may start again.
#[derive(Debug, Clone, Copy)]
struct CrashRecord {
    crashes: u32,
    started: Instant,
    not_before: Instant,
}

/// The pause before start number `crashes + 1`.
fn pause(crashes: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(2u32.saturating_pow(crashes.saturating_sub(1))).min(LONGEST_PAUSE)
}

/// What a pass does about one instance. Pure, so that the policy can be read and tested.
#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Leave,
    /// It runs there: see that the route says so.
    Route(SocketAddr),
    /// It ended, or was never started on this host.
    Start,
    /// It ended just now: write down why, then wait.
    NoteExit(ExitReason),
}

fn decide(state: &InstanceState, record: Option<&CrashRecord>, now: Instant) -> Decision {
    match (state, record) {
        (InstanceState::Running { address, .. }, _) => Decision::Route(*address),
        (InstanceState::Starting, _) => Decision::Leave,
        (InstanceState::Exited { .. } | InstanceState::Absent, Some(record)) if record.not_before > record.started => {
            if now >= record.not_before {
                Decision::Start
            } else {
                Decision::Leave
            }
        }
        (InstanceState::Exited { reason, .. }, Some(_)) => Decision::NoteExit(reason.clone()),
        // Not started by this process: the host or the control plane was restarted, which is nobody's crash.
        // Ended by SIGTERM, well or by its default action, it was stopped with the cloud.
        (
            InstanceState::Exited {
                reason: ExitReason::Unknown | ExitReason::Code(0) | ExitReason::Signal(15), ..
            }
            | InstanceState::Absent,
            _,
        ) => Decision::Start,
        (InstanceState::Exited { reason, .. }, None) => Decision::NoteExit(reason.clone()),
    }
}

/// Runs passes until `stop`.
pub(crate) async fn run(db: Db, infrastructure: Infrastructure, stop: CancellationToken) {
    let records = Arc::new(Mutex::new(HashMap::new()));
    let mut ticks = tokio::time::interval(PASS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let tenants = match store::serving(db.pool()).await {
            Ok(tenants) => tenants,
            Err(error) => {
                tracing::warn!(%error, "reading the tenants to be served");
                continue;
            }
        };
        let mut passes = JoinSet::new();
        for tenant in tenants {
            let (db, infrastructure, records) = (db.clone(), infrastructure.clone(), records.clone());
            passes.spawn(async move {
                if let Err(error) = reconcile(&db, &infrastructure, &records, &tenant).await {
                    tracing::warn!(tenant.slug = %tenant.slug(), %error, "an instance could not be brought up; trying again");
                }
            });
        }
        tokio::select! {
            () = async { while passes.join_next().await.is_some() {} } => {}
            () = stop.cancelled() => return,
        }
    }
}

type Records = Mutex<HashMap<DeploymentId, CrashRecord>>;

async fn reconcile(db: &Db, infrastructure: &Infrastructure, records: &Records, tenant: &Tenant) -> anyhow::Result<()> {
    let Some(live) = store::live_deployment(db.pool(), tenant.id).await? else { return Ok(()) };
    let state = match &live.instance {
        Some(handle) => infrastructure.driver.inspect(&InstanceHandle::new(handle.clone())).await?,
        None => InstanceState::Absent,
    };
    let now = Instant::now();
    let record = records.lock().await.get(&live.id).copied();
    match decide(&state, record.as_ref(), now) {
        Decision::Leave => {}
        Decision::Route(address) => point_route(db, infrastructure, tenant, &live, address).await?,
        Decision::Start => start(db, infrastructure, records, tenant, &live).await?,
        Decision::NoteExit(reason) => {
            let restarts = store::note_exit(db.pool(), live.id, &reason.to_string()).await?;
            let lived = record.map_or(Duration::ZERO, |record| now.duration_since(record.started));
            let crashes = if lived >= STEADY { 1 } else { record.map_or(1, |record| record.crashes + 1) };
            let wait = pause(crashes);
            tracing::warn!(tenant.slug = %tenant.slug(), %reason, restarts, wait_ms = wait.as_millis(), "an instance ended and will be started again");
            let started = record.map_or(now, |record| record.started);
            let not_before = now + wait.max(Duration::from_millis(1));
            records.lock().await.insert(live.id, CrashRecord { crashes, started, not_before });
        }
    }
    Ok(())
}

async fn start(
    db: &Db,
    infrastructure: &Infrastructure,
    records: &Records,
    tenant: &Tenant,
    live: &Deployment,
) -> anyhow::Result<()> {
    let handle = deploy::launch_release(infrastructure, db.pool(), tenant, live).await?;
    let now = Instant::now();
    let crashes = records.lock().await.get(&live.id).map_or(0, |record| record.crashes);
    records.lock().await.insert(live.id, CrashRecord { crashes, started: now, not_before: now });
    let mut tx = db.begin().await?;
    store::set_instance(&mut tx, live.id, Some(handle.as_str())).await?;
    tx.commit().await?;
    Ok(())
}

/// Publishes a route only when it says something else, and only while nobody else works on the tenant.
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
    let current = store::lock(&mut tx, tenant.id).await?;
    let unchanged = current.is_some_and(|now| now.active_operation.is_none() && now.live_deployment == Some(live.id));
    if unchanged {
        routes::publish(&mut tx, tenant.id, &host, Some(&wanted)).await?;
        tx.commit().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::Utc;

    fn exited(reason: ExitReason) -> InstanceState {
        InstanceState::Exited { reason, at: Utc::now() }
    }

    #[test]
    fn pauses_double_up_to_a_minute() {
        let pauses: Vec<u128> = [1, 2, 3, 8, 9, 100].into_iter().map(|crashes| pause(crashes).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 60_000, 60_000, 60_000]);
    }

    #[test]
    fn a_crash_is_noted_once_and_then_waited_for() {
        let now = Instant::now();
        let started = CrashRecord { crashes: 0, started: now, not_before: now };
        let crash = exited(ExitReason::Code(7));
        assert_eq!(decide(&crash, Some(&started), now), Decision::NoteExit(ExitReason::Code(7)));
        let noted = CrashRecord { crashes: 1, started: now, not_before: now + FIRST_PAUSE };
        assert_eq!(decide(&crash, Some(&noted), now), Decision::Leave);
        assert_eq!(decide(&crash, Some(&noted), now + FIRST_PAUSE), Decision::Start);
    }

    #[test]
    fn a_restart_of_the_host_is_no_crash() {
        let now = Instant::now();
        assert_eq!(decide(&exited(ExitReason::Unknown), None, now), Decision::Start);
        assert_eq!(decide(&exited(ExitReason::Code(0)), None, now), Decision::Start);
        assert_eq!(decide(&exited(ExitReason::Signal(15)), None, now), Decision::Start);
        assert_eq!(decide(&InstanceState::Absent, None, now), Decision::Start);
        assert_eq!(decide(&InstanceState::Starting, None, now), Decision::Leave);
        assert_eq!(decide(&exited(ExitReason::OutOfMemory), None, now), Decision::NoteExit(ExitReason::OutOfMemory));
    }
}
