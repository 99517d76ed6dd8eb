//! Checkouts and the inbox on a real database.

use super::{
    inbox::{CONFIRMED, ManualEvent, Receipt, SIGNATURE_HEADER, Source},
    *,
};
use crate::{
    identity::{Principal, Role, testing::TestDatabase},
    seal::Sealer,
    tenants::store,
};
use axum::{
    Extension, Router,
    body::Body,
    http::{Request, StatusCode},
    response::Response,
    routing::{get, post},
};
use chrono::{DateTime, TimeDelta, Utc};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use systemprompt_contract::{
    AccountId, CheckoutCreated, CheckoutId, CheckoutState, Data, ErrorBody, ErrorCode, EventId, Subject, TenantPhase,
};
use systemprompt_workflow::events;
use tower::ServiceExt as _;

struct Rig {
    database: TestDatabase,
    billing: Billing,
    member: AccountId,
}

impl Rig {
    async fn start() -> Self {
        let database = TestDatabase::start().await;
        let billing = Billing {
            db: database.db.clone(),
            site: Site { zone: "example.org".parse().unwrap(), https_port: 8443 },
            plans: default_plans(),
            inbox: Inbox::new(database.db.clone(), &Sealer::ephemeral()),
        };
        let member = database.account("ada.lovelace@example.com", Role::Member).await.id;
        Self { database, billing, member }
    }

    async fn operator(&self) -> Principal {
        let account = self.database.account("operator@example.com", Role::Operator).await;
        self.database.principal(account.id).await
    }

    async fn member(&self) -> Principal {
        self.database.principal(self.member).await
    }

    /// Sends a request as the access check lets it through: with a principal, and the checkout its path names.
    async fn send(&self, principal: Principal, checkout: Option<CheckoutId>, request: Request<Body>) -> Response {
        let mut router = Router::new()
            .route("/api/v1/checkout/plans", get(handlers::plans))
            .route("/api/v1/checkout", post(handlers::create))
            .route("/api/v1/checkout/{id}", get(handlers::show))
            .route("/api/v1/checkout/{id}/confirm", post(handlers::confirm))
            .layer(Extension(principal));
        if let Some(checkout) = checkout {
            router = router.layer(Extension(checkout));
        }
        router.with_state(self.billing.clone()).oneshot(request).await.unwrap()
    }

    async fn create(&self, key: Option<&str>, body: &Value) -> Result<CheckoutCreated, ErrorBody> {
        let mut request = Request::post("/api/v1/checkout").header("content-type", "application/json");
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let request = request.body(Body::from(body.to_string())).unwrap();
        parsed(self.send(self.member().await, None, request).await).await
    }

    async fn checkout(&self) -> CheckoutId {
        self.create(None, &order()).await.unwrap().checkout_session_id
    }

    async fn confirm(&self, principal: Principal, id: CheckoutId) -> Result<CheckoutState, ErrorBody> {
        let request = Request::post(format!("/api/v1/checkout/{id}/confirm")).body(Body::empty()).unwrap();
        let answer: Result<Data<CheckoutState>, _> = parsed(self.send(principal, Some(id), request).await).await;
        answer.map(|answer| answer.data)
    }

    /// Delivers `body` to the webhook under `signature`.
    async fn deliver(&self, signature: Option<&str>, body: &[u8]) -> StatusCode {
        let router = Router::new().route("/webhooks/manual", post(handlers::webhook)).with_state(self.billing.clone());
        let mut request = Request::post("/webhooks/manual");
        if let Some(signature) = signature {
            request = request.header(SIGNATURE_HEADER, signature);
        }
        router.oneshot(request.body(Body::from(body.to_vec())).unwrap()).await.unwrap().status()
    }

    async fn page(&self, id: &str) -> (StatusCode, String) {
        let router = Router::new().route("/checkout/{id}", get(handlers::page)).with_state(self.billing.clone());
        let request = Request::get(format!("/checkout/{id}")).body(Body::empty()).unwrap();
        let response = router.oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    fn sign(&self, body: &[u8], at: DateTime<Utc>) -> String {
        self.billing.inbox.sign(Source::Manual, body, at)
    }

    async fn counts(&self) -> Counts {
        Counts {
            events_taken: self.database.count("SELECT count(*) FROM inbox_events").await,
            applied: self.database.count("SELECT count(*) FROM inbox_events WHERE outcome = 'applied'").await,
            confirmed: self.database.count("SELECT count(*) FROM checkouts WHERE status = 'confirmed'").await,
            operations: self.database.count("SELECT count(*) FROM operations").await,
            stream_events: self.database.count("SELECT count(*) FROM events").await,
        }
    }
}

/// Everything that a delivery can change.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    events_taken: i64,
    applied: i64,
    confirmed: i64,
    operations: i64,
    stream_events: i64,
}

const NOTHING: Counts = Counts { events_taken: 0, applied: 0, confirmed: 0, operations: 0, stream_events: 0 };
const ONE_TENANT: Counts = Counts { events_taken: 1, applied: 1, confirmed: 1, operations: 1, stream_events: 2 };

fn order() -> Value {
    json!({ "price_id": "pri_standard", "region": "fra", "redirect_uri": "http://127.0.0.1:8766/callback" })
}

fn confirmation(id: CheckoutId) -> Vec<u8> {
    serde_json::to_vec(&ManualEvent::confirmation(id, Utc::now())).unwrap()
}

async fn parsed<T: serde::de::DeserializeOwned>(response: Response) -> Result<T, ErrorBody> {
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    if status.is_success() {
        return Ok(serde_json::from_slice(&bytes).unwrap());
    }
    let error: ErrorBody = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(status.as_u16(), error.error.code.status());
    Err(error)
}

#[tokio::test]
async fn plans_are_a_bare_array_and_a_checkout_has_the_existing_clients_shape() {
    let rig = Rig::start().await;
    let request = Request::get("/api/v1/checkout/plans").body(Body::empty()).unwrap();
    let plans: Value = parsed(rig.send(rig.member().await, None, request).await).await.unwrap();
    assert_eq!(plans[0]["paddle_price_id"], "pri_standard");
    assert_eq!((&plans[0]["memory_mb_default"], &plans[0]["volume_gb"]), (&json!(512), &json!(1)));

    let created = rig.create(None, &order()).await.unwrap();
    let id = created.checkout_session_id;
    assert_eq!(created.checkout_url, format!("https://cloud.example.org:8443/checkout/{id}"));
    assert_eq!(created.transaction_id, format!("manual_{id}"));

    let request = Request::get(format!("/api/v1/checkout/{id}")).body(Body::empty()).unwrap();
    let state: Data<CheckoutState> = parsed(rig.send(rig.member().await, Some(id), request).await).await.unwrap();
    assert_eq!(state.data.status, "open");
    assert_eq!(state.data.tenant_name, "ada.lovelace", "named after the buyer's address");
    assert_eq!(state.data.tenant_id, None);
    assert_eq!(buyer(rig.database.db.pool(), id).await.unwrap(), Some(rig.member));
    assert_eq!(buyer(rig.database.db.pool(), CheckoutId::new()).await.unwrap(), None);
}

#[tokio::test]
async fn a_wrong_order_says_what_was_expected() {
    let rig = Rig::start().await;
    for (field, value, mentions) in [
        ("price_id", json!("pri_gold"), "pri_standard"),
        ("region", json!("mars"), "iad"),
        ("redirect_uri", json!("https://evil.example/callback"), "http://127.0.0.1:PORT/callback"),
        ("name", json!(" padded "), "printable"),
    ] {
        let mut body = order();
        body[field] = value;
        let error = rig.create(None, &body).await.unwrap_err().error;
        assert_eq!(error.code, ErrorCode::BadRequest, "{field}");
        assert!(error.message.contains(mentions), "{}", error.message);
    }
    assert_eq!(rig.database.count("SELECT count(*) FROM checkouts").await, 0);
}

#[tokio::test]
async fn a_repeated_key_is_one_checkout_and_another_request_under_it_is_refused() {
    let rig = Rig::start().await;
    let all = futures_util::future::join_all((0..8).map(|_| async { rig.create(Some("k1"), &order()).await })).await;
    let first = all[0].clone().unwrap();
    assert!(all.into_iter().all(|created| created.unwrap() == first));
    let reordered =
        json!({ "redirect_uri": "http://127.0.0.1:8766/callback", "region": "fra", "price_id": "pri_standard" });
    assert_eq!(rig.create(Some("k1"), &reordered).await.unwrap(), first, "the order of fields does not matter");

    let mut other = order();
    other["region"] = json!("iad");
    assert_eq!(rig.create(Some("k1"), &other).await.unwrap_err().error.code, ErrorCode::IdempotencyMismatch);
    assert_ne!(rig.create(Some("k2"), &other).await.unwrap(), first);
    assert_ne!(rig.create(None, &order()).await.unwrap(), rig.create(None, &order()).await.unwrap());
    assert_eq!(rig.database.count("SELECT count(*) FROM checkouts").await, 4);
}

#[tokio::test]
async fn a_confirmation_enqueues_one_provision_however_often_it_comes() {
    let rig = Rig::start().await;
    let (operator, id) = (rig.operator().await, rig.checkout().await);
    let first = rig.confirm(operator, id).await.unwrap();
    assert_eq!(first.status, "confirmed");
    let tenant = first.tenant_id.unwrap();
    assert_eq!(rig.confirm(operator, id).await.unwrap(), first);
    let body = confirmation(id);
    assert_eq!(rig.deliver(Some(&rig.sign(&body, Utc::now())), &body).await, StatusCode::OK);
    assert_eq!(rig.counts().await, ONE_TENANT);

    let input: Value =
        sqlx::query_scalar("SELECT input FROM operations").fetch_one(rig.database.db.pool()).await.unwrap();
    assert_eq!(input, json!({ "tenant": tenant, "checkout": id, "name": "ada.lovelace" }));
    // The id that was handed out answers from this moment on.
    let row = store::tenant(rig.database.db.pool(), tenant).await.unwrap().unwrap();
    assert_eq!((row.account, row.name.as_str(), row.region.as_str()), (rig.member, "ada.lovelace", "fra"));
    assert_eq!((row.memory_mb, row.phase), (512, TenantPhase::Provisioning));
    for (subject, checkout) in [(Subject::Checkout(id), json!(id)), (Subject::Tenant(tenant), Value::Null)] {
        let events = events::read_after(&rig.database.db, subject, EventId(0), 10).await.unwrap();
        assert_eq!(events.len(), 1);
        let data: Value = serde_json::from_str(&events[0].1.as_ref().unwrap().data()).unwrap();
        assert_eq!(data["event_type"], "subscription_created");
        assert_eq!((&data["checkout_session_id"], &data["tenant_id"]), (&checkout, &json!(tenant)));
        assert_eq!((&data["tenant_name"], &data["status"]), (&json!("ada.lovelace"), &json!("provisioning")));
    }
}

#[tokio::test]
async fn only_the_operator_confirms() {
    let rig = Rig::start().await;
    let id = rig.checkout().await;
    let error = rig.confirm(rig.member().await, id).await.unwrap_err().error;
    assert_eq!(error.code, ErrorCode::Forbidden);
    assert!(error.hint.unwrap().contains(&format!("systemprompt cloud checkout confirm {id}")));
    assert_eq!(rig.counts().await, NOTHING);
}

#[tokio::test]
async fn fifty_deliveries_at_once_are_one_provision() {
    let rig = Rig::start().await;
    let body = confirmation(rig.checkout().await);
    let signature = rig.sign(&body, Utc::now());
    let all = (0..50).map(|_| rig.deliver(Some(&signature), &body));
    let statuses = futures_util::future::join_all(all).await;
    assert!(statuses.iter().all(|status| *status == StatusCode::OK), "{statuses:?}");
    assert_eq!(rig.counts().await, ONE_TENANT);
}

#[tokio::test]
async fn a_forged_altered_or_stale_delivery_changes_nothing() {
    let rig = Rig::start().await;
    let (id, other) = (rig.checkout().await, rig.checkout().await);
    let (body, now) = (confirmation(id), Utc::now());
    let good = rig.sign(&body, now);
    let tag = good.split("h1=").nth(1).unwrap();
    let forged = format!("ts={};h1={}", now.timestamp(), "0".repeat(64));
    let later = format!("ts={};h1={tag}", now.timestamp() + 1);
    for (signature, body) in [
        (None, body.clone()),
        (Some(""), body.clone()),
        (Some(forged.as_str()), body.clone()),
        (Some(later.as_str()), body.clone()),
        (Some(good.as_str()), confirmation(other)),
        (Some(good.as_str()), [body.as_slice(), b"\n"].concat()),
        (Some(&*rig.sign(&body, now - TimeDelta::seconds(60))), body.clone()),
        (Some(&*rig.sign(&body, now + TimeDelta::seconds(60))), body.clone()),
    ] {
        assert_eq!(rig.deliver(signature, &body).await, StatusCode::FORBIDDEN, "{signature:?}");
    }
    for nonsense in
        [&b"{}"[..], b"", b"nonsense", br#"{"event_id":"","kind":"k","occurred_at":"2026-01-01T00:00:00Z"}"#]
    {
        let signature = rig.sign(nonsense, Utc::now());
        assert_eq!(rig.deliver(Some(&signature), nonsense).await, StatusCode::BAD_REQUEST);
    }
    let large = vec![b' '; inbox::MAX_BODY_BYTES + 1];
    assert_eq!(rig.deliver(Some(&rig.sign(&large, Utc::now())), &large).await, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(rig.counts().await, NOTHING);

    let two = rig.sign(&body, Utc::now()).replacen(";h1=", &format!(";h1={};h1=", "0".repeat(64)), 1);
    assert_eq!(rig.deliver(Some(&two), &body).await, StatusCode::OK, "one good tag of two, as while a key changes");
    assert_eq!(rig.counts().await, ONE_TENANT);
}

#[tokio::test]
async fn an_event_that_asks_for_nothing_known_is_kept_and_ignored() {
    let rig = Rig::start().await;
    let id = rig.checkout().await;
    let event = |event_id: &str, kind: &str, checkout_id| ManualEvent {
        event_id: event_id.to_owned(),
        kind: kind.to_owned(),
        checkout_id,
        occurred_at: Utc::now(),
    };
    for event in [
        event("e1", "subscription.paused", Some(id)),
        event("e2", CONFIRMED, Some(CheckoutId::new())),
        event("e3", CONFIRMED, None),
    ] {
        let body = serde_json::to_vec(&event).unwrap();
        assert_eq!(rig.deliver(Some(&rig.sign(&body, Utc::now())), &body).await, StatusCode::OK);
    }
    assert_eq!(rig.counts().await, Counts { events_taken: 3, ..NOTHING });

    // A second event with another id for a checkout that was confirmed makes no second tenant.
    rig.confirm(rig.operator().await, id).await.unwrap();
    let body = serde_json::to_vec(&event("e4", CONFIRMED, Some(id))).unwrap();
    assert_eq!(rig.deliver(Some(&rig.sign(&body, Utc::now())), &body).await, StatusCode::OK);
    assert_eq!(rig.counts().await, Counts { events_taken: 5, ..ONE_TENANT });
}

#[tokio::test]
async fn a_delivery_cut_off_in_the_middle_leaves_nothing_and_can_be_repeated() {
    let rig = Rig::start().await;
    let id = rig.checkout().await;
    let (body, now) = (confirmation(id), Utc::now());
    let signature = rig.sign(&body, now);
    // Holds the checkout, so that the delivery stops after it has stored its event.
    let mut holder = rig.database.db.begin().await.unwrap();
    sqlx::query("SELECT 1 FROM checkouts WHERE id = $1 FOR UPDATE")
        .bind(id.uuid())
        .execute(&mut *holder)
        .await
        .unwrap();
    let (inbox, cut_signature, cut_body) = (rig.billing.inbox.clone(), signature.clone(), body.clone());
    let delivery =
        tokio::spawn(async move { inbox.receive(Source::Manual, &cut_signature, &cut_body, now).await.map(drop) });
    let waiting =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE checkouts%'";
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while rig.database.count(waiting).await == 0 {
        assert!(std::time::Instant::now() < deadline, "the delivery never reached the checkout");
        tokio::task::yield_now().await;
    }
    delivery.abort();
    assert!(delivery.await.unwrap_err().is_cancelled());
    drop(holder);

    let receipt = rig.billing.inbox.receive(Source::Manual, &signature, &body, now).await.unwrap();
    assert!(matches!(receipt, Receipt::Applied(_)), "{receipt:?}");
    let receipt = rig.billing.inbox.receive(Source::Manual, &signature, &body, now).await.unwrap();
    assert_eq!(receipt, Receipt::Duplicate);
    assert_eq!(rig.counts().await, ONE_TENANT);
}

#[tokio::test]
async fn the_page_says_what_waits_and_names_nobody() {
    let rig = Rig::start().await;
    let id = rig.checkout().await;
    let (status, page) = rig.page(&id.to_string()).await;
    assert_eq!(status, StatusCode::OK);
    assert!(page.contains(&format!("systemprompt cloud checkout confirm {id}")) && page.contains("Standard"));
    assert!(page.contains(&format!("http://127.0.0.1:8766/callback?status=pending&amp;checkout_session_id={id}")));
    assert!(!page.contains("lovelace") && !page.contains("example.com"));

    rig.confirm(rig.operator().await, id).await.unwrap();
    let (_, page) = rig.page(&id.to_string()).await;
    assert!(page.contains("is confirmed") && !page.contains("checkout confirm"));
    for absent in [CheckoutId::new().to_string(), "x".to_owned(), "%3Cscript%3E".to_owned()] {
        let (status, page) = rig.page(&absent).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(!page.contains("<script"));
    }
}
