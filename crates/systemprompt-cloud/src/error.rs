//! What a call to the cloud can end with. Every variant can say a code for programs and what to do next.

use crate::api_url::ApiUrl;
use std::error::Error;
use systemprompt_contract::{ApiError, ErrorCode, RequestId};

/// A call to the Management API that did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The API answered with an error; kept whole.
    #[error("{}", .0.message)]
    Api(ApiError),
    /// No token, or one that is not valid any more.
    #[error("{api_url} does not accept this token")]
    Unauthorized {
        /// Who refused it.
        api_url: ApiUrl,
        /// Finds the call in the log of the cloud.
        request_id: Option<RequestId>,
    },
    /// The host could not be reached, or the connection broke.
    #[error("cannot reach {api_url}: {reason}")]
    Unreachable {
        /// Who was called.
        api_url: ApiUrl,
        /// What failed, in words.
        reason: String,
        /// What kind of failure it was.
        kind: TransportFailure,
    },
    /// Something answered, but not as the API does.
    #[error("{api_url} answered {status} with something that is not from the Management API: {excerpt}")]
    Unexpected {
        /// Who was called.
        api_url: ApiUrl,
        /// HTTP status.
        status: u16,
        /// The first 300 characters.
        excerpt: String,
    },
}

/// How a connection failed; decides the hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TransportFailure {
    /// Nobody listens.
    Connect,
    /// The host's name is unknown.
    Name,
    /// The certificate is not trusted.
    Certificate,
    /// No answer in time.
    Timeout,
    /// The connection broke.
    Broken,
}

impl CloudError {
    /// For programs, lower snake case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Api(error) => error.code.as_str(),
            Self::Unauthorized { .. } => ErrorCode::Unauthorized.as_str(),
            Self::Unreachable { kind: TransportFailure::Certificate, .. } => "certificate_not_trusted",
            Self::Unreachable { kind: TransportFailure::Timeout, .. } => "timeout",
            Self::Unreachable { .. } => "unreachable",
            Self::Unexpected { .. } => "unexpected_answer",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Api(error) => error.hint.clone(),
            Self::Unauthorized { api_url, .. } => Some(log_in_to(api_url)),
            Self::Unreachable { kind, .. } => Some(kind.hint().to_owned()),
            Self::Unexpected { .. } => Some("Check --api-url; a proxy may have answered in its place.".to_owned()),
        }
    }

    /// Finds the call in the log of the cloud, when the API gave its id.
    pub fn request_id(&self) -> Option<RequestId> {
        match self {
            Self::Api(error) => error.request_id,
            Self::Unauthorized { request_id, .. } => *request_id,
            Self::Unreachable { .. } | Self::Unexpected { .. } => None,
        }
    }

    /// The API's own word that there is nothing at this address, or not for this account.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api(error) if error.code == ErrorCode::NotFound)
    }

    /// Something else is being done to the tenant.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Api(error) if error.code == ErrorCode::OperationInProgress)
    }

    /// Whether the same call may succeed by itself a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Api(error) => matches!(error.code, ErrorCode::Unavailable | ErrorCode::RateLimited),
            Self::Unreachable { kind, .. } => *kind != TransportFailure::Certificate,
            Self::Unexpected { status, .. } => matches!(status, 429 | 502..=504),
            Self::Unauthorized { .. } => false,
        }
    }

    /// Whether the call may have been carried out although nobody said so.
    pub(crate) fn may_have_arrived(&self) -> bool {
        matches!(self, Self::Unreachable { kind: TransportFailure::Timeout | TransportFailure::Broken, .. })
    }

    pub(crate) fn transport(api_url: &ApiUrl, error: &reqwest::Error) -> Self {
        let reason = innermost(error);
        let kind = if reason.contains("certificate") || reason.contains("UnknownIssuer") {
            TransportFailure::Certificate
        } else if reason.contains("lookup address") {
            TransportFailure::Name
        } else if error.is_timeout() {
            TransportFailure::Timeout
        } else if error.is_connect() {
            TransportFailure::Connect
        } else {
            TransportFailure::Broken
        };
        Self::Unreachable { api_url: api_url.clone(), reason, kind }
    }
}

impl TransportFailure {
    const fn hint(self) -> &'static str {
        match self {
            Self::Name => {
                "Check --api-url. Names outside of `localhost` have to lead to the cloud: by DNS, or by /etc/hosts."
            }
            Self::Connect => "Is the cloud running? A local one is started with: cargo xtask up",
            Self::Certificate => {
                "Name the CA of this installation with --ca-file or SYSTEMPROMPT_CA_FILE (a local cloud prints its path)."
            }
            Self::Timeout => "Try again; if it stays silent, look at the log of the cloud.",
            Self::Broken => "Try again; what was accepted goes on by itself.",
        }
    }
}

/// Tells to sign in to `api_url`.
pub(crate) fn log_in_to(api_url: &ApiUrl) -> String {
    format!("Sign in again: {}", api_url.sign_in_command())
}

/// reqwest's own sentence only says that sending failed; the last cause says why.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
