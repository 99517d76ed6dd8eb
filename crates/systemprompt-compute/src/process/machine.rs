//! What the installations of one machine share: a lock, and a record of which address and which user is whose.
//!
//! Both are in a directory of root's own, 0700: in `/run/lock`, where everybody may write, any user could put a link
//! in the lock's place, or hold it for ever. It is not below `/run`, since apps keep addresses and users over a boot.

use super::{
    address::{Ipv4Network, Link},
    host,
    layout::{read_record, write_record},
    lock::FileLock,
    network::{set_sysctl, sysctl},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::Ipv4Addr,
    ops::Range,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

/// Where the lock and the record are.
pub(crate) const DIRECTORY: &str = "/var/lib/systemprompt-machine";

/// Uids of apps. Below are people, services, subordinate ids, systemd's containers (up to 1,879,048,191) and what
/// directory services make of foreign accounts (up to 2,000,200,000); above are systemd's foreign ids.
pub(crate) const UIDS: Range<u32> = 2_001_000_000..2_147_352_576;

/// The machine's record, locked until dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    _lock: FileLock,
    path: PathBuf,
    record: Record,
}

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Record {
    /// By a link's network, the directory of the instance it is reserved for. When that is gone, so is the claim.
    links: BTreeMap<Ipv4Addr, PathBuf>,
    /// Where the search for a free link goes on. An address that was just given back is not given to another tenant:
    /// an edge that has missed the change would lead the old one's visitors there.
    next_slot: u32,
    /// All uids of the range below it were given away, none is given twice: files may outlive their app.
    next_uid: u32,
    forwarding: Option<Forwarding>,
}

/// Which devices forward only because we switched it on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Forwarding {
    boot: String,
    /// The switch of the whole machine, as it was then: whoever turned it later has decided for every device.
    all: String,
    devices: BTreeSet<String>,
}

impl Machine {
    /// Waits for the lock of the whole machine.
    pub(crate) fn lock() -> io::Result<Self> {
        Self::lock_in(Path::new(DIRECTORY))
    }

    fn lock_in(directory: &Path) -> io::Result<Self> {
        own_directory(directory)?;
        let lock = FileLock::exclusive(&directory.join("lock"))?;
        let path = directory.join("machine.json");
        let record = read_record(&path)?.unwrap_or_default();
        Ok(Self { _lock: lock, path, record })
    }

    /// Reserves a link of the pool for the instance in the directory `owner`: the preferred one, if nobody else has
    /// it. `routed` are the networks that the host routes.
    pub(crate) fn reserve(
        &mut self,
        pool: Ipv4Network,
        owner: &Path,
        preferred: Option<u32>,
        routed: &[Ipv4Network],
    ) -> io::Result<u32> {
        self.record.links.retain(|_, other| other != owner && other.try_exists().unwrap_or(true));
        let reserved = self.record.links.keys().filter_map(|base| Ipv4Network::new(*base, 30));
        let taken: Vec<_> = reserved.chain(routed.iter().copied()).collect();
        let slot = pool.free_slot(preferred, self.record.next_slot, &taken).ok_or_else(|| {
            io::Error::new(io::ErrorKind::QuotaExceeded, format!("no free /30 network is left in the pool {pool}"))
        })?;
        if preferred != Some(slot) {
            self.record.next_slot = slot + 1;
        }
        self.record.links.insert(pool.slot(slot).base(), owner.to_owned());
        self.save()?;
        Ok(slot)
    }

    /// Enters what an installation has by its own records, in case that this one was lost or the data was moved:
    /// links, if they are nobody else's, and how far its uids went.
    pub(crate) fn claim(
        &mut self,
        links: impl IntoIterator<Item = (Link, PathBuf)>,
        next_uid: Option<u32>,
    ) -> io::Result<()> {
        for (link, owner) in links {
            let holder = self.record.links.entry(link.base()).or_insert_with(|| owner.clone());
            if !holder.try_exists().unwrap_or(true) {
                *holder = owner;
            }
        }
        self.record.next_uid = self.record.next_uid.max(next_uid.unwrap_or_default());
        self.save()
    }

    /// A uid that no app had before, that is nobody's subordinate id, and under which nothing runs.
    pub(crate) fn give_uid(&mut self) -> io::Result<u32> {
        let mut subordinate = Vec::new();
        for file in ["/etc/subuid", "/etc/subgid"] {
            subordinate.extend(parse_subordinate(&fs::read_to_string(file).unwrap_or_default()));
        }
        let mut uid = free_uid(self.record.next_uid, &subordinate)?;
        while host::tasks_of(uid) > 0 {
            uid = free_uid(uid + 1, &subordinate)?;
        }
        self.record.next_uid = uid + 1;
        self.save()?;
        Ok(uid)
    }

    /// The devices that forward, or will with `device`, only because of us. Ask before switching it on.
    pub(crate) fn forwarding_for_us(&mut self, device: Option<&str>) -> io::Result<BTreeSet<String>> {
        let now =
            Forwarding { boot: host::boot_id()?, all: sysctl("ipv4/conf/all/forwarding"), devices: BTreeSet::new() };
        let before = self.record.forwarding.take().filter(|before| before.boot == now.boot && before.all == now.all);
        let mut forwarding = before.unwrap_or(now);
        let off = |device: &&str| sysctl(&forwarding_of(device)) == "0";
        forwarding.devices.extend(device.filter(off).map(str::to_owned));
        let devices = forwarding.devices.clone();
        self.record.forwarding = (!devices.is_empty()).then_some(forwarding);
        self.save()?;
        Ok(devices)
    }

    /// Switches forwarding off again where it is on because of us.
    pub(crate) fn restore_forwarding(&mut self) -> io::Result<()> {
        for device in self.forwarding_for_us(None)? {
            set_sysctl(&forwarding_of(&device), "0")?;
        }
        self.record.forwarding = None;
        self.save()
    }

    fn save(&self) -> io::Result<()> {
        if read_record::<Record>(&self.path)?.as_ref() == Some(&self.record) {
            return Ok(());
        }
        write_record(&self.path, &self.record)
    }
}

/// The name of a device's switch.
pub(crate) fn forwarding_of(device: &str) -> String {
    format!("ipv4/conf/{device}/forwarding")
}

/// Makes the directory, or makes sure that it is ours alone: whoever may write there decides for root.
fn own_directory(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
        _ => {}
    }
    let found = fs::symlink_metadata(path)?;
    if found.is_dir() && found.uid() == rustix::process::geteuid().as_raw() && found.mode() & 0o7777 == 0o700 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!(
            "expected {} to be a directory of ours with mode 0700, got {} of uid {} with mode {:o}: remove it",
            path.display(),
            if found.is_dir() { "a directory" } else { "a file or link" },
            found.uid(),
            found.mode() & 0o7777
        ),
    ))
}

/// Ranges of `/etc/subuid`: `name:first:count` a line.
fn parse_subordinate(text: &str) -> Vec<Range<u32>> {
    let parse = |line: &str| {
        let mut fields = line.split(':').skip(1).map(|field| field.trim().parse::<u32>().ok());
        let (first, count) = (fields.next()??, fields.next()??);
        Some(first..first.saturating_add(count))
    };
    text.lines().filter_map(parse).collect()
}

/// The first uid from `next` on that is nobody's subordinate id.
fn free_uid(next: u32, subordinate: &[Range<u32>]) -> io::Result<u32> {
    let mut uid = next.max(UIDS.start);
    while let Some(range) = subordinate.iter().find(|range| range.contains(&uid)) {
        uid = range.end;
    }
    UIDS.contains(&uid).then_some(uid).ok_or_else(|| {
        let message = format!("no user is left between {} and {} on this machine", UIDS.start, UIDS.end);
        io::Error::new(io::ErrorKind::QuotaExceeded, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn a_directory_that_others_could_have_made_is_refused() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("machine");
        drop(Machine::lock_in(&path).expect("made"));
        drop(Machine::lock_in(&path).expect("found again"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).expect("mode");
        let error = Machine::lock_in(&path).expect_err("open to all").to_string();
        assert!(error.contains("mode 777") && error.contains("mode 0700"), "{error}");
        let link = directory.path().join("link");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).expect("mode");
        symlink(&path, &link).expect("link");
        assert!(Machine::lock_in(&link).is_err(), "a link");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65_534), None).expect("owner");
            assert!(Machine::lock_in(&path).is_err(), "somebody else's");
        }
    }

    #[test]
    fn an_address_is_reserved_while_its_instance_has_files_running_or_not() {
        let directory = tempfile::tempdir().expect("directory");
        let instance = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(&path).expect("instance");
            path
        };
        let (one, two) = (instance("one"), instance("two"));
        let pool: Ipv4Network = "10.231.0.0/29".parse().expect("pool");
        let lock = || Machine::lock_in(&directory.path().join("machine")).expect("lock");
        assert_eq!(lock().reserve(pool, &one, None, &[]).expect("first"), 0);
        assert_eq!(lock().reserve(pool, &two, Some(0), &[]).expect("second"), 1, "reserved by another installation");
        assert_eq!(lock().reserve(pool, &one, Some(0), &[]).expect("again"), 0, "its own");
        assert!(lock().reserve(pool, &instance("three"), None, &[]).is_err(), "used up");
        let larger: Ipv4Network = "10.231.0.0/28".parse().expect("pool");
        let three = instance("three");
        assert_eq!(lock().reserve(larger, &three, None, &[]).expect("third"), 2);
        fs::remove_dir(&three).expect("its end");
        assert_eq!(lock().reserve(larger, &instance("four"), None, &[]).expect("fourth"), 3, "not its address");
        fs::remove_dir(&one).expect("its end");
        lock().claim([(pool.slot(0), two.clone()), (pool.slot(1), one)], None).expect("claim");
        assert_eq!(lock().record.links.values().filter(|owner| **owner == two).count(), 2, "only what is free");
    }

    #[test]
    fn forwarding_is_put_back_where_it_was_off_unless_somebody_else_wants_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().expect("directory");
        let lock = || Machine::lock_in(&directory.path().join("machine")).expect("lock");
        let device = format!("tf{}", std::process::id());
        let ip = |arguments: &[&str]| std::process::Command::new("ip").args(arguments).status().expect("ip").success();
        assert!(ip(&["link", "add", &device, "type", "veth", "peer", "name", &format!("{device}p")]));
        let switch = forwarding_of(&device);
        let check = || {
            set_sysctl(&switch, "1").expect("on");
            assert_eq!(lock().forwarding_for_us(Some(&device)).expect("guard"), BTreeSet::new(), "on already");
            lock().restore_forwarding().expect("restore");
            assert_eq!(sysctl(&switch), "1", "as it was");

            set_sysctl(&switch, "0").expect("off");
            for _ in 0..2 {
                let guarded = lock().forwarding_for_us(Some(&device)).expect("guard");
                assert_eq!(guarded, BTreeSet::from([device.clone()]));
                set_sysctl(&switch, "1").expect("on");
            }
            lock().restore_forwarding().expect("restore");
            assert_eq!(sysctl(&switch), "0", "as it was");
            assert_eq!(lock().record.forwarding, None);

            lock().forwarding_for_us(Some(&device)).expect("guard");
            set_sysctl(&switch, "1").expect("on");
            let mut machine = lock();
            machine.record.forwarding.as_mut().expect("recorded").all = "turned since".to_owned();
            machine.restore_forwarding().expect("restore");
            assert_eq!(sysctl(&switch), "1", "not ours to switch off");
        };
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(check));
        assert!(ip(&["link", "del", &device]));
        checked.expect("checks");
    }

    #[test]
    fn uids_are_above_everybody_else_s_and_never_given_twice() {
        let directory = tempfile::tempdir().expect("directory");
        let lock = || Machine::lock_in(&directory.path().join("machine")).expect("lock");
        let first = lock().give_uid().expect("uid");
        assert!(UIDS.contains(&first) && lock().give_uid().expect("uid") > first);
        lock().claim([], Some(first + 10)).expect("claim");
        assert!(lock().give_uid().expect("uid") >= first + 10, "an installation that remembers more");

        let text = format!("a:100000:65536\n# b\nc:{}:100\nd:{}:100\ne:x:1\n", UIDS.start, UIDS.start + 100);
        let ranges = parse_subordinate(&text);
        assert_eq!(ranges.len(), 3);
        assert_eq!(free_uid(0, &ranges).expect("uid"), UIDS.start + 200);
        assert!(free_uid(0, &parse_subordinate("all:0:4294967295\n")).is_err());
    }
}
