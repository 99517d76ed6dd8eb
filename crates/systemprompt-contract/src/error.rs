use crate::ids::RequestId;
use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! codes {
    ($($(#[$meta:meta])* $name:ident = $text:literal, $status:literal;)*) => {
        /// What went wrong, for programs. The table in `docs/errors.md` is checked against this list.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode { $($(#[$meta])* #[serde(rename = $text)] $name,)* }

        impl ErrorCode {
            /// All codes.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
            /// Lower snake case, as on the wire.
            pub const fn as_str(self) -> &'static str { match self { $(Self::$name => $text,)* } }
            /// The HTTP status that carries it.
            pub const fn status(self) -> u16 { match self { $(Self::$name => $status,)* } }
        }
    };
}

codes! {
    /// The request's syntax or a field is wrong.
    BadRequest = "bad_request", 400;
    /// A field the call does not know.
    UnknownField = "unknown_field", 400;
    /// The image is not the one this tenant must use.
    ImageMismatch = "image_mismatch", 400;
    /// The tag or digest was never pushed for this tenant.
    ImageNotFound = "image_not_found", 400;
    /// The image cannot run: no entrypoint, missing blobs, other platform.
    ImageInvalid = "image_invalid", 400;
    /// No token, or one that is not valid any more.
    Unauthorized = "unauthorized", 401;
    /// Signed in, but not for this.
    Forbidden = "forbidden", 403;
    /// Absent, or not yours: the same answer.
    NotFound = "not_found", 404;
    /// The method is not offered here.
    MethodNotAllowed = "method_not_allowed", 405;
    /// The state does not allow it now.
    Conflict = "conflict", 409;
    /// Something else runs on this tenant.
    OperationInProgress = "operation_in_progress", 409;
    /// The same key came with another request.
    IdempotencyMismatch = "idempotency_mismatch", 409;
    /// The one-time token was used before.
    AlreadyUsed = "already_used", 410;
    /// The body is larger than the call accepts.
    TooLarge = "too_large", 413;
    /// Too many at once.
    RateLimited = "rate_limited", 429;
    /// A bug of ours; the log has the details under the request id.
    Internal = "internal", 500;
    /// A part we need does not answer; try again.
    Unavailable = "unavailable", 503;
    /// The disk is full; nothing was lost.
    InsufficientStorage = "insufficient_storage", 507;
    /// The app ended before it answered.
    AppCrashed = "app_crashed", 422;
    /// The app never answered its health check.
    AppUnhealthy = "app_unhealthy", 422;
    /// The operation was cancelled by another one.
    Cancelled = "cancelled", 409;
    /// No host, address or memory left for another instance.
    CapacityExhausted = "capacity_exhausted", 503;
    /// The edge knows no tenant of this host name.
    TenantNotFound = "tenant_not_found", 502;
    /// The tenant is provisioned and has no release yet.
    AwaitingDeploy = "awaiting_deploy", 503;
    /// The tenant is suspended (billing).
    Suspended = "suspended", 402;
    /// The tenant's app did not answer the edge.
    AppUnreachable = "app_unreachable", 502;
    /// The tenant's app took too long to begin its answer.
    AppTimeout = "app_timeout", 504;
    /// The tenant's first release is being started.
    AppStarting = "app_starting", 503;
    /// The tenant was stopped by its owner.
    AppStopped = "app_stopped", 503;
    /// The tenant's last operation failed and nothing is live.
    AppFailed = "app_failed", 503;
    /// The host is not one this connection's certificate is for.
    MisdirectedRequest = "misdirected_request", 421;
    /// The head of the request is larger than this server takes.
    HeaderTooLarge = "header_too_large", 431;
    /// The body came too slowly.
    RequestTimeout = "request_timeout", 408;
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the outside sees of a failure: a code, what was expected and what came, and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// What was expected and what came, in one sentence.
    pub message: String,
    /// What to do, best a command to type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Finds the request in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
}

impl ApiError {
    /// An error without a hint.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: None, request_id: None }
    }

    /// Adds what to do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// `{"error": {...}}`, the body of every failed call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The failure.
    pub error: ApiError,
}
