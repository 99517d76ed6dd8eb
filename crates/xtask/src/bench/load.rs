//! The load generator, a program of its own (`crates/e2e/src/bin/load.rs`), as our child.

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

/// A running generator.
pub(super) struct Load {
    process: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

/// What became of an open loop's requests.
#[derive(Debug, Deserialize)]
pub(super) struct Report {
    pub(super) sent: u64,
    pub(super) failed: u64,
    pub(super) failures: Vec<String>,
    pub(super) p50_us: u64,
    pub(super) p99_us: u64,
}

impl Load {
    /// Requests on a fixed schedule, whatever the answers do.
    pub(super) fn open_loop(programs: &Path, url: &str, ca_file: &Path, per_second: u32) -> Result<Self> {
        Self::spawn(
            Command::new(programs.join("load")).args(["open-loop", url]).arg(ca_file).arg(per_second.to_string()),
        )
    }

    /// Asks until an answer has the status it is told to wait for.
    pub(super) fn watch(programs: &Path, url: &str, ca_file: &Path) -> Result<Self> {
        Self::spawn(Command::new(programs.join("load")).args(["watch", url]).arg(ca_file))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the load")?;
        let input = process.stdin.take();
        let output = BufReader::new(process.stdout.take().context("its standard output is a pipe")?);
        Ok(Self { process, input, output })
    }

    /// Ends an open loop and waits for its last answers.
    pub(super) fn finish(mut self) -> Result<Report> {
        self.input = None;
        let mut text = String::new();
        self.output.read_to_string(&mut text)?;
        serde_json::from_str(&text).context("the load ended without a report")
    }

    /// Begins to wait for `status`; [`Self::seen`] waits for the end of it.
    pub(super) fn expect(&mut self, status: u16) -> Result<()> {
        let input = self.input.as_mut().context("the load was finished")?;
        writeln!(input, "{status}")?;
        Ok(input.flush()?)
    }

    /// When the expected answer came, in microseconds since the epoch.
    pub(super) fn seen(&mut self) -> Result<i64> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match line.trim().parse() {
            Ok(time) => Ok(time),
            Err(_) => bail!("the load ended before it saw the expected answer"),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
