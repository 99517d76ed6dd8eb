//! A `management-api` whose `up` was killed: it holds the data directory, and nobody is left to stop it.

use crate::shell::Shell;
use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::{fs, path::Path, time::Duration};

/// Environment variable that holds the id of the `up` that started it.
pub(super) const MARK: &str = "SYSTEMPROMPT_UP_PROCESS";

/// Drain, instances, two clusters.
const STOPPED_WITHIN: Duration = Duration::from_secs(90);

/// Stops what an earlier `up` of this data directory left. One that somebody else started, or whose `up` lives, is
/// left alone: it says itself that the directory is in use.
pub(super) fn stop(shell: &Shell, data: &Path) -> Result<()> {
    let holder = fs::read_to_string(data.join("lock")).ok().and_then(|text| text.trim().parse().ok());
    let Some(process) = holder.and_then(Pid::from_raw) else { return Ok(()) };
    // The handle first: what is read below is of the process that is signalled, or of none.
    let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) else { return Ok(()) };
    if !is_orphan(process) {
        return Ok(());
    }
    eprintln!("stopping the management-api (process {process}) of an `up` that was killed …");
    pidfd_send_signal(&handle, Signal::TERM).context("cannot stop it")?;
    let ended = shell.interrupts.wait_readable(&handle, Some(STOPPED_WITHIN))?;
    ensure!(ended, "it does not stop: end it with `kill -9 {process}` and start again");
    Ok(())
}

/// Started by an `up` that is not its parent any more.
fn is_orphan(process: Pid) -> bool {
    let folder = Path::new("/proc").join(process.to_string());
    let read = |name: &str| fs::read(folder.join(name)).unwrap_or_default();
    let (environment, stat) = (read("environ"), read("stat"));
    let parent = parent(&String::from_utf8_lossy(&stat));
    starter(&environment).is_some_and(|starter| Some(starter) != parent)
}

fn starter(environment: &[u8]) -> Option<u32> {
    let mut variables = environment.split(|byte| *byte == 0);
    variables
        .find_map(|variable| std::str::from_utf8(variable).ok()?.strip_prefix(MARK)?.strip_prefix('=')?.parse().ok())
}

/// The 4th field; the name before it may hold anything.
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// Somebody who has the lock of `data`, started by the process `starter`.
    fn holder(data: &Path, starter: Option<u32>) -> Child {
        let mut command = Command::new("sleep");
        command.arg("60").envs(starter.map(|starter| (MARK, starter.to_string())));
        let child = command.spawn().unwrap();
        fs::write(data.join("lock"), format!("{}\n", child.id())).unwrap();
        child
    }

    #[test]
    fn only_an_orphan_of_an_earlier_up_is_stopped() {
        let (shell, data) = (Shell::open().unwrap(), tempfile::tempdir().unwrap());
        stop(&shell, data.path()).unwrap();
        for (starter, is_stopped) in [(None, false), (Some(std::process::id()), false), (Some(1), true)] {
            let mut child = holder(data.path(), starter);
            stop(&shell, data.path()).unwrap();
            assert_eq!(child.try_wait().unwrap().is_some(), is_stopped, "started by {starter:?}");
            child.kill().unwrap();
            child.wait().unwrap();
        }
        stop(&shell, data.path()).unwrap();
    }

    #[test]
    fn the_parent_is_read_behind_any_name() {
        assert_eq!(parent("42 (a ) b) S 7 42 42 0"), Some(7));
        assert_eq!(parent(""), None);
    }
}
