//! Images for tests, written as plain tar layers on the spot.

use crate::{DriverError, ImageSource};
use futures_util::future::BoxFuture;
use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Descriptor, Digest, ImageConfig, Manifest, StoredImage, StoredLayer, media_type};

/// Images by digest, each for one tenant or for all.
#[derive(Debug, Default)]
pub struct ImageDirectory {
    images: Mutex<HashMap<Digest, (Option<TenantId>, StoredImage)>>,
}

impl ImageDirectory {
    /// Adds an image; `tenant` is who may have it, or everybody.
    pub fn add(&self, tenant: Option<TenantId>, image: StoredImage) -> Digest {
        let digest = image.digest;
        self.images.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, (tenant, image));
        digest
    }
}

impl ImageSource for ImageDirectory {
    fn image(&self, tenant: TenantId, digest: &Digest) -> BoxFuture<'_, Result<StoredImage, DriverError>> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let found = match images.get(digest) {
            Some((owner, image)) if owner.is_none_or(|owner| owner == tenant) => Ok(image.clone()),
            _ => Err(DriverError::NotFound(format!("the image {digest}"))),
        };
        Box::pin(std::future::ready(found))
    }
}

/// An image of `program` with the shared libraries it needs; it runs `program app`.
///
/// # Errors
/// When the layer cannot be written or `ldd` does not say what is needed.
pub fn app_image(directory: &Path, program: &Path) -> io::Result<StoredImage> {
    let config = ImageConfig {
        entrypoint: vec!["/app/bin/app".to_owned(), "app".to_owned()],
        env: vec!["PATH=/app/bin".to_owned(), "FROM_IMAGE=yes".to_owned(), "TEST_APP=serve".to_owned()],
        working_dir: "/app".to_owned(),
        ..ImageConfig::default()
    };
    image_of(directory, &[app_layer(program)?], config)
}

/// The layer of [`app_image`]: the program as `/app/bin/app`, and its libraries where its loader looks for them.
///
/// # Errors
/// When a file cannot be read or `ldd` does not say what is needed.
pub fn app_layer(program: &Path) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    tar.sparse(false);
    tar.append_path_with_name(program, "app/bin/app")?;
    for library in shared_libraries(program)? {
        // Through links, so that the loader finds the name it looks for.
        let name = library.strip_prefix("/").unwrap_or(&library);
        tar.append_file(name, &mut fs::File::open(&library)?)?;
    }
    tar.into_inner()
}

/// An image of these tar archives, lowest first.
///
/// # Errors
/// When a layer cannot be written.
pub fn image_of(directory: &Path, layers: &[Vec<u8>], config: ImageConfig) -> io::Result<StoredImage> {
    let mut stored = Vec::new();
    for tar in layers {
        let diff_id = Digest::of(tar);
        let path = directory.join(diff_id.hex());
        // In one step: another process may make, or read, the same one.
        let file = tempfile::NamedTempFile::new_in(directory)?;
        fs::write(file.path(), tar)?;
        file.persist(&path).map_err(|error| error.error)?;
        let descriptor = Descriptor::new(media_type::OCI_LAYER, diff_id, tar.len() as u64);
        stored.push(StoredLayer { descriptor, diff_id, path });
    }
    // Not a real configuration blob: what matters is that another command gives another digest.
    let content = format!("{config:?} {:?}", stored.iter().map(|layer| layer.diff_id).collect::<Vec<_>>());
    let config_digest = Digest::of(content.as_bytes());
    let manifest = Manifest {
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: Descriptor::new(media_type::OCI_CONFIG, config_digest, content.len() as u64),
        layers: stored.iter().map(|layer| layer.descriptor.clone()).collect(),
    };
    let config = ImageConfig { diff_ids: stored.iter().map(|layer| layer.diff_id).collect(), ..config };
    Ok(StoredImage { digest: config_digest, manifest, config, layers: stored })
}

/// The shared libraries a program needs, its loader included.
///
/// # Errors
/// When `ldd` fails.
pub fn shared_libraries(program: &Path) -> io::Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let path = |line: &str| line.split_ascii_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}
