//! Collection: what is needed stays, whatever goes on meanwhile.

use crate::support::{Image, Server, Tenant, config, noise};
use reqwest::{Method, StatusCode};
use std::{
    fs::{self, File},
    path::Path,
    time::{Duration, SystemTime},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, open_layer};
use systemprompt_registry::{GcReport, ImageError};

const HOUR: Duration = Duration::from_hours(1);

/// Makes everything below look as if it had been written so long ago.
fn age(folder: &Path, by: Duration) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            age(&entry.path(), by);
        } else if let Ok(file) = File::options().append(true).open(entry.path()) {
            file.set_modified(SystemTime::now() - by).expect("time");
        }
    }
}

async fn collect(server: &Server, keep: &[(TenantId, Digest)]) -> GcReport {
    server.registry.collect_garbage(keep, HOUR).await.expect("disk")
}

fn blob_count(root: &Path) -> usize {
    fs::read_dir(root.join("blobs")).expect("blobs").count()
}

#[tokio::test]
async fn kept_and_young_stay_the_rest_goes() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let (tenant, other) = (server.tenant(), server.tenant());
    let kept = tenant.push(&Image::new("app", b"kept release")).await;
    let gone = tenant.push(&Image::new("app", b"old release")).await;
    let shared = Image::new("app", b"kept release");
    other.push(&shared).await;
    let unfinished = tenant.begin().await;
    age(dir.path(), 2 * HOUR);
    let young = tenant.push(&Image::new("app", b"just pushed")).await;

    let report = collect(&server, &[(tenant.id, kept)]).await;
    // `other` keeps nothing: its manifest and links go, the contents stay for `tenant`.
    let expected = GcReport { manifests: 2, links: 4, blobs: 2, uploads: 0, freed_bytes: report.freed_bytes };
    assert_eq!(report, expected);
    assert!(report.freed_bytes > 0);
    for digest in [kept, young] {
        server.registry.image(tenant.id, &digest).await.expect("whole");
    }
    assert!(matches!(server.registry.image(tenant.id, &gone).await, Err(ImageError::NotFound)));
    assert_eq!(server.registry.resolve(other.id).await.expect("disk"), None);
    assert!(!dir.path().join("tenants").join(other.id.to_string()).exists(), "nothing of it is left");
    assert_eq!(tenant.status(Method::GET, &unfinished).await, StatusCode::NO_CONTENT, "younger than a day");
    assert_eq!(collect(&server, &[(tenant.id, kept)]).await, GcReport::default(), "idempotent");

    age(dir.path(), 25 * HOUR);
    assert_eq!(collect(&server, &[(tenant.id, kept)]).await.uploads, 1);
    assert_eq!(tenant.status(Method::GET, &unfinished).await, StatusCode::NOT_FOUND);
    collect(&server, &[]).await;
    assert_eq!(blob_count(dir.path()), 0);
    assert_eq!(fs::read_dir(dir.path().join("tenants")).expect("tenants").count(), 0);
}

#[tokio::test]
async fn a_blob_the_client_was_told_about_survives_until_its_manifest_comes() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let tenant = server.tenant();
    let image = Image::new("app", b"program");
    tenant.push_blob(&image.layer).await;
    tenant.push_blob(&image.config).await;
    age(dir.path(), 2 * HOUR);
    let layer = format!("blobs/{}", Digest::of(&image.layer));
    assert_eq!(tenant.status(Method::HEAD, &layer).await, StatusCode::OK);
    assert_eq!(collect(&server, &[]).await.blobs, 1, "only the configuration, which nobody asked for");
    tenant.push_blob(&image.config).await;
    assert_eq!(tenant.put_manifest(&tenant.tag(), &image.manifest).await.status(), StatusCode::CREATED);
}

#[tokio::test]
async fn what_a_deploy_has_just_checked_is_young_again() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let tenant = server.tenant();
    let (deployed, other) = (Image::new("app", b"deployed again"), Image::new("app", b"nobody asks for it"));
    tenant.push(&deployed).await;
    tenant.push(&other).await;
    age(dir.path(), 2 * HOUR);
    // The rows were read before, so they do not name it.
    server.registry.image(tenant.id, &deployed.digest()).await.expect("accepted");
    assert_eq!(collect(&server, &[]).await.manifests, 1);
    is_whole(&tenant, deployed.digest()).await;
    assert!(matches!(server.registry.image(tenant.id, &other.digest()).await, Err(ImageError::NotFound)));
}

/// Reads the image from disk, every byte.
async fn is_whole(tenant: &Tenant<'_>, digest: Digest) {
    let image = tenant.server.registry.image(tenant.id, &digest).await.expect("complete");
    for layer in &image.layers {
        let content = fs::read(&layer.path).expect("blob");
        assert_eq!(Digest::of(&content), layer.descriptor.digest);
        std::io::copy(&mut open_layer(layer).expect("layer"), &mut std::io::sink()).expect("readable");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pushes_and_collections_at_the_same_time_lose_nothing() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let tenants = [server.tenant(), server.tenant(), server.tenant()];
    let pushes = async |tenant: &Tenant<'_>, seed: u64| {
        for round in 0..12 {
            // Tenants share every second image, so that links and blobs come and go under each other.
            let content = noise(40_000, if round % 2 == 0 { 100 + round } else { seed * 1000 + round });
            let image = Image::new("app", &content);
            tenant.push(&image).await;
            is_whole(tenant, image.digest()).await;
            age(&dir.path().join("tenants").join(tenant.id.to_string()), 2 * HOUR);
        }
    };
    let collections = async {
        let mut removed = 0;
        loop {
            removed += collect(&server, &[]).await.blobs;
            if removed >= 30 {
                return removed;
            }
            tokio::task::yield_now().await;
        }
    };
    let all = async { tokio::join!(pushes(&tenants[0], 1), pushes(&tenants[1], 2), pushes(&tenants[2], 3)) };
    let deadline = Duration::from_mins(2);
    let (_, removed) = tokio::time::timeout(deadline, async { tokio::join!(all, collections) }).await.expect("in time");
    assert!(removed >= 30, "the collections did remove things meanwhile");
    collect(&server, &[]).await;
    assert_eq!(blob_count(dir.path()), 0);
}

#[tokio::test]
async fn a_removed_tenant_leaves_nothing_and_takes_nothing_of_others() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let (tenant, other) = (server.tenant(), server.tenant());
    let common = Image::new("app", b"common");
    tenant.push(&common).await;
    tenant.push(&Image::new("app", b"own")).await;
    tenant.begin().await;
    other.push(&common).await;
    for _ in 0..2 {
        server.registry.remove_tenant(tenant.id).await.expect("idempotent");
    }
    assert!(!dir.path().join("tenants").join(tenant.id.to_string()).exists());
    assert_eq!(blob_count(dir.path()), 2);
    is_whole(&other, common.digest()).await;
    assert_eq!(collect(&server, &[]).await, GcReport::default(), "nothing was left over");
}
