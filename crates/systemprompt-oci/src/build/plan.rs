use crate::ImageConfig;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

/// Everything that will go into an image, decided before anything is read: what `--dry-run` shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Lowest (least often changing) first.
    pub layers: Vec<PlannedLayer>,
    /// What was found and does not go in, with the reason.
    pub left_out: Vec<LeftOut>,
    /// How the image will be run. Its `diff_ids` are filled in by the build.
    pub config: ImageConfig,
}

impl Plan {
    /// Sum of the sizes of all files, in bytes, before compression.
    pub fn size_bytes(&self) -> u64 {
        self.layers.iter().map(PlannedLayer::size_bytes).sum()
    }
}

/// One layer to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedLayer {
    /// For people: `base`, `binary`, `services`, `web-07`, …
    pub name: String,
    /// Sorted by path; a directory comes before what is in it.
    pub entries: Vec<PlannedEntry>,
}

impl PlannedLayer {
    /// Sum of the sizes of its files, in bytes, before compression.
    pub fn size_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.size).sum()
    }
}

/// One file or directory of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedEntry {
    /// In the image, without a leading slash.
    pub path: String,
    /// Permission bits; owner and group are always root.
    pub mode: u32,
    /// In bytes; 0 for a directory.
    pub size: u64,
    /// Where its content comes from.
    pub source: Source,
}

/// Where the content of an entry comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// No content.
    Directory,
    /// Written by the builder itself.
    Generated {
        /// The whole content.
        #[serde(skip)]
        content: Vec<u8>,
    },
    /// A file of the machine the image is built on: a library, the certificate bundle.
    System(PathBuf),
    /// A file of the project, or the program: scanned for secrets unless allowed by name.
    Project {
        /// Where it is.
        path: PathBuf,
        /// As people call it: relative to the project.
        shown: PathBuf,
        /// False when `allow_secret` names it.
        scan: bool,
    },
}

impl Source {
    /// The file behind the entry, if there is one.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            Self::Directory | Self::Generated { .. } => None,
            Self::System(path) | Self::Project { path, .. } => Some(path),
        }
    }

    pub(crate) fn is_scanned(&self) -> bool {
        matches!(self, Self::Project { scan: true, .. })
    }
}

/// Something that does not go into the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// Relative to the project.
    pub path: PathBuf,
    /// Why.
    pub why: LeftOutReason,
}

/// Why something does not go into the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LeftOutReason {
    /// `credentials.json`, `tenants.json`, `secrets.json`.
    Credentials,
    /// `.env`, `.env.*` and `.envrc`.
    EnvironmentFile,
    /// `.git`.
    GitData,
    /// `.systemprompt`.
    State,
    /// A line of `.dockerignore`.
    Ignored {
        /// Counted from 1.
        line: usize,
    },
    /// A symbolic link that leads out of the project, or nowhere.
    LinkOutside,
    /// A symbolic link to a folder; links to files inside the project become files.
    LinkToDirectory,
    /// A socket, pipe or device.
    SpecialFile,
    /// A name that layers use to delete files (`.wh.…`).
    WhiteoutName,
    /// A name that is not UTF-8.
    NameNotUtf8,
    /// Something else than `profile.yaml` in the folder of a profile.
    NotOfProfile,
}

impl fmt::Display for LeftOutReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Credentials => f.write_str("holds credentials"),
            Self::EnvironmentFile => f.write_str("environment file"),
            Self::GitData => f.write_str("version control data"),
            Self::State => f.write_str("private state of the project"),
            Self::Ignored { line } => write!(f, "line {line} of .dockerignore"),
            Self::LinkOutside => f.write_str("link out of the project"),
            Self::LinkToDirectory => f.write_str("link to a folder"),
            Self::SpecialFile => f.write_str("not a regular file"),
            Self::WhiteoutName => f.write_str("its name means a deletion in an image"),
            Self::NameNotUtf8 => f.write_str("its name is not UTF-8"),
            Self::NotOfProfile => f.write_str("only profile.yaml of a profile goes in"),
        }
    }
}

/// Collects the files of one layer; adds the folders above them.
#[derive(Default)]
pub(crate) struct LayerDraft(BTreeMap<String, PlannedEntry>);

impl LayerDraft {
    pub(crate) fn add(&mut self, entry: PlannedEntry) {
        let mut parent = entry.path.as_str();
        while let Some((above, _)) = parent.rsplit_once('/') {
            parent = above;
            if !self.0.contains_key(parent) {
                self.0.insert(parent.to_owned(), directory(parent, 0o755));
            }
        }
        self.0.insert(entry.path.clone(), entry);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Sorted by path, which puts every folder before its content.
    pub(crate) fn finish(self, name: impl Into<String>) -> PlannedLayer {
        PlannedLayer { name: name.into(), entries: self.0.into_values().collect() }
    }
}

pub(crate) fn directory(path: &str, mode: u32) -> PlannedEntry {
    PlannedEntry { path: path.to_owned(), mode, size: 0, source: Source::Directory }
}

pub(crate) fn generated(path: &str, content: &str) -> PlannedEntry {
    let content = content.as_bytes().to_vec();
    PlannedEntry {
        path: path.to_owned(),
        mode: 0o644,
        size: content.len() as u64,
        source: Source::Generated { content },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_comes_before_its_content_and_once() {
        let mut draft = LayerDraft::default();
        for path in ["app/web/b", "app/web/a/x", "app/web-old", "app/web/a.b"] {
            draft.add(generated(path, ""));
        }
        let paths: Vec<_> = draft.finish("x").entries.into_iter().map(|entry| entry.path).collect();
        assert_eq!(paths, ["app", "app/web", "app/web-old", "app/web/a", "app/web/a.b", "app/web/a/x", "app/web/b"]);
    }
}
