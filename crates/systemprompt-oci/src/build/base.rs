//! The lowest layer: what a base image would bring, and no more.

use super::{
    BuildError,
    collect::regular_file,
    elf,
    plan::{LayerDraft, PlannedEntry, PlannedLayer, Source, directory, generated},
};
use std::path::{Path, PathBuf};

/// The user the image runs as.
pub(crate) const USER: &str = "app";

const PASSWD: &str = "root:x:0:0:root:/:/usr/sbin/nologin\napp:x:10001:10001:app:/app:/usr/sbin/nologin\n\
                      nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\napp:x:10001:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
const NSSWITCH: &str = "passwd: files\ngroup: files\nhosts: files dns\n";

/// Folders that a read-only root needs as mount points, and those the program expects.
const FOLDERS: [(&str, u32); 8] = [
    ("app/logs", 0o755),
    ("app/storage", 0o755),
    ("dev", 0o755),
    ("proc", 0o755),
    ("run", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("var/tmp", 0o1777),
];

/// Where distributions keep their certificate bundle.
const CA_BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// The base layer for `program`, and the architecture it is for.
pub(crate) fn layer(program: &Path, ca_bundle: Option<&Path>) -> Result<(PlannedLayer, &'static str), BuildError> {
    let closure = elf::closure(program)?;
    let mut draft = LayerDraft::default();
    for (path, mode) in FOLDERS {
        draft.add(directory(path, mode));
    }
    for (path, content) in [
        ("etc/passwd", PASSWD),
        ("etc/group", GROUP),
        ("etc/hosts", HOSTS),
        ("etc/nsswitch.conf", NSSWITCH),
        ("etc/resolv.conf", ""), // the driver binds its own over it
    ] {
        draft.add(generated(path, content));
    }
    draft.add(system_file(&ca_bundle_path(ca_bundle)?, "etc/ssl/certs/ca-certificates.crt", 0o644)?);
    for (path, found) in &closure.files {
        draft.add(system_file(found, path, 0o755)?);
    }
    Ok((draft.finish("base"), closure.architecture))
}

fn ca_bundle_path(named: Option<&Path>) -> Result<PathBuf, BuildError> {
    match named {
        Some(path) => Ok(path.to_owned()),
        None => CA_BUNDLES.iter().map(PathBuf::from).find(|path| path.is_file()).ok_or(BuildError::NoCaBundle),
    }
}

fn system_file(path: &Path, image_path: &str, mode: u32) -> Result<PlannedEntry, BuildError> {
    let (path, size) = regular_file(path)?;
    Ok(PlannedEntry { path: image_path.to_owned(), mode, size, source: Source::System(path) })
}
