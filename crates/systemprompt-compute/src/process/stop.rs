//! Stopping: first the application is asked, then the sandbox's init is killed, and with it everything inside.

use super::{
    blocking, crash,
    host::{self, ProcessId},
    instance::{Asker, Inner, init_process},
    layout::InstanceKey,
    lock::FileLock,
    output::wait_until_written,
    state::Stage,
};
use crate::DriverError;
use rustix::{
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// How long a killed sandbox may take to go.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// Pause between two looks while the application ends by itself.
const LOOK: Duration = Duration::from_millis(10);

/// Stops an instance; see [`ComputeDriver::stop`](crate::ComputeDriver::stop). Dropping the future leaves
/// the instance asked to end and not killed.
pub(crate) async fn stop(inner: &Arc<Inner>, key: InstanceKey, grace: Duration) -> Result<(), DriverError> {
    let asked = {
        let (inner, key) = (inner.clone(), key.clone());
        blocking(move || {
            // An unknown instance has no directory and must not get a lock file.
            if !inner.layout.instance(&key).directory().exists() {
                return Ok(None);
            }
            let lock = FileLock::exclusive(&inner.layout.instance_lock(&key))?;
            Ok(Some((lock, inner.settled(&key)?)))
        })
        .await?
    };
    let Some((_lock, found)) = asked else { return Ok(()) };
    if found.is_some_and(|found| matches!(found.stage, Stage::Running { .. })) {
        let deadline = Instant::now() + grace;
        let mut told = false;
        while Instant::now() < deadline && is_running(inner, &key)? {
            if !told {
                told = tell(inner, &key)?;
                crash::point("compute.stop.told");
            }
            tokio::time::sleep(LOOK).await;
        }
    }
    let inner = inner.clone();
    blocking(move || {
        kill_now(&inner, &key)?;
        crash::point("compute.stop.killed");
        match inner.look(&key, Asker::Holder)? {
            Some(found) => inner.release_network(&found.record),
            None => Ok(()),
        }
    })
    .await
}

/// Kills whatever of an instance lives and waits until it is gone. The caller holds the instance's lock.
pub(crate) fn kill_now(inner: &Inner, key: &InstanceKey) -> Result<(), DriverError> {
    let deadline = Instant::now() + KILL_PATIENCE;
    loop {
        let Some(found) = inner.look(key, Asker::Holder)? else { return Ok(()) };
        let launcher = found.run.as_ref().map(|run| run.header.launcher).filter(|launcher| launcher.is_alive());
        match (&found.stage, found.init, launcher) {
            (Stage::Exited(_), None, _) => {
                return Ok(wait_until_written(&inner.layout.instance(key).output(), deadline)?);
            }
            (_, Some(init), _) => kill(init)?,
            // Not yet a sandbox: the launcher itself. With an init that is gone, bwrap is about to end by itself.
            (Stage::Starting, None, Some(launcher)) => kill(launcher)?,
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(DriverError::Transient(format!("processes of {} survive SIGKILL", key.handle())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// SIGKILL to a process of ours.
pub(crate) fn kill(process: ProcessId) -> Result<(), DriverError> {
    send(process.pid, Signal::KILL, || process.is_alive())
}

fn is_running(inner: &Inner, key: &InstanceKey) -> Result<bool, DriverError> {
    let found = inner.look(key, Asker::Holder)?;
    Ok(found.is_some_and(|found| matches!(found.stage, Stage::Running { .. } | Stage::Ending)))
}

/// SIGTERM to the application itself: bwrap does not hand signals on. False while there is no application yet.
fn tell(inner: &Inner, key: &InstanceKey) -> Result<bool, DriverError> {
    let uid = inner.app_record(&key.app)?.and_then(|app| app.uid);
    let run = inner.look(key, Asker::Holder)?.and_then(|found| found.run);
    let Some(init) = run.and_then(|run| init_process(&run, uid)) else { return Ok(false) };
    let Some(app) = host::first_child(init.pid) else { return Ok(false) };
    send(app, Signal::TERM, || init.is_alive() && host::first_child(init.pid) == Some(app))?;
    Ok(true)
}

/// A signal to the process that has this number and of which `is_ours` holds.
fn send(pid: i32, signal: Signal, is_ours: impl FnOnce() -> bool) -> Result<(), DriverError> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    // Looked at behind a descriptor of it: the number may have come to mean another process since it was read, and
    // whatever holds it now cannot change any more without ending first.
    let sent = pidfd_open(pid, PidfdFlags::empty())
        .and_then(|process| if is_ours() { pidfd_send_signal(&process, signal) } else { Ok(()) });
    match sent {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(DriverError::Transient(format!("signalling process {pid:?}: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_means_another_process_by_now_gets_no_signal() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let pid = i32::try_from(child.id()).expect("pid");
        let start = host::Stat::read(pid).expect("stat").start;
        kill(ProcessId { pid, start: start - 1 }).expect("an earlier one of this number has ended");
        assert_eq!(child.try_wait().expect("status"), None, "it lives");
        kill(ProcessId { pid, start }).expect("a kill");
        assert!(!child.wait().expect("status").success());
    }
}
