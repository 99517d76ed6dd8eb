//! The HTTP face: every endpoint stands in one table with who may call it, and the table makes the router.
//!
//! A route without an [`Access`] cannot be added, and the access check runs before the handler, so an endpoint
//! refuses unless its row says otherwise.

pub(crate) mod error;
pub(crate) mod pages;

use crate::{
    app::App,
    identity::Principal,
    tenants::{self, store},
};
use axum::{
    Router,
    extract::{DefaultBodyLimit, RawPathParams, Request, State, rejection::RawPathParamsRejection},
    handler::Handler,
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{MethodFilter, MethodRouter, on},
};
use error::Failure;
use http::{HeaderMap, HeaderValue, Method, header};
use serde::Serialize;
use std::str::FromStr;
use systemprompt_contract::{AccountId, CheckoutId, ErrorCode, OperationId, TenantId, TenantPhase, paths};

/// Bodies of API calls; images go to the registry, which streams.
const MAX_BODY_BYTES: usize = 1024 * 1024;

/// Who may call an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Access {
    /// Anyone; the handler checks what it is given (a password, a code, a signature).
    Public,
    /// Any account.
    SignedIn,
    /// The operator of the installation.
    Operator,
    /// The owner of the tenant in the path, or the operator. Anyone else gets the answer for "absent".
    Tenant,
    /// As [`Access::Tenant`], and whoever asked for this deletion under the same idempotency key before.
    Deletion,
    /// The buyer of the checkout in the path, or the operator.
    Checkout,
    /// The owner of the tenant that the operation in the path works on, also once that is purged, or the operator.
    Operation,
}

/// One row of the table.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Endpoint {
    method: &'static str,
    path: &'static str,
    access: Access,
}

/// The table while it is built.
#[derive(Default)]
pub(crate) struct Endpoints {
    rows: Vec<(Endpoint, MethodRouter<App>)>,
}

impl Endpoints {
    /// Adds one endpoint; its access is checked before `handler` runs.
    #[must_use]
    pub(crate) fn add<H, T>(mut self, method: MethodFilter, path: &'static str, access: Access, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.rows.push((Endpoint { method: name_of(method), path, access }, on(method, handler)));
        self
    }

    /// The rows, for whoever checks or documents them.
    pub(crate) fn table(&self) -> Vec<Endpoint> {
        self.rows.iter().map(|(endpoint, _)| endpoint.clone()).collect()
    }

    fn into_router(self, app: &App) -> Router<App> {
        self.rows.into_iter().fold(Router::new(), |router, (endpoint, handler)| {
            let guard = from_fn_with_state((app.clone(), endpoint.access), check_access);
            router.route(endpoint.path, handler.route_layer(guard))
        })
    }
}

/// A filter for one method, as that method is written.
///
/// # Panics
/// For a filter of several methods, and for methods that no endpoint has: at start, not at a request.
fn name_of(method: MethodFilter) -> &'static str {
    let names = [
        (MethodFilter::GET, "GET"),
        (MethodFilter::POST, "POST"),
        (MethodFilter::PUT, "PUT"),
        (MethodFilter::DELETE, "DELETE"),
    ];
    let name = names.into_iter().find_map(|(filter, name)| (filter == method).then_some(name));
    name.expect("an endpoint has one method of GET, POST, PUT and DELETE")
}

/// Every endpoint of the control plane.
pub(crate) fn endpoints() -> Endpoints {
    let endpoints = Endpoints::default().add(MethodFilter::GET, "/api/v1/health", Access::Public, health);
    let endpoints = crate::identity::endpoints(endpoints);
    let endpoints = crate::billing::endpoints(endpoints);
    tenants::endpoints(endpoints)
}

/// The calls alone, without pages and webhooks: what may be served in clear on loopback. The command line sends its
/// person to the sign-in page of whichever address it was given, so that one page is named here.
pub(crate) fn api_router(app: &App) -> Router {
    let calls =
        Endpoints { rows: endpoints().rows.into_iter().filter(|(row, _)| row.path.starts_with("/api/")).collect() };
    router_of(
        app,
        calls.add(MethodFilter::GET, paths::LOGIN_PAGE, Access::Public, crate::identity::login_page_elsewhere),
    )
}

fn router_of(app: &App, endpoints: Endpoints) -> Router {
    endpoints
        .into_router(app)
        .fallback(|| async { Failure::not_found("page or call") })
        .method_not_allowed_fallback(|| async {
            Failure::new(ErrorCode::MethodNotAllowed, "this path does not take that method")
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn(keep_in_no_cache))
        .layer(from_fn(error::with_request_id))
        .with_state(app.clone())
}

/// Answers of calls carry tokens and what is one caller's alone: no cache keeps any of them.
async fn keep_in_no_cache(request: Request, next: Next) -> Response {
    let is_call = request.uri().path().starts_with("/api/");
    let mut response = next.run(request).await;
    if is_call {
        response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
    response
}

/// Everything that the edge hands to the platform.
pub(crate) fn platform_router(app: &App) -> Router {
    app.infrastructure.registry.router().merge(router_of(app, endpoints()))
}

async fn health(State(app): State<App>) -> Result<axum::Json<serde_json::Value>, Failure> {
    sqlx::query_scalar!(r#"SELECT 1 AS "one!""#).fetch_one(app.db.pool()).await?;
    Ok(axum::Json(serde_json::json!({ "status": "healthy", "version": env!("CARGO_PKG_VERSION") })))
}

/// Lets the request through with what its access entitles it to among its extensions: a [`Principal`], and the
/// [`store::Tenant`] or checkout that the path names.
async fn check_access(
    State((app, access)): State<(App, Access)>,
    params: Result<RawPathParams, RawPathParamsRejection>,
    mut request: Request,
    next: Next,
) -> Response {
    let params = params.ok();
    let entitled = entitle(&app, access, params.as_ref(), &mut request).await;
    // Every changing call takes a key; what repeats by itself only needs it to be one.
    let checked = entitled.and_then(|()| match *request.method() {
        Method::GET | Method::HEAD => Ok(()),
        _ => idempotency_key(request.headers()).map(drop),
    });
    match checked {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

async fn entitle(
    app: &App,
    access: Access,
    params: Option<&RawPathParams>,
    request: &mut Request,
) -> Result<(), Failure> {
    if access == Access::Public {
        return Ok(());
    }
    let principal = crate::identity::principal(app, request.headers()).await?;
    match access {
        Access::Public | Access::SignedIn => {}
        Access::Operator if principal.is_operator() => {}
        Access::Operator => return Err(Failure::new(ErrorCode::Forbidden, "this call is the operator's")),
        Access::Tenant => {
            let tenant = visible_tenant(app, &principal, path_id(params, "tenant")?).await?;
            request.extensions_mut().insert(tenant);
        }
        Access::Deletion => {
            let id: TenantId = path_id(params, "tenant")?;
            if let Err(failure) = visible_tenant(app, &principal, id).await {
                let key = idempotency_key(request.headers())?;
                let mut connection = app.db.pool().acquire().await?;
                let asked = tenants::asked_to_delete(&mut connection, id, &principal, key.as_deref()).await?;
                asked.ok_or(failure)?;
            }
            request.extensions_mut().insert(id);
        }
        Access::Checkout => {
            let id: CheckoutId = path_id(params, "checkout")?;
            let buyer =
                crate::billing::buyer(app.db.pool(), id).await?.ok_or_else(|| Failure::not_found("checkout"))?;
            if buyer != principal.account && !principal.is_operator() {
                return Err(Failure::not_found("checkout"));
            }
            request.extensions_mut().insert(id);
        }
        Access::Operation => {
            let id: OperationId = path_id(params, "operation")?;
            let missing = || Failure::not_found("operation");
            if operation_owner(app, id).await? != Some(principal.account) && !principal.is_operator() {
                return Err(missing());
            }
            let view = systemprompt_workflow::operation(&app.db, id).await?.ok_or_else(missing)?;
            request.extensions_mut().insert(view);
        }
    }
    request.extensions_mut().insert(principal);
    Ok(())
}

async fn visible_tenant(app: &App, principal: &Principal, id: TenantId) -> Result<store::Tenant, Failure> {
    store::tenant(app.db.pool(), id)
        .await?
        .filter(|tenant| tenant.phase != TenantPhase::Deleted)
        .filter(|tenant| tenant.account == principal.account || principal.is_operator())
        .ok_or_else(|| Failure::not_found("tenant"))
}

async fn operation_owner(app: &App, id: OperationId) -> Result<Option<AccountId>, Failure> {
    // A purge takes the tenant's row. Its checkout stays, so whoever asked for the purge can read how it ended.
    let owner = sqlx::query_scalar!(
        r#"
        SELECT coalesce(
            (SELECT account_id FROM tenants WHERE id = subject.tenant),
            (SELECT account_id FROM checkouts WHERE tenant_id = subject.tenant)
        )
        FROM (SELECT substring(subject FROM '^tenant:(.+)$')::uuid AS tenant FROM operations WHERE id = $1) subject
        "#,
        id.uuid()
    );
    Ok(owner.fetch_optional(app.db.pool()).await?.flatten().map(AccountId::from_uuid))
}

/// The `{id}` of the path. What is no id, or not even text, cannot exist: the same answer as for an absent one.
fn path_id<T: FromStr>(params: Option<&RawPathParams>, what: &str) -> Result<T, Failure> {
    let mut params = params.into_iter().flatten();
    let text = params.find_map(|(name, value)| (name == "id").then_some(value)).unwrap_or_default();
    text.parse().map_err(|_| Failure::not_found(what))
}

/// The caller's idempotency key, bounded; none: this call stands alone.
pub(crate) fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Failure> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=128).contains(&key.len()) => Ok(Some(key.to_owned())),
        _ => Err(Failure::new(ErrorCode::BadRequest, "expected an Idempotency-Key of 1 to 128 visible characters")),
    }
}
