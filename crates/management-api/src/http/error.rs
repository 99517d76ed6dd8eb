//! How the API answers failures: `{"error": {code, message, hint, request_id}}` with the code's status.
//!
//! The outside sees a code, a sentence and a hint; the cause goes to the log, once, under the request id.

use axum::{
    extract::{FromRequest, FromRequestParts, Request, rejection::BytesRejection},
    http::{HeaderName, HeaderValue, StatusCode, header, request::Parts},
    middleware::Next,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use std::fmt;
use systemprompt_contract::{ApiError, ErrorBody, ErrorCode, RequestId};

/// Set by the edge on every request, answered on every response.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

tokio::task_local! {
    /// The id of the request that this task answers.
    static CURRENT_REQUEST: RequestId;
}

/// The id of the request being answered; a new one outside [`with_request_id`].
pub(crate) fn request_id() -> RequestId {
    CURRENT_REQUEST.try_with(|id| *id).unwrap_or_else(|_| RequestId::new())
}

/// Middleware: takes the edge's `x-request-id`, or makes one, so that answers and log lines carry it.
pub(crate) async fn with_request_id(request: Request, next: Next) -> Response {
    let given = request.headers().get(REQUEST_ID).and_then(|value| value.to_str().ok()).and_then(|id| id.parse().ok());
    let id = given.unwrap_or_else(RequestId::new);
    let mut response = CURRENT_REQUEST.scope(id, next.run(request)).await;
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        response.headers_mut().entry(REQUEST_ID).or_insert(value);
    }
    response
}

/// What a handler returns when it cannot answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure(pub(crate) ApiError);

impl Failure {
    pub(crate) fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(ApiError::new(code, message))
    }

    #[must_use]
    pub(crate) fn hint(self, hint: impl Into<String>) -> Self {
        Self(self.0.hint(hint))
    }

    /// "Absent" and "not yours" are this same answer.
    pub(crate) fn not_found(what: &str) -> Self {
        Self::new(ErrorCode::NotFound, format!("there is no such {what}"))
    }

    /// A failure of ours: logs `cause` under the request id and tells the outside nothing of it.
    pub(crate) fn internal(cause: &(dyn std::error::Error + 'static)) -> Self {
        let id = request_id();
        tracing::error!(request.id = %id, cause = %Chain(cause), "a request failed");
        let mut error = ApiError::new(ErrorCode::Internal, "something failed on our side")
            .hint("try again; if it stays, give the operator the request id");
        error.request_id = Some(id);
        Self(error)
    }

    /// A part that we need does not answer.
    pub(crate) fn unavailable(cause: &(dyn std::error::Error + 'static)) -> Self {
        let id = request_id();
        tracing::warn!(request.id = %id, cause = %Chain(cause), "a request failed for want of another part");
        let mut error = ApiError::new(ErrorCode::Unavailable, "a part of the platform does not answer now")
            .hint("nothing was changed; try again in a moment");
        error.request_id = Some(id);
        Self(error)
    }
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

/// A database that cannot be reached is "try again"; everything else from it is a bug of ours.
impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Io(_) | sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed | sqlx::Error::WorkerCrashed => {
                Self::unavailable(&error)
            }
            sqlx::Error::Database(database) => match database.code().as_deref() {
                Some("53100") => {
                    Self::new(ErrorCode::InsufficientStorage, "the platform's disk is full; nothing was lost")
                }
                Some(code) if is_passing(code) => Self::unavailable(&error),
                _ => Self::internal(&error),
            },
            _ => Self::internal(&error),
        }
    }
}

/// SQLSTATEs that go away by themselves: connection trouble, a server that starts or stops, too many connections, a
/// lock or a statement that took too long, and transactions that lost to another.
fn is_passing(sqlstate: &str) -> bool {
    matches!(sqlstate, "53300" | "55P03" | "57014" | "40001" | "40P01")
        || sqlstate.starts_with("08")
        || sqlstate.starts_with("57P")
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(mut error) = self;
        let id = *error.request_id.get_or_insert_with(request_id);
        let code = error.code;
        let status = StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, axum::Json(ErrorBody { error })).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
            headers.insert(REQUEST_ID, value);
        }
        match code {
            // RFC 9110, 11.6.1: a 401 names its scheme.
            ErrorCode::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            ErrorCode::RateLimited | ErrorCode::Unavailable => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            }
            _ => {}
        }
        response
    }
}

/// A JSON body of at most the router's body limit, parsed into `T`; every way it can be wrong is an [`ApiError`].
#[derive(Debug)]
pub(crate) struct Json<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        require_json(request.headers().get(header::CONTENT_TYPE))?;
        let body = Bytes::from_request(request, state).await.map_err(|rejection| body_failure(&rejection))?;
        parse_json(&body).map(Self)
    }
}

/// Parses a JSON body.
///
/// # Errors
/// `unknown_field` names the field that `T` does not know; anything else is `bad_request`.
pub(crate) fn parse_json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| not_taken("body", &error.to_string()))
}

/// serde has no kind of error for a field that is not known, but its text is fixed: unknown field `x`, expected …
fn not_taken(part: &str, text: &str) -> Failure {
    match text.split_once("unknown field `").and_then(|(_, rest)| rest.split_once('`')) {
        Some((field, rest)) => {
            let known = rest.trim_start_matches(", ");
            let known = known.rsplit_once(" at line ").map_or(known, |(known, _)| known);
            Failure::new(ErrorCode::UnknownField, format!("this call does not know the field {field:?}: {known}"))
        }
        None => Failure::new(ErrorCode::BadRequest, format!("the {part} is not what this call takes: {text}")),
    }
}

/// The query of a call, parsed into `T`, with the failures of [`Json`].
#[derive(Debug)]
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failure> {
        let parsed = axum::extract::Query::from_request_parts(parts, state).await;
        parsed
            .map(|axum::extract::Query(query)| Self(query))
            .map_err(|rejection| not_taken("query", &rejection.body_text()))
    }
}

/// A failure of reading the body, before its content matters.
fn body_failure(rejection: &BytesRejection) -> Failure {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        Failure::new(ErrorCode::TooLarge, "the body is larger than this call accepts")
    } else {
        Failure::new(ErrorCode::BadRequest, "the body ended before it was complete")
    }
}

/// A browser's form cannot send JSON without asking first, so this also keeps other sites' forms out.
fn require_json(content_type: Option<&HeaderValue>) -> Result<(), Failure> {
    let essence = content_type.and_then(|value| value.to_str().ok()).and_then(|value| value.split(';').next());
    match essence.map(str::trim) {
        Some(essence) if essence.eq_ignore_ascii_case("application/json") => Ok(()),
        other => Err(Failure::new(
            ErrorCode::BadRequest,
            format!("expected a body of content-type application/json, got {}", other.unwrap_or("none")),
        )),
    }
}

/// An error and its sources on one line.
struct Chain<'a>(&'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{Router, body::Body, extract::DefaultBodyLimit, routing::post};
    use http_body_util::BodyExt as _;
    use tower::ServiceExt as _;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only its parsing matters")]
    struct Known {
        name: String,
        size: u32,
    }

    async fn answer(content_type: &str, body: &str) -> (StatusCode, ErrorBody) {
        let router: Router = Router::new()
            .route("/", post(|Json(_): Json<Known>| async { StatusCode::OK }))
            .layer(DefaultBodyLimit::max(64))
            .layer(axum::middleware::from_fn(with_request_id));
        let request = Request::post("/")
            .header("content-type", content_type)
            .header("x-request-id", "999bc654-9a64-49bc-98be-db976fc84e76")
            .body(Body::from(body.to_owned()))
            .unwrap();
        let response = router.oneshot(request).await.unwrap();
        assert_eq!(response.headers()["x-request-id"], "999bc654-9a64-49bc-98be-db976fc84e76");
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&body).unwrap())
    }

    async fn check(content_type: &str, body: &str, code: ErrorCode, mentions: &str) {
        let (status, answer) = answer(content_type, body).await;
        assert_eq!((status.as_u16(), answer.error.code), (code.status(), code), "{body}");
        assert!(answer.error.message.contains(mentions), "{}", answer.error.message);
        assert_eq!(answer.error.request_id.unwrap().to_string(), "999bc654-9a64-49bc-98be-db976fc84e76");
    }

    #[tokio::test]
    async fn every_wrong_body_has_its_code() {
        let json = "application/json";
        check(json, r#"{"name":"a","size":1,"colour":2}"#, ErrorCode::UnknownField, "\"colour\"").await;
        check(json, r#"{"name":"a","size":1,"colour":2}"#, ErrorCode::UnknownField, "`name`").await;
        check(json, r#"{"name":"a"}"#, ErrorCode::BadRequest, "size").await;
        check(json, r#"{"name":"a","size":"#, ErrorCode::BadRequest, "EOF").await;
        check(json, &format!("{{\"name\":\"{}\"}}", "x".repeat(80)), ErrorCode::TooLarge, "larger").await;
        check("application/x-www-form-urlencoded", "name=a", ErrorCode::BadRequest, "application/json").await;
    }

    #[tokio::test]
    async fn an_error_of_ours_shows_nothing_of_its_cause() {
        let failure = Failure::from(sqlx::Error::Protocol("secret detail".into()));
        assert_eq!(failure.0.code, ErrorCode::Internal);
        let response = failure.into_response();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        assert!(!String::from_utf8(body.to_vec()).unwrap().contains("secret detail"));
        assert_eq!(Failure::from(sqlx::Error::PoolTimedOut).0.code, ErrorCode::Unavailable);
    }

    #[test]
    fn what_passes_by_itself_is_worth_another_try() {
        for passing in ["08006", "57P01", "57P03", "53300", "55P03", "57014", "40P01"] {
            assert!(is_passing(passing), "{passing}");
        }
        for lasting in ["23505", "42P01", "22001", "53100", "XX000"] {
            assert!(!is_passing(lasting), "{lasting}");
        }
    }

    #[tokio::test]
    async fn a_401_names_its_scheme_and_a_503_says_when_to_come_back() {
        let response = Failure::new(ErrorCode::Unauthorized, "no").into_response();
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        let response = Failure::new(ErrorCode::Unavailable, "no").into_response();
        assert!(response.headers().contains_key("retry-after"));
    }
}
