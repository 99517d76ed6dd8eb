//! A PostgreSQL cluster for the length of one task, in a temporary folder, behind a socket only we can reach.

use crate::{packages::postgres_programs, shell::Shell};
use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use std::{
    os::unix::{fs::chown, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// Stopped and removed when dropped. Not durable: `fsync` is off.
pub(crate) struct Cluster {
    programs: PathBuf,
    server: Child,
    folder: tempfile::TempDir,
}

impl Cluster {
    /// Makes and starts one, as the user `postgres` when we are root: PostgreSQL refuses to run as root.
    pub(crate) fn start(shell: &Shell) -> Result<Self> {
        let programs = postgres_programs().context("no PostgreSQL server on this machine: install `postgresql`")?;
        let folder = tempfile::Builder::new().prefix("xtask-").tempdir()?;
        let owner = owner()?;
        if let Some(Owner { uid, gid }) = owner {
            chown(folder.path(), Some(uid), Some(gid)).context("cannot give the cluster's folder to `postgres`")?;
        }
        let data = folder.path().join("data");
        let mut initdb = run_as(&programs.join("initdb"), owner);
        let settings = ["--no-sync", "--no-instructions", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"];
        shell.read_quiet(initdb.args(settings).args(["--username=postgres", "-D"]).arg(&data))?;
        let log = std::fs::File::create(folder.path().join("log"))?;
        let server = run_as(&programs.join("postgres"), owner)
            .args(["-c", "listen_addresses=", "-c", "fsync=off", "-c", "autovacuum=off", "-k"])
            .arg(folder.path())
            .arg("-D")
            .arg(&data)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("cannot start PostgreSQL")?;
        let mut cluster = Self { programs, server, folder };
        cluster.wait_until_ready(shell)?;
        Ok(cluster)
    }

    /// What `DATABASE_URL` has to be.
    pub(crate) fn url(&self) -> String {
        format!("postgres://postgres@localhost/postgres?host={}", self.folder.path().display())
    }

    /// Runs a file of SQL; stops at its first error.
    pub(crate) fn run_file(&self, shell: &Shell, file: &Path) -> Result<()> {
        shell.read_quiet(self.psql().arg("--single-transaction").arg("-f").arg(file)).map(drop)
    }

    fn psql(&self) -> Command {
        let beside = self.programs.join("psql");
        let mut psql = Command::new(if beside.is_file() { beside } else { "psql".into() });
        psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "postgres", "-h"]);
        psql.arg(self.folder.path());
        psql
    }

    fn wait_until_ready(&mut self, shell: &Shell) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if shell.read_quiet(self.psql().args(["-c", "SELECT 1"])).is_ok() {
                return Ok(());
            }
            shell.interrupts.check()?;
            if self.server.try_wait()?.is_some() || Instant::now() > deadline {
                let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                bail!("PostgreSQL did not start:\n{}", log.trim_end());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // SIGQUIT: stop at once. The data goes with the folder.
        if kill_process(Pid::from_child(&self.server), Signal::QUIT).is_ok() {
            let _ = self.server.wait();
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    uid: u32,
    gid: u32,
}

fn owner() -> Result<Option<Owner>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").context("cannot read /etc/passwd")?;
    let owner = account(&passwd, "postgres");
    owner.map(Some).context("PostgreSQL cannot run as root and there is no user `postgres`: install `postgresql`")
}

fn account(passwd: &str, name: &str) -> Option<Owner> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then_some(())?;
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(Owner { uid, gid })
    })
}

fn run_as(program: &Path, owner: Option<Owner>) -> Command {
    let mut command = Command::new(program);
    // Its own process group: a Ctrl-C in the terminal must not stop it before we are done with it.
    command.process_group(0).current_dir("/").env("LC_ALL", "C.UTF-8");
    if let Some(Owner { uid, gid }) = owner {
        command.uid(uid).gid(gid);
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_account_is_read_from_its_own_line() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\npostgres2:x:7:7::/:\npostgres:x:110:118:PostgreSQL:/var/lib/postgresql:/bin/bash\n";
        assert_eq!(account(passwd, "postgres"), Some(Owner { uid: 110, gid: 118 }));
        assert_eq!(account(passwd, "nobody"), None);
    }

    #[test]
    fn a_cluster_runs_files_and_leaves_nothing_behind() {
        let shell = Shell::open().unwrap();
        let files = tempfile::tempdir().unwrap();
        let (good, bad) = (files.path().join("good.sql"), files.path().join("bad.sql"));
        std::fs::write(&good, "CREATE TABLE a (b int); INSERT INTO a VALUES (1);").unwrap();
        std::fs::write(&bad, "INSERT INTO a VALUES (2); INSERT INTO nowhere VALUES (1);").unwrap();

        let cluster = Cluster::start(&shell).unwrap();
        cluster.run_file(&shell, &good).unwrap();
        let error = cluster.run_file(&shell, &bad).unwrap_err().to_string();
        assert!(error.contains("nowhere"), "{error}");
        let rows = shell.read_quiet(cluster.psql().args(["-At", "-c", "SELECT count(*) FROM a"])).unwrap();
        assert_eq!(rows.trim(), "1", "a file that fails changes nothing");

        let folder = cluster.folder.path().to_owned();
        let pid = Pid::from_child(&cluster.server);
        drop(cluster);
        assert!(!folder.exists());
        assert!(rustix::process::test_kill_process(pid).is_err());
    }
}
