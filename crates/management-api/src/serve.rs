//! From the command line to a running control plane, and back: lock, bind, start, serve, drain with a deadline.

use crate::{
    app::{App, Infrastructure, Parts, Site},
    certs::LocalCa,
    config::{
        AccountArguments, Arguments, Command, DataArguments, EdgeArguments, LAUNCHER, Layout, OnStop, ServeArguments,
    },
    edge_role::{Follower, Snapshot, cert_table},
    http,
    identity::{self, NewAccount, Role},
    images::RegistryImages,
    reconcile,
    seal::Sealer,
    tenants::{
        databases::{SANDBOX_SOCKET_DIR, TenantDatabases},
        delete::DeleteTenant,
        deploy::DeployTenant,
        provision::ProvisionTenant,
    },
};
use anyhow::Context as _;
use std::{
    fs::File,
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};
use systemprompt_compute::process::{Bind, ProcessConfig, ProcessDriver};
use systemprompt_edge::{BoundEdge, Edge, EdgeConfig, Limits, RouteTable, Upstream};
use systemprompt_postgres::{Access, Cluster, ClusterConfig, Durability, StopMode};
use systemprompt_registry::{Registry, RegistryConfig, TokenKey};
use systemprompt_workflow::{Db, Engine, EngineConfig, events::EventHub};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::watch,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const CONTROL_DATABASE: &str = "systemprompt";
const CONTROL_CONNECTIONS: u32 = 10;
const TENANTS_ADMIN_CONNECTIONS: u32 = 4;
/// Who holds leases. One control plane an installation, by the lock on its data directory: what this name held
/// before was held by a process that is gone, and need not wait for its lease to end.
const WORKER: &str = "control-plane";
/// How long requests may take to end once we are told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a request waits while its tenant is brought up.
const HOLD: Duration = Duration::from_secs(10);
const MAX_BLOB_BYTES: u64 = 2 * 1024 * 1024 * 1024;
const TENANT_QUOTA_BYTES: u64 = 10 * 1024 * 1024 * 1024;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("../../migrations");

/// Runs one command to its end.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    start_logging();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("starting the runtime")),
    };
    let result = runtime.block_on(async {
        match arguments.command {
            Command::Serve(arguments) => serve(arguments).await,
            Command::Edge(arguments) => edge_alone(arguments).await,
            Command::Stop(arguments) => stop_leftovers(&arguments).await,
            Command::CreateAccount(arguments) => create_account(&arguments).await,
            Command::Endpoints => print_endpoints(),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

#[allow(clippy::print_stderr, reason = "the last words of a process that could not run")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,sqlx=warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

async fn serve(arguments: ServeArguments) -> anyhow::Result<()> {
    let layout = open_data(&arguments.edge.data.data)?;
    let _lock = lock_data(&layout)?;
    let seal = Arc::new(Sealer::load_or_create(&layout.seal_key())?);
    let ca = LocalCa::load_or_create(&layout.ca(), &arguments.edge.zone)?;
    let certificates = ca.certificates()?;
    let platform = platform_socket(&layout)?;

    // Ports before anything that takes long: a taken one is said at once.
    let snapshot = Snapshot::load(&layout.edge_snapshot(), &seal)?;
    let table = watch::Sender::new(Arc::new(snapshot.map_or_else(RouteTable::new, |snapshot| snapshot.table())));
    let (_certs, certs) = watch::channel(Arc::new(cert_table(&certificates)?));
    let edge = if arguments.without_edge {
        None
    } else {
        Some(Edge::new(edge_config(&arguments.edge, &platform), table.subscribe(), certs).bind().await?)
    };
    let bound_port = edge.as_ref().map_or_else(
        || arguments.edge.https.addresses().first().map_or(443, std::net::SocketAddr::port),
        |edge| edge.https_addr().port(),
    );
    let site = arguments.edge.site(bound_port);
    let api_in_clear = bind_clear(arguments.http_api).await?;

    // The edge serves from its snapshot while the rest comes up.
    let stops = Stops::default();
    let handle = edge.as_ref().map(BoundEdge::handle);
    let https = edge.as_ref().map(BoundEdge::https_addr);
    let edge = edge.map(|edge| tokio::spawn(edge.serve(stops.edge.clone())));

    let clusters = Clusters::start(&layout).await?;
    let registry = open_registry(&layout, &seal)?;
    let driver = Arc::new(open_driver(&layout, &registry, clusters.tenants.socket_dir(), arguments.unsafe_shared)?);
    let app = build_app(
        &arguments,
        Opened {
            layout: &layout,
            site: &site,
            seal: &seal,
            clusters: &clusters,
            registry,
            driver: driver.clone(),
            stops: &stops,
        },
    )
    .await?;
    let setup = identity::ensure_setup_token(&app.db, &app.setup_token_file).await?;

    let tasks = TaskTracker::new();
    let socket = bind_socket(&platform)?;
    tasks.spawn(serve_http(socket, http::platform_router(&app), stops.api.clone()));
    if let Some(listener) = api_in_clear {
        tasks.spawn(serve_http(listener, http::api_router(&app), stops.api.clone()));
    }
    spawn_workers(&tasks, &app, &stops);
    let following = handle.map(|edge| {
        let follower = Follower {
            table,
            edge,
            certificates,
            snapshot_file: layout.edge_snapshot(),
            platform,
            database_url: clusters.control.url(CONTROL_DATABASE),
            seal: seal.clone(),
        };
        tokio::spawn(follower.run(stops.follower.clone()))
    });

    announce(&site, https, &ca.ca_file(), setup.as_deref());
    wait_for_signal().await?;

    tracing::info!("draining");
    stops.edge.cancel();
    if let Some(edge) = edge {
        let report = edge.await.context("the edge")?;
        tracing::info!(?report, "the edge has drained");
    }
    stops.api.cancel();
    stops.workers.cancel();
    stops.follower.cancel();
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::warn!("some tasks did not end in time; whatever they did is journalled and goes on at the next start");
    }
    if let Some(following) = following {
        following.await.context("the edge's follower")?;
    }
    if arguments.on_stop == OnStop::Stop {
        driver.shutdown(app.infrastructure.limits.stop_grace).await?;
        app.db.pool().close().await;
        clusters.stop().await?;
        remove_socket_directory(&platform_socket(&layout)?);
    }
    Ok(())
}

/// Tokens of what stops when: the edge first, so that nothing new comes in.
#[derive(Default)]
struct Stops {
    edge: CancellationToken,
    api: CancellationToken,
    workers: CancellationToken,
    follower: CancellationToken,
}

fn open_data(data: &Path) -> anyhow::Result<Layout> {
    std::fs::create_dir_all(data).with_context(|| format!("making the data directory {}", data.display()))?;
    let data = data.canonicalize().with_context(|| format!("finding the data directory {}", data.display()))?;
    Ok(Layout::new(&data))
}

/// One control plane a data directory.
fn lock_data(layout: &Layout) -> anyhow::Result<File> {
    let path = layout.lock();
    let file = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
    file.try_lock().map_err(|error| match error {
        std::fs::TryLockError::WouldBlock => anyhow::anyhow!(
            "the data directory {} is in use by another management-api; stop that one, or give another directory with --data",
            layout.root().display()
        ),
        std::fs::TryLockError::Error(error) => anyhow::Error::new(error).context(format!("locking {}", path.display())),
    })?;
    Ok(file)
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

/// The two private clusters.
struct Clusters {
    control: Cluster,
    tenants: Arc<Cluster>,
}

impl Clusters {
    async fn start(layout: &Layout) -> anyhow::Result<Self> {
        let (control, tenants) = tokio::try_join!(
            start_cluster(layout, "control", Access::ControlPlane),
            start_cluster(layout, "tenants", Access::Tenants),
        )?;
        Ok(Self { control, tenants: Arc::new(tenants) })
    }

    async fn stop(&self) -> anyhow::Result<()> {
        tokio::try_join!(self.control.stop(StopMode::Fast), self.tenants.stop(StopMode::Fast))?;
        for cluster in [&self.control, &*self.tenants] {
            // Not while an instance lives, whose sandbox has this very directory bound into it: all are stopped.
            let gone = std::fs::remove_dir(cluster.socket_dir());
            tracing::debug!(?gone, "removed a cluster's socket directory");
        }
        Ok(())
    }
}

async fn start_cluster(layout: &Layout, name: &str, access: Access) -> anyhow::Result<Cluster> {
    let config = ClusterConfig {
        name: name.to_owned(),
        data: layout.cluster(name),
        access,
        settings: Vec::new(),
        durability: Durability::Full,
    };
    Cluster::start(config).await.with_context(|| format!("starting the {name} database cluster"))
}

/// What an [`App`] is made from.
struct Opened<'a> {
    layout: &'a Layout,
    site: &'a Site,
    seal: &'a Arc<Sealer>,
    clusters: &'a Clusters,
    registry: Registry,
    driver: Arc<ProcessDriver>,
    stops: &'a Stops,
}

async fn build_app(arguments: &ServeArguments, opened: Opened<'_>) -> anyhow::Result<App> {
    let Opened { layout, site, seal, clusters, registry, driver, stops } = opened;
    let db = open_control_database(&clusters.control).await?;
    systemprompt_workflow::release_leases(&db, WORKER).await?;
    let admin = Db::connect(&clusters.tenants.url("postgres"), TENANTS_ADMIN_CONNECTIONS).await?;
    let infrastructure = Infrastructure {
        site: site.clone(),
        driver,
        databases: TenantDatabases::new(admin.pool().clone(), clusters.tenants.clone()),
        registry,
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
        stop: stops.api.clone(),
        identity: identity::Limits::default(),
    }))
}

fn registry_key(seal: &Sealer) -> TokenKey {
    TokenKey::from_bytes(&seal.derive("registry-token"))
}

fn open_registry(layout: &Layout, seal: &Sealer) -> anyhow::Result<Registry> {
    let config = RegistryConfig {
        root: layout.registry(),
        max_blob_bytes: MAX_BLOB_BYTES,
        tenant_quota_bytes: TENANT_QUOTA_BYTES,
    };
    Registry::open(config, registry_key(seal)).context("opening the registry")
}

fn open_driver(
    layout: &Layout,
    registry: &Registry,
    postgres_socket: &Path,
    unsafe_shared: bool,
) -> anyhow::Result<ProcessDriver> {
    let executable = std::env::current_exe().context("finding this program's own file")?;
    let launcher = vec![executable.into(), LAUNCHER.into()];
    let config = ProcessConfig {
        binds: vec![Bind { host: postgres_socket.to_owned(), sandbox: PathBuf::from(SANDBOX_SOCKET_DIR) }],
        unsafe_shared,
        ..ProcessConfig::new(layout.compute(), launcher, Arc::new(RegistryImages::new(registry.clone())))
    };
    ProcessDriver::open(config).context("opening the process driver")
}

async fn open_control_database(control: &Cluster) -> anyhow::Result<Db> {
    let bootstrap = Db::connect(&control.url("postgres"), 1).await?;
    let exists = sqlx::query_scalar::<_, bool>("SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)")
        .bind(CONTROL_DATABASE)
        .fetch_one(bootstrap.pool())
        .await?;
    if !exists {
        sqlx::query("CREATE DATABASE systemprompt").execute(bootstrap.pool()).await?;
    }
    bootstrap.pool().close().await;
    let db = Db::connect(&control.url(CONTROL_DATABASE), CONTROL_CONNECTIONS).await?;
    MIGRATIONS.run(db.pool()).await.context("bringing the control database's schema up to date")?;
    Ok(db)
}

fn spawn_workers(tasks: &TaskTracker, app: &App, stops: &Stops) {
    let infrastructure = &app.infrastructure;
    let engine = Engine::new(app.db.clone(), EngineConfig::new(WORKER))
        .register::<ProvisionTenant>(infrastructure.clone())
        .register::<DeployTenant>(infrastructure.clone())
        .register::<DeleteTenant>(infrastructure.clone());
    tasks.spawn(engine.run(stops.workers.clone()));
    tasks.spawn(reconcile::instances::run(app.db.clone(), infrastructure.clone(), stops.workers.clone()));
    tasks.spawn(reconcile::garbage::run(app.db.clone(), infrastructure.clone(), stops.workers.clone()));
}

async fn edge_alone(arguments: EdgeArguments) -> anyhow::Result<()> {
    let layout = open_data(&arguments.data.data)?;
    let seal = Arc::new(Sealer::load(&layout.seal_key())?);
    let snapshot = Snapshot::load(&layout.edge_snapshot(), &seal)?.with_context(|| {
        format!(
            "there is no {} yet; run `management-api serve --data {}` first",
            layout.edge_snapshot().display(),
            layout.root().display()
        )
    })?;
    let certificates = snapshot.certificates().to_vec();
    let table = watch::Sender::new(Arc::new(snapshot.table()));
    let (_certs, certs) = watch::channel(Arc::new(cert_table(&certificates)?));
    let config = edge_config(&arguments, &snapshot.platform);
    let edge = Edge::new(config, table.subscribe(), certs).bind().await?;
    let stop = CancellationToken::new();
    let follower = Follower {
        table,
        edge: edge.handle(),
        certificates,
        snapshot_file: layout.edge_snapshot(),
        platform: snapshot.platform,
        database_url: snapshot.database_url,
        seal,
    };
    let following = tokio::spawn(follower.run(stop.clone()));
    let site = arguments.site(edge.https_addr().port());
    announce(&site, Some(edge.https_addr()), &layout.ca().join("ca.pem"), None);
    let serving = tokio::spawn(edge.serve(stop.clone()));
    wait_for_signal().await?;
    stop.cancel();
    let report = serving.await.context("the edge")?;
    tracing::info!(?report, "the edge has drained");
    following.await.context("the edge's follower")?;
    Ok(())
}

/// Stops instances and clusters of a control plane that is not running.
async fn stop_leftovers(arguments: &DataArguments) -> anyhow::Result<()> {
    let layout = open_data(&arguments.data)?;
    let _lock = lock_data(&layout)?;
    // Starting adopts what runs; a cluster that does not run is stopped again at once.
    let clusters = Clusters::start(&layout).await?;
    let seal = Sealer::load_or_create(&layout.seal_key())?;
    let registry = open_registry(&layout, &seal)?;
    let driver = open_driver(&layout, &registry, clusters.tenants.socket_dir(), true)?;
    driver.shutdown(Duration::from_secs(10)).await?;
    clusters.stop().await?;
    remove_socket_directory(&platform_socket(&layout)?);
    Ok(())
}

/// Empty by now but for a socket that nobody listens on.
fn remove_socket_directory(socket: &Path) {
    let removed = std::fs::remove_file(socket);
    let gone = socket.parent().map(std::fs::remove_dir);
    tracing::debug!(?removed, ?gone, "removed the platform's socket");
}

/// A socket's path has at most 107 bytes, and a data directory may lie deep: a short name derived from it.
fn platform_socket(layout: &Layout) -> anyhow::Result<PathBuf> {
    use sha2::Digest as _;
    use std::os::unix::{ffi::OsStrExt as _, fs::DirBuilderExt as _};
    let digest = hex::encode(sha2::Sha256::digest(layout.root().as_os_str().as_bytes()));
    let base = if rustix::process::geteuid().is_root() {
        PathBuf::from("/run/systemprompt")
    } else {
        std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from).join("systemprompt")
    };
    let directory = base.join(format!("{}-platform", &digest[..8]));
    std::fs::create_dir_all(&base).with_context(|| format!("making {}", base.display()))?;
    match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("making {}", directory.display()))
        }
        _ => Ok(directory.join("platform.sock")),
    }
}

fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    // The data directory is locked, so whoever listened here is gone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))
}

async fn bind_clear(address: Option<std::net::SocketAddr>) -> anyhow::Result<Option<TcpListener>> {
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

/// Beside a running `serve` as well as without one.
#[allow(clippy::print_stdout, reason = "stdout is data")]
async fn create_account(arguments: &AccountArguments) -> anyhow::Result<()> {
    let mut password = zeroize::Zeroizing::new(String::new());
    std::io::Read::read_to_string(&mut std::io::stdin().lock(), &mut password).context("reading the password")?;
    let new = NewAccount {
        email: arguments.email.parse()?,
        password: password.trim_end_matches('\n').parse()?,
        name: None,
        role: if arguments.operator { Role::Operator } else { Role::Member },
    };
    let layout = open_data(&arguments.data.data)?;
    let control = start_cluster(&layout, "control", Access::ControlPlane).await?;
    let db = open_control_database(&control).await?;
    let signed_in = identity::create_signed_in(&db, new).await?;
    println!("{}", serde_json::to_string(&signed_in)?);
    Ok(())
}

#[allow(clippy::print_stdout, reason = "stdout is data")]
fn print_endpoints() -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(&http::endpoints().table())?);
    Ok(())
}

/// One JSON line for whoever started us.
#[allow(clippy::print_stdout, reason = "stdout is data: this line is the whole of it")]
fn announce(site: &Site, https: Option<std::net::SocketAddr>, ca: &Path, setup_token_file: Option<&Path>) {
    let ready = serde_json::json!({
        "event": "ready",
        "https": https.map(|address| address.to_string()),
        "api_url": site.api_url(),
        "ca_file": ca,
        "setup_token_file": setup_token_file,
    });
    println!("{ready}");
}

async fn wait_for_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
