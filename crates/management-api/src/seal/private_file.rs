//! Files that only we may read, written so that a crash leaves the old content or the new, never half of one.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};
use tempfile::NamedTempFile;
use zeroize::Zeroizing;

/// A private file that cannot be read or written, or that is not private.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivateFileError {
    #[error("{action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{path} can be read by others (mode {mode:04o}): it must be 0600; run `chmod 600 {path}`, and replace the secret if others use this machine"
    )]
    Exposed { path: PathBuf, mode: u32 },
}

impl PrivateFileError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// The content of `path`, or `None` when there is no such file.
///
/// # Errors
/// When the group or others may read the file: whatever is in it must count as known to them.
pub(crate) fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, PrivateFileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(PrivateFileError::io("open", path)(error)),
    };
    // The mode is asked of the open file, so that it belongs to what is read.
    let metadata = file.metadata().map_err(PrivateFileError::io("examine", path))?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(PrivateFileError::Exposed { path: path.to_owned(), mode });
    }
    let size = usize::try_from(metadata.len()).unwrap_or(0);
    let mut content = Zeroizing::new(Vec::with_capacity(size));
    io::Read::read_to_end(&mut &file, &mut content).map_err(PrivateFileError::io("read", path))?;
    Ok(Some(content))
}

/// Creates `path` with `content`, mode 0600, unless it exists; returns whether it was created.
pub(crate) fn create(path: &Path, content: &[u8]) -> Result<bool, PrivateFileError> {
    let temporary = staged(path, content, 0o600)?;
    match temporary.persist_noclobber(path) {
        Ok(_) => sync_directory(path).map(|()| true),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(PrivateFileError::io("create", path)(error.error)),
    }
}

/// Puts `content` at `path`, mode 0600, in one step.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), PrivateFileError> {
    write_with_mode(path, content, 0o600)
}

/// Puts `content` at `path`, mode 0644, in one step: for what everybody may know.
pub(crate) fn write_public(path: &Path, content: &[u8]) -> Result<(), PrivateFileError> {
    write_with_mode(path, content, 0o644)
}

/// Makes `path` and its parents; a directory made here is 0700.
pub(crate) fn create_directory(path: &Path) -> Result<(), PrivateFileError> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(PrivateFileError::io("create", path))
}

/// Removes `path`; that it is not there is what was wanted.
pub(crate) fn remove(path: &Path) -> Result<(), PrivateFileError> {
    match fs::remove_file(path) {
        Ok(()) => sync_directory(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(PrivateFileError::io("remove", path)(error)),
    }
}

/// Removes what a process that was killed while it wrote left in `directory`, whose only writer is the caller.
pub(crate) fn remove_temporary(directory: &Path) -> Result<(), PrivateFileError> {
    let entries = fs::read_dir(directory).map_err(PrivateFileError::io("list", directory))?;
    for entry in entries.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes()) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn write_with_mode(path: &Path, content: &[u8], mode: u32) -> Result<(), PrivateFileError> {
    let temporary = staged(path, content, mode)?;
    temporary.persist(path).map_err(|error| PrivateFileError::io("replace", path)(error.error))?;
    sync_directory(path)
}

/// A synced temporary file beside `path`, so that the rename stays within one file system. Missing directories are made.
fn staged(path: &Path, content: &[u8], mode: u32) -> Result<NamedTempFile, PrivateFileError> {
    create_directory(directory_of(path))?;
    let mut file = tempfile::Builder::new()
        .prefix(TEMPORARY)
        .tempfile_in(directory_of(path))
        .map_err(PrivateFileError::io("write beside", path))?;
    file.write_all(content).map_err(PrivateFileError::io("write", path))?;
    file.as_file()
        .set_permissions(Permissions::from_mode(mode))
        .map_err(PrivateFileError::io("set the mode of", path))?;
    file.as_file().sync_all().map_err(PrivateFileError::io("sync", path))?;
    Ok(file)
}

/// A rename is durable only once its directory is.
fn sync_directory(path: &Path) -> Result<(), PrivateFileError> {
    File::open(directory_of(path))
        .and_then(|directory| directory.sync_all())
        .map_err(PrivateFileError::io("sync the directory of", path))
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// How the name of a file that is being written begins.
const TEMPORARY: &str = ".tmp";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_private_file_is_0600_and_created_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        assert!(read(&path).unwrap().is_none());
        assert!(create(&path, b"one").unwrap());
        assert!(!create(&path, b"two").unwrap());
        assert_eq!(read(&path).unwrap().unwrap().as_slice(), b"one");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        write(&path, b"three").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().as_slice(), b"three");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary file is left");

        drop(staged(&path, b"killed while it wrote", 0o600).unwrap().keep().unwrap());
        remove_temporary(directory.path()).unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "what a killed writer left is removed");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        for mode in [0o640, 0o604, 0o644, 0o660] {
            write(&path, b"secret").unwrap();
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let message = read(&path).unwrap_err().to_string();
            assert!(message.contains("chmod 600") && !message.contains("secret\""), "{message}");
        }
    }
}
