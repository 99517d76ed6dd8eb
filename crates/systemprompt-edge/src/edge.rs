//! The life of an edge: configure, bind, serve, drain.

use crate::{
    bind::{self, BindError, Purpose},
    certs::CertTable,
    config::{EdgeConfig, Upstream},
    routes::RouteTable,
    tls,
    worker::{self, Parts, Seat, Worker},
};
use arc_swap::ArcSwap;
use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};
use tokio::sync::{oneshot, watch};
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
        let count = self.config.workers.max(1);
        let mut listeners: Vec<Vec<(Purpose, TcpListener)>> = (0..count).map(|_| Vec::new()).collect();
        let mut https = Vec::new();
        let mut http = Vec::new();
        for (purpose, addresses, bound) in
            [(Purpose::Https, &self.config.https, &mut https), (Purpose::Http, &self.config.http, &mut http)]
        {
            for &address in addresses {
                let opened = bind::listen(purpose, address, count)?;
                bound.push(opened[0].local_addr().unwrap_or(address));
                for (seat, listener) in listeners.iter_mut().zip(opened) {
                    seat.push((purpose, listener));
                }
            }
        }
        let certs = Arc::new(ArcSwap::new(Arc::clone(&self.certs.borrow())));
        let tls = tls::server_config(Arc::clone(&certs)).map_err(BindError::Tls)?;
        let tls = Arc::new(tls);
        let redirect_port = match self.config.public_https_port {
            0 => https.first().map_or(443, SocketAddr::port),
            port => port,
        };
        let routes = Arc::clone(&self.routes.borrow());
        let config = Arc::new(self.config);
        let workers: Arc<[Arc<Worker>]> = (0..count)
            .map(|_| {
                Arc::new(Worker::new(Parts {
                    config: Arc::clone(&config),
                    routes: Arc::clone(&routes),
                    certs: Arc::clone(&certs),
                    tls: Arc::clone(&tls),
                    redirect_port,
                }))
            })
            .collect();
        let generation = watch::Sender::new(routes.generation());
        let handle = EdgeHandle { workers, generation };
        Ok(BoundEdge { routes: self.routes, certs_feed: self.certs, certs, listeners, https, http, handle })
    }
}

/// An edge that listens.
pub struct BoundEdge {
    routes: watch::Receiver<Arc<RouteTable>>,
    certs_feed: watch::Receiver<Arc<CertTable>>,
    certs: Arc<ArcSwap<CertTable>>,
    listeners: Vec<Vec<(Purpose, TcpListener)>>,
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
        // The workers stop for either reason; the guard is the one for a dropped future.
        let halt = stop.child_token();
        let abandon = CancellationToken::new();
        let _guards = (abandon.clone().drop_guard(), halt.clone().drop_guard());
        let mut ends = Vec::new();
        for (index, (listeners, worker)) in self.listeners.into_iter().zip(self.handle.workers.iter()).enumerate() {
            let seat = Seat {
                worker: Arc::clone(worker),
                listeners,
                routes: self.routes.clone(),
                handle: self.handle.clone(),
                stop: halt.clone(),
                abandon: abandon.clone(),
            };
            let (ended, end) = oneshot::channel();
            let run = move || drop(ended.send(worker::run(seat)));
            match std::thread::Builder::new().name(format!("edge-{index}")).spawn(run) {
                Ok(_detached) => ends.push(end),
                Err(error) => tracing::error!(%error, "cannot start an edge worker"),
            }
        }
        let follow = follow_certs(self.certs_feed, &self.certs);
        let collect = async {
            let mut total = DrainReport::default();
            for end in ends {
                match end.await {
                    Ok(Ok(report)) => {
                        total.finished += report.finished;
                        total.cut += report.cut;
                    }
                    Ok(Err(error)) => tracing::error!(%error, "an edge worker failed"),
                    Err(_) => tracing::error!("an edge worker panicked"),
                }
            }
            total
        };
        tokio::select! {
            report = collect => report,
            never = follow => match never {},
        }
    }
}

async fn follow_certs(mut feed: watch::Receiver<Arc<CertTable>>, certs: &ArcSwap<CertTable>) -> Infallible {
    loop {
        certs.store(Arc::clone(&feed.borrow_and_update()));
        if feed.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
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
    workers: Arc<[Arc<Worker>]>,
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
    ///
    /// Once [`Self::wait_generation`] has seen a table without the upstream, the count only falls; at 0
    /// nothing of the edge uses it any more.
    pub fn in_flight(&self, upstream: &Upstream) -> usize {
        self.workers.iter().map(|worker| worker.pool.in_flight(upstream)).sum()
    }

    /// A worker has loaded a table.
    pub(crate) fn loaded(&self) {
        let slowest = self.workers.iter().map(|worker| worker.generation()).min().unwrap_or_default();
        self.generation.send_if_modified(|generation| {
            let moved = *generation != slowest;
            *generation = slowest;
            moved
        });
    }
}
