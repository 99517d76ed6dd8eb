//! Opening the driver: what this host has and lacks, said before the first instance is wanted.

use super::{
    NetworkConfig, ProcessConfig,
    cgroup::Cgroups,
    command::Tool,
    firewall::{Firewall, Tools},
    host::find_program,
    instance::Inner,
    layout::{Layout, private_directory, read_record, write_record},
    lock::FileLock,
    machine,
    network::{Networks, Refusal, host_resolvers},
    state::InstanceRecord,
};
use std::{
    fs, io,
    os::unix::{fs::MetadataExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::AtomicBool,
};

/// Why the driver cannot work on this host. `Display` says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A program is missing.
    #[error("{program} is needed to run instances and was not found: install it with `apt-get install {package}`")]
    Missing {
        /// Program that was searched for.
        program: &'static str,
        /// Debian package that has it.
        package: &'static str,
    },
    /// bubblewrap is there and cannot make a sandbox.
    #[error(
        "bubblewrap cannot make a sandbox on this host: {said}; unprivileged user namespaces must be allowed \
             (`sysctl kernel.unprivileged_userns_clone=1`, `sysctl user.max_user_namespaces=10000`, on Ubuntu 24.04 \
             `sysctl kernel.apparmor_restrict_unprivileged_userns=0`)"
    )]
    NoSandbox {
        /// What bubblewrap said.
        said: String,
    },
    /// Run as root, and yet instances could take all the memory there is.
    #[error(
        "expected control groups that limit instances: {reason}; give this machine or container writable control groups \
             with the controllers memory and pids, or accept instances without limits with --unsafe-shared"
    )]
    NoLimits {
        /// What is missing.
        reason: String,
    },
    /// The data directory cannot be used.
    #[error("the data directory {} cannot be used: {source}", path.display())]
    Data {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What all installations of this machine share cannot be used.
    #[error("the machine's record of addresses and users in {} cannot be used: {source}", machine::DIRECTORY)]
    Machine {
        /// Why.
        source: io::Error,
    },
    /// The launcher command is empty.
    #[error("expected a command that starts the launcher, got an empty one")]
    NoLauncher,
    /// Called outside a runtime.
    #[error("expected to be called within a tokio runtime")]
    NoRuntime,
}

impl Inner {
    pub(crate) fn open(config: ProcessConfig) -> Result<Self, OpenError> {
        if config.launcher.is_empty() {
            return Err(OpenError::NoLauncher);
        }
        let root = rustix::process::geteuid().is_root();
        let bwrap = program("bwrap", "bubblewrap")?;
        let data_error = |source| OpenError::Data { path: config.data.clone(), source };
        private_directory(&config.data).map_err(data_error)?;
        let data = config.data.canonicalize().map_err(data_error)?;
        let layout = Layout::create(&data).map_err(data_error)?;
        let id = installation_id(&layout).map_err(data_error)?;
        try_sandbox(&bwrap, root.then_some(machine::UIDS.start))?;
        let networks = if root { Some(networks(&config, &id)?) } else { None };
        let cgroups = match root.then(|| Cgroups::detect(&format!("systemprompt-{id}"))) {
            Some(Err(reason)) if !config.unsafe_shared => return Err(OpenError::NoLimits { reason }),
            Some(Ok(cgroups)) => Some(cgroups),
            none => {
                let reason = none.and_then(Result::err).unwrap_or_else(|| "not run as root".to_owned());
                tracing::warn!(reason, "memory is limited per process and not per instance");
                None
            }
        };
        if let Err(error) = layout.empty_trash(None) {
            tracing::warn!(%error, "the trash could not be emptied; it is tried again");
        }
        let inner = Self { layout, config: ProcessConfig { data, ..config }, bwrap, networks, cgroups };
        inner.claim().map_err(|source| OpenError::Machine { source })?;
        Ok(inner)
    }
}

fn networks(config: &ProcessConfig, id: &str) -> Result<Networks, OpenError> {
    let tool = |name, package| program(name, package).map(|path| Tool { path });
    let resolvers =
        if config.network.resolvers.is_empty() { host_resolvers() } else { config.network.resolvers.clone() };
    if resolvers.is_empty() {
        tracing::warn!("the host's DNS servers are on loopback, where instances cannot go: they resolve no names");
    }
    Ok(Networks {
        firewall: Firewall { id: id.to_owned(), pool: config.network.pool, resolvers },
        ip: tool("ip", "iproute2")?,
        tools: Tools { save: tool("iptables-save", "iptables")?, restore: tool("iptables-restore", "iptables")? },
        warned: AtomicBool::new(false),
    })
}

fn program(program: &'static str, package: &'static str) -> Result<PathBuf, OpenError> {
    find_program(program).ok_or(OpenError::Missing { program, package })
}

/// Makes connections to instances that do not run fail at once, before any driver is open: after a boot their
/// addresses would else lead out of the machine by its default route. For whoever serves traffic ahead of the driver or
/// without one. Does nothing without root or where no app is; repeating it changes nothing.
///
/// # Errors
/// When the data directory cannot be read, or the route cannot be set.
pub fn refuse_absent_instances(data: &Path, network: &NetworkConfig) -> io::Result<()> {
    let layout = Layout::at(data);
    let Some(id) = read_text(&layout.installation())? else { return Ok(()) };
    // A copy is not the installation of that id, and has none of its own before its driver opens.
    let is_copy = read_text(&layout.place())? != Some(place_of(&layout)?);
    if is_copy || !rustix::process::geteuid().is_root() || layout.list_apps()?.is_empty() {
        return Ok(());
    }
    let path = program("ip", "iproute2").map_err(io::Error::other)?;
    Refusal::new(network.pool, &id).put(&Tool { path })
}

/// Six hex digits made once: they name this installation's chains, links, namespaces and control groups. A copy of a
/// data directory is another installation, and what its records call running belongs to the original.
fn installation_id(layout: &Layout) -> io::Result<String> {
    let _lock = FileLock::exclusive(&layout.installation_lock())?;
    let here = place_of(layout)?;
    let place = read_text(&layout.place())?;
    let copied = place.as_ref().is_some_and(|place| *place != here);
    let id = match read_text(&layout.installation())? {
        _ if copied => {
            tracing::warn!("the data directory was copied or moved: it is an installation of its own from now on");
            forget_runs(layout)?;
            None
        }
        Some(id) if id.len() == 6 && id.bytes().all(|byte| byte.is_ascii_hexdigit()) => Some(id),
        Some(_) => {
            let message = "expected six hex digits in the file `installation`";
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        None => None,
    };
    let id = if let Some(id) = id {
        id
    } else {
        let id = uuid::Uuid::new_v4().simple().to_string()[..6].to_owned();
        write_whole(&layout.installation(), &id)?;
        id
    };
    // Last: what a crash interrupts before it is done again.
    if place.as_ref() != Some(&here) {
        write_whole(&layout.place(), &here)?;
    }
    Ok(id)
}

/// What tells a data directory from a copy of it.
fn place_of(layout: &Layout) -> io::Result<String> {
    let directory = fs::metadata(layout.root())?;
    Ok(format!("{}:{}", directory.dev(), directory.ino()))
}

/// Makes all records those of another boot.
fn forget_runs(layout: &Layout) -> io::Result<()> {
    for app in layout.list_apps()? {
        for key in layout.list_instances(&app)? {
            let path = layout.instance(&key).record();
            if let Some(record) = read_record::<InstanceRecord>(&path)? {
                write_record(&path, &InstanceRecord { boot: String::new(), ..record })?;
            }
        }
    }
    Ok(())
}

fn read_text(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        text => text.map(Some),
    }
}

/// Writes a small file so that it is whole or absent.
pub(crate) fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("a file needs a directory"))?;
    let file = tempfile::NamedTempFile::new_in(directory)?;
    fs::write(file.path(), text)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// Makes the sandbox that instances will need, with nothing in it.
fn try_sandbox(bwrap: &Path, uid: Option<u32>) -> Result<(), OpenError> {
    let mut command = Command::new(bwrap);
    command.args(["--unshare-user", "--unshare-pid", "--disable-userns", "--proc", "/proc", "--dev", "/dev"]);
    // Not the whole root: bwrap goes through every mount below it, and other installations' network namespaces come
    // and go under /run meanwhile.
    for directory in ["/usr", "/bin", "/lib", "/lib64"] {
        command.args(["--ro-bind-try", directory, directory]);
    }
    command.args(["--", "/bin/true"]).env_clear().current_dir("/").stdin(Stdio::null());
    if let Some(uid) = uid {
        command.uid(uid).gid(uid);
    }
    let no_sandbox = |said: String| OpenError::NoSandbox { said };
    let output = command.output().map_err(|error| no_sandbox(error.to_string()))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(no_sandbox(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
    }
}
