//! The access log: one line for each request, whoever answers it.

use crate::harness::*;
use std::{
    io,
    sync::{Arc, Mutex},
};
use tokio::io::AsyncWriteExt;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("lock").extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// What was logged under the target `access` for a host: slug and status, in order.
    fn of(&self, host: &str) -> Vec<(String, u64)> {
        let text = String::from_utf8(self.0.lock().expect("lock").clone()).expect("text");
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).expect("a line of JSON"))
            .filter(|line| line["target"] == "access" && line["fields"]["host"] == host)
            .map(|line| {
                let fields = &line["fields"];
                assert!(fields["duration_ms"].as_f64().is_some_and(|duration| duration >= 0.0), "{line}");
                assert_eq!(fields["request_id"].as_str().map(str::len), Some(36), "{line}");
                let slug = fields["tenant.slug"].as_str().expect("slug");
                (slug.to_owned(), fields["status"].as_u64().expect("status"))
            })
            .collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_request_has_its_line() {
    let lines = Lines::default();
    let writer = lines.clone();
    // For the whole process, since the workers are threads of their own; other tests only write more lines.
    tracing_subscriber::fmt()
        .json()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .try_init()
        .expect("the only subscriber");
    let (a, api, unknown) =
        (Server::echo("a").await, "api.systemprompt.localhost", "ffffffffffff.systemprompt.localhost");
    let stuck = Server::tcp(|_| std::future::pending()).await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream), tenant(B, &stuck.upstream)], |_| {}).await;
    for name in [A, A, api, unknown] {
        edge.get(name, "/", "").await;
    }
    let mut gone = edge.tls(Some(B), &[]).await;
    gone.write_all(format!("GET / HTTP/1.1\r\nHost: {B}\r\n\r\n").as_bytes()).await.expect("write");
    eventually("the claim", || edge.handle.in_flight(&stuck.upstream) == 1).await;
    drop(gone);
    let line = |slug: &str, status| (slug.to_owned(), status);
    for (name, expected) in [
        (A, vec![line("aaaaaaaaaaaa", 200), line("aaaaaaaaaaaa", 200)]),
        (B, vec![line("bbbbbbbbbbbb", 499)]),
        (api, vec![line("", 503)]),
        (unknown, vec![line("", 502)]),
    ] {
        eventually(name, || lines.of(name).len() >= expected.len()).await;
        assert_eq!(lines.of(name), expected, "{name}");
    }
}
