use crate::{Digest, InvalidDigest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Media types of manifests, configurations and layers that are understood here.
pub mod media_type {
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// Docker image manifest, schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// OCI image index: several images behind one name; never accepted here.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker manifest list: the same as an index.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// OCI image configuration.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// Docker image configuration.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Plain tar layer.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// Tar layer, gzip.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// Tar layer, zstd.
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// Docker's plain tar layer.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker's tar layer, gzip.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Docker's tar layer, zstd.
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
}

/// Points at a blob: what it is, its address and its exact size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is; see [`media_type`].
    pub media_type: String,
    /// Its address.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Free text of tools; kept, never read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// A descriptor without annotations.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, annotations: BTreeMap::new() }
    }
}

/// An image manifest: one configuration and its layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// What the manifest calls itself; an OCI manifest may leave it out and is then one.
    pub media_type: String,
    /// The image's configuration.
    pub config: Descriptor,
    /// Lowest first.
    pub layers: Vec<Descriptor>,
}

/// A manifest that is none of ours to run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ManifestError {
    #[error("expected a manifest of at most {max} bytes, got {0}", max = Manifest::MAX_BYTES)]
    TooLarge(usize),
    #[error("expected an image manifest as JSON: {0}")]
    Syntax(String),
    #[error("expected schemaVersion 2, got {0}")]
    SchemaVersion(u32),
    #[error(
        "expected one image, got an index of several ({0}); push the image of one platform, for example with `skopeo copy --override-arch amd64`"
    )]
    Index(String),
    #[error("expected an OCI or Docker schema 2 image manifest, got {0:?}")]
    UnknownMediaType(String),
    #[error("expected an image configuration, got a config of type {0:?}")]
    UnknownConfigType(String),
    #[error("expected tar layers (plain, gzip or zstd), got layer {index} of type {media_type:?}")]
    UnknownLayerType { index: usize, media_type: String },
    #[error("expected 1 to {max} layers, got {0}", max = Manifest::MAX_LAYERS)]
    LayerCount(usize),
    #[error("{0}")]
    Digest(#[from] InvalidDigest),
}

impl Manifest {
    /// Largest manifest accepted, as the distribution specification advises.
    pub const MAX_BYTES: usize = 4 << 20;
    /// Most layers accepted; overlay file systems and engines stop near it too.
    pub const MAX_LAYERS: usize = 128;

    /// Reads an OCI image manifest or a Docker schema 2 manifest.
    ///
    /// # Errors
    /// [`ManifestError`] when it is too large, an index, of another kind, or not well-formed.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(ManifestError::TooLarge(bytes.len()));
        }
        let kind: ManifestKind = serde_json::from_slice(bytes).map_err(syntax)?;
        kind.check()?;
        let wire: WireManifest = serde_json::from_slice(bytes).map_err(syntax)?;
        if !matches!(wire.config.media_type.as_str(), media_type::OCI_CONFIG | media_type::DOCKER_CONFIG) {
            return Err(ManifestError::UnknownConfigType(shortened(&wire.config.media_type)));
        }
        if !(1..=Self::MAX_LAYERS).contains(&wire.layers.len()) {
            return Err(ManifestError::LayerCount(wire.layers.len()));
        }
        for (index, layer) in wire.layers.iter().enumerate() {
            if crate::layer::Compression::of(&layer.media_type).is_none() {
                return Err(ManifestError::UnknownLayerType { index, media_type: shortened(&layer.media_type) });
            }
        }
        let media_type = wire.media_type.unwrap_or_else(|| media_type::OCI_MANIFEST.to_owned());
        Ok(Self { media_type, config: wire.config, layers: wire.layers })
    }

    /// The manifest as bytes: compact JSON in the specification's order of fields, so that the same manifest
    /// always has the same digest.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Wire<'a> {
            schema_version: u32,
            media_type: &'a str,
            config: &'a Descriptor,
            layers: &'a [Descriptor],
        }
        let wire = Wire { schema_version: 2, media_type: &self.media_type, config: &self.config, layers: &self.layers };
        serde_json::to_vec(&wire).expect("strings and numbers serialise")
    }

    /// Every blob the manifest needs: the configuration, then the layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        std::iter::once(&self.config).chain(&self.layers)
    }
}

/// The fields that tell what a document is, read before anything else so that the error can say it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct ManifestKind {
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    layers: Option<serde::de::IgnoredAny>,
}

impl ManifestKind {
    fn check(self) -> Result<(), ManifestError> {
        let kind = self.media_type.as_deref().unwrap_or(media_type::OCI_MANIFEST);
        // A document with both lists could be read as either (CVE-2021-41190): it is taken as neither.
        if matches!(kind, media_type::OCI_INDEX | media_type::DOCKER_LIST) || self.manifests.is_some() {
            return Err(ManifestError::Index(shortened(kind)));
        }
        if self.schema_version != 2 {
            return Err(ManifestError::SchemaVersion(self.schema_version));
        }
        if !matches!(kind, media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST) {
            return Err(ManifestError::UnknownMediaType(shortened(kind)));
        }
        if self.layers.is_none() {
            return Err(ManifestError::LayerCount(0));
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct WireManifest {
    #[serde(default)]
    media_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[allow(clippy::needless_pass_by_value, reason = "the shape `map_err` wants")]
fn syntax(error: serde_json::Error) -> ManifestError {
    ManifestError::Syntax(error.to_string())
}

fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(layers: usize, more: &str) -> String {
        let layer = format!(
            r#"{{"mediaType":"{}","digest":"{}","size":3,"annotations":{{"a":"b"}},"urls":[]}}"#,
            media_type::OCI_LAYER_GZIP,
            Digest::of(b"layer")
        );
        let layers = vec![layer; layers].join(",");
        format!(
            r#"{{"schemaVersion":2,{more}"config":{{"mediaType":"{}","digest":"{}","size":2}},"layers":[{layers}]}}"#,
            media_type::OCI_CONFIG,
            Digest::of(b"config")
        )
    }

    #[test]
    fn an_oci_manifest_may_leave_its_type_out() {
        let manifest = Manifest::parse(document(2, "").as_bytes()).expect("valid");
        assert_eq!(manifest.media_type, media_type::OCI_MANIFEST);
        assert_eq!(manifest.layers.len(), 2);
        assert_eq!(manifest.blobs().map(|blob| blob.size).collect::<Vec<_>>(), [2, 3, 3]);
        let again = Manifest::parse(&manifest.to_bytes()).expect("own output");
        assert_eq!(again, manifest);
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_reason() {
        type Expected = fn(&ManifestError) -> bool;
        let index = format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[]}}"#, media_type::OCI_INDEX);
        let cases: [(String, Expected); 9] = [
            (index, |error| matches!(error, ManifestError::Index(_))),
            (document(1, r#""manifests":[],"#), |error| matches!(error, ManifestError::Index(_))),
            (document(1, r#""mediaType":"text/html","#), |error| matches!(error, ManifestError::UnknownMediaType(_))),
            (document(129, ""), |error| matches!(error, ManifestError::LayerCount(129))),
            (document(0, ""), |error| matches!(error, ManifestError::LayerCount(0))),
            (r#"{"schemaVersion":1,"layers":[]}"#.to_owned(), |error| matches!(error, ManifestError::SchemaVersion(1))),
            ("{".to_owned(), |error| matches!(error, ManifestError::Syntax(_))),
            (document(1, "").replace("+gzip", "+lzma"), |error| {
                matches!(error, ManifestError::UnknownLayerType { index: 0, .. })
            }),
            (document(1, "").replace(".config.", ".other."), |error| {
                matches!(error, ManifestError::UnknownConfigType(_))
            }),
        ];
        for (document, expected) in cases {
            let error = Manifest::parse(document.as_bytes()).expect_err(&document);
            assert!(expected(&error), "{document}: {error:?}");
        }
        let large = vec![b' '; Manifest::MAX_BYTES + 1];
        assert!(matches!(Manifest::parse(&large), Err(ManifestError::TooLarge(_))));
    }
}
