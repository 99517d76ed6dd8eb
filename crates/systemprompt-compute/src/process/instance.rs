//! Instances: what is known of them, what lives of them, and their end.

use super::{
    ProcessConfig,
    cgroup::Cgroups,
    host::{self, ProcessId, Stat, boot_id},
    layout::{InstanceFiles, InstanceKey, Layout, read_record},
    lock::FileLock,
    logs,
    network::Networks,
    output::wait_until_written,
    state::{Alive, InstanceRecord, Reach, Run, Stage, decide},
    stop::kill,
};
use crate::{DriverError, ExitReason, FoundInstance, InstanceState};
use chrono::{DateTime, Utc};
use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    time::{Duration, Instant},
};

/// The driver without its maintenance: what all calls share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) layout: Layout,
    pub(crate) config: ProcessConfig,
    pub(crate) bwrap: PathBuf,
    /// As root only.
    pub(crate) networks: Option<Networks>,
    /// Where there are any to write to.
    pub(crate) cgroups: Option<Cgroups>,
}

/// How long a sandbox may take from the launcher's start to its init.
pub(crate) const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long bwrap may take to write the exit code after the application's end, and the writer its last output.
pub(crate) const END_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks at files that change within milliseconds.
pub(crate) const GLANCE: Duration = Duration::from_millis(2);

/// What was found about an instance.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) record: InstanceRecord,
    pub(crate) run: Option<Run>,
    pub(crate) stage: Stage,
    /// The sandbox's init while it lives, in whatever stage the instance is.
    pub(crate) init: Option<ProcessId>,
}

/// Whether the asker holds the instance's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asker {
    Holder,
    Bystander,
}

impl Inner {
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
                    wait_until_written(&self.layout.instance(key).output(), Instant::now() + END_PATIENCE)?;
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

    /// What is known about an instance and what lives of it.
    pub(crate) fn look(&self, key: &InstanceKey, asker: Asker) -> Result<Option<Found>, DriverError> {
        let files = self.layout.instance(key);
        let Some(record) = read_record::<InstanceRecord>(&files.record())? else { return Ok(None) };
        let run = read_status(&files)?;
        let uid = self.app_record(&key.app)?.and_then(|app| app.uid);
        let boot = boot_id()?;
        let (mut alive, mut init) = (Alive::default(), None);
        match &run {
            // Both: in a copied data directory only the records say that nothing of it is ours.
            Some(run) if run.header.boot == boot && record.boot == boot => {
                alive.launcher = run.header.launcher.is_alive();
                init = init_process(run, uid);
                alive.init = init.is_some();
            }
            _ => {}
        }
        if run.as_ref().is_none_or(|run| run.header.attempt != record.attempt) {
            alive.busy = asker == Asker::Bystander && self.is_locked(key)? || is_status_locked(&files)?;
        }
        let stage = decide(&record, run.as_ref(), &boot, alive);
        Ok(Some(Found { record, run, stage, init }))
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

    /// Frees what an instance holds outside its directory while it does not run.
    pub(crate) fn release_network(&self, record: &InstanceRecord) -> Result<(), DriverError> {
        match (&self.networks, record.reach) {
            (Some(networks), Reach::Namespace { slot, .. }) => Ok(networks.remove(slot)?),
            _ => Ok(()),
        }
    }

    pub(crate) fn keys(&self) -> Result<Vec<InstanceKey>, DriverError> {
        let mut keys = Vec::new();
        for app in self.layout.list_apps()? {
            keys.extend(self.layout.list_instances(&app)?);
        }
        Ok(keys)
    }

    /// Deletes everything of a stopped instance, the record last but one: it says what else there is.
    pub(crate) fn erase(&self, key: &InstanceKey, lock: FileLock) -> Result<(), DriverError> {
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
    found.init.map_or(Ok(()), kill)
}

pub(crate) fn kill_launcher(found: &Found) -> Result<(), DriverError> {
    match &found.run {
        Some(run) => kill(run.header.launcher),
        None => Ok(()),
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

pub(crate) fn read_status(files: &InstanceFiles) -> io::Result<Option<Run>> {
    match fs::read_to_string(files.status()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => Ok(Run::last(&other?)),
    }
}

fn is_status_locked(files: &InstanceFiles) -> io::Result<bool> {
    match File::open(files.status()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
        Ok(file) => Ok(flock(&file, FlockOperation::NonBlockingLockShared).is_err()),
    }
}

/// Name of an instance's control groups.
pub(crate) fn group(key: &InstanceKey) -> String {
    format!("{}.{}", key.app, key.deployment)
}
