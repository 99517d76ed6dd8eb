//! What is in a data directory, and making a new one that is never half made.

use crate::{PostgresError, SUPERUSER, binaries::Binaries, layout::Layout, owner::Owner};
use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::Path,
    process::{Command, Stdio},
};

/// Lies in every cluster that we made; a cluster without it is somebody else's.
const MARKER: &str = "systemprompt.cluster";
/// How much of `initdb`'s words an error carries.
const LINES_OF_OUTPUT: usize = 8;

/// What was found where a cluster should be.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum DataDirectory {
    /// Nothing, or an empty directory.
    Absent,
    /// A whole cluster that we made.
    Cluster { version: u32 },
}

impl DataDirectory {
    /// Looks, and refuses what is not ours.
    pub(crate) fn inspect(path: &Path, owner: &Owner) -> Result<Self, PostgresError> {
        let not_ours = |reason: String| PostgresError::NotOurs { path: path.to_owned(), reason };
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::Absent),
            Err(error) => return Err(PostgresError::io("looking at", path)(error)),
        };
        if !metadata.is_dir() {
            return Err(not_ours("it is not a directory".to_owned()));
        }
        let mut entries = fs::read_dir(path).map_err(PostgresError::io("reading", path))?;
        if entries.next().is_none() {
            return Ok(Self::Absent);
        }
        let is_cluster = path.join("PG_VERSION").is_file() && path.join("global/pg_control").is_file();
        match (is_cluster, path.join(MARKER).is_file()) {
            (true, true) => {}
            (true, false) => return Err(not_ours("it is a cluster that something else made".to_owned())),
            (false, true) => return Err(not_ours("parts of the cluster in it are missing".to_owned())),
            (false, false) => return Err(not_ours("it holds other files".to_owned())),
        }
        if metadata.uid() != owner.uid {
            return Err(not_ours(format!(
                "it belongs to uid {} and the server would run as uid {}",
                metadata.uid(),
                owner.uid
            )));
        }
        let text = fs::read_to_string(path.join("PG_VERSION")).map_err(PostgresError::io("reading", path))?;
        let version = text.trim().parse().map_err(|_| not_ours(format!("its PG_VERSION says {:?}", text.trim())))?;
        Ok(Self::Cluster { version })
    }
}

/// Makes a cluster beside its place and moves it there in one step, durable before it is visible.
///
/// `lock` is the held lock: `initdb` inherits it as its standard input, so that nobody else comes near the half-made
/// directory while an orphaned `initdb` of a killed process still writes into it.
pub(crate) fn make(layout: &Layout, owner: &Owner, binaries: &Binaries, lock: &File) -> Result<(), PostgresError> {
    let half_made = layout.half_made();
    remove_half_made(&half_made)?;
    DirBuilder::new().mode(0o700).create(&half_made).map_err(PostgresError::io("making", &half_made))?;
    owner.give(&half_made).map_err(PostgresError::io("handing over", &half_made))?;
    let lock = lock.try_clone().map_err(PostgresError::io("sharing the lock", layout.lock()))?;
    run_initdb(&half_made, owner, binaries, &[], Stdio::from(lock))
        .map_err(|error| error.into_postgres_error(&layout.data))?;
    mark(&half_made, owner)?;
    File::open(&half_made)
        .and_then(|directory| rustix::fs::syncfs(&directory).map_err(Into::into))
        .map_err(PostgresError::io("flushing", &half_made))?;
    fs::rename(&half_made, &layout.data).map_err(PostgresError::io("moving the new cluster to", &layout.data))?;
    let parent = layout.data.parent().unwrap_or(Path::new("/"));
    File::open(parent).and_then(|directory| directory.sync_all()).map_err(PostgresError::io("flushing", parent))
}

/// Why `initdb` made nothing.
pub(crate) enum InitError {
    NotRun(PostgresError),
    Failed(String),
}

impl InitError {
    pub(crate) fn into_postgres_error(self, data: &Path) -> PostgresError {
        match self {
            Self::NotRun(error) => error,
            Self::Failed(output) => PostgresError::InitFailed { data: data.to_owned(), output },
        }
    }
}

pub(crate) fn run_initdb(
    directory: &Path,
    owner: &Owner,
    binaries: &Binaries,
    extra: &[&str],
    stdin: Stdio,
) -> Result<(), InitError> {
    let mut command = Command::new(binaries.initdb());
    owner.dress(&mut command);
    command
        .arg("--pgdata")
        .arg(directory)
        .args(["--username", SUPERUSER, "--auth-local=peer", "--auth-host=reject", "--encoding=UTF8"])
        // --no-sync: the caller flushes the whole directory at once, ten times faster.
        .args(["--locale=C.UTF-8", "--data-checksums", "--no-instructions", "--no-sync"])
        .args(extra)
        .stdin(stdin);
    let output =
        command.output().map_err(PostgresError::io("running", binaries.initdb())).map_err(InitError::NotRun)?;
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(InitError::Failed(last_lines(&String::from_utf8_lossy(&said), LINES_OF_OUTPUT)))
}

/// Says that the cluster is ours. The directory is its server's, who may have put a link there by now: only a new file
/// is written, and handed over by its descriptor.
pub(crate) fn mark(directory: &Path, owner: &Owner) -> Result<(), PostgresError> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    let path = directory.join(MARKER);
    let write = || {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
        file.write_all(b"Made by SystemPrompt Cloud; do not remove.\n")?;
        owner.give_file(&file)
    };
    write().map_err(PostgresError::io("writing", &path))
}

pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn remove_half_made(path: &Path) -> Result<(), PostgresError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(PostgresError::io("looking at", path)(error)),
        Ok(metadata) if metadata.is_dir() => {
            tracing::warn!(path = %path.display(), "removing a cluster that was left half made");
            fs::remove_dir_all(path).map_err(PostgresError::io("removing", path))
        }
        Ok(_) => Err(PostgresError::NotOurs { path: path.to_owned(), reason: "it is not a directory".to_owned() }),
    }
}
