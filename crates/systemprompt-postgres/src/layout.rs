//! Where a cluster's files lie.

use crate::{Access, PostgresError, owner::Owner, settings};
use std::{
    ffi::OsString,
    fs::{self, DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// `sun_path` without its final zero.
const LONGEST_SOCKET_PATH: usize = 107;

/// The files of one cluster; all paths are absolute and free of symbolic links.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) data: PathBuf,
    pub(crate) socket_dir: PathBuf,
}

impl Layout {
    /// Makes the directories above `data` where they are missing, and finds the place of the socket.
    pub(crate) fn of(name: &str, data: &Path) -> Result<Self, PostgresError> {
        let data = canonical(data)?;
        let socket_dir = runtime_directory().join(format!("{}-{name}", short_hash(&data)));
        Ok(Self { data, socket_dir })
    }

    /// The same files, with the socket where a running server has it.
    pub(crate) fn at_socket(&self, socket_dir: &Path) -> Self {
        Self { data: self.data.clone(), socket_dir: socket_dir.to_owned() }
    }

    /// Writes who may connect, for the next start.
    pub(crate) fn write_access(&self, access: Access, owner: &Owner) -> Result<(), PostgresError> {
        for (path, text) in [(self.hba(), access.hba()), (self.ident(), settings::ident(owner.invoker()))] {
            let write = fs::write(&path, text).and_then(|()| fs::set_permissions(&path, Permissions::from_mode(0o644)));
            write.map_err(PostgresError::io("writing", &path))?;
        }
        Ok(())
    }

    /// Held while somebody looks at, makes or starts the cluster.
    pub(crate) fn lock(&self) -> PathBuf {
        self.beside(".lock")
    }

    /// What the server says.
    pub(crate) fn log(&self) -> PathBuf {
        self.beside(".log")
    }

    /// The log before it grew too large.
    pub(crate) fn old_log(&self) -> PathBuf {
        self.beside(".log.1")
    }

    /// Who may connect. Not in the data directory, which is the server's: root would write through its links.
    pub(crate) fn hba(&self) -> PathBuf {
        self.beside(".hba.conf")
    }

    /// Who is whom; beside [`Self::hba`].
    pub(crate) fn ident(&self) -> PathBuf {
        self.beside(".ident.conf")
    }

    /// A cluster in the making.
    pub(crate) fn half_made(&self) -> PathBuf {
        self.beside(".init-tmp")
    }

    /// The socket itself.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket_dir.join(".s.PGSQL.5432")
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut path = OsString::from(&self.data);
        path.push(suffix);
        path.into()
    }

    /// Makes the socket's directory, or takes over the one of an earlier start.
    pub(crate) fn prepare_socket_dir(&self, owner: &Owner, access: Access) -> Result<(), PostgresError> {
        if self.socket().as_os_str().len() > LONGEST_SOCKET_PATH {
            return Err(PostgresError::SocketPathTooLong(self.socket_dir.clone()));
        }
        let directory = &self.socket_dir;
        if let Some(parent) = directory.parent() {
            create_directories(parent)?;
            check_owned(parent)?;
        }
        // It stays when the server stops: sandboxes have it mounted and must find the next server in it.
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                check_owned_by(directory, &[owner.uid, rustix::process::geteuid().as_raw()])?;
            }
            made => made.map_err(PostgresError::io("making", directory))?,
        }
        owner.give(directory).map_err(PostgresError::io("handing over", directory))?;
        let mode = Permissions::from_mode(access.socket_modes().directory);
        fs::set_permissions(directory, mode).map_err(PostgresError::io("setting the mode of", directory))
    }
}

/// A directory that somebody else could have put there must not hold our sockets.
fn check_owned(directory: &Path) -> Result<(), PostgresError> {
    check_owned_by(directory, &[rustix::process::geteuid().as_raw()])
}

fn check_owned_by(directory: &Path, uids: &[u32]) -> Result<(), PostgresError> {
    let metadata = fs::symlink_metadata(directory).map_err(PostgresError::io("looking at", directory))?;
    // Others could rename what is in a directory that they may write to.
    let is_private = metadata.permissions().mode() & 0o022 == 0;
    if metadata.is_dir() && uids.contains(&metadata.uid()) && is_private {
        return Ok(());
    }
    if metadata.is_dir() && !is_private {
        let reason = format!("others may write to it (mode {:o})", metadata.permissions().mode() & 0o7777);
        return Err(PostgresError::NotOurs { path: directory.to_owned(), reason });
    }
    let reason = format!("it belongs to uid {}", metadata.uid());
    Err(PostgresError::NotOurs { path: directory.to_owned(), reason })
}

/// Where this user's sockets lie: short, as their paths must be, and not below the data, whose parents may be private.
pub fn runtime_directory() -> PathBuf {
    let user = rustix::process::geteuid();
    if user.is_root() {
        return PathBuf::from("/run/systemprompt");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(directory) if directory.is_absolute() && directory.is_dir() => directory.join("systemprompt"),
        _ => std::env::temp_dir().join(format!("systemprompt-{}", user.as_raw())),
    }
}

/// Makes [`runtime_directory`] where it is missing.
///
/// # Errors
/// It cannot be made, or somebody else put it there or may write to it.
pub fn prepare_runtime_directory() -> Result<(), PostgresError> {
    let directory = runtime_directory();
    create_directories(&directory)?;
    check_owned(&directory)
}

fn canonical(data: &Path) -> Result<PathBuf, PostgresError> {
    let absolute = std::path::absolute(data).map_err(PostgresError::io("finding", data))?;
    if let Ok(found) = absolute.canonicalize() {
        return Ok(found);
    }
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(PostgresError::NotOurs { path: absolute, reason: "it is not a directory of its own".to_owned() });
    };
    create_directories(parent)?;
    let parent = parent.canonicalize().map_err(PostgresError::io("finding", parent))?;
    Ok(parent.join(name))
}

/// How many directories this process has begun to make.
static MADE: AtomicU32 = AtomicU32::new(0);

/// Makes missing directories so that the server's user can pass, whatever our umask; leaves existing ones alone.
fn create_directories(path: &Path) -> Result<(), PostgresError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_directories(parent)?;
    }
    // Beside its place first: two clusters start at once, and neither may see a directory whose mode is not set yet.
    let mut unfinished = OsString::from(path);
    unfinished.push(format!(".{}-{}.tmp", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed)));
    let unfinished = PathBuf::from(unfinished);
    let make = || {
        fs::create_dir(&unfinished)?;
        fs::set_permissions(&unfinished, Permissions::from_mode(0o711))?;
        fs::rename(&unfinished, path)
    };
    match make() {
        Err(error) => {
            let _ = fs::remove_dir(&unfinished);
            // Somebody else was faster.
            if path.is_dir() { Ok(()) } else { Err(PostgresError::io("making", path)(error)) }
        }
        Ok(()) => Ok(()),
    }
}

/// FNV-1a, folded to eight hex digits: stable over versions and platforms, and it need not be secure, for two
/// clusters in one socket directory refuse each other.
fn short_hash(path: &Path) -> String {
    let hash = path
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    format!("{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_directory_is_short_and_differs_by_path() {
        let (one, two) = (short_hash(Path::new("/a/one")), short_hash(Path::new("/a/two")));
        assert_ne!(one, two);
        assert_eq!((one.len(), two.len()), (8, 8));
        assert_eq!(short_hash(Path::new("/a/one")), one);
    }
}
