//! Stopping: first the application is asked, then the sandbox's init is killed, and with it everything inside.

use super::{
    blocking, host,
    instance::{Asker, Inner, init_process, kill_rest},
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
            told = told || tell(inner, &key)?;
            tokio::time::sleep(LOOK).await;
        }
    }
    let inner = inner.clone();
    blocking(move || {
        kill_now(&inner, &key)?;
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
        match (&found.stage, found.init_alive, launcher) {
            (Stage::Exited(_), false, _) => {
                return Ok(wait_until_written(&inner.layout.instance(key).output(), deadline)?);
            }
            (_, true, _) => kill_rest(&found)?,
            // Not yet a sandbox: the launcher itself. With an init that is gone, bwrap is about to end by itself.
            (Stage::Starting, false, Some(launcher)) => kill(launcher.pid)?,
            _ => {}
        }
        if Instant::now() > deadline {
            return Err(DriverError::Transient(format!("processes of {} survive SIGKILL", key.handle())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// SIGKILL to a process that was just seen to be ours.
pub(crate) fn kill(pid: i32) -> Result<(), DriverError> {
    send(pid, Signal::KILL)
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
    send(app, Signal::TERM)?;
    Ok(true)
}

fn send(pid: i32, signal: Signal) -> Result<(), DriverError> {
    let Some(pid) = Pid::from_raw(pid) else { return Ok(()) };
    // By descriptor: between opening and sending, the number cannot come to mean another process.
    let sent = pidfd_open(pid, PidfdFlags::empty()).and_then(|process| pidfd_send_signal(&process, signal));
    match sent {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(DriverError::Transient(format!("signalling process {pid:?}: {error}"))),
    }
}
