use super::{
    Call,
    answer::{CONTENT_DIGEST, Refusal},
};
use crate::{
    Registry,
    upload::{self, LockedUpload, UploadKey},
};
use axum::{body::Body, response::Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use http_body_util::BodyExt;
use std::time::Duration;
use systemprompt_contract::IMAGE_REPOSITORY;
use systemprompt_oci::Digest;
use uuid::Uuid;

/// Bytes gathered before they are written: one hop to a thread for each.
const BATCH: usize = 1 << 20;
/// A client that sends nothing for so long is cut off; it may go on later.
const IDLE: Duration = Duration::from_mins(1);
/// After an early refusal so much is still read, since most clients look for an answer only after their body.
const DRAIN_BYTES: u64 = 256 << 20;
const DRAIN_TIME: Duration = Duration::from_secs(20);

/// What an upload understands.
const METHODS: &str = "GET, PATCH, PUT, DELETE";

const UPLOAD_ID: HeaderName = HeaderName::from_static("docker-upload-uuid");

/// `POST …/blobs/uploads/`: begins an upload, takes a whole blob (`?digest=`), or mounts one (`?mount=&from=`).
pub(super) async fn begin(call: &Call<'_>, body: Body) -> Result<Response, Refusal> {
    if call.method != Method::POST {
        return Err(Refusal::method("POST"));
    }
    call.may_write()?;
    let tenant = call.grant.tenant;
    if let Some(digest) = mountable(call).await? {
        return Ok(created(digest));
    }
    let digest = call.query_value("digest").map(|text| parse_digest(&text)).transpose()?;
    let upload = call.registry.blocking(move |inner| upload::begin(inner, tenant)).await?;
    let Some(digest) = digest else {
        return Ok(progress(StatusCode::ACCEPTED, upload, 0));
    };
    let locked = LockedUpload::lock(&call.registry.0, UploadKey { tenant, upload }).await;
    let received = receive(call, locked, body, None).await;
    match received {
        Ok(locked) => commit(call.registry, locked, digest).await,
        Err(refusal) => {
            // Nobody was told the id, so nobody can go on.
            let locked = LockedUpload::lock(&call.registry.0, UploadKey { tenant, upload }).await;
            let _ = call.registry.blocking(move |inner| locked.cancel(inner)).await;
            Err(refusal)
        }
    }
}

/// A blob that the tenant has pushed before. From another repository, or of another tenant: not mountable, and the
/// client uploads it (the specification's way out).
async fn mountable(call: &Call<'_>) -> Result<Option<Digest>, Refusal> {
    let Some(digest) = call.query_value("mount").and_then(|text| text.parse::<Digest>().ok()) else { return Ok(None) };
    if call.query_value("from").is_some_and(|from| from != IMAGE_REPOSITORY) {
        return Ok(None);
    }
    let tenant = call.grant.tenant;
    let size = call.registry.blocking(move |inner| inner.store.use_blob(tenant, digest)).await?;
    Ok(size.map(|_| digest))
}

/// `…/blobs/uploads/ID`: PATCH adds, PUT finishes, GET asks how far it is, DELETE gives up.
pub(super) async fn answer(call: &Call<'_>, upload: Option<Uuid>, body: Body) -> Result<Response, Refusal> {
    if !matches!(call.method, Method::PATCH | Method::PUT | Method::GET | Method::DELETE) {
        return Err(Refusal::method(METHODS));
    }
    call.may_write()?;
    let upload = upload.ok_or_else(Refusal::upload_unknown)?;
    let key = UploadKey { tenant: call.grant.tenant, upload };
    let registry = call.registry;
    match call.method {
        Method::PATCH => {
            let range = content_range(&call.headers)?;
            let mut locked = receive(call, LockedUpload::lock(&registry.0, key).await, body, range).await?;
            let offset = registry.blocking(move |inner| locked.offset(inner)).await?;
            Ok(progress(StatusCode::ACCEPTED, upload, offset))
        }
        Method::PUT => {
            let digest = call.query_value("digest").ok_or_else(|| Refusal::digest_invalid("expected `?digest=`"))?;
            let (digest, range) = (parse_digest(&digest)?, content_range(&call.headers)?);
            let locked = receive(call, LockedUpload::lock(&registry.0, key).await, body, range).await?;
            commit(registry, locked, digest).await
        }
        Method::GET => {
            let mut locked = LockedUpload::lock(&registry.0, key).await;
            let offset = registry.blocking(move |inner| locked.offset(inner)).await?;
            Ok(progress(StatusCode::NO_CONTENT, upload, offset))
        }
        Method::DELETE => {
            let locked = LockedUpload::lock(&registry.0, key).await;
            registry.blocking(move |inner| locked.cancel(inner)).await?;
            Ok(empty(StatusCode::NO_CONTENT, &[]))
        }
        _ => Err(Refusal::method(METHODS)),
    }
}

async fn commit(registry: &Registry, locked: LockedUpload, digest: Digest) -> Result<Response, Refusal> {
    registry.blocking(move |inner| locked.commit(inner, digest)).await?;
    Ok(created(digest))
}

/// Streams the body to the end of the upload. What came before a cut-off stays, so that the client can go on.
async fn receive(
    call: &Call<'_>,
    mut locked: LockedUpload,
    mut body: Body,
    range: Option<Chunk>,
) -> Result<LockedUpload, Refusal> {
    let registry = call.registry;
    let (start, announced) = (range.map(|chunk| chunk.start), range.map(|chunk| chunk.length));
    if let (Some(announced), Some(length)) = (announced, call.content_length())
        && announced != length
    {
        return Err(Refusal::upload_invalid("Content-Range and Content-Length do not fit together"));
    }
    let length = call.content_length().or(announced);
    let expected = registry.blocking(move |inner| locked.expect(inner, start, length).map(|()| locked)).await;
    let mut locked = match expected {
        Ok(locked) => locked,
        Err(error) => return Err(refused(error.into(), body).await),
    };
    let mut received = 0;
    loop {
        let (batch, ended) = next_batch(&mut body).await?;
        received += batch.iter().map(|piece| piece.len() as u64).sum::<u64>();
        if announced.is_some_and(|announced| received > announced) {
            let refusal = Refusal::upload_invalid("more bytes came than Content-Range announces");
            return Err(refused(refusal, body).await);
        }
        if !batch.is_empty() {
            locked = match registry.blocking(move |inner| locked.append(inner, &batch)).await {
                Ok(locked) => locked,
                Err(error) => return Err(refused(error.into(), body).await),
            };
        }
        match ended {
            Ended::No => {}
            Ended::Complete if announced.is_some_and(|announced| received != announced) => {
                let message = "fewer bytes came than Content-Range announces; go on where it stands";
                return Err(Refusal::upload_invalid(message));
            }
            Ended::Complete => return Ok(locked),
            Ended::CutOff => return Err(Refusal::upload_invalid("the request was cut off; go on where it stands")),
            Ended::Idle => return Err(Refusal::timeout()),
        }
    }
}

enum Ended {
    No,
    Complete,
    CutOff,
    Idle,
}

/// About a megabyte, or what came until the body ended in one way or another.
async fn next_batch(body: &mut Body) -> Result<(Vec<Bytes>, Ended), Refusal> {
    let (mut batch, mut size) = (Vec::new(), 0);
    while size < BATCH {
        match tokio::time::timeout(IDLE, body.frame()).await {
            Ok(None) => return Ok((batch, Ended::Complete)),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    size += data.len();
                    batch.push(data);
                }
            }
            Ok(Some(Err(_))) => return Ok((batch, Ended::CutOff)),
            Err(_) => return Ok((batch, Ended::Idle)),
        }
    }
    Ok((batch, Ended::No))
}

/// Reads on for a while before the refusal is sent.
async fn refused(refusal: Refusal, mut body: Body) -> Refusal {
    let drain = async {
        let mut left = DRAIN_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len) as u64);
            if left == 0 {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(DRAIN_TIME, drain).await; // then the client misses the answer
    refusal
}

/// What a Content-Range announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Chunk {
    start: u64,
    length: u64,
}

/// `START-END`, both ends included, as the specification writes it (no unit).
fn content_range(headers: &HeaderMap) -> Result<Option<Chunk>, Refusal> {
    let Some(value) = headers.get(header::CONTENT_RANGE) else { return Ok(None) };
    let parsed = value.to_str().ok().and_then(|text| {
        let number = |text: &str| -> Option<u64> {
            text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())? // `parse` alone takes a sign
        };
        let (start, end) = text.split_once('-')?;
        let (start, end) = (number(start)?, number(end)?);
        Some(Chunk { start, length: end.checked_sub(start)?.checked_add(1)? })
    });
    parsed.map(Some).ok_or_else(|| Refusal::upload_invalid("expected a Content-Range such as 0-1023"))
}

fn parse_digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(Refusal::digest_invalid)
}

/// How much came so far. An empty upload is `0-0` too: the header has no form for nothing.
pub(super) fn range_so_far(offset: u64) -> HeaderValue {
    HeaderValue::try_from(format!("0-{}", offset.saturating_sub(1))).expect("digits")
}

fn progress(status: StatusCode, upload: Uuid, offset: u64) -> Response {
    let location = format!("/v2/{IMAGE_REPOSITORY}/blobs/uploads/{}", upload.hyphenated());
    let mut response = empty(status, &[(header::LOCATION, location), (UPLOAD_ID, upload.hyphenated().to_string())]);
    response.headers_mut().insert(header::RANGE, range_so_far(offset));
    response
}

fn created(digest: Digest) -> Response {
    let location = format!("/v2/{IMAGE_REPOSITORY}/blobs/{digest}");
    empty(StatusCode::CREATED, &[(header::LOCATION, location), (CONTENT_DIGEST, digest.to_string())])
}

fn empty(status: StatusCode, headers: &[(HeaderName, String)]) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    for (name, value) in headers {
        response.headers_mut().insert(name, HeaderValue::try_from(value).expect("paths, ids and hex"));
    }
    if status != StatusCode::NO_CONTENT {
        response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_content_range_is_two_numbers_that_make_a_length() {
        let read = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_RANGE, value.parse().expect("header"));
            content_range(&headers).ok().flatten()
        };
        assert_eq!(read("0-0"), Some(Chunk { start: 0, length: 1 }));
        assert_eq!(read("5-9"), Some(Chunk { start: 5, length: 5 }));
        for bad in ["", "-", "5-", "-5", "9-5", "+5-9", "5-+9", " 5-9", "0-18446744073709551615", "bytes 0-1/2"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
