//! `cargo xtask up`, the command people start with, as they run it: from nothing, again, and after what goes wrong.

use anyhow::{Context as _, ensure};
use e2e::{NO_WAY_HOME, PATIENCE, program};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::Instant,
};
use tempfile::TempDir;

/// A data directory that `up` is called on.
struct Up {
    root: TempDir,
    https: u16,
    http: u16,
    umask: &'static str,
}

impl Up {
    fn new(umask: &'static str) -> anyhow::Result<Self> {
        let root = tempfile::Builder::new().prefix("sp-up-").tempdir()?;
        fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let (https, http) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        Ok(Self { root, https: https.local_addr()?.port(), http: http.local_addr()?.port(), umask })
    }

    /// Not there before, nor the folder around it.
    fn data(&self) -> PathBuf {
        self.root.path().join("new/data")
    }

    fn command(&self, more: &[&str]) -> anyhow::Result<Command> {
        let xtask = program("xtask")?;
        let mut command = Command::new("sh");
        command.args(["-c", "umask $0 && exec \"$@\"", self.umask]).arg(&xtask).args(["up", "--dev"]).args(more);
        command.arg("--programs").arg(xtask.parent().context("it lies in a folder")?);
        command.arg("--data").arg(self.data());
        command.args(["--https", &self.https.to_string(), "--http", &self.http.to_string()]);
        command.env("https_proxy", NO_WAY_HOME);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    /// Runs to its end: the figures of the last line, and what was said to the person.
    fn once(&self) -> anyhow::Result<(BTreeMap<String, String>, String)> {
        let output = self.command(&["--once"])?.output()?;
        let (said, stderr) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure!(output.status.success(), "{}: {said}\n{stderr}", output.status);
        let last = said.lines().last().context("no last line")?;
        let figures = last.split(' ').filter_map(|figure| figure.split_once('='));
        Ok((figures.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(), stderr))
    }

    fn foreground(&self) -> anyhow::Result<Foreground> {
        self.foreground_until("The cloud is up.")
    }

    fn foreground_until(&self, line: &str) -> anyhow::Result<Foreground> {
        let mut child = self.command(&[])?.spawn()?;
        let stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        let (sender, lines) = mpsc::channel();
        // Read to the end, whoever listens: a full pipe would stop it.
        thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(|line| drop(sender.send(line))));
        let foreground = Foreground { child };
        wait_for(line, &lines)?;
        Ok(foreground)
    }

    /// The command lines that an `up` has called, found by where they keep their layers.
    fn kill_commands(&self) -> anyhow::Result<()> {
        let caches = [b"XDG_CACHE_HOME=", self.data().as_os_str().as_bytes()].concat();
        for entry in fs::read_dir("/proc")?.flatten() {
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let (Some(pid), Ok(environment)) = (pid, fs::read(entry.path().join("environ"))) else { continue };
            if environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(&caches)) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        Ok(())
    }

    /// What it had begun goes on when the next one has started it again.
    fn kill_cloud(&self) -> anyhow::Result<()> {
        for (pid, command_line) in self.processes()? {
            if command_line.contains("management-api serve") {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        Ok(())
    }

    fn sign_in_as_member(&self) -> anyhow::Result<()> {
        let script = "echo 'a password for tests only' | $0 create-account --data $2 --email member@example.com |
            sed 's/.*\"access_token\":\"\\([^\"]*\\).*/\\1/' | $1 cloud auth login --token - --api-url $3";
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(program("management-api")?).arg(program("systemprompt")?).arg(self.data());
        command
            .arg(format!("https://api.systemprompt.localhost:{}", self.https))
            .current_dir(self.data().join("hello"));
        let output = command.env("SYSTEMPROMPT_CA_FILE", self.data().join("ca/ca.pem")).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// The command line as `up` tells people to use it.
    fn cli(&self, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
        let mut command = Command::new(program("systemprompt")?);
        command.args(arguments).arg("--json").current_dir(self.data().join("hello"));
        let output = command.env("SYSTEMPROMPT_CA_FILE", self.data().join("ca/ca.pem")).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Processes that name the data directory, with their command lines.
    fn processes(&self) -> anyhow::Result<Vec<(Pid, String)>> {
        let (needle, mut found) = (self.data(), Vec::new());
        let names =
            |text: &[u8]| text.windows(needle.as_os_str().len()).any(|part| part == needle.as_os_str().as_bytes());
        for entry in fs::read_dir("/proc")? {
            let entry = entry?;
            let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
            let (Some(pid), Ok(command_line)) = (pid, fs::read(entry.path().join("cmdline"))) else { continue };
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            let url = format!(":{}", self.https);
            let is_instance = environment
                .split(|byte| *byte == 0)
                .any(|variable| variable.starts_with(b"APP_URL=") && variable.ends_with(url.as_bytes()));
            if names(&command_line) || is_instance {
                found.push((pid, String::from_utf8_lossy(&command_line).replace('\0', " ")));
            }
        }
        Ok(found)
    }

    fn check_nothing_is_left(&self) -> anyhow::Result<()> {
        let processes = self.processes()?;
        ensure!(processes.is_empty(), "processes are left: {processes:?}");
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let mount = mounts.lines().find(|line| line.contains(&*self.root.path().to_string_lossy()));
        ensure!(mount.is_none(), "a mount is left: {mount:?}");
        let installation = fs::read_to_string(self.data().join("compute/installation"))?;
        for folder in ["/run/netns", "/sys/class/net"] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                ensure!(!name.contains(&installation), "{folder}/{name} is left");
            }
        }
        Ok(())
    }
}

impl Drop for Up {
    /// For a test that failed; after one that did not there is nothing to stop.
    fn drop(&mut self) {
        for (pid, command_line) in self.processes().unwrap_or_default() {
            if command_line.contains("management-api serve") || command_line.contains("xtask up") {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if let Ok(program) = program("management-api")
            && self.data().join("postgres").exists()
        {
            let _ = Command::new(program).arg("stop").arg("--data").arg(self.data()).output();
        }
    }
}

/// An `up` that stays until it is told to stop.
struct Foreground {
    child: Child,
}

impl Foreground {
    fn end(mut self, signal: Signal) -> anyhow::Result<std::process::ExitStatus> {
        kill_process(Pid::from_child(&self.child), signal)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            ensure!(Instant::now() < deadline, "it does not end at {signal:?}");
            thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

fn wait_for(wanted: &str, lines: &Receiver<String>) -> anyhow::Result<()> {
    let deadline = Instant::now() + 2 * PATIENCE;
    let mut said = String::new();
    loop {
        let line = lines.recv_timeout(deadline.saturating_duration_since(Instant::now()));
        let line = line.with_context(|| format!("waited for {wanted:?}; it said:\n{said}"))?;
        if line.starts_with(wanted) {
            return Ok(());
        }
        said.push_str(&line);
        said.push('\n');
    }
}

fn is_number(figure: &str) -> bool {
    figure.parse::<u64>().is_ok()
}

#[test]
fn from_nothing_to_a_tenant_that_answers_again_and_until_ctrl_c() -> anyhow::Result<()> {
    let up = Up::new("022")?;
    let (first, said) = up.once()?;
    ensure!(first["status"] == "200" && first["url"].starts_with("https://"), "{first:?}\n{said}");
    for figure in ["phase1_ms", "deploy_ms", "redeploy_ms", "total_ms"] {
        ensure!(is_number(&first[figure]), "{figure}: {first:?}");
    }
    up.check_nothing_is_left()?;

    let (second, said) = up.once()?;
    ensure!(second["url"] == first["url"] && second["status"] == "200", "{second:?}\n{said}");
    ensure!(second["phase1_ms"] == "none" && second["deploy_ms"] == "none", "nothing is made twice: {second:?}");
    ensure!(is_number(&second["redeploy_ms"]), "{second:?}");

    let foreground = up.foreground()?;
    let list = up.cli(&["cloud", "tenant", "list"])?;
    ensure!(list["data"]["tenants"].as_array().is_some_and(|tenants| tenants.len() == 1), "one tenant: {list}");
    ensure!(fs::read_dir(up.data().join("compute/apps"))?.count() == 1, "one app");
    let second = up.command(&["--once"])?.output()?;
    let (said, log) = (String::from_utf8(second.stderr)?, fs::read_to_string(up.data().join("management-api.log"))?);
    ensure!(!second.status.success() && said.contains("in use by another `cargo xtask up`"), "{said}");
    ensure!(!log.contains("in use"), "a refused start is told in the log of the one that runs: {log}");
    let ended = foreground.end(Signal::INT)?;
    ensure!(ended.success(), "{ended}");
    up.check_nothing_is_left()
}

#[test]
fn a_lost_token_and_a_killed_up_are_no_dead_ends() -> anyhow::Result<()> {
    // As careful people have it: other users have to get through all the same.
    let up = Up::new("077")?;
    let foreground = up.foreground()?;
    up.cli(&["cloud", "auth", "logout", "--yes"])?;
    let ended = foreground.end(Signal::KILL)?;
    ensure!(!ended.success(), "it was killed");
    ensure!(!up.processes()?.is_empty(), "what it had started goes on");
    // As after an account that was made on the set-up page.
    fs::remove_file(up.data().join("first-account.json"))?;

    let (figures, said) = up.once()?;
    ensure!(said.contains("of an `up` that was killed"), "{said}");
    ensure!(figures["status"] == "200" && figures["phase1_ms"] == "none", "{figures:?}\n{said}");
    up.check_nothing_is_left()?;

    // Nor is somebody else in the project, who may not confirm what `up` buys.
    let foreground = up.foreground()?;
    up.sign_in_as_member()?;
    ensure!(up.cli(&["cloud", "auth", "whoami"])?["data"]["role"] == "member");
    foreground.end(Signal::INT)?;
    let (figures, said) = up.once()?;
    ensure!(figures["status"] == "200" && figures["phase1_ms"] == "none", "{figures:?}\n{said}");
    up.check_nothing_is_left()
}

#[test]
fn an_up_that_was_killed_halfway_is_gone_on_with() -> anyhow::Result<()> {
    let up = Up::new("022")?;
    for line in ["buying a tenant", "deploying the example to", "deploy accepted"] {
        let ended = up.foreground_until(line)?.end(Signal::KILL)?;
        ensure!(!ended.success(), "it was killed");
        // What it had called would go on by itself, and be done or not by the time of the next one.
        up.kill_commands()?;
        up.kill_cloud()?;
    }
    let (figures, said) = up.once()?;
    ensure!(figures["status"] == "200" && figures["phase1_ms"] == "none", "{figures:?}\n{said}");
    ensure!(fs::read_dir(up.data().join("compute/apps"))?.count() == 1, "one app");
    up.check_nothing_is_left()
}
