//! Takes a manifest in: everything it needs is there, is what it says, and may be in an image.

use crate::{
    ImageError, Inner, StoreError, image,
    store::{self, Store},
};
use std::{collections::HashMap, io};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Descriptor, Digest, LayerError, Manifest, ManifestError, StoredLayer, inspect_layer};
use tokio_util::sync::CancellationToken;

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
    #[error("layer {0} stands twice in the manifest, with two media types; expected one")]
    TwoTypes(Digest),
    #[error("expected layers that unpack to at most {max} bytes together, got more")]
    UnpacksTooLarge { max: u64 },
    #[error("the client went away")]
    Abandoned,
    #[error("the tenant's quota is used up")]
    QuotaExceeded,
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn listed(digests: &[Digest]) -> String {
    digests.iter().map(Digest::to_string).collect::<Vec<_>>().join(", ")
}

/// Stores the manifest, and behind the tenant's tag if `tagged`. Reads every layer once that was not read before, until
/// `abandoned`.
pub(crate) fn put(
    inner: &Inner,
    tenant: TenantId,
    bytes: &[u8],
    content_type: Option<&str>,
    tagged: bool,
    abandoned: &CancellationToken,
) -> Result<Digest, PutError> {
    let store = &inner.store;
    let manifest = Manifest::parse(bytes)?;
    if let Some(header) = content_type
        && header != manifest.media_type
    {
        return Err(PutError::ContentType { header: header.to_owned(), body: manifest.media_type });
    }
    require_blobs(store, tenant, &manifest)?;
    check_layers(store, tenant, &manifest, abandoned)?;
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

fn check_layers(
    store: &Store,
    tenant: TenantId,
    manifest: &Manifest,
    abandoned: &CancellationToken,
) -> Result<(), PutError> {
    let config = image::read_config(store, tenant, &manifest.config).map_err(|error| match error {
        ImageError::Store(error) => PutError::Store(error),
        ImageError::Incomplete { missing } => PutError::BlobsUnknown(missing),
        other => PutError::Config(other.to_string()),
    })?;
    if config.diff_ids.len() != manifest.layers.len() {
        let (layers, diff_ids) = (manifest.layers.len(), config.diff_ids.len());
        return Err(PutError::LayerCount { layers, diff_ids });
    }
    // A verdict is for one type: with two of them a layer would be read again and again.
    let mut types = HashMap::new();
    for layer in &manifest.layers {
        if *types.entry(layer.digest).or_insert(&layer.media_type) != &layer.media_type {
            return Err(PutError::TwoTypes(layer.digest));
        }
    }
    let mut unpacked = 0_u64;
    for (layer, &expected) in manifest.layers.iter().zip(&config.diff_ids) {
        if abandoned.is_cancelled() {
            return Err(PutError::Abandoned);
        }
        let size = match unpacked_size(store, tenant, layer, expected) {
            // What is wrong with it may be our disk's fault.
            Err(PutError::Layer { .. } | PutError::DiffId { .. })
                if store.remove_if_damaged(tenant, layer.digest)? =>
            {
                return Err(PutError::BlobsUnknown(vec![layer.digest]));
            }
            size => size?,
        };
        unpacked = unpacked.saturating_add(size);
        let max = store.config.max_unpacked_bytes;
        if unpacked > max {
            return Err(PutError::UnpacksTooLarge { max });
        }
    }
    Ok(())
}

/// What a layer unpacks to that may be in an image and has the expected diff id.
fn unpacked_size(store: &Store, tenant: TenantId, layer: &Descriptor, expected: Digest) -> Result<u64, PutError> {
    let verdict = match Verdict::read(store, tenant, layer)? {
        Some(known) => known,
        None => inspect(store, tenant, layer, expected)?,
    };
    let Verdict { diff_id: got, unpacked_size } = verdict;
    if got == expected { Ok(unpacked_size) } else { Err(PutError::DiffId { digest: layer.digest, expected, got }) }
}

fn inspect(store: &Store, tenant: TenantId, layer: &Descriptor, diff_id: Digest) -> Result<Verdict, PutError> {
    let stored = StoredLayer { descriptor: layer.clone(), diff_id, path: store.blob(layer.digest) };
    let facts = inspect_layer(&stored).map_err(|source| match source {
        LayerError::Read(error) if error.kind() == io::ErrorKind::NotFound => {
            PutError::BlobsUnknown(vec![layer.digest])
        }
        source => PutError::Layer { digest: layer.digest, source },
    })?;
    let verdict = Verdict { diff_id: facts.diff_id, unpacked_size: facts.unpacked_size };
    let _held = store.hold();
    // Another diff id may come from a damaged blob, and would be held against the whole one.
    if verdict.diff_id == diff_id && store.link(tenant, layer.digest).exists() && stored.path.exists() {
        verdict.write(store, tenant, layer)?;
    }
    Ok(verdict)
}

/// That a layer may be in an image, and what reading it showed. It depends on the content, on how that is compressed,
/// and on the rules; so it is kept under the digest, together with the media type and the version of the rules. Each
/// tenant has its own: how long a push takes must not tell what others have pushed.
struct Verdict {
    diff_id: Digest,
    unpacked_size: u64,
}

impl Verdict {
    /// Of everything that [`inspect_layer`] and this module demand of a layer; another number makes old verdicts void.
    const RULES: &str = "1";

    fn read(store: &Store, tenant: TenantId, layer: &Descriptor) -> Result<Option<Self>, StoreError> {
        Ok(store::read(&store.checked(tenant, layer.digest))?.and_then(|text| {
            let text = String::from_utf8(text).ok()?;
            let [rules, diff_id, unpacked_size, media_type] =
                text.split_whitespace().collect::<Vec<_>>().try_into().ok()?;
            let is_about_this = rules == Self::RULES && media_type == layer.media_type;
            is_about_this
                .then(|| Some(Self { diff_id: diff_id.parse().ok()?, unpacked_size: unpacked_size.parse().ok()? }))?
        }))
    }

    fn write(&self, store: &Store, tenant: TenantId, layer: &Descriptor) -> Result<(), StoreError> {
        let line = format!("{} {} {} {}\n", Self::RULES, self.diff_id, self.unpacked_size, layer.media_type);
        store.write(&store.checked(tenant, layer.digest), line.as_bytes())
    }
}
