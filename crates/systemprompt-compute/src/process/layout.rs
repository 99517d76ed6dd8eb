//! Where things are below the data directory, and how small records are written so that a crash leaves either
//! the old or the new one.
//!
//! ```text
//! installation            six hex digits that tell this installation's chains and links from others' on the machine
//! place                   device and inode of the data directory: a copy of it is another installation
//! uids                    how far the kernel uids of its apps go
//! apps/{app}/app.json     tenant, uid
//! apps/{app}/storage/     the volume, owned by the app's uid
//! apps/{app}/instances/{deployment}/{instance.json, status, output, times, resolv.conf}
//! images/{hex}/{root/, image.json}
//! locks/                  flock files: installation, images, image.{hex}, {app}, {app}.{deployment}
//! trash/                  what is being deleted
//! ```

use super::{remove::remove_tree, times};
use crate::{AppHandle, DriverError, InstanceHandle};
use serde::{Serialize, de::DeserializeOwned};
use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};
use systemprompt_contract::{AppName, DeploymentId};
use systemprompt_oci::Digest;

/// The data directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

/// One instance, named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InstanceKey {
    pub(crate) app: AppName,
    pub(crate) deployment: DeploymentId,
}

impl InstanceKey {
    pub(crate) fn handle(&self) -> InstanceHandle {
        InstanceHandle::new(format!("{}/{}", self.app, self.deployment))
    }

    /// The key behind a handle of ours.
    pub(crate) fn parse(handle: &InstanceHandle) -> Result<Self, DriverError> {
        let unknown = || DriverError::NotFound(format!("expected an instance of the process driver, got {handle}"));
        let (app, deployment) = handle.as_str().split_once('/').ok_or_else(unknown)?;
        Ok(Self { app: app.parse().map_err(|_| unknown())?, deployment: deployment.parse().map_err(|_| unknown())? })
    }
}

/// The app behind a handle of ours.
pub(crate) fn parse_app(handle: &AppHandle) -> Result<AppName, DriverError> {
    let unknown = |_| DriverError::NotFound(format!("expected an app of the process driver, got {handle}"));
    handle.as_str().parse().map_err(unknown)
}

impl Layout {
    /// Makes nothing.
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Makes the directories that are always there; only the owner may look into them.
    pub(crate) fn create(root: &Path) -> io::Result<Self> {
        let layout = Self::at(root);
        for directory in [layout.apps(), layout.images(), layout.locks(), layout.trash()] {
            private_directory(&directory)?;
        }
        Ok(layout)
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }
    pub(crate) fn apps(&self) -> PathBuf {
        self.root.join("apps")
    }
    pub(crate) fn app(&self, app: &AppName) -> PathBuf {
        self.apps().join(app.as_str())
    }
    pub(crate) fn app_record(&self, app: &AppName) -> PathBuf {
        self.app(app).join("app.json")
    }
    pub(crate) fn storage(&self, app: &AppName) -> PathBuf {
        self.app(app).join("storage")
    }
    pub(crate) fn instances(&self, app: &AppName) -> PathBuf {
        self.app(app).join("instances")
    }
    pub(crate) fn instance(&self, key: &InstanceKey) -> InstanceFiles {
        InstanceFiles(self.instances(&key.app).join(key.deployment.to_string()))
    }
    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }
    pub(crate) fn image(&self, digest: &Digest) -> PathBuf {
        self.images().join(digest.hex())
    }
    pub(crate) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }
    pub(crate) fn uids(&self) -> PathBuf {
        self.root.join("uids")
    }
    pub(crate) fn installation(&self) -> PathBuf {
        self.root.join("installation")
    }
    pub(crate) fn place(&self) -> PathBuf {
        self.root.join("place")
    }
    fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }
    pub(crate) fn installation_lock(&self) -> PathBuf {
        self.locks().join("installation")
    }
    pub(crate) fn images_lock(&self) -> PathBuf {
        self.locks().join("images")
    }
    pub(crate) fn image_lock(&self, digest: &Digest) -> PathBuf {
        self.locks().join(format!("image.{}", digest.hex()))
    }
    pub(crate) fn app_lock(&self, app: &AppName) -> PathBuf {
        self.locks().join(app.as_str())
    }
    pub(crate) fn instance_lock(&self, key: &InstanceKey) -> PathBuf {
        self.locks().join(format!("{}.{}", key.app, key.deployment))
    }

    /// All apps, also half-made ones.
    pub(crate) fn list_apps(&self) -> io::Result<Vec<AppName>> {
        list(&self.apps())
    }

    /// All instances of an app, also half-made ones.
    pub(crate) fn list_instances(&self, app: &AppName) -> io::Result<Vec<InstanceKey>> {
        let deployments: Vec<DeploymentId> = list(&self.instances(app))?;
        Ok(deployments.into_iter().map(|deployment| InstanceKey { app: app.clone(), deployment }).collect())
    }

    /// Deletes a directory so that it is gone under its name at once and for good, whatever happens meanwhile.
    /// On an error what is left lies in the trash, under this name.
    pub(crate) fn discard(&self, directory: &Path) -> io::Result<()> {
        let name = directory.file_name().ok_or_else(|| io::Error::other("expected a directory with a name"))?;
        let trashed = self.trash().join(format!("{}.{}", name.display(), uuid::Uuid::new_v4().simple()));
        match fs::rename(directory, &trashed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => remove_tree(&trashed),
        }
    }

    /// Deletes what an interrupted [`Layout::discard`] left: of directories with this name, or all.
    ///
    /// # Errors
    /// The first that could not be deleted; the others have been all the same.
    pub(crate) fn empty_trash(&self, name: Option<&str>) -> io::Result<()> {
        let mut result = Ok(());
        for entry in fs::read_dir(self.trash())? {
            let entry = entry?;
            let of = entry.file_name().to_str().and_then(|name| name.rsplit_once('.')).map(|(of, _)| of.to_owned());
            if name.is_none() || name == of.as_deref() {
                result = result.and(remove_tree(&entry.path()));
            }
        }
        result
    }
}

/// The files of one instance.
#[derive(Debug, Clone)]
pub(crate) struct InstanceFiles(PathBuf);

impl InstanceFiles {
    pub(crate) fn directory(&self) -> &Path {
        &self.0
    }
    pub(crate) fn record(&self) -> PathBuf {
        self.0.join("instance.json")
    }
    pub(crate) fn status(&self) -> PathBuf {
        self.0.join("status")
    }
    pub(crate) fn output(&self) -> PathBuf {
        self.0.join("output")
    }
    pub(crate) fn times(&self) -> PathBuf {
        times::beside(&self.output())
    }
    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.0.join("resolv.conf")
    }
    /// The files below a path that [`InstanceFiles::directory`] gave.
    pub(crate) fn at(directory: PathBuf) -> Self {
        Self(directory)
    }
}

fn list<T: std::str::FromStr>(directory: &Path) -> io::Result<Vec<T>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        found.extend(entry?.file_name().to_str().and_then(|name| name.parse().ok()));
    }
    Ok(found)
}

/// Makes a directory and those above it, 0700, or leaves it as it is.
pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Reads a record; nothing when there is no such file.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {error}", path.display()))),
    }
}

/// Writes a record, 0600, so that the file holds the old or the new one at any instant and after a power cut.
pub(crate) fn write_record<T: Serialize>(path: &Path, record: &T) -> io::Result<()> {
    let directory = path.parent().ok_or_else(|| io::Error::other("a record needs a directory"))?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    serde_json::to_writer(&mut file, record)?;
    file.flush()?;
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_finds_its_instance_again_and_nothing_else_parses() {
        let key = InstanceKey { app: "sp-0123456789ab".parse().expect("app"), deployment: DeploymentId::new() };
        assert_eq!(InstanceKey::parse(&key.handle()).expect("own handle"), key);
        for bad in ["", "sp-0123456789ab", "sp-0123456789ab/..", "../etc/passwd", "sp-0123456789ab/x/y"] {
            assert!(InstanceKey::parse(&InstanceHandle::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_discarded_directory_is_gone_and_may_be_gone_already() {
        let directory = tempfile::tempdir().expect("directory");
        let layout = Layout::create(directory.path()).expect("layout");
        let victim = layout.images().join("x");
        fs::create_dir_all(victim.join("y")).expect("victim");
        layout.discard(&victim).expect("first");
        layout.discard(&victim).expect("again");
        assert!(!victim.exists());
        assert_eq!(fs::read_dir(layout.trash()).expect("trash").count(), 0);
    }

    #[test]
    fn trash_is_emptied_by_name_or_as_a_whole() {
        let directory = tempfile::tempdir().expect("directory");
        let layout = Layout::create(directory.path()).expect("layout");
        for left in ["a.1", "a.2", "b.1"] {
            fs::create_dir_all(layout.trash().join(left).join("x")).expect("left");
        }
        layout.empty_trash(Some("a")).expect("one");
        assert_eq!(fs::read_dir(layout.trash()).expect("trash").count(), 1);
        layout.empty_trash(None).expect("all");
        assert_eq!(fs::read_dir(layout.trash()).expect("trash").count(), 0);
    }
}
