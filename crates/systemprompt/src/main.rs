//! The command line of SystemPrompt Cloud, shipped to users and into every tenant's image.
//!
//! Three layers: `args` (what was typed), `settings` (what it means here, with environment and project), `commands`
//! (what is done, given values and a printer). Standard output is data, standard error is talk.

mod args;
mod commands;
mod context;
mod error;
mod output;
mod prompt;
mod settings;

use args::Arguments;
use clap::Parser as _;
use error::CliError;
use output::Printer;
use settings::Settings;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return output::usage_error(&error),
    };
    let printer = Printer::new(arguments.global.output());
    printer.exit_code(run(arguments, &printer))
}

fn run(arguments: Arguments, printer: &Printer) -> Result<(), CliError> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed before");
    }
    let settings = Settings::resolve(arguments.global)?;
    // One thread: a command waits for one thing at a time, and the tenant's server for little more.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(CliError::runtime)?;
    let outcome = runtime.block_on(commands::run(arguments.command, &settings, printer));
    // Whatever still blocks (a build that nobody waits for any more) ends with the process.
    runtime.shutdown_background();
    outcome
}
