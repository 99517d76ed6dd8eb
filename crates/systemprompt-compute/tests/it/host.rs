//! One installation of the process driver in a directory of its own, and what it may leave behind: nothing.

use std::{
    ffi::OsString,
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::Arc,
};
use systemprompt_compute::{
    AppHandle, ComputeDriver, InstanceHandle, InstanceSpec,
    process::{ProcessConfig, ProcessDriver},
    testing::{ControlOrder, Fixture, ImageDirectory, app_image, get, poll, running},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::Digest;

pub(crate) const APP: &str = env!("CARGO_BIN_EXE_compute-test-app");

pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) images: Arc<ImageDirectory>,
    pub(crate) image: Digest,
}

impl Host {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let images = Arc::new(ImageDirectory::default());
        let image = images.add(None, app_image(directory.path(), Path::new(APP)).expect("image"));
        Self { directory, images, image }
    }

    pub(crate) fn config(&self) -> ProcessConfig {
        ProcessConfig::new(self.data(), launcher(), self.images.clone())
    }

    pub(crate) fn driver(&self) -> ProcessDriver {
        ProcessDriver::open(self.config()).expect("a driver")
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub(crate) fn fixture(&self) -> Fixture {
        Fixture { image: self.image, own_variables: &["FROM_IMAGE", "HOST", "PATH", "PORT", "PWD"] }
    }

    /// What names this installation's chains, links and groups.
    pub(crate) fn id(&self) -> String {
        fs::read_to_string(self.data().join("installation")).expect("installation")
    }

    /// After the last app's end nothing of this installation may exist but the data directory.
    pub(crate) fn check_nothing_left(&self) {
        self.check_nothing_outside();
        for directory in ["apps", "images", "trash"] {
            let left: Vec<_> = fs::read_dir(self.data().join(directory)).expect(directory).flatten().collect();
            assert!(left.is_empty(), "{directory}: {left:?}");
        }
    }

    /// After a shutdown, files are all that is left.
    pub(crate) fn check_nothing_outside(&self) {
        let id = self.id();
        for (program, arguments) in [
            ("iptables-save", vec![]),
            ("ip", vec!["-o", "link"]),
            ("ip", vec!["netns"]),
            ("find", vec!["/sys/fs/cgroup", "-maxdepth", "2", "-name", "systemprompt-*"]),
        ] {
            let output = Command::new(program).args(&arguments).output().expect(program);
            let text = String::from_utf8_lossy(&output.stdout);
            let left: Vec<_> = text.lines().filter(|line| line.contains(&id)).collect();
            assert!(left.is_empty(), "{program} {arguments:?}: {left:?}");
        }
        let routes = Command::new("ip").args(["route", "show", "type", "unreachable"]).output().expect("ip");
        let metric = format!("metric {}", 0x1000_0000 + u32::from_str_radix(&id, 16).expect("hex digits"));
        assert!(!String::from_utf8_lossy(&routes.stdout).contains(&metric), "the route of the pool");
        assert_eq!(processes_of(&self.data()), Vec::<String>::new());
    }
}

/// A test that fails halfway must not leave instances and rules behind either.
impl Drop for Host {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let config = self.config();
        let clean = || {
            let runtime = tokio::runtime::Runtime::new().expect("runtime");
            runtime.block_on(async {
                let driver = ProcessDriver::open(config).expect("a driver");
                for found in driver.apps().await.expect("apps") {
                    driver.destroy_app(&found.handle).await.expect("the app's end");
                }
            });
        };
        // Off this thread: it may be inside a runtime.
        std::thread::scope(|scope| drop(scope.spawn(clean).join()));
    }
}

pub(crate) fn launcher() -> Vec<OsString> {
    vec![APP.into(), "launch-instance".into()]
}

/// Processes that have a file below `directory` open or mounted.
pub(crate) fn processes_of(directory: &Path) -> Vec<String> {
    let needle = directory.to_str().expect("path");
    let holds = |process: &PathBuf| {
        let name = process.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let other = name.parse::<u32>().is_ok_and(|pid| pid != std::process::id());
        let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let open = files.filter_map(|file| fs::read_link(file.path()).ok()).any(|path| path.starts_with(directory));
        let mounted = fs::read_to_string(process.join("mountinfo")).is_ok_and(|mounts| mounts.contains(needle));
        other && (open || mounted)
    };
    let processes = fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path());
    processes.filter(holds).map(|process| process.display().to_string()).collect()
}

/// A control plane in a process of its own.
pub(crate) struct Control {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Control {
    pub(crate) fn start(order: &ControlOrder, change: impl FnOnce(&mut Command)) -> Self {
        let mut command = Command::new(APP);
        command.arg("control-plane").arg(serde_json::to_string(order).expect("order"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        change(&mut command);
        let mut child = command.spawn().expect("a control plane");
        let output = BufReader::new(child.stdout.take().expect("stdout"));
        Self { child, output }
    }

    /// Its line: `ok HANDLE` or `error TEXT`; nothing when it died.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a line");
        line.trim_end().to_owned()
    }

    pub(crate) fn kill(mut self) {
        self.child.kill().expect("SIGKILL");
        self.child.wait().expect("its end");
    }

    /// Waits for its end and returns the signal that ended it.
    pub(crate) fn signal(mut self) -> Option<i32> {
        drop(self.child.stdin.take());
        self.child.wait().expect("its end").signal()
    }
}

impl Host {
    pub(crate) fn order(&self, spec: Option<&InstanceSpec>) -> ControlOrder {
        ControlOrder {
            data: self.data(),
            images: self.directory.path().to_owned(),
            tenant: spec.map_or_else(TenantId::new, |spec| spec.tenant),
            deployment: spec.map(|spec| spec.deployment),
            unsafe_shared: false,
        }
    }
}

/// One running instance with its app.
pub(crate) struct Running {
    pub(crate) app: AppHandle,
    pub(crate) spec: InstanceSpec,
    pub(crate) instance: InstanceHandle,
    pub(crate) address: SocketAddr,
}

impl Host {
    /// A new app with one healthy instance.
    pub(crate) async fn run(&self, driver: &ProcessDriver) -> Running {
        self.run_with(driver, 64).await
    }

    pub(crate) async fn run_with(&self, driver: &ProcessDriver, max_pids: u32) -> Running {
        let app_spec = self.fixture().app();
        let app = driver.ensure_app(&app_spec).await.expect("an app");
        let spec = InstanceSpec { max_pids, ..self.fixture().instance(&app_spec, "serve") };
        let instance = driver.launch(&app, &spec).await.expect("a launch");
        let address = running(driver, &instance).await;
        let running = Running { app, spec, instance, address };
        running.healthy().await;
        running
    }
}

impl Running {
    pub(crate) async fn healthy(&self) {
        poll("health", || async { get(self.address, "/api/v1/health").await.is_ok() }).await;
    }

    /// What the application answers, whatever the status.
    pub(crate) async fn ask(&self, target: &str) -> String {
        get(self.address, target).await.expect("an answer").1
    }
}
