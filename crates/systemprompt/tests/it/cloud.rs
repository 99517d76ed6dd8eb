//! API and registry of a cloud, as far as the command line calls them; one tenant, one checkout, one deploy.

use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::{any, get, post},
};
use futures_util::{StreamExt as _, stream};
use serde_json::{Value, json};
use std::{
    net::Ipv4Addr,
    sync::{Arc, Mutex, mpsc},
    thread,
};
use tokio::{net::TcpListener, runtime, sync::oneshot};

pub(crate) const TENANT: &str = "999bc654-9a64-49bc-98be-db976fc84e76";
pub(crate) const CHECKOUT: &str = "33333333-3333-4333-8333-333333333333";
const OPERATION: &str = "11111111-1111-4111-8111-111111111111";
const DEPLOYMENT: &str = "22222222-2222-4222-8222-222222222222";

/// How the cloud behaves; `Default` is well.
#[derive(Clone)]
pub(crate) struct Manner {
    /// Every text that comes from a tenant or the server.
    pub(crate) text: String,
    /// Every call is refused with it.
    pub(crate) refusal: Option<(u16, Value)>,
    /// More than one plan.
    pub(crate) many_plans: bool,
    /// The state of the deploy's last frame; none: it never ends.
    pub(crate) deploy_ends: Option<&'static str>,
    /// Followed logs never stop.
    pub(crate) endless_logs: bool,
    /// Phase 1 begins and does not end.
    pub(crate) never_ready: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            text: "shop".to_owned(),
            refusal: None,
            many_plans: false,
            deploy_ends: Some("succeeded"),
            endless_logs: false,
            never_ready: false,
        }
    }
}

/// Calls that were made, `METHOD path`.
type Calls = Arc<Mutex<Vec<String>>>;

#[derive(Clone)]
struct Shared {
    manner: Manner,
    calls: Calls,
}

pub(crate) struct Cloud {
    pub(crate) url: String,
    calls: Calls,
    _stop: oneshot::Sender<()>,
}

impl Cloud {
    pub(crate) fn start() -> Self {
        Self::with(Manner::default())
    }

    pub(crate) fn with(manner: Manner) -> Self {
        let calls = Calls::default();
        let shared = Shared { manner, calls: Arc::clone(&calls) };
        let (port_sender, port) = mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        thread::spawn(move || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
                port_sender.send(listener.local_addr().expect("bound").port()).expect("the test waits");
                tokio::select! {
                    _ = axum::serve(listener, router(shared)) => {}
                    _ = stopped => {}
                }
            });
        });
        let url = format!("http://127.0.0.1:{}", port.recv().expect("a port"));
        Self { url, calls, _stop: stop }
    }

    /// An address where nobody listens.
    pub(crate) fn absent() -> Self {
        let mut cloud = Self::start();
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound");
        cloud.url = format!("http://{free}");
        cloud
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().expect("whole").clone()
    }
}

fn router(shared: Shared) -> Router {
    Router::new()
        .route("/api/v1/auth/me", get(me))
        .route("/api/v1/auth/logout", post(|| async { StatusCode::NO_CONTENT }))
        .route("/api/v1/auth/token", post(token))
        .route("/api/v1/checkout/plans", get(plans))
        .route("/api/v1/checkout", post(create_checkout))
        .route("/api/v1/checkout/{id}", get(confirm))
        .route("/api/v1/checkout/{id}/events", get(checkout_events))
        .route("/api/v1/checkout/{id}/confirm", post(confirm))
        .route("/api/v1/tenants", get(tenants))
        .route("/api/v1/tenants/{id}", get(tenant).delete(delete))
        .route("/api/v1/tenants/{id}/status", get(status))
        .route("/api/v1/tenants/{id}/logs", get(logs))
        .route("/api/v1/tenants/{id}/registry-token", get(registry_token))
        .route("/api/v1/tenants/{id}/deploy", post(deploy))
        .route("/api/v1/tenants/{id}/events", get(tenant_events))
        .route("/v2/{*rest}", any(registry))
        .layer(axum::middleware::from_fn_with_state(shared.clone(), note))
        .with_state(shared)
}

async fn note(State(shared): State<Shared>, request: Request, next: axum::middleware::Next) -> Response {
    shared.calls.lock().expect("whole").push(format!("{} {}", request.method(), request.uri()));
    match shared.manner.refusal {
        Some((status, body)) => (StatusCode::from_u16(status).expect("a status"), Json(body)).into_response(),
        None => next.run(request).await,
    }
}

async fn me(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({
        "user": {"id": DEPLOYMENT, "email": "dev@example.com", "name": null}, "customer": null,
        "tenants": [{"id": TENANT, "name": shared.manner.text, "subscription_id": null, "subscription_status": "active",
            "app_id": "sp-999bc6549a64", "hostname": "999bc6549a64.example", "region": "iad", "status": "active",
            "plan": null, "external_db_access": false, "database_url": "postgres://u:***@h/d"}]
    }))
}

async fn token() -> Json<Value> {
    let token = systemprompt_contract::token::new_api_token(4_102_444_800);
    Json(json!({"access_token": token, "expires_at": "2100-01-01T00:00:00Z",
        "user": {"id": DEPLOYMENT, "email": "dev@example.com", "name": null}}))
}

async fn plans(State(shared): State<Shared>) -> Json<Value> {
    let plan = |id: &str| {
        json!({"id": id, "name": id, "paddle_price_id": format!("pri_{id}"),
        "memory_mb_default": 256, "volume_gb": 1, "max_tenants": null})
    };
    Json(if shared.manner.many_plans { json!([plan("small"), plan("large")]) } else { json!([plan("small")]) })
}

async fn create_checkout() -> Json<Value> {
    Json(
        json!({"checkout_url": "https://cloud.example/checkout/3", "transaction_id": "t", "checkout_session_id": CHECKOUT}),
    )
}

async fn checkout_events(State(shared): State<Shared>) -> Response {
    let frame = |id: u32, event_type: &str, message: &str| {
        let data = json!({"checkout_session_id": CHECKOUT, "tenant_id": TENANT, "tenant_name": shared.manner.text,
            "event_type": event_type, "status": "provisioning", "message": message});
        format!("id: {id}\nevent: provisioning\ndata: {data}\n\n")
    };
    let last = if shared.manner.never_ready { "secrets_stored" } else { "infrastructure_ready" };
    stays_open(frame(1, "database_created", "database made") + &frame(2, last, &shared.manner.text))
}

async fn confirm(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({"data": {"checkout_session_id": CHECKOUT, "status": "confirmed", "tenant_id": TENANT,
        "tenant_name": shared.manner.text, "region": "iad", "price_id": "pri_small"}}))
}

fn summary(shared: &Shared) -> Value {
    json!({"id": TENANT, "name": shared.manner.text, "fly_app_name": "sp-999bc6549a64",
        "fly_hostname": "999bc6549a64.example", "hostname": "999bc6549a64.example", "status": "running", "region": "iad"})
}

async fn tenants(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({"data": [summary(&shared)]}))
}

async fn tenant(State(shared): State<Shared>) -> Json<Value> {
    let mut view = summary(&shared);
    view["app_url"] = "https://999bc6549a64.example".into();
    view["created_at"] = "2026-01-01T00:00:00Z".into();
    view["release"] = json!({"deployment_id": DEPLOYMENT, "digest": format!("sha256:{}", "0".repeat(64)),
        "live_since": "2026-01-01T00:00:00Z"});
    Json(json!({ "data": view }))
}

async fn delete() -> Response {
    (StatusCode::ACCEPTED, Json(json!({"data": {"operation_id": OPERATION}}))).into_response()
}

async fn status(State(shared): State<Shared>) -> Json<Value> {
    Json(json!({"data": {"status": "running", "message": shared.manner.text,
        "app_url": "https://999bc6549a64.example", "secrets_url": null}}))
}

async fn logs(State(shared): State<Shared>, request: Request) -> Response {
    let line = |n: u32, stream: &str| {
        json!({"deployment_id": DEPLOYMENT, "timestamp": "2026-01-01T00:00:00Z", "stream": stream,
            "message": shared.manner.text, "cursor": format!("{DEPLOYMENT}:{n}")})
    };
    let lines = [line(1, "output"), line(2, "platform")];
    if !request.uri().query().unwrap_or_default().contains("follow=true") {
        return Json(json!({ "logs": lines })).into_response();
    }
    let frames = lines.map(|line| format!("id: {}\nevent: log\ndata: {line}\n\n", line["cursor"])).concat();
    if !shared.manner.endless_logs {
        return stays_open(frames);
    }
    let endless = stream::repeat_with(move || Ok::<_, std::io::Error>(frames.clone()));
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(endless)).into_response()
}

async fn registry_token(headers: HeaderMap) -> Json<Value> {
    let host = headers[header::HOST].to_str().expect("text");
    Json(json!({"data": {"registry": host, "username": "x", "token": "t", "repository": "systemprompt-images",
        "tag": format!("tenant-{TENANT}")}}))
}

async fn deploy(Json(body): Json<Value>) -> Response {
    let data = json!({"status": "deploying", "app_url": "https://999bc6549a64.example", "operation_id": OPERATION,
        "deployment_id": DEPLOYMENT, "digest": body["digest"]});
    (StatusCode::ACCEPTED, Json(json!({ "data": data }))).into_response()
}

async fn tenant_events(State(shared): State<Shared>) -> Response {
    let frame = |id: u32, state: &str, more: &Value| {
        let mut data = json!({"operation_id": OPERATION, "deployment_id": DEPLOYMENT, "step": "probe", "state": state,
            "message": shared.manner.text, "app_url": "https://999bc6549a64.example"});
        for (name, value) in more.as_object().expect("fields") {
            data[name] = value.clone();
        }
        format!("id: {id}\nevent: deployment\ndata: {data}\n\n")
    };
    let last = match shared.manner.deploy_ends {
        Some("failed") => frame(
            2,
            "failed",
            &json!({"logs": [shared.manner.text],
            "error": {"code": "app_crashed", "message": shared.manner.text, "hint": shared.manner.text}}),
        ),
        Some(state) => frame(2, state, &json!({})),
        None => String::new(),
    };
    stays_open(frame(1, "running", &json!({})) + &last)
}

async fn registry(request: Request) -> Response {
    let (parts, body) = request.into_parts();
    axum::body::to_bytes(body, usize::MAX).await.expect("a body");
    match parts.method {
        Method::POST => {
            let location = HeaderValue::try_from(format!("{}session", parts.uri.path())).expect("a path");
            (StatusCode::ACCEPTED, [(header::LOCATION, location)]).into_response()
        }
        Method::PUT => StatusCode::CREATED.into_response(),
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Events, and then silence, as from a server that has nothing more to say yet.
fn stays_open(frames: String) -> Response {
    let frames = stream::once(async { Ok::<_, std::io::Error>(frames) }).chain(stream::pending());
    ([(header::CONTENT_TYPE, "text/event-stream")], Body::from_stream(frames)).into_response()
}
