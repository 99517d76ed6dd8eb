//! Unpacks a layer that a stranger made, below one directory and nowhere else.
//!
//! Every name is resolved by the kernel with `openat2(RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)`, component by
//! component, so neither `..`, nor an absolute path, nor a link planted by an earlier entry leads outside. Nothing
//! is ever opened for writing that exists already. Owners, set-id bits, write permissions, times and extended
//! attributes are not taken over: everything belongs to us and everybody may read it.

use super::tar::{self, Entry, EntryKind, TarError, is_archive_error};
use crate::DriverError;
use rustix::{
    fs::{
        AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, chmodat, fchmod, linkat, mkdirat, openat2, statat,
        symlinkat, unlinkat,
    },
    io::Errno,
};
use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{self, Read},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

/// How much an image may hold, all layers together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caps {
    pub(crate) bytes: u64,
    pub(crate) entries: u64,
}

impl Default for Caps {
    fn default() -> Self {
        Self { bytes: 8 << 30, entries: 400_000 }
    }
}

const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);
/// Deepest path.
const MAX_DEPTH: usize = 64;
/// Longest path in bytes, and longest component.
const MAX_PATH: usize = 4096;
const MAX_NAME: usize = 255;

/// Why a layer was not unpacked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExtractError {
    #[error("{0}")]
    Tar(#[from] TarError),
    #[error("the image holds {what}: {path:?}")]
    Refused { what: &'static str, path: String },
    #[error("the image is too large: expected at most {limit} {what}")]
    TooLarge { what: &'static str, limit: u64 },
    #[error("writing {path:?}: {source}")]
    Write { path: String, source: io::Error },
}

impl From<ExtractError> for DriverError {
    fn from(error: ExtractError) -> Self {
        match error {
            ExtractError::Write { source, .. } if source.kind() == io::ErrorKind::StorageFull => source.into(),
            ExtractError::Tar(TarError::Read(source)) if !is_archive_error(&source) => source.into(),
            ExtractError::Write { .. } => Self::Transient(format!("the image could not be unpacked: {error}")),
            error => Self::Rejected(error.to_string()),
        }
    }
}

impl ExtractError {
    fn refused(what: &'static str, path: &Path) -> Self {
        Self::Refused { what, path: path.to_string_lossy().chars().take(200).collect() }
    }
}

/// Unpacks the layers of one image, lowest first, into one directory.
#[derive(Debug)]
pub(crate) struct Extractor {
    root: OwnedFd,
    caps: Caps,
    bytes: u64,
    entries: u64,
}

impl Extractor {
    /// For an empty directory that nobody else writes to.
    pub(crate) fn new(root: &Path, caps: Caps) -> io::Result<Self> {
        Ok(Self { root: File::open(root)?.into(), caps, bytes: 0, entries: 0 })
    }

    /// Unpacks one layer over those below it.
    pub(crate) fn layer(&mut self, layer: impl Read) -> Result<(), ExtractError> {
        // An opaque directory hides what is below this layer, not what this layer itself put there.
        let mut own = OwnPaths::default();
        tar::walk(layer, |entry| {
            self.count(entry)?;
            let path = clean(&entry.path)?;
            if path.as_os_str().is_empty() {
                return Ok(());
            }
            match path.file_name().and_then(|name| name.as_bytes().strip_prefix(b".wh.")) {
                Some(b".wh..opq") => self.hide_all(&path, &own),
                Some(b"" | b"." | b"..") => Err(ExtractError::refused("a whiteout without a name", &path)),
                Some(name) => self.hide(&path, OsStr::from_bytes(name)),
                None => {
                    self.entry(&path, entry)?;
                    own.add(&path);
                    Ok(())
                }
            }
        })
    }

    /// Makes sure that a directory, or an empty file, is there to mount something on.
    pub(crate) fn mount_point(&mut self, path: &Path, kind: MountPoint) -> Result<(), ExtractError> {
        let path = clean(path)?;
        let (parent, name) = self.parent(&path)?;
        let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match (found, kind) {
            (Ok(FileType::Directory), MountPoint::Directory) | (Ok(FileType::RegularFile), MountPoint::File) => Ok(()),
            (Ok(_), _) => Err(ExtractError::refused("something else where the sandbox mounts", &path)),
            (Err(Errno::NOENT), MountPoint::Directory) => make_directory(&parent, name, &path),
            (Err(Errno::NOENT), MountPoint::File) => create(&parent, name, false).map(drop).map_err(write_error(&path)),
            (Err(error), _) => Err(write_error(&path)(error)),
        }
    }

    fn count(&mut self, entry: &Entry<'_>) -> Result<(), ExtractError> {
        self.entries += 1;
        self.bytes = self.bytes.saturating_add(entry.size);
        if self.entries > self.caps.entries {
            return Err(ExtractError::TooLarge { what: "entries", limit: self.caps.entries });
        }
        if self.bytes > self.caps.bytes {
            return Err(ExtractError::TooLarge { what: "bytes", limit: self.caps.bytes });
        }
        Ok(())
    }

    fn entry(&self, path: &Path, entry: &mut Entry<'_>) -> Result<(), ExtractError> {
        let (parent, name) = self.parent(path)?;
        match entry.kind {
            EntryKind::Directory => directory(&parent, name, path),
            EntryKind::File { executable } => {
                clear(&parent, name, path)?;
                let mut file = create(&parent, name, executable).map_err(write_error(path))?;
                entry.copy_to(&mut file).map_err(|source| copy_error(path, source))
            }
            EntryKind::Symlink => {
                if entry.link.as_os_str().is_empty() || entry.link.as_os_str().len() > MAX_PATH {
                    return Err(ExtractError::refused("a symbolic link without a usable target", path));
                }
                clear(&parent, name, path)?;
                // Where it points does not matter: only the sandbox follows it, inside its own root.
                symlinkat(&entry.link, &parent, name).map_err(write_error(path))
            }
            EntryKind::HardLink => self.hard_link(&parent, name, path, &entry.link),
            EntryKind::Other => Err(ExtractError::refused("a device, pipe or other special file", path)),
        }
    }

    /// To a regular file of the same image only.
    fn hard_link(&self, parent: &OwnedFd, name: &OsStr, path: &Path, target: &Path) -> Result<(), ExtractError> {
        let target = clean(target)?;
        let refused = || ExtractError::refused("a hard link to something that is no file of the image", path);
        if target == path {
            return Err(refused());
        }
        let (from, from_name) = self.existing_parent(&target).map_err(|_| refused())?;
        let stat = statat(&from, from_name, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| refused())?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(refused());
        }
        clear(parent, name, path)?;
        linkat(&from, from_name, parent, name, AtFlags::empty()).map_err(write_error(path))
    }

    /// Removes what a whiteout names.
    fn hide(&self, path: &Path, name: &OsStr) -> Result<(), ExtractError> {
        match self.existing_parent(path) {
            Ok((parent, _)) => clear(&parent, name, path),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(resolve_error(path)(error)),
        }
    }

    /// Empties the directory of an opaque marker, but for what this layer put there.
    fn hide_all(&self, path: &Path, own: &OwnPaths) -> Result<(), ExtractError> {
        let directory = path.parent().unwrap_or(Path::new(""));
        let opened = match self.open_directory(directory) {
            Err(Errno::NOENT) => return Ok(()),
            other => other.map_err(resolve_error(path))?,
        };
        for name in names(&opened).map_err(write_error(path))? {
            if !own.holds(&directory.join(&name)) {
                clear(&opened, &name, path)?;
            }
        }
        Ok(())
    }

    /// The directory an entry goes into, made when it is missing, and the entry's own name in it.
    fn parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), ExtractError> {
        match self.existing_parent(path) {
            Err(Errno::NOENT) => {}
            other => return other.map_err(resolve_error(path)),
        }
        let mut made = PathBuf::new();
        for component in path.parent().unwrap_or(Path::new("")) {
            let within = self.open_directory(&made).map_err(resolve_error(path))?;
            if matches!(statat(&within, component, AtFlags::SYMLINK_NOFOLLOW), Err(Errno::NOENT)) {
                make_directory(&within, component, path)?;
            }
            made.push(component);
        }
        self.existing_parent(path).map_err(resolve_error(path))
    }

    fn existing_parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), Errno> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        Ok((self.open_directory(path.parent().unwrap_or(Path::new("")))?, name))
    }

    fn open_directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        openat2(&self.root, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty(), resolve)
    }
}

/// Paths this layer has put down. Their hashes only: a layer may hold more names than fit into memory.
#[derive(Default)]
struct OwnPaths {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl OwnPaths {
    fn add(&mut self, path: &Path) {
        // A directory that is known has known ancestors.
        for ancestor in path.ancestors() {
            if !self.hashes.insert(self.hasher.hash_one(ancestor)) {
                break;
            }
        }
    }

    fn holds(&self, path: &Path) -> bool {
        self.hashes.contains(&self.hasher.hash_one(path))
    }
}

/// What is mounted on a path of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MountPoint {
    Directory,
    File,
}

/// The path below the root; `.` is the root itself, an absolute path and `..` are refused.
fn clean(path: &Path) -> Result<PathBuf, ExtractError> {
    if path.as_os_str().len() > MAX_PATH || path.components().count() > MAX_DEPTH {
        return Err(ExtractError::refused("a path that is too long or too deep", path));
    }
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) if name.len() > MAX_NAME || name.as_bytes().contains(&0) => {
                return Err(ExtractError::refused("a name that is too long", path));
            }
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            Component::RootDir => return Err(ExtractError::refused("an absolute path", path)),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(ExtractError::refused("a path that leads outside", path));
            }
        }
    }
    Ok(clean)
}

fn directory(parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), ExtractError> {
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Directory => Ok(()),
        Ok(_) => {
            clear(parent, name, path)?;
            make_directory(parent, name, path)
        }
        Err(Errno::NOENT) => make_directory(parent, name, path),
        Err(error) => Err(write_error(path)(error)),
    }
}

fn make_directory(parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), ExtractError> {
    // Nobody else writes here, and the umask may have taken permissions away.
    mkdirat(parent, name, DIRECTORY_MODE)
        .and_then(|()| chmodat(parent, name, DIRECTORY_MODE, AtFlags::empty()))
        .map_err(write_error(path))
}

/// Never follows and never overwrites; the caller has cleared the name.
fn create(parent: &OwnedFd, name: &OsStr, executable: bool) -> rustix::io::Result<File> {
    let mode = Mode::from_raw_mode(if executable { 0o755 } else { 0o644 });
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = openat2(parent, Path::new(name), flags, mode, resolve)?;
    fchmod(&file, mode)?;
    Ok(file.into())
}

/// Removes a name and what is below it; never follows a link.
fn clear(parent: &OwnedFd, name: &OsStr, path: &Path) -> Result<(), ExtractError> {
    remove(parent.as_fd(), name, 0).map_err(write_error(path))
}

fn remove(parent: BorrowedFd<'_>, name: &OsStr, depth: usize) -> rustix::io::Result<()> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) if depth <= MAX_DEPTH => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    for inner in names(&directory)? {
        remove(directory.as_fd(), &inner, depth + 1)?;
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn names(directory: &OwnedFd) -> rustix::io::Result<Vec<std::ffi::OsString>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            found.push(name.to_owned());
        }
    }
    Ok(found)
}

/// Running out of disk is this host's fault; a layer that breaks off is the layer's.
fn copy_error(path: &Path, source: io::Error) -> ExtractError {
    if is_archive_error(&source) {
        TarError::Read(source).into()
    } else {
        ExtractError::Write { path: path.to_string_lossy().into_owned(), source }
    }
}

fn write_error(path: &Path) -> impl FnOnce(Errno) -> ExtractError + '_ {
    |error| ExtractError::Write { path: path.to_string_lossy().into_owned(), source: error.into() }
}

/// Errors that a hostile path causes are the image's fault.
fn resolve_error(path: &Path) -> impl FnOnce(Errno) -> ExtractError + '_ {
    |error| match error {
        Errno::LOOP => ExtractError::refused("a path through a symbolic link", path),
        Errno::XDEV => ExtractError::refused("a path that leads outside", path),
        Errno::NOTDIR => ExtractError::refused("a path through something that is no directory", path),
        error => write_error(path)(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::tar::{Builder, EntryType, Header};
    use proptest::prelude::*;
    use std::{fs, os::unix::fs::PermissionsExt};

    /// A directory to unpack into, beside something that must stay as it is.
    struct Place {
        directory: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let directory = tempfile::tempdir().expect("directory");
            fs::create_dir(directory.path().join("root")).expect("root");
            fs::create_dir(directory.path().join("canary")).expect("canary");
            fs::write(directory.path().join("canary/file"), "canary").expect("canary");
            fs::set_permissions(directory.path().join("canary/file"), fs::Permissions::from_mode(0o600)).expect("mode");
            Self { directory }
        }

        fn unpack(&self, tar: &[u8], caps: Caps) -> Result<(), ExtractError> {
            Extractor::new(&self.directory.path().join("root"), caps).expect("extractor").layer(tar)
        }

        fn check_canary(&self) {
            let canary = self.directory.path().join("canary");
            assert_eq!(fs::read_dir(&canary).expect("canary").count(), 1);
            let file = canary.join("file");
            assert_eq!(fs::read_to_string(&file).expect("canary"), "canary");
            assert_eq!(fs::metadata(&file).expect("canary").permissions().mode() & 0o777, 0o600);
            assert_eq!(fs::read_dir(self.directory.path()).expect("directory").count(), 2);
        }
    }

    fn entry(tar: &mut Builder<Vec<u8>>, kind: EntryType, path: &[u8], link: &[u8], content: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o4777);
        header.set_size(content.len() as u64);
        let gnu = header.as_gnu_mut().expect("gnu");
        gnu.name[..path.len()].copy_from_slice(path);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_cksum();
        tar.append(&header, content).expect("entry");
    }

    fn files(count: usize, size: usize) -> Vec<u8> {
        let mut tar = Builder::new(Vec::new());
        for number in 0..count {
            entry(&mut tar, EntryType::Regular, format!("f{number}").as_bytes(), b"", &vec![0; size]);
        }
        tar.into_inner().expect("tar")
    }

    #[test]
    fn caps_hold_over_all_layers_together() {
        let caps = Caps { bytes: 10_000, entries: 10 };
        for (count, size, fits) in [(10, 1000, true), (11, 0, false), (2, 5001, false), (1, 10_000, true)] {
            let result = Place::new().unpack(&files(count, size), caps);
            assert_eq!(result.is_ok(), fits, "{count} of {size}: {result:?}");
            assert!(fits || matches!(result, Err(ExtractError::TooLarge { .. })));
        }
        let place = Place::new();
        let mut extractor = Extractor::new(&place.directory.path().join("root"), caps).expect("extractor");
        extractor.layer(&files(6, 0)[..]).expect("the first");
        assert!(extractor.layer(&files(6, 0)[..]).is_err(), "twelve in two layers");
    }

    #[test]
    fn a_claimed_size_is_refused_before_anything_is_read_for_it() {
        let mut header = Header::new_gnu();
        header.set_path("bomb").expect("path");
        header.set_mode(0o644);
        header.set_size(1 << 40);
        header.set_cksum();
        let result = Place::new().unpack(header.as_bytes(), Caps::default());
        assert!(matches!(result, Err(ExtractError::TooLarge { what: "bytes", .. })), "{result:?}");
    }

    /// Names that lead somewhere, combined at random from few parts, so that entries meet.
    fn name() -> impl Strategy<Value = String> {
        let part = prop_oneof![
            6 => Just("a"), 3 => Just("file"), 1 => Just(".."), 1 => Just("."), 1 => Just(""), 1 => Just("canary"),
            1 => Just(".wh.a"), 1 => Just(".wh..wh..opq"), 1 => Just(".wh.file"), 1 => Just("evil"),
        ];
        proptest::collection::vec(part, 1..4).prop_map(|parts| parts.join("/"))
    }

    fn target() -> impl Strategy<Value = String> {
        prop_oneof![Just("../canary".to_owned()), Just("../canary/file".to_owned()), Just("..".to_owned()), name(),]
    }

    fn kind() -> impl Strategy<Value = EntryType> {
        prop_oneof![
            4 => Just(EntryType::Regular),
            4 => Just(EntryType::Symlink),
            2 => Just(EntryType::Link),
            2 => Just(EntryType::Directory),
            1 => Just(EntryType::Fifo),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

        #[test]
        fn no_archive_reaches_what_is_beside_its_directory(
            entries in proptest::collection::vec((kind(), name(), target()), 1..12),
            cut in proptest::option::of(0..4000_usize),
        ) {
            let place = Place::new();
            // One archive per entry, so that a refused one does not save what an accepted one would reach later.
            for (kind, path, link) in &entries {
                let mut tar = Builder::new(Vec::new());
                let content: &[u8] = if kind.is_file() { b"evil" } else { b"" };
                entry(&mut tar, *kind, path.as_bytes(), link.as_bytes(), content);
                let mut tar = tar.into_inner().expect("tar");
                tar.truncate(cut.unwrap_or(tar.len()));
                let _ = place.unpack(&tar, Caps::default());
            }
            place.check_canary();
        }

        #[test]
        fn no_bytes_at_all_make_it_panic_or_reach_out(mut bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            // Half of them with a header whose checksum is right.
            if bytes.len() >= 512 && bytes[0] % 2 == 0 {
                let mut header = Header::from_byte_slice(&bytes[..512]).clone();
                header.set_cksum();
                bytes[..512].copy_from_slice(header.as_bytes());
            }
            let place = Place::new();
            let _ = place.unpack(&bytes, Caps { bytes: 1 << 20, entries: 100 });
            place.check_canary();
        }
    }
}
