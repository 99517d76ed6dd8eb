//! Bodies pass as they come, in any size, and whoever goes away lets go of the other side.

use crate::harness::*;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::{io::AsyncWriteExt, sync::mpsc};

/// A body fed by a channel.
fn channel() -> (mpsc::UnboundedSender<Bytes>, Body) {
    let (sender, mut receiver) = mpsc::unbounded_channel::<Bytes>();
    let stream = futures_util::stream::poll_fn(move |cx| {
        receiver.poll_recv(cx).map(|bytes| bytes.map(|bytes| Ok::<_, io::Error>(Frame::data(bytes))))
    });
    (sender, BodyExt::boxed(StreamBody::new(stream)))
}

/// A server that streams what the test feeds it.
async fn fed() -> (Server, mpsc::UnboundedSender<Bytes>) {
    let (feed, body) = channel();
    let body = Arc::new(std::sync::Mutex::new(Some(body)));
    let server = Server::tcp(move |_| {
        let body = body.lock().expect("lock").take().expect("one request");
        async { Response::builder().header("content-type", "text/event-stream").body(body).expect("response") }
    })
    .await;
    (server, feed)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_arrives_before_the_last_is_made() {
    for version in ["h1", "h2"] {
        let (server, feed) = fed().await;
        let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
        let mut body: Incoming = if version == "h1" {
            let ask = Request::get("/").header("host", A).body(full("")).expect("request");
            edge.h1(A).await.send_request(ask).await.expect("answer").into_body()
        } else {
            let ask = request(Method::GET, &format!("https://{A}/"), &[]);
            edge.h2(Some(A)).await.send_request(ask).await.expect("answer").into_body()
        };
        for event in ["data: 1\n\n", "data: 2\n\n"] {
            feed.send(Bytes::from_static(event.as_bytes())).expect("feed");
            let frame = tokio::time::timeout(DEADLINE, body.frame()).await.expect("in time");
            assert_eq!(frame.expect("frame").expect("ok").into_data().expect("data"), event, "{version}");
        }
        drop(feed);
        // Over HTTP/2 the end may come as an empty frame.
        assert_eq!(body.collect().await.expect("the end").to_bytes(), "", "{version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_body_arrives_while_it_is_sent() {
    let (seen, mut pieces) = mpsc::unbounded_channel();
    let server = Server::tcp(move |mut request: Request<Incoming>| {
        let seen = seen.clone();
        async move {
            while let Some(Ok(frame)) = request.body_mut().frame().await {
                let _ = seen.send(frame.into_data().expect("data"));
            }
            Response::new(full("done"))
        }
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    let (feed, body) = channel();
    let ask = Request::post("/").header("host", A).body(body).expect("request");
    let mut sender = edge.h1(A).await;
    let answer = tokio::spawn(async move { sender.send_request(ask).await.expect("answer").status() });
    for piece in ["one", "two"] {
        feed.send(Bytes::from_static(piece.as_bytes())).expect("feed");
        let got = tokio::time::timeout(DEADLINE, pieces.recv()).await.expect("in time");
        assert_eq!(got.as_deref(), Some(piece.as_bytes()));
    }
    drop(feed);
    assert_eq!(answer.await.expect("join"), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn sixteen_mebibytes_pass_both_ways() {
    let server = Server::tcp(|request: Request<Incoming>| async {
        let body = request.into_body().map_err(io::Error::other);
        Response::new(BodyExt::boxed(body))
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    let large: Bytes = (0..16 * 1024 * 1024_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let ask = Request::post("/").header("host", A).body(full(large.clone())).expect("request");
    let over_h1 = edge.h1(A).await.send_request(ask).await.expect("h1").into_body();
    let ask = Request::post(format!("https://{A}/")).body(Full::new(large.clone())).expect("request");
    let over_h2 = edge.h2(Some(A)).await.send_request(ask).await.expect("h2").into_body();
    for (version, body) in [("h1", over_h1), ("h2", over_h2)] {
        let back = tokio::time::timeout(DEADLINE, body.collect()).await.expect("in time").expect("body").to_bytes();
        assert!(back == large, "{version}: {} bytes came back", back.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_frees_the_upstream() {
    for whole in [false, true] {
        let (begun, aborted) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (called, flag) = (Arc::clone(&begun), Arc::clone(&aborted));
        let server = Server::tcp(move |mut request: Request<Incoming>| {
            called.store(true, Ordering::SeqCst);
            let flag = SetOnDrop(Arc::clone(&flag));
            async move {
                let _flag = flag;
                while let Some(frame) = request.body_mut().frame().await {
                    if frame.is_err() {
                        return status(StatusCode::BAD_REQUEST);
                    }
                }
                std::future::pending::<Response<Body>>().await
            }
        })
        .await;
        let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
        let mut stream = edge.tls(Some(A), &[]).await;
        let length = if whole { 5 } else { 100 };
        let head = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: {length}\r\n\r\nhello");
        stream.write_all(head.as_bytes()).await.expect("write");
        let (handle, upstream) = (edge.handle.clone(), server.upstream.clone());
        eventually("the claim", || handle.in_flight(&upstream) == 1).await;
        eventually("the app's turn", || begun.load(Ordering::SeqCst)).await;
        drop(stream);
        eventually("the claim ends", || handle.in_flight(&upstream) == 0).await;
        let open = Arc::clone(&server.open);
        eventually("the connection ends", || open.load(Ordering::SeqCst) == 0).await;
        eventually("the app is told", || aborted.load(Ordering::SeqCst)).await;
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_during_the_answer_frees_the_upstream() {
    let (server, feed) = fed().await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    stream.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    let (handle, upstream) = (edge.handle.clone(), server.upstream.clone());
    eventually("the claim", || handle.in_flight(&upstream) == 1).await;
    // Before that the app may never have heard of the request.
    assert_eq!(Answer::read_head(&mut stream).await, 200);
    drop(stream);
    eventually("the claim ends", || {
        let _ = feed.send(Bytes::from_static(b"more"));
        handle.in_flight(&upstream) == 0
    })
    .await;
    eventually("the app is told", || feed.send(Bytes::from_static(b"more")).is_err()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_early_answer_ends_the_exchange_and_its_connection_is_not_used_again() {
    let server = Server::tcp(|request: Request<Incoming>| async move {
        if request.method() == Method::POST { status(StatusCode::FORBIDDEN) } else { Response::new(full("ok")) }
    })
    .await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.workers = 1).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    let head = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: 1000000\r\n\r\nfirst bytes");
    stream.write_all(head.as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut stream).await.expect("answer").status, 403);
    drop(stream);
    for _ in 0..3 {
        assert_eq!(edge.get(A, "/", "").await.text(), "ok");
    }
    assert_eq!(server.accepted.load(Ordering::SeqCst), 2, "one for the POST, one for all the rest");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_an_upstream_are_kept() {
    let server = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| config.workers = 1).await;
    for _ in 0..20 {
        assert_eq!(edge.get(A, "/", "").await.text(), "a");
    }
    assert_eq!(server.accepted.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn kept_connections_age() {
    let server = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| {
        config.limits.upstream_idle = Duration::from_millis(100);
    })
    .await;
    assert_eq!(edge.get(A, "/", "").await.text(), "a");
    let open = Arc::clone(&server.open);
    eventually("the idle connection closes", || open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_connection_that_the_app_closed_costs_no_request() {
    // Closes every connection after one answer, without saying so.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let upstream = systemprompt_edge::Upstream::Tcp(listener.local_addr().expect("address"));
    let server = tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accept");
            tokio::spawn(async move {
                use tokio::io::AsyncReadExt;
                let mut bytes = [0; 4096];
                if stream.read(&mut bytes).await.is_ok_and(|read| read > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
                    // The next request is read and never answered.
                    let _ = stream.read(&mut bytes).await;
                }
            });
        }
    });
    let edge = TestEdge::start(&nobody(), [tenant(A, &upstream)], |config| config.workers = 1).await;
    for _ in 0..20 {
        assert_eq!(edge.get(A, "/", "").await.status, 200, "a GET is sent again");
    }
    assert_eq!(edge.get(A, "/", "").await.status, 200);
    let post = format!("POST / HTTP/1.1\r\nHost: {A}\r\nContent-Length: 2\r\n\r\nhi");
    let answer = edge.raw(Some(A), post.as_bytes()).await;
    assert_eq!(answer.header("x-systemprompt-error"), "app_unreachable", "a POST that began to go out is not");
    server.abort();
}
