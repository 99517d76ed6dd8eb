//! Takes a manifest in: everything it needs is there, is what it says, and may be in an image.

use crate::{
    ImageError, Inner, StoreError, image,
    store::{self, Store},
};
use std::io;
use systemprompt_contract::TenantId;
use systemprompt_oci::{Descriptor, Digest, LayerError, Manifest, ManifestError, StoredLayer, inspect_layer};

/// Why a manifest was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PutError {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error("expected a manifest of the type in Content-Type, {header}, got {body}")]
    ContentType { header: String, body: String },
    #[error("blobs of the manifest were not pushed, or have another size: {}", listed(.0))]
    BlobsUnknown(Vec<Digest>),
    #[error("{0}")]
    Config(String),
    #[error("layer {digest}: {source}")]
    Layer { digest: Digest, source: LayerError },
    #[error("layer {digest} unpacks to {got}, the configuration says {expected}")]
    DiffId { digest: Digest, expected: Digest, got: Digest },
    #[error("the manifest has {layers} layers, the configuration names {diff_ids}")]
    LayerCount { layers: usize, diff_ids: usize },
    #[error("the tenant's quota is used up")]
    QuotaExceeded,
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn listed(digests: &[Digest]) -> String {
    digests.iter().map(Digest::to_string).collect::<Vec<_>>().join(", ")
}

/// Stores the manifest, and behind the tenant's tag if `tagged`. Reads every layer once that was not read before.
pub(crate) fn put(
    inner: &Inner,
    tenant: TenantId,
    bytes: &[u8],
    content_type: Option<&str>,
    tagged: bool,
) -> Result<Digest, PutError> {
    let store = &inner.store;
    let manifest = Manifest::parse(bytes)?;
    if let Some(header) = content_type
        && header != manifest.media_type
    {
        return Err(PutError::ContentType { header: header.to_owned(), body: manifest.media_type });
    }
    require_blobs(store, tenant, &manifest)?;
    check_layers(store, &manifest)?;
    let digest = Digest::of(bytes);
    // Reading the layers took a while: from here on nothing is removed until the manifest keeps them.
    let _held = store.hold();
    require_links(store, tenant, &manifest)?;
    let path = store.manifests(tenant).join(digest.hex());
    if !path.exists() && store.used_bytes(tenant)?.saturating_add(bytes.len() as u64) > store.config.tenant_quota_bytes
    {
        return Err(PutError::QuotaExceeded);
    }
    store.write(&path, bytes)?;
    if tagged {
        store.write(&store.tag_path(tenant), digest.to_string().as_bytes())?;
    }
    Ok(digest)
}

fn require_blobs(store: &Store, tenant: TenantId, manifest: &Manifest) -> Result<(), PutError> {
    let missing = image::missing_blobs(store, tenant, manifest)?;
    if missing.is_empty() { Ok(()) } else { Err(PutError::BlobsUnknown(missing)) }
}

fn require_links(store: &Store, tenant: TenantId, manifest: &Manifest) -> Result<(), PutError> {
    let is_missing =
        |blob: &&Descriptor| !store.link(tenant, blob.digest).exists() || !store.blob(blob.digest).exists();
    let missing: Vec<_> = manifest.blobs().filter(is_missing).map(|blob| blob.digest).collect();
    if missing.is_empty() { Ok(()) } else { Err(PutError::BlobsUnknown(missing)) }
}

fn check_layers(store: &Store, manifest: &Manifest) -> Result<(), PutError> {
    let config = image::read_config(store, &manifest.config).map_err(|error| match error {
        ImageError::Store(error) => PutError::Store(error),
        ImageError::Incomplete { missing } => PutError::BlobsUnknown(missing),
        other => PutError::Config(other.to_string()),
    })?;
    if config.diff_ids.len() != manifest.layers.len() {
        let (layers, diff_ids) = (manifest.layers.len(), config.diff_ids.len());
        return Err(PutError::LayerCount { layers, diff_ids });
    }
    for (layer, &expected) in manifest.layers.iter().zip(&config.diff_ids) {
        let got = checked_diff_id(store, layer, expected)?;
        if got != expected {
            return Err(PutError::DiffId { digest: layer.digest, expected, got });
        }
    }
    Ok(())
}

/// Diff id of a layer that may be in an image. The verdict depends on the content and on how it is compressed, so it is
/// kept under the digest together with the media type.
fn checked_diff_id(store: &Store, layer: &Descriptor, diff_id: Digest) -> Result<Digest, PutError> {
    let verdict_path = store.checked(layer.digest);
    let known = store::read(&verdict_path)?.and_then(|text| {
        let text = String::from_utf8(text).ok()?;
        let (diff_id, media_type) = text.trim().split_once(' ')?;
        (media_type == layer.media_type).then(|| diff_id.parse().ok())?
    });
    if let Some(known) = known {
        return Ok(known);
    }
    let stored = StoredLayer { descriptor: layer.clone(), diff_id, path: store.blob(layer.digest) };
    let facts = inspect_layer(&stored).map_err(|source| match source {
        LayerError::Read(error) if error.kind() == io::ErrorKind::NotFound => {
            PutError::BlobsUnknown(vec![layer.digest])
        }
        source => PutError::Layer { digest: layer.digest, source },
    })?;
    let _held = store.hold();
    if stored.path.exists() {
        store.write(&verdict_path, format!("{} {}\n", facts.diff_id, layer.media_type).as_bytes())?;
    } else {
        store::remove_file(&verdict_path)?;
    }
    Ok(facts.diff_id)
}
