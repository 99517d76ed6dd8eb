//! A whole deploy against a cloud in the test: API and registry of one origin.

use crate::api::{client, serve};
use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
};
use systemprompt_cloud::{
    ApiUrl, BuildSpec, Deploy, DeployError, DeployProgress, DeploySpec, DeployStage, Deployed, PushMode,
};
use systemprompt_contract::TenantId;
use tempfile::TempDir;

const OPERATION: &str = "11111111-1111-4111-8111-111111111111";
const DEPLOYMENT: &str = "22222222-2222-4222-8222-222222222222";

#[derive(Default)]
struct Cloud {
    tokens_given: usize,
    /// Pushes with the first token are refused, as if it had ended meanwhile.
    first_token_is_old: bool,
    pushed: Vec<String>,
    /// How many deploy calls are answered 503 first.
    busy: usize,
    submits: Vec<(String, Value)>,
    last_frame: Value,
}

type Shared = Arc<Mutex<Cloud>>;

async fn start(cloud: Cloud) -> (ApiUrl, Shared) {
    let shared: Shared = Arc::new(Mutex::new(cloud));
    let router = Router::new()
        .route("/api/v1/tenants/{id}/registry-token", get(registry_token))
        .route("/api/v1/tenants/{id}/deploy", post(submit))
        .route("/api/v1/tenants/{id}/events", get(events))
        .route("/v2/{*rest}", any(registry))
        .with_state(Arc::clone(&shared));
    (serve(router).await, shared)
}

async fn registry_token(State(cloud): State<Shared>, headers: HeaderMap) -> Json<Value> {
    let mut cloud = cloud.lock().expect("whole");
    cloud.tokens_given += 1;
    let host = headers[header::HOST].to_str().expect("text");
    Json(json!({"data": {"registry": host, "username": "x", "token": format!("t{}", cloud.tokens_given),
        "repository": "systemprompt-images", "tag": "tenant-x"}}))
}

async fn registry(State(cloud): State<Shared>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    axum::body::to_bytes(body, usize::MAX).await.expect("a body");
    let mut cloud = cloud.lock().expect("whole");
    // "x:t1"
    if cloud.first_token_is_old && parts.headers[header::AUTHORIZATION] == "Basic eDp0MQ==" {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let path = parts.uri.path();
    match parts.method {
        Method::POST => {
            let location = HeaderValue::try_from(format!("{path}session")).expect("a path");
            (StatusCode::ACCEPTED, [(header::LOCATION, location)]).into_response()
        }
        Method::PUT => {
            cloud.pushed.push(path.to_owned());
            StatusCode::CREATED.into_response()
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn submit(State(cloud): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Response {
    let mut cloud = cloud.lock().expect("whole");
    let key = headers["idempotency-key"].to_str().expect("text").to_owned();
    let digest = body["digest"].clone();
    cloud.submits.push((key, body));
    if cloud.submits.len() <= cloud.busy {
        let error = json!({"error": {"code": "unavailable", "message": "busy"}});
        return (StatusCode::SERVICE_UNAVAILABLE, Json(error)).into_response();
    }
    let data = json!({"status": "deploying", "app_url": "https://a.example", "operation_id": OPERATION,
        "deployment_id": DEPLOYMENT, "digest": digest});
    (StatusCode::ACCEPTED, Json(json!({ "data": data }))).into_response()
}

/// An older deploy's end, a frame of this one, and the last.
async fn events(State(cloud): State<Shared>) -> Response {
    let last = cloud.lock().expect("whole").last_frame.clone();
    let frame = |id: u32, operation: &str, more: &Value| {
        let mut data = json!({"operation_id": operation, "deployment_id": DEPLOYMENT, "step": "probe",
            "state": "running", "message": "…", "app_url": "https://a.example"});
        for (name, value) in more.as_object().expect("fields") {
            data[name] = value.clone();
        }
        format!("id: {id}\nevent: deployment\ndata: {data}\n\n")
    };
    let other = frame(1, DEPLOYMENT, &json!({"state": "failed"}));
    let text = other + &frame(2, OPERATION, &json!({})) + &frame(3, OPERATION, &last);
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from(text)).into_response()
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().expect("a parent")).expect("made");
    fs::write(path, text).expect("written");
}

struct Run {
    outcome: Result<Deployed, DeployError>,
    stages: Vec<DeployStage>,
    accepted: bool,
    _project: TempDir,
}

async fn deploy(api_url: &ApiUrl, push: PushMode, extra: Option<(&str, &str)>) -> Run {
    let project = tempfile::tempdir().expect("a directory");
    write(project.path(), "web/dist/index.html", "hello");
    write(project.path(), "services/config/config.yaml", "agents: {}\n");
    write(project.path(), ".systemprompt/profiles/p/profile.yaml", "name: p\ntarget: cloud\n");
    write(project.path(), "ca.pem", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n");
    if let Some((path, text)) = extra {
        write(project.path(), path, text);
    }
    let build = BuildSpec {
        ca_bundle: Some(project.path().join("ca.pem")),
        ..BuildSpec::new(project.path(), "/bin/true", "p")
    };
    let spec = DeploySpec { tenant: TenantId::new(), build, cache_dir: project.path().join("cache"), push };
    let seen = Arc::new(Mutex::new((Vec::new(), false)));
    let keep = Arc::clone(&seen);
    let sink = Arc::new(move |progress| match progress {
        DeployProgress::Stage(stage) => keep.lock().expect("whole").0.push(stage),
        DeployProgress::Accepted(_) => keep.lock().expect("whole").1 = true,
        _ => {}
    });
    let outcome = Deploy::new(client(api_url), spec).run(sink).await;
    let (stages, accepted) = std::mem::take(&mut *seen.lock().expect("whole"));
    Run { outcome, stages, accepted, _project: project }
}

#[tokio::test]
async fn a_deploy_goes_through_its_states_and_returns_what_runs() {
    use DeployStage::{Build, Push, Submit, Token, Watch};
    let (api_url, cloud) =
        start(Cloud { last_frame: json!({"state": "succeeded", "step": "finish"}), ..Cloud::default() }).await;
    let run = deploy(&api_url, PushMode::Push, None).await;
    let deployed = run.outcome.expect("live");
    assert_eq!(run.stages, [Build, Token, Push, Submit, Watch]);
    assert_eq!(
        (deployed.operation_id.to_string().as_str(), deployed.app_url.as_deref()),
        (OPERATION, Some("https://a.example"))
    );
    let cloud = cloud.lock().expect("whole");
    let (_, body) = &cloud.submits[0];
    assert_eq!(body["digest"], deployed.digest.as_str());
    assert_eq!(body["image"], format!("{}/systemprompt-images:tenant-x", api_url.authority()));
    assert_eq!(cloud.pushed.last().map(String::as_str), Some("/v2/systemprompt-images/manifests/tenant-x"));
}

#[tokio::test]
async fn a_token_that_ends_during_the_push_is_replaced() {
    let cloud = Cloud { first_token_is_old: true, last_frame: json!({"state": "succeeded"}), ..Cloud::default() };
    let (api_url, cloud) = start(cloud).await;
    deploy(&api_url, PushMode::Push, None).await.outcome.expect("live");
    assert_eq!(cloud.lock().expect("whole").tokens_given, 2);
}

#[tokio::test]
async fn a_submit_that_is_repeated_bears_the_same_key() {
    let cloud = Cloud { busy: 2, last_frame: json!({"state": "succeeded"}), ..Cloud::default() };
    let (api_url, cloud) = start(cloud).await;
    deploy(&api_url, PushMode::Skip, None).await.outcome.expect("live");
    let other = deploy(&api_url, PushMode::Skip, None).await.outcome;
    other.expect("live");
    let cloud = cloud.lock().expect("whole");
    let keys: Vec<_> = cloud.submits.iter().map(|(key, _)| key).collect();
    assert!(keys.len() == 4 && keys[0] == keys[1] && keys[1] == keys[2] && keys[2] != keys[3], "{keys:?}");
    assert!(cloud.pushed.is_empty());
}

#[tokio::test]
async fn a_failed_release_comes_with_its_reason_and_last_words() {
    let last = json!({"state": "failed", "logs": ["panicked at main.rs"],
        "error": {"code": "app_crashed", "message": "the app ended with exit code 101", "hint": "read its log"}});
    let (api_url, _) = start(Cloud { last_frame: last, ..Cloud::default() }).await;
    let run = deploy(&api_url, PushMode::Push, None).await;
    let error = run.outcome.expect_err("failed");
    assert!(run.accepted);
    assert_eq!((error.code(), error.hint().as_deref()), ("app_crashed", Some("read its log")));
    assert!(matches!(error, DeployError::Failed { logs, .. } if logs == ["panicked at main.rs"]));
}

#[tokio::test]
async fn a_secret_in_the_project_stops_before_anything_is_sent() {
    let (api_url, cloud) = start(Cloud::default()).await;
    let token = systemprompt_contract::token::new_api_token(1_900_000_000);
    let run = deploy(&api_url, PushMode::Push, Some(("services/notes.md", token.expose()))).await;
    let error = run.outcome.expect_err("a secret");
    assert_eq!(error.code(), "secrets_in_image");
    assert!(error.to_string().contains("services/notes.md") && !error.to_string().contains(token.expose()), "{error}");
    assert_eq!(cloud.lock().expect("whole").tokens_given, 0);
}
