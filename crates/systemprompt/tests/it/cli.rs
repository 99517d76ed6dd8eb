//! Runs the program in a directory of its own with an environment of its own.

use crate::cloud::Cloud;
use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Child, Command, Output, Stdio},
};
use systemprompt_contract::token;
use tempfile::TempDir;

pub(crate) struct Cli {
    pub(crate) home: TempDir,
    api_url: String,
}

/// How a command ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Cli {
    /// In an empty directory, with nobody signed in.
    pub(crate) fn new(cloud: &Cloud) -> Self {
        Self { home: tempfile::tempdir().expect("a directory"), api_url: cloud.url.clone() }
    }

    /// In a project that can be deployed, signed in to `cloud`.
    pub(crate) fn signed_in(cloud: &Cloud) -> Self {
        let cli = Self::new(cloud);
        for (path, text) in [
            ("web/dist/index.html", "hello"),
            ("services/config/config.yaml", "agents: {}\n"),
            (".systemprompt/profiles/production/profile.yaml", "name: production\ntarget: cloud\n"),
        ] {
            cli.write(path, text);
        }
        let ended =
            cli.run_with(&["cloud", "auth", "login", "--token", "-", "--api-url", &cloud.url], api_token().as_str());
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        cli
    }

    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = self.home.path().join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, text).expect("written");
    }

    pub(crate) fn read(&self, path: &str) -> String {
        fs::read_to_string(self.home.path().join(path)).expect(path)
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_systemprompt"));
        command.args(args).current_dir(self.home.path()).env_clear().env("HOME", self.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        self.ended(self.command(args).output().expect("ran"))
    }

    pub(crate) fn run_with(&self, args: &[&str], stdin: &str) -> Ended {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().expect("started");
        // A program that refuses before it reads closes the pipe.
        let _ = child.stdin.take().expect("piped").write_all(stdin.as_bytes());
        self.ended(child.wait_with_output().expect("ended"))
    }

    pub(crate) fn start(&self, args: &[&str]) -> Child {
        self.command(args).spawn().expect("started")
    }

    /// What is the same in every run: addresses and directories replaced.
    fn ended(&self, output: Output) -> Ended {
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).expect("UTF-8");
            let text = text.replace(&self.api_url, "https://API").replace(authority(&self.api_url), "API");
            text.replace(&real(self.home.path()), "[PROJECT]")
        };
        Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ended {
    /// For snapshots.
    pub(crate) fn shown(&self) -> String {
        let Self { code, stdout, stderr } = self;
        let code = code.map_or_else(|| "signal".to_owned(), |code| code.to_string());
        format!("exit {code}\n----- stdout\n{stdout}----- stderr\n{stderr}")
    }
}

fn authority(url: &str) -> &str {
    url.split_once("://").map_or(url, |(_, authority)| authority)
}

fn real(path: &Path) -> String {
    path.canonicalize().expect("there").display().to_string()
}

/// A whole token that ends in the year 2100.
pub(crate) fn api_token() -> String {
    token::new_api_token(4_102_444_800).expose().to_owned()
}
