//! Debian packages: which are missing, whether they may be installed, and how without starting a service.

use crate::shell::{Shell, find_program};
use anyhow::{Result, bail};
use std::{
    io::{BufRead as _, IsTerminal as _, Write as _},
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

/// Folder of the newest PostgreSQL server's programs on this machine.
pub(crate) fn postgres_programs() -> Option<PathBuf> {
    let debian = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    newest(debian.map(|entry| entry.path()))
        .or_else(|| find_program("initdb").and_then(|initdb| initdb.parent().map(Path::to_owned)))
}

fn newest(versions: impl Iterator<Item = PathBuf>) -> Option<PathBuf> {
    versions
        .filter_map(|folder| Some((folder.file_name()?.to_str()?.parse::<u32>().ok()?, folder.join("bin"))))
        .filter(|(_, programs)| programs.join("initdb").is_file() && programs.join("postgres").is_file())
        .max()
        .map(|(_, programs)| programs)
}

/// Installs what is missing of `needs`, asks, or says exactly what to type.
pub(crate) fn ensure(shell: &Shell, needs: &[&[Need]]) -> Result<()> {
    let missing = missing(&needs.concat(), is_present);
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        eprintln!("missing: {} ({})", need.package, need.reason);
    }
    let machine = Machine {
        apt: find_program("apt-get").is_some(),
        root: rustix::process::geteuid().is_root(),
        sudo: find_program("sudo").is_some(),
        terminal: std::io::stdin().is_terminal() && std::io::stderr().is_terminal(),
    };
    match plan(machine) {
        Plan::Install => install(shell, &missing, AsRoot::Already),
        Plan::AskThenInstall(how) if agreed(&missing)? => install(shell, &missing, how),
        Plan::AskThenInstall(_) | Plan::Tell => bail!("{}", what_to_type(&missing)),
        Plan::NoApt => {
            bail!("this machine has no apt-get; install by its own means what provides: {}", names(&missing).join(", "))
        }
    }?;
    match self::missing(&missing, is_present).as_slice() {
        [] => Ok(()),
        still => bail!("installed, but still not found: {}", names(still).join(", ")),
    }
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

fn agreed(missing: &[Need]) -> Result<bool> {
    eprint!("Install {} with apt-get now? No service will be started. [Y/n] ", names(missing).join(" "));
    std::io::stderr().flush()?;
    let mut answer = String::new();
    let read = std::io::stdin().lock().read_line(&mut answer)?;
    Ok(read > 0 && matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

fn install(shell: &Shell, missing: &[Need], how: AsRoot) -> Result<()> {
    eprintln!("installing {} …", names(missing).join(" "));
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
        assert!(text.contains("apt-get install --yes --no-install-recommends postgresql bubblewrap iproute2"));
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
        assert_eq!(newest(versions.into_iter()), Some(folder.path().join("16/bin")));
        assert_eq!(newest(std::iter::empty()), None);
    }

    /// Runs the script in a folder instead of `/`, with an `apt-get` that notes what it sees.
    fn run_script(root: &Path, apt_exit: u8) -> std::process::ExitStatus {
        let programs = root.join("programs");
        std::fs::create_dir_all(&programs).unwrap();
        std::fs::create_dir_all(root.join("usr/sbin")).unwrap();
        let apt = programs.join("apt-get");
        let root_text = root.display();
        std::fs::write(
            &apt,
            format!(
                "#!/bin/sh\necho \"$@\" >>{root_text}/said\ncat {root_text}/usr/sbin/policy-rc.d \
                 {root_text}/etc/postgresql-common/createcluster.d/*.conf >>{root_text}/seen\nexit {apt_exit}\n"
            ),
        )
        .unwrap();
        let systemctl = programs.join("systemctl");
        std::fs::write(&systemctl, format!("#!/bin/sh\necho \"$@\" >>{root_text}/said\n")).unwrap();
        for program in [&apt, &systemctl] {
            std::fs::set_permissions(program, PermissionsExt::from_mode(0o755)).unwrap();
        }
        let moved = script(&["one", "docker-registry"])
            .replace("=/usr/sbin", &format!("={root_text}/usr/sbin"))
            .replace("=/etc/", &format!("={root_text}/etc/"));
        let path = format!("{}:{}", programs.display(), std::env::var("PATH").unwrap());
        Command::new("sh").arg("-c").arg(moved).env("PATH", path).status().unwrap()
    }

    #[test]
    fn nothing_may_start_while_packages_are_installed_and_all_is_put_back() {
        let root = tempfile::tempdir().unwrap();
        assert!(run_script(root.path(), 0).success());
        let said = std::fs::read_to_string(root.path().join("said")).unwrap();
        let install = "install --yes --no-install-recommends one docker-registry";
        assert_eq!(said, format!("update\n{install}\n--quiet disable docker-registry\n"));
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
        assert!(!run_script(root.path(), 1).success());
        assert_eq!(std::fs::read_to_string(&policy).unwrap(), "the machine's own");

        // As a run that was killed leaves it: ours in place, the machine's own aside.
        std::fs::rename(&policy, policy.with_file_name("policy-rc.d.before-systemprompt-cloud")).unwrap();
        let ours = "#!/bin/sh\n# systemprompt-cloud: nothing starts while packages are installed\nexit 101\n";
        std::fs::write(&policy, ours).unwrap();
        assert!(run_script(root.path(), 0).success());
        assert_eq!(std::fs::read_to_string(&policy).unwrap(), "the machine's own");
    }
}
