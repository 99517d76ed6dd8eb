//! No room: on the disk, in the tenant's share, in a blob.

use crate::support::{Image, MIB, Server, config, error_code, noise};
use futures_util::{StreamExt, stream};
use reqwest::{Body, Method, StatusCode};
use std::{
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::Digest;
use systemprompt_registry::RegistryConfig;
use tokio::sync::oneshot;

/// A file system of 8 MiB of its own.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(dir.path()).status();
        assert!(mounted.expect("mount is installed").success(), "this test mounts a small file system: run it as root");
        Self(dir)
    }
    fn path(&self) -> PathBuf {
        self.0.path().join("registry")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("folder").flatten() {
            if entry.path().is_dir() { folders.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    files.sort();
    files
}

#[tokio::test]
async fn a_full_disk_is_said_and_leaves_nothing_half_done() {
    let disk = SmallDisk::mount();
    let server = Server::start_in(config(disk.path())).await;
    let tenant = server.tenant();
    let image = Image::new("app", &noise(3 << 20, 6));
    let digest = tenant.push(&image).await;
    let before = files_below(&disk.path());
    let content = noise(10 << 20, 7);

    // With a known length it is refused before a byte is stored; without one, when the disk is really full.
    let known = Body::from(content.clone());
    let pieces: Vec<_> = content.chunks(1 << 16).map(|piece| Ok::<_, std::io::Error>(piece.to_vec())).collect();
    let unknown = Body::wrap_stream(stream::iter(pieces));
    for body in [known, unknown] {
        let upload = tenant.begin().await;
        let response = tenant.request(Method::PATCH, &upload).body(body).send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::INSUFFICIENT_STORAGE);
        assert_eq!(error_code(response).await, "INSUFFICIENT_STORAGE");
        let _ = tenant.send(Method::DELETE, &upload).await;
        assert_eq!(files_below(&disk.path()), before, "nothing half-committed");
    }
    // What was there is whole, and there is room for small things again.
    server.registry.image(tenant.id, &digest).await.expect("whole");
    tenant.push_blob(b"small").await;
    server.kill().await;
}

#[tokio::test]
async fn shares_and_sizes_are_kept_to() {
    let dir = tempfile::tempdir().expect("dir");
    let limits = RegistryConfig { max_blob_bytes: 2 * MIB, tenant_quota_bytes: 3 * MIB, ..config(dir.path()) };
    let server = Server::start_in(limits).await;
    let (tenant, other) = (server.tenant(), server.tenant());
    let post = async |content: Vec<u8>| {
        let path = format!("blobs/uploads/?digest={}", Digest::of(&content));
        let response = tenant.request(Method::POST, &path).body(content).send().await.expect("an answer");
        (response.status(), response.text().await.expect("text"))
    };
    let (status, text) = post(noise(3 << 20, 8)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(text.contains("SIZE_INVALID"), "{text}");
    assert_eq!(post(noise(2 << 20, 9)).await.0, StatusCode::CREATED);
    let (status, text) = post(noise(3 << 19, 10)).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(text.contains("DENIED") && text.contains("quota"), "{text}");
    assert_eq!(post(noise(2 << 20, 9)).await.0, StatusCode::PAYLOAD_TOO_LARGE, "staging counts as well");

    // Unfinished uploads count: they cannot be used to fill the disk.
    let upload = tenant.begin().await;
    let patch = |body: Vec<u8>| tenant.request(Method::PATCH, &upload).body(body).send();
    assert_eq!(patch(noise(900_000, 11)).await.expect("an answer").status(), StatusCode::ACCEPTED);
    assert_eq!(patch(noise(900_000, 11)).await.expect("an answer").status(), StatusCode::PAYLOAD_TOO_LARGE);
    let standing = tenant.send(Method::GET, &upload).await;
    assert_eq!(standing.headers()["range"], "0-899999", "refused before a byte was stored");
    assert_eq!(post(noise(1 << 19, 12)).await.0, StatusCode::PAYLOAD_TOO_LARGE, "there is no room beside it");
    let mut open = 0;
    while tenant.status(Method::POST, "blobs/uploads/").await == StatusCode::ACCEPTED {
        open += 1;
        assert!(open < 1000, "there must be an end to it");
    }
    age(&uploads_of(dir.path(), tenant.id), 9);
    assert_eq!(tenant.status(Method::POST, "blobs/uploads/").await, StatusCode::TOO_MANY_REQUESTS);
    other.push_blob(&noise(2 << 20, 9)).await;

    // Failed pushes of earlier do not keep the next one out.
    let uploads = uploads_of(dir.path(), tenant.id);
    age(&uploads, 11);
    assert_eq!(post(noise(1 << 19, 12)).await.0, StatusCode::CREATED);
    assert_eq!(std::fs::read_dir(&uploads).expect("uploads").count(), 0);
}

fn uploads_of(root: &Path, tenant: TenantId) -> PathBuf {
    root.join("tenants").join(tenant.to_string()).join("uploads")
}

fn age(uploads: &Path, minutes: u64) {
    for upload in std::fs::read_dir(uploads).expect("uploads").flatten() {
        let file = std::fs::File::options().append(true).open(upload.path()).expect("open");
        file.set_modified(SystemTime::now() - Duration::from_mins(minutes)).expect("time");
    }
}

#[tokio::test]
async fn idle_uploads_make_way_only_for_what_would_be_refused() {
    let dir = tempfile::tempdir().expect("dir");
    let limits = RegistryConfig { tenant_quota_bytes: 3 * MIB, ..config(dir.path()) };
    let server = Server::start_in(limits).await;
    let tenant = server.tenant();
    let uploads = uploads_of(dir.path(), tenant.id);
    let content = noise(2 << 20, 15);
    let (idle, busy) = (tenant.begin().await, tenant.begin().await);
    let patch = tenant.request(Method::PATCH, &idle).body(content[..1 << 20].to_vec()).send().await;
    assert_eq!(patch.expect("an answer").status(), StatusCode::ACCEPTED);
    // One that a client works on, however slowly.
    let (go_on, rest) = oneshot::channel::<()>();
    let (first, second) = (content[..1 << 20].to_vec(), content[1 << 20..].to_vec());
    let body = stream::iter([Ok::<_, std::io::Error>(first)]).chain(stream::once(async move {
        let _ = rest.await;
        Ok(second)
    }));
    let request = tenant.request(Method::PATCH, &busy).body(Body::wrap_stream(body)).send();
    let slow = tokio::spawn(request);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let busy_file = uploads.join(busy.rsplit('/').next().expect("an id"));
    while std::fs::metadata(&busy_file).expect("upload").len() < 1 << 20 {
        assert!(tokio::time::Instant::now() < deadline, "the first megabyte never came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    age(&uploads, 11);
    tenant.push_blob(b"there is room for this").await;
    assert_eq!(tenant.status(Method::GET, &idle).await, StatusCode::NO_CONTENT, "nothing had to make way");
    tenant.push_blob(&noise(3 << 19, 16)).await;
    assert_eq!(tenant.status(Method::GET, &idle).await, StatusCode::NOT_FOUND);
    let next = tenant.begin().await;
    let refused = tenant.request(Method::PATCH, &next).body(noise(1 << 20, 17)).send().await.expect("an answer");
    assert_eq!(refused.status(), StatusCode::PAYLOAD_TOO_LARGE, "the busy one does not make way");
    assert!(busy_file.exists());
    drop(go_on);
    let done = slow.await.expect("no panic").expect("an answer");
    assert_eq!((done.status(), &done.headers()["range"]), (StatusCode::ACCEPTED, &"0-2097151".parse().expect("value")));
    assert_eq!(std::fs::metadata(&busy_file).expect("upload").len(), 2 << 20, "what was taken is there");
}
