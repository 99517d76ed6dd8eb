//! `management-api serve` as our child: started, waited for, stopped.

use crate::{
    interrupt::{Interrupted, pidfd},
    shell::Shell,
};
use anyhow::{Context as _, Result, bail};
use rustix::process::{Signal, pidfd_send_signal};
use serde::Deserialize;
use std::{
    fs::{self, File, TryLockError},
    io::{BufReader, Read as _, Seek as _, SeekFrom},
    os::{
        fd::OwnedFd,
        unix::{fs::OpenOptionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

/// First start: two clusters are made. On a busy machine this takes some seconds.
const READY_WITHIN: Duration = Duration::from_mins(2);
/// Drain, instances, two clusters.
const STOPPED_WITHIN: Duration = Duration::from_secs(90);
/// Lines of the log that a failure shows.
const TAIL_LINES: usize = 40;

/// What it says on standard output once it serves.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Ready {
    pub(crate) api_url: String,
    pub(crate) ca_file: PathBuf,
    /// There as long as nobody has made the first account.
    pub(crate) setup_token_file: Option<PathBuf>,
}

enum Event {
    Ready(Ready),
    Exited(std::io::Result<ExitStatus>),
    Interrupted,
}

/// A running `management-api serve`. Dropped, it is told to stop and waited for.
pub(crate) struct Server {
    pub(crate) ready: Ready,
    process: Process,
}

struct Process {
    id: u32,
    pidfd: OwnedFd,
    events: Receiver<Event>,
    exited: bool,
    log: Log,
}

impl Server {
    /// Starts `command` (its log goes to `log_file`) and waits until it serves.
    ///
    /// # Errors
    /// With what it said itself: a port that is taken, PostgreSQL missing or too old, the data in use.
    pub(crate) fn start(shell: &Shell, mut command: Command, log_file: &Path) -> Result<Self> {
        shell.interrupts.check()?;
        let log = Log::open(log_file)?;
        // Its own process group: Ctrl-C is ours to pass on, once, so that it drains.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log.writer()?);
        let mut child = command.spawn().context("cannot start management-api")?;
        let (sender, events) = mpsc::channel();
        let stdout = child.stdout.take().context("its standard output is a pipe")?;
        let mut process = Process { id: child.id(), pidfd: pidfd(&child)?, events, exited: false, log };
        thread::spawn({
            let sender = sender.clone();
            move || read_events(BufReader::new(stdout), &sender)
        });
        thread::spawn({
            let sender = sender.clone();
            // Nobody listens any more when the server was given up: then nobody asks how it ended.
            move || drop(sender.send(Event::Exited(child.wait())))
        });
        shell.interrupts.listen(move || drop(sender.send(Event::Interrupted)));
        let ready = process.wait_until_ready()?;
        Ok(Self { ready, process })
    }

    /// Its process id, for measurements.
    pub(crate) fn id(&self) -> u32 {
        self.process.id
    }

    /// Blocks until a person interrupts.
    ///
    /// # Errors
    /// When it ends by itself.
    pub(crate) fn stay(&mut self) -> Result<()> {
        loop {
            match self.process.events.recv().context("the server's watchers are gone")? {
                Event::Interrupted => return Ok(()),
                Event::Exited(status) => return Err(self.process.ended(status)),
                Event::Ready(_) => {}
            }
        }
    }

    /// Lets it drain and stop everything; a second interrupt kills it.
    pub(crate) fn stop(mut self) -> Result<()> {
        self.process.stop()
    }

    /// SIGKILL, and waits for the end: instances and databases go on.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.process.signal(Signal::KILL);
        self.process.exited = true;
        loop {
            match self.process.events.recv_timeout(STOPPED_WITHIN) {
                Ok(Event::Exited(_)) => return Ok(()),
                Ok(Event::Ready(_) | Event::Interrupted) => {}
                Err(error) => return Err(error).context("it did not end"),
            }
        }
    }

    pub(crate) fn log_tail(&self) -> String {
        self.process.log.tail()
    }
}

impl Process {
    fn wait_until_ready(&mut self) -> Result<Ready> {
        match self.events.recv_timeout(READY_WITHIN) {
            Ok(Event::Ready(ready)) => Ok(ready),
            Ok(Event::Exited(status)) => Err(self.ended(status)),
            Ok(Event::Interrupted) => bail!(Interrupted),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                bail!("management-api was not ready within {READY_WITHIN:?}:\n{}", self.log.tail())
            }
        }
    }

    fn ended(&mut self, status: std::io::Result<ExitStatus>) -> anyhow::Error {
        self.exited = true;
        match status {
            Ok(status) => anyhow::anyhow!("management-api ended ({status}):\n{}", self.log.tail()),
            Err(error) => anyhow::Error::new(error).context("cannot wait for management-api"),
        }
    }

    fn stop(&mut self) -> Result<()> {
        if self.exited {
            return Ok(());
        }
        // The interrupt that brought us here is not the second one.
        while let Ok(event) = self.events.try_recv() {
            if let Event::Exited(status) = event {
                return Err(self.ended(status));
            }
        }
        self.signal(Signal::TERM);
        loop {
            match self.events.recv_timeout(STOPPED_WITHIN) {
                Ok(Event::Ready(_)) => {}
                Ok(Event::Exited(Ok(status))) if status.success() => {
                    self.exited = true;
                    return Ok(());
                }
                Ok(Event::Exited(status)) => return Err(self.ended(status).context("it did not stop cleanly")),
                Ok(Event::Interrupted) => return Err(self.kill("killed at the second interrupt")),
                Err(_) => return Err(self.kill("it did not stop in time and was killed")),
            }
        }
    }

    fn kill(&mut self, why: &str) -> anyhow::Error {
        self.signal(Signal::KILL);
        self.exited = true;
        anyhow::anyhow!("{why}; instances and databases may still run: the next `up` finds them and goes on")
    }

    fn signal(&self, signal: Signal) {
        // Ended in this moment: the watcher's event tells how.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}

fn read_events(lines: impl std::io::BufRead, sender: &Sender<Event>) {
    for line in lines.lines().map_while(Result::ok) {
        if let Some(ready) = parse_ready(&line)
            && sender.send(Event::Ready(ready)).is_err()
        {
            return;
        }
    }
}

fn parse_ready(line: &str) -> Option<Ready> {
    #[derive(Deserialize)]
    #[serde(tag = "event", rename_all = "snake_case")]
    enum Said {
        Ready(Ready),
        #[serde(other)]
        Other,
    }
    match serde_json::from_str(line).ok()? {
        Said::Ready(ready) => Some(ready),
        Said::Other => None,
    }
}

/// The server's log, and where in it this run begins: earlier runs must not be taken for this one. It is ours alone
/// while we live: a second server of the same data would be refused, and must not say so among our server's lines.
struct Log {
    path: PathBuf,
    begin: u64,
    _lock: File,
}

impl Log {
    fn open(path: &Path) -> Result<Self> {
        let folder = path.parent().context("the log lies in a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let file = File::options()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "the data directory {} is in use by another `cargo xtask up`; end that one with Ctrl-C, \
                 or give another directory with --data",
                folder.display()
            ),
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(Self { begin: file.metadata()?.len(), path: path.to_owned(), _lock: file })
    }

    /// For the server to write to. Opened anew, so that the lock stays with us and ends with us: what the server
    /// starts may outlive it.
    fn writer(&self) -> Result<File> {
        let file = File::options().append(true).open(&self.path);
        file.with_context(|| format!("cannot write {}", self.path.display()))
    }

    fn tail(&self) -> String {
        let mut text = Vec::new();
        let read = File::open(&self.path)
            .and_then(|mut file| file.seek(SeekFrom::Start(self.begin)).map(|_| file))
            .and_then(|mut file| file.read_to_end(&mut text));
        match read {
            Ok(_) => last_lines(&String::from_utf8_lossy(&text), TAIL_LINES),
            Err(error) => format!("(cannot read {}: {error})", self.path.display()),
        }
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const READY: &str = r#"{"event":"ready","https":"0.0.0.0:8443","api_url":"https://api.z:8443","ca_file":"/d/ca/ca.pem","setup_token_file":null}"#;

    fn start(script: &str, log: &Path) -> Result<Server> {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Server::start(&Shell::open().unwrap(), command, log)
    }

    #[test]
    fn the_ready_line_is_understood_and_other_lines_are_not_taken_for_it() {
        let ready = parse_ready(READY).unwrap();
        assert_eq!((ready.api_url.as_str(), ready.setup_token_file), ("https://api.z:8443", None));
        assert_eq!(parse_ready(r#"{"event":"draining"}"#), None);
        assert_eq!(parse_ready("listening"), None);
    }

    #[test]
    fn a_server_that_ends_at_start_says_why_and_only_this_run_s_log_is_shown() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(&log, "an earlier run\n").unwrap();
        let error = start("echo 'port 8443 is taken' >&2; exit 1", &log).err().unwrap().to_string();
        assert!(error.ends_with("port 8443 is taken"), "{error}");
        assert!(!error.contains("an earlier run"), "{error}");
    }

    #[test]
    fn a_second_server_is_refused_and_writes_nothing_into_the_log_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        // What it started outlives it, with its standard error.
        let lives_on = format!("(while [ -e {} ]; do sleep 0.05; done) &", folder.path().display());
        let first = start(&format!("{lives_on} echo first >&2; echo '{READY}'; exec sleep 60"), &log).unwrap();
        let error = start("echo refused >&2; exit 1", &log).err().unwrap().to_string();
        assert!(error.contains(&folder.path().display().to_string()) && error.contains("--data"), "{error}");
        assert_eq!(fs::read_to_string(&log).unwrap(), "first\n");
        first.kill().unwrap();
        let error = start("echo later >&2; exit 1", &log).err().unwrap().to_string();
        assert!(error.ends_with(":\nlater"), "{error}");
    }

    #[test]
    fn it_is_stopped_by_sigterm_and_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let done = folder.path().join("done");
        let script =
            format!("trap 'echo x >{}; exit 0' TERM; echo '{READY}'; while :; do sleep 0.05; done", done.display());
        start(&script, &folder.path().join("log")).unwrap().stop().unwrap();
        assert!(done.exists());
    }

    #[test]
    fn the_interrupt_that_ends_the_task_lets_it_drain_and_a_second_kills_it() {
        let folder = tempfile::tempdir().unwrap();
        let start = |script: String| {
            let shell = Shell::open().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            let server = Server::start(&shell, command, &folder.path().join("log")).unwrap();
            (shell, server)
        };
        let drains = format!("trap 'exit 0' TERM; echo '{READY}'; while :; do sleep 0.05; done");
        let (shell, mut server) = start(drains);
        shell.interrupts.raise();
        server.stay().unwrap();
        server.stop().unwrap();

        let marked = folder.path().join("told");
        let refuses = format!("trap 'echo x >{}' TERM; echo '{READY}'; while :; do sleep 0.05; done", marked.display());
        let (shell, server) = start(refuses);
        let told = thread::spawn(move || {
            let deadline = std::time::Instant::now() + Duration::from_secs(30);
            while !marked.exists() && std::time::Instant::now() < deadline {
                thread::yield_now();
            }
            shell.interrupts.raise();
        });
        let error = server.stop().unwrap_err().to_string();
        told.join().unwrap();
        assert!(error.contains("second interrupt"), "{error}");
    }

    #[test]
    fn ending_by_itself_is_an_error_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let go = folder.path().join("go");
        let wait = format!("while ! [ -e {} ]; do sleep 0.02; done", go.display());
        let script = format!("echo '{READY}'; {wait}; echo 'out of luck' >&2; exit 4");
        let mut server = start(&script, &folder.path().join("log")).unwrap();
        fs::write(go, "").unwrap();
        let error = server.stay().unwrap_err().to_string();
        assert!(error.contains("exit status: 4") && error.contains("out of luck"), "{error}");
    }

    #[test]
    fn the_tail_is_the_end() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
    }
}
