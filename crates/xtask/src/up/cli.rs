//! The command line as a user has it: the `systemprompt` binary in the sample project, with `--json`.

use super::cloud::Installation;
use crate::shell::{Shell, ended, spell};
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
};

/// `systemprompt` in one project, against one installation.
pub(super) struct Cli {
    program: PathBuf,
    project: PathBuf,
    ca_file: PathBuf,
    caches: PathBuf,
}

impl Cli {
    pub(super) fn new(installation: &Installation) -> Self {
        Self {
            program: installation.programs.join("systemprompt"),
            project: installation.project(),
            ca_file: installation.ca_file(),
            caches: installation.caches(),
        }
    }

    /// The JSON it answers; its progress stays visible.
    pub(super) fn json(&self, shell: &Shell, args: &[&str]) -> Result<Value> {
        self.answer(shell, args, None)
    }

    /// The same with `input` on standard input, and without a word to the terminal.
    pub(super) fn json_fed(&self, shell: &Shell, args: &[&str], input: &str) -> Result<Value> {
        self.answer(shell, args, Some(input))
    }

    fn answer(&self, shell: &Shell, args: &[&str], input: Option<&str>) -> Result<Value> {
        let mut command = self.command(args);
        command.arg("--json").stderr(if input.is_some() { Stdio::piped() } else { Stdio::inherit() });
        let output = shell.answer(&mut command, input)?;
        judge(&command, &output)
    }

    /// Buys a tenant. The purchase waits for its confirmation, so `confirm` is called with the checkout's id while
    /// it waits: the same two commands in two terminals of a person who is his own operator.
    pub(super) fn buy(&self, shell: &Shell, name: &str, confirm: impl FnOnce(&str) -> Result<()>) -> Result<Value> {
        let mut command = self.command(&["cloud", "tenant", "create", "--no-browser", "--name", name, "--json"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start `{}`", spell(&command)))?;
        let _foreground = shell.interrupts.foreground(&child)?;
        let stderr = child.stderr.take().context("its standard error is a pipe")?;
        let (announced, checkout) = mpsc::channel();
        let relay = thread::spawn(move || relay(BufReader::new(stderr), &announced));
        // Closed without an id: it ended before it came to that, and its own words say why.
        let confirmed = checkout.recv().map_or(Ok(()), |checkout| confirm(&checkout));
        if confirmed.is_err() {
            // It would wait for a confirmation that does not come.
            child.kill()?;
        }
        let output = child.wait_with_output()?;
        let said = relay.join().unwrap_or_default();
        shell.interrupts.check()?;
        confirmed?;
        judge(&command, &output).with_context(|| said)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).current_dir(&self.project).env("SYSTEMPROMPT_CA_FILE", &self.ca_file);
        // The installation's own, so that it can be emptied without touching a person's.
        command.env("XDG_CACHE_HOME", &self.caches);
        // Cargo adds its own library folders for us; they must not leak into an image.
        command.env_remove("LD_LIBRARY_PATH");
        command
    }
}

/// Keeps what the command says and passes on the checkout's id, from the line that tells how to confirm it.
fn relay(stderr: impl BufRead, announced: &mpsc::Sender<String>) -> String {
    let mut said = String::new();
    for line in stderr.lines().map_while(Result::ok) {
        if let Some(checkout) = checkout_in(&line) {
            // Said twice, or nobody waits any more: once was enough.
            let _ = announced.send(checkout.to_owned());
        }
        said.push_str(&line);
        said.push('\n');
    }
    said
}

fn checkout_in(line: &str) -> Option<&str> {
    line.trim().strip_prefix("systemprompt cloud checkout confirm ").filter(|id| !id.contains(' '))
}

/// What it answered, or why it failed in its own words: `{"error": {message, hint, logs}}`.
fn judge(command: &Command, output: &Output) -> Result<Value> {
    let answer = last_object(&String::from_utf8_lossy(&output.stdout));
    if output.status.success() {
        return answer;
    }
    let mut why = format!("`{}` {}", spell(command), ended(output.status));
    if let Some(error) = answer.ok().and_then(|mut answer| answer.get_mut("error").map(Value::take)) {
        let lines = error["logs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let lines = lines.map(|line| format!("  | {line}"));
        let rest = ["message", "hint"].into_iter().filter_map(|name| error[name].as_str().map(str::to_owned));
        why = lines.chain(rest).fold(why + ":", |why, line| why + "\n" + &line);
    }
    bail!(why)
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
    use std::path::Path;

    #[test]
    fn the_last_object_counts() {
        assert_eq!(last_object("{\"a\":1}\n{\n \"a\": 2\n}\n").unwrap()["a"], 2);
        assert!(last_object("").is_err());
        assert!(last_object("{\"a\":1}\nDone!").is_err());
    }

    /// A command line that buys: waits until `confirmed` exists, as the real one waits for the confirmation.
    fn fake(folder: &Path, script: &str) -> Cli {
        let program = folder.join("systemprompt");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Cli { program, project: folder.to_owned(), ca_file: "ca.pem".into(), caches: folder.join("cache") }
    }

    #[test]
    fn a_purchase_is_confirmed_while_it_waits() {
        let folder = tempfile::tempdir().unwrap();
        let script = "echo '  systemprompt cloud checkout confirm abc-1' >&2\n\
                      while ! [ -e confirmed ]; do sleep 0.02; done\necho '{\"data\":{\"id\":\"t1\"}}'";
        let cli = fake(folder.path(), script);
        let shell = Shell::open().unwrap();
        let bought = cli.buy(&shell, "hello", |checkout| {
            assert_eq!(checkout, "abc-1");
            Ok(std::fs::write(folder.path().join("confirmed"), "")?)
        });
        assert_eq!(bought.unwrap()["data"]["id"], "t1");
    }

    #[test]
    fn a_purchase_that_fails_says_why_and_a_refused_confirmation_ends_it() {
        let folder = tempfile::tempdir().unwrap();
        let shell = Shell::open().unwrap();
        let cli = fake(folder.path(), "echo 'no plans here' >&2; exit 2");
        let error = cli.buy(&shell, "hello", |_| panic!("there is nothing to confirm")).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains("exit code 2") && error.contains("no plans here"), "{error}");

        let waits = "echo 'systemprompt cloud checkout confirm abc' >&2; exec sleep 60";
        let error = fake(folder.path(), waits).buy(&shell, "hello", |_| bail!("not the operator")).unwrap_err();
        assert_eq!(error.to_string(), "not the operator");
    }

    #[test]
    fn a_failure_is_told_in_the_command_line_s_own_words() {
        let folder = tempfile::tempdir().unwrap();
        let error =
            r#"{"error":{"code":"app_crashed","message":"the app ended","hint":"read its log","logs":["boom"]}}"#;
        let cli = fake(folder.path(), &format!("echo '{error}'; exit 1"));
        let error = cli.json(&Shell::open().unwrap(), &["cloud", "deploy"]).unwrap_err().to_string();
        let expected =
            "`systemprompt cloud deploy --json` failed with exit code 1:\n  | boom\nthe app ended\nread its log";
        assert_eq!(error, expected);
    }
}
