//! Files that only their owner may read: whole or absent, never half, never seen by others, never through a link.
//!
//! * The directory (`.systemprompt`) is opened without following a link, must be ours, and loses the write permission
//!   of everybody else; from then on every step goes through that open directory, so it cannot be exchanged meanwhile.
//! * A write holds the directory's advisory lock, makes sure that git ignores the file, writes a temporary file that
//!   is born 0600, syncs it, renames it over the old one and syncs the directory.
//! * The temporary file has one name per target: under the lock a leftover of a killed process is replaced, so none
//!   ever pile up.

use rustix::{
    fs::{
        AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, fchmod, flock, fstat, fsync, mkdirat, openat, renameat,
        unlinkat,
    },
    io::Errno,
};
use std::{
    ffi::OsStr,
    fs::File,
    io::{Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

const PRIVATE: Mode = Mode::from_raw_mode(0o600);
const PRIVATE_DIR: Mode = Mode::from_raw_mode(0o700);
const OTHERS_MAY_WRITE: Mode = Mode::from_raw_mode(0o022);
const IGNORE_FILE: &str = ".gitignore";
const IGNORE_ALL: &str = "*";
/// Larger is none of ours.
const MAX_SIZE: u64 = 8 * 1024 * 1024;
const LOCK_WITHIN: Duration = Duration::from_secs(30);
const LOCK_PAUSE: Duration = Duration::from_millis(2);

/// Why a private file was not read or written. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The system's own reason.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Errno,
    },
    /// A link could lead anywhere.
    #[error("{} is a symbolic link; secrets are kept in plain files only: remove the link", .0.display())]
    Link(PathBuf),
    /// A FIFO, a device, a directory.
    #[error("{} is not a plain file: remove it", .0.display())]
    NotAFile(PathBuf),
    /// Somebody else could exchange what is in it.
    #[error("{} belongs to user {owner}, not to you (user {you}): use a project of your own", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// The effective user.
        you: u32,
    },
    /// Another process holds the lock.
    #[error("another systemprompt has been writing in {} for {} seconds: end it and try again", path.display(), LOCK_WITHIN.as_secs())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// The path has no file name or no directory.
    #[error("{} does not name a file", .0.display())]
    NoName(PathBuf),
    /// Not one of ours.
    #[error("{} is larger than {MAX_SIZE} bytes", .0.display())]
    TooLarge(PathBuf),
}

/// The content of `path`; none when it, or its directory, does not exist.
///
/// # Errors
/// [`PrivateFileError`].
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, PrivateFileError> {
    match Directory::open(path)? {
        Some(directory) => directory.read(),
        None => Ok(None),
    }
}

/// Replaces the content of `path` as a whole.
///
/// # Errors
/// [`PrivateFileError`]; the old content stays.
pub(crate) fn write(path: &Path, content: &[u8]) -> Result<(), PrivateFileError> {
    update(path, |_| Ok((content.to_vec(), ())))
}

/// Reads, changes and replaces `path` with nobody in between; `change` gets none when there is no file yet.
///
/// # Errors
/// What `change` says, or [`PrivateFileError`]; the old content stays.
pub(crate) fn update<T, E: From<PrivateFileError>>(
    path: &Path,
    change: impl FnOnce(Option<Vec<u8>>) -> Result<(Vec<u8>, T), E>,
) -> Result<T, E> {
    let directory = Directory::open_or_create(path)?;
    let _lock = directory.lock()?;
    let (content, value) = change(directory.read()?)?;
    directory.ensure_ignored()?;
    directory.replace(directory.name, &content)?;
    Ok(value)
}

/// Removes `path`; whether there was one.
///
/// # Errors
/// [`PrivateFileError`].
pub(crate) fn remove(path: &Path) -> Result<bool, PrivateFileError> {
    let Some(directory) = Directory::open(path)? else { return Ok(false) };
    let _lock = directory.lock()?;
    match unlinkat(&directory.fd, directory.name, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(source) => Err(directory.error("remove", source)),
    }
}

/// The open directory of one file.
struct Directory<'a> {
    fd: OwnedFd,
    path: &'a Path,
    parent: &'a Path,
    name: &'a OsStr,
}

impl<'a> Directory<'a> {
    fn open(path: &'a Path) -> Result<Option<Self>, PrivateFileError> {
        let no_name = || PrivateFileError::NoName(path.to_owned());
        let name = path.file_name().ok_or_else(no_name)?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).ok_or_else(no_name)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat(CWD, directory, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) if directory.is_symlink() => {
                return Err(PrivateFileError::Link(directory.to_owned()));
            }
            Err(source) => return Err(io("open", directory, source)),
        };
        let opened = Self { fd, path, parent: directory, name };
        opened.keep_others_out()?;
        Ok(Some(opened))
    }

    fn open_or_create(path: &'a Path) -> Result<Self, PrivateFileError> {
        if let Some(opened) = Self::open(path)? {
            return Ok(opened);
        }
        let directory = path.parent().ok_or_else(|| PrivateFileError::NoName(path.to_owned()))?;
        match mkdirat(CWD, directory, PRIVATE_DIR) {
            // Another process may have been faster.
            Ok(()) | Err(Errno::EXIST) => {}
            Err(source) => return Err(io("create", directory, source)),
        }
        Self::open(path)?.ok_or_else(|| io("open", directory, Errno::NOENT))
    }

    fn keep_others_out(&self) -> Result<(), PrivateFileError> {
        let stat = fstat(&self.fd).map_err(|source| io("look at", self.parent, source))?;
        let you = rustix::process::geteuid().as_raw();
        if stat.st_uid != you {
            return Err(PrivateFileError::Foreign { path: self.parent.to_owned(), owner: stat.st_uid, you });
        }
        let mode = Mode::from_raw_mode(stat.st_mode);
        if mode.intersects(OTHERS_MAY_WRITE) {
            fchmod(&self.fd, mode - OTHERS_MAY_WRITE).map_err(|source| io("protect", self.parent, source))?;
        }
        Ok(())
    }

    /// Advisory, on an open directory of its own, so threads exclude each other too; released when dropped.
    fn lock(&self) -> Result<OwnedFd, PrivateFileError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = openat(&self.fd, c".", flags, Mode::empty()).map_err(|source| io("lock", self.parent, source))?;
        let deadline = Instant::now() + LOCK_WITHIN;
        loop {
            match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(fd),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    return Err(PrivateFileError::Locked { path: self.parent.to_owned() });
                }
                Err(source) => return Err(io("lock", self.parent, source)),
            }
        }
    }

    fn read(&self) -> Result<Option<Vec<u8>>, PrivateFileError> {
        self.close_to_others();
        self.read_named(self.name, self.path)
    }

    /// Others could read what another program left here; from now on they cannot.
    fn close_to_others(&self) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(fd) = openat(&self.fd, self.name, flags, Mode::empty()) else { return };
        let Ok(stat) = fstat(&fd) else { return };
        let is_open = stat.st_mode & 0o077 != 0 && FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if is_open && fchmod(&fd, Mode::RUSR | Mode::WUSR).is_ok() {
            tracing::warn!(path = %self.path.display(), "others could read this file; its mode is 0600 now");
        }
    }

    fn read_named(&self, name: impl rustix::path::Arg, path: &Path) -> Result<Option<Vec<u8>>, PrivateFileError> {
        // NONBLOCK: a FIFO in its place must not hang us.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(PrivateFileError::Link(path.to_owned())),
            Err(Errno::NXIO) => return Err(PrivateFileError::NotAFile(path.to_owned())),
            Err(source) => return Err(io("open", path, source)),
        };
        let stat = fstat(&fd).map_err(|source| io("look at", path, source))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(PrivateFileError::NotAFile(path.to_owned()));
        }
        let mut content = Vec::new();
        let read = File::from(fd).take(MAX_SIZE + 1).read_to_end(&mut content);
        read.map_err(|error| io("read", path, errno(&error)))?;
        if content.len() as u64 > MAX_SIZE {
            return Err(PrivateFileError::TooLarge(path.to_owned()));
        }
        Ok(Some(content))
    }

    fn ensure_ignored(&self) -> Result<(), PrivateFileError> {
        let path = self.parent.join(IGNORE_FILE);
        let rules = self.read_named(IGNORE_FILE, &path)?.unwrap_or_default();
        let rules = String::from_utf8_lossy(&rules);
        match missing_rule(&rules, &self.name.to_string_lossy()) {
            Some(complete) => self.replace(IGNORE_FILE.as_ref(), complete.as_bytes()),
            None => Ok(()),
        }
    }

    fn replace(&self, name: &OsStr, content: &[u8]) -> Result<(), PrivateFileError> {
        if let Ok(stat) = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {}
                FileType::Symlink => return Err(PrivateFileError::Link(self.parent.join(name))),
                _ => return Err(PrivateFileError::NotAFile(self.parent.join(name))),
            }
        }
        let temporary = temporary_name(name);
        let written = self.write_temporary(&temporary, content).and_then(|()| {
            renameat(&self.fd, &temporary, &self.fd, name)?;
            fsync(&self.fd)
        });
        written.map_err(|source| {
            // The old file is untouched; the error that matters is the first.
            let _ = unlinkat(&self.fd, &temporary, AtFlags::empty());
            io("write", &self.parent.join(name), source)
        })
    }

    fn write_temporary(&self, temporary: &OsStr, content: &[u8]) -> Result<(), Errno> {
        match unlinkat(&self.fd, temporary, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = openat(&self.fd, temporary, flags, PRIVATE)?;
        // A umask such as 0777 takes away what the owner needs.
        fchmod(&fd, PRIVATE)?;
        let mut file = File::from(fd);
        file.write_all(content).map_err(|error| errno(&error))?;
        fsync(&file)
    }

    fn error(&self, action: &'static str, source: Errno) -> PrivateFileError {
        io(action, self.path, source)
    }
}

/// The ignore file with a rule added, when none of its rules covers `name`; the last rule that matches decides.
fn missing_rule(rules: &str, name: &str) -> Option<String> {
    let covers = |rule: &str| rule == IGNORE_ALL || rule.trim_start_matches("**").trim_start_matches('/') == name;
    let ignored = rules.lines().map(str::trim_end).fold(false, |ignored, line| match line.strip_prefix('!') {
        Some(rule) if covers(rule) => false,
        None if covers(line) => true,
        _ => ignored,
    });
    let separator = if rules.is_empty() || rules.ends_with('\n') { "" } else { "\n" };
    (!ignored).then(|| format!("{rules}{separator}{IGNORE_ALL}\n"))
}

fn temporary_name(name: &OsStr) -> std::ffi::OsString {
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".tmp");
    temporary
}

fn io(action: &'static str, path: &Path, source: Errno) -> PrivateFileError {
    PrivateFileError::Io { action, path: path.to_owned(), source }
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::missing_rule;

    #[test]
    fn a_rule_is_added_only_where_none_covers_the_file() {
        assert_eq!(missing_rule("", "a.json").as_deref(), Some("*\n"));
        assert_eq!(missing_rule("docker/", "a.json").as_deref(), Some("docker/\n*\n"));
        assert_eq!(missing_rule("a.json\n!a.json\n", "a.json").as_deref(), Some("a.json\n!a.json\n*\n"));
        for enough in ["*", "*\n", "a.json\n", "/a.json", "**/a.json\n", "x\n*\n!profiles/\n"] {
            assert_eq!(missing_rule(enough, "a.json"), None, "{enough:?}");
        }
    }
}
