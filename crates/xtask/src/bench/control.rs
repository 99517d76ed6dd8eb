//! The control plane's own books: its database through psql, its processes through /proc.

use crate::{packages::postgres_programs, shell::Shell};
use anyhow::{Context as _, Result, bail};
use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// How to reach the control plane's database: by its socket, as the user it trusts.
pub(super) struct ControlDatabase {
    socket: String,
}

impl ControlDatabase {
    /// Finds the running cluster of an installation by its files.
    pub(super) fn of(data: &Path) -> Result<Self> {
        let file = data.join("postgres/control/postmaster.pid");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let socket = text.lines().nth(4).with_context(|| format!("{} names no socket", file.display()))?;
        Ok(Self { socket: socket.to_owned() })
    }

    /// The rows a query answers, columns separated by `|`.
    pub(super) fn query(&self, shell: &Shell, sql: &str) -> Result<Vec<String>> {
        Ok(shell.read_quiet(self.psql().args(["-c", sql]))?.lines().map(str::to_owned).collect())
    }

    /// One session that stays open, so that a statement's time is not a process's.
    pub(super) fn session(&self) -> Result<Session> {
        let mut process =
            self.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start psql")?;
        let input = process.stdin.take().context("psql's standard input is a pipe")?;
        let output = BufReader::new(process.stdout.take().context("psql's standard output is a pipe")?);
        Ok(Session { process, input, output })
    }

    fn psql(&self) -> Command {
        let beside = postgres_programs().map(|programs| programs.join("psql")).filter(|psql| psql.is_file());
        let mut psql = Command::new(beside.unwrap_or_else(|| "psql".into()));
        psql.args(["-X", "-q", "-At", "-v", "ON_ERROR_STOP=1", "-U", "systemprompt", "-d", "systemprompt", "-h"]);
        psql.arg(&self.socket);
        psql
    }
}

/// An open psql.
pub(super) struct Session {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Runs statements of which the last, and only the last, answers one row.
    pub(super) fn ask(&mut self, sql: &str) -> Result<String> {
        writeln!(self.input, "{sql}")?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        if line.is_empty() {
            bail!("psql ended at: {sql}");
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Proportional share of memory, in MiB.
pub(super) fn pss_mib(process: u32) -> Result<f64> {
    let file = format!("/proc/{process}/smaps_rollup");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    parse_pss(&text).with_context(|| format!("{file} has no Pss"))
}

fn parse_pss(smaps_rollup: &str) -> Option<f64> {
    let line = smaps_rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024.0)
}

/// User and system time of a process with all its threads, and of its children with theirs, in ticks.
pub(super) fn cpu_ticks(process: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).context("the process is gone")?;
    let own = parse_cpu_ticks(&stat).context("/proc/PID/stat has another form")?;
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    let below = children.split_whitespace().map(|child| cpu_ticks(child.parse()?));
    below.sum::<Result<u64>>().map(|below| own + below)
}

/// `utime` and `stime`, the 14th and 15th field; the name before them may hold anything.
fn parse_cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_mib() {
        assert_eq!(parse_pss("55 ---p\nRss:  9999 kB\nPss:             51200 kB\nPss_Dirty: 1 kB\n"), Some(50.0));
        assert_eq!(parse_pss("Rss: 1 kB\n"), None);
        assert!(pss_mib(std::process::id()).unwrap() > 0.1);
    }

    #[test]
    fn time_is_read_behind_any_name() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194304 100 0 0 0 17 25 0 0 20 0 1 0 5 1 1";
        assert_eq!(parse_cpu_ticks(stat), Some(42));
        assert!(cpu_ticks(std::process::id()).is_ok());
    }
}
