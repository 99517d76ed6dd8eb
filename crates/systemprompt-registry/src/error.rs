use std::{
    io,
    path::{Path, PathBuf},
};
use systemprompt_oci::{ConfigError, Digest, ManifestError};

/// The registry's folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum OpenError {
    #[error("another process uses the registry in {root}; stop it first", root = root.display())]
    Locked { root: PathBuf },
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The disk did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[error("registry storage: {action} {path}: {source}", path = path.display())]
pub struct StoreError {
    /// `reading`, `writing`, …
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    pub source: io::Error,
}

impl StoreError {
    /// Shorthand for `map_err`.
    pub(crate) fn on<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self { action, path: path.to_owned(), source }
    }

    /// No room left on the disk, or in its owner's share of it.
    pub fn is_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Why an image cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Never pushed for this tenant, or collected since.
    #[error("no such image was pushed for this tenant; push it again")]
    NotFound,
    /// Blobs of it are gone or cut off.
    #[error("{} blobs of the image are missing; push it again", missing.len())]
    Incomplete {
        /// Which.
        missing: Vec<Digest>,
    },
    /// It cannot be run here.
    #[error(transparent)]
    Invalid(#[from] InvalidImage),
    /// It names no command.
    #[error("the image names no command: set ENTRYPOINT or CMD when building it")]
    NoEntrypoint,
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is wrong with an image.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum InvalidImage {
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("the stored {what} is damaged: its content has another digest; push it again")]
    Damaged { what: &'static str },
    #[error("the manifest has {layers} layers, the configuration names {diff_ids}")]
    LayerCount { layers: usize, diff_ids: usize },
    #[error("expected an image for {expected}, got one for {got:?}")]
    Platform { expected: String, got: String },
}
