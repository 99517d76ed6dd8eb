//! Upgraded connections: the bytes of both sides, and nothing else.

use crate::harness::*;
use http::{Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::time::{Duration, Instant};
use systemprompt_edge::{EdgeConfig, Upstream};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

/// Accepts every upgrade and echoes bytes.
async fn echo() -> Server {
    Server::tcp(|mut request| async move {
        if !request.headers().contains_key("upgrade") {
            return Response::new(full("plain"));
        }
        assert_eq!(request.headers()["connection"], "upgrade");
        assert_eq!(request.headers()["sec-websocket-key"], "k");
        let upgraded = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let Ok(upgraded) = upgraded.await else { return };
            let (mut read, mut write) = tokio::io::split(TokioIo::new(upgraded));
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
        let mut response = status(StatusCode::SWITCHING_PROTOCOLS);
        for (name, value) in [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", "v")] {
            response.headers_mut().insert(name, value.parse().expect("value"));
        }
        response
    })
    .await
}

async fn edge(server: &Server, change: impl FnOnce(&mut EdgeConfig)) -> TestEdge {
    TestEdge::start(&nobody(), [tenant(A, &server.upstream)], change).await
}

fn handshake() -> String {
    format!(
        "GET /ws HTTP/1.1\r\nHost: {A}\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: k\r\n\r\n"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_carries_bytes_both_ways() {
    let server = echo().await;
    let edge = edge(&server, |_| {}).await;
    let mut stream = edge.tls(Some(A), &["http/1.1"]).await;
    stream.write_all(handshake().as_bytes()).await.expect("write");
    let answer = Answer::read(&mut stream).await.expect("answer");
    assert_eq!((answer.status, answer.header("upgrade"), answer.header("connection")), (101, "websocket", "upgrade"));
    assert_eq!(answer.header("sec-websocket-accept"), "v");
    // Bytes that would be a forbidden request are just bytes now.
    for message in [&b"\x81\x05hello"[..], b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\n\n\0"] {
        stream.write_all(message).await.expect("write");
        let mut back = vec![0; message.len()];
        stream.read_exact(&mut back).await.expect("read");
        assert_eq!(back, message);
    }
    assert_eq!(edge.handle.in_flight(&server.upstream), 1, "a tunnel holds its upstream");
    stream.shutdown().await.expect("shutdown");
    assert!(is_closed(&mut stream).await);
    eventually("the tunnel ends", || edge.handle.in_flight(&server.upstream) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_sent_before_the_answer_are_kept_for_it() {
    let server = echo().await;
    let edge = edge(&server, |_| {}).await;
    let mut stream = edge.tls(Some(A), &["http/1.1"]).await;
    stream.write_all((handshake() + "\0eager").as_bytes()).await.expect("write");
    assert_eq!(Answer::read_head(&mut stream).await, 101);
    let mut back = [0; 6];
    stream.read_exact(&mut back).await.expect("read");
    assert_eq!(&back, b"\0eager");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_tunnel_ends() {
    let server = echo().await;
    let edge = edge(&server, |config| config.limits.tunnel_idle = Duration::from_millis(100)).await;
    let mut stream = edge.tls(Some(A), &["http/1.1"]).await;
    stream.write_all(handshake().as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 101);
    assert!(is_closed(&mut stream).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_without_its_app_ends_when_something_is_said() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let upstream = Upstream::Tcp(listener.local_addr().expect("address"));
    let app = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        assert!(stream.read(&mut [0; 1024]).await.expect("a head") > 0);
        let agreed = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        stream.write_all(agreed).await.expect("write");
    });
    let edge = TestEdge::start(&nobody(), [tenant(A, &upstream)], |_| {}).await;
    let mut stream = edge.tls(Some(A), &["http/1.1"]).await;
    stream.write_all(handshake().as_bytes()).await.expect("write");
    assert_eq!(Answer::read_head(&mut stream).await, 101);
    app.await.expect("the app has left");
    // A client that does not look whether anybody is there.
    let deadline = Instant::now() + DEADLINE;
    while edge.handle.in_flight(&upstream) > 0 {
        assert!(Instant::now() < deadline, "the tunnel goes on");
        let _ = stream.write_all(b".").await;
        let _ = stream.flush().await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_over_http2_is_an_ordinary_request() {
    let server = echo().await;
    let edge = edge(&server, |_| {}).await;
    let ask = request(http::Method::GET, &format!("https://{A}/ws"), &[("sec-websocket-key", "k")]);
    let response = edge.h2(Some(A)).await.send_request(ask).await.expect("h2");
    assert_eq!(response.status(), 200);
}
