//! Apps and instances of the process driver: the calls of the trait, as blocking work.

use super::{
    ProcessConfig,
    cgroup::{Cgroups, Limits},
    crash,
    extract::{Caps, MountPoint},
    host::{self, ProcessId, Stat, boot_id},
    image,
    launcher::{Order, Privileged, ResourceLimits},
    layout::{InstanceFiles, InstanceKey, Layout, private_directory, read_record, write_record},
    lock::FileLock,
    logs,
    network::{Networks, PORT},
    open::write_whole,
    plan::{self, Naming, Sources},
    state::{Alive, AppRecord, InstanceRecord, Reach, Run, Stage, decide},
    stop::kill,
};
use crate::{AppHandle, AppSpec, DriverError, ExitReason, FoundInstance, InstanceHandle, InstanceSpec, InstanceState};
use chrono::{DateTime, Utc};
use rustix::fs::{FlockOperation, flock};
use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{OpenOptionsExt, chown},
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};
use systemprompt_contract::AppName;
use systemprompt_oci::{Digest, StoredImage};

/// The driver without its maintenance: what all calls share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) config: ProcessConfig,
    pub(crate) bwrap: PathBuf,
    pub(crate) first_uid: u32,
    /// As root only.
    pub(crate) networks: Option<Networks>,
    /// Where there are any to write to.
    pub(crate) cgroups: Option<Cgroups>,
}

/// How long a sandbox may take from the launcher's start to its init.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long bwrap may take to write the exit code after the application's end.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks at files that change within milliseconds.
const GLANCE: Duration = Duration::from_millis(2);
/// Tasks of the sandbox itself: bwrap outside and inside.
const SANDBOX_TASKS: u64 = 2;
/// Files an instance may have open.
const OPEN_FILES: u64 = 65_536;

/// What was found about an instance.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) record: InstanceRecord,
    pub(crate) run: Option<Run>,
    pub(crate) stage: Stage,
    /// Whether the sandbox's init lives, in whatever stage the instance is.
    pub(crate) init_alive: bool,
}

/// Whether the asker holds the instance's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    Holder,
    Bystander,
}

impl Inner {
    pub(crate) fn ensure_app(&self, spec: &AppSpec) -> Result<AppHandle, DriverError> {
        let _app = FileLock::exclusive(&self.layout.app_lock(&spec.app))?;
        let path = self.layout.app_record(&spec.app);
        let record: AppRecord = match read_record::<AppRecord>(&path)? {
            Some(record) if record.tenant != spec.tenant => {
                return Err(DriverError::Conflict(format!("the app {} belongs to another tenant", spec.app)));
            }
            Some(record) => AppRecord { region: spec.region, memory_mb: spec.memory_mb, ..record },
            None => {
                private_directory(&self.layout.app(&spec.app))?;
                let uid = self.networks.as_ref().map(|_| self.allocate_uid()).transpose()?;
                AppRecord { tenant: spec.tenant, region: spec.region, memory_mb: spec.memory_mb, uid }
            }
        };
        let storage = self.layout.storage(&spec.app);
        private_directory(&storage)?;
        if let Some(uid) = record.uid {
            chown(&storage, Some(uid), Some(uid))?;
        }
        write_record(&path, &record)?;
        Ok(AppHandle::new(spec.app.as_str()))
    }

    /// The handle, when there is nothing to launch any more.
    pub(crate) fn running(&self, app: &AppName, spec: &InstanceSpec) -> Result<Option<InstanceHandle>, DriverError> {
        let key = InstanceKey { app: app.clone(), deployment: spec.deployment };
        let found = self.look(&key, Asker::Bystander)?;
        let running =
            found.is_some_and(|found| found.record.image == spec.image && matches!(found.stage, Stage::Running { .. }));
        Ok(running.then(|| key.handle()))
    }

    pub(crate) fn launch(
        &self,
        app: &AppName,
        spec: &InstanceSpec,
        image: &StoredImage,
    ) -> Result<InstanceHandle, DriverError> {
        let key = InstanceKey { app: app.clone(), deployment: spec.deployment };
        let _app = FileLock::shared(&self.layout.app_lock(app))?;
        let app_record = self.app_record(app)?.ok_or_else(|| DriverError::NotFound(format!("the app {app}")))?;
        self.check(&app_record, app, spec)?;
        let _instance = FileLock::exclusive(&self.layout.instance_lock(&key))?;
        crash::point("compute.launch.locked");
        let before = self.settled(&key)?;
        match &before {
            Some(found) if found.record.image != spec.image => {
                let has = found.record.image;
                return Err(DriverError::Conflict(format!(
                    "expected the image {has} of this deployment, got {}",
                    spec.image
                )));
            }
            Some(found) if matches!(found.stage, Stage::Running { .. }) => return Ok(key.handle()),
            _ => {}
        }
        let order = self.prepare(&key, &app_record, spec, image, before.map(|found| found.record))?;
        self.start(&key, &order)?;
        Ok(key.handle())
    }

    pub(crate) fn inspect(&self, key: &InstanceKey) -> Result<InstanceState, DriverError> {
        let deadline = Instant::now() + END_PATIENCE;
        loop {
            let Some(found) = self.look(key, Asker::Bystander)? else { return Ok(InstanceState::Absent) };
            match &found.stage {
                Stage::Running { since } => {
                    return Ok(InstanceState::Running { address: found.record.reach.address(), since: *since });
                }
                Stage::Starting => return Ok(InstanceState::Starting),
                Stage::Ending if Instant::now() < deadline => std::thread::sleep(GLANCE),
                Stage::Ending | Stage::Exited(_) => {
                    // The application has ended: what it left in the background ends with it.
                    kill_rest(&found)?;
                    return Ok(InstanceState::Exited {
                        reason: self.reason(key, &found),
                        at: self.ended_at(key, &found),
                    });
                }
            }
        }
    }

    pub(crate) fn remove(&self, key: &InstanceKey) -> Result<(), DriverError> {
        let lock = FileLock::exclusive(&self.layout.instance_lock(key))?;
        if let Some(found) = self.settled(key)? {
            if matches!(found.stage, Stage::Running { .. }) {
                return Err(DriverError::Conflict(format!("the instance {} runs: stop it first", key.handle())));
            }
            kill_rest(&found)?;
        }
        self.erase(key, lock)?;
        self.collect_images()
    }

    pub(crate) fn instances(&self) -> Result<Vec<FoundInstance>, DriverError> {
        let mut found = Vec::new();
        for key in self.keys()? {
            let state = match self.inspect(&key)? {
                // A launch that was cut short before its record, or a removal before its last step: it is there.
                InstanceState::Absent if !self.layout.instance(&key).directory().exists() => continue,
                InstanceState::Absent => InstanceState::Exited { reason: ExitReason::Unknown, at: Utc::now() },
                state => state,
            };
            let (handle, InstanceKey { app, deployment }) = (key.handle(), key);
            found.push(FoundInstance { app, deployment, handle, state });
        }
        Ok(found)
    }

    pub(crate) fn destroy_app(&self, app: &AppName) -> Result<(), DriverError> {
        let lock = FileLock::exclusive(&self.layout.app_lock(app))?;
        for key in self.layout.list_instances(app)? {
            let lock = FileLock::exclusive(&self.layout.instance_lock(&key))?;
            super::stop::kill_now(self, &key)?;
            self.erase(&key, lock)?;
        }
        self.layout.discard(&self.layout.app(app))?;
        lock.remove()?;
        self.collect_images()?;
        let _installation = FileLock::exclusive(&self.layout.installation_lock())?;
        if self.layout.list_apps()?.is_empty() {
            self.remove_rules()?;
        }
        Ok(())
    }

    /// Takes the installation's firewall rules and empty control groups away.
    pub(crate) fn remove_rules(&self) -> Result<(), DriverError> {
        if let Some(networks) = &self.networks {
            networks.remove_rules()?;
        }
        if let Some(cgroups) = &self.cgroups {
            cgroups.remove_installation();
        }
        Ok(())
    }

    /// Trims outputs and syncs new images.
    pub(crate) fn maintain(&self) -> Result<(), DriverError> {
        let mut images = HashSet::new();
        for key in self.keys()? {
            let files = self.layout.instance(&key);
            logs::trim(&files.output(), self.config.output_bytes)?;
            images.extend(read_record::<InstanceRecord>(&files.record())?.map(|record| record.image));
        }
        for digest in images {
            image::sync(&self.layout, &digest)?;
        }
        Ok(())
    }

    /// What is known about an instance and what lives of it.
    pub(crate) fn look(&self, key: &InstanceKey, asker: Asker) -> Result<Option<Found>, DriverError> {
        let files = self.layout.instance(key);
        let Some(record) = read_record::<InstanceRecord>(&files.record())? else { return Ok(None) };
        let run = read_status(&files)?;
        let uid = self.app_record(&key.app)?.and_then(|app| app.uid);
        let boot = boot_id()?;
        let mut alive = Alive::default();
        match &run {
            Some(run) if run.header.boot == boot => {
                alive.launcher = run.header.launcher.is_alive();
                alive.init = init_process(run, uid).is_some();
            }
            _ => {}
        }
        if run.as_ref().is_none_or(|run| run.header.attempt != record.attempt) {
            alive.busy = asker == Asker::Bystander && self.is_locked(key)? || is_status_locked(&files)?;
        }
        let stage = decide(&record, run.as_ref(), &boot, alive);
        Ok(Some(Found { record, run, stage, init_alive: alive.init }))
    }

    /// As [`Inner::look`] for the lock's holder, when what is on its way has arrived. Nothing is left of
    /// an instance that this calls exited, but for what [`kill_rest`] ends.
    pub(crate) fn settled(&self, key: &InstanceKey) -> Result<Option<Found>, DriverError> {
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            match self.look(key, Asker::Holder)? {
                Some(found) if matches!(found.stage, Stage::Starting | Stage::Ending) => {
                    if Instant::now() > deadline {
                        kill_launcher(&found)?;
                        return Err(DriverError::Transient(format!("{} hung while starting", key.handle())));
                    }
                    std::thread::sleep(GLANCE);
                }
                found => return Ok(found),
            }
        }
    }

    pub(crate) fn app_record(&self, app: &AppName) -> Result<Option<AppRecord>, DriverError> {
        Ok(read_record(&self.layout.app_record(app))?)
    }

    /// Frees what an instance holds outside its directory while it does not run.
    pub(crate) fn release_network(&self, record: &InstanceRecord) -> Result<(), DriverError> {
        match (&self.networks, record.reach) {
            (Some(networks), Reach::Namespace { slot, .. }) => Ok(networks.remove(slot)?),
            _ => Ok(()),
        }
    }

    fn keys(&self) -> Result<Vec<InstanceKey>, DriverError> {
        let mut keys = Vec::new();
        for app in self.layout.list_apps()? {
            keys.extend(self.layout.list_instances(&app)?);
        }
        Ok(keys)
    }

    /// Refuses what must not run here.
    fn check(&self, record: &AppRecord, app: &AppName, spec: &InstanceSpec) -> Result<(), DriverError> {
        if record.tenant != spec.tenant {
            return Err(DriverError::Conflict(format!("the app {app} belongs to another tenant")));
        }
        if self.networks.is_some() || self.config.unsafe_shared {
            return Ok(());
        }
        for other in self.layout.list_apps()? {
            if other != *app && !self.layout.list_instances(&other)?.is_empty() {
                return Err(DriverError::Rejected(format!(
                    "expected one tenant, since without root nothing keeps several apart, and {other} is here already: \
                     run as root, or accept that tenants can read each other's data with --unsafe-shared"
                )));
            }
        }
        Ok(())
    }

    /// Everything up to the launcher's start. The record comes first: whatever is made after it is found again.
    fn prepare(
        &self,
        key: &InstanceKey,
        app: &AppRecord,
        spec: &InstanceSpec,
        image: &StoredImage,
        before: Option<InstanceRecord>,
    ) -> Result<Order, DriverError> {
        let command = image.config.command().map_err(|error| DriverError::Rejected(error.to_string()))?;
        let files = self.layout.instance(key);
        private_directory(files.directory())?;
        // Held while the number is raised: a launcher of an earlier attempt is past its check, and then it holds
        // the lock, or it will find the new number.
        let status = lock_status(&files)?;
        let attempt = before.as_ref().map_or(1, |record| record.attempt + 1);
        let mut reach = None;
        let mut record = |found| {
            reach = Some(found);
            let boot = boot_id()?;
            write_record(&files.record(), &InstanceRecord { image: spec.image, attempt, boot, reach: found })
        };
        let namespace = if let Some(networks) = &self.networks {
            let before = before.and_then(|record| slot(&record));
            Some(networks.create(before, || self.slots_of_others(key), record)?)
        } else {
            record(Reach::Shared { address: free_address()? })?;
            None
        };
        let address = reach.map(Reach::address).ok_or_else(|| DriverError::Transient("no address".to_owned()))?;
        crash::point("compute.launch.network");
        let sources = Sources {
            image: image::ensure(&self.layout, image, &self.mount_points(), Caps::default())?,
            storage: self.layout.storage(&key.app),
            resolv_conf: files.resolv_conf(),
            binds: self.config.binds.clone(),
        };
        crash::point("compute.launch.image");
        write_whole(&files.resolv_conf(), &self.resolv_conf())?;
        fs::set_permissions(files.resolv_conf(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        let memory_bytes = u64::from(spec.memory_mb) << 20;
        let limits = Limits { memory_bytes, pids: u64::from(spec.max_pids) + SANDBOX_TASKS };
        let cgroups = self.cgroups.as_ref().map(|cgroups| cgroups.create(&group(key), limits)).transpose()?;
        crash::point("compute.launch.cgroup");
        let (naming, listen) = match namespace {
            Some(_) => (Naming::Staged, SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT))),
            None => (Naming::Direct, address),
        };
        let order = Order {
            attempt,
            directory: files.directory().to_owned(),
            bwrap: self.bwrap.clone(),
            options: sources.options(naming, &image.config.working_dir, memory_bytes)?,
            command,
            environment: plan::environment(&image.config, &spec.env, listen)?,
            limits: self.resource_limits(cgroups.is_some(), limits),
            cgroups: cgroups.unwrap_or_default(),
            privileged: namespace.zip(app.uid).map(|(namespace, uid)| Privileged {
                uid,
                namespace,
                staged: sources.staged(),
            }),
        };
        if self.networks.is_some() != order.privileged.is_some() {
            return Err(DriverError::Rejected(format!(
                "the app {} was made without root and has no uid of its own: destroy it or run without root",
                key.app
            )));
        }
        drop(status);
        Ok(order)
    }

    /// Starts the launcher and waits until the sandbox has an init.
    fn start(&self, key: &InstanceKey, order: &Order) -> Result<(), DriverError> {
        let order_text = zeroize::Zeroizing::new(serde_json::to_vec(order).map_err(io::Error::from)?);
        let (program, arguments) = self.config.launcher.split_first().expect("checked when the driver was opened");
        let mut child = tokio::process::Command::new(program)
            .args(arguments)
            .arg(key.handle().as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .current_dir("/")
            .spawn()
            .map_err(|error| DriverError::Transient(format!("the launcher {} : {error}", program.display())))?;
        crash::point("compute.launch.spawned");
        // An order may be larger than a pipe, and the launcher reads all of it before anything else.
        let pipe = child.stdin.take().map(tokio::process::ChildStdin::into_owned_fd).transpose()?;
        let mut pipe = File::from(pipe.ok_or_else(|| DriverError::Transient("no pipe to the launcher".to_owned()))?);
        rustix::io::ioctl_fionbio(&pipe, false).map_err(io::Error::from)?;
        // A launcher that died says so below.
        let _ = pipe.write_all(&order_text);
        drop(pipe);
        crash::point("compute.launch.ordered");
        let files = self.layout.instance(key);
        let deadline = Instant::now() + START_PATIENCE;
        loop {
            let exited = child.try_wait()?;
            let run = read_status(&files)?.filter(|run| run.header.attempt == order.attempt);
            match (run, exited) {
                (Some(Run { failed: Some(failed), .. }), _) => return Err(DriverError::Transient(failed)),
                (Some(Run { init: Some(_), .. }), _) => return Ok(()),
                (_, Some(status)) => {
                    let said = logs::sandbox_said(&files.output());
                    let said = said.unwrap_or_else(|| format!("the launcher ended: {status}"));
                    return Err(DriverError::Transient(said));
                }
                _ if Instant::now() > deadline => {
                    let found = self.look(key, Asker::Holder)?;
                    found.as_ref().map_or(Ok(()), kill_launcher)?;
                    return Err(DriverError::Transient(format!("{} hung while starting", key.handle())));
                }
                _ => std::thread::sleep(GLANCE),
            }
        }
    }

    fn resource_limits(&self, grouped: bool, limits: Limits) -> ResourceLimits {
        let tasks = match (grouped, &self.networks) {
            (true, _) => None,
            // Two instances of an app share its uid while one replaces the other.
            (false, Some(_)) => Some(limits.pids * 2),
            // The caller's own tasks count as well.
            (false, None) => Some(limits.pids + host::tasks_of(rustix::process::getuid().as_raw())),
        };
        ResourceLimits { data_bytes: (!grouped).then_some(limits.memory_bytes), files: OPEN_FILES, tasks }
    }

    fn mount_points(&self) -> Vec<(PathBuf, MountPoint)> {
        let directories = ["proc", "dev", "tmp", "run", plan::VOLUME.trim_start_matches('/')].map(PathBuf::from);
        let binds = self.config.binds.iter().map(|bind| &bind.sandbox).filter(|path| !path.starts_with("/run"));
        let binds = binds.map(|path| path.strip_prefix("/").unwrap_or(path).to_owned());
        let mut points: Vec<_> =
            directories.into_iter().chain(binds).map(|path| (path, MountPoint::Directory)).collect();
        points.push((plan::RESOLV_CONF.trim_start_matches('/').into(), MountPoint::File));
        points
    }

    fn resolv_conf(&self) -> String {
        match &self.networks {
            Some(networks) => {
                let lines = networks.firewall.resolvers.iter().map(|server| format!("nameserver {server}\n"));
                lines.collect::<Vec<_>>().concat()
            }
            None => fs::read_to_string("/etc/resolv.conf").unwrap_or_default(),
        }
    }

    /// The next uid that nobody runs under; none is ever given twice by one installation.
    fn allocate_uid(&self) -> Result<u32, DriverError> {
        let _installation = FileLock::exclusive(&self.layout.installation_lock())?;
        let path = self.layout.uids();
        let mut uid = read_record::<u32>(&path)?.unwrap_or(self.first_uid);
        while host::tasks_of(uid) > 0 {
            uid += 1;
        }
        write_record(&path, &(uid + 1))?;
        Ok(uid)
    }

    fn slots_of_others(&self, own: &InstanceKey) -> io::Result<Vec<u32>> {
        let mut slots = Vec::new();
        for app in self.layout.list_apps()? {
            for key in self.layout.list_instances(&app)?.into_iter().filter(|key| key != own) {
                let record: Option<InstanceRecord> = read_record(&self.layout.instance(&key).record())?;
                slots.extend(record.as_ref().and_then(slot));
            }
        }
        Ok(slots)
    }

    /// Deletes everything of a stopped instance, the record last but one: it says what else there is.
    fn erase(&self, key: &InstanceKey, lock: FileLock) -> Result<(), DriverError> {
        let files = self.layout.instance(key);
        if let Some(record) = read_record::<InstanceRecord>(&files.record())? {
            self.release_network(&record)?;
        }
        if let Some(cgroups) = &self.cgroups {
            cgroups.remove(&group(key))?;
        }
        self.layout.discard(files.directory())?;
        Ok(lock.remove()?)
    }

    fn collect_images(&self) -> Result<(), DriverError> {
        Ok(image::collect(&self.layout, || {
            let mut used: HashSet<Digest> = HashSet::new();
            for app in self.layout.list_apps()? {
                for key in self.layout.list_instances(&app)? {
                    let record: Option<InstanceRecord> = read_record(&self.layout.instance(&key).record())?;
                    used.extend(record.map(|record| record.image));
                }
            }
            Ok(used)
        })?)
    }

    fn reason(&self, key: &InstanceKey, found: &Found) -> ExitReason {
        let Stage::Exited(ended) = found.stage.clone() else { return ExitReason::Unknown };
        let out_of_memory = || self.cgroups.as_ref().is_some_and(|cgroups| cgroups.out_of_memory(&group(key)));
        ended.reason(out_of_memory, || logs::sandbox_said(&self.layout.instance(key).output()))
    }

    /// bwrap writes the exit code when it happens; without one, the record is the last that was heard.
    fn ended_at(&self, key: &InstanceKey, found: &Found) -> DateTime<Utc> {
        let files = self.layout.instance(key);
        let current = found.run.as_ref().is_some_and(|run| run.header.attempt == found.record.attempt);
        let path = if current { files.status() } else { files.record() };
        fs::metadata(path).and_then(|meta| meta.modified()).map_or_else(|_| Utc::now(), DateTime::from)
    }

    fn is_locked(&self, key: &InstanceKey) -> io::Result<bool> {
        let path = self.layout.instance_lock(key);
        Ok(path.exists() && FileLock::try_exclusive(&path)?.is_none())
    }
}

/// Ends what the application left behind in its sandbox.
pub(crate) fn kill_rest(found: &Found) -> Result<(), DriverError> {
    match found.run.as_ref().and_then(|run| run.init) {
        Some(init) if found.init_alive => kill(init.pid),
        _ => Ok(()),
    }
}

fn kill_launcher(found: &Found) -> Result<(), DriverError> {
    match &found.run {
        Some(run) if run.header.launcher.is_alive() => kill(run.header.launcher.pid),
        _ => Ok(()),
    }
}

/// The sandbox's init, when it lives and is what the status file says: pid, pid namespace, uid, age.
pub(crate) fn init_process(run: &Run, uid: Option<u32>) -> Option<ProcessId> {
    let init = run.init?;
    let stat = Stat::read(init.pid)?;
    let same = !stat.is_dead()
        && stat.start >= run.header.launcher.start
        && host::pid_namespace(init.pid) == Some(init.pid_namespace)
        && uid.is_none_or(|uid| host::uid_of(init.pid) == Some(uid));
    same.then_some(ProcessId { pid: init.pid, start: stat.start })
}

fn read_status(files: &InstanceFiles) -> io::Result<Option<Run>> {
    match fs::read_to_string(files.status()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => Ok(Run::last(&other?)),
    }
}

fn lock_status(files: &InstanceFiles) -> Result<File, DriverError> {
    let file = OpenOptions::new().append(true).create(true).mode(0o600).open(files.status())?;
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(GLANCE);
            }
            Err(error) => return Err(DriverError::Transient(format!("the status file stays locked: {error}"))),
        }
    }
}

fn is_status_locked(files: &InstanceFiles) -> io::Result<bool> {
    match File::open(files.status()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(file) => Ok(flock(&file, FlockOperation::NonBlockingLockShared).is_err()),
    }
}

fn slot(record: &InstanceRecord) -> Option<u32> {
    match record.reach {
        Reach::Namespace { slot, .. } => Some(slot),
        Reach::Shared { .. } => None,
    }
}

fn group(key: &InstanceKey) -> String {
    format!("{}.{}", key.app, key.deployment)
}

/// A port of loopback that nobody listens on now. An app that loses the race for it fails and is launched again.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}
