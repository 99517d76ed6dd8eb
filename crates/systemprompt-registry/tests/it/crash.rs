//! What a killed process leaves behind.

use crate::support::{Image, Server, config, noise};
use futures_util::{StreamExt, stream};
use reqwest::{Body, Method, StatusCode};
use std::{convert::Infallible, fs, path::Path, time::Duration};
use systemprompt_contract::TenantId;
use systemprompt_oci::Digest;
use systemprompt_registry::{OpenError, Registry, TokenKey};
use tokio::sync::oneshot;

/// Waits until the only upload of the only tenant is at least this long.
async fn uploaded(root: &Path, at_least: u64) -> u64 {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let tenants = fs::read_dir(root.join("tenants")).expect("tenants");
        let uploads = tenants.flatten().filter_map(|tenant| fs::read_dir(tenant.path().join("uploads")).ok());
        let longest = uploads.flatten().flatten().filter_map(|file| Some(file.metadata().ok()?.len())).max();
        match longest {
            Some(length) if length >= at_least => return length,
            _ if tokio::time::Instant::now() > deadline => panic!("expected {at_least} bytes, found {longest:?}"),
            _ => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_goes_on_after_the_server_was_killed_in_the_middle() {
    let dir = tempfile::tempdir().expect("dir");
    let content = noise(6 << 20, 4);
    let id = TenantId::new();
    let server = Server::start_in(config(dir.path())).await;
    let (upload, request) = {
        let tenant = server.as_tenant(id);
        let upload = tenant.begin().await;
        // Four of six megabytes come, then nothing any more until the server is gone.
        let (never, silence) = oneshot::channel::<()>();
        let first = bytes::Bytes::copy_from_slice(&content[..4 << 20]);
        let body = stream::iter([Ok::<_, Infallible>(first)]).chain(stream::once(async move {
            let _ = silence.await;
            Ok(bytes::Bytes::new())
        }));
        let request = tenant.request(Method::PATCH, &upload).body(Body::wrap_stream(body)).send();
        (upload, tokio::spawn(async move { (request.await, never) }))
    };
    let length = uploaded(dir.path(), 1 << 20).await;
    server.kill().await;
    request.abort();

    let server = reopened(dir.path()).await;
    let tenant = server.as_tenant(id);
    let status = tenant.send(Method::GET, &upload).await;
    assert_eq!(status.status(), StatusCode::NO_CONTENT);
    let range = status.headers()["range"].to_str().expect("text").to_owned();
    let last: usize = range.strip_prefix("0-").expect("a range").parse().expect("a number");
    assert!(last as u64 + 1 >= length);
    let digest = Digest::of(&content);
    let put = tenant
        .request(Method::PUT, &format!("{upload}?digest={digest}"))
        .header("content-range", format!("{}-{}", last + 1, content.len() - 1))
        .body(content[last + 1..].to_vec());
    assert_eq!(put.send().await.expect("an answer").status(), StatusCode::CREATED);
    let stored = tenant.send(Method::GET, &format!("blobs/{digest}")).await.bytes().await.expect("body");
    assert_eq!(stored, content);
}

/// Opens the store again as soon as everything of the killed server has let go of it.
async fn reopened(root: &Path) -> Server {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while let Err(OpenError::Locked { .. }) = Registry::open(config(root), TokenKey::from_bytes(&[0; 32])) {
        assert!(tokio::time::Instant::now() < deadline, "the killed server still holds its folder");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Server::start_in(config(root)).await
}

#[tokio::test]
async fn one_folder_serves_one_process() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let second = Registry::open(config(dir.path()), TokenKey::from_bytes(&[0; 32]));
    assert!(matches!(second, Err(OpenError::Locked { .. })));
    server.kill().await;
    reopened(dir.path()).await;
}

#[tokio::test]
async fn half_written_state_is_no_state() {
    let dir = tempfile::tempdir().expect("dir");
    let (id, image) = (TenantId::new(), Image::new("app", b"program"));
    let server = Server::start_in(config(dir.path())).await;
    server.as_tenant(id).push(&image).await;
    server.kill().await;

    let (layer, tenant_dir) = (Digest::of(&image.layer), dir.path().join("tenants").join(id.to_string()));
    // Killed between the link and the blob's name reaching the disk; a file without a name; half a tag.
    fs::remove_file(dir.path().join("blobs").join(layer.hex())).expect("blob");
    fs::write(dir.path().join("tmp/left-over"), "x").expect("write");
    fs::write(tenant_dir.join("tag"), "sha256:12").expect("write");
    let server = reopened(dir.path()).await;
    let tenant = server.as_tenant(id);
    assert_eq!(tenant.status(Method::HEAD, &format!("blobs/{layer}")).await, StatusCode::NOT_FOUND);
    assert_eq!(server.registry.resolve(id).await.expect("disk"), None);
    assert!(!dir.path().join("tmp/left-over").exists());
    let image_error = server.registry.image(id, &image.digest()).await.expect_err("incomplete");
    assert!(image_error.to_string().contains("1 blobs"), "{image_error}");
    tenant.push(&image).await;
    server.registry.image(id, &image.digest()).await.expect("whole again");
}

#[tokio::test]
async fn a_client_that_disconnects_leaves_a_prefix() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let upload = tenant.begin().await;
    let content = noise(3 << 20, 5);
    let cut = bytes::Bytes::copy_from_slice(&content[..2 << 20]);
    let body = stream::iter([Ok(cut), Err(std::io::Error::other("the client dies"))]);
    let request = tenant.request(Method::PATCH, &upload).body(Body::wrap_stream(body)).send().await;
    assert!(request.is_err());
    let status = tenant.send(Method::GET, &upload).await;
    let range = status.headers()["range"].to_str().expect("text").to_owned();
    let next = match range.as_str() {
        "0-0" => 0,
        other => other.strip_prefix("0-").expect("range").parse::<usize>().expect("number") + 1,
    };
    let digest = Digest::of(&content);
    let put = tenant.request(Method::PUT, &format!("{upload}?digest={digest}")).body(content[next..].to_vec());
    assert_eq!(put.send().await.expect("an answer").status(), StatusCode::CREATED);
}
