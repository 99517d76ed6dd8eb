//! From a digest to an image that can run, or the reason why it cannot.

use crate::{
    ImageError, InvalidImage, StoreError,
    store::{self, Store},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{ConfigError, Descriptor, Digest, ImageConfig, Manifest, StoredImage, StoredLayer};

/// See [`crate::Registry::image`].
pub(crate) fn load(store: &Store, tenant: TenantId, digest: Digest) -> Result<StoredImage, ImageError> {
    let manifest = store.use_manifest(tenant, digest)?.ok_or(ImageError::NotFound)?;
    if Digest::of(&manifest) != digest {
        return Err(InvalidImage::Damaged { what: "manifest" }.into());
    }
    let manifest = Manifest::parse(&manifest).map_err(InvalidImage::from)?;
    let missing = missing_blobs(store, tenant, &manifest)?;
    if !missing.is_empty() {
        return Err(ImageError::Incomplete { missing });
    }
    let config = read_config(store, tenant, &manifest.config)?;
    check_platform(&config)?;
    config.command().map_err(|error| match error {
        ConfigError::NoEntrypoint => ImageError::NoEntrypoint,
        other => InvalidImage::from(other).into(),
    })?;
    let layers = manifest
        .layers
        .iter()
        .zip(&config.diff_ids)
        .map(|(layer, &diff_id)| StoredLayer { descriptor: layer.clone(), diff_id, path: store.blob(layer.digest) })
        .collect::<Vec<_>>();
    if layers.len() != manifest.layers.len() || layers.len() != config.diff_ids.len() {
        let (layers, diff_ids) = (manifest.layers.len(), config.diff_ids.len());
        return Err(InvalidImage::LayerCount { layers, diff_ids }.into());
    }
    Ok(StoredImage { digest, manifest, config, layers })
}

/// See [`crate::Registry::remove_damaged`].
pub(crate) fn remove_damaged(store: &Store, tenant: TenantId, digest: Digest) -> Result<usize, StoreError> {
    let Some(Ok(manifest)) = store.manifest(tenant, digest)?.map(|bytes| Manifest::parse(&bytes)) else { return Ok(0) };
    let mut removed = 0;
    for blob in manifest.blobs() {
        let is_known = store.use_blob(tenant, blob.digest)?.is_some();
        removed += usize::from(is_known && store.remove_if_damaged(tenant, blob.digest)?);
    }
    Ok(removed)
}

/// Blobs that the tenant has no link to, that are gone, or that have another size than the manifest says. One whose
/// content is not what its name says is removed.
pub(crate) fn missing_blobs(store: &Store, tenant: TenantId, manifest: &Manifest) -> Result<Vec<Digest>, StoreError> {
    let mut missing = Vec::new();
    for blob in manifest.blobs() {
        let size = store.use_blob(tenant, blob.digest)?;
        if size == Some(blob.size) {
            continue;
        }
        if size.is_some() {
            store.remove_if_damaged(tenant, blob.digest)?;
        }
        missing.push(blob.digest);
    }
    Ok(missing)
}

/// The configuration of a manifest whose blobs are there.
pub(crate) fn read_config(store: &Store, tenant: TenantId, descriptor: &Descriptor) -> Result<ImageConfig, ImageError> {
    if descriptor.size > ImageConfig::MAX_BYTES as u64 {
        let size = usize::try_from(descriptor.size).unwrap_or(usize::MAX);
        return Err(InvalidImage::from(ConfigError::TooLarge(size)).into());
    }
    let missing = || ImageError::Incomplete { missing: vec![descriptor.digest] };
    let bytes = store::read(&store.blob(descriptor.digest))?.ok_or_else(missing)?;
    if Digest::of(&bytes) != descriptor.digest {
        store.remove_if_damaged(tenant, descriptor.digest)?;
        return Err(missing());
    }
    Ok(ImageConfig::parse(&bytes).map_err(InvalidImage::from)?)
}

fn check_platform(config: &ImageConfig) -> Result<(), InvalidImage> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let (expected, got) = (format!("linux/{architecture}"), format!("{}/{}", config.os, config.architecture));
    if expected == got { Ok(()) } else { Err(InvalidImage::Platform { expected, got }) }
}
