//! Uploads: a file each, whose length is the offset at which the client goes on.
//!
//! | state | where | becomes |
//! |---|---|---|
//! | open, in memory | file + [`Session`] (running digest) | open, on disk only, when a request is cut off |
//! | open, on disk only | file | open, in memory, by reading the file again |
//! | committed | blob and link | |
//! | expired | nothing | after a day without a write, or ten minutes when the tenant's uploads take too much |
//!
//! One request at a time works on an upload. The lock moves into the thread that writes, so that a request which is
//! cut off in the middle of a write keeps others out until that write has ended.

use crate::{
    Inner, StoreError,
    store::{self, CommitError},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, Digester};
use tokio::sync::OwnedMutexGuard;
use uuid::Uuid;

/// Uploads that stood still for so long are removed.
pub(crate) const EXPIRES_AFTER: Duration = Duration::from_hours(24);
/// More open uploads than this are no push but an attack, or a client that never finishes.
const MAX_OPEN_PER_TENANT: usize = 64;
/// Uploads that stood still for so long make way when a tenant's uploads become too many or too large: a token has
/// ended meanwhile, and failed pushes must not keep the next one out for a day.
const YIELDS_AFTER: Duration = Duration::from_mins(10);
/// Which part of the quota unfinished uploads may take before idle ones make way: one in so many.
const STAGING_SHARE: u64 = 4;

/// Which upload of which tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct UploadKey {
    pub(crate) tenant: TenantId,
    pub(crate) upload: Uuid,
}

/// Why an upload cannot go on.
#[derive(Debug)]
pub(crate) enum UploadError {
    /// No such upload of this tenant.
    Unknown,
    /// The client starts elsewhere than where the upload stands.
    Offset {
        at: u64,
    },
    TooManyOpen,
    BlobTooLarge {
        max: u64,
    },
    QuotaExceeded,
    DiskFull,
    DigestMismatch {
        got: Digest,
    },
    Store(StoreError),
}

impl From<StoreError> for UploadError {
    fn from(error: StoreError) -> Self {
        if error.is_full() { Self::DiskFull } else { Self::Store(error) }
    }
}

impl From<CommitError> for UploadError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::QuotaExceeded => Self::QuotaExceeded,
            CommitError::Gone => Self::Unknown,
            CommitError::Store(error) => error.into(),
        }
    }
}

/// The uploads that this process knows; all others are found by their files.
#[derive(Default)]
pub(crate) struct Uploads(Mutex<HashMap<UploadKey, Slot>>);

type Slot = Arc<tokio::sync::Mutex<Option<Session>>>;

impl Uploads {
    /// Waits for the request that works on the upload now, if any.
    pub(crate) async fn lock(&self, key: UploadKey) -> LockedUpload {
        let slot = self.slots().entry(key).or_default().clone();
        LockedUpload { key, slot: slot.lock_owned().await }
    }

    /// Drops what is kept about uploads that nobody works on; their files say the rest.
    pub(crate) fn forget_finished(&self) {
        self.slots().retain(|_, slot| Arc::strong_count(slot) > 1);
    }

    fn forget(&self, key: UploadKey) {
        self.slots().remove(&key);
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<UploadKey, Slot>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An upload that no other request can touch.
pub(crate) struct LockedUpload {
    key: UploadKey,
    slot: OwnedMutexGuard<Option<Session>>,
}

/// The file and the digest of all that is in it.
struct Session {
    file: File,
    digester: Digester,
    offset: u64,
    /// What the tenant had stored when this session began.
    used_bytes: u64,
}

/// Begins an upload.
pub(crate) fn begin(inner: &Inner, tenant: TenantId) -> Result<Uuid, UploadError> {
    let store = &inner.store;
    let folder = store.uploads(tenant);
    let _held = store.hold(); // a collection removes empty folders
    store::make_folder(&folder)?;
    if store::listed(&folder)?.len() >= MAX_OPEN_PER_TENANT
        || store.staged_bytes(tenant)? > store.config.tenant_quota_bytes / STAGING_SHARE
    {
        remove_idle(&folder)?;
    }
    if store::listed(&folder)?.len() >= MAX_OPEN_PER_TENANT {
        return Err(UploadError::TooManyOpen);
    }
    let upload = Uuid::new_v4();
    let path = store.upload(tenant, upload);
    File::create_new(&path).map_err(StoreError::on("making", &path))?;
    Ok(upload)
}

fn remove_idle(folder: &Path) -> Result<(), StoreError> {
    let now = SystemTime::now();
    for (path, metadata) in store::listed(folder)? {
        let age = metadata.modified().ok().and_then(|time| now.duration_since(time).ok());
        if age.is_some_and(|age| age > YIELDS_AFTER) {
            store::remove_file(&path)?;
        }
    }
    Ok(())
}

impl LockedUpload {
    /// Where the client goes on.
    pub(crate) fn offset(&mut self, inner: &Inner) -> Result<u64, UploadError> {
        Ok(self.session(inner)?.offset)
    }

    /// Refuses early what cannot end well: a wrong offset, or more bytes than may come.
    pub(crate) fn expect(&mut self, inner: &Inner, start: Option<u64>, length: Option<u64>) -> Result<(), UploadError> {
        let tenant = self.key.tenant;
        let session = self.session(inner)?;
        let (at, used) = (session.offset, session.used_bytes);
        if start.is_some_and(|start| start != at) {
            return Err(UploadError::Offset { at });
        }
        let length = length.unwrap_or(0);
        check_limits(inner, tenant, at, used, length)?;
        if inner.store.has_room_for(length)? { Ok(()) } else { Err(UploadError::DiskFull) }
    }

    /// Adds the next bytes. After an error the session is read again from the file; a full disk removes the upload, so
    /// that it does not stay full.
    pub(crate) fn append(mut self, inner: &Inner, chunks: &[Bytes]) -> Result<Self, UploadError> {
        self.session(inner)?;
        let mut session = self.slot.take().expect("just loaded");
        let length = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let path = self.path(inner);
        let appended = check_limits(inner, self.key.tenant, session.offset, session.used_bytes, length)
            .and_then(|()| session.write(chunks).map_err(|error| StoreError::on("writing", &path)(error).into()));
        match appended {
            Ok(()) => {
                *self.slot = Some(session);
                Ok(self)
            }
            Err(error) => {
                if matches!(
                    error,
                    UploadError::DiskFull | UploadError::BlobTooLarge { .. } | UploadError::QuotaExceeded
                ) {
                    self.remove(inner)?;
                }
                Err(error)
            }
        }
    }

    /// Makes the upload a blob when its content is what the client says; else it is removed.
    pub(crate) fn commit(mut self, inner: &Inner, digest: Digest) -> Result<(), UploadError> {
        let got = self.session(inner)?.digester.clone().finish();
        *self.slot = None;
        let committed = if got == digest {
            inner.store.commit_blob(self.key.tenant, &self.path(inner), digest).map_err(UploadError::from)
        } else {
            Err(UploadError::DigestMismatch { got })
        };
        match committed {
            Ok(()) => inner.uploads.forget(self.key),
            Err(_) => self.remove(inner)?,
        }
        committed
    }

    /// Gives the upload up.
    pub(crate) fn cancel(mut self, inner: &Inner) -> Result<(), UploadError> {
        self.session(inner)?;
        self.remove(inner).map_err(UploadError::from)
    }

    fn remove(mut self, inner: &Inner) -> Result<(), StoreError> {
        *self.slot = None;
        inner.uploads.forget(self.key);
        store::remove_file(&self.path(inner))
    }

    fn session(&mut self, inner: &Inner) -> Result<&mut Session, UploadError> {
        if self.slot.is_none() {
            match Session::load(inner, self.key) {
                Ok(session) => *self.slot = Some(session),
                Err(error) => {
                    inner.uploads.forget(self.key);
                    return Err(error);
                }
            }
        }
        Ok(self.slot.as_mut().expect("loaded above"))
    }

    fn path(&self, inner: &Inner) -> PathBuf {
        inner.store.upload(self.key.tenant, self.key.upload)
    }
}

fn check_limits(inner: &Inner, tenant: TenantId, at: u64, used: u64, length: u64) -> Result<(), UploadError> {
    let config = &inner.store.config;
    if at.saturating_add(length) > config.max_blob_bytes {
        return Err(UploadError::BlobTooLarge { max: config.max_blob_bytes });
    }
    let total = used.saturating_add(inner.store.staged_bytes(tenant)?).saturating_add(length);
    if total > config.tenant_quota_bytes { Err(UploadError::QuotaExceeded) } else { Ok(()) }
}

impl Session {
    /// Takes an upload up again from its file.
    fn load(inner: &Inner, key: UploadKey) -> Result<Self, UploadError> {
        let path = inner.store.upload(key.tenant, key.upload);
        let Some(mut file) = store::opened(&path, File::options().read(true).append(true))? else {
            return Err(UploadError::Unknown);
        };
        let (mut digester, mut offset) = (Digester::new(), 0);
        let mut buffer = vec![0; 1 << 17];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    digester.update(&buffer[..count]);
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(StoreError::on("reading", &path)(error).into()),
            }
        }
        let used_bytes = inner.store.used_bytes(key.tenant)?;
        Ok(Self { file, digester, offset, used_bytes })
    }

    fn write(&mut self, chunks: &[Bytes]) -> io::Result<()> {
        for chunk in chunks {
            self.file.write_all(chunk)?;
            self.digester.update(chunk);
            self.offset += chunk.len() as u64;
        }
        Ok(())
    }
}
