//! The command line as a user has it: the `systemprompt` binary in the sample project, with `--json`.

use crate::shell::Shell;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// `systemprompt` in one project, against one installation.
pub(super) struct Cli {
    program: PathBuf,
    project: PathBuf,
    ca_file: PathBuf,
}

impl Cli {
    pub(super) fn new(programs: &Path, project: &Path, ca_file: &Path) -> Self {
        Self { program: programs.join("systemprompt"), project: project.to_owned(), ca_file: ca_file.to_owned() }
    }

    /// The last JSON object it prints; its progress stays visible.
    pub(super) fn json(&self, shell: &Shell, args: &[&str]) -> Result<Value> {
        last_object(&shell.read(self.command(args).arg("--json"))?)
    }

    /// The same with `input` on standard input.
    pub(super) fn json_fed(&self, shell: &Shell, args: &[&str], input: &str) -> Result<Value> {
        last_object(&shell.read_fed(self.command(args).arg("--json"), input)?)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).current_dir(&self.project).env("SYSTEMPROMPT_CA_FILE", &self.ca_file);
        // Cargo adds its own library folders for us; they must not leak into an image.
        command.env_remove("LD_LIBRARY_PATH");
        command
    }
}

/// Following commands print one object a line, the others one over several lines: the last counts.
fn last_object(output: &str) -> Result<Value> {
    let values = serde_json::Deserializer::from_str(output).into_iter::<Value>();
    let last = values.last().with_context(|| "the command line printed no JSON")?;
    last.with_context(|| format!("the command line printed something that is not JSON:\n{output}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_object_counts() {
        assert_eq!(last_object("{\"a\":1}\n{\n \"a\": 2\n}\n").unwrap()["a"], 2);
        assert!(last_object("").is_err());
        assert!(last_object("{\"a\":1}\nDone!").is_err());
    }
}
