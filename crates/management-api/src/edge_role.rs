//! The edge and what feeds it: a follower reads route rows into the table that the edge answers from, keeps a
//! sealed snapshot on disk for the day the database is gone, and acknowledges what all workers serve.

use crate::{
    certs::EdgeCertificate,
    config::EdgeArguments,
    seal::{Sealer, private_file},
    tenants::routes::{self, ChangedRoute},
};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgListener;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_contract::{Hostname, Secret};
use systemprompt_edge::{BoundEdge, CertTable, Edge, EdgeConfig, EdgeHandle, Limits, Route, RouteTable, Upstream};
use systemprompt_workflow::Db;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Notifications can be lost on a reconnect, so the rows are read at least this often.
const POLL: Duration = Duration::from_secs(2);
/// Between signs of life of this edge.
const HEARTBEAT: Duration = Duration::from_secs(3);
/// How long an acknowledgement waits for the requests on a replaced upstream to end.
const DRAIN_BOUND: Duration = Duration::from_secs(10);
/// Between tries to reach the database.
const RECONNECT: Duration = Duration::from_millis(500);
/// How long open requests may take to end once the edge is told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a request waits while its tenant is brought up.
const HOLD: Duration = Duration::from_secs(10);
const SNAPSHOT_CONTEXT: &str = "edge_snapshot";

/// What an edge needs to serve without anybody: sealed in `edge/snapshot.sealed`, mode 0600.
#[derive(Serialize, Deserialize)]
pub(crate) struct Snapshot {
    generation: u64,
    routes: Vec<(Hostname, Route)>,
    certificates: Vec<EdgeCertificate>,
    /// Where API, registry and pages answer.
    pub(crate) platform: PathBuf,
    /// Where the route rows are; peer authentication, so no secret is in it.
    pub(crate) database_url: String,
}

impl Snapshot {
    /// Reads and opens the snapshot; none when there never was one.
    ///
    /// # Errors
    /// When it cannot be read or was sealed by another key.
    pub(crate) fn load(path: &Path, seal: &Sealer) -> anyhow::Result<Option<Self>> {
        let sealed = match std::fs::read(path) {
            Ok(sealed) => sealed,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        let plain = seal
            .open(SNAPSHOT_CONTEXT, &sealed)
            .with_context(|| format!("opening {}; was keys/seal.key replaced?", path.display()))?;
        Ok(Some(serde_json::from_slice(&plain).with_context(|| format!("parsing {}", path.display()))?))
    }

    pub(crate) fn table(&self) -> RouteTable {
        table_of(self.generation, self.routes.iter().cloned())
    }

    pub(crate) fn certificates(&self) -> &[EdgeCertificate] {
        &self.certificates
    }
}

/// What an edge starts with.
pub(crate) struct EdgePlan {
    pub(crate) table: RouteTable,
    pub(crate) certificates: Vec<EdgeCertificate>,
    pub(crate) snapshot_file: PathBuf,
    pub(crate) platform: PathBuf,
    pub(crate) seal: Arc<Sealer>,
}

impl EdgePlan {
    /// Opens the listeners; the follower is what will feed the edge.
    ///
    /// # Errors
    /// When an address is taken, and when chain and key of a certificate do not fit.
    pub(crate) async fn bind(self, arguments: &EdgeArguments) -> anyhow::Result<(BoundEdge, Follower)> {
        let certificates = self.certificates.iter().map(EdgeCertificate::for_edge).collect();
        let certs = watch::Sender::new(Arc::new(CertTable::new(certificates).context("the edge's certificates")?));
        let table = watch::Sender::new(Arc::new(self.table));
        let config = edge_config(arguments, &self.platform);
        let edge = Edge::new(config, table.subscribe(), certs.subscribe()).bind().await?;
        let follower = Follower {
            table,
            edge: edge.handle(),
            certificates: self.certificates,
            snapshot_file: self.snapshot_file,
            platform: self.platform,
            database_url: String::new(),
            seal: self.seal,
        };
        Ok((edge, follower))
    }
}

fn edge_config(arguments: &EdgeArguments, platform: &Path) -> EdgeConfig {
    EdgeConfig {
        https: arguments.https.addresses(),
        http: arguments.http.addresses(),
        public_https_port: arguments.public_port.unwrap_or(0),
        zone: arguments.zone.clone(),
        workers: std::thread::available_parallelism().map_or(1, usize::from),
        platform: Upstream::Unix(platform.to_owned()),
        drain: DRAIN,
        hold: HOLD,
        limits: Limits::default(),
    }
}

/// Feeds one edge. Owns the table's sending half.
pub(crate) struct Follower {
    table: watch::Sender<Arc<RouteTable>>,
    edge: EdgeHandle,
    certificates: Vec<EdgeCertificate>,
    snapshot_file: PathBuf,
    platform: PathBuf,
    database_url: String,
    seal: Arc<Sealer>,
}

impl Follower {
    /// Follows the database for as long as it is there and tries again when it is not; traffic goes on meanwhile.
    pub(crate) async fn run(mut self, database_url: String, stop: CancellationToken) {
        self.database_url = database_url;
        let id = Uuid::new_v4();
        loop {
            let followed = tokio::select! {
                followed = self.follow(id) => followed,
                () = stop.cancelled() => break,
            };
            if let Err(error) = followed {
                tracing::warn!(%error, "the route database does not answer; serving from memory");
            }
            tokio::select! {
                () = tokio::time::sleep(RECONNECT) => {}
                () = stop.cancelled() => break,
            }
        }
        self.sign_off(id).await;
    }

    async fn follow(&self, id: Uuid) -> Result<(), sqlx::Error> {
        let db = Db::connect(&self.database_url, 2).await?;
        let mut listener = PgListener::connect(&self.database_url).await?;
        listener.listen(routes::CHANNEL).await?;
        // Everything once: what went while nobody looked has left no trace to follow.
        let mut generation = self.load_all(&db).await?;
        let (acknowledge, published) = mpsc::unbounded_channel();
        let acknowledging = acknowledge_in_order(&db, id, generation, self.edge.clone(), published);
        let following = async {
            loop {
                match timeout(POLL, listener.recv()).await {
                    Ok(received) => drop(received?),
                    Err(_elapsed) => {}
                }
                let changed = routes::changed_since(db.pool(), generation).await?;
                if let Some(last) = changed.last() {
                    generation = last.generation;
                    let replaced = self.publish(changed);
                    let _ = acknowledge.send(Published { generation, replaced });
                }
            }
        };
        tokio::select! {
            followed = following => followed,
            acknowledged = acknowledging => acknowledged,
        }
    }

    async fn load_all(&self, db: &Db) -> Result<i64, sqlx::Error> {
        let rows = routes::changed_since(db.pool(), 0).await?;
        let generation = rows.last().map_or(0, |row| row.generation);
        let live = rows.into_iter().filter_map(|row| Some((row.host, row.route?)));
        self.replace(table_of(generation.unsigned_abs(), live));
        Ok(generation)
    }

    /// Hands changed rows to the edge and returns the upstreams that no longer serve.
    fn publish(&self, changed: Vec<ChangedRoute>) -> Vec<Upstream> {
        let before = self.table.borrow().clone();
        let generation = changed.last().map_or(before.generation(), |row| row.generation.unsigned_abs());
        let replaced = changed
            .iter()
            .filter_map(|row| match (before.lookup(&row.host), &row.route) {
                (Some(Route::Tenant { upstream: old, .. }), new) => match new {
                    Some(Route::Tenant { upstream, .. }) if upstream == old => None,
                    _ => Some(old.clone()),
                },
                _ => None,
            })
            .collect();
        self.replace(before.apply(generation, changed.into_iter().map(|row| (row.host, row.route))));
        replaced
    }

    fn replace(&self, table: RouteTable) {
        let table = Arc::new(table);
        self.table.send_replace(table.clone());
        // Kept before it is acknowledged: a release that was called live is in the snapshot.
        if let Err(error) = self.persist(&table) {
            tracing::error!(%error, "the edge's snapshot could not be kept; a restart without database would serve an older one");
        }
    }

    fn persist(&self, table: &RouteTable) -> anyhow::Result<()> {
        let snapshot = Snapshot {
            generation: table.generation(),
            routes: table.iter().map(|(host, route)| (host.clone(), route.clone())).collect(),
            certificates: self.certificates.clone(),
            platform: self.platform.clone(),
            database_url: self.database_url.clone(),
        };
        let plain = Secret::new(serde_json::to_string(&snapshot)?);
        let sealed = self.seal.seal(SNAPSHOT_CONTEXT, plain.expose().as_bytes());
        private_file::write(&self.snapshot_file, &sealed)?;
        Ok(())
    }

    /// An edge that says goodbye holds up no deploy.
    async fn sign_off(&self, id: Uuid) {
        let farewell = async {
            let db = Db::connect(&self.database_url, 1).await?;
            sqlx::query!("DELETE FROM edges WHERE id = $1", id).execute(db.pool()).await
        };
        if let Ok(Err(error)) = timeout(Duration::from_secs(1), farewell).await {
            tracing::debug!(%error, "could not sign off; the row ages out");
        }
    }
}

struct Published {
    generation: i64,
    replaced: Vec<Upstream>,
}

/// Acknowledges generations in order, each when every worker serves it and the requests on what it replaced have
/// ended (or a bound has passed); in between, signs of life.
async fn acknowledge_in_order(
    db: &Db,
    id: Uuid,
    mut acknowledged: i64,
    edge: EdgeHandle,
    mut published: mpsc::UnboundedReceiver<Published>,
) -> Result<(), sqlx::Error> {
    loop {
        sqlx::query!(
            "INSERT INTO edges (id, generation) VALUES ($1, $2)
             ON CONFLICT (id) DO UPDATE SET generation = excluded.generation, seen_at = now()",
            id,
            acknowledged,
        )
        .execute(db.pool())
        .await?;
        if let Ok(next) = timeout(HEARTBEAT, published.recv()).await {
            let Some(next) = next else { return Ok(()) };
            edge.wait_generation(next.generation.unsigned_abs()).await;
            wait_drained(&edge, &next.replaced).await;
            acknowledged = next.generation;
        }
    }
}

async fn wait_drained(edge: &EdgeHandle, replaced: &[Upstream]) {
    let deadline = Instant::now() + DRAIN_BOUND;
    while replaced.iter().any(|upstream| edge.in_flight(upstream) > 0) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn table_of(generation: u64, routes: impl IntoIterator<Item = (Hostname, Route)>) -> RouteTable {
    RouteTable::new().apply(generation, routes.into_iter().map(|(host, route)| (host, Some(route))))
}
