use super::{
    Call,
    answer::{CONTENT_DIGEST, Refusal},
    endpoint::Reference,
};
use crate::manifest;
use axum::{body::Body, response::Response};
use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use std::time::Duration;
use systemprompt_contract::{IMAGE_REPOSITORY, TenantTag};
use systemprompt_oci::{Digest, Manifest};
use tokio_util::sync::CancellationToken;

/// A manifest has some kilobytes.
const BODY_TIME: Duration = Duration::from_mins(1);

/// GET, HEAD and PUT of a manifest, by its digest or by the tenant's own tag. Any other tag is unknown.
pub(super) async fn answer(call: &Call<'_>, reference: Reference, body: Body) -> Result<Response, Refusal> {
    let own_tag = TenantTag(call.grant.tenant).to_string();
    if matches!(&reference, Reference::Tag(tag) if *tag != own_tag) {
        return Err(Refusal::manifest_unknown());
    }
    match call.method {
        Method::GET | Method::HEAD => get(call, &reference).await,
        Method::PUT => put(call, reference, body).await,
        _ => Err(Refusal::method("GET, HEAD, PUT")),
    }
}

async fn get(call: &Call<'_>, reference: &Reference) -> Result<Response, Refusal> {
    call.may_read()?;
    let tenant = call.grant.tenant;
    let digest = match reference {
        Reference::Digest(digest) => Some(*digest),
        Reference::Tag(_) => call.registry.resolve(tenant).await?,
    };
    let digest = digest.ok_or_else(Refusal::manifest_unknown)?;
    let stored = call.registry.blocking(move |inner| inner.store.manifest(tenant, digest)).await?;
    let bytes = stored.ok_or_else(Refusal::manifest_unknown)?;
    let media_type = Manifest::parse(&bytes).map_err(|error| {
        tracing::error!(%tenant, %digest, %error, "a stored manifest cannot be read");
        Refusal::manifest_unknown()
    })?;
    let response = Response::builder()
        .header(header::CONTENT_TYPE, media_type.media_type)
        .header(header::CONTENT_LENGTH, bytes.len())
        .header(CONTENT_DIGEST, digest.to_string());
    Ok(response.body(Body::from(bytes)).expect("a known media type, digits and hex"))
}

async fn put(call: &Call<'_>, reference: Reference, body: Body) -> Result<Response, Refusal> {
    call.may_write()?;
    let content_type = call.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.map(|value| value.split(';').next().unwrap_or_default().trim().to_owned());
    let tenant = call.grant.tenant;
    // One manifest of a tenant at a time, from the first byte of its body: no tenant fills the memory with bodies that
    // wait, or takes all the turns.
    let turn = call.registry.0.turns.lock(tenant).await;
    let bytes = tokio::time::timeout(BODY_TIME, read_body(body)).await.map_err(|_| Refusal::manifest_timeout())??;
    if let Reference::Digest(expected) = reference
        && Digest::of(&bytes) != expected
    {
        return Err(Refusal::digest_invalid("the manifest that came has another digest than its address"));
    }
    let tagged = matches!(reference, Reference::Tag(_));
    let checks = call.registry.0.checks.clone();
    let permit = checks.acquire_owned().await.expect("the semaphore is never closed");
    let abandoned = CancellationToken::new();
    let _abandons_when_dropped = abandoned.clone().drop_guard();
    let digest = call
        .registry
        .blocking(move |inner| {
            // Held by the work itself: when the client goes away, it goes on to the end of the layer that it reads.
            let _held = (turn, permit);
            manifest::put(inner, tenant, &bytes, content_type.as_deref(), tagged, &abandoned)
        })
        .await?;
    let response = Response::builder()
        .status(StatusCode::CREATED)
        .header(header::LOCATION, format!("/v2/{IMAGE_REPOSITORY}/manifests/{digest}"))
        .header(header::CONTENT_LENGTH, 0)
        .header(CONTENT_DIGEST, digest.to_string());
    Ok(response.body(Body::empty()).expect("fixed names and hex"))
}

async fn read_body(body: Body) -> Result<Bytes, Refusal> {
    match Limited::new(body, Manifest::MAX_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Refusal::manifest_too_large(format!("expected a manifest of at most {} bytes", Manifest::MAX_BYTES)))
        }
        Err(_) => Err(Refusal::manifest_invalid("the request was cut off")),
    }
}
