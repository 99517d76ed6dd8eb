//! Debian packages: which are missing, whether they may be installed, and how without starting a service.

use crate::{
    interrupt::Interrupts,
    shell::{Shell, find_program},
};
use anyhow::{Result, bail};
use std::{
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// A package, how to see that it is there, and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Need {
    package: &'static str,
    probe: Probe,
    reason: &'static str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    Program(&'static str),
    File(&'static str),
    PostgresServer,
}

/// What the cloud itself needs.
pub(crate) const TO_RUN: &[Need] = &[
    Need { package: "postgresql", probe: Probe::PostgresServer, reason: "state, and the tenants' databases" },
    Need { package: "bubblewrap", probe: Probe::Program("bwrap"), reason: "the sandbox of every instance" },
    Need { package: "iproute2", probe: Probe::Program("ip"), reason: "a network namespace for every tenant" },
    Need { package: "iptables", probe: Probe::Program("iptables"), reason: "what a tenant may reach" },
    Need {
        package: "ca-certificates",
        probe: Probe::File("/etc/ssl/certs/ca-certificates.crt"),
        reason: "goes into every image",
    },
    Need { package: "curl", probe: Probe::Program("curl"), reason: "looks at the running cloud from outside" },
];

/// What the tests need beside [`TO_RUN`]: other people's clients and a browser.
pub(crate) const TO_TEST: &[Need] = &[
    Need { package: "skopeo", probe: Probe::Program("skopeo"), reason: "pushes to and pulls from our registry" },
    Need { package: "podman", probe: Probe::Program("podman"), reason: "pushes to and pulls from our registry" },
    Need {
        package: "docker-registry",
        probe: Probe::Program("docker-registry"),
        reason: "another registry for our own client",
    },
    Need { package: "runc", probe: Probe::Program("runc"), reason: "podman's runtime" },
    Need { package: "openssl", probe: Probe::Program("openssl"), reason: "speaks TLS to our edge" },
    Need { package: "chromium", probe: Probe::Program("chromium"), reason: "shows our pages as people see them" },
    Need { package: "chromium-driver", probe: Probe::Program("chromedriver"), reason: "lets tests use chromium" },
    Need { package: "libnss3-tools", probe: Probe::Program("certutil"), reason: "makes chromium trust a local CA" },
];

/// What the figures need beside [`TO_RUN`].
pub(crate) const TO_MEASURE: &[Need] = &[
    Need { package: "nginx-light", probe: Probe::Program("nginx"), reason: "what our edge is compared with" },
    Need { package: "wrk", probe: Probe::Program("wrk"), reason: "load" },
    Need { package: "openssl", probe: Probe::Program("openssl"), reason: "nginx's certificate" },
];

/// The oldest PostgreSQL that is known to work.
const OLDEST_POSTGRES: u32 = 15;

/// Folder of the newest PostgreSQL server's programs on this machine that is new enough.
pub(crate) fn postgres_programs() -> Option<PathBuf> {
    newest(debian_versions())
        .filter(|(version, _)| *version >= OLDEST_POSTGRES)
        .map(|(_, programs)| programs)
        .or_else(|| find_program("initdb").and_then(|initdb| initdb.parent().map(Path::to_owned)))
}

fn debian_versions() -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten().map(|entry| entry.path())
}

fn newest(versions: impl Iterator<Item = PathBuf>) -> Option<(u32, PathBuf)> {
    versions
        .filter_map(|folder| Some((folder.file_name()?.to_str()?.parse::<u32>().ok()?, folder.join("bin"))))
        .filter(|(_, programs)| programs.join("initdb").is_file() && programs.join("postgres").is_file())
        .max()
}

/// Installs what is missing of `needs`, asks, or says exactly what to type.
pub(crate) fn ensure(shell: &Shell, needs: &[&[Need]]) -> Result<()> {
    let machine = Machine {
        apt: find_program("apt-get").is_some(),
        root: rustix::process::geteuid().is_root(),
        sudo: find_program("sudo").is_some(),
        terminal: std::io::stdin().is_terminal() && std::io::stderr().is_terminal(),
    };
    put_back(shell, machine)?;
    let os_release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let (elsewhere, missing): (Vec<Need>, Vec<Need>) = missing(&needs.concat(), is_present)
        .into_iter()
        .inspect(|need| eprintln!("missing: {} ({})", need.package, need.reason))
        .partition(|need| is_snap(&os_release, need.package));
    if !missing.is_empty() {
        obtain(shell, machine, &missing)?;
    }
    if !elsewhere.is_empty() {
        bail!(
            "Ubuntu has {} as a snap only, which cannot be run with a profile of a test's own: put `chromium` and \
             `chromedriver` on the PATH, such as those of https://googlechromelabs.github.io/chrome-for-testing/",
            names(&elsewhere).join(" and ")
        );
    }
    Ok(())
}

fn obtain(shell: &Shell, machine: Machine, missing: &[Need]) -> Result<()> {
    match plan(machine) {
        Plan::Install => install(shell, missing, AsRoot::Already),
        Plan::AskThenInstall(how) if agreed(&shell.interrupts, std::io::stdin(), missing)? => {
            install(shell, missing, how)
        }
        Plan::AskThenInstall(_) | Plan::Tell => {
            let old = too_old(missing, newest(debian_versions())).map_or_else(String::new, |old| format!("\n\n{old}"));
            bail!("{}{old}", what_to_type(missing))
        }
        Plan::NoApt => {
            bail!("this machine has no apt-get; install by its own means what provides: {}", names(missing).join(", "))
        }
    }?;
    let still = self::missing(missing, is_present);
    match too_old(&still, newest(debian_versions())) {
        Some(old) => bail!(old),
        None if still.is_empty() => Ok(()),
        None => bail!("installed, but still not found: {}", names(&still).join(", ")),
    }
}

/// Ubuntu's packages of these names only install the snap.
fn is_snap(os_release: &str, package: &str) -> bool {
    os_release.lines().any(|line| line == "ID=ubuntu") && package.starts_with("chromium")
}

/// The way out where the newest server that can be had is too old.
fn too_old(missing: &[Need], newest: Option<(u32, PathBuf)>) -> Option<String> {
    let (version, _) = newest.filter(|_| missing.iter().any(|need| need.probe == Probe::PostgresServer))?;
    Some(format!(
        "PostgreSQL {version} is installed, and {OLDEST_POSTGRES} or later is needed. Where this release has no later \
         one, the PostgreSQL project has; as root, type\n\n\
         apt-get install postgresql-common && /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh\n\n\
         and then run this command again: it installs the newest"
    ))
}

/// Puts back what an installation that was killed has left: no service of the machine could start any more.
fn put_back(shell: &Shell, machine: Machine) -> Result<()> {
    if !is_left_behind(Path::new("/")) {
        return Ok(());
    }
    eprintln!("an installation that was killed has left files that keep services from starting");
    if machine.root {
        return install(shell, &[], AsRoot::Already);
    }
    eprintln!("as root, type\n\nsh <<'END'\n{}END\n", script(&[]));
    Ok(())
}

fn is_left_behind(root: &Path) -> bool {
    let policy = root.join("usr/sbin/policy-rc.d");
    root.join("etc/postgresql-common/createcluster.d/systemprompt-cloud.conf").exists()
        || policy.with_file_name("policy-rc.d.before-systemprompt-cloud").exists()
        || std::fs::read_to_string(policy).is_ok_and(|text| text.contains("# systemprompt-cloud:"))
}

fn is_present(probe: Probe) -> bool {
    match probe {
        Probe::Program(name) => find_program(name).is_some(),
        Probe::File(path) => Path::new(path).is_file(),
        Probe::PostgresServer => postgres_programs().is_some(),
    }
}

fn missing(needs: &[Need], present: impl Fn(Probe) -> bool) -> Vec<Need> {
    needs.iter().copied().filter(|need| !present(need.probe)).collect()
}

fn names(needs: &[Need]) -> Vec<&'static str> {
    needs.iter().map(|need| need.package).collect()
}

#[derive(Debug, Clone, Copy)]
#[allow(clippy::struct_excessive_bools, reason = "four independent facts about the machine")]
struct Machine {
    apt: bool,
    root: bool,
    sudo: bool,
    terminal: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    Install,
    AskThenInstall(AsRoot),
    Tell,
    NoApt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AsRoot {
    Already,
    Sudo,
}

fn plan(machine: Machine) -> Plan {
    match machine {
        Machine { apt: false, .. } => Plan::NoApt,
        Machine { root: true, terminal: false, .. } => Plan::Install,
        Machine { root: true, terminal: true, .. } => Plan::AskThenInstall(AsRoot::Already),
        Machine { sudo: true, terminal: true, .. } => Plan::AskThenInstall(AsRoot::Sudo),
        Machine { .. } => Plan::Tell,
    }
}

fn agreed(interrupts: &Interrupts, input: impl AsFd + std::io::Read, missing: &[Need]) -> Result<bool> {
    eprint!("Install {} with apt-get now? No service will be started. [Y/n] ", names(missing).join(" "));
    std::io::stderr().flush()?;
    // A signal does not end a read.
    interrupts.wait_readable(&input, None)?;
    let mut answer = String::new();
    let read = BufReader::new(input).read_line(&mut answer)?;
    Ok(read > 0 && matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

fn install(shell: &Shell, missing: &[Need], how: AsRoot) -> Result<()> {
    if !missing.is_empty() {
        eprintln!("installing {} …", names(missing).join(" "));
    }
    let mut command = match how {
        AsRoot::Already => Command::new("sh"),
        AsRoot::Sudo => {
            let mut sudo = Command::new("sudo");
            sudo.arg("sh");
            sudo
        }
    };
    // apt's talk is not our output: standard output stays ours.
    shell.run(command.arg("-c").arg(script(&names(missing))).stdin(Stdio::null()).stdout(std::io::stderr()))
}

fn what_to_type(missing: &[Need]) -> String {
    format!(
        "these packages have to be installed first; as root, type\n\n\
         sh <<'END'\n{}END\n\nand then run this command again",
        script(&names(missing))
    )
}

fn script(packages: &[&str]) -> String {
    include_str!("install.sh").replace("PACKAGES", &packages.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const MACHINE: Machine = Machine { apt: true, root: true, sudo: false, terminal: false };

    #[test]
    fn only_what_is_absent_is_missing() {
        let found = missing(TO_RUN, |probe| probe != Probe::Program("bwrap"));
        assert_eq!(names(&found), ["bubblewrap"]);
        assert!(missing(TO_RUN, |_| true).is_empty());
    }

    #[test]
    fn root_without_a_terminal_installs_and_a_person_is_asked() {
        assert_eq!(plan(MACHINE), Plan::Install);
        assert_eq!(plan(Machine { terminal: true, ..MACHINE }), Plan::AskThenInstall(AsRoot::Already));
        let user = Machine { root: false, ..MACHINE };
        assert_eq!(plan(user), Plan::Tell);
        assert_eq!(
            plan(Machine { sudo: true, ..user }),
            Plan::Tell,
            "sudo may ask for a password: not without a terminal"
        );
        assert_eq!(plan(Machine { sudo: true, terminal: true, ..user }), Plan::AskThenInstall(AsRoot::Sudo));
        assert_eq!(plan(Machine { apt: false, ..MACHINE }), Plan::NoApt);
    }

    #[test]
    fn what_to_type_is_the_very_script_that_would_run() {
        let text = what_to_type(&missing(TO_RUN, |_| false));
        assert!(text.contains("set -- postgresql bubblewrap iproute2"));
        assert!(text.contains("exit 101"));
        assert!(text.contains("create_main_cluster = false"));
    }

    #[test]
    fn the_newest_version_is_chosen_as_a_number() {
        let folder = tempfile::tempdir().unwrap();
        for version in ["9", "15", "16", "17"] {
            let programs = folder.path().join(version).join("bin");
            std::fs::create_dir_all(&programs).unwrap();
            // 17 has only its client.
            for program in ["initdb", "postgres"].iter().filter(|_| version != "17") {
                std::fs::write(programs.join(program), "").unwrap();
            }
        }
        let versions = ["9", "15", "16", "17", "lost+found"].map(|version| folder.path().join(version));
        assert_eq!(newest(versions.into_iter()), Some((16, folder.path().join("16/bin"))));
        assert_eq!(newest(std::iter::empty()), None);
    }

    #[test]
    fn a_server_that_is_too_old_is_said_with_a_way_out() {
        let old = Some((14, PathBuf::from("/usr/lib/postgresql/14/bin")));
        let said = too_old(&missing(TO_RUN, |_| false), old.clone()).unwrap();
        assert!(said.contains("PostgreSQL 14 is installed") && said.contains("apt.postgresql.org.sh"), "{said}");
        assert_eq!(too_old(&missing(TO_RUN, |probe| probe == Probe::PostgresServer), old), None);
        assert_eq!(too_old(TO_RUN, None), None);
    }

    #[test]
    fn a_browser_that_is_a_snap_is_not_asked_of_apt() {
        assert!(is_snap("NAME=\"Ubuntu\"\nID=ubuntu\n", "chromium-driver"));
        assert!(!is_snap("ID=ubuntu\n", "podman"));
        assert!(!is_snap("ID=debian\n", "chromium"));
    }

    #[test]
    fn the_question_is_answered_or_interrupted() {
        let interrupts = Interrupts::default();
        let ask = |answer: &[u8]| {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(answer).unwrap();
            drop(writer);
            agreed(&interrupts, reader, TO_RUN).unwrap()
        };
        assert!(ask(b"\n") && ask(b"Yes\n"));
        assert!(!ask(b"n\n") && !ask(b""));

        let (reader, _writer) = std::io::pipe().unwrap();
        interrupts.raise();
        assert!(agreed(&interrupts, reader, TO_RUN).unwrap_err().is::<crate::interrupt::Interrupted>());
    }

    /// Runs the script in a folder instead of `/`, with an `apt-get` that notes what it sees.
    fn run_script(root: &Path, packages: &[&str], apt_exit: u8) -> std::process::ExitStatus {
        let programs = root.join("programs");
        let wants = root.join("etc/systemd/system/multi-user.target.wants");
        for folder in [&programs, &wants, &root.join("usr/sbin")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let (root_text, wants) = (root.display(), wants.display());
        let apt = format!(
            "#!/bin/sh\necho \"$@\" >>{root_text}/said\ncat {root_text}/usr/sbin/policy-rc.d \
             {root_text}/etc/postgresql-common/createcluster.d/*.conf >>{root_text}/seen\n\
             ln -sf /new {wants}/new.service\nexit {apt_exit}\n"
        );
        for (name, text) in [("apt-get", apt), ("systemctl", format!("#!/bin/sh\necho \"$@\" >>{root_text}/units\n"))] {
            std::fs::write(programs.join(name), text).unwrap();
            std::fs::set_permissions(programs.join(name), PermissionsExt::from_mode(0o755)).unwrap();
        }
        let moved = script(packages)
            .replace("=/usr/sbin", &format!("={root_text}/usr/sbin"))
            .replace("=/etc/", &format!("={root_text}/etc/"));
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        Command::new("sh").arg("-c").arg(moved).env("PATH", path).status().unwrap()
    }

    #[test]
    fn nothing_may_start_while_packages_are_installed_and_all_is_put_back() {
        let root = tempfile::tempdir().unwrap();
        let wants = root.path().join("etc/systemd/system/multi-user.target.wants");
        std::fs::create_dir_all(&wants).unwrap();
        std::os::unix::fs::symlink("/old", wants.join("old.service")).unwrap();
        assert!(run_script(root.path(), &["one", "two"], 0).success());
        let units = std::fs::read_to_string(root.path().join("units")).unwrap();
        assert_eq!(units, "disable --quiet new.service\n", "what came with the packages, and nothing else");
        let said = std::fs::read_to_string(root.path().join("said")).unwrap();
        let wait = "-o DPkg::Lock::Timeout=300";
        assert_eq!(said, format!("{wait} update\n{wait} install --yes --no-install-recommends one two\n"));
        let seen = std::fs::read_to_string(root.path().join("seen")).unwrap();
        assert!(seen.contains("exit 101") && seen.contains("create_main_cluster = false"), "{seen}");
        assert!(!root.path().join("usr/sbin/policy-rc.d").exists());
        assert!(!root.path().join("etc/postgresql-common/createcluster.d").exists());
    }

    #[test]
    fn an_earlier_policy_comes_back_even_when_the_installation_fails_or_was_killed_before() {
        let root = tempfile::tempdir().unwrap();
        let policy = root.path().join("usr/sbin/policy-rc.d");
        std::fs::create_dir_all(policy.parent().unwrap()).unwrap();
        std::fs::write(&policy, "the machine's own").unwrap();
        assert!(!run_script(root.path(), &["one"], 1).success());
        assert_eq!(std::fs::read_to_string(&policy).unwrap(), "the machine's own");

        // As a run that was killed leaves it: ours in place, the machine's own aside.
        std::fs::rename(&policy, policy.with_file_name("policy-rc.d.before-systemprompt-cloud")).unwrap();
        let ours = "#!/bin/sh\n# systemprompt-cloud: nothing starts while packages are installed\nexit 101\n";
        std::fs::write(&policy, ours).unwrap();
        assert!(is_left_behind(root.path()));
        std::fs::remove_file(root.path().join("said")).unwrap();
        assert!(run_script(root.path(), &[], 0).success());
        assert_eq!(std::fs::read_to_string(&policy).unwrap(), "the machine's own");
        assert!(!root.path().join("said").exists(), "nothing was to be installed");
        assert!(!is_left_behind(root.path()));
    }
}
