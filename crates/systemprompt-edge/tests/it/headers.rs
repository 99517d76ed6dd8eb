//! What crosses the edge in fields, both ways, over both versions.

use crate::harness::*;
use http::{Method, Response};

const FORGED: [&str; 26] = [
    "x-forwarded-for",
    "X-Forwarded-For",
    "x_forwarded_for",
    "X-Forwarded_For",
    "x-forwarded-proto",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-server",
    "x-forwarded-prefix",
    "x-forwarded",
    "forwarded",
    "Forwarded",
    "x-real-ip",
    "x_real_ip",
    "cf-connecting-ip",
    "cf_connecting_ip",
    "true-client-ip",
    "x-client-ip",
    "fly-client-ip",
    "fly-forwarded-port",
    "fly-replay-src",
    "fly_force_instance_id",
    "x-request-id",
    "x_request_id",
    "x-tenant-id",
    "x-tenant-slug",
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_a_client_claims_reaches_the_app() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    for name in FORGED {
        for fields in [
            format!("{name}: 6.6.6.6\r\n"),
            format!("{name}: 6.6.6.6\r\n{name}: 6.6.6.7\r\n"),
            format!("Connection: {name}, x-forwarded-for, x-real-ip, x-request-id\r\n{name}: 6.6.6.6\r\n"),
        ] {
            assert_eq!(edge.get(A, "/", &fields).await.status, 200);
        }
        let mut h2 = edge.h2(Some(A)).await;
        let lower = name.to_ascii_lowercase();
        let ask = request(Method::GET, &format!("https://{A}/"), &[(&lower, "6.6.6.6"), (&lower, "6.6.6.7")]);
        assert_eq!(h2.send_request(ask).await.expect("h2").status(), 200);
        for seen in a.take() {
            assert!(seen.fields.iter().all(|(_, value)| !value.contains("6.6.6")), "{name}: {seen:?}");
            assert_eq!(seen.field("x-forwarded-for"), Some("127.0.0.1"));
            assert_eq!(seen.field("x-real-ip"), Some("127.0.0.1"));
            assert_eq!(seen.field("x-forwarded-proto"), Some("https"));
            assert_eq!(seen.field("x-forwarded-host"), Some(A));
            assert_eq!(seen.field("host"), Some(A));
            assert!(seen.field("x-request-id").is_some_and(|id| id.len() == 36), "{seen:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hop_by_hop_fields_stop_here_and_the_rest_arrives() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    let fields = "Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n\
                  Proxy-Authorization: p\r\nProxy-Connection: keep-alive\r\nUpgrade: h2c\r\nTrailer: X\r\n\
                  Authorization: Bearer t\r\nCookie: a=1; b=2\r\nAccept: */*\r\nX-Two: 1\r\nX-Two: 2\r\n";
    assert_eq!(edge.get(A, "/", fields).await.status, 200);
    let seen = a.take().remove(0);
    let ours = ["host", "x-forwarded-for", "x-real-ip", "x-forwarded-proto", "x-forwarded-host", "x-request-id"];
    let mut rest: Vec<_> = seen.fields.iter().filter(|(name, _)| !ours.contains(&name.as_str())).cloned().collect();
    rest.sort();
    let expected =
        [("accept", "*/*"), ("authorization", "Bearer t"), ("cookie", "a=1; b=2"), ("x-two", "1"), ("x-two", "2")];
    assert_eq!(rest, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_lose_instructions_to_proxies() {
    let app = Server::tcp(|_| async {
        let mut response = Response::new(full("x"));
        for (name, value) in [
            ("fly-replay", "app=other"),
            ("fly-replay-cache", "other.example/*"),
            ("connection", "x-internal"),
            ("x-internal", "1"),
            ("keep-alive", "timeout=5"),
            ("proxy-authenticate", "Basic"),
            ("x-request-id", "forged"),
            ("x-systemprompt-error", "suspended"),
            ("x-trace-id", "kept"),
            ("set-cookie", "a=1"),
        ] {
            response.headers_mut().append(name, value.parse().expect("value"));
        }
        response.headers_mut().append("set-cookie", "b=2".parse().expect("value"));
        response
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &app.upstream)], |_| {}).await;
    let over_h1 = edge.get(A, "/", "").await.headers;
    let ask = request(Method::GET, &format!("https://{A}/"), &[]);
    let over_h2 = edge.h2(Some(A)).await.send_request(ask).await.expect("h2").headers().clone();
    for headers in [over_h1, over_h2] {
        let mut names: Vec<_> = headers.keys().map(http::HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-length", "date", "set-cookie", "x-request-id", "x-trace-id"]);
        assert_ne!(headers["x-request-id"], "forged");
        assert_eq!(headers.get_all("set-cookie").iter().count(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cookies_split_by_http2_arrive_as_one() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    let ask = request(Method::GET, &format!("https://{A}/"), &[("cookie", "a=1"), ("cookie", "b=2")]);
    edge.h2(Some(A)).await.send_request(ask).await.expect("h2");
    assert_eq!(a.take()[0].field("cookie"), Some("a=1; b=2"));
}
