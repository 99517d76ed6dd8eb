//! The edge and what feeds it: a follower reads route rows into the table that the edge answers from, keeps a
//! sealed snapshot on disk for the day the database is gone, and acknowledges what all workers serve.

mod acknowledge;
mod snapshot;

pub(crate) use snapshot::EdgeDirectory;

use crate::{
    certs::{self, CertificateFile, EdgeCertificate},
    config::EdgeArguments,
    tenants::routes::{self, ChangedRoute},
};
use acknowledge::{Acknowledgements, Serving, replaced};
use anyhow::Context as _;
use snapshot::table_of;
use sqlx::postgres::PgListener;
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_edge::{BoundEdge, CertTable, Edge, EdgeConfig, EdgeHandle, Limits, RouteTable, Upstream};
use systemprompt_workflow::Db;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Notifications can be lost on a reconnect, so the rows are read at least this often.
const POLL: Duration = Duration::from_secs(2);
/// Between signs of life of this edge, whatever it waits for; far below [`routes::EDGE_GONE_SECONDS`].
const HEARTBEAT: Duration = Duration::from_secs(3);
/// Between tries to reach the database.
const RECONNECT: Duration = Duration::from_millis(500);
/// Between looks at the certificates' file.
const CERTIFICATES: Duration = Duration::from_secs(10);
/// How long open requests may take to end once the edge is told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a request waits while its tenant is brought up.
const HOLD: Duration = Duration::from_secs(10);

/// What an edge starts with.
pub(crate) struct EdgePlan {
    pub(crate) table: RouteTable,
    pub(crate) certificates: Vec<EdgeCertificate>,
    /// Where renewed ones will be.
    pub(crate) certificate_file: CertificateFile,
    pub(crate) directory: EdgeDirectory,
    pub(crate) platform: PathBuf,
}

impl EdgePlan {
    /// Opens the listeners; the follower is what will feed the edge.
    ///
    /// # Errors
    /// When an address is taken, and when chain and key of a certificate do not fit.
    pub(crate) async fn bind(self, arguments: &EdgeArguments) -> anyhow::Result<(BoundEdge, Follower)> {
        let served = certs::table(&self.certificates).context("the edge's certificates")?;
        let served = watch::Sender::new(Arc::new(served));
        let acknowledgements = Acknowledgements::new(self.table.generation());
        let kept = watch::Sender::new(self.table.generation());
        let table = watch::Sender::new(Arc::new(self.table));
        let config = edge_config(arguments, &self.platform);
        let edge = Edge::new(config, table.subscribe(), served.subscribe()).bind().await?;
        let follower = Follower {
            id: self.directory.edge_id(),
            routes: Routes { table, edge: edge.handle(), kept: kept.subscribe(), acknowledgements },
            registered: CancellationToken::new(),
            kept,
            served,
            certificates: self.certificates,
            certificate_file: self.certificate_file,
            directory: Arc::new(self.directory),
            platform: self.platform,
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

/// Feeds one edge: routes from the database, certificates from their file.
pub(crate) struct Follower {
    id: Uuid,
    routes: Routes,
    registered: CancellationToken,
    kept: watch::Sender<u64>,
    served: watch::Sender<Arc<CertTable>>,
    certificates: Vec<EdgeCertificate>,
    certificate_file: CertificateFile,
    directory: Arc<EdgeDirectory>,
    platform: PathBuf,
}

impl Follower {
    /// Cancelled once the edge has read all routes and stands in the database: whoever waits for every edge waits for
    /// this one from then on.
    pub(crate) fn registered(&self) -> CancellationToken {
        self.registered.clone()
    }

    /// Follows the database for as long as it is there and tries again when it is not; traffic goes on meanwhile.
    pub(crate) async fn run(self, database_url: String, stop: CancellationToken) {
        let Self { id, mut routes, registered, kept, served, certificates, certificate_file, directory, platform } =
            self;
        // Held to the end: who takes the directory next stands under the same id.
        let keeping = directory.clone().keep(routes.table.subscribe(), kept, &platform, &database_url);
        let renewing = certificate_file.follow(certificates, &served, CERTIFICATES);
        let following = async {
            loop {
                let Err(error) = routes.follow(id, &database_url, &registered).await;
                tracing::warn!(%error, "the route database does not answer; serving from memory");
                tokio::time::sleep(RECONNECT).await;
            }
        };
        tokio::select! {
            () = following => {}
            never = keeping => match never {},
            never = renewing => match never {},
            () = stop.cancelled() => {}
        }
        sign_off(id, &database_url).await;
    }
}

/// The routes of one edge. What is not acknowledged yet outlives a connection to the database.
struct Routes {
    table: watch::Sender<Arc<RouteTable>>,
    edge: EdgeHandle,
    kept: watch::Receiver<u64>,
    acknowledgements: Acknowledgements,
}

impl Routes {
    async fn follow(
        &mut self,
        id: Uuid,
        database_url: &str,
        registered: &CancellationToken,
    ) -> Result<Infallible, sqlx::Error> {
        let db = Db::connect(database_url, 2).await?;
        let mut listener = PgListener::connect(database_url).await?;
        listener.listen(routes::CHANNEL).await?;
        let mut generation = self.load_all(&db).await?;
        let (mut polls, mut heartbeats) = (interval(POLL), interval(HEARTBEAT));
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let serving = Serving { edge: &self.edge, kept: &self.kept };
            tokio::select! {
                _ = heartbeats.tick() => {
                    self.sign(id, &db).await?;
                    registered.cancel();
                }
                () = self.acknowledgements.advance(serving) => self.sign(id, &db).await?,
                received = listener.recv() => {
                    received?;
                    generation = self.load_changes(&db, generation).await?;
                }
                _ = polls.tick() => generation = self.load_changes(&db, generation).await?,
            }
        }
    }

    /// Everything once: what went while nobody looked has left no trace to follow.
    async fn load_all(&mut self, db: &Db) -> Result<i64, sqlx::Error> {
        let rows = routes::changed_since(db.pool(), 0).await?;
        let generation = rows.last().map_or(0, |row| row.generation);
        let live = rows.into_iter().filter_map(|row| Some((row.host, row.route?)));
        let (before, after) = (self.table.borrow().clone(), table_of(generation.cast_unsigned(), live));
        let gone = replaced(&before, &after, before.iter().map(|(host, _)| host));
        self.publish(after, generation, gone);
        Ok(generation)
    }

    async fn load_changes(&mut self, db: &Db, seen: i64) -> Result<i64, sqlx::Error> {
        let changed = routes::changed_since(db.pool(), seen).await?;
        let Some(generation) = changed.last().map(|row| row.generation) else { return Ok(seen) };
        let hosts: Vec<_> = changed.iter().map(|row| row.host.clone()).collect();
        let changes = changed.into_iter().map(|ChangedRoute { host, route, .. }| (host, route));
        let before = self.table.borrow().clone();
        let after = before.apply(generation.cast_unsigned(), changes);
        let gone = replaced(&before, &after, &hosts);
        self.publish(after, generation, gone);
        Ok(generation)
    }

    fn publish(&mut self, table: RouteTable, generation: i64, gone: Vec<Upstream>) {
        self.acknowledgements.published(generation, gone);
        self.table.send_replace(Arc::new(table));
    }

    /// A sign of life, with what is acknowledged.
    async fn sign(&self, id: Uuid, db: &Db) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "INSERT INTO edges (id, generation) VALUES ($1, $2)
             ON CONFLICT (id) DO UPDATE SET generation = excluded.generation, seen_at = now()",
            id,
            self.acknowledgements.acknowledged(),
        )
        .execute(db.pool())
        .await
        .map(drop)
    }
}

/// An edge that says goodbye holds up no deploy.
async fn sign_off(id: Uuid, database_url: &str) {
    let farewell = async {
        let db = Db::connect(database_url, 1).await?;
        sqlx::query!("DELETE FROM edges WHERE id = $1", id).execute(db.pool()).await
    };
    if let Ok(Err(error)) = timeout(Duration::from_secs(1), farewell).await {
        tracing::debug!(%error, "could not sign off; the row ages out");
    }
}
