use crate::{
    Access, BinarySearch, Durability, PostgresError, SUPERUSER,
    binaries::{Binaries, DataVersion},
    data_directory::{self, DataDirectory, last_lines},
    layout::Layout,
    owner::Owner,
    postmaster::{self, Found, Postmaster},
    settings,
    wire::{Session, WireError},
};
use rustix::process::Signal;
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

/// Recovery after a crash takes well under a second; this is for a machine in trouble.
const START_LIMIT: Duration = Duration::from_mins(2);
/// A fast stop writes a checkpoint first.
const STOP_LIMIT: Duration = Duration::from_mins(1);
const PROBE_PAUSE: Duration = Duration::from_millis(10);
/// A log larger than this is put aside when its server starts again.
const LOG_LIMIT_BYTES: u64 = 16 << 20;
const LINES_OF_LOG: usize = 12;

/// What cluster is wanted.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Short and in lower case (`control`, `tenants`): part of the socket directory's name.
    pub name: String,
    /// The data directory; made when it is absent or empty.
    pub data: PathBuf,
    /// Who may connect.
    pub access: Access,
    /// More settings, which win over ours; they hold from the next start of the server.
    pub settings: Vec<(String, String)>,
    /// What a commit survives.
    pub durability: Durability,
}

/// How to end a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopMode {
    /// Ends all sessions and leaves a clean cluster.
    Fast,
    /// Ends at once; the next start recovers.
    Immediate,
}

/// A running server; dropping this leaves it running.
#[derive(Debug, Clone)]
pub struct Cluster {
    layout: Layout,
    version: u32,
}

impl Cluster {
    /// Makes the cluster if it is absent, adopts its server if it runs, starts it otherwise. Callers in this and in
    /// other processes wait for each other. Cancelling stops the waiting, not the start.
    ///
    /// # Errors
    /// See [`PostgresError`]: each says what to do.
    pub async fn start(config: ClusterConfig) -> Result<Self, PostgresError> {
        Self::start_with(config, BinarySearch::host()).await
    }

    /// The same with the server's binaries from elsewhere.
    ///
    /// # Errors
    /// See [`PostgresError`]: each says what to do.
    pub async fn start_with(config: ClusterConfig, search: BinarySearch) -> Result<Self, PostgresError> {
        blocking(move || {
            let owner = Owner::find()?;
            let layout = Layout::of(&config.name, &config.data)?;
            bring_up(&Order { layout, owner, config }, &search)
        })
        .await
    }

    /// The cluster that is at `data` already, running or not; starts and makes nothing.
    ///
    /// # Errors
    /// What is there is not ours.
    pub async fn existing(name: &str, data: &Path) -> Result<Option<Self>, PostgresError> {
        let (name, data) = (name.to_owned(), data.to_owned());
        blocking(move || {
            let DataDirectory::Cluster { version } = DataDirectory::inspect(&data, &Owner::find()?)? else {
                return Ok(None);
            };
            Ok(Some(Self { layout: Layout::of(&name, &data)?, version }))
        })
        .await
    }

    /// The directory of the unix socket.
    pub fn socket_dir(&self) -> &Path {
        &self.layout.socket_dir
    }

    /// Where the superuser connects: `postgres://systemprompt@localhost/{database}?host={socket directory}`.
    pub fn url(&self, database: &str) -> String {
        let socket = percent_encode(self.layout.socket_dir.as_os_str().as_encoded_bytes());
        format!("postgres://{SUPERUSER}@localhost/{}?host={socket}", percent_encode(database.as_bytes()))
    }

    /// The server's major version.
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// Ends the server and waits for it; a server that does not run is no error.
    ///
    /// # Errors
    /// It did not end within a minute, or may not be signalled.
    pub async fn stop(&self, mode: StopMode) -> Result<(), PostgresError> {
        let layout = self.layout.clone();
        blocking(move || stop(&layout, mode)).await
    }

    /// The server runs and answers.
    pub async fn is_alive(&self) -> bool {
        let layout = self.layout.clone();
        let answers =
            move || Ok(matches!(postmaster::find(&layout.data), Ok(Found::Running(_))) && probe(&layout).is_ok());
        blocking(answers).await.unwrap_or(false)
    }

    #[cfg(any(test, feature = "testing"))]
    pub(crate) const fn layout(&self) -> &Layout {
        &self.layout
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, PostgresError> + Send + 'static,
) -> Result<T, PostgresError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| PostgresError::Interrupted)?
}

/// Everything a start needs to know.
pub(crate) struct Order {
    pub(crate) layout: Layout,
    pub(crate) owner: Owner,
    pub(crate) config: ClusterConfig,
}

/// [`Cluster::start`], blocking.
pub(crate) fn bring_up(order: &Order, search: &BinarySearch) -> Result<Cluster, PostgresError> {
    let Order { layout, owner, .. } = order;
    owner.check_reach(&layout.data)?;
    let lock = take_lock(&layout.lock())?;
    let known = DataDirectory::inspect(&layout.data, owner)?;
    if let DataDirectory::Cluster { version } = known
        && let Some(running) = find_running(layout)?
    {
        // Where its environment said when it was started; ours may say something else by now.
        let layout = layout.at_socket(running.socket_dir.as_deref().unwrap_or(&layout.socket_dir));
        match adopt(&layout, &running)? {
            Started::Ready => return Ok(Cluster { layout, version }),
            Started::Ended => tracing::info!(data = %layout.data.display(), "it has ended; starting it anew"),
        }
    }
    let wanted = match known {
        DataDirectory::Absent => None,
        DataDirectory::Cluster { version } => Some(DataVersion { data: &layout.data, version }),
    };
    let binaries = search.find(wanted)?;
    if known == DataDirectory::Absent {
        data_directory::make(layout, owner, &binaries, &lock)?;
    }
    layout.write_access(order.config.access, owner)?;
    layout.prepare_socket_dir(owner, order.config.access)?;
    start_server(order, &binaries)?;
    Ok(Cluster { layout: layout.clone(), version: binaries.version })
}

/// [`Cluster::stop`], blocking.
pub(crate) fn stop(layout: &Layout, mode: StopMode) -> Result<(), PostgresError> {
    let io_error = || PostgresError::io::<io::Error>("stopping the server of", &layout.data);
    let Found::Running(server) = postmaster::find(&layout.data).map_err(io_error())? else { return Ok(()) };
    let signal = match mode {
        StopMode::Fast => Signal::INT,
        StopMode::Immediate => Signal::QUIT,
    };
    server.signal(signal).map_err(io_error())?;
    if server.wait(STOP_LIMIT).map_err(io_error())? {
        return Ok(());
    }
    Err(PostgresError::NotStopped { data: layout.data.clone(), pid: server.pid, seconds: STOP_LIMIT.as_secs() })
}

fn take_lock(path: &Path) -> Result<File, PostgresError> {
    let take = || {
        let file = File::options().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        file.lock()?;
        Ok::<_, io::Error>(file)
    };
    take().map_err(PostgresError::io("locking", path))
}

/// The live server of our data, which must be one that listens where ours do.
fn find_running(layout: &Layout) -> Result<Option<Postmaster>, PostgresError> {
    let pid_file = layout.data.join("postmaster.pid");
    match postmaster::find(&layout.data).map_err(PostgresError::io("reading", &pid_file))? {
        Found::Nobody { stale_pid_file: false } => Ok(None),
        Found::Nobody { stale_pid_file: true } => {
            // PostgreSQL would take any process of its user with that number for the old server and refuse to start.
            tracing::warn!(path = %pid_file.display(), "removing a stale pid file: the number belongs to another process");
            remove_lock_files(layout)?;
            Ok(None)
        }
        Found::Unreaped => {
            if !postmaster::wait_for_children(&layout.data, STOP_LIMIT)
                .map_err(PostgresError::io("looking for the old server of", &layout.data))?
            {
                let (data, seconds) = (layout.data.clone(), STOP_LIMIT.as_secs());
                return Err(PostgresError::NotStopped { data, pid: 0, seconds });
            }
            tracing::warn!(path = %pid_file.display(), "removing the pid file of a killed server that nobody has waited for");
            remove_lock_files(layout)?;
            Ok(None)
        }
        Found::Running(server) => match &server.socket_dir {
            // One of ours, from another environment, takes us for what we are.
            Some(socket)
                if *socket != layout.socket_dir && probe(&layout.at_socket(socket)).is_err() && socket.exists() =>
            {
                Err(PostgresError::RunsElsewhere { data: layout.data.clone(), pid: server.pid, socket: socket.clone() })
            }
            _ => Ok(Some(server)),
        },
    }
}

/// The data directory's and the socket's: both name the old server.
fn remove_lock_files(layout: &Layout) -> Result<(), PostgresError> {
    let mut socket_lock = layout.socket().into_os_string();
    socket_lock.push(".lock");
    for path in [layout.data.join("postmaster.pid"), PathBuf::from(socket_lock)] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(PostgresError::io("removing", &path)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn adopt(layout: &Layout, server: &Postmaster) -> Result<Started, PostgresError> {
    tracing::info!(data = %layout.data.display(), pid = server.pid, "adopting a running server");
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if server.socket_dir.is_some() && !layout.socket().exists() {
            // Its directory was emptied, as at the end of a session: nobody can ever connect again.
            tracing::warn!(data = %layout.data.display(), pid = server.pid, "stopping a server whose socket is gone");
            stop(layout, StopMode::Fast)?;
            return Ok(Started::Ended);
        }
        let reason = match probe(layout) {
            Ok(()) => return Ok(Started::Ready),
            Err(error) => error.to_string(),
        };
        if server.wait(PROBE_PAUSE).map_err(PostgresError::io("watching the server of", &layout.data))? {
            return Ok(Started::Ended);
        }
        if Instant::now() > deadline {
            return Err(not_ready(layout, server.pid, reason));
        }
    }
}

fn probe(layout: &Layout) -> Result<(), WireError> {
    Session::open(&layout.socket(), SUPERUSER, "postgres").map(drop)
}

fn not_ready(layout: &Layout, pid: i32, reason: String) -> PostgresError {
    let log = layout.log();
    PostgresError::NotReady { data: layout.data.clone(), pid, reason, tail: log_tail(&log, 0), log }
}

fn start_server(order: &Order, binaries: &Binaries) -> Result<(), PostgresError> {
    let layout = &order.layout;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let (log, log_start) = open_log(layout)?;
        let server = spawn_server(order, binaries, &log)?;
        match wait_started(layout, &server, deadline)? {
            Started::Ready => return Ok(()),
            Started::Ended => {
                let tail = log_tail(&layout.log(), log_start);
                // The sessions of a killed server notice its death within moments and let go of the data.
                if tail.contains("is still in use") && Instant::now() < deadline {
                    std::thread::sleep(PROBE_PAUSE);
                    continue;
                }
                return Err(PostgresError::StartFailed { data: layout.data.clone(), log: layout.log(), tail });
            }
        }
    }
}

/// What became of a server that was started or adopted.
enum Started {
    Ready,
    Ended,
}

fn wait_started(layout: &Layout, server: &Spawned, deadline: Instant) -> Result<Started, PostgresError> {
    loop {
        let reason = match probe(layout) {
            Ok(()) => return Ok(Started::Ready),
            Err(error) => error.to_string(),
        };
        if server.ended.get().is_some() {
            return Ok(Started::Ended);
        }
        if Instant::now() > deadline {
            return Err(not_ready(layout, server.pid, reason));
        }
        std::thread::sleep(PROBE_PAUSE);
    }
}

struct Spawned {
    pid: i32,
    ended: Arc<OnceLock<Option<ExitStatus>>>,
}

/// Starts the server in a session of its own: no signal of our terminal reaches it, and it outlives us.
fn spawn_server(order: &Order, binaries: &Binaries, log: &File) -> Result<Spawned, PostgresError> {
    let Order { layout, owner, config } = order;
    let share = || log.try_clone().map(Stdio::from).map_err(PostgresError::io("sharing", layout.log()));
    // setsid(1) becomes the server: std can start a process group but no session without `unsafe`.
    let mut command = Command::new("setsid");
    owner.dress(&mut command);
    command
        .arg(binaries.postgres())
        .arg("-D")
        .arg(&layout.data)
        .args(settings::arguments(layout, config.access, config.durability, &config.settings))
        .stdin(Stdio::null())
        .stdout(share()?)
        .stderr(share()?);
    let child = command.spawn().map_err(PostgresError::io("starting", binaries.postgres()))?;
    let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
    let ended = Arc::new(OnceLock::new());
    reap(child, ended.clone()).map_err(PostgresError::io("watching", binaries.postgres()))?;
    Ok(Spawned { pid, ended })
}

/// A child that nobody waits for stays as a zombie and looks alive.
fn reap(mut child: Child, ended: Arc<OnceLock<Option<ExitStatus>>>) -> io::Result<()> {
    let wait = move || {
        // Whatever it ended with, the log says more.
        let _ = ended.set(child.wait().ok());
    };
    std::thread::Builder::new().name("postgres-reaper".to_owned()).stack_size(64 << 10).spawn(wait)?;
    Ok(())
}

/// The server's log, and where this start's words will begin.
fn open_log(layout: &Layout) -> Result<(File, u64), PostgresError> {
    let path = layout.log();
    let open = || {
        if fs::metadata(&path).is_ok_and(|metadata| metadata.len() > LOG_LIMIT_BYTES) {
            fs::rename(&path, layout.old_log())?;
        }
        let file = File::options().append(true).create(true).mode(0o600).open(&path)?;
        let start = file.metadata()?.len();
        Ok::<_, io::Error>((file, start))
    };
    open().map_err(PostgresError::io("opening the log", &path))
}

/// The last lines behind `start`; a log that cannot be read says so itself.
fn log_tail(path: &Path, start: u64) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let end = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(end.saturating_sub(16 << 10))))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(last_lines(&String::from_utf8_lossy(&bytes), LINES_OF_LOG))
    };
    match read() {
        Ok(tail) if tail.is_empty() => "(the server said nothing)".to_owned(),
        Ok(tail) => tail,
        Err(error) => format!("(the log cannot be read: {error})"),
    }
}

/// RFC 3986: everything but the unreserved characters.
fn percent_encode(bytes: &[u8]) -> String {
    use std::fmt::Write;
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_survives_odd_characters() {
        let layout = Layout { data: "/d".into(), socket_dir: "/run/a b&c/x-control".into() };
        let cluster = Cluster { layout, version: 15 };
        assert_eq!(
            cluster.url("a/b?c"),
            "postgres://systemprompt@localhost/a%2Fb%3Fc?host=%2Frun%2Fa%20b%26c%2Fx-control"
        );
    }
}
