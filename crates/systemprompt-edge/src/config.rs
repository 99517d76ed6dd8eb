//! What an edge is told at start.

use serde::{Deserialize, Serialize};
use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};
use systemprompt_contract::Zone;

/// Everything an [`Edge`](crate::Edge) needs besides routes and certificates. Immutable while it runs.
#[derive(Debug, Clone)]
pub struct EdgeConfig {
    /// Addresses for HTTPS; at least one. Port 0 picks a free port.
    pub https: Vec<SocketAddr>,
    /// Addresses for clear HTTP, which only redirects to HTTPS; may be empty.
    pub http: Vec<SocketAddr>,
    /// The port clients use for HTTPS; it goes into redirects. 0: the port of the first HTTPS address.
    pub public_https_port: u16,
    /// The zone of the installation; its platform hosts are served by `platform` without a route.
    pub zone: Zone,
    /// Threads, each with a runtime, listeners and an upstream pool of its own; at least 1.
    pub workers: usize,
    /// Where API, registry and pages are.
    pub platform: Upstream,
    /// How long open requests may take to finish after the stop; then they are cut.
    pub drain: Duration,
    /// How long a request waits for a route while its tenant deploys or wakes with nothing live.
    pub hold: Duration,
    /// Bounds against clients and apps that misbehave.
    pub limits: Limits,
}

/// Where requests are forwarded to, always in clear HTTP/1.1: an address on loopback or a private
/// network, or a unix socket.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upstream {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A unix stream socket.
    Unix(PathBuf),
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Bounds of one edge. The defaults are meant for production; tests shorten the times.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Size of a request head, in bytes, beyond which the answer is 431.
    pub head_bytes: usize,
    /// How long a request head of HTTP/1.1 may take to arrive once its first byte came.
    pub head_timeout: Duration,
    /// How long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// TLS handshakes at once, for each worker; more wait in the accept queue.
    pub handshakes: usize,
    /// Client connections at once, for each worker; more wait in the accept queue.
    pub connections: usize,
    /// How long a client connection without a request in flight stays open.
    pub idle: Duration,
    /// How long a client may take nothing of what it asked for before its connection is cut, or on HTTP/2
    /// its stream reset.
    pub write_stall: Duration,
    /// Size of a request body, in bytes, beyond which the answer is 413. Uploads to the registry have none.
    pub body_bytes: u64,
    /// How long in total a client may keep us waiting for body bytes, beside the time that
    /// `body_bytes_per_second` grants.
    pub body_grace: Duration,
    /// The least rate of a request body; below it (and beyond the grace) the request ends with 408.
    pub body_bytes_per_second: u64,
    /// Streams at once on one HTTP/2 connection.
    pub h2_streams: u32,
    /// Frames that carry no work (PING, SETTINGS, PRIORITY, empty DATA, CONTINUATION, window updates; a
    /// reset counts five) one HTTP/2 connection may send in a burst. Ten grow back a second, and one for
    /// each KiB sent to the client.
    pub h2_idle_frames: u32,
    /// How long a connection to an upstream may take.
    pub connect_timeout: Duration,
    /// How long an upstream may take to begin its answer, once the body of the request moves no more.
    pub response_timeout: Duration,
    /// Idle connections kept for one upstream, for each worker.
    pub idle_per_upstream: usize,
    /// Idle connections kept for all upstreams together, for each worker.
    pub idle_upstreams: usize,
    /// How long an idle connection to an upstream is kept.
    pub upstream_idle: Duration,
    /// How long an upgraded connection (WebSocket) may be silent both ways.
    pub tunnel_idle: Duration,
    /// Requests at once that wait for a route, for each worker; more are answered 503 at once.
    pub held: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            head_bytes: 16 * 1024,
            head_timeout: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            handshakes: 2048,
            connections: 50_000,
            idle: Duration::from_mins(1),
            write_stall: Duration::from_mins(1),
            body_bytes: 100 * 1024 * 1024,
            body_grace: Duration::from_secs(30),
            body_bytes_per_second: 1024,
            h2_streams: 128,
            h2_idle_frames: 1000,
            connect_timeout: Duration::from_secs(5),
            response_timeout: Duration::from_mins(5),
            idle_per_upstream: 256,
            idle_upstreams: 4096,
            upstream_idle: Duration::from_mins(1),
            tunnel_idle: Duration::from_mins(15),
            held: 1024,
        }
    }
}
