//! Memory and process limits by control groups, v1 and v2. One group per installation, one per instance below it,
//! both at the root of the hierarchy and not below our own group: a service manager that stops the control plane
//! kills everything in the control plane's group, and instances must outlive it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// The hierarchies in which this installation may make groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cgroups {
    hierarchies: Vec<Hierarchy>,
}

/// One mounted hierarchy and what it is good for here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// Our installation's group.
    directory: PathBuf,
    version: Version,
    memory: bool,
    pids: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// What an instance may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) memory_bytes: u64,
    pub(crate) pids: u64,
}

impl Cgroups {
    /// The hierarchies that we may write to and that limit something or by which a service manager tells whose
    /// processes are whose.
    ///
    /// # Errors
    /// In words, when memory or processes cannot be limited.
    pub(crate) fn detect(group: &str) -> Result<Self, String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
        Self::among(parse_mounts(&mounts), group)
    }

    fn among(mounts: Vec<Mount>, group: &str) -> Result<Self, String> {
        let (mut hierarchies, mut refused) = (Vec::new(), Vec::new());
        for mount in mounts {
            let Some(hierarchy) = mount.offer(group, &hierarchies) else { continue };
            match hierarchy.prepare() {
                Ok(()) => hierarchies.push(hierarchy),
                Err(error) => refused.push(format!("; {}: {error}", hierarchy.directory.display())),
            }
        }
        let found = Self { hierarchies };
        let refused = refused.concat();
        // Made again with the first instance: what never ran leaves nothing behind.
        found.remove_installation();
        let has = |limits: fn(&Hierarchy) -> bool| found.hierarchies.iter().any(limits);
        match (has(|hierarchy| hierarchy.memory), has(|hierarchy| hierarchy.pids)) {
            (true, true) => Ok(found),
            (false, _) => Err(format!("no control groups with the controller memory can be made{refused}")),
            (true, false) => Err(format!("no control groups with the controller pids can be made{refused}")),
        }
    }

    /// Makes an instance's groups anew, so that their counters start at zero, and sets the limits. Returns the
    /// files that a process writes its pid to in order to enter.
    pub(crate) fn create(&self, name: &str, limits: Limits) -> io::Result<Vec<PathBuf>> {
        self.remove(name)?;
        let mut entrances = Vec::new();
        for hierarchy in &self.hierarchies {
            hierarchy.prepare()?;
            let directory = hierarchy.directory.join(name);
            fs::create_dir(&directory)?;
            if hierarchy.memory {
                hierarchy.limit_memory(&directory, limits.memory_bytes)?;
            }
            if hierarchy.pids {
                fs::write(directory.join("pids.max"), limits.pids.to_string())?;
            }
            entrances.push(directory.join("cgroup.procs"));
        }
        Ok(entrances)
    }

    /// Whether the kernel killed something of the instance for want of memory.
    pub(crate) fn out_of_memory(&self, name: &str) -> bool {
        self.hierarchies.iter().filter(|hierarchy| hierarchy.memory).any(|hierarchy| {
            let file = match hierarchy.version {
                Version::One => "memory.oom_control",
                Version::Two => "memory.events",
            };
            fs::read_to_string(hierarchy.directory.join(name).join(file)).is_ok_and(|text| oom_kills(&text) > 0)
        })
    }

    /// Removes an instance's groups, waiting shortly for processes that are on their way out.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        self.hierarchies.iter().try_for_each(|hierarchy| remove_group(&hierarchy.directory.join(name)))
    }

    /// Removes the installation's own groups, when they are empty.
    pub(crate) fn remove_installation(&self) {
        for hierarchy in &self.hierarchies {
            let _ = fs::remove_dir(&hierarchy.directory);
        }
    }
}

impl Hierarchy {
    /// Makes the installation's group and lets it hand its controllers down.
    fn prepare(&self) -> io::Result<()> {
        let enable = |directory: &Path| match self.version {
            Version::One => Ok(()),
            Version::Two => enable(directory, self.memory, self.pids),
        };
        let parent = self.directory.parent().unwrap_or(&self.directory);
        match enable(parent) {
            // The second version hands nothing down from a group with processes in it. Only in a container do we see
            // such a one as the root.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                move_to_leaf(parent)?;
                enable(parent)?;
            }
            other => other?,
        }
        match fs::create_dir(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        enable(&self.directory)
    }

    fn limit_memory(&self, directory: &Path, bytes: u64) -> io::Result<()> {
        match self.version {
            Version::One => {
                fs::write(directory.join("memory.limit_in_bytes"), bytes.to_string())?;
                // Absent without swap accounting, and refused below the limit above.
                let _ = fs::write(directory.join("memory.memsw.limit_in_bytes"), bytes.to_string());
                Ok(())
            }
            Version::Two => {
                fs::write(directory.join("memory.max"), bytes.to_string())?;
                let _ = fs::write(directory.join("memory.swap.max"), "0");
                Ok(())
            }
        }
    }
}

/// The hierarchy of the first version in which systemd keeps its services.
const SYSTEMD: &str = "name=systemd";

/// A control group mount of this process's view.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    version: Version,
    /// Controllers named by a v1 mount.
    controllers: Vec<String>,
}

impl Mount {
    /// What this mount adds to the controllers that others have.
    fn offer(self, group: &str, have: &[Hierarchy]) -> Option<Hierarchy> {
        let controllers = match self.version {
            Version::One => self.controllers,
            Version::Two => words(&fs::read_to_string(self.point.join("cgroup.controllers")).ok()?),
        };
        let wants = |name: &str, taken: fn(&Hierarchy) -> bool| {
            controllers.iter().any(|controller| controller == name) && !have.iter().any(taken)
        };
        let (memory, pids) = (wants("memory", |have| have.memory), wants("pids", |have| have.pids));
        // systemd stops everything that is in the control plane's group of its own hierarchy, controllers or not.
        let tracks = match self.version {
            Version::One => wants(SYSTEMD, |have| have.version == Version::One && !have.memory && !have.pids),
            Version::Two => !have.iter().any(|have| have.version == Version::Two),
        };
        let directory = self.point.join(group);
        (memory || pids || tracks).then_some(Hierarchy { directory, version: self.version, memory, pids })
    }
}

/// Hands controllers down to the groups below `directory` (v2 only).
fn enable(directory: &Path, memory: bool, pids: bool) -> io::Result<()> {
    let file = directory.join("cgroup.subtree_control");
    let enabled = words(&fs::read_to_string(&file)?);
    for (name, wanted) in [("memory", memory), ("pids", pids)] {
        if wanted && !enabled.iter().any(|controller| controller == name) {
            fs::write(&file, format!("+{name}"))?;
        }
    }
    Ok(())
}

/// Moves all processes of a group into a group of their own below it.
fn move_to_leaf(directory: &Path) -> io::Result<()> {
    let leaf = directory.join("init");
    match fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    // One that forks meanwhile leaves a child behind; whoever remains makes the caller's next step fail.
    for _ in 0..5 {
        for process in fs::read_to_string(directory.join("cgroup.procs"))?.lines() {
            if let Err(error) = fs::write(leaf.join("cgroup.procs"), process) {
                tracing::debug!(%error, process, "it ended, or must stay where it is");
            }
        }
    }
    Ok(())
}

/// Control group mounts of `/proc/self/mountinfo`.
fn parse_mounts(text: &str) -> Vec<Mount> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let point = PathBuf::from(left.split(' ').nth(4)?);
        let mut right = right.split(' ');
        match right.next()? {
            "cgroup" => {
                let controllers = right.nth(1)?.split(',').map(str::to_owned).collect();
                Some(Mount { point, version: Version::One, controllers })
            }
            "cgroup2" => Some(Mount { point, version: Version::Two, controllers: Vec::new() }),
            _ => None,
        }
    };
    text.lines().filter_map(parse).collect()
}

fn oom_kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
}

fn words(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn remove_group(directory: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match fs::remove_dir(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                kill_members(directory);
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// What is still in the group of an instance that has ended is a rest of it: most of all the child of a bwrap that was
/// killed before it had told it, or anybody, its number. It would wait for its parent's word for ever.
fn kill_members(directory: &Path) {
    let Ok(members) = fs::read_to_string(directory.join("cgroup.procs")) else { return };
    for member in members.lines().filter_map(|line| rustix::process::Pid::from_raw(line.trim().parse().ok()?)) {
        if let Err(error) = rustix::process::kill_process(member, rustix::process::Signal::KILL) {
            tracing::debug!(%error, pid = ?member, "a rest of an instance ended by itself");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_of_mounts_are_found() {
        let text = "\
35 24 0:30 / /sys/fs/cgroup/memory rw,nosuid shared:15 - cgroup cgroup rw,memory
36 24 0:31 / /sys/fs/cgroup/pids rw,nosuid - cgroup cgroup rw,pids
37 24 0:32 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate
38 24 0:33 / /proc rw - proc proc rw
";
        let mounts = parse_mounts(text);
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].controllers, ["rw", "memory"]);
        assert_eq!((&mounts[2].version, mounts[2].point.to_str()), (&Version::Two, Some("/sys/fs/cgroup")));
    }

    #[test]
    fn kills_are_counted_in_the_files_of_both_versions() {
        assert_eq!(oom_kills("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"), 2);
        assert_eq!(oom_kills("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n"), 1);
        assert_eq!(oom_kills("oom 3\n"), 0);
    }

    /// A tree as the kernel shows it, of plain files: written words stay and have no effect.
    fn fake(controllers: &str) -> (tempfile::TempDir, Vec<Mount>) {
        let directory = tempfile::tempdir().expect("directory");
        let root = directory.path();
        fs::create_dir(root.join("group")).expect("group");
        for file in ["cgroup.subtree_control", "group/cgroup.subtree_control", "cgroup.procs"] {
            fs::write(root.join(file), "").expect(file);
        }
        fs::write(root.join("cgroup.controllers"), controllers).expect("controllers");
        let mounts = parse_mounts(&format!("1 1 0:1 / {} rw - cgroup2 cgroup2 rw", root.display()));
        (directory, mounts)
    }

    #[test]
    fn the_second_version_hands_controllers_down_and_limits_an_instance() {
        let (directory, mounts) = fake("cpu memory pids");
        let groups = Cgroups::among(mounts, "group").expect("groups");
        let limits = Limits { memory_bytes: 64 << 20, pids: 7 };
        let entrances = groups.create("instance", limits).expect("an instance's");
        let instance = directory.path().join("group/instance");
        assert_eq!(entrances, [instance.join("cgroup.procs")]);
        for (file, expected) in [
            ("group/instance/memory.max", "67108864"),
            ("group/instance/memory.swap.max", "0"),
            ("group/instance/pids.max", "7"),
            // The last of two words.
            ("cgroup.subtree_control", "+pids"),
            ("group/cgroup.subtree_control", "+pids"),
        ] {
            assert_eq!(fs::read_to_string(directory.path().join(file)).expect(file), expected, "{file}");
        }
        assert!(!groups.out_of_memory("instance"));
        fs::write(instance.join("memory.events"), "oom 1\noom_kill 1\n").expect("events");
        assert!(groups.out_of_memory("instance"));
    }

    #[test]
    fn a_controller_that_is_missing_is_named() {
        for (controllers, missing) in [("cpu", "memory"), ("memory", "pids"), ("pids", "memory")] {
            let (_directory, mounts) = fake(controllers);
            let error = Cgroups::among(mounts, "group").expect_err("no limits");
            assert!(error.contains(&format!("controller {missing} ")), "{error}");
        }
    }

    #[test]
    fn what_is_in_the_root_goes_to_a_leaf() {
        let (directory, _) = fake("");
        fs::write(directory.path().join("cgroup.procs"), "1\n77\n").expect("processes");
        move_to_leaf(directory.path()).expect("a move");
        let last = fs::read_to_string(directory.path().join("init/cgroup.procs")).expect("the leaf");
        assert_eq!(last, "77", "one at a time, the last of two");
    }

    #[test]
    fn the_hierarchy_of_the_service_manager_is_entered_as_well() {
        let offered = |text: &str| {
            let mut have = Vec::new();
            for mount in parse_mounts(text) {
                have.extend(mount.offer("group", &have));
            }
            have.into_iter().map(|have| have.directory.display().to_string()).collect::<Vec<_>>()
        };
        let text = "\
1 1 0:1 / /c/memory,pids rw - cgroup cgroup rw,memory,pids
1 1 0:2 / /c/cpu rw - cgroup cgroup rw,cpu
1 1 0:3 / /c/systemd rw - cgroup cgroup rw,xattr,name=systemd
1 1 0:3 / /again/systemd rw - cgroup cgroup rw,xattr,name=systemd
";
        assert_eq!(offered(text), ["/c/memory,pids/group", "/c/systemd/group"]);
    }
}
