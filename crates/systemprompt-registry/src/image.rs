//! From a digest to an image that can run, or the reason why it cannot.

use crate::{
    ImageError, InvalidImage,
    store::{self, Store},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{ConfigError, Descriptor, Digest, ImageConfig, Manifest, StoredImage, StoredLayer};

/// See [`crate::Registry::image`].
pub(crate) fn load(store: &Store, tenant: TenantId, digest: Digest) -> Result<StoredImage, ImageError> {
    let manifest = store.manifest(tenant, digest)?.ok_or(ImageError::NotFound)?;
    if Digest::of(&manifest) != digest {
        return Err(InvalidImage::Damaged { what: "manifest" }.into());
    }
    let manifest = Manifest::parse(&manifest).map_err(InvalidImage::from)?;
    let missing = missing_blobs(store, tenant, &manifest)?;
    if !missing.is_empty() {
        return Err(ImageError::Incomplete { missing });
    }
    let config = read_config(store, &manifest.config)?;
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

/// Blobs that the tenant has no link to, that are gone, or that have another size than the manifest says.
pub(crate) fn missing_blobs(
    store: &Store,
    tenant: TenantId,
    manifest: &Manifest,
) -> Result<Vec<Digest>, crate::StoreError> {
    let mut missing = Vec::new();
    for blob in manifest.blobs() {
        if store.use_blob(tenant, blob.digest)? != Some(blob.size) {
            missing.push(blob.digest);
        }
    }
    Ok(missing)
}

/// The configuration of a manifest whose blobs are there.
pub(crate) fn read_config(store: &Store, descriptor: &Descriptor) -> Result<ImageConfig, ImageError> {
    if descriptor.size > ImageConfig::MAX_BYTES as u64 {
        let size = usize::try_from(descriptor.size).unwrap_or(usize::MAX);
        return Err(InvalidImage::from(ConfigError::TooLarge(size)).into());
    }
    let missing = || ImageError::Incomplete { missing: vec![descriptor.digest] };
    let bytes = store::read(&store.blob(descriptor.digest))?.ok_or_else(missing)?;
    if Digest::of(&bytes) != descriptor.digest {
        return Err(InvalidImage::Damaged { what: "configuration" }.into());
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
