//! The trait every driver fulfils, and the values that cross it.

use crate::error::DriverError;
use chrono::{DateTime, Utc};
use futures_util::{future::BoxFuture, stream::BoxStream};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, net::SocketAddr, time::Duration};
use systemprompt_contract::{AppName, DeploymentId, Region, Secret, TenantId};
use systemprompt_oci::{Digest, StoredImage};

/// A place where tenants' instances run.
///
/// The contract for implementers. `testing::conformance` checks it as far as one process can, with drivers that are
/// dropped and opened anew; a crash of the caller, a restart of the host and what is logged are for each driver's own
/// tests:
/// - every call is idempotent on the id it is given and may be repeated after a crash of the caller at any instant;
/// - handles are text, may be stored, and mean the same in another process and after a restart of the host;
/// - a dropped future leaves a state that the repeated call converges from;
/// - instances and their output outlive the process that launched them;
/// - no error, handle or log of the driver contains a value of [`InstanceSpec::env`].
///
/// There is no method that could add a certificate or a host name, and none may be added.
#[async_trait::async_trait]
pub trait ComputeDriver: fmt::Debug + Send + Sync {
    /// What the driver can do; constant for its life.
    fn capabilities(&self) -> Capabilities;

    /// Makes sure that the app exists: its directory or remote app, its identity, its storage volume.
    /// Idempotent on `spec.app`.
    ///
    /// # Errors
    /// [`DriverError::Conflict`] when the app belongs to another tenant.
    async fn ensure_app(&self, spec: &AppSpec) -> Result<AppHandle, DriverError>;

    /// Starts one deployment. Idempotent on `spec.deployment`: a running instance is left alone and its handle
    /// returned, one that has exited is started again. Two launches at once make one instance.
    ///
    /// Returns when the sandbox runs, not when the application answers: that is for the edge's probe.
    ///
    /// # Errors
    /// [`DriverError::NotFound`] without app or image, [`DriverError::Rejected`] for an image that cannot run.
    async fn launch(&self, app: &AppHandle, spec: &InstanceSpec) -> Result<InstanceHandle, DriverError>;

    /// What the instance does now. An unknown instance is [`InstanceState::Absent`], not an error.
    ///
    /// # Errors
    /// [`DriverError::Transient`] when the driver cannot tell.
    async fn inspect(&self, instance: &InstanceHandle) -> Result<InstanceState, DriverError>;

    /// SIGTERM to the application, SIGKILL to the whole sandbox after `grace`; returns when nothing of it runs.
    /// An instance that is not there or not running is already stopped.
    ///
    /// # Errors
    /// [`DriverError::Transient`] when processes survive the kill.
    async fn stop(&self, instance: &InstanceHandle, grace: Duration) -> Result<(), DriverError>;

    /// Deletes a stopped instance's files, output included.
    ///
    /// # Errors
    /// [`DriverError::Conflict`] while it runs.
    async fn remove(&self, instance: &InstanceHandle) -> Result<(), DriverError>;

    /// Every instance this driver has, running or not: the world that orphans are searched in.
    ///
    /// # Errors
    /// [`DriverError::Transient`] when the driver cannot tell.
    async fn instances(&self) -> Result<Vec<FoundInstance>, DriverError>;

    /// Every app this driver has.
    ///
    /// # Errors
    /// [`DriverError::Transient`] when the driver cannot tell.
    async fn apps(&self) -> Result<Vec<FoundApp>, DriverError>;

    /// Kills the app's instances without grace and deletes them, the volume and all its data.
    ///
    /// # Errors
    /// [`DriverError::Transient`] when something could not be deleted; calling again goes on from there.
    async fn destroy_app(&self, app: &AppHandle) -> Result<(), DriverError>;

    /// The instance's output (stdout and stderr, as one), line by line from `from`.
    ///
    /// Without `follow` the stream ends at the end of what is there, and a last line without line feed is given
    /// as it is. With `follow` it goes on until the instance is removed; drop it to stop. Cursors stay valid
    /// for the life of the instance and over its restarts.
    fn logs(
        &self,
        instance: &InstanceHandle,
        from: LogStart,
        follow: bool,
    ) -> BoxStream<'static, Result<LogEntry, DriverError>>;
}

/// Where a driver gets a tenant's image from. Any tenant but the image's own gets [`DriverError::NotFound`].
pub trait ImageSource: fmt::Debug + Send + Sync {
    /// The image with exactly this digest, its layers as local files.
    fn image(&self, tenant: TenantId, digest: &Digest) -> BoxFuture<'_, Result<StoredImage, DriverError>>;
}

/// What a driver can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// How a release takes the place of another.
    pub replace: Replace,
    /// Whether the driver itself restarts an instance that exits; otherwise the caller launches it again.
    pub restarts: bool,
}

/// How a release takes the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// New beside old, then the old one goes.
    Overlap,
    /// The volume can be attached once: stop the old one first.
    StopFirst,
}

/// An app: what all instances of one tenant share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppSpec {
    /// Its name.
    pub app: AppName,
    /// Whose it is.
    pub tenant: TenantId,
    /// Where it was asked to live.
    pub region: Region,
    /// Memory the plan grants, in MiB.
    pub memory_mb: u32,
}

/// One instance of an app: a deployment's image with its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceSpec {
    /// The deployment; at most one instance exists for it.
    pub deployment: DeploymentId,
    /// Whose image it is.
    pub tenant: TenantId,
    /// The image, by the digest of its manifest.
    pub image: Digest,
    /// Variables beside the image's own; they beat those. `HOST` and `PORT` are set by the driver and beat both.
    pub env: BTreeMap<String, Secret>,
    /// Memory limit in MiB.
    pub memory_mb: u32,
    /// How many processes and threads it may have.
    pub max_pids: u32,
}

macro_rules! handle {
    ($(#[$meta:meta])* $name:ident) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The handle a driver made; its form is the driver's business.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }
            /// The text, to be stored.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

handle!(/// An app at a driver; opaque, storable, valid after a restart.
    AppHandle);
handle!(/// An instance at a driver; opaque, storable, valid after a restart.
    InstanceHandle);

/// What an instance does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InstanceState {
    /// The driver has nothing under this handle.
    Absent,
    /// On its way; a launch may have been cut short.
    Starting,
    /// Its process runs. Whether it is healthy is for the edge's probe to say.
    Running {
        /// Where the edge reaches it.
        address: SocketAddr,
        /// When its process was started.
        since: DateTime<Utc>,
    },
    /// Its process has ended and was not started again.
    Exited {
        /// Why.
        reason: ExitReason,
        /// When that was noted.
        at: DateTime<Utc>,
    },
}

/// Why an instance ended. `Display` is for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// It exited by itself with this code.
    Code(i32),
    /// This signal ended it. (A program that exits with 128 + n looks the same.)
    Signal(i32),
    /// It wanted more memory than its limit.
    OutOfMemory,
    /// It never ran; the text is the sandbox's.
    SetupFailed(String),
    /// Nobody saw it end, for instance because the host was restarted.
    Unknown,
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "ended by signal {signal}{}", signal_name(*signal)),
            Self::OutOfMemory => f.write_str("was killed: it needed more memory than its plan allows"),
            Self::SetupFailed(text) => write!(f, "could not be started: {text}"),
            Self::Unknown => f.write_str("ended, and nobody saw how (the host may have been restarted)"),
        }
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => " (SIGHUP)",
        2 => " (SIGINT)",
        4 => " (SIGILL)",
        6 => " (SIGABRT)",
        7 => " (SIGBUS)",
        8 => " (SIGFPE)",
        9 => " (SIGKILL)",
        11 => " (SIGSEGV)",
        13 => " (SIGPIPE)",
        15 => " (SIGTERM)",
        _ => "",
    }
}

/// An app as the driver finds it, known to anybody or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundApp {
    /// Its name.
    pub app: AppName,
    /// The handle of it.
    pub handle: AppHandle,
}

/// One instance found at the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundInstance {
    /// Its app.
    pub app: AppName,
    /// Its deployment.
    pub deployment: DeploymentId,
    /// Its handle, as `launch` returned it.
    pub handle: InstanceHandle,
    /// What it does.
    pub state: InstanceState,
}

/// Where to start reading output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStart {
    /// At the oldest line that is kept.
    Beginning,
    /// After the entry that had this cursor.
    After(u64),
    /// At the last so many lines.
    Tail(usize),
}

/// One line of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// Byte offset after the line: [`LogStart::After`] of it is the next line.
    pub cursor: u64,
    /// When it was written, to a second or so; none when that is not known.
    pub written: Option<DateTime<Utc>>,
    /// The line without its line feed; invalid UTF-8 replaced. Longer lines come in pieces of 64 KiB.
    pub text: String,
}
