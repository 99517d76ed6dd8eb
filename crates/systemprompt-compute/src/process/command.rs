//! Running the system's tools: input on stdin, output checked, error text kept.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::{Command, Stdio},
};

/// A program of the system, found once.
#[derive(Debug, Clone)]
pub(crate) struct Tool {
    pub(crate) path: PathBuf,
}

impl Tool {
    /// Runs it with `input` on stdin and returns its stdout.
    ///
    /// # Errors
    /// With the program's own words when it fails.
    pub(crate) fn run(&self, arguments: &[&str], input: &str) -> io::Result<String> {
        let mut child = Command::new(&self.path)
            .args(arguments)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.error(&error.to_string()))?;
        // Inputs are a few kilobytes, which a pipe holds: no deadlock with an output nobody reads yet.
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output()?;
        if !output.status.success() {
            let words = String::from_utf8_lossy(&output.stderr);
            return Err(self.error(&format!("{}: {}", output.status, words.trim())));
        }
        written?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn error(&self, what: &str) -> io::Error {
        io::Error::other(format!("{}: {what}", self.path.display()))
    }
}
