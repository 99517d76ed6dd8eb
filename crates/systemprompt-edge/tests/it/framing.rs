//! A corpus of raw HTTP/1.1 messages: each is refused, or forwarded exactly once with the same meaning.

use crate::harness::*;
use bytes::Bytes;
use tokio::io::AsyncWriteExt;

/// What must become of the bytes.
#[derive(Debug, Clone)]
enum Expect {
    /// This status, the connection closed, nothing forwarded.
    Refused(u16),
    /// A refusal after the head was forwarded: the upstream must never see a whole request.
    Broken,
    /// Answered by the edge with this status, nothing forwarded.
    Answered(u16),
    /// Forwarded as these requests, in this order: target and body.
    Forwarded(Vec<(&'static str, &'static str)>),
}

#[allow(clippy::too_many_lines, reason = "a list of cases")]
fn corpus() -> Vec<(String, Expect)> {
    let refused = || Expect::Refused(400);
    let once = |target, body| Expect::Forwarded(vec![(target, body)]);
    let get = |fields: &str| format!("GET /x HTTP/1.1\r\nHost: {A}\r\n{fields}\r\n");
    let post = |fields: &str, body: &str| format!("POST /x HTTP/1.1\r\nHost: {A}\r\n{fields}\r\n{body}");
    let smuggled = format!("GET /smuggled HTTP/1.1\r\nHost: {A}\r\n\r\n");
    let chunked = |body: &str| post("Transfer-Encoding: chunked\r\n", body);
    vec![
        // Plain requests.
        (get(""), once("/x", "")),
        (get("X: y\r\n"), once("/x", "")),
        (get("X:y\r\n"), once("/x", "")),
        (get("X:\r\n"), once("/x", "")),
        (get("X: a\u{e9}b\r\n"), once("/x", "")),
        (get("Content-Length: 0\r\n"), once("/x", "")),
        (get("Expect: 100-continue\r\n"), once("/x", "")),
        (get("Content-Length: 3\r\n").clone() + "abc", once("/x", "abc")),
        (post("Content-Length: 5\r\n", "hello"), once("/x", "hello")),
        (post("content-length:5\r\n", "hello"), once("/x", "hello")),
        (post("Content-Length:  5 \r\n", "hello"), once("/x", "hello")),
        (post("Content-Length: 005\r\n", "hello"), once("/x", "hello")),
        (format!("\r\n{}", get("")), once("/x", "")),
        (format!("get /x HTTP/1.1\r\nHost: {A}\r\n\r\n"), once("/x", "")),
        // Pipelining: each message ends where it says.
        (get("") + &get(""), Expect::Forwarded(vec![("/x", ""), ("/x", "")])),
        (
            post("Content-Length: 5\r\n", "hello") + &chunked("2\r\nhi\r\n0\r\n\r\n") + &get(""),
            Expect::Forwarded(vec![("/x", "hello"), ("/x", "hi"), ("/x", "")]),
        ),
        // A body that looks like a request is a body.
        (
            post(&format!("Content-Length: {}\r\n", smuggled.len()), &smuggled) + &get(""),
            Expect::Forwarded(vec![
                ("/x", "GET /smuggled HTTP/1.1\r\nHost: aaaaaaaaaaaa.systemprompt.localhost\r\n\r\n"),
                ("/x", ""),
            ]),
        ),
        // Content-Length with Transfer-Encoding, in any order.
        (post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", "0\r\n\r\n"), refused()),
        (post("Content-Length: 6\r\nTransfer-Encoding: x\r\n", "0\r\n\r\nG"), refused()),
        // Content-Length: several, unequal, equal, malformed.
        (post("Content-Length: 5\r\nContent-Length: 6\r\n", "hello"), refused()),
        (post("Content-Length: 5\r\nContent-Length: 5\r\n", "hello"), refused()),
        (post("Content-Length: 5, 5\r\n", "hello"), refused()),
        (post("Content-Length: 5,6\r\n", "hello"), refused()),
        (post("Content-Length: +5\r\n", "hello"), refused()),
        (post("Content-Length: -5\r\n", "hello"), refused()),
        (post("Content-Length: 0x5\r\n", "hello"), refused()),
        (post("Content-Length: 5 5\r\n", "hello"), refused()),
        (post("Content-Length: five\r\n", "hello"), refused()),
        (post("Content-Length: 5.0\r\n", "hello"), refused()),
        (post("Content-Length:\r\n", "hello"), refused()),
        (post("Content-Length: 99999999999999999999\r\n", "hello"), refused()),
        (post("Content-Length: \u{b}5\r\n", "hello"), refused()),
        // Transfer-Encoding: anything but one `chunked`.
        (post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked, identity\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: identity\r\n", "hello"), refused()),
        (post("Transfer-Encoding: xchunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunkedx\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: \"chunked\"\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked;q=1\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding:\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: \u{b}chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Transfer-Encoding: \u{e9}chunked\r\n", "0\r\n\r\n"), refused()),
        (post("TRANSFER-ENCODING: CHUNKED\r\n", "2\r\nhi\r\n0\r\n\r\n"), once("/x", "hi")),
        (format!("POST /x HTTP/1.0\r\nHost: {A}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), refused()),
        (
            get("Transfer-Encoding: chunked\r\n") + "2\r\nhi\r\n0\r\n\r\n" + &get(""),
            Expect::Forwarded(vec![("/x", "hi"), ("/x", "")]),
        ),
        (get("Connection: Upgrade\r\nUpgrade: websocket\r\nUpgrade: h2c\r\n"), once("/x", "")),
        (get("Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n"), once("/x", "")),
        // Fields that only look like framing.
        (post("Content_Length: 5\r\n", "hello"), refused()),
        (post("Transfer_Encoding: chunked\r\n", "0\r\n\r\n"), refused()),
        (post("Content-Length : 5\r\n", "hello"), refused()),
        (post("Transfer-Encoding : chunked\r\n", "0\r\n\r\n"), refused()),
        (post(" Content-Length: 5\r\n", "hello"), refused()),
        (post("Content Length: 5\r\n", "hello"), refused()),
        (post("X: y\r\n Content-Length: 5\r\n", "hello"), refused()),
        (post("X: y\r\n\tz\r\n", ""), refused()),
        (post("Transfer-Encoding:\r\n chunked\r\n", "0\r\n\r\n"), refused()),
        (post(": empty\r\n", ""), refused()),
        (post("no colon\r\n", ""), refused()),
        (post("X\0Y: z\r\n", ""), refused()),
        (post("X: y\0z\r\n", ""), refused()),
        (post("X\u{e9}: z\r\n", ""), refused()),
        // Line ends.
        (format!("GET /x HTTP/1.1\nHost: {A}\n\n"), refused()),
        (format!("GET /x HTTP/1.1\r\nHost: {A}\n\r\n"), refused()),
        (format!("GET /x HTTP/1.1\r\nHost: {A}\r\n\n"), refused()),
        (get("X: y\rz\r\n"), refused()),
        (get("X: y\nContent-Length: 5\r\n"), refused()),
        (get("X: y\r\r\n"), refused()),
        (format!("\r\n\r\n\r\n{}", get("")), refused()),
        (format!("\n{}", get("")), refused()),
        // Request lines.
        (format!("GET  /x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x  HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!(" GET /x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x HTTP/1.2\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x HTTP/2.0\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x HTTP/0.9\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x http/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET\t/x\tHTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("G(T /x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x y HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x#frag HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET * HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET {A} HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("CONNECT {A}:443 HTTP/1.1\r\nHost: {A}:443\r\n\r\n"), refused()),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), refused()),
        (format!("OPTIONS * HTTP/1.1\r\nHost: {A}\r\n\r\n"), once("*", "")),
        // Hosts.
        ("GET /x HTTP/1.1\r\n\r\n".to_owned(), refused()),
        (format!("GET /x HTTP/1.1\r\nHost: {A}\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET /x HTTP/1.1\r\nHost: {A}\r\nhost: {B}\r\n\r\n"), refused()),
        (format!("GET https://{A}/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), once("/x", "")),
        (format!("GET http://{A}/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), once("/x", "")),
        (format!("GET https://{B}/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET https://{A}:1/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET https://u@{A}/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        (format!("GET https://{A}/x HTTP/1.1\r\n\r\n"), refused()),
        (format!("GET ftp://{A}/x HTTP/1.1\r\nHost: {A}\r\n\r\n"), refused()),
        ("GET /x HTTP/1.0\r\n\r\n".to_owned(), Expect::Answered(400)),
        (format!("GET /x HTTP/1.0\r\nHost: {A}\r\n\r\n"), once("/x", "")),
        (format!("POST /x HTTP/1.0\r\nHost: {A}\r\nContent-Length: 2\r\n\r\nhi"), once("/x", "hi")),
        // Chunked bodies.
        (chunked("5\r\nhello\r\n0\r\n\r\n"), once("/x", "hello")),
        (chunked("5;ext=1\r\nhello\r\n0\r\n\r\n"), once("/x", "hello")),
        (chunked("0005\r\nhello\r\n0\r\n\r\n"), once("/x", "hello")),
        (chunked("a\r\n0123456789\r\nA\r\n0123456789\r\n0\r\n\r\n"), once("/x", "01234567890123456789")),
        (chunked("5\r\nhello\r\n0\r\nX-Forwarded-For: 6.6.6.6\r\n\r\n"), once("/x", "hello")),
        (chunked("5\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("5\r\nhello\n0\r\n\r\n"), Expect::Broken),
        (chunked("5\r\nhelloXX0\r\n\r\n"), Expect::Broken),
        (chunked("5 \r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked(" 5\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("0x5\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("+5\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("-5\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("g\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("FFFFFFFFFFFFFFFFF\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("10000000000000005\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("5;a\nb\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("5;a\0\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked(&format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300))), Expect::Broken),
        (chunked("5\r\r\nhello\r\n0\r\n\r\n"), Expect::Broken),
        (chunked("5\r\nhello\r\n0\r\nX: y\nZ: z\r\n\r\n"), Expect::Broken),
        (chunked("5\r\nhello\r\n0\r\n folded\r\n\r\n"), Expect::Broken),
        (chunked("5\r\nhello\r\n0\n\n"), Expect::Broken),
        (chunked(&format!("0\r\nX: {}\r\n\r\n", "y".repeat(9000))), Expect::Broken),
        // Upgrades that are not: HTTP goes on, and what follows is HTTP.
        (
            get("Connection: Upgrade\r\nUpgrade: websocket\r\n") + &get(""),
            Expect::Forwarded(vec![("/x", ""), ("/x", "")]),
        ),
        (get("Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AA\r\n"), once("/x", "")),
        (
            post("Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 5\r\n", "hello") + &get(""),
            Expect::Forwarded(vec![("/x", "hello"), ("/x", "")]),
        ),
        (
            get("Connection: Upgrade\r\nUpgrade: websocket\r\n")
                + &post("Content-Length: 1\r\nContent-Length: 2\r\n", "x"),
            Expect::Forwarded(vec![("/x", "")]),
        ),
        // A refusal does not harm what came before it.
        (get("") + &post("Content-Length: 1\r\nContent-Length: 2\r\n", "x"), Expect::Forwarded(vec![("/x", "")])),
        // Heads beyond the limits.
        (get(&format!("X: {}\r\n", "y".repeat(17 * 1024))), Expect::Refused(431)),
        (get(&"X: y\r\n".repeat(101)), Expect::Refused(431)),
        (get(&"X: y\r\n".repeat(600)), Expect::Refused(431)),
    ]
}

fn bytes_of(text: &str) -> Vec<u8> {
    // One `char` of the corpus is one byte on the wire.
    text.chars().map(|c| u8::try_from(u32::from(c)).expect("a byte")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn corpus_in_one_write() {
    run(|bytes| vec![bytes]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn corpus_in_two_writes() {
    run(|bytes| {
        let middle = bytes.len() / 2;
        vec![bytes[..middle].to_vec(), bytes[middle..].to_vec()]
    })
    .await;
}

/// A malformed body may be cut where hyper reads on by itself.
#[tokio::test(flavor = "multi_thread")]
async fn broken_bodies_cut_anywhere() {
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    for (text, expect) in
        corpus().into_iter().filter(|(text, expect)| matches!(expect, Expect::Broken) && text.len() < 200)
    {
        let bytes = bytes_of(&text);
        for cut in text.find("\r\n\r\n").expect("a head")..bytes.len() {
            check(&edge, &a, vec![bytes[..cut].to_vec(), bytes[cut..].to_vec()], &text, expect.clone()).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_head_takes_nothing_from_the_request_before_it() {
    let edge = TestEdge::start(&nobody(), [tenant(A, &nobody())], |_| {}).await;
    let mut stream = edge.tls(Some(A), &[]).await;
    let get = format!("GET / HTTP/1.1\r\nHost: {A}\r\n");
    stream.write_all(format!("{get}\r\n{get}Host: {A}\r\n\r\n").as_bytes()).await.expect("write");
    let answers = Answer::read_all(&mut stream).await;
    let seen: Vec<_> = answers.iter().map(|answer| (answer.status, answer.header("x-systemprompt-error"))).collect();
    assert_eq!(seen, [(502, "app_unreachable"), (400, "bad_request")]);
}

async fn run(split: impl Fn(Vec<u8>) -> Vec<Vec<u8>>) {
    let corpus = corpus();
    assert!(corpus.len() >= 60);
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    for (text, expect) in corpus {
        check(&edge, &a, split(bytes_of(&text)), &text, expect).await;
    }
}

async fn check(edge: &TestEdge, upstream: &Server, pieces: Vec<Vec<u8>>, text: &str, expect: Expect) {
    let shown: String = text.chars().take(200).collect();
    let mut stream = edge.tls(Some(A), &[]).await;
    for piece in pieces {
        // The edge may have closed before the second piece.
        let _ = stream.write_all(&piece).await;
        let _ = stream.flush().await;
        tokio::task::yield_now().await;
    }
    match expect {
        Expect::Refused(status) => {
            let answer = Answer::read(&mut stream).await.unwrap_or_else(|| panic!("no answer: {shown:?}"));
            assert_eq!(answer.status, status, "{shown:?}");
            answer.explains();
            assert!(is_closed(&mut stream).await, "left open: {shown:?}");
            assert_eq!(upstream.take(), [], "forwarded: {shown:?}");
        }
        Expect::Broken => {
            let answer = Answer::read(&mut stream).await;
            let answer = answer.unwrap_or_else(|| panic!("no answer: {shown:?}"));
            assert!(matches!(answer.status, 400 | 431), "{answer:?} for {shown:?}");
            answer.explains();
            assert!(is_closed(&mut stream).await, "left open: {shown:?}");
            assert_eq!(upstream.take(), [], "forwarded whole: {shown:?}");
        }
        Expect::Answered(status) => {
            let answer = Answer::read(&mut stream).await.expect("answer");
            assert_eq!(answer.status, status, "{shown:?}");
            assert_eq!(upstream.take(), [], "forwarded: {shown:?}");
        }
        Expect::Forwarded(expected) => {
            let mut all: Vec<Seen> = Vec::new();
            let begun = std::time::Instant::now();
            while all.len() < expected.len() {
                all.extend(upstream.take());
                assert!(begun.elapsed() < DEADLINE, "{} of {} seen: {shown:?}", all.len(), expected.len());
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
            let answer = Answer::read(&mut stream).await.expect("answer");
            assert_eq!(answer.status, 200, "{shown:?}");
            // Nothing more may come out of the same bytes, even when the connection ends.
            stream.shutdown().await.ok();
            assert!(is_closed(&mut stream).await);
            all.extend(upstream.take());
            let got: Vec<(&str, Bytes)> = all.iter().map(|seen| (seen.target.as_str(), seen.body.clone())).collect();
            let want: Vec<(&str, Bytes)> =
                expected.iter().map(|(target, body)| (*target, Bytes::from_static(body.as_bytes()))).collect();
            assert_eq!(got, want, "{shown:?}");
            for seen in &all {
                assert_eq!(seen.field("host"), Some(A), "{shown:?}");
                assert_eq!(seen.field("x-forwarded-for"), Some("127.0.0.1"), "{shown:?}");
                assert!(seen.field("upgrade").is_none_or(|protocol| protocol == "websocket"), "{shown:?}");
                let framed = [seen.field("content-length"), seen.field("transfer-encoding")];
                assert!(framed.iter().flatten().count() <= 1, "framed twice: {seen:?}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_http2_request_is_refused() {
    // Connection-specific fields (RFC 9113, 8.2.2) and bad targets; hyper's client would not send them,
    // so the frames are written by hand.
    let a = Server::echo("a").await;
    let edge = TestEdge::start(&nobody(), [tenant(A, &a.upstream)], |_| {}).await;
    for (fields, expected) in [
        (vec![], Some(200)),
        (vec![("te", "trailers")], Some(200)),
        (vec![("connection", "close")], None),
        (vec![("transfer-encoding", "chunked")], None),
        (vec![("upgrade", "websocket")], None),
        (vec![("keep-alive", "x")], None),
        (vec![("proxy-connection", "x")], None),
        (vec![("te", "gzip")], None),
        (vec![("x", "a\r\nb: c")], None),
        (vec![("x", "a\0b")], None),
        (vec![("x\r\ny", "a")], None),
        (vec![("X-Upper", "a")], None),
        (vec![("content-length", "5")], None),
        (vec![("content_length", "5")], Some(400)),
        (vec![("transfer_encoding", "chunked")], Some(400)),
        (vec![(":path", "/y")], None),
        (vec![("host", B)], Some(400)),
        (vec![("host", A)], Some(200)),
    ] {
        let got = raw_h2(&edge, &fields).await;
        assert_eq!(got, expected, "{fields:?}");
        assert_eq!(a.take().len(), usize::from(expected == Some(200)), "{fields:?}");
    }
}

/// Sends one HEADERS frame with literal fields and returns the status, or `None` for a reset stream or a
/// closed connection.
async fn raw_h2(edge: &TestEdge, fields: &[(&str, &str)]) -> Option<u16> {
    use tokio::io::AsyncReadExt;
    let mut stream = edge.tls(Some(A), &["h2"]).await;
    let mut bytes = H2_PREFACE.to_vec();
    bytes.extend(h2_frame(1, 0x5, 1, &h2_get(fields)));
    stream.write_all(&bytes).await.expect("write");
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.ok()?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        stream.read_exact(&mut payload).await.ok()?;
        match head[3] {
            1 => return Some(status_of(&payload)),
            3 | 7 => return None,
            _ => {}
        }
    }
}

/// The status of a response's field block: from the static table (RFC 7541, appendix A), or a literal.
fn status_of(block: &[u8]) -> u16 {
    match block[0] {
        0x88 => 200,
        0x8c => 400,
        0x8d => 404,
        // `:status` with a literal value, Huffman coded or not: only 400 and 200 are told apart above.
        other => u16::from(other),
    }
}
