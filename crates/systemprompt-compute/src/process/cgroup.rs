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
    /// The hierarchies with a memory or pids controller that we may write to; nothing when there is none for
    /// memory, since then resource limits have to do.
    pub(crate) fn detect(group: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mut hierarchies = Vec::new();
        for mount in parse_mounts(&mounts) {
            if let Some(hierarchy) = mount.offer(group, &hierarchies)
                && hierarchy.prepare().is_ok()
            {
                hierarchies.push(hierarchy);
            }
        }
        let found = Self { hierarchies };
        // Made again with the first instance: what never ran leaves nothing behind.
        found.remove_installation();
        found.hierarchies.iter().any(|hierarchy| hierarchy.memory).then_some(found)
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
        self.directory.parent().map_or(Ok(()), enable)?;
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
        let directory = self.point.join(group);
        (memory || pids).then_some(Hierarchy { directory, version: self.version, memory, pids })
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
}
