//! Finding a running server again, and ending it, without ever touching another process.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Linux counts a process's start in hundredths of a second, whatever the kernel's own clock.
const TICKS_PER_SECOND: i64 = 100;
/// How far `postmaster.pid` and `/proc` may differ about when the process started.
const START_TOLERANCE_S: i64 = 10;

/// What `postmaster.pid` says (PostgreSQL's `miscadmin.h`, "the lock file's format").
#[derive(Debug, Clone, PartialEq, Eq)]
struct PidFile {
    pid: i32,
    /// Seconds since 1970.
    started: Option<i64>,
    /// Empty until the server has opened its socket.
    socket_dir: Option<PathBuf>,
}

/// A data directory's server.
#[derive(Debug)]
pub(crate) enum Found {
    /// There is none; `stale_pid_file`: a process of another kind has its old number.
    Nobody { stale_pid_file: bool },
    /// It was killed and its parent has not taken note: the number is still taken, and looks alive to PostgreSQL.
    Unreaped,
    /// It lives.
    Running(Postmaster),
}

/// A live server, held by a handle that cannot come to mean another process.
#[derive(Debug)]
pub(crate) struct Postmaster {
    pub(crate) pid: i32,
    /// `None` while it starts.
    pub(crate) socket_dir: Option<PathBuf>,
    handle: OwnedFd,
}

/// Looks for the live server of `data`, which must be canonical.
pub(crate) fn find(data: &Path) -> io::Result<Found> {
    let text = match fs::read_to_string(data.join("postmaster.pid")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nobody { stale_pid_file: false }),
        Err(error) => return Err(error),
    };
    let Some(file) = parse_pid_file(&text) else { return Ok(Found::Nobody { stale_pid_file: false }) };
    let Some(pid) = Pid::from_raw(file.pid) else { return Ok(Found::Nobody { stale_pid_file: false }) };
    // First the handle, then the look at /proc: what we looked at is what we hold.
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(Found::Nobody { stale_pid_file: false });
    };
    match identify(&file, data) {
        Identity::Server => Ok(Found::Running(Postmaster { pid: file.pid, socket_dir: file.socket_dir, handle })),
        Identity::Dead => Ok(Found::Nobody { stale_pid_file: false }),
        Identity::Zombie => Ok(Found::Unreaped),
        Identity::Other => Ok(Found::Nobody { stale_pid_file: true }),
    }
}

/// Waits until no child of a killed server is left in `data`; they end by themselves when they notice. False when one
/// still lives after `limit`. Only then may the pid file go: its shared memory is what keeps a second server out.
pub(crate) fn wait_for_children(data: &Path, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let lives_there =
            |process: fs::DirEntry| fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd == data);
        if !fs::read_dir("/proc")?.flatten().any(lives_there) {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Postmaster {
    /// Sends a signal; a process that has ended already is no error.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.handle, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for the end of the process; false when it still lives after `limit`.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::new(&self.handle, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn parse_pid_file(text: &str) -> Option<PidFile> {
    let mut lines = text.lines();
    // A standalone backend writes its number negative.
    let pid = lines.next()?.trim().parse::<i32>().ok()?.checked_abs()?;
    let _data = lines.next();
    let started = lines.next().and_then(|line| line.trim().parse().ok());
    let _port = lines.next();
    let socket_dir = lines.next().map(str::trim).filter(|line| !line.is_empty()).map(PathBuf::from);
    Some(PidFile { pid, started, socket_dir })
}

#[derive(Debug, PartialEq, Eq)]
enum Identity {
    Server,
    Dead,
    Zombie,
    Other,
}

/// A server lives in its data directory: its working directory is the surest sign. Where that cannot be read (it
/// runs as another user), the time it started decides.
fn identify(file: &PidFile, data: &Path) -> Identity {
    let process = PathBuf::from(format!("/proc/{}", file.pid));
    let Some(stat) = fs::read_to_string(process.join("stat")).ok().as_deref().and_then(parse_stat) else {
        return Identity::Dead;
    };
    if stat.is_zombie() {
        return Identity::Zombie;
    }
    if let (Ok(cwd), Ok(exe)) = (fs::read_link(process.join("cwd")), fs::read_link(process.join("exe"))) {
        // An upgrade of the package leaves `postgres (deleted)`.
        let is_postgres = exe.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"postgres"));
        return if cwd == data && is_postgres { Identity::Server } else { Identity::Other };
    }
    let boot = fs::read_to_string("/proc/stat").ok().as_deref().and_then(parse_boot_time);
    match (file.started, boot) {
        (Some(written), Some(boot))
            if (boot + stat.start_ticks / TICKS_PER_SECOND - written).abs() <= START_TOLERANCE_S =>
        {
            Identity::Server
        }
        _ => Identity::Other,
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    start_ticks: i64,
}

impl Stat {
    const fn is_zombie(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

/// proc(5): the name in parentheses may hold anything, so fields are counted behind the last one.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // State is field 3, the start time field 22.
    let start_ticks = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_ticks })
}

fn parse_boot_time(text: &str) -> Option<i64> {
    text.lines().find_map(|line| line.strip_prefix("btime ")).and_then(|seconds| seconds.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_pid_file_is_read_also_while_it_is_being_written() {
        let whole = "4711\n/data\n1763715600\n5432\n/run/x\n\n  123 456\nready   \n";
        let expected = PidFile { pid: 4711, started: Some(1_763_715_600), socket_dir: Some("/run/x".into()) };
        assert_eq!(parse_pid_file(whole), Some(expected));
        let half = PidFile { pid: 4711, started: None, socket_dir: None };
        assert_eq!(parse_pid_file("4711\n/data\n"), Some(half));
        assert_eq!(parse_pid_file(""), None);
        assert_eq!(parse_pid_file("postgres"), None);
    }

    #[test]
    fn a_process_name_cannot_fake_its_fields() {
        let text = "42 (a) R 1) Z 1 42 42 0 -1 4194304 1 0 0 0 1 2 3 4 20 0 1 0 987654 1 2";
        assert_eq!(parse_stat(text), Some(Stat { state: 'Z', start_ticks: 987_654 }));
    }

    #[test]
    fn a_zombie_and_a_stranger_are_not_the_server() {
        let data = tempfile::tempdir().unwrap();
        let data = data.path().canonicalize().unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        fs::write(data.join("postmaster.pid"), format!("{pid}\n{}\n0\n5432\n/run/x\n", data.display())).unwrap();
        assert!(matches!(find(&data).unwrap(), Found::Nobody { stale_pid_file: true }));
        // Killed but not waited for: a zombie.
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        while matches!(find(&data).unwrap(), Found::Nobody { stale_pid_file: true }) {
            assert!(Instant::now() < deadline, "the killed child stays alive");
            std::thread::yield_now();
        }
        assert!(matches!(find(&data).unwrap(), Found::Unreaped));
        assert!(wait_for_children(&data, Duration::ZERO).unwrap());
        child.wait().unwrap();
        assert!(matches!(find(&data).unwrap(), Found::Nobody { stale_pid_file: false }));
    }
}
