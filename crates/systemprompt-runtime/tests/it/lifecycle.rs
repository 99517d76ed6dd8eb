use crate::tenant::{SOON, Tenant, cluster, config, database_name, http, refusal};
use std::{net::TcpListener, time::Duration};
use systemprompt_runtime::{RuntimeError, serve};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_util::sync::CancellationToken;

/// A request that was accepted before the stop and whose head is not complete yet.
async fn begun(tenant: &Tenant) -> TcpStream {
    let mut stream = TcpStream::connect(tenant.address).await.expect("connected");
    stream.write_all(b"GET / HTTP/1.1\r\nHost: t\r\n").await.expect("sent");
    // An answer on another connection: the first was accepted before it.
    http().get(tenant.url("/")).send().await.expect("an answer");
    stream
}

#[tokio::test]
async fn a_stop_finishes_what_was_begun_and_accepts_no_more() {
    let (_cluster, url) = cluster().await;
    let big = vec![b'x'; 8 * 1024 * 1024];
    let tenant = Tenant::start(&url).await;
    std::fs::write(tenant.web.path().join("dist/big.bin"), &big).expect("written");
    // In flight: the head came, the body waits for its reader.
    let mut answer = http().get(tenant.url("/big.bin")).send().await.expect("an answer");
    let mut count = answer.chunk().await.expect("read").expect("a chunk").len();
    tenant.stop.cancel();
    let deadline = tokio::time::Instant::now() + SOON;
    while TcpStream::connect(tenant.address).await.is_ok() {
        assert!(tokio::time::Instant::now() < deadline, "it still accepts");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(!tenant.served.is_finished(), "it waits for what is in flight");
    while let Some(chunk) = answer.chunk().await.expect("read") {
        count += chunk.len();
    }
    assert_eq!(count, big.len());
    tokio::time::timeout(SOON, tenant.served).await.expect("in time").expect("no panic").expect("a clean end");
}

#[tokio::test]
async fn a_request_that_never_ends_is_cut_after_the_drain_time() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start_with(&url, |config| systemprompt_runtime::RuntimeConfig {
        drain: Duration::from_millis(300),
        ..config
    })
    .await;
    let mut stream = begun(&tenant).await;
    tenant.end().await.expect("a clean end");
    let read = tokio::time::timeout(SOON, stream.read(&mut [0; 16])).await.expect("in time");
    assert_eq!(read.unwrap_or(0), 0, "closed");
}

#[tokio::test]
async fn a_connection_serves_many_requests_and_only_http_1() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let two = "GET / HTTP/1.1\r\nHost: t\r\n\r\nGET /style.css HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n";
    let answer = tenant.raw(two).await;
    assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 2, "{answer}");
    let h2 = tenant.raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(!h2.contains("200 OK"), "{h2}");
}

#[tokio::test]
async fn nothing_listens_before_the_database_answers() {
    let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("bound").port();
    let web = tempfile::tempdir().expect("a directory");
    let config = systemprompt_runtime::RuntimeConfig {
        port,
        ..config("postgres://r:hunter2@localhost/x?host=/no/such/directory", web.path())
    };
    let stop = CancellationToken::new();
    let served = tokio::spawn(serve(config, stop.clone()));
    for _ in 0..10 {
        assert!(TcpStream::connect(("127.0.0.1", port)).await.is_err(), "nothing listens");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!served.is_finished(), "it goes on trying");
    stop.cancel();
    tokio::time::timeout(SOON, served).await.expect("in time").expect("no panic").expect("stopped is no failure");
}

#[tokio::test]
async fn a_refused_role_or_a_taken_port_is_said_at_once() {
    let (cluster, url) = cluster().await;
    let web = tempfile::tempdir().expect("a directory");
    let other = url.replace(&database_name(&url), "no_such_database");
    let error = refusal(config(&other, web.path())).await;
    assert!(matches!(error, RuntimeError::Database(_)), "{error:?}");
    assert!(error.to_string().contains("check the role, the password and the database"), "{error}");
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("bound").port();
    let config = systemprompt_runtime::RuntimeConfig { port, ..config(&url, web.path()) };
    let error = refusal(config).await;
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}")), "{error}");
    drop(cluster);
}
