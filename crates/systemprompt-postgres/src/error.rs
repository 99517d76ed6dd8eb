use crate::binaries::MINIMUM_VERSION;
use std::{io, path::PathBuf};

/// Why a cluster cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PostgresError {
    /// There is no server on this host.
    #[error(
        "expected a PostgreSQL server, version {MINIMUM_VERSION} or newer, found none in {}; on Debian put \
         `create_main_cluster = false` into /etc/postgresql-common/createcluster.conf (so that no other cluster is \
         started) and type: apt-get install postgresql", list(.looked)
    )]
    NotInstalled {
        /// Where it was looked for.
        looked: Vec<PathBuf>,
    },
    /// Only servers that are too old.
    #[error(
        "expected PostgreSQL {MINIMUM_VERSION} or newer, found {found} in {}; install a newer one: apt-get install \
         postgresql", .directory.display()
    )]
    TooOld {
        /// The newest that was found.
        found: u32,
        /// Where.
        directory: PathBuf,
    },
    /// The data was written by another major version than any that is installed.
    #[error(
        "{} was written by PostgreSQL {wanted}, installed is {}; install that version: apt-get install \
         postgresql-{wanted}", .data.display(), list_versions(.installed)
    )]
    VersionMismatch {
        /// The data directory.
        data: PathBuf,
        /// Its version.
        wanted: u32,
        /// What there is.
        installed: Vec<u32>,
    },
    /// PostgreSQL refuses to run as root, and there is nobody else it could run as.
    #[error(
        "PostgreSQL does not run as root, and there is no user `postgres`; type: adduser --system --group --no-create-home postgres"
    )]
    NoUser,
    /// The server's user cannot reach the data directory.
    #[error(
        "the user {user}, as whom PostgreSQL runs, cannot pass through {}; type: chmod o+x {}",
        .directory.display(), .directory.display()
    )]
    NotTraversable {
        /// The directory that stops it.
        directory: PathBuf,
        /// The server's user.
        user: String,
    },
    /// The directory is something else; it is left as it is.
    #[error("expected {} to be absent, empty or a cluster of ours, but {reason}; nothing was changed", .path.display())]
    NotOurs {
        /// The directory.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// A server that we did not start runs on the data.
    #[error(
        "a server that was started by something else (process {pid}, socket in {}) runs on {}; stop it first: kill -INT {pid}",
        .socket.display(), .data.display()
    )]
    RunsElsewhere {
        /// The data directory.
        data: PathBuf,
        /// Its postmaster.
        pid: i32,
        /// Where it listens.
        socket: PathBuf,
    },
    /// `initdb` failed.
    #[error("initialising {} failed: {output}", .data.display())]
    InitFailed {
        /// The data directory to be.
        data: PathBuf,
        /// The last lines it said.
        output: String,
    },
    /// The server ended while it started.
    #[error("the server of {} did not start; the last lines of {}:\n{tail}", .data.display(), .log.display())]
    StartFailed {
        /// The data directory.
        data: PathBuf,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// The server is alive but answers nobody yet.
    #[error(
        "the server of {} (process {pid}) does not answer yet: {reason}; it goes on starting. The last lines of {}:\n{tail}",
        .data.display(), .log.display()
    )]
    NotReady {
        /// The data directory.
        data: PathBuf,
        /// Its postmaster.
        pid: i32,
        /// What it said to the last attempt.
        reason: String,
        /// Its log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
    /// The server did not end.
    #[error("process {pid}, the server of {}, did not stop within {seconds} s", .data.display())]
    NotStopped {
        /// The data directory.
        data: PathBuf,
        /// Its postmaster.
        pid: i32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A unix socket's path has at most 107 bytes.
    #[error("the socket directory {} is too long for a unix socket; set a shorter XDG_RUNTIME_DIR", .0.display())]
    SocketPathTooLong(PathBuf),
    /// A file or process operation failed.
    #[error("{action} {} failed", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The async runtime ended while the work went on.
    #[error("the runtime shut down while a cluster was being started or stopped")]
    Interrupted,
}

impl PostgresError {
    /// For `map_err`: an I/O error with what was tried on what.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(E) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source: source.into() }
    }
}

fn list(paths: &[PathBuf]) -> String {
    let texts: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    if texts.is_empty() { "PATH".to_owned() } else { texts.join(", ") }
}

fn list_versions(versions: &[u32]) -> String {
    let texts: Vec<_> = versions.iter().map(ToString::to_string).collect();
    texts.join(", ")
}
