//! Starts, kills and stops `management-api`, and talks to it the way a person would: by the command line and HTTPS.

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::TcpListener,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use systemprompt_contract::{Secret, paths};
use tempfile::TempDir;

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// One installation in a temporary directory. Dropping it stops and removes everything.
pub struct Stack {
    directory: TempDir,
    /// What clients use.
    https_port: u16,
    /// What the edge listens on.
    listen_port: u16,
    running: Option<Child>,
    /// The crash point that the running process is to die at, and where its log begins.
    armed: Option<(String, u64)>,
    edge: Option<Child>,
    client: reqwest::Client,
    token: Option<Secret>,
}

/// How to start `management-api serve`.
#[derive(Debug, Clone, Default)]
pub struct Start<'a> {
    /// Armed crash point: the process kills itself there.
    pub crash_point: Option<&'a str>,
    /// `workflow.step` whose act, or with `.undo` behind it whose undo, does nothing: a broken program.
    pub skip: Option<&'a str>,
    /// No edge in this process.
    pub without_edge: bool,
    /// More arguments.
    pub arguments: &'a [&'a str],
}

impl Stack {
    /// A new installation, running, with its first account.
    ///
    /// # Errors
    /// When anything of it does not come up.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(&Start::default()).await
    }

    /// A new installation, started in a special way.
    ///
    /// # Errors
    /// When anything of it does not come up.
    pub async fn start_with(start: &Start<'_>) -> anyhow::Result<Self> {
        let mut stack = Self::prepare()?;
        stack.begin(start).await?;
        Ok(stack)
    }

    /// The first start of an installation that was prepared, and its first account.
    ///
    /// # Errors
    /// When anything of it does not come up.
    pub async fn begin(&mut self, start: &Start<'_>) -> anyhow::Result<()> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        self.serve(start)?;
        self.client = self.trusting_client()?;
        self.set_up().await
    }

    /// Directory and port of an installation that was not started yet.
    ///
    /// # Errors
    /// When there is no room for it.
    pub fn prepare() -> anyhow::Result<Self> {
        let directory = tempfile::Builder::new().prefix("sp-e2e-").tempdir()?;
        // Clusters and tenants run under other users, who have to get through.
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        // Free now; the edge says so if somebody takes it in between.
        let https_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let client = reqwest::Client::builder().build()?;
        let (listen_port, token) = (https_port, None);
        Ok(Self { directory, https_port, listen_port, running: None, armed: None, edge: None, client, token })
    }

    /// Puts something in front of an edge that was not started yet: clients use `port`. Returns the edge's own.
    pub fn put_behind(&mut self, port: u16) -> u16 {
        self.https_port = port;
        self.listen_port
    }

    /// The temporary directory around the installation's own.
    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    /// Where everything is kept.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// The HTTPS port of all URLs.
    pub fn https_port(&self) -> u16 {
        self.https_port
    }

    /// The base of API calls.
    pub fn api_url(&self) -> String {
        format!("https://api.systemprompt.localhost:{}", self.https_port)
    }

    /// The API token of the first account.
    ///
    /// # Panics
    /// When there is no account yet.
    pub fn token(&self) -> &Secret {
        self.token.as_ref().expect("the stack was set up")
    }

    /// A client that trusts the installation's CA and resolves `*.localhost`.
    pub fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// Starts `management-api serve` and waits until it is ready.
    ///
    /// # Errors
    /// With its last words, when it ends instead.
    pub fn serve(&mut self, start: &Start<'_>) -> anyhow::Result<()> {
        let mut child = self.spawn_serve(start)?;
        let ready = self.wait_ready(&mut child);
        self.running = Some(child);
        ready
    }

    /// Starts `management-api serve` without waiting: it may kill itself before it is ready.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn serve_unready(&mut self, start: &Start<'_>) -> anyhow::Result<()> {
        self.running = Some(self.spawn_serve(start)?);
        Ok(())
    }

    fn spawn_serve(&mut self, start: &Start<'_>) -> anyhow::Result<Child> {
        let mut command = self.management_api("serve")?;
        command.args(["--https", &format!("127.0.0.1:{}", self.listen_port), "--http", "off"]);
        command.args(["--public-port", &self.https_port.to_string()]);
        command.args(start.arguments);
        if start.without_edge {
            command.arg("--without-edge");
        }
        let log_so_far = fs::metadata(self.log_file())?.len();
        self.armed = start.crash_point.map(|point| (point.to_owned(), log_so_far));
        if let Some(point) = start.crash_point {
            command.env("SYSTEMPROMPT_CRASH_POINT", point);
        }
        if let Some(step) = start.skip {
            command.env("SYSTEMPROMPT_SKIP", step);
        }
        command.spawn().context("starting management-api")
    }

    /// Starts the edge as a process of its own and waits until it is ready.
    ///
    /// # Errors
    /// With its last words, when it ends instead.
    pub fn serve_edge(&mut self) -> anyhow::Result<()> {
        let mut command = self.management_api("edge")?;
        command.args(["--https", &format!("127.0.0.1:{}", self.listen_port), "--http", "off"]);
        command.args(["--public-port", &self.https_port.to_string()]);
        let mut child = command.spawn().context("starting management-api edge")?;
        let ready = self.wait_ready(&mut child);
        self.edge = Some(child);
        ready
    }

    /// What a second `management-api serve` on `data` and this stack's port has to say.
    ///
    /// # Errors
    /// When it starts all the same.
    pub fn serve_twice(&self, data: &Path) -> anyhow::Result<String> {
        let mut command = Command::new(program("management-api")?);
        command
            .args(["serve", "--http", "off", "--https", &format!("127.0.0.1:{}", self.listen_port), "--data"])
            .arg(data);
        let output = command.stdin(Stdio::null()).output()?;
        ensure!(!output.status.success(), "a second control plane ran and ended well");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    fn management_api(&self, command: &str) -> anyhow::Result<Command> {
        let log = File::options().create(true).append(true).open(self.log_file())?;
        let mut process = Command::new(program("management-api")?);
        process.arg(command).arg("--data").arg(self.data()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        Ok(process)
    }

    fn wait_ready(&self, child: &mut Child) -> anyhow::Result<()> {
        let stdout = child.stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.contains("\"ready\"") {
            return Ok(());
        }
        let status = child.wait()?;
        bail!("management-api ended ({status}) before it was ready:\n{}", self.log_tail())
    }

    /// Where the processes' stderr goes.
    pub fn log_file(&self) -> PathBuf {
        self.directory.path().join("management-api.log")
    }

    /// The last lines of it, for failures.
    pub fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// SIGKILL to the control plane.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        kill(self.running.take())
    }

    /// SIGKILL to the separate edge.
    ///
    /// # Errors
    /// When it cannot be waited for.
    pub fn kill_edge(&mut self) -> anyhow::Result<()> {
        kill(self.edge.take())
    }

    /// SIGKILL to both database clusters.
    ///
    /// # Errors
    /// When one of them was not running.
    pub fn kill_clusters(&self) -> anyhow::Result<()> {
        for name in ["control", "tenants"] {
            let pid = self.postmaster(name)?;
            rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        }
        Ok(())
    }

    fn postmaster(&self, name: &str) -> anyhow::Result<rustix::process::Pid> {
        let file = self.data().join("postgres").join(name).join("postmaster.pid");
        let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        let pid =
            text.lines().next().and_then(|line| line.trim().parse().ok()).and_then(rustix::process::Pid::from_raw);
        pid.with_context(|| format!("no pid in {}", file.display()))
    }

    /// Waits until the control plane has killed itself at its armed crash point.
    ///
    /// # Errors
    /// When it still runs after [`PATIENCE`], or ended in any other way.
    pub fn wait_died(&mut self) -> anyhow::Result<()> {
        let (point, log_so_far) = self.armed.take().context("no crash point is armed")?;
        let status = self.wait_ended()?;
        let log = fs::read(self.log_file())?;
        let log = String::from_utf8_lossy(&log[usize::try_from(log_so_far)?..]).into_owned();
        let said = log.lines().any(|line| line.contains("dying on purpose") && line.contains(&point));
        // The driver's points abort without a word.
        let by_driver = point.starts_with("compute.");
        let signal = if by_driver { rustix::process::Signal::ABORT } else { rustix::process::Signal::KILL };
        ensure!(
            (said || by_driver) && status.signal() == Some(signal.as_raw()),
            "expected management-api to kill itself at {point}; it ended with {status}:\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Waits for the end of a control plane whose start failed.
    ///
    /// # Errors
    /// When it still runs after [`PATIENCE`], or ended well.
    pub fn wait_failed(&mut self) -> anyhow::Result<()> {
        let status = self.wait_ended()?;
        ensure!(status.code().is_some_and(|code| code != 0), "expected an error, it ended with {status}");
        Ok(())
    }

    fn wait_ended(&mut self) -> anyhow::Result<ExitStatus> {
        let mut child = self.running.take().context("nothing runs")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                self.running = Some(child);
                bail!("expected management-api to end; it still runs:\n{}", self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// `management-api stop`: takes down what a dead control plane has left running.
    ///
    /// # Errors
    /// When it does not end well.
    pub fn stop_what_is_left(&self) -> anyhow::Result<()> {
        let output = Command::new(program("management-api")?).arg("stop").arg("--data").arg(self.data()).output()?;
        ensure!(output.status.success(), "stop: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// SIGTERM to the control plane, and waits for its drain.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn terminate(&mut self) -> anyhow::Result<()> {
        let Some(child) = self.running.take() else { return Ok(()) };
        terminate(child).with_context(|| self.log_tail())
    }

    /// SIGTERM to the separate edge, without waiting for its drain.
    ///
    /// # Errors
    /// When it does not run.
    pub fn tell_edge_to_stop(&self) -> anyhow::Result<()> {
        let pid = rustix::process::Pid::from_child(self.edge.as_ref().context("no separate edge runs")?);
        Ok(rustix::process::kill_process(pid, rustix::process::Signal::TERM)?)
    }

    /// SIGTERM to the separate edge, and waits for its drain.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn terminate_edge(&mut self) -> anyhow::Result<()> {
        let Some(child) = self.edge.take() else { return Ok(()) };
        terminate(child).with_context(|| self.log_tail())
    }

    /// Whether the server of a cluster (`control`, `tenants`) runs, by its own file.
    pub fn cluster_runs(&self, name: &str) -> bool {
        self.data().join("postgres").join(name).join("postmaster.pid").exists()
    }

    async fn set_up(&mut self) -> anyhow::Result<()> {
        let setup_token = fs::read_to_string(self.data().join("setup-token"))?;
        let body = serde_json::json!({
            "setup_token": setup_token.trim(),
            "email": "operator@systemprompt.localhost",
            "password": "a password for tests only",
        });
        let answer = self.client.post(format!("{}{}", self.api_url(), paths::SETUP)).json(&body).send().await?;
        let status = answer.status();
        let answer: Value = answer.json().await?;
        ensure!(status.is_success(), "setting up the first account: {status} {answer}");
        self.token = Some(Secret::new(answer["access_token"].as_str().context("a token")?));
        Ok(())
    }

    /// Another account, without any rights but its own; returns its token.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_member(&self, email: &str) -> anyhow::Result<Secret> {
        let mut command = Command::new(program("management-api")?);
        command.args(["create-account", "--email", email, "--data"]).arg(self.data());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
        child.stdin.take().context("stdin is piped")?.write_all(b"a password for tests only")?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "create-account ended with {}", output.status);
        let signed_in: Value = serde_json::from_slice(&output.stdout)?;
        Ok(Secret::new(signed_in["access_token"].as_str().context("access_token")?))
    }

    fn trusting_client(&self) -> anyhow::Result<reqwest::Client> {
        let options = systemprompt_cloud::HttpOptions { ca_file: Some(self.ca_file()) };
        Ok(systemprompt_cloud::http_client(&options)?)
    }

    /// The local CA's certificate.
    pub fn ca_file(&self) -> PathBuf {
        self.data().join("ca/ca.pem")
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = kill(self.edge.take());
        if let Some(child) = self.running.take() {
            let _ = terminate(child);
        }
        // Whatever a test left running: found by its files, as after a crash.
        if let Ok(program) = program("management-api")
            && self.data().join("postgres").exists()
        {
            let stopped = Command::new(program).arg("stop").arg("--data").arg(self.data()).output();
            let left = stopped.map_or(true, |output| !output.status.success());
            assert!(!left || std::thread::panicking(), "something of {} is left running", self.data().display());
        }
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.log_tail().as_bytes());
        }
    }
}

fn kill(child: Option<Child>) -> anyhow::Result<()> {
    if let Some(mut child) = child {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn terminate(mut child: Child) -> anyhow::Result<()> {
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait()? {
            ensure!(status.success(), "management-api ended with {status}");
            return Ok(());
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            bail!("management-api did not end on SIGTERM");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for a condition, with [`PATIENCE`].
///
/// # Errors
/// When it does not come true in time.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        ensure!(Instant::now() < deadline, "waited {} s in vain until {what}", PATIENCE.as_secs());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A program of this workspace, built beside the tests.
///
/// # Errors
/// When it was not built.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe()?;
    let directory = test.parent().and_then(Path::parent).context("tests run from target/PROFILE/deps")?;
    let path = directory.join(name);
    ensure!(path.exists(), "{} is not built; run `cargo build --workspace --bins`", path.display());
    Ok(path)
}
