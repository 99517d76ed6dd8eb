//! Throw-away clusters for tests: copied from a template, not durable, gone at the end.

use crate::{
    Access, BinarySearch, Cluster, ClusterConfig, Durability, PostgresError, SUPERUSER, StopMode,
    cluster::{self, Order, bring_up},
    data_directory::{mark, run_initdb},
    layout::Layout,
    owner::Owner,
    postmaster::{self, Found},
    wire::Session,
};
use std::{
    fs::{self, DirBuilder, File, Permissions},
    io::Write,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt, PermissionsExt},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use tempfile::TempDir;

/// A cluster of its own for one test, empty but for `postgres` and the templates.
///
/// It ends and vanishes when this is dropped, when the test panics, and, by a watching process, when the test's
/// process is killed.
#[derive(Debug)]
pub struct TestCluster {
    cluster: Cluster,
    access: Access,
    databases: AtomicU32,
    directory: TempDir,
    guard: Guard,
}

impl TestCluster {
    /// A cluster as the control plane has.
    ///
    /// # Panics
    /// It cannot be made or started: the test cannot go on.
    pub async fn start() -> Self {
        Self::with_access(Access::ControlPlane).await
    }

    /// A cluster as tenants have.
    ///
    /// # Panics
    /// It cannot be made or started: the test cannot go on.
    pub async fn start_for_tenants() -> Self {
        Self::with_access(Access::Tenants).await
    }

    async fn with_access(access: Access) -> Self {
        let made = tokio::task::spawn_blocking(move || make(access)).await.expect("making a cluster does not panic");
        made.unwrap_or_else(|error| panic!("a cluster for a test: {error}"))
    }

    /// The running cluster.
    pub const fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Makes an empty database and says where it is.
    ///
    /// # Panics
    /// The server refuses.
    pub async fn create_database(&self) -> String {
        let name = format!("test_{}", self.databases.fetch_add(1, Ordering::Relaxed));
        self.execute("postgres", &format!("CREATE DATABASE {name}")).await;
        self.cluster.url(&name)
    }

    /// Runs statements as the superuser.
    ///
    /// # Panics
    /// The server refuses.
    pub async fn execute(&self, database: &str, sql: &str) {
        let (socket, database, sql) = (self.cluster.layout().socket(), database.to_owned(), sql.to_owned());
        let run = move || Session::open(&socket, SUPERUSER, &database).and_then(|mut session| session.execute(&sql));
        let done = tokio::task::spawn_blocking(run).await.expect("a query does not panic");
        done.unwrap_or_else(|error| panic!("the server refused: {error}"));
    }

    /// SIGKILLs the postmaster, as the out-of-memory killer would, and waits for its end.
    ///
    /// # Panics
    /// It does not run or does not die.
    pub async fn kill(&self) {
        let data = self.cluster.layout().data.clone();
        let kill = move || {
            let Ok(Found::Running(server)) = postmaster::find(&data) else { panic!("the server does not run") };
            server.signal(rustix::process::Signal::KILL).expect("it may be killed");
            assert!(server.wait(Duration::from_secs(10)).expect("it can be waited for"), "the server does not die");
        };
        tokio::task::spawn_blocking(kill).await.expect("the server dies");
    }

    /// Starts the server again after [`Self::kill`].
    ///
    /// # Panics
    /// It does not start.
    pub async fn start_again(&self) {
        let (layout, access) = (self.cluster.layout().clone(), self.access);
        let start = move || bring_up(&order(layout, access, Owner::find()?), &BinarySearch::host());
        let started = tokio::task::spawn_blocking(start).await.expect("starting does not panic");
        started.unwrap_or_else(|error| panic!("the server does not start again: {error}"));
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        let stopped = cluster::stop(self.cluster.layout(), StopMode::Immediate);
        let removed = fs::remove_dir_all(self.directory.path());
        self.guard.dismiss();
        if !std::thread::panicking() {
            stopped.expect("the test's server stops");
            removed.expect("the test's cluster can be removed");
        }
    }
}

fn make(access: Access) -> Result<TestCluster, PostgresError> {
    let owner = Owner::find()?;
    let template = template(&owner)?;
    let temp = std::env::temp_dir();
    let directory = tempfile::Builder::new().prefix("sp-pg-").tempdir().map_err(PostgresError::io("making", temp))?;
    let path = directory.path().canonicalize().map_err(PostgresError::io("finding", directory.path()))?;
    fs::set_permissions(&path, Permissions::from_mode(0o711)).map_err(PostgresError::io("opening", &path))?;
    let layout = Layout { data: path.join("data"), socket_dir: path.join("s") };
    let guard = Guard::start(&path)?;
    copy(&template, &layout.data)?;
    let cluster = bring_up(&order(layout, access, owner), &BinarySearch::host())?;
    Ok(TestCluster { cluster, access, databases: AtomicU32::new(1), directory, guard })
}

fn order(layout: Layout, access: Access, owner: Owner) -> Order {
    let config = ClusterConfig {
        name: "test".to_owned(),
        data: layout.data.clone(),
        access,
        // Inside the data directory, so that a killed server leaves nothing in /dev/shm.
        settings: vec![("dynamic_shared_memory_type".to_owned(), "mmap".to_owned())],
        durability: Durability::None,
    };
    Order { layout, owner, config }
}

/// One initialised cluster for each server version and user, shared by all tests of the machine.
fn template(owner: &Owner) -> Result<PathBuf, PostgresError> {
    let binaries = BinarySearch::host().find(None)?;
    let name = format!("systemprompt-test-template-{}-{}", binaries.version, owner.uid);
    let path = std::env::temp_dir().join(&name);
    let lock_path = std::env::temp_dir().join(format!("{name}.lock"));
    let lock = File::create(&lock_path)
        .and_then(|file| file.lock().map(|()| file))
        .map_err(PostgresError::io("locking", &lock_path))?;
    if path.join("PG_VERSION").is_file() {
        let found = fs::symlink_metadata(&path).map_err(PostgresError::io("looking at", &path))?;
        if found.is_dir() && found.uid() == owner.uid {
            return Ok(path);
        }
        let reason = format!("it belongs to uid {}", found.uid());
        return Err(PostgresError::NotOurs { path, reason });
    }
    let half_made = std::env::temp_dir().join(format!("{name}.init-tmp"));
    if half_made.exists() {
        fs::remove_dir_all(&half_made).map_err(PostgresError::io("removing", &half_made))?;
    }
    DirBuilder::new().mode(0o700).create(&half_made).map_err(PostgresError::io("making", &half_made))?;
    owner.give(&half_made).map_err(PostgresError::io("handing over", &half_made))?;
    // Segments of 1 MB: less to copy for every test.
    run_initdb(&half_made, owner, &binaries, &["--wal-segsize=1"], Stdio::from(lock))
        .map_err(|error| error.into_postgres_error(&half_made))?;
    mark(&half_made, owner)?;
    fs::rename(&half_made, &path).map_err(PostgresError::io("moving", &path))?;
    Ok(path)
}

fn copy(template: &Path, data: &Path) -> Result<(), PostgresError> {
    let status = Command::new("cp").arg("-a").arg(template).arg(data).status();
    match status.map_err(PostgresError::io("copying", template))? {
        status if status.success() => Ok(()),
        status => Err(PostgresError::Io {
            action: "copying",
            path: template.to_owned(),
            source: std::io::Error::other(format!("cp ended with {status}")),
        }),
    }
}

/// A shell that waits for our end, however it comes, and then cleans up.
#[derive(Debug)]
struct Guard {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Guard {
    fn start(directory: &Path) -> Result<Self, PostgresError> {
        let script = r#"
            read -r word && exit 0
            read -r pid < "$1/data/postmaster.pid" && kill -QUIT "$pid"
            for _ in 1 2 3 4 5 6 7 8 9 10; do [ -e "$1/data/postmaster.pid" ] || break; sleep 0.2; done
            rm -rf "$1"
        "#;
        let mut child = Command::new("sh")
            .args(["-c", script, "guard"])
            .arg(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A group of its own: who kills the test's group must not kill its guard.
            .process_group(0)
            .spawn()
            .map_err(PostgresError::io("guarding", directory))?;
        let stdin = child.stdin.take();
        Ok(Self { child, stdin })
    }

    fn dismiss(&mut self) {
        if let Some(mut stdin) = self.stdin.take() {
            // Should this fail, the guard cleans up once more, which finds nothing.
            let _ = stdin.write_all(b"done\n");
        }
        let _ = self.child.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Not dismissed: making the cluster failed halfway. Closing the pipe lets the guard clean up.
        drop(self.stdin.take());
        let _ = self.child.wait();
    }
}
