//! What an installation has on this host: its directory and lock, clusters, sockets, registry, driver and database.

use crate::{
    config::{LAUNCHER, Layout},
    images::RegistryImages,
    seal::{MasterKeyError, Sealer},
    tenants::databases::SANDBOX_SOCKET_DIR,
};
use anyhow::Context as _;
use std::{
    fs::{File, Permissions},
    io::{Read, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_compute::process::{self, Bind, NetworkConfig, ProcessConfig, ProcessDriver};
use systemprompt_postgres::{
    Access, Cluster, ClusterConfig, Durability, StopMode, prepare_runtime_directory, runtime_directory,
};
use systemprompt_registry::{Registry, RegistryConfig, TokenKey};
use systemprompt_workflow::Db;
use tokio::net::UnixListener;

pub(crate) const CONTROL_DATABASE: &str = "systemprompt";
const CONTROL_CONNECTIONS: u32 = 10;
const MAX_BLOB_BYTES: u64 = 2 * 1024 * 1024 * 1024;
const TENANT_QUOTA_BYTES: u64 = 10 * 1024 * 1024 * 1024;
/// As much as the process driver unpacks of one image.
const MAX_UNPACKED_BYTES: u64 = 8 * 1024 * 1024 * 1024;

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("../../migrations");

/// The data directory, made where it is missing.
pub(crate) fn open_data(data: &Path) -> anyhow::Result<Layout> {
    let data = &std::path::absolute(data).context("--data is not a path")?;
    make_passable(data).with_context(|| format!("making the data directory {}", data.display()))?;
    find_data(data)
}

/// The data directory of an installation that is there already.
pub(crate) fn existing_data(data: &Path) -> anyhow::Result<Layout> {
    let layout = find_data(data)?;
    anyhow::ensure!(
        layout.seal_key().is_file(),
        "there is no installation in {}; name its directory with --data",
        data.display()
    );
    Ok(layout)
}

fn find_data(data: &Path) -> anyhow::Result<Layout> {
    let data = data.canonicalize().with_context(|| format!("finding the data directory {}", data.display()))?;
    Ok(Layout::new(&data))
}

/// Makes what is missing of a directory. Clusters and instances run as other users and have to get through, whatever
/// our umask is.
fn make_passable(directory: &Path) -> std::io::Result<()> {
    for directory in directory.ancestors().take_while(|path| !path.exists()).collect::<Vec<_>>().into_iter().rev() {
        std::fs::create_dir(directory)?;
        std::fs::set_permissions(directory, Permissions::from_mode(0o711))?;
    }
    Ok(())
}

/// One control plane a data directory.
pub(crate) fn lock_data(layout: &Layout) -> anyhow::Result<File> {
    let path = layout.lock();
    // Not truncated: it may hold the id of who has it.
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    let mut file = file.with_context(|| format!("opening {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(std::fs::TryLockError::WouldBlock) => anyhow::bail!("{}", in_use(layout.root(), &mut file)),
        Err(std::fs::TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("locking {}", path.display()));
        }
    }
    file.set_len(0)
        .and_then(|()| writeln!(file, "{}", std::process::id()))
        .with_context(|| format!("writing {}", path.display()))?;
    Ok(file)
}

fn in_use(data: &Path, lock: &mut impl Read) -> String {
    let mut holder = String::new();
    // Unreadable or not written yet: then it cannot be named.
    let read = lock.read_to_string(&mut holder).map(|_| holder.trim().parse::<u32>());
    let (who, how) = match read {
        Ok(Ok(process)) => (format!(" (process {process})"), format!(" with `kill {process}`")),
        _ => (String::new(), String::new()),
    };
    format!(
        "the data directory {} is in use by another management-api{who}; stop that one{how}, \
         or give another directory with --data",
        data.display()
    )
}

/// The two private clusters.
pub(crate) struct Clusters {
    pub(crate) control: Cluster,
    pub(crate) tenants: Arc<Cluster>,
}

/// Not both clusters could be started.
#[derive(Debug)]
pub(crate) struct HalfStarted {
    pub(crate) error: anyhow::Error,
    /// What runs all the same.
    pub(crate) up: Vec<Cluster>,
}

impl Clusters {
    /// Waits for both, whatever becomes of the other, so that what runs is known.
    pub(crate) async fn start(layout: &Layout) -> Result<Self, HalfStarted> {
        match tokio::join!(
            start_cluster(layout, "control", Access::ControlPlane),
            start_cluster(layout, "tenants", Access::Tenants),
        ) {
            (Ok(control), Ok(tenants)) => Ok(Self { control, tenants: Arc::new(tenants) }),
            (Err(error), other) | (other, Err(error)) => Err(HalfStarted { error, up: other.into_iter().collect() }),
        }
    }

    /// Those that were made, running or not; starts nothing.
    pub(crate) async fn existing(layout: &Layout) -> anyhow::Result<Vec<Cluster>> {
        let mut found = Vec::new();
        for name in ["control", "tenants"] {
            found.extend(Cluster::existing(name, &layout.cluster(name)).await?);
        }
        Ok(found)
    }

    pub(crate) fn up(&self) -> Vec<Cluster> {
        vec![self.control.clone(), Cluster::clone(&self.tenants)]
    }
}

/// Stops instances, and then the clusters that are up.
///
/// # Errors
/// When instances may go on: then so do the clusters, whose socket directory is bound into their sandboxes for as long
/// as they live.
pub(crate) async fn take_down(
    layout: &Layout,
    driver: anyhow::Result<Arc<ProcessDriver>>,
    up: &[Cluster],
    grace: Duration,
) -> anyhow::Result<()> {
    match driver {
        Ok(driver) => driver.shutdown(grace).await.context("stopping the instances; the clusters were left running")?,
        Err(error) if may_have_instances(layout) => {
            return Err(error.context(format!(
                "instances may run and cannot be stopped, so the database clusters were left running too; mend this, then run `management-api stop --data {}`",
                layout.root().display()
            )));
        }
        Err(error) => tracing::debug!(%error, "there is no app, so there is no instance to stop"),
    }
    let stopped = futures_util::future::join_all(up.iter().map(|cluster| cluster.stop(StopMode::Fast))).await;
    stopped.into_iter().collect::<Result<Vec<_>, _>>()?;
    for cluster in up {
        // Not while an instance lives, whose sandbox has this very directory bound into it: all are stopped.
        let gone = std::fs::remove_dir(cluster.socket_dir());
        tracing::debug!(?gone, "removed a cluster's socket directory");
    }
    remove_socket_directory(&platform_socket(layout));
    Ok(())
}

/// Whether the driver has ever had an app here: it keeps each in a folder.
fn may_have_instances(layout: &Layout) -> bool {
    std::fs::read_dir(layout.compute().join("apps")).is_ok_and(|mut apps| apps.next().is_some())
}

/// A driver for whoever only stops what earlier ones started: what new sandboxes would show does not matter.
pub(crate) fn open_stopping_driver(layout: &Layout, seal: &Sealer) -> anyhow::Result<Arc<ProcessDriver>> {
    let registry = open_registry(layout, seal)?;
    open_driver(layout, &registry, layout.root(), true).map(Arc::new)
}

pub(crate) async fn start_cluster(layout: &Layout, name: &str, access: Access) -> anyhow::Result<Cluster> {
    let config = ClusterConfig {
        name: name.to_owned(),
        data: layout.cluster(name),
        access,
        settings: Vec::new(),
        durability: Durability::Full,
    };
    Cluster::start(config).await.with_context(|| format!("starting the {name} database cluster"))
}

pub(crate) fn registry_key(seal: &Sealer) -> TokenKey {
    TokenKey::from_bytes(&seal.derive("registry-token"))
}

pub(crate) fn open_registry(layout: &Layout, seal: &Sealer) -> anyhow::Result<Registry> {
    let config = RegistryConfig {
        root: layout.registry(),
        max_blob_bytes: MAX_BLOB_BYTES,
        tenant_quota_bytes: TENANT_QUOTA_BYTES,
        max_unpacked_bytes: MAX_UNPACKED_BYTES,
    };
    // Images hold tenants' code; whoever else works on this machine has no business there.
    std::fs::create_dir_all(&config.root).with_context(|| format!("making {}", config.root.display()))?;
    std::fs::set_permissions(&config.root, Permissions::from_mode(0o700))
        .with_context(|| format!("closing {} to others", config.root.display()))?;
    Registry::open(config, registry_key(seal)).context("opening the registry")
}

pub(crate) fn open_driver(
    layout: &Layout,
    registry: &Registry,
    postgres_socket: &Path,
    unsafe_shared: bool,
) -> anyhow::Result<ProcessDriver> {
    // Not by path: what lies there after an upgrade may read orders of another form.
    let launcher = vec!["/proc/self/exe".into(), LAUNCHER.into()];
    let config = ProcessConfig {
        binds: vec![Bind { host: postgres_socket.to_owned(), sandbox: PathBuf::from(SANDBOX_SOCKET_DIR) }],
        unsafe_shared,
        ..ProcessConfig::new(layout.compute(), launcher, Arc::new(RegistryImages::new(registry.clone())))
    };
    ProcessDriver::open(config).context("opening the process driver")
}

/// The master key. A new one is made only where there is nothing yet: what another has sealed would be lost for good,
/// and nobody would be told.
pub(crate) fn open_seal(layout: &Layout) -> Result<Sealer, MasterKeyError> {
    let path = layout.seal_key();
    if layout.cluster("control").exists() { Sealer::load(&path) } else { Sealer::load_or_create(&path) }
}

/// For an edge, before it serves from a snapshot: what that names need not run.
pub(crate) fn refuse_absent_instances(layout: &Layout) {
    if let Err(error) = process::refuse_absent_instances(&layout.compute(), &NetworkConfig::default()) {
        tracing::warn!(%error, "requests to instances that do not run may leave this machine");
    }
}

pub(crate) async fn open_control_database(control: &Cluster) -> anyhow::Result<Db> {
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

/// A socket's path has at most 107 bytes, and a data directory may lie deep: a short name derived from it.
pub(crate) fn platform_socket(layout: &Layout) -> PathBuf {
    use sha2::Digest as _;
    use std::os::unix::ffi::OsStrExt as _;
    let digest = hex::encode(sha2::Sha256::digest(layout.root().as_os_str().as_bytes()));
    runtime_directory().join(format!("{}-platform/platform.sock", &digest[..8]))
}

/// Listens on the platform's socket, in a directory that only we may search.
pub(crate) fn bind_socket(path: &Path) -> anyhow::Result<UnixListener> {
    use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
    let directory = path.parent().context("the socket lies in a directory")?;
    prepare_runtime_directory()?;
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(error).with_context(|| format!("making {}", directory.display()));
        }
        _ => {}
    }
    // It may lie where everybody can make directories: ours, and nobody else's.
    let found = std::fs::symlink_metadata(directory).with_context(|| format!("looking at {}", directory.display()))?;
    anyhow::ensure!(
        found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o777 == 0o700,
        "expected {} to be a directory of this user with mode 0700; remove it and start again",
        directory.display()
    );
    // The data directory is locked, so whoever listened here is gone.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("removing the old {}", path.display()));
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))
}

/// Empty by now but for a socket that nobody listens on.
fn remove_socket_directory(socket: &Path) {
    let removed = std::fs::remove_file(socket);
    let gone = socket.parent().map(std::fs::remove_dir);
    tracing::debug!(?removed, ?gone, "removed the platform's socket");
}
