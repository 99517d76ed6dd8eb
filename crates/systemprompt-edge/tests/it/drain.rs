//! The stop: what is open finishes, what does not is cut.

use crate::harness::*;
use http::{Method, Response};
use http_body_util::BodyExt;
use std::{sync::Arc, time::Duration};
use systemprompt_edge::DrainReport;
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Notify};

/// Answers when told.
async fn slow() -> (Server, Arc<Notify>) {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let server = Server::tcp(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            Response::new(full("late"))
        }
    })
    .await;
    (server, gate)
}

async fn report(edge: &mut TestEdge) -> DrainReport {
    tokio::time::timeout(DEADLINE, &mut edge.done).await.expect("in time").expect("join")
}

#[tokio::test(flavor = "multi_thread")]
async fn open_requests_finish_and_idle_connections_close() {
    let (server, gate) = slow().await;
    let mut edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    let mut idle = edge.tls(Some(A), &[]).await;
    idle.write_all(format!("GET / HTTP/1.1\r\nHost: {B}\r\n\r\n").as_bytes()).await.expect("write");
    assert_eq!(Answer::read(&mut idle).await.expect("answer").status, 502);
    let mut over_h1 = edge.tls(Some(A), &[]).await;
    over_h1.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    let mut h2 = edge.h2(Some(A)).await;
    let over_h2 = tokio::spawn(h2.send_request(request(Method::GET, &format!("https://{A}/"), &[])));
    eventually("both claims", || edge.handle.in_flight(&server.upstream) == 2).await;

    edge.stop.cancel();
    assert!(is_closed(&mut idle).await, "an idle connection closes at once");
    let begun = std::time::Instant::now();
    while h2.send_request(request(Method::GET, &format!("https://{B}/"), &[])).await.is_ok() {
        assert!(begun.elapsed() < DEADLINE, "h2 still takes requests");
    }
    while TcpStream::connect(edge.https).await.is_ok() {
        assert!(begun.elapsed() < DEADLINE, "still accepting");
    }
    assert!(!edge.done.is_finished(), "open requests are waited for");

    gate.notify_waiters();
    let answer = Answer::read(&mut over_h1).await.expect("answer");
    assert_eq!((answer.status, answer.text()), (200, "late"));
    assert!(is_closed(&mut over_h1).await, "the connection closes after its answer");
    let body = over_h2.await.expect("join").expect("h2").into_body().collect().await.expect("body").to_bytes();
    assert_eq!(body, "late");
    assert_eq!(report(&mut edge).await, DrainReport { finished: 3, cut: 0 });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_finish_is_cut() {
    let (server, _gate) = slow().await;
    let mut edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |config| {
        config.drain = Duration::from_millis(100);
    })
    .await;
    let mut stuck = edge.tls(Some(A), &[]).await;
    stuck.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    eventually("the claim", || edge.handle.in_flight(&server.upstream) == 1).await;
    edge.stop.cancel();
    assert_eq!(report(&mut edge).await, DrainReport { finished: 0, cut: 1 });
    assert!(is_closed(&mut stuck).await);
    assert_eq!(edge.handle.in_flight(&server.upstream), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_edge_lets_go_of_everything() {
    let (server, _gate) = slow().await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &server.upstream)], |_| {}).await;
    let mut stuck = edge.tls(Some(A), &[]).await;
    stuck.write_all(format!("GET / HTTP/1.1\r\nHost: {A}\r\n\r\n").as_bytes()).await.expect("write");
    eventually("the claim", || edge.handle.in_flight(&server.upstream) == 1).await;
    let address = edge.https;
    drop(edge);
    assert!(is_closed(&mut stuck).await);
    let begun = std::time::Instant::now();
    while TcpStream::connect(address).await.is_ok() {
        assert!(begun.elapsed() < DEADLINE, "still listening");
    }
}
