//! As whom a server runs, and whether that user can get to its data.

use crate::PostgresError;
use std::{
    fs, io,
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, fchown},
        process::CommandExt,
    },
    path::Path,
    process::Command,
};

/// The user a server runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Owner {
    pub(crate) uid: u32,
    gid: u32,
    name: String,
    /// Who connects as the superuser: the user of this process.
    invoker: String,
    /// This process is root and has to hand things over.
    from_root: bool,
}

impl Owner {
    /// The invoking user; for root, whom PostgreSQL refuses, the user `postgres`.
    ///
    /// Never `nobody`: other processes of the host run as that, and would own the data.
    pub(crate) fn find() -> Result<Self, PostgresError> {
        let passwd = Path::new("/etc/passwd");
        let users = fs::read_to_string(passwd).map_err(PostgresError::io("reading", passwd))?;
        let uid = rustix::process::geteuid().as_raw();
        let gid = rustix::process::getegid().as_raw();
        Self::choose(&users, uid, gid)
    }

    fn choose(users: &str, uid: u32, gid: u32) -> Result<Self, PostgresError> {
        let invoker =
            user(users, |entry| entry.uid == uid).map_or_else(|| uid.to_string(), |entry| entry.name.to_owned());
        if uid != 0 {
            return Ok(Self { uid, gid, name: invoker.clone(), invoker, from_root: false });
        }
        let postgres = user(users, |entry| entry.name == "postgres").ok_or(PostgresError::NoUser)?;
        Ok(Self { uid: postgres.uid, gid: postgres.gid, name: postgres.name.to_owned(), invoker, from_root: true })
    }

    /// The operating system's name of whoever may be the superuser.
    pub(crate) fn invoker(&self) -> &str {
        &self.invoker
    }

    /// Makes `command` run as this user, with nothing of our environment.
    pub(crate) fn dress(&self, command: &mut Command) {
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8").current_dir("/");
        if self.from_root {
            // The standard library drops the supplementary groups with the uid.
            command.uid(self.uid).gid(self.gid);
        }
    }

    /// Hands a file or directory of ours over to this user.
    pub(crate) fn give(&self, path: &Path) -> io::Result<()> {
        if self.from_root { chown(path, Some(self.uid), Some(self.gid)) } else { Ok(()) }
    }

    /// The same for an open file.
    pub(crate) fn give_file(&self, file: &fs::File) -> io::Result<()> {
        if self.from_root { fchown(file, Some(self.uid), Some(self.gid)) } else { Ok(()) }
    }

    /// Every directory above `path` must let this user through.
    pub(crate) fn check_reach(&self, path: &Path) -> Result<(), PostgresError> {
        for directory in path.ancestors().skip(1).filter(|directory| !directory.as_os_str().is_empty()) {
            let metadata = fs::metadata(directory).map_err(PostgresError::io("looking at", directory))?;
            if !self.may_pass(metadata.uid(), metadata.gid(), metadata.permissions().mode()) {
                return Err(PostgresError::NotTraversable { directory: directory.to_owned(), user: self.name.clone() });
            }
        }
        Ok(())
    }

    const fn may_pass(&self, uid: u32, gid: u32, mode: u32) -> bool {
        let execute = if uid == self.uid {
            0o100
        } else if gid == self.gid {
            0o010
        } else {
            0o001
        };
        mode & execute != 0
    }
}

struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

fn user<'a>(users: &'a str, mut wanted: impl FnMut(&Entry<'a>) -> bool) -> Option<Entry<'a>> {
    users
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            Some(Entry { name, uid: uid.parse().ok()?, gid: gid.parse().ok()? })
        })
        .find(|entry| wanted(entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: &str =
        "root:x:0:0:root:/root:/bin/bash\nnobody:x:65534:65534::/:/bin/false\nann:x:1000:1000::/home/ann:/bin/sh\n";

    #[test]
    fn root_hands_over_to_postgres_and_never_to_nobody() {
        let with = format!("{USERS}postgres:x:101:104::/var/lib/postgresql:/bin/bash\n");
        let owner = Owner::choose(&with, 0, 0).unwrap();
        assert_eq!((owner.uid, owner.gid, owner.invoker()), (101, 104, "root"));
        let error = Owner::choose(USERS, 0, 0).unwrap_err();
        assert!(error.to_string().contains("adduser"), "{error}");
    }

    #[test]
    fn anybody_else_runs_it_as_himself() {
        let owner = Owner::choose(USERS, 1000, 1000).unwrap();
        assert_eq!((owner.uid, owner.invoker(), owner.from_root), (1000, "ann", false));
    }

    #[test]
    fn who_passes_a_directory_depends_on_owner_group_and_others() {
        let owner = Owner::choose(USERS, 1000, 1000).unwrap();
        for (uid, gid, mode, expected) in [
            (1000, 1, 0o700, true),
            (1000, 1, 0o077, false),
            (1, 1000, 0o710, true),
            (1, 1, 0o710, false),
            (1, 1, 0o711, true),
        ] {
            assert_eq!(owner.may_pass(uid, gid, mode), expected, "{uid} {gid} {mode:o}");
        }
    }
}
