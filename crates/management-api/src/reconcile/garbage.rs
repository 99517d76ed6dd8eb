//! Nothing is left of what no row knows: instances, apps, databases, images, tombstones.
//!
//! Each search lists the world first and reads the rows second. A row is always written before the thing it is
//! about is made, so what is listed and has no row afterwards is an orphan and not merely new. Images are the other way
//! round, as they are there before their row: the rows are read first, and an image that a deploy asked for since then
//! is young by its having been asked for.

use crate::{
    app::Infrastructure,
    tenants::{delete::DeleteTenant, store},
};
use std::{collections::HashSet, time::Duration};
use systemprompt_compute::{DriverError, FoundApp, FoundInstance, InstanceState};
use systemprompt_contract::{DatabaseName, Subject, TenantId};
use systemprompt_registry::Registry;
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
                log("images", images(&db, &infrastructure.registry).await);
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
        // One that cannot be stopped or removed must not keep the others.
        if let Err(error) = collect(infrastructure, &instance, readable.contains(&instance.deployment)).await {
            tracing::warn!(app = %instance.app, deployment = %instance.deployment, %error, "an instance that nothing asks for stays; trying again later");
        }
    }
    Ok(())
}

/// Stops an instance that nothing asks for, and deletes it unless its output can still be read.
async fn collect(infrastructure: &Infrastructure, instance: &FoundInstance, readable: bool) -> Result<(), DriverError> {
    if matches!(instance.state, InstanceState::Running { .. } | InstanceState::Starting) {
        tracing::info!(app = %instance.app, deployment = %instance.deployment, "stopping an instance that nothing asks for");
        infrastructure.driver.stop(&instance.handle, infrastructure.limits.stop_grace).await?;
    }
    if readable { Ok(()) } else { infrastructure.driver.remove(&instance.handle).await }
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

async fn images(db: &Db, registry: &Registry) -> anyhow::Result<()> {
    let kept = store::kept_images(db.pool(), KEPT_RELEASES).await?;
    let report = registry.collect_garbage(&kept, YOUNG).await?;
    tracing::info!(?report, "collected images");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::testing::TestDatabase,
        tenants::testing::{release_image, tenant_row},
    };
    use axum::body::Body;
    use chrono::{TimeDelta, Utc};
    use http::{Request, StatusCode, header};
    use std::{
        fs::{self, File},
        path::Path,
        time::SystemTime,
    };
    use systemprompt_contract::{IMAGE_REPOSITORY, TenantTag};
    use systemprompt_oci::{Digest, media_type};
    use systemprompt_registry::{Grant, ImageError, RegistryConfig, TokenKey};
    use tower::ServiceExt as _;

    struct Images {
        dir: tempfile::TempDir,
        key: TokenKey,
        registry: Registry,
    }

    impl Images {
        fn open() -> Self {
            let (dir, key) = (tempfile::tempdir().unwrap(), TokenKey::from_bytes(&[1; 32]));
            let config = RegistryConfig {
                root: dir.path().to_owned(),
                max_blob_bytes: 1 << 20,
                tenant_quota_bytes: 1 << 20,
                max_unpacked_bytes: 1 << 20,
            };
            let registry = Registry::open(config, key.clone()).unwrap();
            Self { dir, key, registry }
        }

        async fn send(&self, tenant: TenantId, request: http::request::Builder, body: &[u8]) {
            let expires_at = Utc::now() + TimeDelta::minutes(1);
            let token = self.key.mint(&Grant { tenant, push: true, pull: true, expires_at });
            let request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.expose()));
            let request = request.body(Body::from(body.to_vec())).unwrap();
            let answer = self.registry.router().oneshot(request).await.unwrap();
            assert_eq!(answer.status(), StatusCode::CREATED);
        }

        /// An image with a layer of its own: an empty archive of so many blocks.
        async fn push(&self, tenant: TenantId, blocks: usize) -> Digest {
            let layer = vec![0; blocks * 512];
            let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
            let config = serde_json::json!({
                "architecture": architecture,
                "os": "linux",
                "config": { "Entrypoint": ["/app"] },
                "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer)] },
            });
            let config = config.to_string().into_bytes();
            let describe = |kind: &str, blob: &[u8]| serde_json::json!({ "mediaType": kind, "digest": Digest::of(blob), "size": blob.len() });
            let manifest = serde_json::json!({
                "schemaVersion": 2,
                "config": describe(media_type::OCI_CONFIG, &config),
                "layers": [describe(media_type::OCI_LAYER, &layer)],
            });
            let base = format!("/v2/{IMAGE_REPOSITORY}");
            for blob in [&layer, &config] {
                let path = format!("{base}/blobs/uploads/?digest={}", Digest::of(blob));
                self.send(tenant, Request::post(path), blob).await;
            }
            let manifest = manifest.to_string().into_bytes();
            self.send(tenant, Request::put(format!("{base}/manifests/{}", TenantTag(tenant))), &manifest).await;
            Digest::of(&manifest)
        }

        async fn has(&self, tenant: TenantId, digest: Digest) -> bool {
            match self.registry.image(tenant, &digest).await {
                Ok(_) => true,
                Err(ImageError::NotFound) => false,
                Err(error) => panic!("{digest}: {error}"),
            }
        }

        fn blobs(&self) -> usize {
            fs::read_dir(self.dir.path().join("blobs")).unwrap().count()
        }
    }

    fn age(folder: &Path, by: Duration) {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() {
                age(&entry.path(), by);
            } else {
                let file = File::options().append(true).open(entry.path()).unwrap();
                file.set_modified(SystemTime::now() - by).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn images_of_kept_releases_and_of_the_last_day_stay_and_others_go() {
        let (database, disk) = (TestDatabase::start().await, Images::open());
        let tenant = tenant_row(&database).await;
        let mut released = Vec::new();
        for blocks in 2..14 {
            released.push(disk.push(tenant, blocks).await);
        }
        let (never_deployed, unknown) = (disk.push(tenant, 20).await, TenantId::new());
        disk.push(unknown, 21).await;
        for digest in &released {
            release_image(&database, tenant, digest).await;
        }
        age(disk.dir.path(), Duration::from_hours(23));
        images(&database.db, &disk.registry).await.unwrap();
        assert_eq!(disk.blobs(), 28, "all are of the last day");

        age(disk.dir.path(), Duration::from_hours(25));
        let young = disk.push(tenant, 22).await;
        images(&database.db, &disk.registry).await.unwrap();
        let kept = usize::try_from(KEPT_RELEASES).unwrap();
        assert_eq!(disk.blobs(), 2 * (kept + 1));
        let gone = released.len() - kept;
        for (place, digest) in released.into_iter().enumerate() {
            assert_eq!(disk.has(tenant, digest).await, place >= gone, "release {place}");
        }
        assert!(disk.has(tenant, young).await && !disk.has(tenant, never_deployed).await);
        assert!(!disk.dir.path().join("tenants").join(unknown.to_string()).exists(), "no row knows it");
    }
}
