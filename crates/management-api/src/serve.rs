//! `management-api serve`: lock, bind, start, serve, drain with a deadline.

use crate::{
    app::{App, Infrastructure, Parts, Site},
    certs::{CertificateFile, LocalCa},
    commands::{announce, asked_to_stop},
    config::{Layout, OnStop, ServeArguments},
    edge_role::{EdgeDirectory, EdgePlan, Follower},
    http,
    identity::{self, Limits},
    installation::{
        CONTROL_DATABASE, Clusters, bind_socket, lock_data, open_control_database, open_data, open_driver,
        open_registry, open_seal, open_stopping_driver, platform_socket, refuse_absent_instances, registry_key,
        take_down,
    },
    reconcile,
    seal::Sealer,
    tenants::{databases::TenantDatabases, delete::DeleteTenant, deploy::DeployTenant, provision::ProvisionTenant},
};
use anyhow::Context as _;
use chrono::Utc;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_compute::process::ProcessDriver;
use systemprompt_edge::{BoundEdge, DrainReport, RouteTable};
use systemprompt_postgres::Cluster;
use systemprompt_registry::Registry;
use systemprompt_workflow::{Db, Engine, EngineConfig, events::EventHub};
use tokio::{
    net::TcpListener,
    task::{JoinError, JoinHandle},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const TENANTS_ADMIN_CONNECTIONS: u32 = 4;
/// Who holds leases. One control plane an installation, by the lock on its data directory: what this name held
/// before was held by a process that is gone, and need not wait for its lease to end.
const WORKER: &str = "control-plane";
/// How long tasks may take to end once we are told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// Between looks at how long the edge's certificate is still good.
const RENEWAL: Duration = Duration::from_hours(24);

/// Runs the control plane until SIGTERM or SIGINT.
pub(crate) async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    // Before anything is started, so that a signal during the start stops what was started.
    let asked = asked_to_stop()?;
    let layout = open_data(&arguments.edge.data.data)?;
    let _lock = lock_data(&layout)?;
    let seal = Arc::new(open_seal(&layout)?);
    let certificate_file = CertificateFile::new(layout.edge_certificates(), seal.clone());
    let ca = Arc::new(LocalCa::load_or_create(&layout.ca(), &arguments.edge.zone, certificate_file.clone())?);
    let platform = platform_socket(&layout);

    // Ports before anything that takes long: a taken one is said at once, and the edge serves from its snapshot
    // while the rest comes up.
    let edge = bind_edge(&arguments, &layout, &seal, &ca, certificate_file, &platform).await?;
    let site = arguments.edge.site(edge.as_ref().map(|(edge, _)| edge.https_addr().port()));
    let api_in_clear = bind_clear(arguments.http_api).await?;

    let mut running = Running::default();
    let start = Start { arguments: &arguments, layout: &layout, seal: &seal, ca: &ca, platform: &platform, site };
    let served = start.run(edge, api_in_clear, &mut running, &asked).await;
    let Running { up, driver, .. } = &running;
    let (up, driver) = (up.clone(), driver.clone());
    let drained = running.drain().await;
    if arguments.on_stop == OnStop::Leave {
        return served.and(drained);
    }
    // Also when it did not get to serve: what was started for it is not left behind.
    let driver = driver.map_or_else(|| open_stopping_driver(&layout, &seal), Ok);
    let down = take_down(&layout, driver, &up, arguments.deploy_limits().stop_grace).await;
    if let (Err(_), Err(error)) = (&served, &down) {
        tracing::error!(error = format!("{error:#}"), "taking down what was started");
    }
    served.and(drained).and(down)
}

/// What a start needs.
struct Start<'a> {
    arguments: &'a ServeArguments,
    layout: &'a Layout,
    seal: &'a Arc<Sealer>,
    ca: &'a Arc<LocalCa>,
    platform: &'a Path,
    site: Site,
}

/// What was started so far, for whoever has to stop it.
#[derive(Default)]
struct Running {
    stops: Stops,
    tasks: TaskTracker,
    /// None when there is no edge in this process, or it has ended.
    edge: Option<JoinHandle<DrainReport>>,
    follower: Option<JoinHandle<()>>,
    up: Vec<Cluster>,
    driver: Option<Arc<ProcessDriver>>,
    db: Option<Db>,
}

impl Start<'_> {
    /// Starts everything and serves until it is asked to stop, at whatever point that is.
    async fn run(
        self,
        edge: Option<(BoundEdge, Follower)>,
        api_in_clear: Option<TcpListener>,
        running: &mut Running,
        asked: &CancellationToken,
    ) -> anyhow::Result<()> {
        let https = edge.as_ref().map(|(edge, _)| edge.https_addr());
        let follower = edge.map(|(edge, follower)| {
            running.edge = Some(tokio::spawn(edge.serve(running.stops.edge.clone())));
            follower
        });
        // Who is to stop the clusters has to know which of them run.
        let leave = self.arguments.on_stop == OnStop::Leave;
        let clusters = tokio::select! {
            clusters = Clusters::start(self.layout) => clusters,
            () = asked.cancelled(), if leave => return Ok(()),
        };
        let clusters = clusters.map_err(|half| {
            running.up = half.up;
            half.error
        })?;
        running.up = clusters.up();
        let setup = tokio::select! {
            setup = self.control_plane(clusters, follower, api_in_clear, running) => setup?,
            () = asked.cancelled() => return Ok(()),
        };
        announce(&self.site, https, &self.ca.ca_file(), setup.as_deref());
        let ended = async {
            match &mut running.edge {
                Some(edge) => edge.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = asked.cancelled() => Ok(()),
            ended = ended => {
                running.edge = None;
                Err(edge_ended(ended))
            }
        }
    }

    /// Everything behind the listeners. Returns where the setup token lies, if nobody has used it yet.
    async fn control_plane(
        &self,
        clusters: Clusters,
        follower: Option<Follower>,
        api_in_clear: Option<TcpListener>,
        running: &mut Running,
    ) -> anyhow::Result<Option<PathBuf>> {
        let registry = open_registry(self.layout, self.seal)?;
        let unsafe_shared = self.arguments.unsafe_shared;
        let driver = Arc::new(open_driver(self.layout, &registry, clusters.tenants.socket_dir(), unsafe_shared)?);
        running.driver = Some(driver.clone());
        let app = self.build_app(&clusters, registry, driver, &running.stops).await?;
        running.db = Some(app.db.clone());
        let setup = identity::ensure_setup_token(&app.db, &app.setup_token_file).await?;

        let Running { tasks, stops, .. } = running;
        let socket = bind_socket(self.platform)?;
        tasks.spawn(serve_http(socket, http::platform_router(&app), stops.api.clone()));
        if let Some(listener) = api_in_clear {
            tasks.spawn(serve_http(listener, http::api_router(&app), stops.api.clone()));
        }
        if let Some(follower) = follower {
            let registered = follower.registered();
            let database_url = clusters.control.url(CONTROL_DATABASE);
            running.follower = Some(tokio::spawn(follower.run(database_url, stops.follower.clone())));
            // A deploy that goes on waits for every edge that stands in the database: ours does before any goes on.
            registered.cancelled().await;
        }
        spawn_workers(tasks, &app, self.ca, stops);
        tasks.spawn(reconcile::clusters::run(clusters, self.layout.clone(), stops.workers.clone()));
        Ok(setup)
    }

    async fn build_app(
        &self,
        clusters: &Clusters,
        registry: Registry,
        driver: Arc<ProcessDriver>,
        stops: &Stops,
    ) -> anyhow::Result<App> {
        let Self { arguments, layout, seal, site, .. } = self;
        let db = open_control_database(&clusters.control).await?;
        systemprompt_workflow::release_leases(&db, WORKER).await?;
        let admin = Db::connect(&clusters.tenants.url("postgres"), TENANTS_ADMIN_CONNECTIONS).await?;
        let databases = TenantDatabases::new(admin.pool().clone(), clusters.tenants.clone());
        databases.harden().await?;
        let infrastructure = Infrastructure {
            site: site.clone(),
            driver,
            databases,
            registry,
            seal: Arc::clone(seal),
            limits: arguments.deploy_limits(),
        };
        Ok(App::new(Parts {
            hub: EventHub::start(db.clone()),
            db,
            seal: Arc::clone(seal),
            site: site.clone(),
            plans: crate::billing::default_plans(),
            infrastructure,
            registry_key: registry_key(seal),
            setup_token_file: layout.setup_token(),
            stop: stops.streams.clone(),
            identity: Limits::default(),
        }))
    }
}

/// Tokens of what stops when: streams and the edge first, so that nothing new comes in.
#[derive(Default)]
struct Stops {
    streams: CancellationToken,
    edge: CancellationToken,
    api: CancellationToken,
    workers: CancellationToken,
    follower: CancellationToken,
}

impl Running {
    async fn drain(self) -> anyhow::Result<()> {
        let Self { stops, tasks, edge, follower, db, .. } = self;
        tracing::info!("draining");
        // Event and log streams never end by themselves; their clients come back to whoever serves next.
        stops.streams.cancel();
        stops.edge.cancel();
        let drained = match edge {
            Some(edge) => edge.await.context("the edge").map(Some),
            None => Ok(None),
        };
        tracing::info!(report = ?drained, "the edge has drained");
        stops.api.cancel();
        stops.workers.cancel();
        stops.follower.cancel();
        tasks.close();
        if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::warn!(
                "some tasks did not end in time; whatever they did is journalled and goes on at the next start"
            );
        }
        let followed = match follower {
            Some(follower) => follower.await.context("the edge's follower"),
            None => Ok(()),
        };
        if let Some(db) = db {
            db.pool().close().await;
        }
        drained.and(followed)
    }
}

/// Why an edge that nobody told to stop has ended.
pub(crate) fn edge_ended(ended: Result<DrainReport, JoinError>) -> anyhow::Error {
    match ended {
        Ok(_) => anyhow::anyhow!("the edge ended by itself; the log says why each of its workers did"),
        Err(error) => anyhow::Error::new(error).context("the edge ended by itself"),
    }
}

async fn bind_edge(
    arguments: &ServeArguments,
    layout: &Layout,
    seal: &Arc<Sealer>,
    ca: &LocalCa,
    certificate_file: CertificateFile,
    platform: &Path,
) -> anyhow::Result<Option<(BoundEdge, Follower)>> {
    // Also for an edge beside this process, which reads them from their file.
    let certificates = ca.certificates()?;
    if arguments.without_edge {
        return Ok(None);
    }
    let directory = EdgeDirectory::claim(layout, seal.clone())?;
    // The database has everything; the snapshot only makes the edge serve before that is up.
    let snapshot = directory.load().unwrap_or_else(|error| {
        tracing::warn!(
            error = format!("{error:#}"),
            "the edge starts empty, without its snapshot, until the database is up"
        );
        None
    });
    let table = snapshot.map_or_else(RouteTable::new, |snapshot| snapshot.table());
    let plan = EdgePlan { table, certificates, certificate_file, directory, platform: platform.to_owned() };
    let bound = plan.bind(&arguments.edge).await?;
    refuse_absent_instances(layout);
    Ok(Some(bound))
}

fn spawn_workers(tasks: &TaskTracker, app: &App, ca: &Arc<LocalCa>, stops: &Stops) {
    let infrastructure = &app.infrastructure;
    let engine = || Engine::new(app.db.clone(), EngineConfig::new(WORKER));
    tasks.spawn(
        engine()
            .register::<ProvisionTenant>(infrastructure.clone())
            .register::<DeleteTenant>(infrastructure.clone())
            .run(stops.workers.clone()),
    );
    // With slots of their own: a deploy may wait minutes for an app that does not answer.
    tasks.spawn(engine().register::<DeployTenant>(infrastructure.clone()).run(stops.workers.clone()));
    tasks.spawn(reconcile::instances::run(app.db.clone(), infrastructure.clone(), stops.workers.clone()));
    tasks.spawn(reconcile::garbage::run(app.db.clone(), infrastructure.clone(), stops.workers.clone()));
    let (ca, stop) = (ca.clone(), stops.workers.clone());
    tasks.spawn(async move {
        tokio::select! {
            never = ca.keep_renewed(RENEWAL, Utc::now) => match never {},
            () = stop.cancelled() => {}
        }
    });
}

async fn bind_clear(address: Option<SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    anyhow::ensure!(
        address.ip().is_loopback(),
        "--http-api serves in clear, so it takes a loopback address such as 127.0.0.1:8090, not {address}"
    );
    let listener = TcpListener::bind(address).await;
    Ok(Some(listener.with_context(|| format!("listening on {address} (--http-api); give another port"))?))
}

async fn serve_http<L>(listener: L, router: axum::Router, stop: CancellationToken)
where
    L: axum::serve::Listener,
    L::Addr: std::fmt::Debug,
{
    if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await {
        tracing::error!(%error, "serving the platform");
    }
}
