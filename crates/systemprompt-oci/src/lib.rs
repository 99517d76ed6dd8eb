//! Images: what they are made of, how ours are built without a daemon, and how they are pushed.
//!
//! * [`Digest`], [`Manifest`], [`ImageConfig`]: the image model, parsed at the door and bounded.
//! * [`StoredImage`]: a complete image on local disk, as the registry hands it to the compute driver.
//! * [`open_layer`], [`inspect_layer`]: reading layers that strangers made, with every size bounded.
//! * [`build`]: deterministic layers from a project's files; the same input gives the same digest.
//! * [`RegistryClient`]: pushes a built image, sending only what the registry does not have.

pub mod build;
mod config;
mod digest;
mod http;
mod layer;
mod manifest;
mod names;
mod push;
mod stored;
mod walk;

pub use build::{BuiltImage, ImageBuilder};
pub use config::{ConfigError, ImageConfig};
pub use digest::{Digest, Digester, InvalidDigest};
pub use http::{HttpClientError, http_client};
pub use layer::{LayerError, LayerFacts, LayerReader, inspect_layer, open_layer};
pub use manifest::{Descriptor, Manifest, ManifestError, media_type};
pub use names::{NEVER_IN_AN_IMAGE, is_never_in_an_image};
pub use push::{PushError, PushEvent, PushReport, RegistryClient};
pub use stored::{StoredImage, StoredLayer};
