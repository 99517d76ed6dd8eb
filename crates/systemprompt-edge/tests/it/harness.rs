//! An edge with certificates of a throw-away CA, upstreams, and clients.

use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{CertificateParams, DnType, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, ServerName};
use std::{
    convert::Infallible,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use systemprompt_contract::{Hostname, Secret, TenantSlug, Zone};
use systemprompt_edge::{
    CertTable, Certificate, DrainReport, Edge, EdgeConfig, EdgeHandle, Limits, Route, RouteTable, Upstream, Why,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;

pub(crate) const ZONE: &str = "systemprompt.localhost";
/// Two tenants of the zone, and one that has a domain of its own.
pub(crate) const A: &str = "aaaaaaaaaaaa.systemprompt.localhost";
pub(crate) const B: &str = "bbbbbbbbbbbb.systemprompt.localhost";
pub(crate) const CUSTOM: &str = "shop.example.com";
/// Long enough for a loaded machine; only failures wait for it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// The certificates all tests share: making keys takes time.
struct Pki {
    ca: CertificateDer<'static>,
    wildcard: Certificate,
    custom: Certificate,
}

static PKI: LazyLock<Pki> = LazyLock::new(|| {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let key = KeyPair::generate().expect("CA key");
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "edge tests");
    let ca = params.self_signed(&key).expect("CA").der().clone();
    let issuer = Issuer::new(params, key);
    let names = ["*.systemprompt.localhost", ZONE, "localhost"];
    let mut wildcard = issue(&issuer, &names, &[IpAddr::V4(Ipv4Addr::LOCALHOST)]);
    wildcard.hosts = names.map(|name| name.parse().expect("pattern")).to_vec();
    Pki { ca, wildcard, custom: issue(&issuer, &[CUSTOM], &[]) }
});

fn issue(issuer: &Issuer<'_, KeyPair>, names: &[&str], addresses: &[IpAddr]) -> Certificate {
    let key = KeyPair::generate().expect("key");
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names.clone()).expect("names");
    params.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    let leaf = params.signed_by(&key, issuer).expect("leaf");
    Certificate {
        hosts: names.iter().map(|name| name.parse().expect("pattern")).collect(),
        chain_pem: leaf.pem(),
        key_pem: Secret::new(key.serialize_pem()),
    }
}

pub(crate) fn certificates() -> Vec<Certificate> {
    vec![PKI.wildcard.clone(), PKI.custom.clone()]
}

pub(crate) fn host(name: &str) -> Hostname {
    name.parse().expect("host")
}

pub(crate) fn slug(name: &str) -> TenantSlug {
    match name.split('.').next().expect("label").parse() {
        Ok(slug) => slug,
        Err(_) => "cccccccccccc".parse().expect("slug"),
    }
}

pub(crate) fn tenant(name: &str, upstream: &Upstream) -> (Hostname, Option<Route>) {
    (host(name), Some(Route::Tenant { slug: slug(name), upstream: upstream.clone() }))
}

pub(crate) fn unavailable(name: &str, why: Why) -> (Hostname, Option<Route>) {
    (host(name), Some(Route::Unavailable { slug: slug(name), why }))
}

/// A running edge. Dropping it stops it at once.
pub(crate) struct TestEdge {
    pub(crate) https: SocketAddr,
    pub(crate) http: SocketAddr,
    pub(crate) handle: EdgeHandle,
    pub(crate) routes: watch::Sender<Arc<RouteTable>>,
    pub(crate) certs: watch::Sender<Arc<CertTable>>,
    pub(crate) stop: CancellationToken,
    pub(crate) done: JoinHandle<DrainReport>,
}

impl Drop for TestEdge {
    fn drop(&mut self) {
        self.done.abort();
    }
}

pub(crate) fn config(platform: &Upstream) -> EdgeConfig {
    let loopback = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    EdgeConfig {
        https: vec![loopback],
        http: vec![loopback],
        public_https_port: 0,
        zone: Zone::default(),
        workers: 2,
        platform: platform.clone(),
        drain: Duration::from_secs(10),
        hold: Duration::from_secs(10),
        limits: Limits::default(),
    }
}

impl TestEdge {
    /// An edge whose platform is `platform`, with a changed configuration and these routes.
    pub(crate) async fn start(
        platform: &Upstream,
        routes: impl IntoIterator<Item = (Hostname, Option<Route>)>,
        change: impl FnOnce(&mut EdgeConfig),
    ) -> Self {
        let mut config = config(platform);
        change(&mut config);
        let (routes, routes_feed) = watch::channel(Arc::new(RouteTable::new().apply(1, routes)));
        let (certs, certs_feed) = watch::channel(Arc::new(CertTable::new(certificates()).expect("certificates")));
        let bound = Edge::new(config, routes_feed, certs_feed).bind().await.expect("bind");
        let stop = CancellationToken::new();
        Self {
            https: bound.https_addr(),
            http: bound.http_addr().expect("http"),
            handle: bound.handle(),
            routes,
            certs,
            stop: stop.clone(),
            done: tokio::spawn(bound.serve(stop)),
        }
    }

    /// Publishes changes and returns their generation, without waiting for the workers.
    pub(crate) fn publish(&self, changes: impl IntoIterator<Item = (Hostname, Option<Route>)>) -> u64 {
        let table = Arc::clone(&self.routes.borrow());
        let generation = table.generation() + 1;
        self.routes.send_replace(Arc::new(table.apply(generation, changes)));
        generation
    }

    /// A TLS connection; `sni` `None` names the address, which sends no SNI.
    pub(crate) async fn tls(&self, sni: Option<&str>, alpn: &[&str]) -> TlsStream<TcpStream> {
        self.try_tls(sni, alpn).await.expect("TLS")
    }

    pub(crate) async fn try_tls(&self, sni: Option<&str>, alpn: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.https).await?;
        tcp.set_nodelay(true)?;
        let name = match sni {
            Some(name) => ServerName::try_from(name.to_owned()).expect("server name"),
            None => ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into()),
        };
        TlsConnector::from(Arc::new(client_config(alpn))).connect(name, tcp).await
    }

    /// One HTTP/1.1 exchange of raw bytes on a connection of its own.
    pub(crate) async fn raw(&self, sni: Option<&str>, bytes: &[u8]) -> Answer {
        let mut stream = self.tls(sni, &[]).await;
        stream.write_all(bytes).await.expect("write");
        Answer::read(&mut stream).await.expect("an answer")
    }

    /// One GET on a connection of its own.
    pub(crate) async fn get(&self, name: &str, path: &str, fields: &str) -> Answer {
        let head = format!("GET {path} HTTP/1.1\r\nHost: {name}\r\n{fields}\r\n");
        self.raw(Some(name), head.as_bytes()).await
    }

    /// An HTTP/2 client.
    pub(crate) async fn h2(&self, sni: Option<&str>) -> hyper::client::conn::http2::SendRequest<Full<Bytes>> {
        let stream = self.tls(sni, &["h2"]).await;
        let (sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("h2");
        tokio::spawn(connection);
        sender
    }

    /// An HTTP/1.1 client of hyper.
    pub(crate) async fn h1(
        &self,
        name: &str,
    ) -> hyper::client::conn::http1::SendRequest<BoxBody<Bytes, std::io::Error>> {
        let stream = self.tls(Some(name), &["http/1.1"]).await;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("h1");
        tokio::spawn(connection.with_upgrades());
        sender
    }
}

pub(crate) fn client_config(alpn: &[&str]) -> rustls::ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(PKI.ca.clone()).expect("root");
    let mut config = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

/// An answer read from a raw connection.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    /// Reads one answer; `None` when the connection ends before its head is whole.
    pub(crate) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Self> {
        timeout(DEADLINE, Self::read_unbounded(stream)).await.expect("an answer in time")
    }

    async fn read_unbounded(stream: &mut (impl AsyncRead + Unpin)) -> Option<Self> {
        let mut bytes = Vec::new();
        let (status, headers, start) = loop {
            if let Some(head) = parse_head(&bytes) {
                break head;
            }
            if !read_more(stream, &mut bytes).await {
                return None;
            }
        };
        let mut body = bytes.split_off(start);
        if headers.get("transfer-encoding").is_some_and(|value| value == "chunked") {
            while !body.ends_with(b"0\r\n\r\n") && read_more(stream, &mut body).await {}
            body = unchunk(&body);
        } else if let Some(length) = headers.get("content-length") {
            let length: usize = length.to_str().expect("text").parse().expect("length");
            while body.len() < length && read_more(stream, &mut body).await {}
        }
        Some(Self { status, headers, body: body.into() })
    }

    /// Reads all answers up to the end of the connection; they have lengths.
    pub(crate) async fn read_all(stream: &mut (impl AsyncRead + Unpin)) -> Vec<Self> {
        let mut bytes = Vec::new();
        timeout(DEADLINE, async { while read_more(stream, &mut bytes).await {} }).await.expect("the end in time");
        let mut answers = Vec::new();
        while let Some((status, headers, start)) = parse_head(&bytes) {
            let length = headers["content-length"].to_str().expect("text").parse::<usize>().expect("length");
            let body = Bytes::copy_from_slice(&bytes[start..start + length]);
            bytes.drain(..start + length);
            answers.push(Self { status, headers, body });
        }
        answers
    }

    /// Reads exactly the head of an answer, byte by byte, so that nothing behind it is lost.
    pub(crate) async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> u16 {
        let mut bytes = Vec::new();
        while !bytes.ends_with(b"\r\n\r\n") {
            bytes.push(timeout(DEADLINE, stream.read_u8()).await.expect("in time").expect("a byte"));
        }
        parse_head(&bytes).expect("a head").0
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).expect("text")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// An answer of the edge's own says what is wrong, what to do, and under which id the log has it.
    pub(crate) fn explains(&self) {
        let error = &self.json()["error"];
        for field in ["code", "message", "hint"] {
            assert!(!error[field].as_str().unwrap_or_default().is_empty(), "{self:?}");
        }
        assert_eq!(error["request_id"], self.header("x-request-id"), "{self:?}");
        assert_eq!(self.header("x-systemprompt-error"), error["code"], "{self:?}");
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().expect("text"))
    }
}

fn parse_head(bytes: &[u8]) -> Option<(u16, HeaderMap, usize)> {
    let mut slots = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut slots);
    let httparse::Status::Complete(end) = response.parse(bytes).expect("a response head") else { return None };
    let headers = response
        .headers
        .iter()
        .map(|field| {
            (
                field.name.parse::<http::HeaderName>().expect("name"),
                http::HeaderValue::from_bytes(field.value).expect("value"),
            )
        })
        .collect();
    Some((response.code.expect("status"), headers, end))
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).expect("size"), 16).expect("size");
        if size == 0 {
            break;
        }
        body.extend_from_slice(&bytes[end + 2..end + 2 + size]);
        bytes = &bytes[end + 2 + size + 2..];
    }
    body
}

async fn read_more(stream: &mut (impl AsyncRead + Unpin), bytes: &mut Vec<u8>) -> bool {
    matches!(stream.read_buf(bytes).await, Ok(1..))
}

/// Whether the peer closes the connection before the deadline.
pub(crate) async fn is_closed(stream: &mut (impl AsyncRead + Unpin)) -> bool {
    let mut rest = Vec::new();
    timeout(DEADLINE, stream.read_to_end(&mut rest)).await.is_ok()
}

/// Waits until a condition holds.
pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let begun = std::time::Instant::now();
    while !condition() {
        assert!(begun.elapsed() < DEADLINE, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What an upstream saw of one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Bytes,
}

impl Seen {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        let mut values = self.fields.iter().filter(|(have, _)| have == name).map(|(_, value)| value.as_str());
        let first = values.next();
        assert_eq!(values.next(), None, "{name} came twice: {self:?}");
        first
    }
}

/// An HTTP server behind the edge. Dropping it closes it and all its connections.
pub(crate) struct Server {
    pub(crate) upstream: Upstream,
    /// Connections ever accepted.
    pub(crate) accepted: Arc<AtomicUsize>,
    /// Connections open now.
    pub(crate) open: Arc<AtomicUsize>,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) type Body = BoxBody<Bytes, std::io::Error>;

pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

impl Server {
    /// A server that collects every request into `seen` and answers 200 with its name.
    pub(crate) async fn echo(name: &'static str) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = Arc::clone(&seen);
        let mut server = Self::tcp(move |request: Request<Incoming>| {
            let record = Arc::clone(&record);
            async move {
                let (head, body) = request.into_parts();
                let Ok(body) = body.collect().await else {
                    return status(StatusCode::BAD_REQUEST);
                };
                let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
                record.lock().expect("lock").push(Seen {
                    method: head.method.to_string(),
                    target: head.uri.to_string(),
                    fields: head.headers.iter().map(|(name, value)| (name.to_string(), text(value))).collect(),
                    body: body.to_bytes(),
                });
                Response::new(full(name))
            }
        })
        .await;
        server.seen = seen;
        server
    }

    pub(crate) async fn tcp<F>(answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bind");
        let upstream = Upstream::Tcp(listener.local_addr().expect("address"));
        Self::run(upstream, listener, answer)
    }

    pub(crate) fn unix<F>(
        path: &std::path::Path,
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = UnixListener::bind(path).expect("bind");
        Self::run(Upstream::Unix(path.to_owned()), listener, answer)
    }

    fn run<F>(
        upstream: Upstream,
        listener: impl Accept,
        answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Response<Body>> + Send + 'static,
    {
        let accepted = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(AtomicUsize::new(0));
        let (count, opened) = (Arc::clone(&accepted), Arc::clone(&open));
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let stream = listener.accept().await;
                count.fetch_add(1, Ordering::SeqCst);
                let guard = OpenGuard::new(&opened);
                let answer = answer.clone();
                connections.spawn(async move {
                    let _guard = guard;
                    let service = service_fn(move |request| {
                        let answer = answer(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .with_upgrades()
                        .await;
                });
            }
        });
        Self { upstream, accepted, open, seen: Arc::default(), task }
    }

    /// The requests seen so far, oldest first.
    pub(crate) fn take(&self) -> Vec<Seen> {
        std::mem::take(&mut self.seen.lock().expect("lock"))
    }
}

struct OpenGuard(Arc<AtomicUsize>);

impl OpenGuard {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(open))
    }
}

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

trait Accept: Send + 'static {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    fn accept(&self) -> impl Future<Output = Self::Stream> + Send;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    async fn accept(&self) -> TcpStream {
        self.accept().await.expect("accept").0
    }
}

impl Accept for UnixListener {
    type Stream = tokio::net::UnixStream;
    async fn accept(&self) -> Self::Stream {
        self.accept().await.expect("accept").0
    }
}

pub(crate) fn status(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(full(""));
    *response.status_mut() = status;
    response
}

/// An address where nothing listens.
pub(crate) fn nobody() -> Upstream {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
    Upstream::Tcp(listener.local_addr().expect("address"))
}

pub(crate) fn request(method: Method, uri: &str, fields: &[(&str, &str)]) -> Request<Full<Bytes>> {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).expect("request")
}

/// What an HTTP/2 client sends first: the preface and empty SETTINGS.
pub(crate) const H2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// An HTTP/2 frame (RFC 9113, 4.1).
pub(crate) fn h2_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = vec![0, length[0], length[1], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

/// The field block of `GET /x` for tenant [`A`] with more fields: literals without indexing, new names,
/// no Huffman (RFC 7541, 6.2.2).
pub(crate) fn h2_get(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    let pseudo = [(":method", "GET"), (":scheme", "https"), (":path", "/x"), (":authority", A)];
    for (name, value) in pseudo.iter().chain(fields) {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).expect("short"));
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}
