//! A server in the test, and what errors look like from outside.

use axum::{
    Json, Router,
    http::{HeaderMap, StatusCode},
    response::IntoResponse as _,
    routing::get,
};
use serde_json::json;
use std::net::Ipv4Addr;
use systemprompt_cloud::{ApiUrl, CloudApiClient, CloudError, HttpOptions, http_client};
use systemprompt_contract::Secret;
use tokio::net::TcpListener;

/// Serves `router` on a free loopback port for as long as the test runs.
pub(crate) async fn serve(router: Router) -> ApiUrl {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move { axum::serve(listener, router).await });
    // Also proves that names below localhost need no resolver.
    format!("http://api.systemprompt.localhost:{port}").parse().expect("an origin")
}

pub(crate) fn http() -> reqwest::Client {
    http_client(&HttpOptions::default()).expect("a client")
}

pub(crate) fn client(api_url: &ApiUrl) -> CloudApiClient {
    CloudApiClient::new(api_url.clone(), Secret::new("sp_live_a.b.c"), http())
}

#[tokio::test]
async fn errors_of_the_api_are_kept_whole() {
    let refuse = || async {
        let body = json!({"error": {"code": "conflict", "message": "not now", "hint": "later",
            "request_id": "999bc654-9a64-49bc-98be-db976fc84e76"}});
        (StatusCode::CONFLICT, Json(body))
    };
    let api_url = serve(Router::new().route("/api/v1/tenants", get(refuse))).await;
    let error = client(&api_url).tenants().await.expect_err("refused");
    let CloudError::Api(api) = &error else { panic!("{error:?}") };
    assert!(api.request_id.is_some());
    assert_eq!(
        (error.code(), error.to_string().as_str(), error.hint().as_deref()),
        ("conflict", "not now", Some("later"))
    );
}

#[tokio::test]
async fn a_refused_token_says_where_to_sign_in_and_is_sent_as_bearer() {
    let handler = |headers: HeaderMap| async move {
        let sent = headers["authorization"].to_str().expect("text") == "Bearer sp_live_a.b.c";
        if sent { StatusCode::UNAUTHORIZED.into_response() } else { StatusCode::IM_A_TEAPOT.into_response() }
    };
    let api_url = serve(Router::new().route("/api/v1/auth/me", get(handler))).await;
    let error = client(&api_url).me().await.expect_err("refused");
    assert_eq!(error.code(), "unauthorized");
    assert_eq!(error.hint(), Some(format!("Sign in again: systemprompt cloud auth login --api-url {api_url}")));
}

#[tokio::test]
async fn nobody_there_says_whom_and_what_to_do() {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port").local_addr().expect("bound").port();
    let api_url: ApiUrl = format!("http://127.0.0.1:{port}").parse().expect("an origin");
    let error = client(&api_url).me().await.expect_err("nobody there");
    assert!(error.to_string().contains(&format!("cannot reach {api_url}: Connection refused")), "{error}");
    assert!(error.hint().is_some_and(|hint| hint.contains("cargo xtask up")), "{error:?}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn an_answer_from_something_else_is_told_as_such() {
    let page = || async { (StatusCode::BAD_GATEWAY, "<html>proxy</html>") };
    let api_url = serve(Router::new().route("/api/v1/auth/me", get(page))).await;
    let error = client(&api_url).me().await.expect_err("not the API");
    assert!(error.to_string().contains("answered 502") && error.to_string().contains("<html>proxy"), "{error}");
    let nonsense = serve(Router::new().route("/api/v1/auth/me", get(|| async { "[]" }))).await;
    assert_eq!(client(&nonsense).me().await.expect_err("not a person").code(), "unexpected_answer");
}

#[tokio::test]
async fn a_ca_file_that_is_none_is_an_error_not_a_panic() {
    let missing = HttpOptions { ca_file: Some("/no/such/ca.pem".into()) };
    assert!(http_client(&missing).expect_err("missing").to_string().contains("/no/such/ca.pem"));
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("ca.pem");
    std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nnonsense\n").expect("written");
    assert!(http_client(&HttpOptions { ca_file: Some(path) }).is_err());
}
