//! One worker: a thread with a runtime, listeners, connections and an upstream pool of its own.

use crate::{
    answer::{Accept, Problem, answer},
    bind::Purpose,
    certs::CertTable,
    config::EdgeConfig,
    connection::{Connection, Connections, Registered, Verdict},
    edge::{DrainReport, EdgeHandle},
    exchange::Activity,
    flood::Metered,
    gate::{FIELD_SLOTS, Gate, Refused},
    pool::Pool,
    redirect::redirect,
    routes::RouteTable,
    service::Client,
    stream::Watched,
    tls::Sni,
    unread::Streams,
    upload::Upload,
    upstream::BUFFER_BYTES,
};
use arc_swap::ArcSwap;
use http::{HeaderValue, header::CONNECTION};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    task::Poll,
    time::{Duration, Instant},
};
use systemprompt_contract::RequestId;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// What a worker's connections share.
pub(crate) struct Worker {
    pub(crate) config: Arc<EdgeConfig>,
    pub(crate) pool: Pool,
    pub(crate) connections: Arc<Connections>,
    routes: ArcSwap<RouteTable>,
    /// Carries the generation of `routes`; wakes held requests.
    generation: watch::Sender<u64>,
    held: AtomicUsize,
    ids: Mutex<Ids>,
    certs: Arc<ArcSwap<CertTable>>,
    tls: Arc<rustls::ServerConfig>,
    redirect_port: u16,
    handshakes: Arc<Semaphore>,
}

/// What a worker is made of.
pub(crate) struct Parts {
    pub(crate) config: Arc<EdgeConfig>,
    pub(crate) routes: Arc<RouteTable>,
    pub(crate) certs: Arc<ArcSwap<CertTable>>,
    pub(crate) tls: Arc<rustls::ServerConfig>,
    pub(crate) redirect_port: u16,
}

impl Worker {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { config, routes, certs, tls, redirect_port } = parts;
        Self {
            pool: Pool::new(&config.limits),
            connections: Arc::default(),
            generation: watch::Sender::new(routes.generation()),
            routes: ArcSwap::new(routes),
            held: AtomicUsize::new(0),
            ids: Mutex::new(Ids { bytes: [0; 1024], used: 1024 }),
            certs,
            tls,
            redirect_port,
            handshakes: Arc::new(Semaphore::new(config.limits.handshakes.max(1))),
            config,
        }
    }

    pub(crate) fn routes(&self) -> arc_swap::Guard<Arc<RouteTable>> {
        self.routes.load()
    }

    /// Sees every route table this worker loads from now on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    pub(crate) fn generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// A place among the requests that wait for a route, if one is free.
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Held> {
        if self.held.load(Relaxed) >= self.config.limits.held {
            return None;
        }
        self.held.fetch_add(1, Relaxed);
        Some(Held(Arc::clone(self)))
    }

    pub(crate) fn request_id(&self) -> RequestId {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).next()
    }

    fn load(&self, table: Arc<RouteTable>) {
        self.pool.retain(|upstream| *upstream == self.config.platform || table.uses(upstream));
        let generation = table.generation();
        self.routes.store(table);
        self.generation.send_replace(generation);
    }
}

/// See [`Worker::hold`].
pub(crate) struct Held(Arc<Worker>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Relaxed);
    }
}

/// Random ids without a system call for each.
struct Ids {
    bytes: [u8; 1024],
    used: usize,
}

impl Ids {
    fn next(&mut self) -> RequestId {
        if self.used == self.bytes.len() {
            getrandom::fill(&mut self.bytes).expect("Linux gives random bytes to every process");
            self.used = 0;
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.bytes[self.used..self.used + 16]);
        self.used += 16;
        RequestId::from_uuid(uuid::Builder::from_random_bytes(bytes).into_uuid())
    }
}

/// What a worker needs to run besides its shared part.
pub(crate) struct Seat {
    pub(crate) worker: Arc<Worker>,
    pub(crate) listeners: Vec<(Purpose, std::net::TcpListener)>,
    pub(crate) routes: watch::Receiver<Arc<RouteTable>>,
    pub(crate) handle: EdgeHandle,
    pub(crate) stop: CancellationToken,
    /// Set when nobody waits for the end any more: no drain then.
    pub(crate) abandon: CancellationToken,
}

/// Runs one worker on the current thread until the stop and the drain after it.
pub(crate) fn run(seat: Seat) -> io::Result<DrainReport> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(work(seat));
    // Tasks that are left belong to connections that were cut.
    runtime.shutdown_background();
    report
}

async fn work(seat: Seat) -> io::Result<DrainReport> {
    let Seat { worker, listeners, mut routes, handle, stop, abandon } = seat;
    let accepting = CancellationToken::new();
    for (purpose, listener) in listeners {
        let listener = TcpListener::from_std(listener)?;
        tokio::spawn(accept(Arc::clone(&worker), purpose, listener, accepting.clone()));
    }
    tokio::spawn(sweep(Arc::clone(&worker)));
    let follower = Arc::clone(&worker);
    tokio::spawn(async move {
        loop {
            let table = Arc::clone(&routes.borrow_and_update());
            if table.generation() != follower.generation() || !Arc::ptr_eq(&table, &follower.routes()) {
                follower.load(table);
            }
            handle.loaded();
            if routes.changed().await.is_err() {
                return;
            }
        }
    });
    stop.cancelled().await;
    accepting.cancel();
    Ok(tokio::select! {
        report = drain(&worker) => report,
        () = abandon.cancelled() => DrainReport { finished: 0, cut: worker.connections.count() },
    })
}

async fn drain(worker: &Worker) -> DrainReport {
    let open = worker.connections.count();
    worker.connections.tell_all(Verdict::Close);
    let _ = timeout(worker.config.drain, worker.connections.all_ended()).await;
    let cut = worker.connections.count();
    worker.connections.tell_all(Verdict::Cut);
    // The tasks need one turn each to fall.
    let _ = timeout(Duration::from_secs(1), worker.connections.all_ended()).await;
    DrainReport { finished: open.saturating_sub(cut), cut }
}

/// Ends what has waited for too long, a few times within the shortest of the limits.
async fn sweep(worker: Arc<Worker>) {
    let limits = &worker.config.limits;
    let shortest = limits
        .head_timeout
        .min(limits.idle)
        .min(limits.write_stall)
        .min(limits.upstream_idle)
        .min(limits.response_timeout);
    let tick = (shortest / 4).clamp(Duration::from_millis(10), Duration::from_secs(1));
    let sweeps = Pool::sweeps(limits.upstream_idle, tick);
    let patience = Pool::sweeps(limits.response_timeout, tick);
    let begun = Instant::now();
    loop {
        tokio::time::sleep(tick).await;
        worker.connections.sweep(begun.elapsed(), limits);
        worker.pool.sweep(sweeps, patience);
    }
}

async fn accept(worker: Arc<Worker>, purpose: Purpose, listener: TcpListener, stop: CancellationToken) {
    let forever = async {
        loop {
            worker.connections.room(worker.config.limits.connections).await;
            let Ok(permit) = Arc::clone(&worker.handshakes).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, address)) => {
                    let place = worker.connections.enter();
                    let worker = Arc::clone(&worker);
                    tokio::spawn(async move {
                        let handshake = match purpose {
                            Purpose::Https => open(&worker, &place, stream, address).await,
                            Purpose::Http => Some(Opened::Clear(Watched::new(stream, Arc::clone(&place.connection)))),
                        };
                        drop(permit);
                        if let Some(opened) = handshake {
                            opened.serve(worker, place, address.ip()).await;
                        }
                    });
                }
                Err(error) => {
                    // Out of descriptors, most likely; connections that end give some back.
                    tracing::warn!(%error, "cannot accept connections");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    tokio::select! {
        // First: a connection that is accepted after the stop would not hear of it.
        biased;
        () = stop.cancelled() => {}
        () = forever => {}
    }
}

type TlsStream = tokio_rustls::server::TlsStream<Watched<TcpStream>>;

/// A connection that is ready for HTTP.
enum Opened {
    Clear(Watched<TcpStream>),
    Tls(Box<TlsStream>),
}

async fn open(worker: &Worker, place: &Registered, stream: TcpStream, address: SocketAddr) -> Option<Opened> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, client = %address, "connection lost");
        return None;
    }
    let stream = Watched::new(stream, Arc::clone(&place.connection));
    // A handshake has a timeout of its own: the sweep must not take it for an idle connection.
    let _busy = Activity::begin(&place.connection);
    let handshake =
        timeout(worker.config.limits.handshake_timeout, TlsAcceptor::from(Arc::clone(&worker.tls)).accept(stream));
    tokio::select! {
        done = handshake => match done {
            Ok(Ok(stream)) => return Some(Opened::Tls(Box::new(stream))),
            Ok(Err(error)) => tracing::debug!(%error, client = %address, "TLS handshake failed"),
            Err(_) => tracing::debug!(client = %address, "TLS handshake took too long"),
        },
        () = place.connection.told_to_close() => {}
    }
    None
}

impl Opened {
    async fn serve(self, worker: Arc<Worker>, place: Registered, client: IpAddr) {
        let stream = match self {
            Self::Clear(stream) => return serve_redirects(&worker, &place.connection, stream).await,
            Self::Tls(stream) => stream,
        };
        let session = stream.get_ref().1;
        let sni = Sni::parse(session.server_name());
        let is_h2 = session.alpn_protocol() == Some(b"h2");
        let Some(served) = worker.certs.load().for_sni(&sni).cloned() else {
            // The certificate was withdrawn during the handshake.
            return;
        };
        let connection = Arc::clone(&place.connection);
        let client = Arc::new(Client::new(Arc::clone(&worker), Arc::clone(&connection), client, sni, served));
        let limits = &worker.config.limits;
        let result = if is_h2 {
            let io = TokioIo::new(Metered::new(*stream, limits.h2_idle_frames, Arc::clone(&connection)));
            let service = service_fn(move |request| Arc::clone(&client).serve(request));
            let mut connected = std::pin::pin!(h2_builder(&worker.config).serve_connection(io, service));
            drive(&connection, connected.as_mut(), http2::Connection::graceful_shutdown).await
        } else {
            let io = TokioIo::new(Gate::new(*stream, Arc::clone(&connection), limits.head_bytes));
            let service = service_fn(move |request| Arc::clone(&client).serve(request));
            let mut connected =
                std::pin::pin!(h1_builder(&worker.config).serve_connection(io, service).with_upgrades());
            drive(&connection, connected.as_mut(), http1::UpgradeableConnection::graceful_shutdown).await
        };
        if let Some(Err(error)) = result {
            tracing::debug!(%error, "client connection ended");
        }
    }
}

async fn serve_redirects(worker: &Arc<Worker>, connection: &Arc<Connection>, stream: Watched<TcpStream>) {
    let io = TokioIo::new(Gate::new(stream, Arc::clone(connection), worker.config.limits.head_bytes));
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let (request, body) = request.into_parts();
        drop(Upload::new(body, &request));
        let redirected = match connection.refusal(Refused::Head) {
            Some(refusal) => Err(Problem::Refused(refusal)),
            None => redirect(&request.uri, &request.headers, &worker.certs.load(), worker.redirect_port),
        };
        connection.answered();
        let mut response = redirected
            .unwrap_or_else(|problem| answer(problem, &Accept::header(&request.headers), worker.request_id()));
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        std::future::ready(Ok::<_, Infallible>(response))
    });
    let mut connected = std::pin::pin!(h1_builder(&worker.config).serve_connection(io, service));
    if let Some(Err(error)) = drive(connection, connected.as_mut(), http1::Connection::graceful_shutdown).await {
        tracing::debug!(%error, "client connection ended");
    }
}

/// Runs a connection to its end, or until it is told otherwise; `None` when it was cut.
async fn drive<C: Future>(
    connection: &Connection,
    mut connected: std::pin::Pin<&mut C>,
    close: impl Fn(std::pin::Pin<&mut C>),
) -> Option<C::Output> {
    let mut registered = false;
    let mut closing = false;
    std::future::poll_fn(|cx| {
        if !registered {
            registered = true;
            connection.register(cx);
        }
        if connection.verdict() == Verdict::Close && !closing {
            closing = true;
            // Being told has used the registration up, and there may be more to be told.
            connection.register(cx);
            close(connected.as_mut());
        }
        if connection.verdict() == Verdict::Cut {
            return Poll::Ready(None);
        }
        connected.as_mut().poll(cx).map(Some)
    })
    .await
}

fn h1_builder(config: &EdgeConfig) -> http1::Builder {
    let limits = &config.limits;
    let mut builder = http1::Builder::new();
    builder
        // hyper's own timer costs an allocation and two clock reads for each request, and cannot tell an
        // idle connection from a slow head. The sweep does both, by what the gate sees.
        .header_read_timeout(None)
        .max_headers(FIELD_SLOTS)
        .max_header_size(limits.head_bytes)
        .max_buf_size(BUFFER_BYTES);
    builder
}

fn h2_builder(config: &EdgeConfig) -> http2::Builder<Streams> {
    let limits = &config.limits;
    let mut builder = http2::Builder::new(Streams { limit: limits.write_stall });
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.h2_streams)
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(100)
        .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX))
        .initial_stream_window_size(256 * 1024)
        .initial_connection_window_size(1024 * 1024)
        .max_send_buf_size(BUFFER_BYTES)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Connections;

    #[tokio::test]
    async fn a_connection_that_does_not_close_can_still_be_cut() {
        let connections = Arc::new(Connections::default());
        let registered = connections.enter();
        let connection = Arc::clone(&registered.connection);
        let (polled, mut polls) = tokio::sync::mpsc::unbounded_channel();
        let (closing, mut closed) = tokio::sync::mpsc::unbounded_channel();
        let driven = tokio::spawn(async move {
            let mut never = std::pin::pin!(std::future::poll_fn(|_| {
                polled.send(()).expect("somebody waits");
                Poll::<()>::Pending
            }));
            drive(&registered.connection, never.as_mut(), |_| closing.send(()).expect("somebody waits")).await
        });
        polls.recv().await.expect("it waits for what it will be told");
        connections.tell_all(Verdict::Close);
        closed.recv().await.expect("it was told to close");
        connection.cut();
        let ended = timeout(Duration::from_secs(10), driven).await.expect("it was cut");
        assert_eq!(ended.expect("no panic"), None);
    }
}
