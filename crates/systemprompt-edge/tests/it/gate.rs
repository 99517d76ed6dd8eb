//! Properties of the framing gate.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use systemprompt_edge::gate::{Framing, Step};
use tokio::io::AsyncWriteExt;

const HEAD_BYTES: usize = 1024;

/// What the gate makes of a whole connection, cut into pieces.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    heads: u64,
    refused: bool,
    complete: bool,
    passed: Vec<u8>,
}

fn read(bytes: &[u8], cuts: &[usize]) -> Outcome {
    let mut framing = Framing::new(HEAD_BYTES);
    let mut passed = Vec::new();
    let mut rest = bytes;
    for cut in cuts.iter().copied().chain([usize::MAX]) {
        let (mut piece, later) = rest.split_at(cut.min(rest.len()));
        rest = later;
        loop {
            match framing.feed(piece) {
                Step::Pass => passed.extend_from_slice(piece),
                Step::Hold(index) => {
                    // Every upgrade is answered as if it had been refused.
                    passed.extend_from_slice(&piece[..index]);
                    piece = &piece[index..];
                    framing.resume();
                    continue;
                }
                Step::Refuse(index, _) => {
                    passed.extend_from_slice(&piece[..index]);
                    assert!(framing.is_refused());
                    return Outcome { heads: framing.heads(), refused: true, complete: false, passed: Vec::new() };
                }
            }
            break;
        }
    }
    Outcome { heads: framing.heads(), refused: false, complete: framing.is_between_messages(), passed }
}

/// One valid request, with its body.
fn request() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let field = ("[A-Za-z][A-Za-z0-9-]{0,8}", "[ -~]{0,20}").prop_filter("no framing", |(name, _)| {
        !["host", "content-length", "transfer-encoding", "connection", "upgrade", "expect"]
            .contains(&name.to_ascii_lowercase().as_str())
    });
    let fields = prop::collection::vec(field, 0..5);
    let body = prop::option::of((any::<bool>(), prop::collection::vec(any::<u8>(), 1..60), 1..20_usize));
    ("/[a-z0-9/?=&%._-]{0,20}", fields, body).prop_map(|(target, fields, body)| {
        let method = if body.is_some() { "POST" } else { "GET" };
        let mut bytes = format!("{method} {target} HTTP/1.1\r\nHost: a.example.com\r\n").into_bytes();
        for (name, value) in fields {
            bytes.extend(format!("{name}: {value}\r\n").bytes());
        }
        match &body {
            None => bytes.extend(b"\r\n"),
            Some((false, content, _)) => {
                bytes.extend(format!("Content-Length: {}\r\n\r\n", content.len()).bytes());
                bytes.extend(content);
            }
            Some((true, content, size)) => {
                bytes.extend(b"Transfer-Encoding: chunked\r\n\r\n");
                for chunk in content.chunks(*size) {
                    bytes.extend(format!("{:x};e\r\n", chunk.len()).bytes());
                    bytes.extend(chunk);
                    bytes.extend(b"\r\n");
                }
                bytes.extend(b"0\r\nX: y\r\n\r\n");
            }
        }
        (bytes, body.map(|(_, content, _)| content).unwrap_or_default())
    })
}

fn pipeline() -> impl Strategy<Value = Vec<(Vec<u8>, Vec<u8>)>> {
    prop::collection::vec(request(), 1..5)
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0..40_usize, 0..60)
}

/// The bodies hyper reads from a connection, without a gate, and whether it was content with all of it.
fn hyper_reads(bytes: &[u8]) -> (Vec<Bytes>, bool) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("runtime");
    runtime.block_on(async {
        let (mut client, server) = tokio::io::duplex(1024 * 1024);
        client.write_all(bytes).await.expect("fits");
        client.shutdown().await.expect("shutdown");
        let bodies = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&bodies);
        let service = service_fn(move |request: hyper::Request<Incoming>| {
            let seen = Arc::clone(&seen);
            async move {
                let body = request.into_body().collect().await?;
                seen.lock().expect("lock").push(body.to_bytes());
                Ok::<_, hyper::Error>(hyper::Response::new(Full::new(Bytes::new())))
            }
        });
        let content = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(server), service)
            .await
            .is_ok();
        let bodies = std::mem::take(&mut *bodies.lock().expect("lock"));
        (bodies, content)
    })
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000), cuts in cuts()) {
        read(&bytes, &cuts);
    }

    #[test]
    fn cuts_change_nothing(requests in pipeline(), cuts in cuts(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = requests.on_the_wire();
        prop_assert_eq!(read(&bytes, &cuts), read(&bytes, &[]));
        let at = at.index(bytes.len());
        bytes[at] = byte;
        prop_assert_eq!(read(&bytes, &cuts), read(&bytes, &[]));
    }

    #[test]
    fn valid_requests_pass_unchanged(requests in pipeline(), cuts in cuts()) {
        let bytes = requests.on_the_wire();
        let outcome = read(&bytes, &cuts);
        prop_assert_eq!(
            outcome,
            Outcome { heads: requests.len() as u64, refused: false, complete: true, passed: bytes.clone() }
        );
        let (bodies, content) = hyper_reads(&bytes);
        prop_assert!(content);
        let expected: Vec<Bytes> = requests.into_iter().map(|(_, body)| body.into()).collect();
        prop_assert_eq!(bodies, expected);
    }

    /// The gate and hyper agree on where messages end, whatever is changed in the bytes.
    #[test]
    fn hyper_never_sees_more_requests_than_the_gate(
        requests in pipeline(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(b"\r\n\t :;,0159af\0xX-_/".to_vec())), 0..4),
        removals in prop::collection::vec(any::<prop::sample::Index>(), 0..2),
    ) {
        let mut bytes = requests.on_the_wire();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for at in removals {
            bytes.remove(at.index(bytes.len()));
        }
        let wire = bytes.clone();
        let outcome = read(&bytes, &[]);
        prop_assume!(!outcome.refused);
        let (bodies, content) = hyper_reads(&bytes);
        prop_assert!(bodies.len() as u64 <= outcome.heads, "{} of {}", bodies.len(), outcome.heads);
        // After a request of HTTP/1.0 hyper closes and reads no further.
        let closes = wire.windows(8).any(|window| window == b"HTTP/1.0");
        if content && outcome.complete && !closes {
            prop_assert_eq!(bodies.len() as u64, outcome.heads, "{}", String::from_utf8_lossy(&wire).escape_debug());
        }
    }
}

trait Wire {
    fn on_the_wire(&self) -> Vec<u8>;
}

impl Wire for Vec<(Vec<u8>, Vec<u8>)> {
    /// The bytes on the wire, one request after the other.
    fn on_the_wire(&self) -> Vec<u8> {
        self.iter().flat_map(|(bytes, _)| bytes.clone()).collect()
    }
}
