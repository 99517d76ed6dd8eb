//! What the registry hands to compute.

use crate::support::{Image, Server, architecture, config, error_code, gzip, tar_of};
use reqwest::{Method, StatusCode};
use std::fs;
use systemprompt_contract::TenantId;
use systemprompt_oci::Digest;
use systemprompt_registry::{ImageError, InvalidImage};

#[tokio::test]
async fn a_whole_image_is_described_by_its_files() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let pushed = Image::new("app", b"program");
    let digest = tenant.push(&pushed).await;
    let image = server.registry.image(tenant.id, &digest).await.expect("whole");
    assert_eq!(image.digest, digest);
    assert_eq!(image.config.command().expect("command"), ["/app"]);
    assert_eq!(image.layers.len(), 1);
    assert_eq!(fs::read(&image.layers[0].path).expect("blob"), pushed.layer);
    assert_eq!(image.layers[0].diff_id, Digest::of(&tar_of("app", b"program")));
}

#[tokio::test]
async fn an_image_that_cannot_run_says_why() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let tenant = server.tenant();
    let silent = tenant.push(&Image::with_command("app", b"x", &[])).await;
    assert!(matches!(server.registry.image(tenant.id, &silent).await, Err(ImageError::NoEntrypoint)));

    let other = Image::new("app", b"y");
    let config_text = String::from_utf8(other.config).expect("text").replace(architecture(), "riscv64");
    let foreign = tenant.push(&Image::of(other.layer, config_text.into_bytes())).await;
    let error = server.registry.image(tenant.id, &foreign).await.expect_err("another platform");
    assert!(matches!(&error, ImageError::Invalid(InvalidImage::Platform { got, .. }) if got == "linux/riscv64"));

    let absent = Digest::of(b"absent");
    assert!(matches!(server.registry.image(tenant.id, &absent).await, Err(ImageError::NotFound)));
    assert!(matches!(server.registry.image(TenantId::new(), &silent).await, Err(ImageError::NotFound)));

    let image = Image::new("app", b"z");
    let digest = tenant.push(&image).await;
    let layer = Digest::of(&image.layer);
    let blob = dir.path().join("blobs").join(layer.hex());
    fs::write(&blob, gzip(b"cut")).expect("write");
    let error = server.registry.image(tenant.id, &digest).await.expect_err("another size");
    assert!(matches!(error, ImageError::Incomplete { missing } if missing == [layer]));
    fs::write(&blob, &image.layer).expect("write");
    let manifest = dir.path().join("tenants").join(tenant.id.to_string()).join("manifests").join(digest.hex());
    fs::write(manifest, "{}").expect("write");
    let error = server.registry.image(tenant.id, &digest).await.expect_err("damaged");
    assert!(matches!(error, ImageError::Invalid(InvalidImage::Damaged { .. })));
}

#[tokio::test]
async fn a_damaged_blob_is_mended_by_pushing_again() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let tenant = server.tenant();
    let image = Image::new("app", b"program");
    let same_size = |blob: &[u8]| blob.iter().map(|byte| byte ^ 1).collect::<Vec<u8>>();
    let cut = |blob: &[u8]| blob[..blob.len() / 2].to_vec();
    let put = async || tenant.put_manifest(&tenant.tag(), &image.manifest).await;
    for blob in [&image.layer, &image.config] {
        for damage in [&same_size as &dyn Fn(&[u8]) -> Vec<u8>, &cut] {
            tenant.push_blob(&image.layer).await;
            tenant.push_blob(&image.config).await;
            let digest = Digest::of(blob);
            fs::write(dir.path().join("blobs").join(digest.hex()), damage(blob)).expect("write");
            let path = format!("blobs/{digest}");
            assert_eq!(tenant.status(Method::HEAD, &path).await, StatusCode::OK, "it looks as if it were there");
            assert_eq!(error_code(put().await).await, "MANIFEST_BLOB_UNKNOWN");
            assert_eq!(tenant.status(Method::HEAD, &path).await, StatusCode::NOT_FOUND, "so that it is sent again");
        }
    }
    tenant.push(&image).await;

    // What was read before and still has its size is found by whoever cannot unpack it.
    let layer = Digest::of(&image.layer);
    fs::write(dir.path().join("blobs").join(layer.hex()), same_size(&image.layer)).expect("write");
    server.registry.image(tenant.id, &image.digest()).await.expect("seems whole");
    let removed = async || server.registry.remove_damaged(tenant.id, &image.digest()).await.expect("disk");
    assert_eq!(removed().await, 1);
    assert_eq!(tenant.status(Method::HEAD, &format!("blobs/{layer}")).await, StatusCode::NOT_FOUND);
    tenant.push(&image).await;
    assert_eq!(removed().await, 0);
    server.registry.image(tenant.id, &image.digest()).await.expect("whole again");
}
