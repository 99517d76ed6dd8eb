//! Running other programs, so that a failure says what ran and how it ended.

use crate::interrupt::Interrupts;
use anyhow::{Context as _, Result, bail};
use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output, Stdio},
    thread,
};

/// Where the workspace is, and the signals.
pub(crate) struct Shell {
    root: PathBuf,
    pub(crate) interrupts: Interrupts,
}

impl Shell {
    /// The workspace this binary was built from.
    pub(crate) fn open() -> Result<Self> {
        let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let root = manifest.ancestors().nth(2).context("xtask lies two folders below the workspace")?.to_owned();
        if !root.join("Cargo.toml").is_file() {
            bail!(
                "the workspace is no longer at {}: run `cargo xtask` inside it, so that it is built anew",
                root.display()
            );
        }
        Ok(Self { root, interrupts: Interrupts::install().context("cannot take over SIGINT and SIGTERM")? })
    }

    /// The workspace's folder.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Cargo, in the workspace, the one that runs us.
    pub(crate) fn cargo<I, S>(&self, args: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(args).current_dir(&self.root);
        command
    }

    /// Runs with our own output; fails when the program fails.
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        let status = self.status(command)?;
        self.interrupts.check()?;
        if status.success() { Ok(()) } else { bail!("`{}` {}", spell(command), ended(status)) }
    }

    /// Runs quietly: standard error is shown only in the error.
    pub(crate) fn read_quiet(&self, command: &mut Command) -> Result<String> {
        self.feed(command.stderr(Stdio::piped()), None)
    }

    /// Runs quietly with `input` as its standard input, which no process list shows.
    pub(crate) fn read_fed(&self, command: &mut Command, input: &str) -> Result<String> {
        self.feed(command.stderr(Stdio::piped()), Some(input))
    }

    /// Runs to its end, well or not, and takes its standard output; `input` is its standard input.
    pub(crate) fn answer(&self, command: &mut Command, input: Option<&str>) -> Result<Output> {
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        let output = self.output(command.stdout(Stdio::piped()), input)?;
        self.interrupts.check()?;
        Ok(output)
    }

    fn feed(&self, command: &mut Command, input: Option<&str>) -> Result<String> {
        let output = self.answer(command, input)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let colon = if said.trim().is_empty() { "" } else { ":\n" };
            bail!("`{}` {}{colon}{}", spell(command), ended(output.status), said.trim_end());
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{}` did not answer in UTF-8", spell(command)))
    }

    fn status(&self, command: &mut Command) -> Result<ExitStatus> {
        self.interrupts.check()?;
        let mut child = command.spawn().with_context(|| format!("cannot start `{}`", spell(command)))?;
        let _foreground = self.interrupts.foreground(&child)?;
        child.wait().with_context(|| format!("cannot wait for `{}`", spell(command)))
    }

    fn output(&self, command: &mut Command, input: Option<&str>) -> Result<Output> {
        self.interrupts.check()?;
        let mut child = command.spawn().with_context(|| format!("cannot start `{}`", spell(command)))?;
        let _foreground = self.interrupts.foreground(&child)?;
        let stdin = child.stdin.take();
        thread::scope(|scope| {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A program that ends without reading its input says so by its exit code.
                scope.spawn(move || stdin.write_all(input.as_bytes()));
            }
            child.wait_with_output().with_context(|| format!("cannot wait for `{}`", spell(command)))
        })
    }
}

/// The path of a program, looked for where root's programs are too: a user's PATH often lacks them.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// A command as a person would type it. For messages: the quoting is for the eye.
pub(crate) fn spell(command: &Command) -> String {
    let program = Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
    let args = command.get_args().map(|arg| {
        let arg = arg.to_string_lossy();
        if arg.contains(char::is_whitespace) || arg.is_empty() { format!("'{arg}'") } else { arg.into_owned() }
    });
    std::iter::once(name).chain(args).collect::<Vec<_>>().join(" ")
}

/// How a program ended, in words.
pub(crate) fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => format!("failed ({status})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_spelled_as_one_would_type_it() {
        let mut command = Command::new("/usr/bin/psql");
        command.args(["-c", "SELECT 1", ""]);
        assert_eq!(spell(&command), "psql -c 'SELECT 1' ''");
    }

    #[test]
    fn a_failure_names_the_command_its_code_and_what_it_said() {
        let shell = Shell::open().unwrap();
        let error = shell.read_quiet(Command::new("sh").args(["-c", "echo reason >&2; exit 3"])).unwrap_err();
        assert!(error.to_string().starts_with("`sh -c"), "{error}");
        assert!(error.to_string().ends_with("failed with exit code 3:\nreason"), "{error}");
    }

    #[test]
    fn input_reaches_the_program() {
        let shell = Shell::open().unwrap();
        assert_eq!(shell.read_fed(&mut Command::new("cat"), "a\nb").unwrap(), "a\nb");
    }

    #[test]
    fn programs_of_root_are_found_too() {
        assert!(find_program("sh").is_some());
        assert_eq!(find_program("no-such-program-anywhere"), None);
    }
}
