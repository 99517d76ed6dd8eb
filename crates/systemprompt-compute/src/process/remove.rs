//! Deletes directory trees that strangers made.
//!
//! A tenant may nest directories as deep as it likes, so neither descriptors nor stack may grow with the depth.
//! Directories are moved up until they lie directly in the tree's root; what is left there is only ever one level deep.

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, renameat, unlinkat},
    io::Errno,
    path::Arg,
};
use std::{
    ffi::{CStr, CString},
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::Path,
};

/// Deletes a directory and all that is in it. Fine when it is gone, and when another process deletes it as well.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    if remove_file(CWD, path)? {
        return Ok(());
    }
    let Some(root) = directory(CWD, path)? else { return Ok(()) };
    loop {
        // Again from the start until nothing comes up any more: what is moved up may appear behind the reader.
        while empty_once(&root)? {}
        match unlinkat(CWD, path, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Deletes what is in the root now, after moving the directories of its directories up. False when it was empty.
fn empty_once(root: &OwnedFd) -> io::Result<bool> {
    let mut found = false;
    for name in names(root)? {
        let name = name?;
        found = true;
        if remove_file(root, &*name)? {
            continue;
        }
        let Some(inner) = directory(root, &*name)? else { continue };
        for name in names(&inner)? {
            let name = name?;
            if !remove_file(&inner, &*name)? {
                move_up(&inner, &name, root)?;
            }
        }
        match unlinkat(root, &*name, AtFlags::REMOVEDIR) {
            // The next round sees what came meanwhile.
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

fn move_up(from: &OwnedFd, name: &CStr, root: &OwnedFd) -> io::Result<()> {
    // Its entry `..` changes, for which its owner needs the right to write.
    drop(directory(from, name)?);
    let unique = uuid::Uuid::new_v4().simple().to_string();
    match renameat(from, name, root, unique) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// False for a directory.
fn remove_file(parent: impl AsFd, name: impl Arg) -> io::Result<bool> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        Err(Errno::ISDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Opens a directory that is no link, and makes it its owner's to read and to change; nothing when it is gone.
fn directory(parent: impl AsFd, name: impl Arg) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let place = match openat(parent, name, flags | OFlags::PATH, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        place => place?,
    };
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&place)?.st_mode);
    if !mode.contains(Mode::RWXU) {
        // A descriptor of a path cannot be changed itself, and by name it might be another meanwhile.
        let path = format!("/proc/self/fd/{}", place.as_raw_fd());
        fs::set_permissions(path, PermissionsExt::from_mode(0o700))?;
    }
    Ok(Some(openat(&place, c".", flags, Mode::empty())?))
}

/// Names in a directory, but for itself and its parent.
fn names(directory: &OwnedFd) -> io::Result<impl Iterator<Item = io::Result<CString>> + use<>> {
    let entries = Dir::read_from(directory)?;
    Ok(entries.filter_map(|entry| match entry {
        Ok(entry) if [c".", c".."].contains(&entry.file_name()) => None,
        Ok(entry) => Some(Ok(entry.file_name().to_owned())),
        Err(error) => Some(Err(error.into())),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{mkdirat, symlinkat};

    #[test]
    fn no_depth_is_too_deep_and_no_link_leads_out() {
        let directory = tempfile::tempdir().expect("directory");
        let canary = directory.path().join("canary");
        fs::create_dir(&canary).expect("canary");
        fs::write(canary.join("file"), "kept").expect("canary");
        let root = directory.path().join("root");
        fs::create_dir(&root).expect("root");
        // Deeper than descriptors and stack may last, and than a path can be long.
        let mut at = super::directory(CWD, &root).expect("root").expect("there");
        for level in 0..3000 {
            mkdirat(&at, c"d", Mode::RWXU).expect("directory");
            if level % 1000 == 0 {
                symlinkat(&*canary, &at, c"link").expect("link");
                mkdirat(&at, c"beside", Mode::RWXU).expect("directory");
            }
            at = openat(&at, c"d", OFlags::DIRECTORY, Mode::empty()).expect("directory");
        }
        drop(at);
        fs::set_permissions(root.join("beside"), PermissionsExt::from_mode(0o000)).expect("mode");
        let remove = || {
            remove_tree(&root).expect("a removal");
            remove_tree(&root).expect("a removal of what is removed");
        };
        std::thread::scope(|scope| {
            let small = std::thread::Builder::new().stack_size(128 << 10);
            small.spawn_scoped(scope, remove).expect("a thread").join().expect("no panic");
        });
        assert!(!root.exists());
        assert_eq!(fs::read_to_string(canary.join("file")).expect("canary"), "kept");
    }

    #[test]
    fn two_at_once_both_end() {
        let directory = tempfile::tempdir().expect("directory");
        let root = directory.path().join("root");
        for branch in 0..50 {
            fs::create_dir_all(root.join(format!("{branch}/a/b/c"))).expect("tree");
            fs::write(root.join(format!("{branch}/a/file")), "x").expect("file");
        }
        std::thread::scope(|scope| {
            for remover in [scope.spawn(|| remove_tree(&root)), scope.spawn(|| remove_tree(&root))] {
                remover.join().expect("no panic").expect("a removal");
            }
        });
        assert!(!root.exists());
    }
}
