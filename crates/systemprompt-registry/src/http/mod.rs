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
        _ => Err(Refusal::method("GET, HEAD")),
    }
}

/// Only the tenant's own tag exists for it.
async fn tags(call: &Call<'_>) -> Result<Response, Refusal> {
    if !matches!(call.method, Method::GET | Method::HEAD) {
        return Err(Refusal::method("GET, HEAD"));
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{RegistryConfig, TokenKey};
    use bytes::Bytes;
    use chrono::TimeDelta;
    use futures_util::{poll, stream};
    use std::{
        pin::pin,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering},
        },
    };
    use systemprompt_contract::TenantId;
    use uuid::Uuid;

    const QUOTA: u64 = 1 << 20;

    fn registry(dir: &tempfile::TempDir) -> Registry {
        let config = RegistryConfig {
            root: dir.path().to_owned(),
            max_blob_bytes: QUOTA,
            tenant_quota_bytes: QUOTA,
            max_unpacked_bytes: QUOTA,
        };
        Registry::open(config, TokenKey::from_bytes(&[7; 32])).expect("registry")
    }

    /// The status of the answer to a PUT below the tenant's repository.
    async fn put(registry: &Registry, tenant: TenantId, path: &str, body: Body) -> StatusCode {
        let grant = Grant { tenant, push: true, pull: true, expires_at: Utc::now() + TimeDelta::minutes(1) };
        let token = registry.0.key.mint(&grant);
        let request = Request::put(format!("/v2/{IMAGE_REPOSITORY}/{path}"))
            .header(header::AUTHORIZATION, format!("Bearer {}", token.expose()))
            .body(body)
            .expect("request");
        answer(State(registry.clone()), request).await.status()
    }

    #[tokio::test]
    async fn of_one_tenant_only_one_manifest_is_taken_in_at_a_time() {
        let dir = tempfile::tempdir().expect("dir");
        let (registry, tenant, other) = (registry(&dir), TenantId::new(), TenantId::new());
        let is_read = Arc::new(AtomicBool::new(false));
        let reads = is_read.clone();
        let body = Body::from_stream(stream::once(async move {
            reads.store(true, Ordering::SeqCst);
            Ok::<_, std::io::Error>(Bytes::from_static(b"{}"))
        }));
        let turn = registry.0.turns.lock(tenant).await;
        let path = format!("manifests/{}", TenantTag(tenant));
        let mut waits = pin!(put(&registry, tenant, &path, body));
        assert!(poll!(&mut waits).is_pending());
        let others = format!("manifests/{}", TenantTag(other));
        assert_eq!(put(&registry, other, &others, Body::from("{}")).await, StatusCode::BAD_REQUEST);
        assert!(poll!(&mut waits).is_pending() && !is_read.load(Ordering::SeqCst), "its body waits in the network");
        drop(turn);
        assert_eq!(waits.await, StatusCode::BAD_REQUEST);
        assert!(is_read.load(Ordering::SeqCst));
    }

    #[tokio::test]
    async fn nothing_is_kept_of_uploads_that_are_none() {
        let dir = tempfile::tempdir().expect("dir");
        let (registry, tenant) = (registry(&dir), TenantId::new());
        for query in ["", "?digest=nonsense", "?digest=sha256:00"] {
            let path = format!("blobs/uploads/{}{query}", Uuid::new_v4());
            assert!(put(&registry, tenant, &path, Body::empty()).await.is_client_error());
        }
        let digest = systemprompt_oci::Digest::of(b"");
        let path = format!("blobs/uploads/{}?digest={digest}", Uuid::new_v4());
        assert_eq!(put(&registry, tenant, &path, Body::empty()).await, StatusCode::NOT_FOUND);
        assert_eq!(registry.0.uploads.len(), 0);
    }
}
