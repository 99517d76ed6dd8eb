//! Answers that are not files: the tenant app's error shape and the page for "not here".

use crate::health::timestamp;
use axum::{
    Json,
    response::{IntoResponse, Response},
};
use chrono::Utc;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;
use systemprompt_contract::RequestId;

pub(crate) const TRACE_ID: HeaderName = HeaderName::from_static("x-trace-id");

/// The flat error shape of a tenant's app (the platform's own errors are nested, so a client can tell who spoke).
#[derive(Debug, Serialize)]
struct AppError<'a> {
    code: &'a str,
    message: String,
    details: Option<()>,
    error_key: Option<()>,
    path: &'a str,
    validation_errors: [(); 0],
    timestamp: String,
    trace_id: RequestId,
}

pub(crate) fn not_found_json(path: &str, trace_id: RequestId) -> Response {
    let body = AppError {
        code: "not_found",
        message: format!("there is nothing at {path}"),
        details: None,
        error_key: None,
        path,
        validation_errors: [],
        timestamp: timestamp(Utc::now()),
        trace_id,
    };
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

pub(crate) fn not_found_page() -> Response {
    page(StatusCode::NOT_FOUND, "Not found", "There is no page at this address.")
}

pub(crate) fn unreadable_page() -> Response {
    page(StatusCode::INTERNAL_SERVER_ERROR, "Cannot be read", "This page exists but cannot be read now.")
}

pub(crate) fn method_not_allowed() -> Response {
    let allow = [(header::ALLOW, HeaderValue::from_static("GET, HEAD"))];
    (allow, page(StatusCode::METHOD_NOT_ALLOWED, "Not allowed", "Pages can be read only.")).into_response()
}

fn page(status: StatusCode, title: &str, text: &str) -> Response {
    let html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" \
         content=\"width=device-width\">\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{text}</p>\n</html>\n"
    );
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (status, headers, html).into_response()
}
