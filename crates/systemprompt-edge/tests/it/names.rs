//! Who may ask for what on which connection.

use crate::harness::*;
use http::Method;

const UNKNOWN: &str = "ffffffffffff.systemprompt.localhost";
const API: &str = "api.systemprompt.localhost";

/// What an answer shows of who gave it.
fn verdict(status: u16, body: &str) -> String {
    if status == 200 { body.to_owned() } else { status.to_string() }
}

/// `Host` -> expected answer, for one SNI.
fn expectations(sni: Option<&str>) -> Vec<(String, &'static str)> {
    let zone = matches!(sni, Some(A | B | API | UNKNOWN));
    let custom = sni == Some(CUSTOM);
    let at = |yes: bool, answer: &'static str| if yes { answer } else { "421" };
    // A connection that named nobody reaches the platform only.
    let unnamed = !zone && !custom;
    vec![
        (A.to_owned(), at(zone, "a")),
        (format!("{A}:8443"), at(zone, "a")),
        (A.to_uppercase(), at(zone, "a")),
        (B.to_owned(), at(zone, "b")),
        (UNKNOWN.to_owned(), at(zone, "502")),
        (CUSTOM.to_owned(), at(custom, "custom")),
        (API.to_owned(), at(zone || unnamed, "platform")),
        (ZONE.to_owned(), at(zone || unnamed, "platform")),
        ("localhost".to_owned(), at(zone || unnamed, "platform")),
        ("127.0.0.1:8443".to_owned(), at(zone || unnamed, "platform")),
        ("[::1]:8443".to_owned(), at(zone || unnamed, "platform")),
        (format!("x.{A}"), "421"),
        ("evil.example.org".to_owned(), "421"),
        ("evilsystemprompt.localhost".to_owned(), "421"),
        (format!("{A}."), "400"),
        (format!("user@{A}"), "400"),
        (format!("{A}:"), "400"),
        (format!("{A}:99x"), "400"),
        (format!("{A}/"), "400"),
        ("a_b.systemprompt.localhost".to_owned(), "400"),
        ("-a.systemprompt.localhost".to_owned(), "400"),
        ("10.0.0.1".to_owned(), "400"),
        (format!("{A}, {B}"), "400"),
        (String::new(), "400"),
    ]
}

struct World {
    edge: TestEdge,
    _servers: Vec<Server>,
}

async fn world() -> World {
    let (platform, a, b, custom) = (
        Server::echo("platform").await,
        Server::echo("a").await,
        Server::echo("b").await,
        Server::echo("custom").await,
    );
    let routes = [tenant(A, &a.upstream), tenant(B, &b.upstream), tenant(CUSTOM, &custom.upstream)];
    let edge = TestEdge::start(&platform.upstream, routes, |_| {}).await;
    World { edge, _servers: vec![platform, a, b, custom] }
}

const SNIS: [Option<&str>; 7] = [Some(A), Some(B), Some(API), Some(UNKNOWN), Some(CUSTOM), Some("localhost"), None];

#[tokio::test(flavor = "multi_thread")]
async fn sni_and_host_over_http1() {
    let world = world().await;
    for sni in SNIS {
        for (name, expected) in expectations(sni) {
            let head = format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n");
            let answer = world.edge.raw(sni, head.as_bytes()).await;
            assert_eq!(verdict(answer.status, answer.text()), expected, "SNI {sni:?}, Host {name:?}");
            if expected == "421" {
                assert_eq!(answer.header("x-systemprompt-error"), "misdirected_request");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hosts_of_one_connection_are_judged_one_by_one() {
    use tokio::io::AsyncWriteExt;
    let world = world().await;
    for sni in SNIS {
        let mut stream = world.edge.tls(sni, &[]).await;
        for (name, expected) in expectations(sni) {
            let head = format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.expect("write");
            let answer = Answer::read(&mut stream).await.expect("answer");
            assert_eq!(verdict(answer.status, answer.text()), expected, "SNI {sni:?}, Host {name:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sni_and_authority_over_http2() {
    use http_body_util::BodyExt;
    let world = world().await;
    for sni in SNIS {
        // One connection for all: browsers coalesce, and a connection must not remember a host's rights.
        let mut sender = world.edge.h2(sni).await;
        for (name, expected) in expectations(sni) {
            let Ok(uri) = format!("https://{name}/").parse::<http::Uri>() else { continue };
            if uri.authority().map(ToString::to_string) != Some(name.clone()) {
                continue;
            }
            let mut ask = request(Method::GET, "/", &[]);
            *ask.uri_mut() = uri;
            let response = sender.send_request(ask).await.expect("h2");
            let status = response.status().as_u16();
            let body = response.into_body().collect().await.expect("body").to_bytes();
            let text = std::str::from_utf8(&body).expect("text");
            assert_eq!(verdict(status, text), expected, "SNI {sni:?}, :authority {name:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_host_must_agree_with_the_authority() {
    let world = world().await;
    let mut sender = world.edge.h2(Some(A)).await;
    for (host, expected) in [(B, 400), (A, 200)] {
        let ask = request(Method::GET, &format!("https://{A}/"), &[("host", host)]);
        assert_eq!(sender.send_request(ask).await.expect("h2").status(), expected, "host {host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_without_certificate_gets_no_connection() {
    let world = world().await;
    for name in ["evil.example.org", "a.b.systemprompt.localhost", "x.shop.example.com"] {
        let error = world.edge.try_tls(Some(name), &[]).await.expect_err(name);
        assert!(
            error.to_string().contains("AccessDenied") || error.to_string().contains("UnrecognisedName"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_never_resumed_for_another_name() {
    use rustls::{HandshakeKind, client::ClientSessionMemoryCache, client::Resumption, pki_types::ServerName};
    use std::sync::Arc;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let world = world().await;
    let mut config = client_config(&[]);
    config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(32)));
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let mut kinds = Vec::new();
    for name in [A, A, B] {
        let tcp = tokio::net::TcpStream::connect(world.edge.https).await.expect("connect");
        let server_name = ServerName::try_from(name).expect("name");
        let mut stream = connector.connect(server_name, tcp).await.expect("TLS");
        let head = format!("GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("write");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("read");
        kinds.push(stream.get_ref().1.handshake_kind().expect("handshake"));
    }
    assert_eq!(kinds, [HandshakeKind::Full, HandshakeKind::Resumed, HandshakeKind::Full]);
}

#[tokio::test(flavor = "multi_thread")]
async fn new_certificates_are_used_without_a_restart() {
    use std::sync::Arc;
    let world = world().await;
    assert_eq!(world.edge.get(CUSTOM, "/", "").await.status, 200);
    let without = systemprompt_edge::CertTable::new(certificates().into_iter().take(1).collect()).expect("table");
    world.edge.certs.send_replace(Arc::new(without));
    let begun = std::time::Instant::now();
    while world.edge.try_tls(Some(CUSTOM), &[]).await.is_ok() {
        assert!(begun.elapsed() < DEADLINE, "the old certificate is still served");
    }
    assert_eq!(world.edge.get(A, "/", "").await.status, 200);
}
