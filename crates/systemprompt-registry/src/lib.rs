//! The image registry: push and pull as the OCI distribution specification 1.1 says, on disk, a repository per tenant
//! behind one shared name.
//!
//! Every client sees the repository `systemprompt-images`. What is in it depends on the token: blobs, manifests, the
//! tag and uploads are looked up below the token's tenant and nowhere else, so "absent" and "not yours" are the same
//! lookup with the same answer. Contents are stored once; links say who may see them.
//!
//! ```text
//! ROOT/lock                          held by the running process
//! ROOT/tmp/                          files that have no name yet; emptied at the start
//! ROOT/blobs/HEX                     contents by digest, shared
//! ROOT/tenants/ID/links/HEX          this tenant has pushed the blob; its time is the last use
//! ROOT/tenants/ID/checked/HEX        verdict on a layer, so that it is read only once
//! ROOT/tenants/ID/manifests/HEX      manifests; the time is the last use
//! ROOT/tenants/ID/tag                digest of the manifest behind `tenant-ID`
//! ROOT/tenants/ID/uploads/UUID       an upload; its length is the offset
//! ```
//!
//! A crash leaves at most an upload that can go on, or a blob without a link that the next collection removes: a file
//! is complete and on disk before it gets its name, and a link without its blob counts as no link. A blob that is found
//! to have another content than its name says is removed, so that the next push sends it again.
//!
//! # Collection against pushes
//!
//! A push is many requests, so a lock around one request does not protect what an earlier one found. Two things
//! together do. Every request that tells a client "this blob is here" (HEAD, GET, mount, commit) sets the time of the
//! link to now, as [`Registry::image`] does with the manifest and its links, and [`Registry::collect_garbage`] spares
//! what is younger than `min_age`; so `min_age` must be longer than a push, and an hour is plenty for tokens of ten
//! minutes. And each such request holds the store's read lock from its look at the link to its touch, while a collection
//! holds the write lock from its last look at an age to that removal; so nothing is removed between a look and its touch.

mod error;
mod gc;
mod http;
mod image;
mod manifest;
mod slots;
mod store;
mod token;
mod upload;

pub use error::{ImageError, InvalidImage, OpenError, StoreError};
pub use gc::GcReport;
pub use token::{Grant, TokenKey};

use slots::Slots;
use std::{path::PathBuf, sync::Arc, time::Duration};
use store::Store;
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, StoredImage};
use tokio::{sync::Semaphore, task};
use upload::Uploads;

/// Where and how much.
#[derive(Debug, Clone)]
pub struct RegistryConfig {
    /// Folder of the registry alone; made if absent.
    pub root: PathBuf,
    /// Largest blob, in bytes.
    pub max_blob_bytes: u64,
    /// Most that one tenant may store, uploads included, in bytes. Contents shared with others count in full.
    pub tenant_quota_bytes: u64,
    /// Most that the layers of one image may unpack to together, in bytes: what the compute driver takes.
    pub max_unpacked_bytes: u64,
}

/// The registry. Clones share one store; the folder is released when the last of them and of its routers is dropped.
#[derive(Clone)]
pub struct Registry(Arc<Inner>);

struct Inner {
    store: Store,
    uploads: Uploads,
    key: TokenKey,
    /// Reading whole layers is costly, so few manifests are checked at once, and one of each tenant.
    checks: Arc<Semaphore>,
    turns: Slots<TenantId, ()>,
}

const PARALLEL_CHECKS: usize = 2;

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// Opens the store, making the folder if needed.
    ///
    /// # Errors
    /// [`OpenError::Locked`] when another process has it open.
    pub fn open(config: RegistryConfig, key: TokenKey) -> Result<Self, OpenError> {
        let store = Store::open(config)?;
        let checks = Arc::new(Semaphore::new(PARALLEL_CHECKS));
        Ok(Self(Arc::new(Inner { store, uploads: Uploads::default(), key, checks, turns: Slots::default() })))
    }

    /// `/v2/…`. Bodies are streamed; put no limit on body sizes and no timeout on whole requests around it.
    pub fn router(&self) -> axum::Router {
        http::router(self.clone())
    }

    /// Digest of the manifest behind the tenant's tag.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn resolve(&self, tenant: TenantId) -> Result<Option<Digest>, StoreError> {
        self.blocking(move |inner| inner.store.tag(tenant)).await
    }

    /// The image with this manifest, complete and fit to run on this machine, or why not. It counts as just used with all
    /// its blobs, so it stays for the next collections' `min_age` even if nothing else keeps it.
    ///
    /// # Errors
    /// [`ImageError`]
    pub async fn image(&self, tenant: TenantId, digest: &Digest) -> Result<StoredImage, ImageError> {
        let digest = *digest;
        self.blocking(move |inner| image::load(&inner.store, tenant, digest)).await
    }

    /// Reads every blob of the image and removes those that are damaged, so that the next push sends them again; how
    /// many there were. For an image that should unpack and does not.
    ///
    /// # Errors
    /// When the disk fails.
    pub async fn remove_damaged(&self, tenant: TenantId, digest: &Digest) -> Result<usize, StoreError> {
        let digest = *digest;
        self.blocking(move |inner| image::remove_damaged(&inner.store, tenant, digest)).await
    }

    /// Removes what nothing needs: manifests that are neither in `keep` nor younger than `min_age`, links that no
    /// remaining manifest needs and that were not used for `min_age`, blobs without a link, and uploads that stood
    /// still for a day. A tag whose manifest goes, goes too. Idempotent; pushes may go on meanwhile (see the crate's
    /// documentation for why that is safe and how long `min_age` must be).
    ///
    /// `keep` must name every release that may still be started, pending ones included.
    ///
    /// # Errors
    /// When the disk fails; what was removed until then is gone, the rest stays for the next time.
    pub async fn collect_garbage(
        &self,
        keep: &[(TenantId, Digest)],
        min_age: Duration,
    ) -> Result<GcReport, StoreError> {
        let keep = keep.to_vec();
        self.blocking(move |inner| {
            let report = gc::collect(inner, &keep, min_age)?;
            inner.uploads.forget_idle();
            Ok(report)
        })
        .await
    }

    /// Removes everything of one tenant, and the contents that only it had. Idempotent, also after a crash in between.
    /// A token that is still good could push again: let it end first, or collect afterwards.
    ///
    /// # Errors
    /// When the disk fails; call it again.
    pub async fn remove_tenant(&self, tenant: TenantId) -> Result<(), StoreError> {
        self.blocking(move |inner| gc::remove_tenant(&inner.store, tenant)).await
    }

    /// Runs disk work on a thread of its own. Work once begun is finished even when the caller goes away.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> T {
        let inner = self.0.clone();
        match task::spawn_blocking(move || work(&inner)).await {
            Ok(done) => done,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // The runtime is being shut down, and this task with it.
                Err(_) => std::future::pending().await,
            },
        }
    }
}
