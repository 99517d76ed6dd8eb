//! Removal. Nothing but uploads, which have locks of their own, is removed without the store's write lock: then nobody
//! looks at a link. A collection takes it for one removal at a time and looks again under it, since what it saw before
//! may have been used meanwhile.

use crate::{
    Inner, StoreError,
    store::{self, Store, digest_of},
    upload,
};
use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::Path,
    time::Duration,
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, Manifest};

/// What a collection removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GcReport {
    /// Manifests.
    pub manifests: usize,
    /// Links of tenants to blobs.
    pub links: usize,
    /// Blobs that no tenant is linked to any more.
    pub blobs: usize,
    /// Uploads that stood still for a day.
    pub uploads: usize,
    /// Bytes of the removed blobs and uploads.
    pub freed_bytes: u64,
}

/// See [`crate::Registry::collect_garbage`]. Manifests go before links and links before blobs, so that after a crash in
/// between whatever is left is whole, and the rest goes the next time.
pub(crate) fn collect(inner: &Inner, keep: &[(TenantId, Digest)], min_age: Duration) -> Result<GcReport, StoreError> {
    let mut collection = Collection { inner, store: &inner.store, min_age, report: GcReport::default() };
    let mut kept: HashMap<TenantId, HashSet<Digest>> = HashMap::new();
    for &(tenant, digest) in keep {
        kept.entry(tenant).or_default().insert(digest);
    }
    for tenant in tenants(&inner.store)? {
        collection.tenant(tenant, &kept.remove(&tenant).unwrap_or_default())?;
    }
    collection.blobs()?;
    Ok(collection.report)
}

struct Collection<'a> {
    inner: &'a Inner,
    store: &'a Store,
    min_age: Duration,
    report: GcReport,
}

impl Collection<'_> {
    fn tenant(&mut self, tenant: TenantId, kept: &HashSet<Digest>) -> Result<(), StoreError> {
        self.manifests(tenant, kept)?;
        // Only now: whoever still found a manifest finds its links too.
        let needed = self.needed(tenant)?;
        let has_dead_tag = || Ok(self.store.read_tag(tenant)?.is_some() && self.store.tag(tenant)?.is_none());
        self.remove_if(has_dead_tag, || store::remove_file(&self.store.tag_path(tenant)))?;
        for (link, _) in store::listed(&self.store.links(tenant))? {
            let Some(digest) = digest_of(&link) else { continue };
            // Blobs of a manifest that cannot be read are unknown, so none of the tenant's is given up.
            let is_needed = needed.as_ref().is_none_or(|needed| needed.contains(&digest));
            if !is_needed && self.remove_if(|| self.is_old(&link), || self.store.remove_link(tenant, digest))? {
                self.report.links += 1;
            }
        }
        for size in upload::remove_idle(self.inner, tenant, upload::EXPIRES_AFTER)? {
            self.report.uploads += 1;
            self.report.freed_bytes += size;
        }
        self.remove_if(|| self.is_empty(tenant), || remove_folder(&self.store.tenant(tenant)))?;
        Ok(())
    }

    fn manifests(&mut self, tenant: TenantId, kept: &HashSet<Digest>) -> Result<(), StoreError> {
        for (path, _) in store::listed(&self.store.manifests(tenant))? {
            let is_kept = digest_of(&path).is_none_or(|digest| kept.contains(&digest));
            if !is_kept && self.remove_if(|| self.is_old(&path), || store::remove_file(&path))? {
                self.report.manifests += 1;
            }
        }
        Ok(())
    }

    /// The blobs that the tenant's manifests need, or `None` when one of them cannot be read.
    fn needed(&self, tenant: TenantId) -> Result<Option<HashSet<Digest>>, StoreError> {
        let mut needed = Some(HashSet::new());
        for (path, _) in store::listed(&self.store.manifests(tenant))? {
            match store::read(&path)?.map(|bytes| Manifest::parse(&bytes)) {
                Some(Ok(manifest)) => {
                    if let Some(needed) = &mut needed {
                        needed.extend(manifest.blobs().map(|blob| blob.digest));
                    }
                }
                Some(Err(error)) => {
                    let path = path.display();
                    tracing::error!(%tenant, %path, %error, "a stored manifest cannot be read; its tenant's blobs stay");
                    needed = None;
                }
                None => {}
            }
        }
        Ok(needed)
    }

    fn blobs(&mut self) -> Result<(), StoreError> {
        let mut linked = HashSet::new();
        for tenant in tenants(self.store)? {
            linked.extend(store::listed(&self.store.links(tenant))?.iter().filter_map(|(link, _)| digest_of(link)));
        }
        for (path, metadata) in store::listed(&self.store.blobs())? {
            let Some(digest) = digest_of(&path).filter(|digest| !linked.contains(digest)) else { continue };
            // A blob and its link are made under the read lock, so a blob without one is left over.
            let is_alone = || {
                let tenants = tenants(self.store)?;
                Ok(!tenants.iter().any(|&tenant| self.store.link(tenant, digest).exists()))
            };
            if self.remove_if(is_alone, || store::remove_file(&path))? {
                self.report.blobs += 1;
                self.report.freed_bytes += metadata.len();
            }
        }
        Ok(())
    }

    /// Looks without the lock first, so that requests wait only for what is really removed.
    fn remove_if(
        &self,
        condition: impl Fn() -> Result<bool, StoreError>,
        remove: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        if !condition()? {
            return Ok(false);
        }
        let _held = self.store.hold_for_removal();
        let holds = condition()?;
        if holds {
            remove()?;
        }
        Ok(holds)
    }

    fn is_empty(&self, tenant: TenantId) -> Result<bool, StoreError> {
        for folder in [self.store.manifests(tenant), self.store.uploads(tenant), self.store.links(tenant)] {
            if !store::listed(&folder)?.is_empty() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn is_old(&self, path: &Path) -> Result<bool, StoreError> {
        match fs::metadata(path) {
            Ok(metadata) => Ok(store::is_older(&metadata, self.min_age)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(StoreError::on("reading", path)(error)),
        }
    }
}

/// See [`crate::Registry::remove_tenant`]. Links go last: as long as one is there, a repetition finds the blobs that
/// still have to be looked at.
pub(crate) fn remove_tenant(store: &Store, tenant: TenantId) -> Result<(), StoreError> {
    let _held = store.hold_for_removal();
    store::remove_file(&store.tag_path(tenant))?;
    remove_folder(&store.manifests(tenant))?;
    remove_folder(&store.uploads(tenant))?;
    let others: Vec<_> = tenants(store)?.into_iter().filter(|&other| other != tenant).collect();
    for (link, _) in store::listed(&store.links(tenant))? {
        let Some(digest) = digest_of(&link) else { continue };
        if !others.iter().any(|&other| store.link(other, digest).exists()) {
            store::remove_file(&store.blob(digest))?;
        }
        store::remove_file(&link)?;
    }
    remove_folder(&store.tenant(tenant))
}

fn tenants(store: &Store) -> Result<Vec<TenantId>, StoreError> {
    let listed = store::listed(&store.tenants())?;
    Ok(listed.iter().filter_map(|(path, _)| path.file_name()?.to_str()?.parse().ok()).collect())
}

fn remove_folder(folder: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::on("removing", folder)(error)),
        _ => Ok(()),
    }
}
