//! The health probe of deploys.

use crate::harness::*;
use http::{Response, StatusCode};
use std::time::Duration;
use systemprompt_edge::{ProbeError, probe};

const PATH: &str = "/api/v1/health";

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_asks_like_a_request_and_returns_the_answer() {
    let server = Server::echo("healthy").await;
    let answer = probe(&server.upstream, &host(A), PATH, DEADLINE).await.expect("answer");
    assert_eq!((answer.status, &answer.body[..]), (200, &b"healthy"[..]));
    let seen = server.take().remove(0);
    assert_eq!((seen.method.as_str(), seen.target.as_str(), seen.field("host")), ("GET", PATH, Some(A)));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unhealthy_answer_is_an_answer() {
    let server = Server::tcp(|_| async { status(StatusCode::SERVICE_UNAVAILABLE) }).await;
    assert_eq!(probe(&server.upstream, &host(A), PATH, DEADLINE).await.expect("answer").status, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_port_is_not_an_answer() {
    // Accepted by the kernel, never by the app.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let upstream = systemprompt_edge::Upstream::Tcp(listener.local_addr().expect("address"));
    let error = probe(&upstream, &host(A), PATH, Duration::from_millis(50)).await.expect_err("silent");
    assert!(matches!(error, ProbeError::Timeout { .. }), "{error}");
    let error = probe(&nobody(), &host(A), PATH, DEADLINE).await.expect_err("nobody");
    assert!(matches!(error, ProbeError::Connect { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_answer_is_cut() {
    let server = Server::tcp(|_| async { Response::new(full(vec![b'x'; 1024 * 1024])) }).await;
    let answer = probe(&server.upstream, &host(A), PATH, DEADLINE).await.expect("answer");
    assert_eq!(answer.body.len(), 64 * 1024);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_path_can_be_asked_for() {
    for path in ["", "health", "http://elsewhere/", "/a b"] {
        let error = probe(&nobody(), &host(A), path, DEADLINE).await.expect_err(path);
        assert!(matches!(error, ProbeError::Path(_)), "{path}: {error}");
    }
}
