//! The listener: routes, connections, and the way out.

use crate::{
    answer::{self, TRACE_ID},
    config::RuntimeConfig,
    database::{Database, DatabaseError},
    health,
    site::Site,
};
use axum::{
    Router,
    extract::{OriginalUri, Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
    routing::get,
};
use http::{HeaderValue, StatusCode, header};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use systemprompt_contract::{RequestId, paths};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Also the longest a connection may rest between two requests; longer than any pool in front keeps it.
const HEAD_WITHIN: Duration = Duration::from_mins(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Why the server did not start.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The database did not answer, so nothing was bound.
    #[error("not started: {0}")]
    Database(#[from] DatabaseError),
    /// The address cannot be had.
    #[error("cannot listen on {address}; is it taken? set PORT to a free one")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
}

#[derive(Debug, Clone)]
struct Tenant {
    database: Database,
    site: Site,
}

/// Runs until `stop` is cancelled, then accepts no more, lets requests in flight finish for `config.drain`, and
/// returns. The listener is bound only after the database has answered once.
///
/// # Errors
/// [`RuntimeError`] when the database stays silent or the address cannot be had; never once it has served.
pub async fn serve(config: RuntimeConfig, stop: CancellationToken) -> Result<(), RuntimeError> {
    serve_on(config, stop, |_| ()).await
}

/// As [`serve`]; `bound` learns the address, which is how a caller that asked for port 0 finds the server.
///
/// # Errors
/// As [`serve`].
pub async fn serve_on(
    config: RuntimeConfig,
    stop: CancellationToken,
    bound: impl FnOnce(SocketAddr),
) -> Result<(), RuntimeError> {
    let started = Instant::now();
    let database = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        connected = Database::connect(&config.database_url) => connected?,
    };
    let address = config.address();
    let listener = TcpListener::bind(address).await.map_err(|source| RuntimeError::Bind { address, source })?;
    let address = listener.local_addr().map_err(|source| RuntimeError::Bind { address, source })?;
    tracing::info!(address = %address, start_ms = started.elapsed().as_secs_f64() * 1000.0, "listening");
    bound(address);
    let tenant = Tenant { database: database.clone(), site: Site::new(config.web_dir.join("dist")) };
    accept_until(&stop, listener, router(tenant), config.drain).await;
    database.close().await;
    tracing::info!("stopped");
    Ok(())
}

fn router(tenant: Tenant) -> Router {
    Router::new()
        .route(paths::HEALTH, get(health))
        .fallback(fallback)
        .layer(axum::middleware::from_fn(trace))
        .with_state(tenant)
}

async fn health(State(tenant): State<Tenant>) -> Response {
    let no_store = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (no_store, health::check(&tenant.database, tenant.site.root()).await).into_response()
}

async fn fallback(State(tenant): State<Tenant>, OriginalUri(uri): OriginalUri, request: Request) -> Response {
    let path = uri.path();
    if path != "/api" && !path.starts_with("/api/") {
        return tenant.site.answer(request.method(), path, request.headers()).await;
    }
    // The health page under its path with a slash at the end, as the existing app answers.
    if path.strip_suffix('/') == Some(paths::HEALTH) {
        let location = [(header::LOCATION, HeaderValue::from_static(paths::HEALTH))];
        return (StatusCode::PERMANENT_REDIRECT, location).into_response();
    }
    let trace_id = request.extensions().get::<RequestId>().copied().unwrap_or_else(RequestId::new);
    answer::not_found_json(path, trace_id)
}

/// Gives every request an id (the platform's, where it sent one), and logs failures; the rest at `debug`.
async fn trace(mut request: Request, next: Next) -> Response {
    let given = request.headers().get("x-request-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let id: RequestId = given.unwrap_or_else(RequestId::new);
    request.extensions_mut().insert(id);
    let (method, path, started) = (request.method().clone(), request.uri().path().to_owned(), Instant::now());
    let mut answer = next.run(request).await;
    if let Ok(value) = HeaderValue::try_from(id.to_string()) {
        answer.headers_mut().insert(TRACE_ID, value);
    }
    let (status, duration_ms) = (answer.status().as_u16(), started.elapsed().as_secs_f64() * 1000.0);
    if status >= 500 {
        tracing::warn!(%method, path, status, duration_ms, trace_id = %id, "request failed");
    } else {
        tracing::debug!(%method, path, status, duration_ms, trace_id = %id, "request");
    }
    answer
}

async fn accept_until(stop: &CancellationToken, listener: TcpListener, router: Router, drain: Duration) {
    let graceful = GracefulShutdown::new();
    // Dropping the set ends what is left after the drain time.
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(converse(stream, router.clone(), &graceful));
                }
                // Out of file descriptors, or a peer that left while waiting: both pass.
                Err(error) => {
                    tracing::warn!(error = %error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    tracing::info!(connections = graceful.count(), "draining");
    if tokio::time::timeout(drain, graceful.shutdown()).await.is_err() {
        tracing::warn!(drain_ms = drain.as_secs_f64() * 1000.0, "requests were still running after the drain time");
    }
}

fn converse(stream: TcpStream, router: Router, graceful: &GracefulShutdown) -> impl Future<Output = ()> + use<> {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(error = %error, "no TCP_NODELAY");
    }
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let connection = graceful.watch(connection);
    async move {
        if let Err(error) = connection.await {
            tracing::debug!(error = %error, "a connection ended early");
        }
    }
}
