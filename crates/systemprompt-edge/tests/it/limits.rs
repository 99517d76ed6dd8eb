//! Clients and apps that misbehave meet a bound.

use crate::harness::*;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use std::{sync::atomic::Ordering, time::Duration};
use systemprompt_edge::Why;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

const SHORT: Duration = Duration::from_millis(200);

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_head_is_cut() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |config| config.limits.head_timeout = SHORT).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    // A request before it: the time counts for each head anew.
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 200);
    let drip = async {
        for byte in format!("GET / HTTP/1.1\r\nHost: {A}\r\nX-Slow: {}", "y".repeat(10_000)).bytes() {
            if stream.write_all(&[byte]).await.is_err() || stream.flush().await.is_err() {
                return;
            }
            let mut end = [0; 1];
            if matches!(timeout(Duration::from_millis(5), stream.read(&mut end)).await, Ok(Ok(0) | Err(_))) {
                return;
            }
        }
        panic!("ten thousand bytes, one after the other, were taken");
    };
    timeout(DEADLINE, drip).await.expect("cut in time");
    assert_eq!(a.take().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endless_head_is_431() {
    let edge = TestEdge::start(&nobody(), [], |_| {}).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n").as_bytes()).await.expect("write");
    let mut sent = 0;
    while sent < 4 * 1024 * 1024 {
        if stream.write_all(b"X-Endless: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n").await.is_err() {
            break;
        }
        sent += 60;
        if sent > 64 * 1024 {
            break;
        }
    }
    let answer = Answer::read(&mut stream).await.expect("answer");
    assert_eq!((answer.status, answer.header("x-systemprompt-error")), (431, "header_too_large"));
    answer.explains();
    assert!(is_closed(&mut stream).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_handshake_ends_and_others_are_served_meanwhile() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |config| {
        config.limits.handshake_timeout = SHORT;
        config.limits.handshakes = 4;
        config.workers = 1;
    })
    .await;
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(edge.https).await.expect("connect"));
    }
    assert_eq!(edge.get(A, "/", "").await.status, 200);
    for mut stream in silent {
        assert!(is_closed(&mut stream).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_close() {
    let edge = TestEdge::start(&nobody(), [], |config| config.limits.idle = SHORT).await;
    let mut over_h1 = edge.tls(Some(A), &[]).await;
    assert!(is_closed(&mut over_h1).await, "h1");
    let h2 = edge.h2(Some(A)).await;
    eventually("h2 closes", || h2.is_closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_reads_nothing_is_cut() {
    let server = Server::tcp(|_| async { Response::new(full(vec![0; 32 * 1024 * 1024])) }).await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.limits.write_stall = SHORT).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    // The claim itself may be over before anybody looks.
    eventually("the app's turn", || server.accepted.load(Ordering::SeqCst) == 1).await;
    eventually("the claim ends", || edge.handle.in_flight(&server.upstream) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_beyond_the_limit_is_413() {
    let (a, platform) = (Server::echo("a").await, Server::echo("platform").await);
    let edge =
        TestEdge::start(&platform.upstream, [tenant(A, &a.upstream)], |config| config.limits.body_bytes = 10).await;
    let post = |name: &str, path: &str, framing: &str, body: &str| {
        format!("POST {path} HTTP/1.1\r\nHost: {name}\r\n{framing}\r\n\r\n{body}")
    };
    let announced = "Content-Length: 11";
    let chunked = "Transfer-Encoding: chunked";
    let registry = "registry.systemprompt.localhost";
    for (name, path, framing, body, expected) in [
        (A, "/", announced, "01234567890", 413),
        (A, "/", chunked, "b\r\n01234567890\r\n0\r\n\r\n", 413),
        (A, "/", "Content-Length: 10", "0123456789", 200),
        (registry, "/api/v1/x", announced, "01234567890", 413),
        (registry, "/v2/x/blobs/uploads/", announced, "01234567890", 200),
    ] {
        let answer = edge.raw(Some(name), post(name, path, framing, body).as_bytes()).await;
        assert_eq!(answer.status, expected, "{name} {path} {framing}");
    }
    assert_eq!(a.take().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_trickles_is_408() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |config| config.limits.body_grace = SHORT).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    let head = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: 100\r\n\r\nfirst");
    stream.write_all(head.as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 408);
    assert_eq!(a.take(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_begin_is_504() {
    let server = Server::tcp(|_| std::future::pending()).await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.limits.response_timeout = SHORT)
            .await;
    let answer = edge.get(A, "/", "").await;
    assert_eq!((answer.status, answer.header("x-systemprompt-error")), (504, "app_timeout"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_upload_is_no_late_answer() {
    let a = Server::echo("a").await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |config| config.limits.response_timeout = SHORT).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    stream
        .write_all(format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: 16\r\n\r\n").as_bytes())
        .await
        .expect("write");
    for _ in 0..16 {
        stream.write_all(b"x").await.expect("write");
        tokio::time::sleep(SHORT / 4).await;
    }
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 200);
    assert_eq!(a.take()[0].body.len(), 16);
}

/// Answers as soon as it has a head, and neither reads on nor closes.
async fn answers_early_and_stops() -> (systemprompt_edge::Upstream, tokio::task::JoinHandle<()>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let upstream = systemprompt_edge::Upstream::Tcp(listener.local_addr().expect("address"));
    let server = tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.expect("accept");
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 2\r\n\r\nno").await;
            open.push(stream);
        }
    });
    (upstream, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_end_of_the_body_arrives() {
    let closes = Server::tcp(|_| async { status(http::StatusCode::METHOD_NOT_ALLOWED) }).await;
    let (stops, stopped) = answers_early_and_stops().await;
    let body = vec![b'x'; 4 * 1024 * 1024];
    for (what, route, expected) in [
        ("an app that closes", tenant(A, &closes.upstream), 405),
        ("an app that reads no more", tenant(A, &stops), 405),
        ("the edge itself", unavailable(A, Why::AwaitingDeploy), 503),
    ] {
        let edge = TestEdge::start(&nobody(), [route], |_| {}).await;
        let mut stream = edge.tls(Some(A), &[]).await;
        let head = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: {}\r\n\r\n", body.len());
        // A client that looks for an answer only once it has sent everything, twice on one connection.
        for turn in 1..=2 {
            let sent = async {
                stream.write_all(head.as_bytes()).await?;
                stream.write_all(&body).await?;
                stream.flush().await
            };
            timeout(DEADLINE, sent).await.expect("taken").unwrap_or_else(|error| panic!("{what}, {turn}: {error}"));
            assert_eq!(Answer::read(&mut stream).await.expect(what).status, expected, "{what}, {turn}");
        }
        let ask = Request::post(format!("https://{A}/")).body(Full::new(Bytes::from(body.clone()))).expect("request");
        let answer = edge.h2(Some(A)).await.send_request(ask).await.expect(what);
        assert_eq!(answer.status(), expected, "{what}");
        answer.into_body().collect().await.expect(what);
    }
    eventually("nothing is left of it", || closes.open.load(Ordering::SeqCst) == 0).await;
    stopped.abort();
}

/// Without a length only the connection's end says where an answer ends, and this end does not.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_an_app_that_breaks_off_is_not_whole() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let upstream = systemprompt_edge::Upstream::Tcp(listener.local_addr().expect("address"));
    let (break_off, broken) = tokio::sync::oneshot::channel::<()>();
    let app = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("accept");
        let _ = stream.read(&mut [0; 1024]).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\nhalf").await.expect("write");
        broken.await.expect("the word to break off");
        // With all of the body unread: a reset.
    });
    let edge = TestEdge::start(&nobody(), [tenant(A, &upstream)], |_| {}).await;
    let body = Full::new(Bytes::from(vec![b'x'; 4 * 1024 * 1024]));
    let ask = Request::post(format!("https://{A}/")).body(body).expect("request");
    let mut answer = edge.h2(Some(A)).await.send_request(ask).await.expect("an answer");
    let half = answer.body_mut().frame().await.expect("a frame").expect("the first half");
    assert_eq!(half.into_data().expect("data"), "half");
    break_off.send(()).expect("the app waits");
    app.await.expect("no panic");
    let rest = timeout(DEADLINE, answer.into_body().collect()).await.expect("an end");
    rest.expect_err("the answer is not whole");
}

/// The app must not take a half for the whole.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_an_http2_client_breaks_off_is_not_whole() {
    let (ended, mut ends) = tokio::sync::mpsc::unbounded_channel();
    let server = Server::tcp(move |request: Request<Incoming>| {
        let ended = ended.clone();
        async move {
            let body = request.into_body().collect().await;
            ended.send(body.map(http_body_util::Collected::to_bytes).ok()).expect("somebody waits");
            Response::new(full("taken"))
        }
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    for reason in [0, 8] {
        let mut stream = edge.tls(Some(A), &["h2"]).await;
        let begun = [H2_PREFACE, &h2_frame(1, 4, 1, &h2_get(&[]))].concat();
        stream.write_all(&begun).await.expect("write");
        let (handle, upstream) = (edge.handle.clone(), server.upstream.clone());
        eventually("the claim", || handle.in_flight(&upstream) == 1).await;
        // RST_STREAM with NO_ERROR or CANCEL right behind DATA.
        let rest = [h2_frame(0, 0, 1, b"half"), h2_frame(3, 0, 1, &[0, 0, 0, reason])].concat();
        stream.write_all(&rest).await.expect("write");
        let end = timeout(DEADLINE, ends.recv()).await.expect("in time").expect("an end");
        assert_eq!(end, None, "reason {reason}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_waits_to_be_asked_is_not_asked_for_in_vain() {
    let edge = TestEdge::start(&nobody(), [unavailable(A, Why::AwaitingDeploy)], |_| {}).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    let head = format!("POST / HTTP/1.1\r\nHost: {A}\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n");
    stream.write_all(head.as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 503);
    assert!(is_closed(&mut stream).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_does_not_speak_http_is_502() {
    for answer in [&b""[..], b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
        let upstream = systemprompt_edge::Upstream::Tcp(listener.local_addr().expect("address"));
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.expect("accept");
                let mut bytes = [0; 1024];
                let _ = stream.read(&mut bytes).await;
                let _ = stream.write_all(answer).await;
            }
        });
        let edge = TestEdge::start(&nobody(), [tenant(A, &upstream)], |_| {}).await;
        let got = edge.get(A, "/", "").await;
        assert_eq!((got.status, got.header("x-systemprompt-error")), (502, "app_unreachable"), "{answer:?}");
        server.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_stream_of_the_app_is_not_idle() {
    // Longer silent than every limit on the client's side.
    let server = Server::tcp(|_: Request<Incoming>| async {
        tokio::time::sleep(SHORT * 3).await;
        Response::new(full("slow"))
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| {
        config.limits.idle = SHORT;
        config.limits.head_timeout = SHORT;
        config.limits.write_stall = SHORT;
    })
    .await;
    assert_eq!(edge.get(A, "/", "").await.text(), "slow");
    let ask = Request::post(format!("https://{A}/")).body(Full::new(Bytes::from("x"))).expect("request");
    let body = edge.h2(Some(A)).await.send_request(ask).await.expect("h2").into_body();
    assert_eq!(body.collect().await.expect("body").to_bytes(), "slow");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_behind_a_request_does_not_hurry_its_answer() {
    let server = Server::tcp(|_: Request<Incoming>| async {
        tokio::time::sleep(SHORT * 3).await;
        Response::new(full("slow"))
    })
    .await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.limits.head_timeout = SHORT).await;
    for behind in ["\r\n", "GET / HT"] {
        let mut stream = edge.tls(Some(A), &[]).await;
        let post = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: 2\r\n\r\nhi{behind}");
        stream.write_all(post.as_bytes()).await.expect("write");
        assert_eq!(Answer::read(&mut stream).await.expect("answer").text(), "slow", "{behind:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_that_takes_nothing_is_reset() {
    let server = Server::tcp(|request: Request<Incoming>| async move {
        Response::new(full(if request.method() == http::Method::GET { vec![b'x'; 1024 * 1024] } else { Vec::new() }))
    })
    .await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.limits.write_stall = SHORT).await;
    let mut stream = edge.tls(Some(A), &["h2"]).await;
    // SETTINGS_INITIAL_WINDOW_SIZE (4) of nothing.
    let no_window = h2_frame(4, 0, 0, &[0, 4, 0, 0, 0, 0]);
    stream.write_all(&[H2_PREFACE, &no_window, &h2_frame(1, 5, 1, &h2_get(&[]))].concat()).await.expect("write");
    let (handle, upstream) = (edge.handle.clone(), server.upstream.clone());
    eventually("the app's turn", || server.accepted.load(Ordering::SeqCst) == 1).await;
    let reset = async {
        loop {
            let mut head = [0; 9];
            stream.read_exact(&mut head).await.expect("frames");
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            stream.read_exact(&mut vec![0; length]).await.expect("payload");
            if (head[3], head[8]) == (3, 1) {
                return;
            }
        }
    };
    timeout(DEADLINE, reset).await.expect("reset in time");
    eventually("the claim ends", || handle.in_flight(&upstream) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_that_takes_little_is_left_alone() {
    let server = Server::tcp(|_: Request<Incoming>| async { Response::new(full(vec![b'x'; 600 * 1024])) }).await;
    let edge =
        TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.limits.write_stall = SHORT).await;
    let ask = request(http::Method::GET, &format!("https://{A}/"), &[]);
    let mut body = edge.h2(Some(A)).await.send_request(ask).await.expect("answer").into_body();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        length += frame.expect("a frame").into_data().map_or(0, |data| data.len());
        tokio::time::sleep(SHORT / 10).await;
    }
    assert_eq!(length, 600 * 1024);
}

/// Its name, what comes before it, and its n-th repetition.
type Flood = (&'static str, Vec<u8>, Box<dyn Fn(u32) -> Vec<u8> + Send>);

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_http2_frames_are_cut_and_others_are_served_meanwhile() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |config| config.workers = 1).await;
    let get = h2_get(&[]);
    let repeated = |frame: Vec<u8>| move |_: u32| frame.clone();
    let floods: Vec<Flood> = vec![
        ("PING", vec![], Box::new(repeated(h2_frame(6, 0, 0, &[0; 8])))),
        ("SETTINGS", vec![], Box::new(repeated(h2_frame(4, 0, 0, &[])))),
        ("PRIORITY", vec![], Box::new(repeated(h2_frame(2, 0, 1, &[0, 0, 0, 3, 1])))),
        ("WINDOW_UPDATE", vec![], Box::new(repeated(h2_frame(8, 0, 0, &[0, 0, 0, 1])))),
        ("empty DATA", h2_frame(1, 4, 1, &get), Box::new(repeated(h2_frame(0, 0, 1, &[])))),
        ("CONTINUATION", h2_frame(1, 0, 1, &get), Box::new(repeated(h2_frame(9, 0, 1, &[])))),
        (
            "rapid reset",
            vec![],
            Box::new(move |number| {
                let stream = 2 * number + 1;
                [h2_frame(1, 5, stream, &h2_get(&[])), h2_frame(3, 0, stream, &[0, 0, 0, 8])].concat()
            }),
        ),
    ];
    for (what, begin, frame) in floods {
        let mut stream = edge.tls(Some(A), &["h2"]).await;
        stream.write_all(&[H2_PREFACE, &begin].concat()).await.expect("write");
        let (mut read, mut write) = tokio::io::split(stream);
        let sink = tokio::spawn(async move { tokio::io::copy(&mut read, &mut tokio::io::sink()).await });
        let mut sent = 0;
        while sent < 20_000 && write.write_all(&frame(sent)).await.is_ok() && write.flush().await.is_ok() {
            sent += 1;
            if sent % 500 == 0 {
                assert_eq!(edge.get(A, "/", "").await.status, 200, "{what}");
            }
        }
        assert!(sent < 20_000, "{what} was never stopped");
        timeout(DEADLINE, sink).await.expect("closed in time").expect("join").ok();
    }
}
