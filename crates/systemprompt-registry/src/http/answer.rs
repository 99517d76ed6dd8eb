use crate::{StoreError, manifest::PutError, upload::UploadError};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use std::fmt::Display;

pub(super) const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const REALM: &str = "Basic realm=\"SystemPrompt registry\", charset=\"UTF-8\"";

/// What every answer carries.
pub(super) fn base_headers(headers: &mut HeaderMap) {
    headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// An answer other than success: one error document in the form of the specification.
///
/// The answers for what is absent say nothing about what was asked for, so that they are the same for what is another
/// tenant's.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    code: &'static str,
    message: String,
    more: Option<(HeaderName, HeaderValue)>,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Display) -> Self {
        Self { status, code, message: message.to_string(), more: None }
    }

    pub(super) fn unauthorized() -> Self {
        let message = "expected a registry token as the password of HTTP Basic, or as Bearer";
        let mut refusal = Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message);
        refusal.more = Some((header::WWW_AUTHENTICATE, HeaderValue::from_static(REALM)));
        refusal
    }
    pub(super) fn denied() -> Self {
        Self::new(StatusCode::FORBIDDEN, "DENIED", "the token does not allow this; ask for one that does")
    }
    /// With the methods that there are (RFC 9110, 15.5.6).
    pub(super) fn method(allowed: &'static str) -> Self {
        let message = "this registry does not offer that";
        let mut refusal = Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message);
        refusal.more = Some((header::ALLOW, HeaderValue::from_static(allowed)));
        refusal
    }
    pub(super) fn name_unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such repository")
    }
    pub(super) fn blob_unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "no such blob")
    }
    pub(super) fn manifest_unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest")
    }
    pub(super) fn upload_unknown() -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN", "no such upload")
    }
    pub(super) fn digest_invalid(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", message)
    }
    pub(super) fn upload_invalid(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message)
    }
    pub(super) fn manifest_invalid(message: impl Display) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message)
    }
    pub(super) fn manifest_too_large(message: impl Display) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
    }
    pub(super) fn range(size: u64) -> Self {
        let mut refusal =
            Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the range is not within the blob");
        refusal.more =
            HeaderValue::try_from(format!("bytes */{size}")).ok().map(|value| (header::CONTENT_RANGE, value));
        refusal
    }
    pub(super) fn timeout() -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "BLOB_UPLOAD_INVALID",
            "no bytes came for a minute; go on where it stands",
        )
    }
    pub(super) fn manifest_timeout() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "MANIFEST_INVALID", "the manifest did not come within a minute")
    }
    fn disk_full() -> Self {
        tracing::error!("the registry's disk is full: a push was refused");
        let message = "the registry's disk is full; what was stored before is intact; try again when there is room";
        Self::new(StatusCode::INSUFFICIENT_STORAGE, "INSUFFICIENT_STORAGE", message)
    }
    fn quota() -> Self {
        let message = "the tenant's registry quota is used up; a smaller image, or fewer changes at once, may fit";
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "DENIED", message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "errors": [{ "code": self.code, "message": self.message }] });
        let mut response = super::json(self.status, body.to_string());
        if let Some((name, value)) = self.more {
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        tracing::error!(%error, "the registry's storage failed");
        if error.is_full() {
            return Self::disk_full();
        }
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the registry's storage failed; its log says how")
    }
}

impl From<UploadError> for Refusal {
    fn from(error: UploadError) -> Self {
        match error {
            UploadError::Unknown => Self::upload_unknown(),
            UploadError::Offset { at } => {
                let message = format!("expected the next chunk to start at {at}");
                let mut refusal = Self::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message);
                refusal.more = Some((header::RANGE, super::uploads::range_so_far(at)));
                refusal
            }
            UploadError::TooManyOpen => {
                let message = "too many unfinished uploads; finish or cancel some, they expire after a day";
                Self::new(StatusCode::TOO_MANY_REQUESTS, "TOOMANYREQUESTS", message)
            }
            UploadError::BlobTooLarge { max } => {
                let message = format!("expected a blob of at most {max} bytes, got more");
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "SIZE_INVALID", message)
            }
            UploadError::QuotaExceeded => Self::quota(),
            UploadError::DiskFull => Self::disk_full(),
            UploadError::DigestMismatch { got } => {
                Self::digest_invalid(format!("the content that came has the digest {got}; upload it again"))
            }
            UploadError::Store(error) => error.into(),
        }
    }
}

impl From<PutError> for Refusal {
    fn from(error: PutError) -> Self {
        match error {
            PutError::Store(error) => error.into(),
            PutError::QuotaExceeded => Self::quota(),
            PutError::UnpacksTooLarge { .. } => Self::manifest_too_large(error),
            PutError::BlobsUnknown(_) => Self::new(StatusCode::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN", error),
            other => Self::manifest_invalid(other),
        }
    }
}
