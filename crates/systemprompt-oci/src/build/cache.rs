//! What earlier builds found out, so that a build reads only what changed and compresses only what is new.
//!
//! ```text
//! DIR/files          path -> (size, inode, mtime, ctime) -> content digest
//! DIR/layers/KEY     digest, diff id and size of the layer with that key
//! DIR/blobs/HEX      the compressed layer
//! ```
//!
//! Who can write in it decides what goes into images and which files were found free of secrets. So it must be its
//! user's own and closed to others, and never lie in a project, which may come from a stranger.
//!
//! Against accidents `files` and `layers/KEY` carry a checksum of their own, and a blob is digested each time it is used
//! (25 ms for the whole example). What does not fit is made again. Files younger than two seconds when read are not
//! remembered: they could change once more without their time stamps showing it.

use super::{
    BuildError,
    archive::{self, FileDigests, WrittenLayer},
    plan::PlannedLayer,
    scan,
};
use crate::{Descriptor, Digest, Digester, StoredLayer, media_type};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, DirBuilder, File, Metadata, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime},
};

const FILES: &str = "files";
const LAYERS: &str = "layers";
const BLOBS: &str = "blobs";
/// How names of files begin that are not finished yet.
const TEMPORARY: &str = ".tmp-";
/// How long a file's time stamps must have stood still before they prove anything.
const SETTLED: Duration = Duration::from_secs(2);
/// Layers and file records not used for so long are dropped.
const KEEP_UNUSED: Duration = Duration::from_hours(14 * 24);

/// Remembers files and layers between builds, in a folder of its own. Safe for several builds at once.
#[derive(Debug)]
pub struct LayerCache {
    dir: PathBuf,
    files: Mutex<HashMap<PathBuf, FileRecord>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    stamp: FileStamp,
    digest: Digest,
    /// By which rules it was found free of secrets.
    clean: Option<u32>,
    /// Days since 1970 of the last build that used it.
    used: u64,
}

/// What changes whenever a file does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct FileStamp {
    size: u64,
    inode: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl FileStamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.size(),
            inode: metadata.ino(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Both times lie safely in the past of `now`. A time in the future proves nothing either.
    fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let limit = now.saturating_sub(SETTLED);
        let limit = (i64::try_from(limit.as_secs()).unwrap_or(i64::MAX), i64::from(limit.subsec_nanos()));
        self.mtime <= limit && self.ctime <= limit
    }
}

/// A file's content, as far as a build needs it.
pub(crate) struct FileFacts {
    pub(crate) digest: Digest,
    pub(crate) secrets: Vec<(usize, scan::SecretKind)>,
}

#[derive(Serialize, Deserialize)]
struct LayerRecord {
    digest: Digest,
    diff_id: Digest,
    size: u64,
}

impl LayerCache {
    /// Opens the cache in `dir`, making the folder if needed and closing it to everybody else. A damaged cache is an
    /// empty one.
    ///
    /// # Errors
    /// When the folder cannot be made, is a link, or belongs to somebody else.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, BuildError> {
        let dir = dir.into();
        for folder in [dir.clone(), dir.join(LAYERS), dir.join(BLOBS)] {
            own_folder(&folder)?;
        }
        let files: Vec<(PathBuf, FileRecord)> = read_checked(&dir.join(FILES)).unwrap_or_default();
        Ok(Self { dir, files: Mutex::new(files.into_iter().collect()) })
    }

    /// Digest of the file's content, and its secrets when `scan` is set; read only when it may have changed.
    pub(crate) fn file(&self, path: &Path, expected_size: u64, scan: bool) -> Result<FileFacts, BuildError> {
        let read = |source| BuildError::Read { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(read)?;
        let stamp = FileStamp::of(&file.metadata().map_err(read)?);
        if stamp.size != expected_size {
            return Err(BuildError::Changed { path: path.to_owned() });
        }
        let now = SystemTime::now();
        if let Some(digest) = self.remembered(path, stamp, scan, now) {
            return Ok(FileFacts { digest, secrets: Vec::new() });
        }
        let facts = if scan { scan_file(&mut file) } else { digest_file(&mut file) }.map_err(read)?;
        if FileStamp::of(&file.metadata().map_err(read)?) != stamp {
            return Err(BuildError::Changed { path: path.to_owned() });
        }
        if stamp.is_settled(now) {
            let clean = (scan && facts.secrets.is_empty()).then_some(scan::RULES_VERSION);
            let record = FileRecord { stamp, digest: facts.digest, clean, used: today(now) };
            self.lock().insert(path.to_owned(), record);
        }
        Ok(facts)
    }

    fn remembered(&self, path: &Path, stamp: FileStamp, scan: bool, now: SystemTime) -> Option<Digest> {
        let mut files = self.lock();
        let record = files.get_mut(path)?;
        let is_known =
            record.stamp == stamp && stamp.is_settled(now) && (!scan || record.clean == Some(scan::RULES_VERSION));
        is_known.then(|| {
            record.used = today(now);
            record.digest
        })
    }

    /// The compressed layer: the cached one when it is there and whole, else written now. True: it was there.
    pub(crate) fn layer(&self, layer: &PlannedLayer, files: &FileDigests) -> Result<(StoredLayer, bool), BuildError> {
        let key = archive::layer_key(layer, files);
        let record_path = self.dir.join(LAYERS).join(key.hex());
        if let Some(stored) = read_checked(&record_path).and_then(|record| self.verified(&record)) {
            touch(&record_path);
            touch(&stored.path);
            return Ok((stored, true));
        }
        let cache = |source| BuildError::Cache { what: "storing a layer", source };
        let mut blob = temporary_file(&self.dir.join(BLOBS)).map_err(cache)?;
        let out = io::BufWriter::with_capacity(1 << 17, blob.as_file_mut());
        let WrittenLayer { digest, diff_id, size } = archive::write_layer(layer, files, out)?;
        let path = self.blob_path(digest);
        blob.persist(&path).map_err(|error| cache(error.error))?;
        write_checked(&record_path, &LayerRecord { digest, diff_id, size }).map_err(cache)?;
        Ok((stored_layer(digest, diff_id, size, path), false))
    }

    fn verified(&self, record: &LayerRecord) -> Option<StoredLayer> {
        let path = self.blob_path(record.digest);
        let mut file = File::open(&path).ok()?;
        let is_whole =
            file.metadata().ok()?.len() == record.size && digest_file(&mut file).ok()?.digest == record.digest;
        is_whole.then(|| stored_layer(record.digest, record.diff_id, record.size, path))
    }

    /// Writes down what was learnt about files and drops what was not used for two weeks. Losing it costs only time,
    /// so failures are logged and no more.
    pub(crate) fn save(&self) {
        let now = SystemTime::now();
        let oldest = today(now).saturating_sub(KEEP_UNUSED.as_secs() / SECONDS_PER_DAY);
        let mut records: Vec<_> = self.lock().iter().map(|(path, record)| (path.clone(), record.clone())).collect();
        records.retain(|(_, record)| record.used >= oldest);
        if let Err(error) = write_checked(&self.dir.join(FILES), &records) {
            tracing::warn!(%error, "the image cache could not be saved; the next build reads all files again");
        }
        for folder in [LAYERS, BLOBS] {
            remove_unused(&self.dir.join(folder), now);
        }
    }

    fn blob_path(&self, digest: Digest) -> PathBuf {
        self.dir.join(BLOBS).join(digest.hex())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<PathBuf, FileRecord>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn own_folder(path: &Path) -> Result<(), BuildError> {
    let refused = |why: String| BuildError::CacheFolder { path: path.to_owned(), why };
    let failed = |error: io::Error| refused(error.to_string());
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.is_dir() {
        return Err(refused("it is a link".to_owned()));
    }
    let (owner, you) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != you {
        return Err(refused(format!("it belongs to user {owner}, not to you (user {you})")));
    }
    if metadata.mode() & 0o077 != 0 {
        fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    Ok(())
}

fn temporary_file(folder: &Path) -> io::Result<tempfile::NamedTempFile> {
    tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder)
}

fn stored_layer(digest: Digest, diff_id: Digest, size: u64, path: PathBuf) -> StoredLayer {
    StoredLayer { descriptor: Descriptor::new(media_type::OCI_LAYER_GZIP, digest, size), diff_id, path }
}

fn scan_file(file: &mut File) -> io::Result<FileFacts> {
    let mut digester = Digester::new();
    let secrets = scan::scan(file, |part| digester.update(part))?;
    Ok(FileFacts { digest: digester.finish(), secrets })
}

fn digest_file(file: &mut File) -> io::Result<FileFacts> {
    let mut digester = Digester::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(FileFacts { digest: digester.finish(), secrets: Vec::new() }),
            Ok(count) => digester.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// First line: digest of the rest. `None` when absent, damaged or of another version.
fn read_checked<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    let line = bytes.iter().position(|&byte| byte == b'\n')?;
    let (digest, body) = (std::str::from_utf8(&bytes[..line]).ok()?, &bytes[line + 1..]);
    if digest.parse() != Ok(Digest::of(body)) {
        return None;
    }
    serde_json::from_slice(body).ok()
}

fn write_checked(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(value)?;
    let dir = path.parent().expect("all paths of the cache lie in its folder");
    let mut file = temporary_file(dir)?;
    file.write_all(format!("{}\n", Digest::of(&body)).as_bytes())?;
    file.write_all(&body)?;
    file.persist(path)?;
    Ok(())
}

fn touch(path: &Path) {
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(SystemTime::now()); // only makes it live longer
    }
}

/// Removes what has a name of the cache's own; what else somebody may keep there is not ours.
fn remove_unused(folder: &Path, now: SystemTime) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| is_name_of_ours(&entry.file_name())) {
        let age =
            entry.metadata().and_then(|metadata| metadata.modified()).map(|modified| now.duration_since(modified));
        if matches!(age, Ok(Ok(age)) if age > KEEP_UNUSED) {
            let _ = fs::remove_file(entry.path()); // another build may have been faster
        }
    }
}

fn is_name_of_ours(name: &OsStr) -> bool {
    let is_digest = |name: &str| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.to_str().is_some_and(|name| name.starts_with(TEMPORARY) || is_digest(name))
}

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

fn today(now: SystemTime) -> u64 {
    now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() / SECONDS_PER_DAY
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives the file a modification time of long ago; its change time stays, so it is handed in as `now`.
    fn stamp_of(path: &Path) -> FileStamp {
        FileStamp::of(&fs::metadata(path).expect("stat"))
    }

    #[test]
    fn only_settled_stamps_prove_anything() {
        let stamp = FileStamp { size: 1, inode: 1, mtime: (100, 5), ctime: (100, 5) };
        let at = |seconds, nanos| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos);
        assert!(!stamp.is_settled(at(102, 4)));
        assert!(stamp.is_settled(at(102, 5)));
        assert!(!stamp.is_settled(at(50, 0)), "a file from the future");
        assert!(!FileStamp { ctime: (500, 0), ..stamp }.is_settled(at(200, 0)));
    }

    #[test]
    fn a_fresh_file_is_read_each_time_and_a_settled_one_once() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("file");
        fs::write(&path, "one").expect("write");
        let cache = LayerCache::open(dir.path().join("cache")).expect("cache");
        assert_eq!(cache.file(&path, 3, true).expect("read").digest, Digest::of(b"one"));
        assert!(cache.lock().is_empty(), "fresh: not remembered");

        let later = SystemTime::now() + Duration::from_secs(10);
        let record =
            FileRecord { stamp: stamp_of(&path), digest: Digest::of(b"remembered"), clean: None, used: today(later) };
        cache.lock().insert(path.clone(), record);
        let known = |scan| cache.remembered(&path, stamp_of(&path), scan, later);
        assert_eq!(known(false), Some(Digest::of(b"remembered")));
        assert_eq!(known(true), None, "it was never scanned");
        fs::write(&path, "two").expect("write");
        assert_eq!(known(false), None, "another stamp");
    }

    #[test]
    fn a_damaged_index_is_an_empty_one() {
        let dir = tempfile::tempdir().expect("dir");
        let cache = LayerCache::open(dir.path()).expect("cache");
        let now = SystemTime::now();
        let record = |used| FileRecord {
            stamp: FileStamp { size: 1, inode: 2, mtime: (3, 4), ctime: (5, 6) },
            digest: Digest::of(b"x"),
            clean: Some(1),
            used,
        };
        cache.lock().insert("/new".into(), record(today(now)));
        cache.lock().insert("/old".into(), record(today(now) - 15));
        cache.save();
        let again = LayerCache::open(dir.path()).expect("cache");
        assert_eq!(again.lock().keys().collect::<Vec<_>>(), [Path::new("/new")]);
        let mut bytes = fs::read(dir.path().join(FILES)).expect("index");
        *bytes.last_mut().expect("not empty") ^= 1;
        fs::write(dir.path().join(FILES), bytes).expect("write");
        assert!(LayerCache::open(dir.path()).expect("cache").lock().is_empty());
    }
    #[test]
    fn only_old_files_of_its_own_are_removed() {
        let dir = tempfile::tempdir().expect("dir");
        let cache = LayerCache::open(dir.path()).expect("cache");
        let (old, new) = ("0f".repeat(32), "1e".repeat(32));
        let long_ago = SystemTime::now() - 2 * KEEP_UNUSED;
        for folder in [LAYERS, BLOBS] {
            for name in [&old, &new, ".tmp-abc", "diary.txt", &old[1..]] {
                let file = File::create(dir.path().join(folder).join(name)).expect("file");
                file.set_modified(if *name == new { SystemTime::now() } else { long_ago }).expect("time");
            }
            cache.save();
            let left = fs::read_dir(dir.path().join(folder)).expect("folder");
            let mut left: Vec<_> = left.map(|entry| entry.expect("entry").file_name()).collect();
            left.sort();
            assert_eq!(left, [&new, "diary.txt", &old[1..]], "{folder}");
        }
    }

    #[test]
    fn a_folder_that_others_may_decide_about_is_refused_or_closed() {
        let dir = tempfile::tempdir().expect("dir");
        let why = |path: &Path| LayerCache::open(path).expect_err("refused").to_string();
        let victim = dir.path().join("victim");
        fs::create_dir(&victim).expect("folder");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&victim, &link).expect("link");
        assert!(why(&link).contains("it is a link"), "{}", why(&link));
        let cache = dir.path().join("cache");
        fs::create_dir(&cache).expect("folder");
        std::os::unix::fs::symlink(&victim, cache.join(BLOBS)).expect("link");
        assert!(why(&cache).contains("it is a link"), "{}", why(&cache));

        // Root owns everything it makes and may give it away; everybody else finds something of root's.
        let foreign = if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&victim, Some(65534), None).expect("given away");
            victim
        } else {
            PathBuf::from("/usr")
        };
        assert!(why(&foreign).contains("belongs to user"), "{}", why(&foreign));

        let open = dir.path().join("open");
        fs::create_dir(&open).expect("folder");
        fs::set_permissions(&open, Permissions::from_mode(0o777)).expect("mode");
        LayerCache::open(&open).expect("ours");
        for folder in [open.clone(), open.join(BLOBS), open.join(LAYERS)] {
            assert_eq!(fs::metadata(&folder).expect("there").mode() & 0o777, 0o700, "{}", folder.display());
        }
    }
}
