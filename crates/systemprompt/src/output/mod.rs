//! Standard output is data: text for people, or exactly one JSON value. Standard error is talk.

mod escape;
mod progress;
mod text;

pub(crate) use escape::{escaped, escaped_json};
pub(crate) use progress::Progress;
pub(crate) use text::{Text, bytes};

use crate::error::{CliError, Failure};
use anstream::ColorChoice;
use clap::error::ErrorKind;
use owo_colors::OwoColorize as _;
use serde::Serialize;
use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};
use systemprompt_contract::RequestId;

/// What a program may do with the data; the words of the existing client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ArtifactType {
    Table,
    PresentationCard,
    Text,
}

/// How to speak.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OutputOptions {
    pub(crate) json: bool,
    pub(crate) no_color: bool,
    pub(crate) quiet: bool,
    pub(crate) verbose: u8,
}

/// The only way to the two streams.
#[derive(Debug)]
pub(crate) struct Printer {
    json: bool,
    quiet: bool,
    no_color: bool,
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    data: &'a T,
    artifact_type: ArtifactType,
}

#[derive(Serialize)]
struct ErrorEnvelope<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    code: &'a str,
    message: &'a str,
    hint: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<RequestId>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    logs: &'a [String],
}

impl Printer {
    pub(crate) fn new(options: OutputOptions) -> Self {
        if options.no_color {
            ColorChoice::Never.write_global();
        }
        log_to_stderr(options.verbose);
        Self { json: options.json, quiet: options.quiet, no_color: options.no_color }
    }

    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// The command's answer: JSON, or what `human` writes.
    pub(crate) fn value<T: Serialize>(
        &self,
        artifact_type: ArtifactType,
        data: &T,
        human: impl FnOnce(&mut Text),
    ) -> Result<(), CliError> {
        if self.json {
            return self.json(&Envelope { data, artifact_type });
        }
        let mut text = Text::default();
        human(&mut text);
        self.data(text.as_str())
    }

    /// One of many answers, a line each.
    pub(crate) fn line<T: Serialize>(&self, data: &T, human: &str) -> Result<(), CliError> {
        if self.json {
            return self.json(&Envelope { data, artifact_type: ArtifactType::Text });
        }
        self.data(&format!("{human}\n"))
    }

    /// Something to know, on standard error.
    pub(crate) fn talk(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "{}", escaped(text));
        }
    }

    pub(crate) fn warn(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "{}: {}", "warning".yellow().bold(), escaped(text));
        }
    }

    /// What to do next; last, on a line of its own.
    pub(crate) fn next(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "{}: {}", "next".cyan().bold(), escaped(text));
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        Progress::new(self.quiet, std::io::stderr().is_terminal(), self.no_color)
    }

    /// Ends the process as the outcome says.
    pub(crate) fn exit_code(&self, outcome: Result<(), CliError>) -> ExitCode {
        let Err(error) = outcome else { return ExitCode::SUCCESS };
        if let Some(failure) = error.failure() {
            self.failure(failure);
        }
        error.exit_code()
    }

    fn failure(&self, failure: &Failure) {
        if self.json {
            let &Failure { ref code, ref message, ref hint, request_id, ref details } = failure;
            let error = ErrorFields { code, message, hint: hint.as_deref(), request_id, logs: details };
            // Who went is not to be told; a full disk is told on the other stream.
            if let Ok(()) | Err(CliError::BrokenPipe) = self.json(&ErrorEnvelope { error }) {
                return;
            }
        }
        let mut stderr = anstream::stderr();
        for line in &failure.details {
            let _ = writeln!(stderr, "  | {}", escaped(line));
        }
        let error = format!("error[{}]", failure.code);
        let _ = writeln!(stderr, "{}: {}", error.red().bold(), escaped(&failure.message));
        if let Some(hint) = &failure.hint {
            let _ = writeln!(stderr, "{}: {}", "hint".cyan().bold(), escaped(hint));
        }
        if let Some(id) = failure.request_id {
            let _ = writeln!(stderr, "{}: {id}", "request".dimmed());
        }
    }

    fn json(&self, value: &impl Serialize) -> Result<(), CliError> {
        let json = serde_json::to_string(value).map_err(|error| CliError::new("internal", error.to_string()))?;
        self.data(&format!("{}\n", escaped_json(&json)))
    }

    #[allow(clippy::unused_self, reason = "only a printer may write")]
    fn data(&self, text: &str) -> Result<(), CliError> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }
}

/// What clap has to say: help and version on standard output, mistakes on standard error; as JSON where that was
/// asked for.
pub(crate) fn usage_error(error: &clap::Error) -> ExitCode {
    let wants_json = std::env::args_os().any(|argument| argument == "--json") || crate::settings::env_wants_json();
    if !wants_json {
        // A reader that left is no reason to fail.
        let _ = error.print();
        return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    }
    let text = error.render().to_string();
    let printer = Printer::new(OutputOptions { json: true, no_color: true, quiet: true, verbose: 0 });
    if !error.use_stderr() {
        return printer.exit_code(printer.value(ArtifactType::Text, &Said { text: text.trim_end() }, |_| {}));
    }
    let message = match error.kind() {
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "expected a subcommand".to_owned(),
        _ => complaint(&text),
    };
    printer.exit_code(Err(CliError::usage(message).hint("See: systemprompt --help")))
}

#[derive(Serialize)]
struct Said<'a> {
    text: &'a str,
}

/// All that clap complains of, in one line, without the usage behind it.
fn complaint(text: &str) -> String {
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"));
    let words: Vec<_> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    words.join(" ").trim_start_matches("error: ").to_owned()
}

/// `-v` and `-vv` show our own log; those of libraries could carry headers.
fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => return,
        1 => "info",
        _ => "debug",
    };
    let filter =
        ["systemprompt", "systemprompt_cloud", "systemprompt_oci"].map(|name| format!("{name}={level}")).join(",");
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).with_env_filter(filter);
    if subscriber.try_init().is_err() {
        tracing::debug!("a log was set up before");
    }
}
