//! What is recorded about an app and an instance, what the status file says, and the one function that turns
//! both, with what is alive now, into an [`InstanceState`].
//!
//! ```text
//! record of this boot? no ──────────────────────────────► Exited(code if it was written, else Unknown)
//! status has a run of the recorded attempt? no ─► somebody works on it? yes: Starting, no: Exited(cut short)
//! exit code written ────────────────────────────────────► Exited(code | signal | out of memory)
//! failure written ──────────────────────────────────────► Exited(SetupFailed)
//! init alive ───────────────────────────────────────────► Running
//! launcher (or outer bwrap) alive ──────────────────────► Starting, or Ending when there was an init
//! nothing alive ────────────────────────────────────────► Exited(SetupFailed when the sandbox said why, else Unknown)
//! ```

use super::host::ProcessId;
use crate::ExitReason;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use systemprompt_contract::{Region, TenantId};
use systemprompt_oci::Digest;

/// What is known about an app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct AppRecord {
    pub(crate) tenant: TenantId,
    pub(crate) region: Region,
    pub(crate) memory_mb: u32,
    /// Kernel uid (and gid) of all the app's instances; never given to another app.
    pub(crate) uid: Option<u32>,
}

/// What is known about an instance before anything of it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InstanceRecord {
    pub(crate) image: Digest,
    /// Counts starts; a launcher of an older attempt finds the number changed and ends.
    pub(crate) attempt: u32,
    /// Boot in which this attempt was made.
    pub(crate) boot: String,
    pub(crate) reach: Reach,
}

/// How an instance is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reach {
    /// In a network namespace of its own: which of the pool's /30 networks.
    Namespace {
        /// Number of the network within the pool.
        slot: u32,
        /// The instance's own address and port.
        address: SocketAddr,
    },
    /// On the host's loopback.
    Shared {
        /// The address it was told to listen on.
        address: SocketAddr,
    },
}

impl Reach {
    pub(crate) fn address(self) -> SocketAddr {
        match self {
            Self::Namespace { address, .. } | Self::Shared { address } => address,
        }
    }
}

/// First line of a run in the status file, written by the launcher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunHeader {
    pub(crate) attempt: u32,
    /// The launcher, which becomes the outer bwrap.
    pub(crate) launcher: ProcessId,
    pub(crate) boot: String,
    pub(crate) at: DateTime<Utc>,
}

/// Init of the sandbox, as bwrap wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Init {
    pub(crate) pid: i32,
    pub(crate) pid_namespace: u64,
}

/// The last run in a status file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) header: RunHeader,
    pub(crate) init: Option<Init>,
    pub(crate) exit_code: Option<i32>,
    pub(crate) failed: Option<String>,
}

/// Every shape a line of the status file has; the launcher and bwrap both append to it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum StatusLine {
    /// The launcher has begun.
    Header(RunHeader),
    /// The launcher gave up.
    Failed {
        /// Why.
        failed: String,
    },
    /// bwrap: the sandbox has an init.
    Child {
        /// Its pid in our namespace.
        #[serde(rename = "child-pid")]
        pid: i32,
        /// Inode of its pid namespace.
        #[serde(rename = "pid-namespace")]
        pid_namespace: u64,
    },
    /// bwrap: the application has ended.
    Exit {
        /// As a shell would show it: 128 + n for signal n.
        #[serde(rename = "exit-code")]
        code: i32,
    },
}

impl Run {
    /// The last run of a status file. A torn or foreign line is skipped: bwrap is not ours.
    pub(crate) fn last(status: &str) -> Option<Self> {
        let mut run: Option<Self> = None;
        for line in status.lines().filter_map(|line| serde_json::from_str::<StatusLine>(line).ok()) {
            match (line, &mut run) {
                (StatusLine::Header(header), _) => {
                    run = Some(Self { header, init: None, exit_code: None, failed: None });
                }
                (StatusLine::Failed { failed }, Some(run)) => run.failed = Some(failed),
                (StatusLine::Child { pid, pid_namespace }, Some(run)) => run.init = Some(Init { pid, pid_namespace }),
                (StatusLine::Exit { code }, Some(run)) => run.exit_code = Some(code),
                (_, None) => {}
            }
        }
        run
    }
}

/// What lives now, as far as [`decide`] asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Alive {
    /// The sandbox's init, checked against namespace, uid and boot.
    pub(crate) init: bool,
    /// The launcher or the outer bwrap it became.
    pub(crate) launcher: bool,
    /// Somebody holds the deployment's lock or the status file's.
    pub(crate) busy: bool,
}

/// The stage an instance is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    Starting,
    Running {
        since: DateTime<Utc>,
    },
    /// The application is gone and bwrap is about to say how.
    Ending,
    Exited(Ended),
}

/// How it ended; what remains to be asked of the cgroup and the output is named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    /// A signal: out of memory, when the cgroup counts a kill and the signal is 9.
    Signal(i32),
    Failed(String),
    /// Nothing was written: the output may hold the sandbox's reason.
    Silent,
    /// Not of this boot.
    Unknown,
}

/// The stage of an instance; see the module's table.
pub(crate) fn decide(record: &InstanceRecord, run: Option<&Run>, boot: &str, alive: Alive) -> Stage {
    let run = run.filter(|run| run.header.attempt == record.attempt);
    if record.boot != boot || run.is_some_and(|run| run.header.boot != boot) {
        return Stage::Exited(run.and_then(|run| run.exit_code).map_or(Ended::Unknown, Ended::of_code));
    }
    let Some(run) = run else {
        return if alive.busy {
            Stage::Starting
        } else {
            Stage::Exited(Ended::Failed("the launch was cut short".to_owned()))
        };
    };
    match (run.exit_code, &run.failed) {
        (Some(code), _) => Stage::Exited(Ended::of_code(code)),
        (None, Some(failed)) => Stage::Exited(Ended::Failed(failed.clone())),
        (None, None) if run.init.is_some() && alive.init => Stage::Running { since: run.header.at },
        (None, None) if alive.launcher && run.init.is_some() => Stage::Ending,
        (None, None) if alive.launcher => Stage::Starting,
        (None, None) => Stage::Exited(Ended::Silent),
    }
}

impl Ended {
    /// bwrap reports a signal as a shell does.
    fn of_code(code: i32) -> Self {
        match code {
            129..=192 => Self::Signal(code - 128),
            code => Self::Code(code),
        }
    }

    /// The public reason. `out_of_memory` and `sandbox_said` are asked only where they can matter.
    pub(crate) fn reason(
        self,
        out_of_memory: impl Fn() -> bool,
        sandbox_said: impl FnOnce() -> Option<String>,
    ) -> ExitReason {
        match self {
            Self::Code(code) => ExitReason::Code(code),
            Self::Signal(9) | Self::Silent if out_of_memory() => ExitReason::OutOfMemory,
            Self::Signal(signal) => ExitReason::Signal(signal),
            Self::Failed(text) => ExitReason::SetupFailed(text),
            Self::Silent => sandbox_said().map_or(ExitReason::Unknown, ExitReason::SetupFailed),
            Self::Unknown => ExitReason::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "boot";

    fn record(attempt: u32) -> InstanceRecord {
        let reach = Reach::Shared { address: ([127, 0, 0, 1], 1).into() };
        InstanceRecord { image: Digest::of(b"x"), attempt, boot: BOOT.to_owned(), reach }
    }

    fn status(attempt: u32, rest: &str) -> String {
        format!(
            r#"{{"attempt":{attempt},"launcher":{{"pid":5,"start":9}},"boot":"{BOOT}","at":"2026-01-01T00:00:00Z"}}
{rest}"#
        )
    }

    const CHILD: &str = "{ \"child-pid\": 7, \"mnt-namespace\": 4026532178, \"pid-namespace\": 4026532179 }\n";

    fn check(status: &str, alive: Alive, expected: &Stage) {
        assert_eq!(&decide(&record(2), Run::last(status).as_ref(), BOOT, alive), expected, "{status} {alive:?}");
    }

    #[test]
    fn each_line_of_the_table() {
        let init = Alive { init: true, launcher: true, busy: true };
        let launcher = Alive { init: false, launcher: true, busy: true };
        let none = Alive::default();
        let since = "2026-01-01T00:00:00Z".parse().expect("time");
        let cut = Stage::Exited(Ended::Failed("the launch was cut short".to_owned()));
        check("", none, &cut);
        check("", Alive { busy: true, ..none }, &Stage::Starting);
        check(&status(1, CHILD), none, &cut);
        check(&status(2, ""), launcher, &Stage::Starting);
        check(&status(2, ""), none, &Stage::Exited(Ended::Silent));
        check(&status(2, CHILD), init, &Stage::Running { since });
        check(&status(2, CHILD), Alive { launcher: false, ..init }, &Stage::Running { since });
        check(&status(2, CHILD), launcher, &Stage::Ending);
        check(&status(2, CHILD), none, &Stage::Exited(Ended::Silent));
        check(&status(2, &format!("{CHILD}{{ \"exit-code\": 7 }}\n")), none, &Stage::Exited(Ended::Code(7)));
        check(&status(2, &format!("{CHILD}{{ \"exit-code\": 137 }}\n")), none, &Stage::Exited(Ended::Signal(9)));
        let failed = Stage::Exited(Ended::Failed("no".to_owned()));
        check(&status(2, "{\"failed\":\"no\"}\n"), none, &failed);
        check(&format!("{}{}", status(1, "{ \"exit-code\": 3 }\n"), status(2, "torn {")), launcher, &Stage::Starting);
    }

    #[test]
    fn another_boot_means_that_nothing_lives_whatever_the_pids_say() {
        let all = Alive { init: true, launcher: true, busy: true };
        let text = status(2, CHILD);
        assert_eq!(decide(&record(2), Run::last(&text).as_ref(), "later", all), Stage::Exited(Ended::Unknown));
        let text = status(2, &format!("{CHILD}{{ \"exit-code\": 0 }}\n"));
        assert_eq!(decide(&record(2), Run::last(&text).as_ref(), "later", all), Stage::Exited(Ended::Code(0)));
    }

    #[test]
    fn reasons_are_asked_of_cgroup_and_output_only_where_they_matter() {
        let never = || -> bool { panic!("not asked") };
        let silent = || -> Option<String> { panic!("not asked") };
        assert_eq!(Ended::Code(7).reason(never, silent), ExitReason::Code(7));
        assert_eq!(Ended::Signal(15).reason(never, silent), ExitReason::Signal(15));
        assert_eq!(Ended::Signal(9).reason(|| true, silent), ExitReason::OutOfMemory);
        assert_eq!(Ended::Signal(9).reason(|| false, silent), ExitReason::Signal(9));
        let said = || Some("bwrap: execvp x".to_owned());
        assert_eq!(Ended::Silent.reason(|| false, said), ExitReason::SetupFailed("bwrap: execvp x".to_owned()));
        assert_eq!(Ended::Silent.reason(|| false, || None), ExitReason::Unknown);
    }
}
