//! The distribution API, request by request.

use crate::support::{Image, MIB, Server, config, error_code, gzip, location, noise, tar_of};
use futures_util::stream;
use reqwest::{Body, Method, StatusCode};
use systemprompt_contract::IMAGE_REPOSITORY;
use systemprompt_oci::{Digest, Manifest, media_type};
use systemprompt_registry::RegistryConfig;

#[tokio::test]
async fn an_image_comes_back_as_it_was_pushed() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let image = Image::new("app", b"program");
    let digest = tenant.push(&image).await;
    for reference in [tenant.tag(), digest.to_string()] {
        let response = tenant.send(Method::GET, &format!("manifests/{reference}")).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], media_type::OCI_MANIFEST);
        assert_eq!(response.headers()["docker-content-digest"], digest.to_string().as_str());
        assert_eq!(response.bytes().await.expect("body"), image.manifest);
        let head = tenant.send(Method::HEAD, &format!("manifests/{reference}")).await;
        assert_eq!(head.headers()["content-length"], image.manifest.len().to_string().as_str());
    }
    for blob in [&image.layer, &image.config] {
        let path = format!("blobs/{}", Digest::of(blob));
        let response = tenant.send(Method::GET, &path).await;
        assert_eq!(&response.bytes().await.expect("body"), blob);
        let head = tenant.send(Method::HEAD, &path).await;
        assert_eq!(head.headers()["content-length"], blob.len().to_string().as_str());
    }
    let tags: serde_json::Value = tenant.send(Method::GET, "tags/list").await.json().await.expect("JSON");
    assert_eq!(tags, serde_json::json!({ "name": IMAGE_REPOSITORY, "tags": [tenant.tag()] }));
    assert_eq!(server.registry.resolve(tenant.id).await.expect("disk"), Some(digest));
}

#[tokio::test]
async fn a_blob_can_be_read_in_parts() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let content = noise(100_000, 1);
    let path = format!("blobs/{}", tenant.push_blob(&content).await);
    let part = |range: &'static str| tenant.request(Method::GET, &path).header("range", range).send();
    let response = part("bytes=10-19").await.expect("an answer");
    assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(response.headers()["content-range"], "bytes 10-19/100000");
    assert_eq!(response.bytes().await.expect("body"), content[10..20]);
    let rest = part("bytes=99000-").await.expect("an answer");
    assert_eq!(rest.bytes().await.expect("body"), content[99_000..]);
    let outside = part("bytes=100000-").await.expect("an answer");
    assert_eq!(outside.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(outside.headers()["content-range"], "bytes */100000");
}

#[tokio::test]
async fn chunks_must_follow_each_other() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let content = noise(300_000, 2);
    let upload = tenant.begin().await;
    let patch = |range: Option<&'static str>, body: &[u8]| {
        let request = tenant.request(Method::PATCH, &upload).body(body.to_vec());
        let request = if let Some(range) = range { request.header("content-range", range) } else { request };
        request.send()
    };
    let first = patch(Some("0-99999"), &content[..100_000]).await.expect("an answer");
    assert_eq!((first.status(), &first.headers()["range"]), (StatusCode::ACCEPTED, &"0-99999".parse().expect("value")));

    let gap = patch(Some("100001-100002"), b"xx").await.expect("an answer");
    assert_eq!(gap.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(gap.headers()["range"], "0-99999", "it says where to go on");
    let lying = patch(Some("100000-100009"), b"xx").await.expect("an answer");
    assert_eq!(lying.status(), StatusCode::BAD_REQUEST);

    let status = tenant.send(Method::GET, &upload).await;
    assert_eq!((status.status(), &status.headers()["range"]), (StatusCode::NO_CONTENT, &first.headers()["range"]));
    let second = patch(None, &content[100_000..200_000]).await.expect("an answer");
    assert_eq!(second.status(), StatusCode::ACCEPTED);
    let digest = Digest::of(&content);
    let done = tenant
        .request(Method::PUT, &format!("{upload}?digest={digest}"))
        .header("content-range", "200000-299999")
        .body(content[200_000..].to_vec())
        .send()
        .await
        .expect("an answer");
    assert_eq!(done.status(), StatusCode::CREATED);
    assert_eq!(location(&done), format!("/v2/{IMAGE_REPOSITORY}/blobs/{digest}"));
    let stored = tenant.send(Method::GET, &format!("blobs/{digest}")).await.bytes().await.expect("body");
    assert_eq!(stored, content);
    assert_eq!(tenant.status(Method::GET, &upload).await, StatusCode::NOT_FOUND, "the upload is over");
}

#[tokio::test]
async fn a_chunk_without_a_length_is_held_to_what_it_announces() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let upload = tenant.begin().await;
    // Without Content-Length: chunked transfer.
    let patch = async |range: &str, body: &'static [u8]| {
        let body = Body::wrap_stream(stream::iter([Ok::<_, std::io::Error>(body)]));
        let request = tenant.request(Method::PATCH, &upload).header("content-range", range).body(body);
        let response = request.send().await.expect("an answer");
        let standing = tenant.send(Method::GET, &upload).await.headers()["range"].to_str().expect("text").to_owned();
        (response.status(), standing)
    };
    assert_eq!(patch("0-4", b"01234").await, (StatusCode::ACCEPTED, "0-4".to_owned()));
    assert_eq!(patch("5-6", b"56789").await, (StatusCode::BAD_REQUEST, "0-4".to_owned()), "more than announced");
    let fewer = patch("5-99", b"56789").await;
    assert_eq!(fewer, (StatusCode::BAD_REQUEST, "0-9".to_owned()), "a prefix, with which the client may go on");
    assert_eq!(patch("10-18446744073709551615", b"x").await.0, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(patch("+10-10", b"x").await.0, StatusCode::BAD_REQUEST);
    let done = tenant.send(Method::PUT, &format!("{upload}?digest={}", Digest::of(b"0123456789"))).await;
    assert_eq!(done.status(), StatusCode::CREATED);
}

#[tokio::test]
async fn one_image_is_not_read_without_end() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(RegistryConfig { max_unpacked_bytes: MIB, ..config(dir.path()) }).await;
    let tenant = server.tenant();
    let image = Image::new("app", &noise(600_000, 14));
    tenant.push(&image).await;
    // The same layer twice: the second is not read, and counts all the same, as it does when it is unpacked.
    let diff_id = Digest::of(&tar_of("app", &noise(600_000, 14)));
    let twice = |first: &str, second: &str| {
        let layer = |kind| serde_json::json!({ "mediaType": kind, "digest": Digest::of(&image.layer), "size": image.layer.len() });
        let text = String::from_utf8(image.config.clone()).expect("text");
        let config = text.replace(&format!("\"{diff_id}\""), &format!("\"{diff_id}\",\"{diff_id}\"")).into_bytes();
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": { "mediaType": media_type::OCI_CONFIG, "digest": Digest::of(&config), "size": config.len() },
            "layers": [layer(first), layer(second)],
        });
        (config, manifest.to_string().into_bytes())
    };
    for (second, expected) in [
        (media_type::OCI_LAYER_GZIP, (StatusCode::PAYLOAD_TOO_LARGE, "unpack to at most 1048576 bytes")),
        (media_type::DOCKER_LAYER_GZIP, (StatusCode::BAD_REQUEST, "two media types")),
    ] {
        let (config, manifest) = twice(media_type::OCI_LAYER_GZIP, second);
        tenant.push_blob(&config).await;
        let response = tenant.put_manifest(&tenant.tag(), &manifest).await;
        let (status, text) = (response.status(), response.text().await.expect("text"));
        assert!(status == expected.0 && text.contains(expected.1), "{status} {text}");
    }
}

#[tokio::test]
async fn a_wrong_digest_stores_nothing() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let (claimed, upload) = (Digest::of(b"something else"), tenant.begin().await);
    let put = tenant.request(Method::PUT, &format!("{upload}?digest={claimed}")).body("content").send().await;
    assert_eq!(error_code(put.expect("an answer")).await, "DIGEST_INVALID");
    for digest in [claimed, Digest::of(b"content")] {
        assert_eq!(tenant.status(Method::HEAD, &format!("blobs/{digest}")).await, StatusCode::NOT_FOUND);
    }
    let other = tenant.begin().await;
    for query in ["", "?digest=sha512:00", "?digest=nonsense"] {
        let put = tenant.request(Method::PUT, &format!("{other}{query}")).body("x").send().await.expect("an answer");
        assert_eq!((put.status(), error_code(put).await.as_str()), (StatusCode::BAD_REQUEST, "DIGEST_INVALID"));
    }
    assert_eq!(tenant.status(Method::DELETE, &other).await, StatusCode::NO_CONTENT);
    assert_eq!(tenant.status(Method::DELETE, &other).await, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn what_was_pushed_can_be_mounted_and_nothing_else() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let digest = tenant.push_blob(b"layer").await;
    let mount = |digest: Digest, from: &str| format!("blobs/uploads/?mount={digest}&from={from}");
    for (path, expected) in [
        (mount(digest, IMAGE_REPOSITORY), StatusCode::CREATED),
        (mount(digest, "library/other"), StatusCode::ACCEPTED),
        (mount(Digest::of(b"absent"), IMAGE_REPOSITORY), StatusCode::ACCEPTED),
        ("blobs/uploads/?mount=nonsense&from=x".to_owned(), StatusCode::ACCEPTED),
    ] {
        assert_eq!(tenant.status(Method::POST, &path).await, expected, "{path}");
    }
}

#[tokio::test]
async fn a_manifest_is_checked_before_it_is_taken() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let refused = async |manifest: &[u8], expected: &str| {
        let response = tenant.put_manifest(&tenant.tag(), manifest).await;
        let status = response.status();
        let text = response.text().await.expect("text");
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text}");
        assert!(text.contains(expected), "{expected:?} in {text}");
        assert_eq!(tenant.status(Method::HEAD, &format!("manifests/{}", tenant.tag())).await, StatusCode::NOT_FOUND);
    };
    let good = Image::new("app", b"program");
    refused(&good.manifest, "MANIFEST_BLOB_UNKNOWN").await;
    tenant.push_blob(&good.layer).await;
    refused(&good.manifest, &Digest::of(&good.config).to_string()).await;
    tenant.push_blob(&good.config).await;
    let size = format!("\"size\":{}", good.layer.len());
    let wrong_size = String::from_utf8(good.manifest.clone()).expect("text").replace(&size, "\"size\":7");
    refused(wrong_size.as_bytes(), "another size").await;
    refused(b"{", "MANIFEST_INVALID").await;
    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": [] });
    refused(index.to_string().as_bytes(), "index of several").await;

    let other_tar = Image::of(gzip(&tar_of("app", b"other")), good.config.clone());
    tenant.push_blob(&other_tar.layer).await;
    refused(&other_tar.manifest, "unpacks to").await;
    let leaking = Image::new("app/services/secrets.json", b"{}");
    tenant.push_blob(&leaking.layer).await;
    tenant.push_blob(&leaking.config).await;
    refused(&leaking.manifest, "app/services/secrets.json").await;
    let no_tar = Image::of(gzip(&noise(2000, 3)), good.config.clone());
    tenant.push_blob(&no_tar.layer).await;
    refused(&no_tar.manifest, "checksum").await;
    let option = Image::with_command("app", b"program", &["/app\0--bind\0/\0/host"]);
    tenant.push_blob(&option.layer).await;
    tenant.push_blob(&option.config).await;
    refused(&option.manifest, "without NUL").await;

    let by_other_digest = tenant.put_manifest(&Digest::of(b"x").to_string(), &good.manifest).await;
    assert_eq!(error_code(by_other_digest).await, "DIGEST_INVALID");
    let large = vec![b' '; Manifest::MAX_BYTES + 1];
    let too_large = tenant.put_manifest(&tenant.tag(), &large).await;
    assert_eq!(too_large.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let docker = tenant
        .request(Method::PUT, &format!("manifests/{}", tenant.tag()))
        .header("content-type", media_type::DOCKER_MANIFEST)
        .body(good.manifest.clone());
    assert_eq!(error_code(docker.send().await.expect("an answer")).await, "MANIFEST_INVALID");

    assert_eq!(tenant.put_manifest(&good.digest().to_string(), &good.manifest).await.status(), StatusCode::CREATED);
    assert_eq!(server.registry.resolve(tenant.id).await.expect("disk"), None, "no tag was named");
    assert_eq!(tenant.put_manifest(&tenant.tag(), &good.manifest).await.status(), StatusCode::CREATED);
}

#[tokio::test]
async fn what_is_not_offered_says_so() {
    let server = Server::start().await;
    let tenant = server.tenant();
    let digest = tenant.push(&Image::new("app", b"program")).await;
    let upload = tenant.begin().await;
    for (method, path, allowed) in [
        (Method::DELETE, format!("manifests/{digest}"), "GET, HEAD, PUT"),
        (Method::DELETE, format!("blobs/{digest}"), "GET, HEAD"),
        (Method::PUT, "tags/list".to_owned(), "GET, HEAD"),
        (Method::GET, "blobs/uploads/".to_owned(), "POST"),
        (Method::POST, upload, "GET, PATCH, PUT, DELETE"),
        (Method::POST, "/v2/".to_owned(), "GET, HEAD"),
    ] {
        let response = tenant.send(method.clone(), &path).await;
        assert_eq!(response.status(), StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        assert_eq!(response.headers()["allow"], allowed, "{method} {path}");
        assert_eq!(error_code(response).await, "UNSUPPORTED");
    }
    let version = tenant.send(Method::GET, "/v2/").await;
    assert_eq!(version.headers()["docker-distribution-api-version"], "registry/2.0");
    assert_eq!(version.status(), StatusCode::OK);
}
