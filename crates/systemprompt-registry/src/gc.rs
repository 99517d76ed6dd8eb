//! Removal. Every function here holds the store's write lock: nobody looks at a link meanwhile.

use crate::{
    StoreError,
    store::{self, Store, digest_of},
    upload,
};
use std::{
    collections::{HashMap, HashSet},
    fs::{self, Metadata},
    io,
    path::Path,
    time::{Duration, SystemTime},
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
pub(crate) fn collect(store: &Store, keep: &[(TenantId, Digest)], min_age: Duration) -> Result<GcReport, StoreError> {
    let _held = store.hold_for_removal();
    let mut collection = Collection { store, now: SystemTime::now(), min_age, report: GcReport::default() };
    let mut kept: HashMap<TenantId, HashSet<Digest>> = HashMap::new();
    for &(tenant, digest) in keep {
        kept.entry(tenant).or_default().insert(digest);
    }
    let mut linked = HashSet::new();
    for tenant in tenants(store)? {
        let kept = kept.remove(&tenant).unwrap_or_default();
        collection.tenant(tenant, &kept, &mut linked)?;
    }
    collection.blobs(&linked)?;
    Ok(collection.report)
}

struct Collection<'a> {
    store: &'a Store,
    now: SystemTime,
    min_age: Duration,
    report: GcReport,
}

impl Collection<'_> {
    fn tenant(
        &mut self,
        tenant: TenantId,
        kept: &HashSet<Digest>,
        linked: &mut HashSet<Digest>,
    ) -> Result<(), StoreError> {
        let needed = self.manifests(tenant, kept)?;
        if self.store.read_tag(tenant)?.is_some() && self.store.tag(tenant)?.is_none() {
            store::remove_file(&self.store.tag_path(tenant))?;
        }
        for (path, metadata) in store::listed(&self.store.links(tenant))? {
            let Some(digest) = digest_of(&path) else { continue };
            // Blobs of a manifest that cannot be read are unknown, so none of the tenant's is given up.
            let is_needed = needed.as_ref().is_none_or(|needed| needed.contains(&digest));
            if is_needed || self.is_young(&metadata, self.min_age) {
                linked.insert(digest);
            } else {
                store::remove_file(&path)?;
                self.report.links += 1;
            }
        }
        self.uploads(tenant)?;
        self.remove_if_empty(tenant)
    }

    /// Removes manifests; the blobs that the others need, or `None` when one of those cannot be read.
    fn manifests(&mut self, tenant: TenantId, kept: &HashSet<Digest>) -> Result<Option<HashSet<Digest>>, StoreError> {
        let mut needed = Some(HashSet::new());
        for (path, metadata) in store::listed(&self.store.manifests(tenant))? {
            let Some(digest) = digest_of(&path) else { continue };
            if !kept.contains(&digest) && !self.is_young(&metadata, self.min_age) {
                store::remove_file(&path)?;
                self.report.manifests += 1;
                continue;
            }
            match store::read(&path)?.map(|bytes| Manifest::parse(&bytes)) {
                Some(Ok(manifest)) => {
                    if let Some(needed) = &mut needed {
                        needed.extend(manifest.blobs().map(|blob| blob.digest));
                    }
                }
                Some(Err(error)) => {
                    tracing::error!(%tenant, %digest, %error, "a stored manifest cannot be read; its tenant's blobs stay");
                    needed = None;
                }
                None => {}
            }
        }
        Ok(needed)
    }

    fn uploads(&mut self, tenant: TenantId) -> Result<(), StoreError> {
        for (path, metadata) in store::listed(&self.store.uploads(tenant))? {
            if !self.is_young(&metadata, upload::EXPIRES_AFTER) {
                store::remove_file(&path)?;
                self.report.uploads += 1;
                self.report.freed_bytes += metadata.len();
            }
        }
        Ok(())
    }

    fn blobs(&mut self, linked: &HashSet<Digest>) -> Result<(), StoreError> {
        for (path, metadata) in store::listed(&self.store.blobs())? {
            let Some(digest) = digest_of(&path) else { continue };
            if !linked.contains(&digest) {
                // A blob and its link are made under the read lock, so a blob without one is left over.
                store::remove_file(&path)?;
                store::remove_file(&self.store.checked(digest))?;
                self.report.blobs += 1;
                self.report.freed_bytes += metadata.len();
            }
        }
        Ok(())
    }

    fn remove_if_empty(&self, tenant: TenantId) -> Result<(), StoreError> {
        let (links, manifests, uploads) =
            (self.store.links(tenant), self.store.manifests(tenant), self.store.uploads(tenant));
        for folder in [&manifests, &uploads, &links] {
            if !store::listed(folder)?.is_empty() {
                return Ok(());
            }
        }
        remove_folder(&self.store.tenant(tenant))
    }

    /// A time in the future counts as now: a clock that was set back removes nothing.
    fn is_young(&self, metadata: &Metadata, limit: Duration) -> bool {
        metadata.modified().ok().and_then(|time| self.now.duration_since(time).ok()).is_none_or(|age| age < limit)
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
            store::remove_file(&store.checked(digest))?;
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
