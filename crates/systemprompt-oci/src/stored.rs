use crate::{Descriptor, Digest, ImageConfig, Manifest};
use std::path::PathBuf;

/// A complete layer blob on local disk. Whoever made the value has checked that the file is there and has
/// the descriptor's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredLayer {
    /// The compressed blob.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar; names the unpacked layer.
    pub diff_id: Digest,
    /// Where the blob is.
    pub path: PathBuf,
}

/// A complete image on local disk, as the registry hands it to a compute driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredImage {
    /// Digest of the manifest: what was validated and what runs.
    pub digest: Digest,
    /// The manifest.
    pub manifest: Manifest,
    /// What to run.
    pub config: ImageConfig,
    /// Lowest first; as many as the configuration has `diff_ids`.
    pub layers: Vec<StoredLayer>,
}
