//! The process driver: an image unpacked on this host, its command run in a bubblewrap sandbox.
//!
//! ```text
//! driver ── order by stdin ──► launcher ── exec ──► bwrap ──► init of the sandbox (bwrap) ──► the image's command
//!                                 │ lock on `status`, kept for life      │ pipe ──► writer ── appends ──► `output`
//!                                 └ header, child pid, exit code appended to `status`
//! ```
//!
//! The driver keeps nothing in memory that it needs later. An instance is found again by its status file: init's
//! pid, checked against the inode of its pid namespace, its uid and the boot; and it ends up in the same file with
//! its exit code, whoever watches. Output goes through a writer of the instance's own to a file, never to
//! the driver, so that an instance neither blocks nor dies when nobody reads. A launch that was cut short at any point is repeated under the next attempt number,
//! and a launcher of an earlier attempt finds its number gone and ends, so there is never a second copy.
//!
//! As root each app has a kernel uid of its own, dropped to before bwrap starts, and each instance a network
//! namespace, memory and process limits by control group. Without root there is one app only, on the host's
//! network, under the caller's uid, with resource limits per process.

mod address;
mod app;
mod cgroup;
mod command;
pub(crate) mod crash;
mod extract;
mod firewall;
mod host;
mod image;
mod instance;
mod launch;
mod launcher;
mod layout;
mod lock;
mod logs;
mod machine;
mod network;
mod open;
mod output;
mod plan;
mod remove;
mod seccomp;
mod state;
mod stop;
mod tar;
mod times;

use crate::{
    AppHandle, AppSpec, Capabilities, ComputeDriver, DriverError, FoundApp, FoundInstance, ImageSource, InstanceHandle,
    InstanceSpec, InstanceState, LogEntry, LogStart, Replace,
};
pub use address::{InvalidNetwork, Ipv4Network};
use futures_util::stream::BoxStream;
use instance::Inner;
pub use launcher::launcher_main;
pub use open::{OpenError, refuse_absent_instances};
use std::{
    ffi::OsString,
    net::Ipv4Addr,
    path::PathBuf,
    sync::{Arc, Weak},
    time::Duration,
};
use systemprompt_contract::AppName;
use tokio_util::task::AbortOnDropHandle;

/// How the process driver is set up.
#[derive(Debug, Clone)]
pub struct ProcessConfig {
    /// Apps, their volumes and unpacked images go below it. Made when missing; only its owner may look inside.
    pub data: PathBuf,
    /// Command that calls [`launcher_main`], e.g. the own binary and its hidden subcommand.
    pub launcher: Vec<OsString>,
    /// Where images come from.
    pub images: Arc<dyn ImageSource>,
    /// Directories of the host that every sandbox shows, read-only; sockets in them can be connected to.
    pub binds: Vec<Bind>,
    /// Without root: run more than one app, though nothing but a pid namespace keeps them apart. As root: run
    /// instances though no control groups limit them together.
    pub unsafe_shared: bool,
    /// Networks of instances.
    pub network: NetworkConfig,
    /// How much output is kept per instance, in bytes; older output is given back to the disk.
    pub output_bytes: u64,
}

impl ProcessConfig {
    /// A configuration without binds, with the default network and 64 MiB of output per instance.
    pub fn new(data: PathBuf, launcher: Vec<OsString>, images: Arc<dyn ImageSource>) -> Self {
        Self {
            data,
            launcher,
            images,
            binds: Vec::new(),
            unsafe_shared: false,
            network: NetworkConfig::default(),
            output_bytes: 64 << 20,
        }
    }
}

/// A directory of the host shown in every sandbox, e.g. the socket directory of the tenants' database cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// On the host; everybody must be allowed to search it (0711).
    pub host: PathBuf,
    /// In the sandbox, absolute; made in the image when it is not below `/run`.
    pub sandbox: PathBuf,
}

/// Networks of instances, as root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Instances get /30 networks from it that nobody on the host routes.
    pub pool: Ipv4Network,
    /// DNS servers for instances, reachable whatever their range; empty: the host's, unless they are on loopback.
    pub resolvers: Vec<Ipv4Addr>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        let pool = Ipv4Network::new(Ipv4Addr::new(10, 231, 0, 0), 16).expect("a network without host bits");
        Self { pool, resolvers: Vec::new() }
    }
}

/// Runs instances as sandboxed processes of this host.
#[derive(Debug)]
pub struct ProcessDriver {
    inner: Arc<Inner>,
    _maintenance: AbortOnDropHandle<()>,
}

impl ProcessDriver {
    /// Checks that this host can do what is needed, and finds what earlier drivers left in the data directory.
    /// Several drivers may have the same data directory open. Call it within a tokio runtime.
    ///
    /// # Errors
    /// [`OpenError`], which says what to install or to change.
    pub fn open(config: ProcessConfig) -> Result<Self, OpenError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| OpenError::NoRuntime)?;
        let inner = Arc::new(Inner::open(config)?);
        let maintenance = runtime.spawn(maintain(Arc::downgrade(&inner)));
        Ok(Self { inner, _maintenance: AbortOnDropHandle::new(maintenance) })
    }

    /// Stops all instances, takes their networks and the firewall rules away and keeps their files: for a cloud that
    /// goes down as a whole. Launching puts everything in place again.
    ///
    /// # Errors
    /// The first instance that would not stop; the others have been stopped all the same.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), DriverError> {
        let stops =
            self.instances().await?.into_iter().map(|found| async move { self.stop(&found.handle, grace).await });
        let stopped = futures_util::future::join_all(stops).await;
        let inner = self.inner.clone();
        blocking(move || inner.remove_rules()).await?;
        stopped.into_iter().collect()
    }
}

/// How often output is trimmed, new images are synced and the trash is emptied.
const MAINTENANCE: Duration = Duration::from_secs(5);

/// How many rounds pass between two looks at the firewall: a minute.
const ROUNDS_PER_REPAIR: u64 = 12;

async fn maintain(inner: Weak<Inner>) {
    let mut interval = tokio::time::interval(MAINTENANCE);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for round in 1_u64.. {
        interval.tick().await;
        let Some(inner) = inner.upgrade() else { return };
        let work = move || {
            let maintained = inner.maintain();
            // Whatever else fails: without its rules nothing keeps an instance from the host. With the first round at
            // once: nobody repaired them while no driver was open.
            let repaired = if round % ROUNDS_PER_REPAIR == 1 { inner.repair_rules() } else { Ok(()) };
            maintained.and(repaired)
        };
        if let Err(error) = blocking(work).await {
            tracing::warn!(%error, "maintenance of instances failed; it is tried again");
        }
    }
}

#[async_trait::async_trait]
impl ComputeDriver for ProcessDriver {
    fn capabilities(&self) -> Capabilities {
        Capabilities { replace: Replace::Overlap, restarts: false }
    }

    async fn ensure_app(&self, spec: &AppSpec) -> Result<AppHandle, DriverError> {
        let (inner, spec) = (self.inner.clone(), spec.clone());
        blocking(move || inner.ensure_app(&spec)).await
    }

    async fn launch(&self, app: &AppHandle, spec: &InstanceSpec) -> Result<InstanceHandle, DriverError> {
        let app = layout::parse_app(app)?;
        let running = {
            let (inner, app, spec) = (self.inner.clone(), app.clone(), spec.clone());
            blocking(move || inner.running(&app, &spec)).await?
        };
        if let Some(handle) = running {
            return Ok(handle);
        }
        let image = self.inner.config.images.image(spec.tenant, &spec.image).await?;
        let (inner, spec) = (self.inner.clone(), spec.clone());
        blocking(move || inner.launch(&app, &spec, &image)).await
    }

    async fn inspect(&self, instance: &InstanceHandle) -> Result<InstanceState, DriverError> {
        let Ok(key) = layout::InstanceKey::parse(instance) else { return Ok(InstanceState::Absent) };
        let inner = self.inner.clone();
        blocking(move || inner.inspect(&key)).await
    }

    async fn stop(&self, instance: &InstanceHandle, grace: Duration) -> Result<(), DriverError> {
        let Ok(key) = layout::InstanceKey::parse(instance) else { return Ok(()) };
        stop::stop(&self.inner, key, grace).await
    }

    async fn remove(&self, instance: &InstanceHandle) -> Result<(), DriverError> {
        let Ok(key) = layout::InstanceKey::parse(instance) else { return Ok(()) };
        let inner = self.inner.clone();
        blocking(move || inner.remove(&key)).await
    }

    async fn instances(&self) -> Result<Vec<FoundInstance>, DriverError> {
        let inner = self.inner.clone();
        blocking(move || inner.instances()).await
    }

    async fn apps(&self) -> Result<Vec<FoundApp>, DriverError> {
        let inner = self.inner.clone();
        let found = |app: AppName| FoundApp { handle: AppHandle::new(app.to_string()), app };
        blocking(move || Ok(inner.layout.list_apps()?.into_iter().map(found).collect())).await
    }

    async fn destroy_app(&self, app: &AppHandle) -> Result<(), DriverError> {
        let Ok(app) = layout::parse_app(app) else { return Ok(()) };
        let inner = self.inner.clone();
        blocking(move || inner.destroy_app(&app)).await
    }

    fn logs(
        &self,
        instance: &InstanceHandle,
        from: LogStart,
        follow: bool,
    ) -> BoxStream<'static, Result<LogEntry, DriverError>> {
        let output = layout::InstanceKey::parse(instance).map(|key| self.inner.layout.instance(&key).output());
        logs::stream(output, from, follow)
    }
}

/// Runs `work` where blocking is allowed. It goes on to its end even when the caller stops waiting.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(DriverError::Transient(format!("the driver's work was cut short: {error}"))),
    }
}

impl From<std::io::Error> for DriverError {
    /// A full disk or a used-up pool is a lack of room; anything else on this host may work the next time.
    fn from(error: std::io::Error) -> Self {
        use std::io::ErrorKind::{QuotaExceeded, StorageFull};
        match error.kind() {
            // Where is the operator's business, and not a tenant's.
            StorageFull => {
                tracing::error!(%error, "the disk is full");
                Self::Capacity { scope: crate::CapacityScope::Host, message: "its disk is full".to_owned() }
            }
            QuotaExceeded => Self::Capacity { scope: crate::CapacityScope::Host, message: error.to_string() },
            _ => Self::Transient(error.to_string()),
        }
    }
}
