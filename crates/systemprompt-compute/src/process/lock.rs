//! Locks that a crash cannot leave behind: `flock` on files of one directory.

use rustix::fs::{FlockOperation, flock};
use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// A held lock; released when dropped or when the process dies.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
    path: PathBuf,
}

impl FileLock {
    /// Waits for the lock that nobody else may hold at the same time.
    pub(crate) fn exclusive(path: &Path) -> io::Result<Self> {
        Self::acquire(path, FlockOperation::LockExclusive)
    }

    /// Waits for the lock that others may share.
    pub(crate) fn shared(path: &Path) -> io::Result<Self> {
        Self::acquire(path, FlockOperation::LockShared)
    }

    /// The exclusive lock, or nothing when somebody holds it.
    pub(crate) fn try_exclusive(path: &Path) -> io::Result<Option<Self>> {
        match Self::acquire(path, FlockOperation::NonBlockingLockExclusive) {
            Ok(lock) => Ok(Some(lock)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes the lock's file and releases it. Whoever waits for it notices and makes a new one.
    pub(crate) fn remove(self) -> io::Result<()> {
        std::fs::remove_file(&self.path)
    }

    fn acquire(path: &Path, operation: FlockOperation) -> io::Result<Self> {
        loop {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
            retry_interrupted(|| flock(&file, operation))?;
            // The file may have been removed while we waited: then the lock protects nothing.
            match std::fs::metadata(path) {
                Ok(now) if now.ino() == file.metadata()?.ino() => {
                    return Ok(Self { _file: file, path: path.to_owned() });
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
}

fn retry_interrupted(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_removed_lock_file_protects_nothing_and_is_made_anew() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("lock");
        let first = FileLock::exclusive(&path).expect("first");
        assert!(FileLock::try_exclusive(&path).expect("try").is_none(), "held");
        let waiting = std::thread::spawn({
            let path = path.clone();
            move || FileLock::exclusive(&path).expect("second")
        });
        first.remove().expect("remove");
        let second = waiting.join().expect("thread");
        assert!(FileLock::try_exclusive(&path).expect("try").is_none(), "the waiter holds the new file");
        drop(second);
        assert!(FileLock::try_exclusive(&path).expect("try").is_some());
    }
}
