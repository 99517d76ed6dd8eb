//! The launcher: a second start of our own binary that turns itself into the sandbox.
//!
//! It exists because nothing may run between `fork` and `exec` in safe Rust. It reads its order from stdin, so that
//! no secret is ever in a command line or an environment that others can see, and then, in this order: own session;
//! no inherited descriptors; the status file's lock, which proves that no other launcher of this instance lives,
//! and which the outer bwrap keeps for its life; header into the status file; control groups; the output's writer;
//! network namespace; a private view of the paths that are mounted, so that the data directory can stay closed to
//! tenants' users; resource limits; the app's own uid; bwrap.

use super::{
    host::{ProcessId, boot_id},
    layout::{InstanceFiles, read_record},
    network::set_sysctl,
    output, seccomp,
    state::{InstanceRecord, RunHeader, StatusLine},
};
use chrono::Utc;
use rustix::{
    fs::{FlockOperation, MemfdFlags, flock, memfd_create},
    io::{Errno, FdFlags, fcntl_setfd},
    mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags},
    process::{Resource, Rlimit, getrlimit, setrlimit, setsid},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_no_new_privs},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{OpenOptionsExt, fchown},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};
use systemprompt_contract::Secret;

/// Everything the launcher needs to know; the driver decides, the launcher executes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) attempt: u32,
    /// Directory of the instance's files.
    pub(crate) directory: PathBuf,
    pub(crate) bwrap: PathBuf,
    /// Options of bwrap, without status descriptor and environment.
    pub(crate) options: Vec<String>,
    pub(crate) command: Vec<String>,
    pub(crate) environment: BTreeMap<String, Secret>,
    /// Files to write our pid to.
    pub(crate) cgroups: Vec<PathBuf>,
    pub(crate) limits: ResourceLimits,
    /// What only root can do.
    pub(crate) privileged: Option<Privileged>,
}

/// The part of an order that needs root.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Privileged {
    /// Uid and gid of the app.
    pub(crate) uid: u32,
    /// The network namespace's file.
    pub(crate) namespace: PathBuf,
    /// What is mounted, and under which name below [`STAGE`] bwrap finds it.
    pub(crate) staged: Vec<(PathBuf, String)>,
}

/// Limits per process, in force everywhere.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct ResourceLimits {
    /// Private writable memory, where no control group limits it.
    pub(crate) data_bytes: Option<u64>,
    /// Open files.
    pub(crate) files: u64,
    /// Tasks of the uid, where no control group limits them.
    pub(crate) tasks: Option<u64>,
}

/// Where staged paths appear, in the launcher's own mount namespace only.
pub(crate) const STAGE: &str = "/mnt";

/// How long to wait for a launcher of an earlier attempt to notice that it is late.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// The hidden subcommand that [`ProcessConfig::launcher`](super::ProcessConfig::launcher) names. Call it first thing
/// in `main`, before any thread exists. `arguments` are what the driver put behind the prefix: they only show in
/// process lists. On success it never returns, since the process has become the sandbox.
pub fn launcher_main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<_> = arguments.into_iter().collect();
    if arguments.first().is_some_and(|first| first == output::WRITER) {
        return output::write();
    }
    let order = match read_order() {
        Ok(order) => order,
        Err(error) => return complain(&error),
    };
    // Fails for a process that leads a session already; that is as good.
    let _ = setsid();
    close_fds::set_fds_cloexec(3, &[]);
    let status = match claim(&order) {
        Ok(Some(status)) => status,
        // Somebody else has this instance, or it is gone: nothing to do and nothing to say.
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => return complain(&error),
    };
    let Err(error) = run(&order, &status, arguments.len());
    let failed = StatusLine::Failed { failed: error.to_string() };
    // The driver reads it from there; stderr is for the case that even this fails.
    if let Err(error) = append(&status, &failed) {
        return complain(&error);
    }
    ExitCode::FAILURE
}

fn complain(error: &io::Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "launcher: {error}");
    ExitCode::FAILURE
}

fn read_order() -> io::Result<Order> {
    let mut text = zeroize::Zeroizing::new(String::new());
    io::stdin().read_to_string(&mut text)?;
    // A driver that died while writing leaves half an order, which does not parse.
    serde_json::from_str(&text).map_err(|error| io::Error::other(format!("the order is not whole: {error}")))
}

/// Makes the instance this launcher's own, up to the header in the status file. Nothing when this launcher is late.
fn claim(order: &Order) -> io::Result<Option<File>> {
    let files = InstanceFiles::at(order.directory.clone());
    let mut options = OpenOptions::new();
    let status = match options.append(true).read(true).create(true).mode(0o600).open(files.status()) {
        // The instance has been removed meanwhile.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if !lock(&status)? {
        return Ok(None);
    }
    super::crash::point("compute.launcher.locked");
    // Only now is it certain that the number stays: the driver raises it under the same lock.
    let record: Option<InstanceRecord> = read_record(&files.record())?;
    if record.is_none_or(|record| record.attempt != order.attempt) {
        return Ok(None);
    }
    let header = RunHeader { attempt: order.attempt, launcher: ProcessId::own()?, boot: boot_id()?, at: Utc::now() };
    // What earlier attempts wrote says nothing any more, and an instance may be started again for ever.
    status.set_len(0)?;
    append(&status, &StatusLine::Header(header))?;
    super::crash::point("compute.launcher.header");
    Ok(Some(status))
}

fn lock(file: &File) -> io::Result<bool> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(Errno::WOULDBLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Everything after the header; returns only what went wrong.
fn run(order: &Order, status: &File, own_arguments: usize) -> Result<std::convert::Infallible, io::Error> {
    for entrance in &order.cgroups {
        let pid = rustix::process::getpid().as_raw_nonzero().to_string();
        fs::write(entrance, pid).map_err(in_words(&format!("entering {}", entrance.display())))?;
    }
    super::crash::point("compute.launcher.cgroup");
    let output = open_output(order, own_arguments).map_err(in_words("the output"))?;
    // Tenants go first when the host runs out of memory. Raising needs no privilege.
    let _ = fs::write("/proc/self/oom_score_adj", "500");
    if let Some(privileged) = &order.privileged {
        // The app may open /dev/stdout by name, as many do.
        fchown(&output, Some(privileged.uid), Some(privileged.uid)).map_err(in_words("the output"))?;
        enter_network(&privileged.namespace).map_err(in_words("the network namespace"))?;
        stage(&privileged.staged).map_err(in_words("mounting"))?;
    }
    limit(order.limits).map_err(in_words("resource limits"))?;
    super::crash::point("compute.launcher.limited");
    let filter = seccomp::program().map(|program| memory_file("seccomp", &program)).transpose()?;
    let arguments = arguments(order, status, filter.as_ref()).map_err(in_words("arguments of the sandbox"))?;
    for kept in [Some(status.as_fd()), filter.as_ref().map(AsFd::as_fd), Some(arguments.as_fd())].into_iter().flatten()
    {
        fcntl_setfd(kept, FdFlags::empty())?;
    }
    set_no_new_privs(true)?;
    let mut command = Command::new(&order.bwrap);
    command
        .arg("--args")
        .arg(arguments.as_raw_fd().to_string())
        .arg("--")
        .args(&order.command)
        // Not the tenant's: LD_PRELOAD would run its code in bwrap, outside the sandbox.
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    if let Some(privileged) = &order.privileged {
        command.uid(privileged.uid).gid(privileged.uid);
    }
    Err(in_words("starting bwrap")(command.exec()))
}

/// The end of a pipe to write output to, with a writer of its own behind it that is in the instance's control groups.
fn open_output(order: &Order, own_arguments: usize) -> io::Result<OwnedFd> {
    let files = InstanceFiles::at(order.directory.clone());
    let open = |path| OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    // Before the output: who finds that finds its times.
    let (times, file) = (open(files.times())?, open(files.output())?);
    // Handed on to the writer: whoever cannot get it knows that output is still on its way.
    if !lock(&file)? {
        return Err(io::Error::other("expected that the earlier run's output is written, and it still is being"));
    }
    output::start_writer(file, times, own_arguments)
}

fn append(mut status: &File, line: &StatusLine) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    status.write_all(&text)
}

/// From here on the process sees the instance's network only; all of it is IPv4.
fn enter_network(namespace: &Path) -> io::Result<()> {
    let namespace = File::open(namespace)?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    set_sysctl("ipv6/conf/all/disable_ipv6", "1")?;
    set_sysctl("ipv6/conf/default/disable_ipv6", "1")
}

/// Shows the paths below [`STAGE`], so that bwrap, running as the app's uid, need not search the data directory.
fn stage(paths: &[(PathBuf, String)]) -> io::Result<()> {
    #[allow(deprecated, reason = "deprecated for the flags that break descriptors; a mount namespace breaks none")]
    rustix::thread::unshare(UnshareFlags::NEWNS)?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    // Taken before anything is covered: the data directory may itself lie below the stage.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mut trees = Vec::new();
    for (path, name) in paths {
        let tree = rustix::mount::open_tree(rustix::fs::CWD, path, flags)
            .map_err(|error| in_words(&path.display().to_string())(error.into()))?;
        trees.push((tree, fs::metadata(path)?.is_dir(), Path::new(STAGE).join(name)));
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount("tmpfs", STAGE, "tmpfs", flags, Some(c"mode=0755"))?;
    for (tree, is_directory, target) in trees {
        if is_directory {
            fs::create_dir(&target)?;
        } else {
            File::create(&target)?;
        }
        rustix::mount::move_mount(&tree, c"", rustix::fs::CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    }
    Ok(())
}

fn limit(limits: ResourceLimits) -> io::Result<()> {
    let wanted = [
        (Resource::Core, Some(0)),
        (Resource::Nofile, Some(limits.files)),
        (Resource::Data, limits.data_bytes),
        (Resource::Nproc, limits.tasks),
    ];
    for (resource, value) in wanted {
        let Some(value) = value else { continue };
        // Lowered only: raising the hard limit is a privilege that even root may lack.
        let value = getrlimit(resource).maximum.map_or(value, |maximum| maximum.min(value));
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })?;
    }
    Ok(())
}

/// Options by descriptor and not by command line: they hold the environment, and both the host's process list and
/// the tenant (whose pid 1 is bwrap) can read a command line.
fn arguments(order: &Order, status: &File, filter: Option<&OwnedFd>) -> io::Result<OwnedFd> {
    let status = status.as_raw_fd().to_string();
    let filter = filter.map(|filter| filter.as_raw_fd().to_string());
    let mut words: Vec<&str> = order.options.iter().map(String::as_str).collect();
    words.extend(["--json-status-fd", &status]);
    words.extend(filter.iter().flat_map(|filter| ["--seccomp", filter]));
    words.extend(order.environment.iter().flat_map(|(name, value)| ["--setenv", name, value.expose()]));
    memory_file("arguments", &separated(&words)?)
}

/// bwrap's form of a list of words. A NUL within one would begin another option of the image's choosing, such as a
/// mount of the host; whatever was checked before, it ends here.
fn separated(words: &[&str]) -> io::Result<zeroize::Zeroizing<Vec<u8>>> {
    // Whole from the start: what grows leaves copies of secrets behind.
    let mut text = zeroize::Zeroizing::new(Vec::with_capacity(words.iter().map(|word| word.len() + 1).sum()));
    for word in words {
        if word.contains('\0') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "expected words without NUL, got one with a NUL"));
        }
        text.extend_from_slice(word.as_bytes());
        text.push(0);
    }
    Ok(text)
}

/// A file in memory, to be read from its beginning by whoever inherits it.
fn memory_file(name: &str, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

fn in_words(what: &str) -> impl FnOnce(io::Error) -> io::Error + use<> {
    let what = what.to_owned();
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{layout::write_record, state::Reach};
    use systemprompt_oci::Digest;

    fn order(directory: &Path, attempt: u32) -> Order {
        Order {
            attempt,
            directory: directory.to_owned(),
            bwrap: PathBuf::new(),
            options: Vec::new(),
            command: Vec::new(),
            environment: BTreeMap::new(),
            cgroups: Vec::new(),
            limits: ResourceLimits { data_bytes: None, files: 1, tasks: None },
            privileged: None,
        }
    }

    fn record(directory: &Path, attempt: u32) {
        let reach = Reach::Shared { address: ([127, 0, 0, 1], 1).into() };
        let record = InstanceRecord { image: Digest::of(b""), attempt, boot: String::new(), reach };
        write_record(&InstanceFiles::at(directory.to_owned()).record(), &record).expect("record");
    }

    #[test]
    fn a_word_with_nul_is_refused_and_does_not_become_two_options() {
        assert_eq!(*separated(&["--chdir", "/app"]).expect("words"), b"--chdir\0/app\0");
        assert!(separated(&["--chdir", "/\0--bind\0/\0/host"]).is_err());
    }

    #[test]
    fn only_the_launcher_of_the_recorded_attempt_gets_the_instance_and_only_once() {
        let directory = tempfile::tempdir().expect("directory");
        let directory = directory.path();
        assert!(claim(&order(directory, 1)).expect("no record").is_none(), "removed meanwhile");
        record(directory, 2);
        assert!(claim(&order(directory, 1)).expect("late").is_none(), "launched again meanwhile");
        let status = claim(&order(directory, 2)).expect("in time").expect("claimed");
        assert!(!lock(&File::open(directory.join("status")).expect("status")).expect("lock"), "held for life");
        drop(status);
        let written = fs::read_to_string(directory.join("status")).expect("status");
        assert_eq!(written.lines().count(), 1, "the late ones wrote nothing: {written}");
        assert!(claim(&order(&directory.join("gone"), 2)).expect("gone").is_none());
        record(directory, 3);
        drop(claim(&order(directory, 3)).expect("in time").expect("claimed"));
        let written = fs::read_to_string(directory.join("status")).expect("status");
        assert!(written.lines().count() == 1 && written.contains(":3,"), "the latest attempt's only: {written}");
    }
}
