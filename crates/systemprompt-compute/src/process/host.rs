//! What `/proc` says about processes. Pids are reused, so a process is named by pid and start time.

use serde::{Deserialize, Serialize};
use std::{fs, io, os::unix::fs::MetadataExt, path::PathBuf};

/// A process that cannot be mistaken for a later one, as long as the boot is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessId {
    /// Pid in our namespace.
    pub(crate) pid: i32,
    /// Start time in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub(crate) start: u64,
}

impl ProcessId {
    /// The calling process.
    pub(crate) fn own() -> io::Result<Self> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let stat = Stat::read(pid).ok_or_else(|| io::Error::other("/proc/self/stat: not readable"))?;
        Ok(Self { pid, start: stat.start })
    }

    /// Whether exactly this process exists and is no zombie.
    pub(crate) fn is_alive(self) -> bool {
        Stat::read(self.pid).is_some_and(|stat| stat.start == self.start && !stat.is_dead())
    }
}

/// The part of `/proc/PID/stat` that matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    state: u8,
    /// Start time in clock ticks since boot.
    pub(crate) start: u64,
}

impl Stat {
    /// What the kernel says now; nothing when there is no such process.
    pub(crate) fn read(pid: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Whether it only waits to be reaped.
    pub(crate) fn is_dead(self) -> bool {
        matches!(self.state, b'Z' | b'X' | b'x')
    }

    /// The command's name may hold spaces and brackets: fields count from the last bracket.
    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let start = fields.nth(18)?.parse().ok()?;
        Some(Self { state, start })
    }
}

/// The identity of this boot of the machine.
pub(crate) fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Inode of a process's pid namespace; nothing when it is gone or a zombie.
pub(crate) fn pid_namespace(pid: i32) -> Option<u64> {
    fs::metadata(format!("/proc/{pid}/ns/pid")).ok().map(|meta| meta.ino())
}

/// Real uid of a process.
pub(crate) fn uid_of(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().next()?.parse().ok()
}

/// First child of a process: under the sandbox's init, the application.
pub(crate) fn first_child(pid: i32) -> Option<i32> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

/// How many tasks (threads) run under a real uid, and whether any does.
pub(crate) fn tasks_of(uid: u32) -> u64 {
    let Ok(entries) = fs::read_dir("/proc") else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| uid_of(*pid) == Some(uid))
        .map(|pid| fs::read_dir(format!("/proc/{pid}/task")).map_or(1, |tasks| tasks.count() as u64))
        .sum()
}

/// Where a program is, searched in `PATH` and in the places of system programs.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|program| program.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        let text = "42 (a) Z (b)) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1 1 18446744073709551615";
        let stat = Stat::parse(text).expect("stat");
        assert_eq!((stat.start, stat.is_dead()), (777, false));
        assert!(Stat::parse("42 (x) Z 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1").expect("stat").is_dead());
        assert_eq!(Stat::parse("42 x"), None);
    }

    #[test]
    fn another_start_time_is_another_process() {
        let own = ProcessId::own().expect("own");
        assert!(own.is_alive());
        assert!(!ProcessId { start: own.start + 1, ..own }.is_alive());
    }
}
