use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};
use systemprompt_postgres::{Access, Cluster, ClusterConfig, Durability, PostgresError, StopMode};
use tempfile::TempDir;

/// A place for clusters that ends with everything in it.
pub(crate) struct Place {
    root: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let root = tempfile::Builder::new().prefix("sp-pg-it-").tempdir().unwrap();
        fs::set_permissions(root.path(), Permissions::from_mode(0o711)).unwrap();
        Self { root }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn config(&self, name: &str, access: Access) -> ClusterConfig {
        ClusterConfig {
            name: name.to_owned(),
            data: self.path().join(name),
            access,
            settings: vec![("dynamic_shared_memory_type".to_owned(), "mmap".to_owned())],
            durability: Durability::Full,
        }
    }

    pub(crate) fn control(&self) -> ClusterConfig {
        self.config("control", Access::ControlPlane)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.path()).unwrap().flatten() {
            let text = fs::read_to_string(entry.path().join("postmaster.pid")).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let [pid, ..] = lines.as_slice() else { continue };
            // Ends all its sessions; SIGKILL would leave a shared memory segment behind.
            let _ = Command::new("kill").args(["-QUIT", pid]).stderr(Stdio::null()).status();
            wait_until("the server ends", || !is_running(pid));
        }
        let ours = self.path().canonicalize().unwrap();
        for entry in fs::read_dir("/run/systemprompt").into_iter().flatten().flatten() {
            // Our sockets' directories are known by a file that `socket_of` leaves in the place.
            if ours.join(format!("socket-{}", entry.file_name().display())).exists() {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Starts a cluster and remembers its socket directory for the end.
pub(crate) async fn start(config: ClusterConfig) -> Result<Cluster, PostgresError> {
    let place = config.data.parent().unwrap().to_owned();
    let cluster = Cluster::start(config).await?;
    let name = cluster.socket_dir().file_name().unwrap().display().to_string();
    let _ = fs::write(place.join(format!("socket-{name}")), "");
    Ok(cluster)
}

pub(crate) async fn stop(cluster: &Cluster) {
    cluster.stop(StopMode::Fast).await.unwrap();
}

pub(crate) fn pid_of(data: &Path) -> String {
    fs::read_to_string(data.join("postmaster.pid")).unwrap().lines().next().unwrap().to_owned()
}

/// Exists and is no zombie.
pub(crate) fn is_running(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
}

pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "waited too long: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs SQL and says what came back, or what the server said instead.
pub(crate) fn sql(url: &str, statement: &str) -> Result<String, String> {
    let output = Command::new("psql")
        .args(["--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "--no-password", "-d", url])
        .args(["-c", statement])
        .output()
        .unwrap();
    said(&output)
}

fn said(output: &Output) -> Result<String, String> {
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
    }
}

const CHILD: &str = "SYSTEMPROMPT_TEST_CHILD";

/// In a child made by [`spawn_child`]: what the parent handed over.
pub(crate) fn child_argument() -> Option<PathBuf> {
    std::env::var_os(CHILD).map(PathBuf::from)
}

/// Runs this test program again as a process that may be killed, with only the test `name`.
pub(crate) fn child(name: &str, argument: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture", "--test-threads=1"]).env(CHILD, argument);
    command
}

pub(crate) fn spawn_child(name: &str, argument: &Path) -> KilledOnDrop {
    let child = child(name, argument).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    KilledOnDrop(child)
}

pub(crate) struct KilledOnDrop(Child);

impl KilledOnDrop {
    pub(crate) fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
