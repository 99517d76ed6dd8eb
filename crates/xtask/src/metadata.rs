//! What `cargo metadata` says of the workspace, as far as the tasks ask.

use crate::shell::Shell;
use anyhow::{Context as _, Result};
use serde::Deserialize;
use std::path::PathBuf;

/// The workspace's own packages.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    pub(crate) packages: Vec<Package>,
    pub(crate) target_directory: PathBuf,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) manifest_path: PathBuf,
    /// `Some([])` is `publish = false`.
    pub(crate) publish: Option<Vec<String>>,
    pub(crate) dependencies: Vec<Dependency>,
    pub(crate) targets: Vec<Target>,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) kind: Option<DependencyKind>,
    #[serde(default)]
    pub(crate) features: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DependencyKind {
    Dev,
    Build,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Target {
    pub(crate) kind: Vec<String>,
    pub(crate) src_path: PathBuf,
}

impl Metadata {
    pub(crate) fn read(shell: &Shell) -> Result<Self> {
        let text = shell.read_quiet(&mut shell.cargo(["metadata", "--format-version", "1", "--no-deps"]))?;
        serde_json::from_str(&text).context("`cargo metadata` answered something unknown")
    }
}

impl Package {
    /// Whether it depends on the crate `name`, also only for its tests.
    pub(crate) fn uses(&self, name: &str) -> bool {
        self.dependencies.iter().any(|dependency| dependency.name == name)
    }

    /// Whether others could only run it, not use it.
    pub(crate) fn is_binary_only(&self) -> bool {
        !self.targets.iter().any(|target| target.kind.iter().any(|kind| kind == "lib"))
    }
}
