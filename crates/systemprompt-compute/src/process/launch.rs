//! Launching: everything between "this deployment shall run" and "its sandbox has an init".
//!
//! Each step finds what an earlier attempt left and makes it again, so that a launch that died anywhere is repeated
//! as it is. What must never happen twice is guarded by two locks: the instance's, held by whoever launches or
//! stops, and the status file's, held by a launcher and by the sandbox it becomes.

use super::{
    cgroup::Limits,
    crash,
    extract::{Caps, MountPoint},
    host, image,
    instance::{Asker, END_PATIENCE, GLANCE, Inner, START_PATIENCE, group, kill_launcher, read_status},
    launcher::{Order, Privileged, ResourceLimits},
    layout::{InstanceFiles, InstanceKey, private_directory, write_record},
    lock::FileLock,
    logs,
    network::PORT,
    open::write_whole,
    output::wait_until_written,
    plan::{self, Naming, Sources},
    state::{AppRecord, InstanceRecord, Reach, Run, Stage},
    stop::kill_now,
};
use crate::{CapacityScope, DriverError, InstanceHandle, InstanceSpec};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::PathBuf,
    process::Stdio,
    time::Instant,
};
use systemprompt_contract::AppName;
use systemprompt_oci::StoredImage;

/// Tasks of the sandbox itself: bwrap outside and inside, and the output's writer.
const SANDBOX_TASKS: u64 = 3;
/// Files an instance may have open.
const OPEN_FILES: u64 = 65_536;

/// A new attempt, recorded: nobody else will start the instance under its number.
#[derive(Debug)]
struct Attempt {
    number: u32,
    reach: Reach,
    /// The network namespace, as root.
    namespace: Option<PathBuf>,
}

impl Inner {
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
        let _alone = self.alone(app)?;
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
            // What is left of the earlier run ends in order, so that none of its output is lost.
            Some(_) => kill_now(self, &key)?,
            None => {}
        }
        let order = self.prepare(&key, &app_record, spec, image, before.as_ref().map(|found| &found.record))?;
        self.start(&key, &order)?;
        Ok(key.handle())
    }

    /// Refuses what must not run here.
    fn check(&self, record: &AppRecord, app: &AppName, spec: &InstanceSpec) -> Result<(), DriverError> {
        if record.tenant != spec.tenant {
            return Err(DriverError::Conflict(format!("the app {app} belongs to another tenant")));
        }
        if self.networks.is_some() != record.uid.is_some() {
            return Err(DriverError::Rejected(format!(
                "the app {app} has a user of its own only when it was made as root: run as it was made, or destroy it"
            )));
        }
        Ok(())
    }

    /// Where nothing keeps apps apart, makes sure that no other one runs, and lets none start while the lock is held.
    fn alone(&self, app: &AppName) -> Result<Option<FileLock>, DriverError> {
        if self.networks.is_some() || self.config.unsafe_shared {
            return Ok(None);
        }
        let lock = FileLock::exclusive(&self.layout.installation_lock())?;
        for key in self.keys()?.into_iter().filter(|key| key.app != *app) {
            let found = self.look(&key, Asker::Bystander)?;
            if found.is_some_and(|found| !matches!(found.stage, Stage::Exited(_)) || found.init.is_some()) {
                let message = format!(
                    "expected one tenant, since without root nothing keeps several apart, and {} runs already: run as \
                     root, or accept that tenants can read each other's data with `management-api serve --unsafe-shared`",
                    key.app
                );
                return Err(DriverError::Capacity { scope: CapacityScope::Host, message });
            }
        }
        Ok(Some(lock))
    }

    /// Everything up to the launcher's start. The record comes first: whatever is made after it is found again.
    fn prepare(
        &self,
        key: &InstanceKey,
        app: &AppRecord,
        spec: &InstanceSpec,
        image: &StoredImage,
        before: Option<&InstanceRecord>,
    ) -> Result<Order, DriverError> {
        let command = image.config.command().map_err(|error| DriverError::Rejected(error.to_string()))?;
        let files = self.layout.instance(key);
        private_directory(files.directory())?;
        // Held while the number is raised: a launcher of an earlier attempt is past its check, and then it holds
        // the lock, or it will find the new number.
        let _status = lock_status(&files)?;
        let attempt = self.reserve(key, spec, before)?;
        crash::point("compute.launch.network");
        let sources = Sources {
            image: image::ensure(&self.layout, image, &self.mount_points(), Caps::default())?,
            storage: self.layout.storage(&key.app),
            resolv_conf: files.resolv_conf(),
            binds: self.config.binds.clone(),
        };
        crash::point("compute.launch.image");
        write_whole(&files.resolv_conf(), &self.resolv_conf())?;
        fs::set_permissions(files.resolv_conf(), Permissions::from_mode(0o644))?;
        let memory_bytes = u64::from(spec.memory_mb) << 20;
        let limits = Limits { memory_bytes, pids: u64::from(spec.max_pids) + SANDBOX_TASKS };
        let cgroups = self.cgroups.as_ref().map(|cgroups| cgroups.create(&group(key), limits)).transpose()?;
        crash::point("compute.launch.cgroup");
        let (naming, listen) = match attempt.namespace {
            Some(_) => (Naming::Staged, SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT))),
            None => (Naming::Direct, attempt.reach.address()),
        };
        let privileged = attempt.namespace.zip(app.uid);
        Ok(Order {
            attempt: attempt.number,
            directory: files.directory().to_owned(),
            bwrap: self.bwrap.clone(),
            options: sources.options(naming, &image.config.working_dir, memory_bytes)?,
            command,
            environment: plan::environment(&image.config, &spec.env, listen)?,
            limits: self.resource_limits(cgroups.is_some(), limits),
            cgroups: cgroups.unwrap_or_default(),
            privileged: privileged.map(|(namespace, uid)| Privileged { uid, namespace, staged: sources.staged() }),
        })
    }

    /// Records a new attempt and makes its network. The caller holds the status file's lock.
    fn reserve(
        &self,
        key: &InstanceKey,
        spec: &InstanceSpec,
        before: Option<&InstanceRecord>,
    ) -> Result<Attempt, DriverError> {
        let files = self.layout.instance(key);
        let path = files.record();
        let number = before.map_or(1, |record| record.attempt + 1);
        let record = |reach| {
            let boot = host::boot_id()?;
            write_record(&path, &InstanceRecord { image: spec.image, attempt: number, boot, reach })
        };
        if let Some(networks) = &self.networks {
            let (reach, namespace) = networks.create(before.and_then(slot), files.directory(), record)?;
            Ok(Attempt { number, reach, namespace: Some(namespace) })
        } else {
            let reach = Reach::Shared { address: free_address()? };
            record(reach)?;
            Ok(Attempt { number, reach, namespace: None })
        }
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
                    wait_until_written(&files.output(), Instant::now() + END_PATIENCE)?;
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

pub(crate) fn slot(record: &InstanceRecord) -> Option<u32> {
    match record.reach {
        Reach::Namespace { slot, .. } => Some(slot),
        Reach::Shared { .. } => None,
    }
}

/// A port of loopback that nobody listens on now. An app that loses the race for it fails and is launched again.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}
