use crate::api::{client, serve};
use axum::{
    Json, Router,
    body::Body,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde_json::json;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};
use systemprompt_cloud::{
    ApiUrl, CheckoutError, CheckoutProgress, CheckoutSink, CloudError, EventStream, follow_checkout,
};
use systemprompt_contract::{CheckoutId, Event, TenantId};

const TENANT: &str = "999bc654-9a64-49bc-98be-db976fc84e76";

/// Answers each connection with the next of `answers` and remembers the `Last-Event-ID` it came with.
#[derive(Clone)]
struct Script {
    answers: Arc<Mutex<VecDeque<Response>>>,
    resumed_from: Arc<Mutex<Vec<Option<String>>>>,
}

impl Script {
    fn new(answers: impl IntoIterator<Item = Response>) -> Self {
        Self { answers: Arc::new(Mutex::new(answers.into_iter().collect())), resumed_from: Arc::default() }
    }

    async fn serve(&self, path: &str) -> ApiUrl {
        let script = self.clone();
        let handler = move |headers: HeaderMap| async move {
            let id = headers.get("last-event-id").map(|id| id.to_str().expect("text").to_owned());
            script.resumed_from.lock().expect("whole").push(id);
            let next = script.answers.lock().expect("whole").pop_front();
            next.unwrap_or_else(|| StatusCode::GONE.into_response())
        };
        let checkout = json!({"data": {"checkout_session_id": TENANT, "status": "open", "tenant_id": null,
            "tenant_name": "shop", "region": "iad", "price_id": "p"}});
        let open = || async { Json(checkout) };
        serve(Router::new().route(path, get(handler)).route("/api/v1/checkout/{id}", get(open))).await
    }

    fn resumed_from(&self) -> Vec<Option<String>> {
        self.resumed_from.lock().expect("whole").clone()
    }
}

fn frames(text: impl Into<String>) -> Response {
    ([(header::CONTENT_TYPE, "text/event-stream")], text.into()).into_response()
}

fn provisioning(id: i64, event_type: &str, message: &str) -> String {
    format!(
        "id: {id}\nevent: provisioning\ndata: {{\"tenant_id\":\"{TENANT}\",\"tenant_name\":\"shop\",\
         \"event_type\":\"{event_type}\",\"status\":\"provisioning\",\"message\":\"{message}\"}}\n\n"
    )
}

async fn ids(stream: &mut EventStream, count: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    for _ in 0..count {
        let (id, Event::Provisioning(_)) = stream.next().await.expect("an event") else { panic!("another event") };
        ids.push(id.0);
    }
    ids
}

#[tokio::test]
async fn a_broken_stream_goes_on_after_the_last_event() {
    let script = Script::new([
        frames(provisioning(1, "tenant_created", "") + &provisioning(2, "database_created", "")),
        StatusCode::SERVICE_UNAVAILABLE.into_response(),
        // Repeats the last one, sends noise and a name this client does not know, and ends in the middle of a frame.
        frames(format!(
            ": comment\n\nevent: heartbeat\ndata: {{}}\n\n{}id: 3\nevent: moon\ndata: {{}}\n\n{}id: 5\nevent: prov",
            provisioning(2, "database_created", ""),
            provisioning(4, "secrets_stored", "")
        )),
        frames(provisioning(5, "infrastructure_ready", "")),
    ]);
    let api_url = script.serve("/api/v1/tenants/{id}/events").await;
    let mut stream = client(&api_url).tenant_events(TENANT.parse().expect("an id"));
    assert_eq!(ids(&mut stream, 4).await, [1, 2, 4, 5]);
    let two = Some("2".to_owned());
    assert_eq!(script.resumed_from(), [None, two.clone(), two, Some("4".to_owned())]);
}

#[tokio::test]
async fn a_refused_stream_ends_at_once() {
    for (status, code) in [(StatusCode::UNAUTHORIZED, "unauthorized"), (StatusCode::NOT_FOUND, "unexpected_answer")] {
        let api_url = Script::new([status.into_response()]).serve("/api/v1/tenants/{id}/events").await;
        let mut stream = client(&api_url).tenant_events(TenantId::new());
        assert_eq!(stream.next().await.expect_err("refused").code(), code);
    }
    let page = Script::new(["a page".into_response()]).serve("/api/v1/tenants/{id}/events").await;
    let error = client(&page).tenant_events(TenantId::new()).next().await.expect_err("no stream");
    assert!(matches!(error, CloudError::Unexpected { status: 200, .. }), "{error:?}");
}

#[tokio::test]
async fn cancelling_next_loses_nothing() {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<String, std::io::Error>>(4);
    let receiver =
        futures_util::stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
    let body = Body::from_stream(receiver);
    let answer = ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response();
    let api_url = Script::new([answer]).serve("/api/v1/tenants/{id}/events").await;
    let mut stream = client(&api_url).tenant_events(TenantId::new());
    let whole = provisioning(1, "tenant_created", "");
    let (first, second) = whole.split_at(30);
    sender.send(Ok(first.to_owned())).await.expect("open");
    assert!(tokio::time::timeout(Duration::from_millis(300), stream.next()).await.is_err(), "half a frame is none");
    sender.send(Ok(second.to_owned())).await.expect("open");
    assert_eq!(ids(&mut stream, 1).await, [1]);
}

#[tokio::test]
async fn followed_lines_go_on_after_the_last_cursor() {
    let line = |cursor: &str, message: &str| {
        format!(
            "id: {cursor}\nevent: log\ndata: {{\"deployment_id\":\"{TENANT}\",\"timestamp\":\"2026-01-01T00:00:00Z\",\
             \"stream\":\"output\",\"message\":\"{message}\",\"cursor\":\"{cursor}\"}}\n\n"
        )
    };
    let script = Script::new([frames(line("a:1", "one")), frames(line("a:2", "two"))]);
    let api_url = script.serve("/api/v1/tenants/{id}/logs").await;
    let mut follower = client(&api_url).follow_logs(TenantId::new(), 10);
    let messages = [follower.next().await.expect("a line").message, follower.next().await.expect("a line").message];
    assert_eq!(messages, ["one", "two"]);
    assert_eq!(script.resumed_from(), [None, Some("a:1".to_owned())]);
}

async fn checkout(frames_sent: String, within: Duration) -> (Result<bool, CheckoutError>, Vec<String>) {
    // The stream of the server never ends by itself.
    let sent = futures_util::stream::once(async { Ok::<_, std::io::Error>(frames_sent) });
    let body = Body::from_stream(futures_util::StreamExt::chain(sent, futures_util::stream::pending()));
    let answer = ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response();
    let api_url = Script::new([answer]).serve("/api/v1/checkout/{id}/events").await;
    let mut seen = Vec::new();
    let sink: &mut CheckoutSink<'_> = &mut |progress| {
        seen.push(match progress {
            CheckoutProgress::Created(_) => "created".to_owned(),
            CheckoutProgress::Tenant { id, name } => format!("tenant {id} {name}"),
            CheckoutProgress::Event(event) => event.message.unwrap_or_default(),
        });
        Ok(())
    };
    let outcome = follow_checkout(&client(&api_url), CheckoutId::new(), within, sink).await;
    (outcome.map(|outcome| outcome.needs_deploy), seen)
}

#[tokio::test]
async fn a_checkout_names_its_tenant_first_and_ends_with_the_infrastructure() {
    let long = Duration::from_secs(20);
    let sent = provisioning(1, "tenant_created", "made") + &provisioning(2, "infrastructure_ready", "stands");
    let (outcome, seen) = checkout(sent, long).await;
    assert!(outcome.expect("ready"));
    assert_eq!(seen, [format!("tenant {TENANT} shop"), "made".to_owned(), "stands".to_owned()]);
    let (outcome, _) = checkout(provisioning(1, "provisioning_failed", "no space"), long).await;
    assert_eq!(outcome.expect_err("failed").to_string(), "the tenant could not be provisioned: no space");
    let (outcome, seen) = checkout(provisioning(1, "tenant_created", "made"), Duration::from_millis(300)).await;
    let error = outcome.expect_err("not yet");
    assert!(error.hint().is_some_and(|hint| hint.contains("cloud tenant create --checkout")), "{error:?}");
    assert_eq!(seen.len(), 2);
}
