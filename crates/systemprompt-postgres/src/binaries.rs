//! Which server the host has.

use crate::PostgresError;
use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The oldest major version that is known to work.
pub const MINIMUM_VERSION: u32 = 15;

/// Where Debian puts one directory for each major version.
const DEBIAN_ROOT: &str = "/usr/lib/postgresql";

/// Where the server's binaries are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BinarySearch {
    directories: Vec<PathBuf>,
}

impl BinarySearch {
    /// Everything on `PATH`, then `/usr/lib/postgresql/*/bin`.
    pub fn host() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        Self::in_path(&path, Path::new(DEBIAN_ROOT))
    }

    /// This directory only.
    pub fn only(directory: impl Into<PathBuf>) -> Self {
        Self { directories: vec![directory.into()] }
    }

    fn in_path(path: &OsStr, root: &Path) -> Self {
        let mut directories: Vec<PathBuf> = std::env::split_paths(path).filter(|part| part.is_absolute()).collect();
        let versions = std::fs::read_dir(root).into_iter().flatten().flatten();
        directories.extend(versions.map(|version| version.path().join("bin")).filter(|bin| bin.is_dir()));
        directories.dedup();
        Self { directories }
    }

    /// The newest installed server for a new cluster, or the one of exactly `wanted`'s version for old data.
    pub(crate) fn find(&self, wanted: Option<DataVersion<'_>>) -> Result<Binaries, PostgresError> {
        let mut found: Vec<Binaries> =
            self.directories.iter().filter_map(|path| Binaries::in_directory(path)).collect();
        found.sort_by_key(|binaries| std::cmp::Reverse(binaries.version));
        let Some(newest) = found.first() else {
            return Err(PostgresError::NotInstalled { looked: self.directories.clone() });
        };
        if newest.version < MINIMUM_VERSION {
            return Err(PostgresError::TooOld { found: newest.version, directory: newest.directory.clone() });
        }
        let Some(DataVersion { data, version }) = wanted else { return Ok(newest.clone()) };
        let matching = found.iter().find(|binaries| binaries.version == version).cloned();
        matching.ok_or_else(|| {
            let mut installed: Vec<u32> = found.iter().map(|binaries| binaries.version).collect();
            installed.dedup();
            PostgresError::VersionMismatch { data: data.to_owned(), wanted: version, installed }
        })
    }
}

/// The major version that wrote a data directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataVersion<'a> {
    pub(crate) data: &'a Path,
    pub(crate) version: u32,
}

/// One installed server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binaries {
    directory: PathBuf,
    pub(crate) version: u32,
}

impl Binaries {
    fn in_directory(directory: &Path) -> Option<Self> {
        // A client package has neither; only both together can make and run a cluster.
        if !directory.join("postgres").is_file() || !directory.join("initdb").is_file() {
            return None;
        }
        let output = Command::new(directory.join("postgres")).arg("--version").stdin(Stdio::null()).output().ok()?;
        let version = major_version(&String::from_utf8_lossy(&output.stdout))?;
        Some(Self { directory: directory.to_owned(), version })
    }

    pub(crate) fn postgres(&self) -> PathBuf {
        self.directory.join("postgres")
    }

    pub(crate) fn initdb(&self) -> PathBuf {
        self.directory.join("initdb")
    }
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, `postgres (PostgreSQL) 18devel`.
fn major_version(text: &str) -> Option<u32> {
    let (_, rest) = text.split_once("(PostgreSQL) ")?;
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_major_version_is_read_from_what_servers_print() {
        for (text, expected) in [
            ("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 18devel\n", Some(18)),
            ("postgres (PostgreSQL) 9.6.24\n", Some(9)),
            ("something else 17", None),
            ("", None),
        ] {
            assert_eq!(major_version(text), expected, "{text}");
        }
    }

    #[test]
    fn the_newest_serves_new_clusters_and_the_matching_one_old_data() {
        let root = tempfile::tempdir().unwrap();
        for version in [14, 15, 17] {
            fake(&root.path().join(version.to_string()).join("bin"), version);
        }
        let search = BinarySearch::in_path(OsStr::new(""), root.path());
        assert_eq!(search.find(None).unwrap().version, 17);
        let data = Path::new("/data");
        assert_eq!(search.find(Some(DataVersion { data, version: 15 })).unwrap().version, 15);
        let error = search.find(Some(DataVersion { data, version: 16 })).unwrap_err().to_string();
        assert!(error.contains("PostgreSQL 16, installed is 17, 15, 14"), "{error}");
        assert!(error.contains("apt-get install postgresql-16"), "{error}");
    }

    fn fake(bin: &Path, version: u32) {
        std::fs::create_dir_all(bin).unwrap();
        for name in ["postgres", "initdb"] {
            let file = bin.join(name);
            std::fs::write(&file, format!("#!/bin/sh\necho '{name} (PostgreSQL) {version}.1'\n")).unwrap();
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        }
    }
}
