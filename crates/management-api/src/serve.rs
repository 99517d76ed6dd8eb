//! `management-api serve`: lock, bind, start, serve, drain with a deadline.

use crate::{
    app::{App, Infrastructure, Parts, Site},
    certs::LocalCa,
    commands::{announce, wait_for_signal},
    config::{Layout, OnStop, ServeArguments},
    edge_role::{EdgePlan, Follower, Snapshot},
    http,
    identity::{self, Limits},
    installation::{
        CONTROL_DATABASE, Clusters, bind_socket, lock_data, open_control_database, open_data, open_driver,
        open_registry, platform_socket, registry_key, remove_socket_directory,
    },
    reconcile,
    seal::Sealer,
    tenants::{databases::TenantDatabases, delete::DeleteTenant, deploy::DeployTenant, provision::ProvisionTenant},
};
use anyhow::Context as _;
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};
use systemprompt_compute::process::ProcessDriver;
use systemprompt_edge::{BoundEdge, DrainReport, RouteTable};
use systemprompt_registry::Registry;
use systemprompt_workflow::{Db, Engine, EngineConfig, events::EventHub};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const TENANTS_ADMIN_CONNECTIONS: u32 = 4;
/// Who holds leases. One control plane an installation, by the lock on its data directory: what this name held
/// before was held by a process that is gone, and need not wait for its lease to end.
const WORKER: &str = "control-plane";
/// How long tasks may take to end once we are told to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Runs the control plane until SIGTERM or SIGINT.
pub(crate) async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    let layout = open_data(&arguments.edge.data.data)?;
    let _lock = lock_data(&layout)?;
    let seal = Arc::new(Sealer::load_or_create(&layout.seal_key())?);
    let ca = LocalCa::load_or_create(&layout.ca(), &arguments.edge.zone)?;
    let platform = platform_socket(&layout);

    // Ports before anything that takes long: a taken one is said at once, and the edge serves from its snapshot
    // while the rest comes up.
    let edge = bind_edge(&arguments, &layout, &seal, &ca, &platform).await?;
    let site = arguments.edge.site(edge.as_ref().map(|(edge, _)| edge.https_addr().port()));
    let api_in_clear = bind_clear(arguments.http_api).await?;
    let stops = Stops::default();
    let edge = edge.map(|(edge, follower)| StartedEdge::start(edge, follower, &stops));

    let clusters = Arc::new(Clusters::start(&layout).await?);
    let registry = open_registry(&layout, &seal)?;
    let opened = Opened { layout, site, seal, registry, clusters: clusters.clone() };
    let served =
        control_plane(&arguments, opened, Listening { edge, api_in_clear, platform: &platform, ca: &ca }, stops).await;
    // Also when it did not get to serve: what was started for it is not left behind.
    if arguments.on_stop == OnStop::Stop {
        clusters.stop().await?;
        remove_socket_directory(&platform);
    }
    served
}

/// What listens before there is anything behind it.
struct Listening<'a> {
    edge: Option<StartedEdge>,
    api_in_clear: Option<TcpListener>,
    platform: &'a Path,
    ca: &'a LocalCa,
}

/// Everything behind the listeners, from its start to its end.
async fn control_plane(
    arguments: &ServeArguments,
    opened: Opened,
    listening: Listening<'_>,
    stops: Stops,
) -> anyhow::Result<()> {
    let socket_dir = opened.clusters.tenants.socket_dir();
    let driver = Arc::new(open_driver(&opened.layout, &opened.registry, socket_dir, arguments.unsafe_shared)?);
    let app = build_app(arguments, &opened, driver.clone(), &stops).await?;
    let setup = identity::ensure_setup_token(&app.db, &app.setup_token_file).await?;

    let tasks = TaskTracker::new();
    let socket = bind_socket(listening.platform)?;
    tasks.spawn(serve_http(socket, http::platform_router(&app), stops.api.clone()));
    if let Some(listener) = listening.api_in_clear {
        tasks.spawn(serve_http(listener, http::api_router(&app), stops.api.clone()));
    }
    spawn_workers(&tasks, &app, &stops);
    tasks.spawn(reconcile::clusters::run(opened.clusters.clone(), opened.layout.clone(), stops.workers.clone()));
    let https = listening.edge.as_ref().map(|edge| edge.https);
    let edge = listening.edge.map(|edge| edge.follow(opened.clusters.control.url(CONTROL_DATABASE), &stops));

    announce(&app.site, https, &listening.ca.ca_file(), setup.as_deref());
    wait_for_signal().await?;
    drain(edge, tasks, &stops).await?;
    if arguments.on_stop == OnStop::Stop {
        driver.shutdown(app.infrastructure.limits.stop_grace).await?;
    }
    app.db.pool().close().await;
    Ok(())
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

async fn drain(edge: Option<FollowingEdge>, tasks: TaskTracker, stops: &Stops) -> anyhow::Result<()> {
    tracing::info!("draining");
    // Event and log streams never end by themselves; their clients come back to whoever serves next.
    stops.streams.cancel();
    stops.edge.cancel();
    let following = match edge {
        Some(FollowingEdge { serving, following }) => {
            let report = serving.await.context("the edge")?;
            tracing::info!(?report, "the edge has drained");
            Some(following)
        }
        None => None,
    };
    stops.api.cancel();
    stops.workers.cancel();
    stops.follower.cancel();
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time; whatever they did is journalled and goes on at the next start");
    }
    match following {
        Some(following) => following.await.context("the edge's follower"),
        None => Ok(()),
    }
}

async fn bind_edge(
    arguments: &ServeArguments,
    layout: &Layout,
    seal: &Arc<Sealer>,
    ca: &LocalCa,
    platform: &Path,
) -> anyhow::Result<Option<(BoundEdge, Follower)>> {
    if arguments.without_edge {
        return Ok(None);
    }
    let snapshot = Snapshot::load(&layout.edge_snapshot(), seal)?;
    let plan = EdgePlan {
        table: snapshot.map_or_else(RouteTable::new, |snapshot| snapshot.table()),
        certificates: ca.certificates()?,
        snapshot_file: layout.edge_snapshot(),
        platform: platform.to_owned(),
        seal: seal.clone(),
    };
    plan.bind(&arguments.edge).await.map(Some)
}

/// An edge that serves its snapshot.
struct StartedEdge {
    https: SocketAddr,
    serving: JoinHandle<DrainReport>,
    follower: Follower,
}

/// An edge that serves and follows the database.
struct FollowingEdge {
    serving: JoinHandle<DrainReport>,
    following: JoinHandle<()>,
}

impl StartedEdge {
    fn start(edge: BoundEdge, follower: Follower, stops: &Stops) -> Self {
        let https = edge.https_addr();
        Self { https, serving: tokio::spawn(edge.serve(stops.edge.clone())), follower }
    }

    fn follow(self, database_url: String, stops: &Stops) -> FollowingEdge {
        let following = tokio::spawn(self.follower.run(database_url, stops.follower.clone()));
        FollowingEdge { serving: self.serving, following }
    }
}

/// What an [`App`] is made from.
struct Opened {
    layout: Layout,
    site: Site,
    seal: Arc<Sealer>,
    registry: Registry,
    clusters: Arc<Clusters>,
}

async fn build_app(
    arguments: &ServeArguments,
    opened: &Opened,
    driver: Arc<ProcessDriver>,
    stops: &Stops,
) -> anyhow::Result<App> {
    let Opened { layout, site, seal, registry, clusters } = opened;
    let db = open_control_database(&clusters.control).await?;
    systemprompt_workflow::release_leases(&db, WORKER).await?;
    let admin = Db::connect(&clusters.tenants.url("postgres"), TENANTS_ADMIN_CONNECTIONS).await?;
    let databases = TenantDatabases::new(admin.pool().clone(), clusters.tenants.clone());
    databases.harden().await?;
    let infrastructure = Infrastructure {
        site: site.clone(),
        driver,
        databases,
        registry: registry.clone(),
        seal: seal.clone(),
        limits: arguments.deploy_limits(),
    };
    Ok(App::new(Parts {
        hub: EventHub::start(db.clone()),
        db,
        seal: seal.clone(),
        site: site.clone(),
        plans: crate::billing::default_plans(),
        infrastructure,
        registry_key: registry_key(seal),
        setup_token_file: layout.setup_token(),
        stop: stops.streams.clone(),
        identity: Limits::default(),
    }))
}

fn spawn_workers(tasks: &TaskTracker, app: &App, stops: &Stops) {
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
