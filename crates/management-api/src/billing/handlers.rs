use super::{
    Billing,
    checkouts::{self, Checkout, Idempotency, NewCheckout, StoreError, Stored},
    inbox::{MAX_BODY_BYTES, ManualEvent, SIGNATURE_HEADER, Source},
};
use crate::{
    http::{
        error::{Failure, Json},
        idempotency_key,
        pages::{Markup, Page},
    },
    identity::{self, LoopbackRedirect, Principal},
};
use axum::{
    Extension,
    body::Body,
    extract::{Path, State, rejection::PathRejection},
    http::HeaderMap,
};
use chrono::Utc;
use sha2::{Digest as _, Sha256};
use systemprompt_contract::{
    AccountId, CheckoutCreated, CheckoutId, CheckoutRequest, CheckoutState, Data, ErrorCode, Plan, TenantName,
};

/// `GET /checkout/plans`: a bare array.
pub(super) async fn plans(State(billing): State<Billing>) -> axum::Json<Vec<Plan>> {
    axum::Json(billing.plans)
}

/// `POST /checkout`: one row, waiting to be confirmed.
pub(super) async fn create(
    State(billing): State<Billing>,
    Extension(principal): Extension<Principal>,
    headers: HeaderMap,
    Json(request): Json<CheckoutRequest>,
) -> Result<axum::Json<CheckoutCreated>, Failure> {
    let key = idempotency_key(&headers)?;
    let plan = plan_of(&billing.plans, &request.price_id)?;
    if let Some(redirect) = &request.redirect_uri {
        let checked: Result<LoopbackRedirect, _> = redirect.parse();
        checked.map_err(|error| Failure::new(ErrorCode::BadRequest, error.to_string()))?;
    }
    let tenant_name = match &request.name {
        Some(name) => name.clone(),
        None => default_name(&billing, principal.account).await?,
    };
    let new = NewCheckout {
        account: principal.account,
        plan,
        region: request.region,
        tenant_name: &tenant_name,
        redirect_uri: request.redirect_uri.as_deref(),
        idempotency: key.as_deref().map(|key| Idempotency { key, request_hash: hash_of(&request) }),
    };
    match checkouts::store(billing.db.pool(), &new).await.map_err(store_failure)? {
        Stored::As(id) => Ok(axum::Json(CheckoutCreated {
            checkout_url: format!("{}/checkout/{id}", billing.site.cloud_url()),
            transaction_id: format!("manual_{id}"),
            checkout_session_id: id,
        })),
        Stored::KeyTaken => {
            Err(Failure::new(ErrorCode::IdempotencyMismatch, "this Idempotency-Key came before with another request")
                .hint("use a new key for a new checkout"))
        }
    }
}

/// `GET /checkout/{id}`.
pub(super) async fn show(
    State(billing): State<Billing>,
    Extension(id): Extension<CheckoutId>,
) -> Result<axum::Json<Data<CheckoutState>>, Failure> {
    let checkout = find(&billing, id).await?;
    Ok(axum::Json(Data { data: checkout.state }))
}

/// `POST /checkout/{id}/confirm`: the operator says that it is paid. Goes through the inbox as a payment would, so it
/// can be repeated and provisions once.
pub(super) async fn confirm(
    State(billing): State<Billing>,
    Extension(principal): Extension<Principal>,
    Extension(id): Extension<CheckoutId>,
) -> Result<axum::Json<Data<CheckoutState>>, Failure> {
    if !principal.is_operator() {
        return Err(Failure::new(
            ErrorCode::Forbidden,
            "only the operator of this installation can confirm a checkout",
        )
        .hint(format!("ask the operator to run: {}", confirm_command(id))));
    }
    let now = Utc::now();
    let body = serde_json::to_vec(&ManualEvent::confirmation(id, now)).map_err(|error| Failure::internal(&error))?;
    let signature = billing.inbox.sign(Source::Manual, &body, now);
    billing.inbox.receive(Source::Manual, &signature, &body, now).await?;
    let checkout = find(&billing, id).await?;
    Ok(axum::Json(Data { data: checkout.state }))
}

/// `POST /webhooks/manual`: the same inbox from outside, for who has the key.
pub(super) async fn webhook(
    State(billing): State<Billing>,
    headers: HeaderMap,
    body: Body,
) -> Result<axum::Json<serde_json::Value>, Failure> {
    let body = axum::body::to_bytes(body, MAX_BODY_BYTES)
        .await
        .map_err(|_| Failure::new(ErrorCode::TooLarge, format!("an event has at most {MAX_BODY_BYTES} bytes")))?;
    let mut signatures = headers.get_all(SIGNATURE_HEADER).iter();
    let signature = match (signatures.next(), signatures.next()) {
        (Some(signature), None) => signature.to_str().unwrap_or_default(),
        _ => "",
    };
    billing.inbox.receive(Source::Manual, signature, &body, Utc::now()).await?;
    Ok(axum::Json(serde_json::json!({ "status": "accepted" })))
}

/// `GET /checkout/{id}` for people. Whoever has the link may see it, so it names neither buyer nor tenant.
pub(super) async fn page(State(billing): State<Billing>, id: Result<Path<String>, PathRejection>) -> Page {
    let found = match id.ok().and_then(|Path(id)| id.parse::<CheckoutId>().ok()) {
        Some(id) => find(&billing, id).await,
        None => Err(Failure::not_found("checkout")),
    };
    match found {
        Ok(checkout) => checkout_page(&checkout),
        Err(Failure(error)) => Page::failure(CHECKOUT, &error),
    }
}

fn checkout_page(checkout: &Checkout) -> Page {
    let state = &checkout.state;
    let mut body = Markup::new()
        .raw("<dl><dt>Plan</dt><dd>")
        .text(&checkout.plan_name)
        .raw("</dd><dt>Region</dt><dd>")
        .text(state.region.as_str())
        .raw("</dd><dt>Status</dt><dd>")
        .text(&state.status)
        .raw("</dd></dl>");
    body = if state.tenant_id.is_some() {
        body.paragraph("This checkout is confirmed. The command line that waits for it goes on by itself.")
    } else {
        body.paragraph("This checkout waits for the operator of this installation, who confirms it with:")
            .command(&confirm_command(state.checkout_session_id))
            .paragraph("Reload this page to see whether it was confirmed.")
    };
    // The existing client waits for its browser to come back before it listens for events.
    if let Some(Ok(redirect)) = checkout.redirect_uri.as_deref().map(str::parse::<LoopbackRedirect>) {
        let id = state.checkout_session_id.to_string();
        let back = redirect.with_query(&[("status", "pending"), ("checkout_session_id", &id)]);
        body = body.raw("<p><a href=\"").text(&back).raw("\">Back to the command line</a></p>");
    }
    Page::new(CHECKOUT, body)
}

async fn find(billing: &Billing, id: CheckoutId) -> Result<Checkout, Failure> {
    checkouts::by_id(billing.db.pool(), id).await?.ok_or_else(|| Failure::not_found("checkout"))
}

fn plan_of<'a>(plans: &'a [Plan], price_id: &str) -> Result<&'a Plan, Failure> {
    plans.iter().find(|plan| plan.paddle_price_id == price_id).ok_or_else(|| {
        let known: Vec<_> = plans.iter().map(|plan| plan.paddle_price_id.as_str()).collect();
        let got: String = price_id.chars().take(80).collect();
        Failure::new(ErrorCode::BadRequest, format!("price_id: expected one of {}, got {got:?}", known.join(", ")))
    })
}

/// The part of the buyer's address before the `@`; it is ASCII and at most 64 characters.
async fn default_name(billing: &Billing, account: AccountId) -> Result<TenantName, Failure> {
    let account = identity::account_by_id(billing.db.pool(), account).await?;
    let local_part = account.as_ref().and_then(|account| account.email.split('@').next()).unwrap_or_default();
    local_part.parse().or_else(|_| "tenant".parse()).map_err(|error| Failure::internal(&error))
}

/// Of the request as it was understood, so that the order of its fields does not matter.
fn hash_of(request: &CheckoutRequest) -> [u8; 32] {
    let canonical = serde_json::to_vec(request).expect("plain structs serialise");
    Sha256::digest(canonical).into()
}

fn store_failure(error: StoreError) -> Failure {
    match error {
        StoreError::Database(error) => error.into(),
        error @ StoreError::PlanSize(_) => Failure::internal(&error),
    }
}

fn confirm_command(id: CheckoutId) -> String {
    format!("systemprompt cloud checkout confirm {id}")
}

const CHECKOUT: &str = "Checkout";
