use super::{
    Call,
    answer::{CONTENT_DIGEST, Refusal},
};
use axum::{body::Body, response::Response};
use http::{HeaderMap, Method, StatusCode, header};
use std::io::SeekFrom;
use systemprompt_oci::Digest;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt},
};
use tokio_util::io::ReaderStream;

const READ_BUFFER: usize = 1 << 17;

/// GET and HEAD of a blob that the tenant has pushed; GET understands one range (RFC 9110, 14).
pub(super) async fn answer(call: &Call<'_>, digest: Option<Digest>) -> Result<Response, Refusal> {
    if !matches!(call.method, Method::GET | Method::HEAD) {
        return Err(Refusal::method("GET, HEAD"));
    }
    call.may_read()?;
    let digest = digest.ok_or_else(Refusal::blob_unknown)?;
    let tenant = call.grant.tenant;
    let size = call
        .registry
        .blocking(move |inner| inner.store.use_blob(tenant, digest))
        .await?
        .ok_or_else(Refusal::blob_unknown)?;
    let mut response = Response::builder()
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::ACCEPT_RANGES, "bytes")
        .header(CONTENT_DIGEST, digest.to_string());
    if call.method == Method::HEAD {
        return Ok(finished(response.header(header::CONTENT_LENGTH, size), Body::empty()));
    }
    let range = requested_range(&call.headers, size);
    let (start, length) = match range {
        Range::Whole => (0, size),
        Range::Part { start, end } => {
            let value = format!("bytes {start}-{end}/{size}");
            response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, value);
            (start, end - start + 1)
        }
        Range::Outside => return Err(Refusal::range(size)),
    };
    let body = content(call.registry.0.store.blob(digest), start, length).await?;
    Ok(finished(response.header(header::CONTENT_LENGTH, length), body))
}

async fn content(path: std::path::PathBuf, start: u64, length: u64) -> Result<Body, Refusal> {
    let read = |source| crate::StoreError { action: "reading", path: path.clone(), source };
    let mut file = match File::open(&path).await {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(Refusal::blob_unknown()),
        Err(error) => return Err(read(error).into()),
    };
    if start > 0 {
        file.seek(SeekFrom::Start(start)).await.map_err(read)?;
    }
    Ok(Body::from_stream(ReaderStream::with_capacity(file.take(length), READ_BUFFER)))
}

fn finished(response: http::response::Builder, body: Body) -> Response {
    response.body(body).expect("fixed header names and values of digits and hex")
}

#[derive(Debug, PartialEq, Eq)]
enum Range {
    Whole,
    /// Both ends belong to it.
    Part {
        start: u64,
        end: u64,
    },
    Outside,
}

/// Several ranges, other units and nonsense are answered with the whole blob, as RFC 9110 allows.
fn requested_range(headers: &HeaderMap, size: u64) -> Range {
    let parsed = headers.get(header::RANGE).and_then(|value| parse_range(value.to_str().ok()?));
    match parsed {
        None => Range::Whole,
        Some((None, Some(last))) if last > 0 && size > 0 => {
            Range::Part { start: size.saturating_sub(last), end: size - 1 }
        }
        Some((Some(start), end)) if start < size => {
            Range::Part { start, end: end.map_or(size - 1, |end| end.min(size - 1)) }
        }
        Some(_) => Range::Outside,
    }
}

fn parse_range(value: &str) -> Option<(Option<u64>, Option<u64>)> {
    let (start, end) = value.strip_prefix("bytes=")?.split_once('-')?;
    let number = |text: &str| -> Option<Option<u64>> {
        if text.is_empty() { Some(None) } else { Some(Some(text.parse().ok()?)) }
    };
    match (number(start)?, number(end)?) {
        (None, None) => None,
        (Some(start), Some(end)) if end < start => None,
        range => Some(range),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_as_rfc_9110_says() {
        for (value, expected) in [
            ("bytes=0-0", Range::Part { start: 0, end: 0 }),
            ("bytes=2-", Range::Part { start: 2, end: 9 }),
            ("bytes=2-100", Range::Part { start: 2, end: 9 }),
            ("bytes=-3", Range::Part { start: 7, end: 9 }),
            ("bytes=-30", Range::Part { start: 0, end: 9 }),
            ("bytes=10-", Range::Outside),
            ("bytes=-0", Range::Outside),
            ("bytes=5-2", Range::Whole),
            ("bytes=0-1,3-4", Range::Whole),
            ("lines=0-1", Range::Whole),
            ("bytes=-", Range::Whole),
            ("bytes=99999999999999999999-", Range::Whole),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::RANGE, value.parse().expect("header"));
            assert_eq!(requested_range(&headers, 10), expected, "{value}");
        }
    }
}
