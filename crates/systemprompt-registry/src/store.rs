//! The files. Everything here blocks; [`crate::Registry`] calls it on threads of its own.

use crate::{OpenError, RegistryConfig, StoreError};
use rustix::fs::FlockOperation;
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, Digester};
use uuid::Uuid;

/// Room that a large upload must leave on the disk for everything small: manifests, links, tags.
const DISK_RESERVE_BYTES: u64 = 1 << 20;

pub(crate) struct Store {
    pub(crate) config: RegistryConfig,
    /// Read: a look at links and what follows from it. Write: removal.
    sweep: RwLock<()>,
    /// Quota checks and the link that uses the quota up.
    quota: Mutex<()>,
    /// Held open: the lock ends with the process, however it ends.
    _lock: File,
}

/// Why an upload did not become a blob.
#[derive(Debug)]
pub(crate) enum CommitError {
    QuotaExceeded,
    /// The staged file is gone: another request finished or removed the upload.
    Gone,
    Store(StoreError),
}

impl From<StoreError> for CommitError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Store {
    pub(crate) fn open(config: RegistryConfig) -> Result<Self, OpenError> {
        let root = config.root.clone();
        for folder in ["tmp", "blobs", "tenants"] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(StoreError::on("making the folder", &path))?;
        }
        let lock_path = root.join("lock");
        let lock = File::options()
            .create(true)
            .append(true)
            .open(&lock_path)
            .map_err(StoreError::on("opening", &lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::Locked { root }),
            Err(error) => return Err(StoreError::on("locking", &lock_path)(error.into()).into()),
        }
        let store = Self { config, sweep: RwLock::default(), quota: Mutex::default(), _lock: lock };
        for (path, _) in listed(&store.root().join("tmp"))? {
            remove_file(&path)?;
        }
        Ok(store)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.config.root
    }
    pub(crate) fn blobs(&self) -> PathBuf {
        self.root().join("blobs")
    }
    pub(crate) fn blob(&self, digest: Digest) -> PathBuf {
        self.blobs().join(digest.hex())
    }
    pub(crate) fn tenants(&self) -> PathBuf {
        self.root().join("tenants")
    }
    pub(crate) fn tenant(&self, tenant: TenantId) -> PathBuf {
        self.tenants().join(tenant.to_string())
    }
    pub(crate) fn links(&self, tenant: TenantId) -> PathBuf {
        self.tenant(tenant).join("links")
    }
    pub(crate) fn link(&self, tenant: TenantId, digest: Digest) -> PathBuf {
        self.links(tenant).join(digest.hex())
    }
    pub(crate) fn checked(&self, tenant: TenantId, digest: Digest) -> PathBuf {
        self.tenant(tenant).join("checked").join(digest.hex())
    }
    pub(crate) fn manifests(&self, tenant: TenantId) -> PathBuf {
        self.tenant(tenant).join("manifests")
    }
    pub(crate) fn uploads(&self, tenant: TenantId) -> PathBuf {
        self.tenant(tenant).join("uploads")
    }
    pub(crate) fn upload(&self, tenant: TenantId, upload: Uuid) -> PathBuf {
        self.uploads(tenant).join(upload.hyphenated().to_string())
    }
    pub(crate) fn tag_path(&self, tenant: TenantId) -> PathBuf {
        self.tenant(tenant).join("tag")
    }

    /// Nothing is removed while it is held.
    pub(crate) fn hold(&self) -> RwLockReadGuard<'_, ()> {
        self.sweep.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody looks at a link while it is held.
    pub(crate) fn hold_for_removal(&self) -> RwLockWriteGuard<'_, ()> {
        self.sweep.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size of a blob that this tenant has pushed and that is wholly there; marks it as just used.
    pub(crate) fn use_blob(&self, tenant: TenantId, digest: Digest) -> Result<Option<u64>, StoreError> {
        let _held = self.hold();
        let link = self.link(tenant, digest);
        let Some(file) = opened(&link, File::options().append(true))? else { return Ok(None) };
        let blob = self.blob(digest);
        let size = match fs::metadata(&blob) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::on("reading", &blob)(error)),
        };
        file.set_modified(SystemTime::now()).map_err(StoreError::on("touching", &link))?;
        Ok(Some(size))
    }

    /// Takes the tenant's link away, and what was found out about the blob. Held for removal.
    pub(crate) fn remove_link(&self, tenant: TenantId, digest: Digest) -> Result<(), StoreError> {
        remove_file(&self.checked(tenant, digest))?;
        remove_file(&self.link(tenant, digest))
    }

    /// Reads the whole blob; when its content has another digest than its name, it goes with the tenant's link, so that
    /// it counts as absent for everybody and can be pushed again. True when it was damaged.
    pub(crate) fn remove_if_damaged(&self, tenant: TenantId, digest: Digest) -> Result<bool, StoreError> {
        let blob = self.blob(digest);
        let Some(mut file) = opened(&blob, File::options().read(true))? else { return Ok(false) };
        let read = |file: &mut File| -> io::Result<(Digest, fs::Metadata)> {
            let mut digester = Digester::new();
            let mut buffer = vec![0; 1 << 17];
            loop {
                match file.read(&mut buffer) {
                    Ok(0) => return Ok((digester.finish(), file.metadata()?)),
                    Ok(count) => digester.update(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        };
        let (found, damaged) = read(&mut file).map_err(StoreError::on("reading", &blob))?;
        if found == digest {
            return Ok(false);
        }
        let _held = self.hold_for_removal();
        // Unless it was pushed again meanwhile: then it is another file.
        if fs::metadata(&blob).is_ok_and(|now| (now.dev(), now.ino()) == (damaged.dev(), damaged.ino())) {
            tracing::error!(%tenant, %digest, %found, "a stored blob was damaged; it is removed and has to be pushed again");
            remove_file(&blob)?;
            self.remove_link(tenant, digest)?;
        }
        Ok(true)
    }

    /// Turns a staged upload, whose content is known to have this digest, into a blob of the tenant.
    pub(crate) fn commit_blob(&self, tenant: TenantId, staged: &Path, digest: Digest) -> Result<(), CommitError> {
        let Some(file) = opened(staged, File::options().append(true))? else { return Err(CommitError::Gone) };
        // On disk before it has a name, so that the name never stands for half a content.
        file.sync_all().map_err(StoreError::on("writing", staged))?;
        let size = file.metadata().map_err(StoreError::on("reading", staged))?.len();
        let (blob, link) = (self.blob(digest), self.link(tenant, digest));
        {
            let _held = self.hold();
            let _counted = self.quota.lock().unwrap_or_else(PoisonError::into_inner);
            make_folder(&self.links(tenant))?;
            if !link.exists() && self.used_bytes(tenant)?.saturating_add(size) > self.config.tenant_quota_bytes {
                return Err(CommitError::QuotaExceeded);
            }
            match fs::rename(staged, &blob) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(CommitError::Gone),
                Err(error) => return Err(StoreError::on("naming", &blob)(error).into()),
            }
            let link_file = File::create(&link).map_err(StoreError::on("writing", &link))?;
            link_file.set_modified(SystemTime::now()).map_err(StoreError::on("touching", &link))?;
        }
        // Order does not matter: a link whose blob is not there counts as none.
        sync_folder(&self.blobs())?;
        sync_folder(&self.links(tenant))?;
        Ok(())
    }

    /// Bytes of all blobs and manifests of the tenant.
    pub(crate) fn used_bytes(&self, tenant: TenantId) -> Result<u64, StoreError> {
        let mut used = size_of_folder(&self.manifests(tenant))?;
        for (link, _) in listed(&self.links(tenant))? {
            let Some(digest) = digest_of(&link) else { continue };
            used += fs::metadata(self.blob(digest)).map_or(0, |metadata| metadata.len());
        }
        Ok(used)
    }

    /// Bytes of all unfinished uploads of the tenant.
    pub(crate) fn staged_bytes(&self, tenant: TenantId) -> Result<u64, StoreError> {
        size_of_folder(&self.uploads(tenant))
    }

    /// Whether a file of this size still fits on the disk.
    pub(crate) fn has_room_for(&self, size: u64) -> Result<bool, StoreError> {
        let stat = rustix::fs::statvfs(self.root())
            .map_err(|error| StoreError::on("looking for room in", self.root())(error.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize) >= size.saturating_add(DISK_RESERVE_BYTES))
    }

    /// Digest behind the tenant's tag, if its manifest is there.
    pub(crate) fn tag(&self, tenant: TenantId) -> Result<Option<Digest>, StoreError> {
        let digest = self.read_tag(tenant)?;
        Ok(digest.filter(|digest| self.manifests(tenant).join(digest.hex()).is_file()))
    }

    pub(crate) fn read_tag(&self, tenant: TenantId) -> Result<Option<Digest>, StoreError> {
        let text = read(&self.tag_path(tenant))?;
        Ok(text.and_then(|text| std::str::from_utf8(&text).ok()?.trim().parse().ok()))
    }

    pub(crate) fn manifest(&self, tenant: TenantId, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        read(&self.manifests(tenant).join(digest.hex()))
    }

    /// The manifest for somebody who relies on it; marks it as just used.
    pub(crate) fn use_manifest(&self, tenant: TenantId, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        let _held = self.hold();
        let path = self.manifests(tenant).join(digest.hex());
        let Some(file) = opened(&path, File::options().append(true))? else { return Ok(None) };
        file.set_modified(SystemTime::now()).map_err(StoreError::on("touching", &path))?;
        read(&path)
    }

    /// Writes a small file so that it is either the old one or the new one, whatever happens.
    pub(crate) fn write(&self, path: &Path, content: &[u8]) -> Result<(), StoreError> {
        let folder = path.parent().expect("all paths of the store lie below its root");
        make_folder(folder)?;
        let mut file = tempfile::NamedTempFile::new_in(self.root().join("tmp"))
            .map_err(StoreError::on("making a file for", path))?;
        file.write_all(content).map_err(StoreError::on("writing", path))?;
        file.as_file().sync_all().map_err(StoreError::on("writing", path))?;
        file.persist(path).map_err(|error| StoreError::on("naming", path)(error.error))?;
        sync_folder(folder)
    }
}

/// The digest that a file of the store is named after.
pub(crate) fn digest_of(path: &Path) -> Option<Digest> {
    Digest::from_hex(path.file_name()?.to_str()?).ok()
}

/// The content of a file that may be absent.
pub(crate) fn read(path: &Path) -> Result<Option<Vec<u8>>, StoreError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::on("reading", path)(error)),
    }
}

/// The files of a folder with what is known about each; nothing when the folder is absent.
pub(crate) fn listed(folder: &Path) -> Result<Vec<(PathBuf, fs::Metadata)>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::on("reading", folder)(error)),
    };
    let mut listed = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::on("reading", folder))?;
        match entry.metadata() {
            Ok(metadata) => listed.push((entry.path(), metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // finished meanwhile
            Err(error) => return Err(StoreError::on("reading", &entry.path())(error)),
        }
    }
    Ok(listed)
}

/// A time in the future counts as now: a clock that was set back removes nothing.
pub(crate) fn is_older(metadata: &fs::Metadata, limit: Duration) -> bool {
    metadata.modified().ok().and_then(|time| time.elapsed().ok()).is_some_and(|age| age >= limit)
}

fn size_of_folder(folder: &Path) -> Result<u64, StoreError> {
    Ok(listed(folder)?.iter().map(|(_, metadata)| metadata.len()).sum())
}

/// Opens a file that may be absent.
pub(crate) fn opened(path: &Path, options: &fs::OpenOptions) -> Result<Option<File>, StoreError> {
    match options.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::on("opening", path)(error)),
    }
}

/// Removes a file that may be gone already.
pub(crate) fn remove_file(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::on("removing", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a folder below the tenants, and it durable.
pub(crate) fn make_folder(folder: &Path) -> Result<(), StoreError> {
    if folder.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(StoreError::on("making the folder", folder))?;
    for above in folder.ancestors().skip(1).take(2) {
        sync_folder(above)?;
    }
    Ok(())
}

/// Makes the names in a folder durable. A folder that is gone, since all in it was collected, has none.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), StoreError> {
    match File::open(folder).and_then(|folder| folder.sync_all()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::on("syncing", folder)(error)),
        _ => Ok(()),
    }
}
