//! A small project on disk, and an image built of it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
};
use systemprompt_oci::{
    BuiltImage, ImageBuilder, StoredLayer,
    build::{BuildError, BuildEvent, BuildSpec, LayerCache, Plan},
    open_layer,
};

pub(crate) struct Project {
    dir: tempfile::TempDir,
}

impl Project {
    /// web/dist, services and the profile `prod`.
    pub(crate) fn new() -> Self {
        let project = Self { dir: tempfile::tempdir().expect("dir") };
        project.write("web/dist/index.html", "<h1>hello</h1>");
        project.write("web/dist/assets/app.js", "console.log(1)");
        project.write("web/dist/assets/style.css", "body {}");
        project.write("services/config/config.yaml", "agents: {}\n");
        project.write(".systemprompt/profiles/prod/profile.yaml", "name: prod\n");
        project
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("project")
    }

    pub(crate) fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    pub(crate) fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().expect("below the root")).expect("folders");
        fs::write(path, content).expect("write");
    }

    /// A small program that is the same for every project of one test run.
    pub(crate) fn spec(&self) -> BuildSpec {
        BuildSpec::new(self.root(), "/bin/true", "prod")
    }

    pub(crate) fn plan(&self) -> Plan {
        ImageBuilder::new(self.spec()).plan().expect("plan")
    }

    pub(crate) fn plan_error(&self) -> BuildError {
        ImageBuilder::new(self.spec()).plan().expect_err("no plan")
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    pub(crate) fn cache(&self) -> LayerCache {
        LayerCache::open(self.cache_dir()).expect("cache")
    }

    pub(crate) fn build(&self) -> BuiltImage {
        build(&self.spec(), &self.cache()).expect("image").0
    }
}

/// The image, and the names of the layers that were not in the cache.
pub(crate) fn build(spec: &BuildSpec, cache: &LayerCache) -> Result<(BuiltImage, Vec<String>), BuildError> {
    let builder = ImageBuilder::new(spec.clone());
    let written = Mutex::new(Vec::new());
    let image = builder.build(&builder.plan()?, cache, &|event| {
        if let BuildEvent::Layer { name, cached: false, .. } = event {
            written.lock().expect("no panic").push(name);
        }
    })?;
    let mut written = written.into_inner().expect("no panic");
    written.sort();
    Ok((image, written))
}

/// Path, mode and content of every entry of the image, in order.
pub(crate) fn entries(image: &BuiltImage) -> Vec<(String, u32, Vec<u8>)> {
    image.layers.iter().flat_map(layer_entries).collect()
}

pub(crate) fn layer_entries(layer: &StoredLayer) -> Vec<(String, u32, Vec<u8>)> {
    let mut archive = tar::Archive::new(open_layer(layer).expect("layer"));
    let mut entries = Vec::new();
    for entry in archive.entries().expect("tar") {
        let mut entry = entry.expect("entry");
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut content).expect("content");
        let path = entry.path().expect("path").to_string_lossy().trim_end_matches('/').to_owned();
        entries.push((path, entry.header().mode().expect("mode"), content));
    }
    entries
}

/// Copies a folder, giving every file new times and another inode.
pub(crate) fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("folder");
    for entry in fs::read_dir(from).expect("folder") {
        let entry = entry.expect("entry");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("type").is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copy");
        }
    }
}
