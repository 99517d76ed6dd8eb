//! Nothing is left of what no row knows: instances, apps, databases, images, tombstones.
//!
//! Each search lists the world first and reads the rows second. A row is always written before the thing it is
//! about is made, so what is listed and has no row afterwards is an orphan and not merely new.

use crate::{
    app::Infrastructure,
    tenants::{delete::DeleteTenant, store},
};
use std::{collections::HashSet, time::Duration};
use systemprompt_compute::{FoundApp, InstanceState};
use systemprompt_contract::{DatabaseName, Subject, TenantId};
use systemprompt_workflow::{Db, NewOperation, enqueue};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

const PASS: Duration = Duration::from_secs(5);
/// Images are collected less often: that reads every manifest.
const IMAGE_PASS: Duration = Duration::from_hours(1);
const KEPT_RELEASES: i64 = 10;
/// Ended instances of a tenant whose output can still be read.
const KEPT_OUTPUTS: i64 = 2;
/// Blobs and uploads younger than this may belong to a push that still runs.
const YOUNG: Duration = Duration::from_hours(24);

/// Runs passes until `stop`.
pub(crate) async fn run(db: Db, infrastructure: Infrastructure, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(PASS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut images_due = Instant::now();
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let pass = async {
            log("instances", instances(&db, &infrastructure).await);
            log("apps", apps(&db, &infrastructure).await);
            log("databases", databases(&db, &infrastructure).await);
            log("deleted tenants", purge(&db).await);
            log("routes", tombstones(&db).await);
            if Instant::now() >= images_due {
                log("images", images(&db, &infrastructure).await);
                images_due = Instant::now() + IMAGE_PASS;
            }
        };
        tokio::select! {
            () = pass => {}
            () = stop.cancelled() => return,
        }
    }
}

fn log(what: &str, result: anyhow::Result<()>) {
    if let Err(error) = result {
        tracing::warn!(what, error = format!("{error:#}"), "looking for what is left over; trying again later");
    }
}

async fn instances(db: &Db, infrastructure: &Infrastructure) -> anyhow::Result<()> {
    let found = infrastructure.driver.instances().await?;
    let wanted: HashSet<_> = store::with_instance(db.pool()).await?.into_iter().collect();
    let readable: HashSet<_> = store::recently_ended(db.pool(), KEPT_OUTPUTS).await?.into_iter().collect();
    for instance in found.into_iter().filter(|found| !wanted.contains(&found.deployment)) {
        if matches!(instance.state, InstanceState::Running { .. } | InstanceState::Starting) {
            tracing::info!(app = %instance.app, deployment = %instance.deployment, "stopping an instance that nothing asks for");
            infrastructure.driver.stop(&instance.handle, infrastructure.limits.stop_grace).await?;
        }
        if !readable.contains(&instance.deployment) {
            infrastructure.driver.remove(&instance.handle).await?;
        }
    }
    Ok(())
}

async fn apps(db: &Db, infrastructure: &Infrastructure) -> anyhow::Result<()> {
    let found = infrastructure.driver.apps().await?;
    let known = known(db).await?;
    let apps: HashSet<_> = known.iter().map(|tenant| tenant.slug().app_name()).collect();
    for FoundApp { app, handle } in found.into_iter().filter(|found| !apps.contains(&found.app)) {
        tracing::info!(%app, "destroying an app that no tenant has");
        // One that cannot be destroyed must not keep the others.
        if let Err(error) = infrastructure.driver.destroy_app(&handle).await {
            tracing::warn!(%app, %error, "an app that no tenant has could not be destroyed; trying again later");
        }
    }
    Ok(())
}

async fn databases(db: &Db, infrastructure: &Infrastructure) -> anyhow::Result<()> {
    let found = infrastructure.databases.all().await?;
    let known: HashSet<DatabaseName> = known(db).await?.into_iter().map(|tenant| tenant.slug().database()).collect();
    for name in found.into_iter().filter(|name| !known.contains(name)) {
        tracing::info!(database = %name, "dropping a database that no tenant has");
        infrastructure.databases.drop(&name).await?;
    }
    Ok(())
}

async fn known(db: &Db) -> Result<Vec<TenantId>, sqlx::Error> {
    store::known_ids(db.pool()).await
}

/// Enqueues the end of deleted tenants whose time has come.
async fn purge(db: &Db) -> anyhow::Result<()> {
    for (tenant, given_up) in store::due_for_purge(db.pool()).await? {
        let mut tx = db.begin().await?;
        let workflow = DeleteTenant { tenant, purge: true };
        // One that failed keeps its key: the next one is another operation.
        let key = given_up.map_or_else(|| format!("{tenant}:purge"), |failed| format!("{tenant}:purge:{failed}"));
        let operation =
            enqueue(&mut tx, NewOperation { input: &workflow, subject: Subject::Tenant(tenant), key: &key }).await?.id;
        sqlx::query!(
            "UPDATE tenants SET active_operation = $2 WHERE id = $1 AND phase = 'deleted'",
            tenant.uuid(),
            operation.uuid(),
        )
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
    }
    Ok(())
}

async fn tombstones(db: &Db) -> anyhow::Result<()> {
    sqlx::query!("DELETE FROM routes WHERE target IS NULL AND changed_at < now() - interval '1 day'")
        .execute(db.pool())
        .await?;
    sqlx::query!("DELETE FROM edges WHERE seen_at < now() - interval '1 hour'").execute(db.pool()).await?;
    Ok(())
}

async fn images(db: &Db, infrastructure: &Infrastructure) -> anyhow::Result<()> {
    let kept = store::kept_images(db.pool(), KEPT_RELEASES).await?;
    let report = infrastructure.registry.collect_garbage(&kept, YOUNG).await?;
    tracing::info!(?report, "collected images");
    Ok(())
}
