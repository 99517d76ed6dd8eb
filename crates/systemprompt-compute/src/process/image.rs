//! Unpacked images: one directory per digest, made once, shared read-only by all instances of the image.
//!
//! A directory appears under its digest by rename, so it is whole or absent. It is not synced to disk before it is
//! used: the record names the boot in which it was made, and after a restart of the machine only a directory
//! that was synced meanwhile is believed; any other is unpacked again.

use super::{
    extract::{Caps, Extractor, MountPoint},
    host::boot_id,
    layout::{Layout, read_record, write_record},
    lock::FileLock,
};
use crate::DriverError;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};
use systemprompt_oci::{Digest, Digester, StoredImage, StoredLayer, open_layer};

/// What is known about an unpacked image.
#[derive(Debug, Serialize, Deserialize)]
struct ImageRecord {
    /// Boot in which it was unpacked.
    boot: String,
    /// Whether it has been synced since.
    synced: bool,
}

/// Makes sure that an image is unpacked, with its mount points, and returns its root directory.
pub(crate) fn ensure(
    layout: &Layout,
    image: &StoredImage,
    mount_points: &[(PathBuf, MountPoint)],
    caps: Caps,
) -> Result<PathBuf, DriverError> {
    // Nobody collects meanwhile, and other images are unpacked beside this one.
    let _images = FileLock::shared(&layout.images_lock())?;
    let _image = FileLock::exclusive(&layout.image_lock(&image.digest))?;
    let directory = layout.image(&image.digest);
    if !is_whole(&directory)? {
        layout.discard(&directory)?;
        unpack(layout, image, &directory, caps)?;
    }
    let root = directory.join("root");
    // Here and not while unpacking: what is mounted may change from one start of the driver to the next.
    let mut extractor = Extractor::new(&root, caps)?;
    for (path, kind) in mount_points {
        extractor.mount_point(path, *kind)?;
    }
    Ok(root)
}

/// Syncs images that were not, so that they need not be unpacked again after a restart of the machine.
pub(crate) fn sync(layout: &Layout, digest: &Digest) -> io::Result<()> {
    let record = layout.image(digest).join("image.json");
    match read_record::<ImageRecord>(&record)? {
        Some(found) if !found.synced && found.boot == boot_id()? => {
            rustix::fs::syncfs(File::open(layout.image(digest))?)?;
            match write_record(&record, &ImageRecord { synced: true, ..found }) {
                // Collected meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        }
        _ => Ok(()),
    }
}

/// Deletes every unpacked image that no instance refers to. `used` is asked under the lock, and a launch records
/// its image before it unpacks it, so none is deleted under an instance's feet.
pub(crate) fn collect(layout: &Layout, used: impl FnOnce() -> io::Result<HashSet<Digest>>) -> io::Result<()> {
    let _lock = FileLock::exclusive(&layout.images_lock())?;
    let used = used()?;
    for entry in fs::read_dir(layout.images())? {
        let entry = entry?;
        let digest = entry.file_name().to_str().and_then(|name| Digest::from_hex(name).ok());
        if digest.is_none_or(|digest| !used.contains(&digest)) {
            layout.discard(&entry.path())?;
            if let Some(digest) = digest {
                FileLock::exclusive(&layout.image_lock(&digest))?.remove()?;
            }
        }
    }
    Ok(())
}

fn is_whole(directory: &Path) -> io::Result<bool> {
    let record: Option<ImageRecord> = read_record(&directory.join("image.json"))?;
    let boot = boot_id()?;
    Ok(record.is_some_and(|record| record.synced || record.boot == boot))
}

fn unpack(layout: &Layout, image: &StoredImage, directory: &Path, caps: Caps) -> Result<(), DriverError> {
    // Under `images`, so that an unpacking that was cut short is collected like any image without instance.
    let work = tempfile::Builder::new().prefix("unpacking-").tempdir_in(layout.images())?;
    let root = work.path().join("root");
    fs::create_dir(&root).and_then(|()| fs::set_permissions(&root, Permissions::from_mode(0o755)))?;
    let mut extractor = Extractor::new(&root, caps)?;
    for layer in &image.layers {
        unpack_layer(&mut extractor, layer)?;
    }
    super::crash::point("compute.launch.unpacking");
    let record = ImageRecord { boot: boot_id()?, synced: false };
    write_record(&work.path().join("image.json"), &record)?;
    fs::rename(work.path(), directory)?;
    // Moved away: there is nothing left to delete under the old name.
    let _ = work.keep();
    Ok(())
}

/// One layer, its content checked against the digest that the image states for it.
fn unpack_layer(extractor: &mut Extractor, layer: &StoredLayer) -> Result<(), DriverError> {
    let mut reader = Hashing { inner: open_layer(layer)?, digester: Digester::new() };
    extractor.layer(&mut reader)?;
    // What follows the end marker belongs to the digest as well.
    io::copy(&mut reader, &mut io::sink())?;
    let found = reader.digester.finish();
    if found == layer.diff_id {
        Ok(())
    } else {
        Err(DriverError::Rejected(format!(
            "expected a layer whose content has the digest {}, got {found}",
            layer.diff_id
        )))
    }
}

struct Hashing<R> {
    inner: R,
    digester: Digester,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.digester.update(&buffer[..count]);
        Ok(count)
    }
}
