//! Our own client against our own registry, with a network that fails.

use crate::support::{Server, Tenant, config};
use axum::{
    Router,
    extract::{Request, State},
    middleware::{self, Next},
    response::{IntoResponse, Response},
};
use http::StatusCode;
use std::{
    collections::HashMap,
    path::Path,
    process::Stdio,
    sync::{Arc, Mutex},
};
use systemprompt_contract::{IMAGE_REPOSITORY, Secret, TenantId, TenantTag};
use systemprompt_oci::{
    BuiltImage, ImageBuilder, PushError, PushEvent, RegistryClient,
    build::{BuildSpec, LayerCache},
};

/// A project with one page, built.
pub(crate) fn built(dir: &Path, page: &str) -> BuiltImage {
    let project = dir.join("project");
    for (path, content) in [
        ("web/dist/index.html", page),
        ("services/config.yaml", "a: 1"),
        (".systemprompt/profiles/prod/profile.yaml", "name: prod"),
    ] {
        let path = project.join(path);
        std::fs::create_dir_all(path.parent().expect("folder")).expect("folders");
        std::fs::write(path, content).expect("write");
    }
    let builder = ImageBuilder::new(BuildSpec::new(project, "/bin/true", "prod"));
    let cache = LayerCache::open(dir.join("cache")).expect("cache");
    builder.build(&builder.plan().expect("plan"), &cache, &|_| {}).expect("image")
}

fn client(server: &Server, token: &str) -> RegistryClient {
    let base = format!("http://{}/", server.address).parse().expect("URL");
    RegistryClient::new(server.http.clone(), base, "tenant", Secret::new(token))
}

pub(crate) fn client_of(tenant: &Tenant<'_>) -> RegistryClient {
    client(tenant.server, &tenant.token)
}

#[tokio::test]
async fn only_what_changed_is_sent() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start().await;
    let tenant = server.tenant();
    let events = Mutex::new(Vec::new());
    let record = |event| events.lock().expect("no panic").push(event);
    let first = built(dir.path(), "one");
    let report = client_of(&tenant).push(&first, IMAGE_REPOSITORY, &tenant.tag(), &record).await.expect("pushed");
    assert_eq!((report.uploaded_blobs, report.existing_blobs), (first.layers.len() + 1, 0));
    let total: u64 = first.layers.iter().map(|layer| layer.descriptor.size).sum::<u64>() + first.config.len() as u64;
    assert_eq!(report.uploaded_bytes, total);
    let image = server.registry.image(tenant.id, &first.digest).await.expect("runs here");
    assert_eq!(image.layers.len(), first.layers.len());

    let events = events.into_inner().expect("no panic");
    assert_eq!(events.last(), Some(&PushEvent::Manifest { digest: first.digest }));
    let uploaded = events.iter().filter(|event| matches!(event, PushEvent::Uploaded { .. })).count();
    assert_eq!(uploaded, report.uploaded_blobs);

    let second = built(dir.path(), "two");
    let report = client_of(&tenant).push(&second, IMAGE_REPOSITORY, &tenant.tag(), &|_| {}).await.expect("pushed");
    assert_eq!((report.uploaded_blobs, report.existing_blobs), (2, first.layers.len() - 1), "a layer and the config");
    assert_eq!(server.registry.resolve(tenant.id).await.expect("disk"), Some(second.digest));
}

#[tokio::test]
async fn another_registry_takes_our_push_too() {
    let dir = tempfile::tempdir().expect("dir");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound");
    let configuration = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: {address}}}\n",
        dir.path().join("data").display()
    );
    let path = dir.path().join("registry.yml");
    std::fs::write(&path, configuration).expect("write");
    drop(listener);
    let spawned = tokio::process::Command::new("docker-registry")
        .arg("serve")
        .arg(&path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut registry = spawned.expect("docker-registry is not there; `cargo xtask test` installs it");
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let http = systemprompt_oci::http_client(&[]).expect("client");
    let base: url::Url = format!("http://{address}/").parse().expect("URL");
    let image = built(dir.path(), "page");
    let client = RegistryClient::new(http.clone(), base.clone(), "x", Secret::new("y"));
    // Its start is waited for by the client's own patience.
    let mut report = client.push(&image, "some/name", "latest", &|_| {}).await;
    for _ in 0..5 {
        if report.is_ok() {
            break;
        }
        report = client.push(&image, "some/name", "latest", &|_| {}).await;
    }
    assert_eq!(report.expect("pushed").uploaded_blobs, image.layers.len() + 1);
    let manifest = http.get(base.join("v2/some/name/manifests/latest").expect("URL"));
    let manifest = manifest.header("accept", systemprompt_oci::media_type::OCI_MANIFEST).send().await.expect("answer");
    assert_eq!(manifest.bytes().await.expect("body"), image.manifest);
    registry.kill().await.expect("ours to stop");
}

/// Answers everything with `status`; without one: the first time each thing is asked with 503, the second time by
/// cutting the connection, and then as the registry does.
#[derive(Clone)]
struct Weather {
    seen: Arc<Mutex<HashMap<String, usize>>>,
    status: Option<StatusCode>,
}

async fn storm(State(weather): State<Weather>, request: Request, next: Next) -> Response {
    if let Some(status) = weather.status {
        return (status, r#"{"errors":[{"code":"X","message":"as the test says"}]}"#).into_response();
    }
    // Uploads get another path each time, their digest stays.
    let asked = request.uri().query().unwrap_or(request.uri().path());
    let asked = format!("{} {asked}", request.method());
    let times = {
        let mut seen = weather.seen.lock().expect("no panic");
        let times = seen.entry(asked).or_default();
        *times += 1;
        *times
    };
    match times {
        1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        2 => panic!("a handler that panics cuts its connection"),
        _ => next.run(request).await,
    }
}

async fn stormy(dir: &Path, status: Option<StatusCode>) -> Server {
    let weather = Weather { seen: Arc::default(), status };
    let around = |router: Router| router.layer(middleware::from_fn_with_state(weather, storm));
    Server::start_with(config(dir.join("registry")), around).await
}

#[tokio::test]
async fn failing_requests_are_repeated_until_all_is_there() {
    let dir = tempfile::tempdir().expect("dir");
    let server = stormy(dir.path(), None).await;
    let tenant = server.tenant();
    let image = built(dir.path(), "page");
    let report = client_of(&tenant).push(&image, IMAGE_REPOSITORY, &tenant.tag(), &|_| {}).await.expect("in the end");
    assert_eq!(report.uploaded_blobs, image.layers.len() + 1);
    server.registry.image(tenant.id, &image.digest).await.expect("whole");
}

#[tokio::test]
async fn what_cannot_succeed_is_said_at_once() {
    let dir = tempfile::tempdir().expect("dir");
    let image = built(dir.path(), "page");
    for (status, expected) in [
        (401, "ask for a new one"),
        (403, "does not allow"),
        (413, "as the test says"),
        (507, "disk is full"),
        (400, "answered 400"),
    ] {
        let status = StatusCode::from_u16(status).expect("status");
        let server = stormy(&dir.path().join(status.as_str()), Some(status)).await;
        let tenant = server.tenant();
        let push = client_of(&tenant).push(&image, IMAGE_REPOSITORY, "tag", &|_| {}).await;
        // HEAD answers carry no body, so the registry's own words may be missing.
        let text = push.expect_err("refused").to_string();
        assert!(text.contains(expected) || (status == 413 && text.contains("413")), "{status}: {text}");
    }
    let server = Server::start().await;
    let tenant = server.tenant();
    let foreign = TenantTag(TenantId::new()).to_string();
    let push = client_of(&tenant).push(&image, IMAGE_REPOSITORY, &foreign, &|_| {}).await;
    assert!(matches!(push, Err(PushError::NotFound(_))), "another tenant's tag: {push:?}");
    let push = client(&server, "sp_reg_nonsense").push(&image, IMAGE_REPOSITORY, &tenant.tag(), &|_| {}).await;
    assert!(matches!(push, Err(PushError::Unauthorized)), "{push:?}");
}
