//! Where a cluster's files lie.

use crate::{Access, PostgresError, owner::Owner};
use std::{
    ffi::OsString,
    fs::{self, DirBuilder, Permissions},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
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
    pub(crate) fn of(name: &str, data: &Path, owner: &Owner) -> Result<Self, PostgresError> {
        let data = canonical(data)?;
        let socket_dir = runtime_directory(owner).join(format!("{}-{name}", short_hash(&data)));
        Ok(Self { data, socket_dir })
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
            check_owned(parent, owner)?;
        }
        // It stays when the server stops: sandboxes have it mounted and must find the next server in it.
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => check_owned(directory, owner)?,
            made => made.map_err(PostgresError::io("making", directory))?,
        }
        owner.give(directory).map_err(PostgresError::io("handing over", directory))?;
        let mode = Permissions::from_mode(access.socket_modes().directory);
        fs::set_permissions(directory, mode).map_err(PostgresError::io("setting the mode of", directory))
    }
}

/// A directory that somebody else could have put there must not hold our socket.
fn check_owned(directory: &Path, owner: &Owner) -> Result<(), PostgresError> {
    let metadata = fs::symlink_metadata(directory).map_err(PostgresError::io("looking at", directory))?;
    let ours = [owner.uid, rustix::process::geteuid().as_raw()];
    if metadata.is_dir() && ours.contains(&metadata.uid()) {
        return Ok(());
    }
    let reason = format!("it belongs to uid {}", metadata.uid());
    Err(PostgresError::NotOurs { path: directory.to_owned(), reason })
}

/// Short, for unix sockets, and not below the data, whose parents may be private.
fn runtime_directory(owner: &Owner) -> PathBuf {
    if owner.is_from_root() {
        return PathBuf::from("/run/systemprompt");
    }
    match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
        Some(directory) if directory.is_absolute() && directory.is_dir() => directory.join("systemprompt"),
        _ => std::env::temp_dir().join(format!("systemprompt-{}", owner.uid)),
    }
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

/// Makes missing directories so that the server's user can pass, whatever our umask; leaves existing ones alone.
fn create_directories(path: &Path) -> Result<(), PostgresError> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        create_directories(parent)?;
    }
    match fs::create_dir(path) {
        // Somebody else was faster; the mode is then theirs to set.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        made => made
            .and_then(|()| fs::set_permissions(path, Permissions::from_mode(0o711)))
            .map_err(PostgresError::io("making", path)),
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
