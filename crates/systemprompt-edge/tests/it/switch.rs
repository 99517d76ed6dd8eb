//! Routes change under load, and no request notices.

use crate::harness::*;
use http::{Method, Response};
use http_body_util::BodyExt;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::task::JoinSet;

const SWITCHES: usize = 50;
const PER_SECOND: u64 = 200;

async fn release() -> Server {
    Server::tcp(|_| async {
        // Long enough for a switch to fall into many requests.
        tokio::time::sleep(Duration::from_millis(10)).await;
        Response::new(full("ok"))
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_routes_switch() {
    let mut live = release().await;
    let edge = Arc::new(TestEdge::start(&nobody(), [tenant(A, &live.upstream)], |_| {}).await);
    let done = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn(open_loop(Arc::clone(&edge), Arc::clone(&done)));
    for _ in 0..SWITCHES {
        let next = release().await;
        let generation = edge.publish([tenant(A, &next.upstream)]);
        tokio::time::timeout(DEADLINE, edge.handle.wait_generation(generation)).await.expect("workers follow");
        assert!(edge.handle.serving_generation() >= generation);
        eventually("the old release is idle", || edge.handle.in_flight(&live.upstream) == 0).await;
        // Stops the old one at once, with whatever connections are still open.
        live = next;
        // Requests in between run on the new one only.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    done.store(true, Ordering::SeqCst);
    let (sent, failed) = load.await.expect("load");
    assert_eq!(failed, 0, "of {sent}");
    assert!(sent > 100, "{sent} sent");
}

/// Sends at fixed times, whatever comes back, over four kept connections of both versions.
async fn open_loop(edge: Arc<TestEdge>, done: Arc<AtomicBool>) -> (usize, usize) {
    let failed = Arc::new(AtomicUsize::new(0));
    let mut requests = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(1000 / PER_SECOND));
    let h2 = edge.h2(Some(A)).await;
    let mut sent = 0;
    while !done.load(Ordering::SeqCst) {
        ticks.tick().await;
        sent += 1;
        let (edge, mut h2, failed) = (Arc::clone(&edge), h2.clone(), Arc::clone(&failed));
        requests.spawn(async move {
            let status = if sent % 2 == 0 {
                edge.get(A, "/", "Connection: close\r\n").await.status
            } else {
                let ask = request(Method::GET, &format!("https://{A}/"), &[]);
                let response = h2.send_request(ask).await.expect("h2");
                let status = response.status().as_u16();
                response.into_body().collect().await.map_or(0, |_| status)
            };
            if status != 200 {
                failed.fetch_add(1, Ordering::SeqCst);
            }
        });
    }
    requests.join_all().await;
    (sent, failed.load(Ordering::SeqCst))
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_an_upstream_without_route_are_dropped() {
    let (old, new) = (Server::echo("old").await, Server::echo("new").await);
    let edge = TestEdge::start(&nobody(), [tenant(A, &old.upstream)], |_| {}).await;
    for _ in 0..4 {
        assert_eq!(edge.get(A, "/", "").await.text(), "old");
    }
    assert!(old.open.load(Ordering::SeqCst) > 0, "connections are kept");
    let generation = edge.publish([tenant(A, &new.upstream)]);
    edge.handle.wait_generation(generation).await;
    assert_eq!(edge.get(A, "/", "").await.text(), "new");
    eventually("the old connections close", || old.open.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_in_flight_ends_on_the_release_it_began_on() {
    let gate = Arc::new(tokio::sync::Notify::new());
    let wait = Arc::clone(&gate);
    let old = Server::tcp(move |_| {
        let wait = Arc::clone(&wait);
        async move {
            wait.notified().await;
            Response::new(full("old"))
        }
    })
    .await;
    let new = Server::echo("new").await;
    let edge = Arc::new(TestEdge::start(&nobody(), [tenant(A, &old.upstream)], |_| {}).await);
    let client = Arc::clone(&edge);
    let slow = tokio::spawn(async move { client.get(A, "/", "").await });
    eventually("the claim", || edge.handle.in_flight(&old.upstream) == 1).await;
    let generation = edge.publish([tenant(A, &new.upstream)]);
    edge.handle.wait_generation(generation).await;
    assert_eq!(edge.get(A, "/", "").await.text(), "new");
    assert_eq!(edge.handle.in_flight(&old.upstream), 1, "still counted");
    gate.notify_one();
    assert_eq!(slow.await.expect("join").text(), "old");
    eventually("the claim ends", || edge.handle.in_flight(&old.upstream) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_workers_follow_too() {
    let edge = TestEdge::start(&nobody(), [], |config| config.workers = 4).await;
    assert_eq!(edge.handle.serving_generation(), 1);
    for _ in 0..20 {
        let generation = edge.publish([]);
        tokio::time::timeout(DEADLINE, edge.handle.wait_generation(generation)).await.expect("in time");
    }
    assert_eq!(edge.handle.serving_generation(), 21);
}
