//! The distribution API over the store: each request is authenticated, its path is read once into an [`Endpoint`], and
//! one function answers it.

mod answer;
mod blobs;
mod endpoint;
mod manifests;
mod uploads;

use crate::{Grant, Registry};
use answer::{Refusal, base_headers};
use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    response::{IntoResponse, Response},
    routing::any,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use chrono::Utc;
use endpoint::Endpoint;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use systemprompt_contract::{IMAGE_REPOSITORY, TenantTag};

pub(crate) fn router(registry: Registry) -> Router {
    Router::new()
        .route("/v2", any(answer))
        .route("/v2/{*rest}", any(answer))
        .route("/v2/", any(answer))
        .with_state(registry)
}

async fn answer(State(registry): State<Registry>, request: Request) -> Response {
    let is_head = request.method() == Method::HEAD;
    let mut response = match route(&registry, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    };
    base_headers(response.headers_mut());
    if is_head {
        *response.body_mut() = Body::empty(); // its headers, Content-Length included, stay
    }
    response
}

/// One authenticated request, without its body.
struct Call<'a> {
    registry: &'a Registry,
    grant: Grant,
    method: Method,
    headers: HeaderMap,
    query: Option<String>,
}

async fn route(registry: &Registry, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let grant = authenticate(registry, &parts.headers).ok_or_else(Refusal::unauthorized)?;
    let endpoint = Endpoint::parse(parts.uri.path());
    let query = parts.uri.query().map(str::to_owned);
    let call = Call { registry, grant, method: parts.method, headers: parts.headers, query };
    match endpoint {
        Endpoint::Root => root(&call),
        Endpoint::Tags => tags(&call).await,
        Endpoint::Blob(digest) => blobs::answer(&call, digest).await,
        Endpoint::Manifest(reference) => manifests::answer(&call, reference, body).await,
        Endpoint::Uploads => uploads::begin(&call, body).await,
        Endpoint::Upload(upload) => uploads::answer(&call, upload, body).await,
        Endpoint::Unknown => Err(Refusal::name_unknown()),
    }
}

/// Basic (any user name, the token as password) or Bearer.
fn authenticate(registry: &Registry, headers: &HeaderMap) -> Option<Grant> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, credentials) = value.split_once(' ')?;
    let verify = |token: &str| registry.0.key.verify(token, Utc::now());
    if scheme.eq_ignore_ascii_case("bearer") {
        verify(credentials.trim())
    } else if scheme.eq_ignore_ascii_case("basic") {
        let decoded = String::from_utf8(STANDARD.decode(credentials.trim()).ok()?).ok()?;
        verify(decoded.split_once(':')?.1)
    } else {
        None
    }
}

impl Call<'_> {
    fn may_read(&self) -> Result<(), Refusal> {
        if self.grant.pull || self.grant.push { Ok(()) } else { Err(Refusal::denied()) }
    }

    fn may_write(&self) -> Result<(), Refusal> {
        if self.grant.push { Ok(()) } else { Err(Refusal::denied()) }
    }

    fn query_value(&self, name: &str) -> Option<String> {
        let query = self.query.as_deref()?;
        url::form_urlencoded::parse(query.as_bytes()).find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    fn content_length(&self) -> Option<u64> {
        self.headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
    }
}

fn root(call: &Call<'_>) -> Result<Response, Refusal> {
    match call.method {
        Method::GET | Method::HEAD => Ok(json(StatusCode::OK, "{}".to_owned())),
        _ => Err(Refusal::method()),
    }
}

/// Only the tenant's own tag exists for it.
async fn tags(call: &Call<'_>) -> Result<Response, Refusal> {
    if !matches!(call.method, Method::GET | Method::HEAD) {
        return Err(Refusal::method());
    }
    call.may_read()?;
    let tenant = call.grant.tenant;
    let tag = call.registry.resolve(tenant).await?.map(|_| TenantTag(tenant).to_string());
    let body = serde_json::json!({ "name": IMAGE_REPOSITORY, "tags": Vec::from_iter(tag) });
    Ok(json(StatusCode::OK, body.to_string()))
}

fn json(status: StatusCode, body: String) -> Response {
    let mut response = (status, body).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
