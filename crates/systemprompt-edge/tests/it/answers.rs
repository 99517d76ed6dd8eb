//! Routing, and what the edge answers by itself.

use crate::harness::*;
use std::time::Duration;
use systemprompt_edge::{Route, Why};

#[tokio::test(flavor = "multi_thread")]
async fn hosts_reach_their_upstreams() {
    let (platform, a, b) = (Server::echo("platform").await, Server::echo("a").await, Server::echo("b").await);
    let routes = [
        tenant(A, &a.upstream),
        tenant(B, &b.upstream),
        tenant(CUSTOM, &b.upstream),
        (host("extra.systemprompt.localhost"), Some(Route::Platform)),
    ];
    let edge = TestEdge::start(&platform.upstream, routes, |_| {}).await;
    for (name, expected) in [
        (A, "a"),
        (B, "b"),
        (CUSTOM, "b"),
        (ZONE, "platform"),
        ("api.systemprompt.localhost", "platform"),
        ("cloud.systemprompt.localhost", "platform"),
        ("registry.systemprompt.localhost", "platform"),
        ("db.systemprompt.localhost", "platform"),
        ("extra.systemprompt.localhost", "platform"),
        ("localhost", "platform"),
    ] {
        let answer = edge.get(name, "/x?y=1", "").await;
        assert_eq!((answer.status, answer.text()), (200, expected), "{name}");
        assert!(!answer.header("x-request-id").is_empty(), "{name}");
        let h2 =
            edge.h2(Some(name)).await.send_request(request(http::Method::GET, &format!("https://{name}/x?y=1"), &[]));
        assert_eq!(h2.await.expect("h2").status(), 200, "{name} over h2");
    }
    let seen = a.take();
    assert_eq!(seen.len(), 2);
    assert!(seen.iter().all(|seen| seen.target == "/x?y=1" && seen.field("host") == Some(A)), "{seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_an_upstream_too() {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("platform.sock");
    let server = Server::unix(&path, |_| async { http::Response::new(full("by socket")) });
    let edge = TestEdge::start(&server.upstream, [], |_| {}).await;
    assert_eq!(edge.get("api.systemprompt.localhost", "/", "").await.text(), "by socket");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_reason_has_its_answer() {
    let platform = nobody();
    let routes = [
        unavailable("000000000001.systemprompt.localhost", Why::AwaitingDeploy),
        unavailable("000000000002.systemprompt.localhost", Why::Suspended),
        unavailable("000000000003.systemprompt.localhost", Why::Starting),
        unavailable("000000000004.systemprompt.localhost", Why::Stopped),
        unavailable("000000000005.systemprompt.localhost", Why::Failed),
        tenant(A, &nobody()),
    ];
    let edge = TestEdge::start(&platform, routes, |config| config.hold = Duration::from_millis(50)).await;
    for (name, status, code, retries) in [
        ("ffffffffffff.systemprompt.localhost", 502, "tenant_not_found", false),
        ("000000000001.systemprompt.localhost", 503, "awaiting_deploy", true),
        ("000000000002.systemprompt.localhost", 402, "suspended", false),
        ("000000000003.systemprompt.localhost", 503, "app_starting", true),
        ("000000000004.systemprompt.localhost", 503, "app_stopped", true),
        ("000000000005.systemprompt.localhost", 503, "app_failed", true),
        (A, 502, "app_unreachable", false),
        ("api.systemprompt.localhost", 503, "unavailable", true),
    ] {
        let json = edge.get(name, "/", "Accept: application/json\r\n").await;
        assert_eq!((json.status, json.header("x-systemprompt-error")), (status, code), "{name}");
        assert_eq!(json.header("content-type"), "application/json");
        assert_eq!(json.header("cache-control"), "no-store");
        assert_eq!(json.headers.contains_key("retry-after"), retries, "{name}");
        let error = &json.json()["error"];
        assert_eq!(error["code"], code);
        assert_eq!(error["request_id"], json.header("x-request-id"));
        assert!(error["message"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        assert!(error["hint"].as_str().is_some_and(|text| !text.is_empty()), "{error}");

        let page = edge.get(name, "/", "Accept: text/html,*/*;q=0.8\r\n").await;
        assert_eq!((page.status, page.header("content-type")), (status, "text/html; charset=utf-8"), "{name}");
        assert_eq!(page.header("cache-control"), "no-store");
        assert!(page.text().contains(code) && page.text().contains(page.header("x-request-id")), "{}", page.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_request_gets_no_body_and_the_connection_goes_on() {
    use tokio::io::AsyncWriteExt;
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    let unknown = "ffffffffffff.systemprompt.localhost";
    let both = format!("HEAD / HTTP/1.1\r\nHost: {unknown}\r\n\r\nGET / HTTP/1.1\r\nHost: {A}\r\n\r\n");
    stream.write_all(both.as_bytes()).await.expect("write");
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\na") {
        use tokio::io::AsyncReadExt;
        assert_ne!(stream.read_buf(&mut bytes).await.expect("read"), 0, "{}", String::from_utf8_lossy(&bytes));
    }
    let text = String::from_utf8(bytes).expect("text");
    assert!(text.starts_with("HTTP/1.1 502") && !text.contains("\"error\""), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_while_its_tenant_starts() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [unavailable(A, Why::Starting)], |_| {}).await;
    let mut waiting = std::pin::pin!(edge.get(A, "/", ""));
    // Other routes change meanwhile, which must not end the waiting.
    edge.publish([tenant(B, &a.upstream)]);
    tokio::select! {
        answer = &mut waiting => panic!("answered too early: {answer:?}"),
        () = edge.handle.wait_generation(2) => {}
    }
    edge.publish([tenant(A, &a.upstream)]);
    assert_eq!(waiting.await.text(), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_places_are_bounded() {
    let edge = TestEdge::start(&nobody(), [unavailable(A, Why::Starting)], |config| {
        config.workers = 1;
        config.limits.held = 1;
    })
    .await;
    let mut first = std::pin::pin!(edge.get(A, "/", ""));
    let mut second = std::pin::pin!(edge.get(A, "/", ""));
    let refused = tokio::select! { answer = &mut first => answer, answer = &mut second => answer };
    assert_eq!((refused.status, refused.header("x-systemprompt-error")), (503, "app_starting"));
}

#[tokio::test(flavor = "multi_thread")]
async fn clear_http_is_sent_to_https() {
    use tokio::{io::AsyncWriteExt, net::TcpStream};
    let edge = TestEdge::start(&nobody(), [], |_| {}).await;
    let port = edge.https.port();
    for (name, target, expected) in [
        (A, "/a?b=c", Some(format!("https://{A}:{port}/a?b=c"))),
        ("AAAAAAAAAAAA.systemprompt.localhost:8480", "/", Some(format!("https://{A}:{port}/"))),
        ("localhost:8480", "/x", Some(format!("https://localhost:{port}/x"))),
        ("[::1]:8480", "/x", Some(format!("https://[::1]:{port}/x"))),
        ("evil.example.org", "/", None),
        ("a.b.systemprompt.localhost", "/", None),
        ("user@systemprompt.localhost", "/", None),
    ] {
        // However much the client has still to say.
        let body = vec![b'x'; 4 * 1024 * 1024];
        let mut stream = TcpStream::connect(edge.http).await.expect("connect");
        let head = format!("POST {target} HTTP/1.1\r\nHost: {name}\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(&[head.as_bytes(), &body].concat()).await.expect("write");
        let answer = Answer::read(&mut stream).await.expect("answer");
        assert_eq!(answer.status, if expected.is_some() { 308 } else { 400 }, "{name}");
        let mut stream = TcpStream::connect(edge.http).await.expect("connect");
        let head = format!("GET {target} HTTP/1.1\r\nHost: {name}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("write");
        let answer = Answer::read(&mut stream).await.expect("answer");
        let location = expected.is_some().then(|| answer.header("location").to_owned());
        assert_eq!((answer.status, location), (if expected.is_some() { 308 } else { 400 }, expected), "{name}");
    }
}
