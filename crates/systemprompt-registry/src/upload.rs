//! Uploads: a file each, whose length is the offset at which the client goes on.
//!
//! | state | where | becomes |
//! |---|---|---|
//! | open, in memory | file + [`Session`] (running digest) | open, on disk only, when a request is cut off |
//! | open, on disk only | file | open, in memory, by reading the file again |
//! | committed | blob and link | |
//! | expired | nothing | after a day without a write, or after ten minutes when another push would have no room |
//!
//! One request at a time works on an upload. The lock moves into the thread that writes, so that a request which is
//! cut off in the middle of a write keeps others out until that write has ended. Removal takes the lock as well: what
//! a client is told to be there is in the file that will be committed.

use crate::{
    Inner, StoreError,
    slots::{Held, Slots},
    store::{self, CommitError},
};
use bytes::Bytes;
use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::PathBuf,
    time::Duration,
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, Digester};
use uuid::Uuid;

/// Uploads that stood still for so long are removed.
pub(crate) const EXPIRES_AFTER: Duration = Duration::from_hours(24);
/// More open uploads than this are no push but an attack, or a client that never finishes.
const MAX_OPEN_PER_TENANT: usize = 64;
/// Uploads that stood still for so long make way when a push would be refused for their number or their bytes: a token
/// has ended meanwhile, and failed pushes must not keep the next one out for a day.
const YIELDS_AFTER: Duration = Duration::from_mins(10);

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
pub(crate) type Uploads = Slots<UploadKey, Session>;

/// An upload that no other request can touch.
pub(crate) struct LockedUpload {
    key: UploadKey,
    slot: Held<UploadKey, Session>,
}

/// The file and the digest of all that is in it.
pub(crate) struct Session {
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
    if store::listed(&folder)?.len() >= MAX_OPEN_PER_TENANT {
        remove_idle(inner, tenant, YIELDS_AFTER)?;
        if store::listed(&folder)?.len() >= MAX_OPEN_PER_TENANT {
            return Err(UploadError::TooManyOpen);
        }
    }
    let upload = Uuid::new_v4();
    let path = store.upload(tenant, upload);
    File::create_new(&path).map_err(StoreError::on("making", &path))?;
    Ok(upload)
}

/// Removes the tenant's uploads that stood still for so long and that no request works on; their sizes.
pub(crate) fn remove_idle(inner: &Inner, tenant: TenantId, limit: Duration) -> Result<Vec<u64>, StoreError> {
    let mut removed = Vec::new();
    for (path, metadata) in store::listed(&inner.store.uploads(tenant))? {
        let upload = path.file_name().and_then(|name| name.to_str()?.parse().ok());
        let (Some(upload), true) = (upload, store::is_older(&metadata, limit)) else { continue };
        let Some(mut slot) = inner.uploads.try_lock(UploadKey { tenant, upload }) else { continue };
        // It may have gone on, or ended, until the lock was ours.
        if fs::metadata(&path).is_ok_and(|metadata| store::is_older(&metadata, limit)) {
            *slot = None;
            store::remove_file(&path)?;
            removed.push(metadata.len());
        }
    }
    Ok(removed)
}

impl LockedUpload {
    /// Waits for the request that works on the upload now, if any.
    pub(crate) async fn lock(inner: &Inner, key: UploadKey) -> Self {
        Self { key, slot: inner.uploads.lock(key).await }
    }

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
        if committed.is_err() {
            self.remove(inner)?;
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
        store::remove_file(&self.path(inner))
    }

    fn session(&mut self, inner: &Inner) -> Result<&mut Session, UploadError> {
        if self.slot.is_none() {
            *self.slot = Some(Session::load(inner, self.key)?);
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
    let fits = || -> Result<bool, StoreError> {
        let total = used.saturating_add(inner.store.staged_bytes(tenant)?).saturating_add(length);
        Ok(total <= config.tenant_quota_bytes)
    };
    // The upload that asks is locked and stays.
    if fits()? || (!remove_idle(inner, tenant, YIELDS_AFTER)?.is_empty() && fits()?) {
        Ok(())
    } else {
        Err(UploadError::QuotaExceeded)
    }
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
