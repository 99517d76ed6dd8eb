//! What the API says about tenants, and the two calls that change one: deploy and delete.

use super::{
    delete::DeleteTenant,
    deploy::DeployTenant,
    follow, logs, routes,
    state::{self, TenantEvent},
    store::{self, Moved, NewDeployment, Tenant},
};
use crate::{
    app::App,
    http::{
        Access, Endpoints,
        error::{Failure, Json, Query},
        idempotency_key,
    },
    identity::Principal,
};
use axum::{
    Extension,
    extract::{Path, State, rejection::PathRejection},
    routing::MethodFilter,
};
use chrono::{TimeDelta, Utc};
use http::{HeaderMap, StatusCode, header};
use sqlx::PgConnection;
use systemprompt_contract::{
    ApiError, Data, DeployAccepted, DeployRequest, DeploymentId, ErrorCode, IMAGE_REPOSITORY, MeTenant, OperationId,
    OperationView, PlatformHost, RegistryToken, ReleaseView, Subject, TenantId, TenantImage, TenantPhase,
    TenantStatusView, TenantSummary, TenantTag, TenantView,
};
use systemprompt_oci::Digest;
use systemprompt_registry::{Grant, ImageError};
use systemprompt_workflow::{NewOperation, enqueue};
use uuid::Uuid;

/// How long a registry token lives.
const REGISTRY_TOKEN_MINUTES: i64 = 10;
/// How long a deleted tenant's data waits for a change of mind.
const RESTORABLE_HOURS: i64 = 48;

pub(crate) fn endpoints(endpoints: Endpoints) -> Endpoints {
    use MethodFilter as M;
    endpoints
        .add(M::GET, "/api/v1/tenants", Access::SignedIn, list)
        .add(M::GET, "/api/v1/tenants/{id}", Access::Tenant, show)
        .add(M::DELETE, "/api/v1/tenants/{id}", Access::Deletion, delete)
        .add(M::GET, "/api/v1/tenants/{id}/status", Access::Tenant, status)
        .add(M::GET, "/api/v1/tenants/{id}/events", Access::Tenant, follow::tenant_events)
        .add(M::GET, "/api/v1/tenants/{id}/logs", Access::Tenant, logs::logs)
        .add(M::GET, "/api/v1/tenants/{id}/registry-token", Access::Tenant, registry_token)
        .add(M::POST, "/api/v1/tenants/{id}/deploy", Access::Tenant, deploy)
        .add(M::GET, "/api/v1/checkout/{id}/events", Access::Checkout, follow::checkout_events)
        .add(M::GET, "/api/v1/operations/{id}", Access::Operation, operation)
        .add(M::GET, "/api/v1/operations/parked", Access::Operator, parked)
        .add(M::POST, "/api/v1/operations/{id}/retry", Access::Operator, retry_parked)
}

/// The tenants of an account as `/auth/me` lists them.
pub(crate) async fn me_tenants(app: &App, principal: &Principal) -> Result<Vec<MeTenant>, Failure> {
    let tenants = store::of_account(app.db.pool(), principal.account).await?;
    Ok(tenants
        .into_iter()
        .map(|tenant| {
            let slug = tenant.slug();
            MeTenant {
                id: tenant.id,
                status: Some(tenant.status().as_account_status().to_owned()),
                name: tenant.name,
                subscription_id: None,
                subscription_status: Some("active".to_owned()),
                app_id: Some(slug.app_name().to_string()),
                hostname: Some(slug.hostname(&app.site.zone).to_string()),
                region: Some(tenant.region),
                plan: None,
                external_db_access: false,
                // Masked with exactly three stars: the existing client keeps the URL it has then.
                database_url: format!("postgres://{0}:***@localhost/{0}", slug.database()),
            }
        })
        .collect())
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct ListQuery {
    /// Everybody's, for the operator; otherwise one's own, as `/auth/me` has them.
    #[serde(default)]
    all: bool,
}

async fn list(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Query(query): Query<ListQuery>,
) -> Result<axum::Json<Data<Vec<TenantSummary>>>, Failure> {
    let tenants = match (query.all, principal.is_operator()) {
        (false, _) => store::of_account(app.db.pool(), principal.account).await?,
        (true, true) => store::all(app.db.pool()).await?,
        (true, false) => {
            return Err(Failure::new(ErrorCode::Forbidden, "everybody's tenants are the operator's to see"));
        }
    };
    let data = tenants.iter().map(|tenant| summary(&app, tenant)).collect();
    Ok(axum::Json(Data { data }))
}

async fn show(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
) -> Result<axum::Json<Data<TenantView>>, Failure> {
    let live = store::live_deployment(app.db.pool(), tenant.id).await?;
    let release = live.and_then(|live| {
        Some(ReleaseView { deployment_id: live.id, digest: live.digest.to_string(), live_since: live.live_at? })
    });
    let data = TenantView {
        summary: summary(&app, &tenant),
        app_url: app.site.app_url(&tenant.slug()),
        release,
        created_at: tenant.created_at,
    };
    Ok(axum::Json(Data { data }))
}

fn summary(app: &App, tenant: &Tenant) -> TenantSummary {
    let slug = tenant.slug();
    let hostname = slug.hostname(&app.site.zone).to_string();
    TenantSummary {
        id: tenant.id,
        name: tenant.name.clone(),
        fly_app_name: Some(slug.app_name().to_string()),
        fly_hostname: Some(hostname.clone()),
        hostname: Some(hostname),
        status: tenant.status().as_str().to_owned(),
        region: tenant.region,
    }
}

async fn status(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
) -> Result<axum::Json<Data<TenantStatusView>>, Failure> {
    let live = store::live_deployment(app.db.pool(), tenant.id).await?;
    let crashes = live.as_ref().filter(|live| live.restarts > 0).map(|live| {
        let exit = live.last_exit.as_deref().unwrap_or("unknown");
        let times = if live.restarts == 1 { "once".to_owned() } else { format!("{} times", live.restarts) };
        format!("The app was restarted {times} since it went live; the last time it {exit}.")
    });
    let data = TenantStatusView {
        status: tenant.status().as_str().to_owned(),
        message: tenant.failure.clone().or(crashes),
        app_url: Some(app.site.app_url(&tenant.slug())),
        secrets_url: None,
    };
    Ok(axum::Json(Data { data }))
}

async fn registry_token(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
) -> axum::Json<Data<RegistryToken>> {
    let expires_at = Utc::now() + TimeDelta::minutes(REGISTRY_TOKEN_MINUTES);
    let token = app.registry_key.mint(&Grant { tenant: tenant.id, push: true, pull: true, expires_at });
    // A client that cannot resolve *.localhost calls us localhost, and will call the registry that too.
    let called = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let called = called.rsplit_once(':').map_or(called, |(host, _)| host);
    let registry = match called {
        "localhost" | "127.0.0.1" => app.site.authority(called),
        _ => app.site.authority(app.site.zone.platform(PlatformHost::Registry).as_str()),
    };
    axum::Json(Data {
        data: RegistryToken {
            registry,
            username: "x".to_owned(),
            token,
            repository: IMAGE_REPOSITORY.to_owned(),
            tag: TenantTag(tenant.id).to_string(),
        },
    })
}

/// Records the deploy and its operation in one transaction and answers; the engine does the rest.
async fn deploy(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
    Json(request): Json<DeployRequest>,
) -> Result<(StatusCode, axum::Json<Data<DeployAccepted>>), Failure> {
    let key = idempotency_key(&headers)?.unwrap_or_else(|| Uuid::new_v4().to_string());
    let image = TenantImage::check(&request.image, tenant.id, &app.site.registry_authorities())
        .map_err(|error| ApiError::new(ErrorCode::ImageMismatch, error.to_string()))?;
    // Before the transaction, which must not wait for the disk. What it found stays: it is young again by being found.
    let pushed = pushed_digest(&app, &tenant, request.digest.as_deref()).await;
    let mut tx = app.db.begin().await?;
    let tenant = store::lock(&mut tx, tenant.id).await?.ok_or_else(|| Failure::not_found("tenant"))?;
    if let Some(earlier) = store::deployment_by_key(&mut tx, tenant.id, &key).await? {
        return repeated(&app, &tenant, &request, &earlier);
    }
    state::apply(tenant.phase, TenantEvent::DeployAsked).map_err(ApiError::from)?;
    let digest = pushed?;
    let id = DeploymentId::new();
    let workflow = DeployTenant { tenant: tenant.id, deployment: id };
    let operation =
        enqueue(&mut tx, NewOperation { input: &workflow, subject: Subject::Tenant(tenant.id), key: &id.to_string() })
            .await
            .map_err(|error| Failure::internal(&error))?
            .id;
    let image = image.to_string();
    let new = NewDeployment { id, tenant: tenant.id, image: &image, digest: &digest, operation, key: &key };
    store::insert_deployment(&mut tx, &new).await?;
    let moved = Moved { operation: Some(operation), ..Moved::default() };
    store::advance(&mut tx, tenant.id, TenantEvent::DeployAsked, moved).await.map_err(move_failure)?;
    tx.commit().await?;
    Ok(accepted(&app, &tenant, id, operation, digest))
}

/// The same command again: the same answer, and nothing starts twice.
fn repeated(
    app: &App,
    tenant: &Tenant,
    request: &DeployRequest,
    earlier: &store::Deployment,
) -> Result<(StatusCode, axum::Json<Data<DeployAccepted>>), Failure> {
    let same_digest = request.digest.as_ref().is_none_or(|digest| *digest == earlier.digest.to_string());
    if earlier.image != request.image || !same_digest {
        let message = "this Idempotency-Key came with another image before";
        return Err(Failure::new(ErrorCode::IdempotencyMismatch, message));
    }
    Ok(accepted(app, tenant, earlier.id, earlier.operation, earlier.digest))
}

fn accepted(
    app: &App,
    tenant: &Tenant,
    deployment_id: DeploymentId,
    operation_id: OperationId,
    digest: Digest,
) -> (StatusCode, axum::Json<Data<DeployAccepted>>) {
    let data = DeployAccepted {
        status: state::word(TenantPhase::Deploying).to_owned(),
        app_url: Some(app.site.app_url(&tenant.slug())),
        operation_id,
        deployment_id,
        digest: digest.to_string(),
    };
    (StatusCode::ACCEPTED, axum::Json(Data { data }))
}

/// What will run: the digest the client names, which must have been pushed for this tenant, else the tag's.
async fn pushed_digest(app: &App, tenant: &Tenant, named: Option<&str>) -> Result<Digest, Failure> {
    let registry = &app.infrastructure.registry;
    let missing = || {
        Failure::new(ErrorCode::ImageNotFound, "no such image was pushed for this tenant")
            .hint("Push it first: systemprompt cloud deploy")
    };
    let digest = match named {
        Some(text) => text.parse().map_err(|_| {
            Failure::new(ErrorCode::BadRequest, "expected a digest of the form sha256: and 64 hex digits")
        })?,
        None => registry.resolve(tenant.id).await.map_err(|error| Failure::internal(&error))?.ok_or_else(missing)?,
    };
    match registry.image(tenant.id, &digest).await {
        Ok(_) => Ok(digest),
        Err(ImageError::NotFound) => Err(missing()),
        Err(ImageError::Store(error)) => Err(Failure::internal(&error)),
        Err(error) => Err(Failure::new(ErrorCode::ImageInvalid, error.to_string())),
    }
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct DeleteQuery {
    #[serde(default)]
    purge: bool,
}

/// Takes the tenant out of every list and out of the routes at once, and enqueues its end.
async fn delete(
    State(app): State<App>,
    Extension(principal): Extension<Principal>,
    Extension(id): Extension<TenantId>,
    Query(query): Query<DeleteQuery>,
    headers: HeaderMap,
) -> Result<(StatusCode, axum::Json<Data<serde_json::Value>>), Failure> {
    let mode = if query.purge { "purge" } else { "delete" };
    let caller_key = idempotency_key(&headers)?;
    let mut tx = app.db.begin().await?;
    // First the lock: of two calls under one key the second sees what the first did.
    let tenant = store::lock(&mut tx, id).await?;
    if let Some((operation, earlier)) = asked_to_delete(&mut tx, id, &principal, caller_key.as_deref()).await? {
        if earlier != mode {
            let message = "this Idempotency-Key came with another purge before";
            return Err(Failure::new(ErrorCode::IdempotencyMismatch, message));
        }
        return Ok(deleting(operation));
    }
    let tenant =
        tenant.filter(|tenant| tenant.phase != TenantPhase::Deleted).ok_or_else(|| Failure::not_found("tenant"))?;
    if let Some(running) = tenant.active_operation {
        systemprompt_workflow::request_cancel(&mut tx, running).await?;
    }
    let workflow = DeleteTenant { tenant: tenant.id, purge: query.purge };
    let key = match caller_key {
        Some(key) => deletion_key(tenant.id, &principal, &key, mode),
        None => format!("{}:{mode}", tenant.id),
    };
    let new = NewOperation { input: &workflow, subject: Subject::Tenant(tenant.id), key: &key };
    let operation = enqueue(&mut tx, new).await.map_err(|error| Failure::internal(&error))?.id;
    let wait = if query.purge { TimeDelta::zero() } else { TimeDelta::hours(RESTORABLE_HOURS) };
    let moved = Moved { operation: Some(operation), failure: None, purge_after: Some(Utc::now() + wait) };
    store::advance(&mut tx, tenant.id, TenantEvent::DeleteAsked, moved).await.map_err(move_failure)?;
    routes::publish(&mut tx, tenant.id, &tenant.slug().hostname(&app.site.zone), None).await?;
    tx.commit().await?;
    Ok(deleting(operation))
}

fn deleting(operation: OperationId) -> (StatusCode, axum::Json<Data<serde_json::Value>>) {
    (StatusCode::ACCEPTED, axum::Json(Data { data: serde_json::json!({ "operation_id": operation }) }))
}

/// What this caller started before under this key, and with which mode. It is found by the operation's own key, which
/// outlives the tenant's row.
pub(crate) async fn asked_to_delete(
    connection: &mut PgConnection,
    tenant: TenantId,
    principal: &Principal,
    key: Option<&str>,
) -> Result<Option<(OperationId, &'static str)>, Failure> {
    let Some(key) = key else { return Ok(None) };
    for mode in ["delete", "purge"] {
        let key = deletion_key(tenant, principal, key, mode);
        if let Some(id) = systemprompt_workflow::find::<DeleteTenant>(&mut *connection, &key).await? {
            return Ok(Some((id, mode)));
        }
    }
    Ok(None)
}

/// Hashed, since an operation's key is shorter than what a caller may send.
fn deletion_key(tenant: TenantId, principal: &Principal, key: &str, mode: &str) -> String {
    format!("{tenant}:{mode}:{}:{}", principal.account, Digest::of(key.as_bytes()))
}

fn move_failure(error: store::MoveError) -> Failure {
    match error {
        store::MoveError::Illegal(error) => ApiError::from(error).into(),
        store::MoveError::Gone => Failure::not_found("tenant"),
        store::MoveError::Database(error) => error.into(),
    }
}

async fn operation(Extension(view): Extension<OperationView>) -> axum::Json<Data<OperationView>> {
    axum::Json(Data { data: view })
}

/// Operations that nobody will touch again by themselves: an undo failed, or a step behind a point of no return.
async fn parked(State(app): State<App>) -> Result<axum::Json<Data<Vec<serde_json::Value>>>, Failure> {
    let parked = systemprompt_workflow::stuck(&app.db).await?;
    let data = parked
        .into_iter()
        .map(|parked| {
            serde_json::json!({
                "operation": parked.view,
                "subject": parked.subject,
                "step_error": parked.step_error,
                "failure": parked.failure,
            })
        })
        .collect();
    Ok(axum::Json(Data { data }))
}

/// Lets a parked operation try again from where it stands. Under a key, one that is not parked any more was let go by
/// the same command before.
async fn retry_parked(
    State(app): State<App>,
    id: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<axum::Json<Data<OperationView>>, Failure> {
    let missing = || Failure::not_found("operation");
    let id = id.ok().and_then(|Path(id)| id.parse().ok()).ok_or_else(missing)?;
    let retried = systemprompt_workflow::retry_stuck(&app.db, id).await?;
    let data = systemprompt_workflow::operation(&app.db, id).await?.ok_or_else(missing)?;
    if !retried && idempotency_key(&headers)?.is_none() {
        let message = format!("the operation is {} and not parked", data.status.as_str());
        return Err(Failure::new(ErrorCode::Conflict, message));
    }
    Ok(axum::Json(Data { data }))
}
