//! What can be typed. No decisions here.

mod cloud;
mod infra;

pub(crate) use cloud::{AuthCommand, CheckoutCommand, CloudCommand, LoginArgs, TenantCommand};
pub(crate) use infra::{InfraCommand, ServicesCommand};

use crate::output::OutputOptions;
use clap::{ArgAction, Args, Parser, Subcommand, builder::FalseyValueParser};
use std::path::PathBuf;

/// Run a project on SystemPrompt Cloud.
#[derive(Debug, Parser)]
#[command(name = "systemprompt", version, max_term_width = 100, disable_help_subcommand = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tenants in the cloud: sign in, buy, deploy, look.
    #[command(subcommand)]
    Cloud(CloudCommand),
    /// The tenant's own server.
    #[command(subcommand)]
    Infra(InfraCommand),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of its own")]
pub(crate) struct GlobalArgs {
    /// Print exactly one JSON value on standard output (one a line when following).
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Profile by name or path; without it the only one, or the only one for the cloud.
    #[arg(long, global = true, value_name = "NAME", env = "SYSTEMPROMPT_PROFILE", hide_env_values = true)]
    pub(crate) profile: Option<String>,
    /// Management API to call; without it the one that is signed in to.
    #[arg(long, global = true, value_name = "URL", env = "SYSTEMPROMPT_API_URL", hide_env_values = true)]
    pub(crate) api_url: Option<String>,
    /// Further certificate authorities to trust, PEM.
    #[arg(long, global = true, value_name = "FILE", env = "SYSTEMPROMPT_CA_FILE", hide_env_values = true)]
    pub(crate) ca_file: Option<PathBuf>,
    #[arg(long, global = true, help = "No colours (also NO_COLOR)")]
    pub(crate) no_color: bool,
    /// Never ask.
    #[arg(long, global = true, env = "SYSTEMPROMPT_NON_INTERACTIVE", hide_env_values = true, value_parser = FalseyValueParser::new())]
    pub(crate) non_interactive: bool,
    /// Say more on standard error; twice for everything.
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Say nothing on standard error but errors.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
}

impl GlobalArgs {
    pub(crate) fn output(&self) -> OutputOptions {
        OutputOptions {
            json: self.json || crate::settings::env_wants_json(),
            no_color: self.no_color,
            quiet: self.quiet,
            verbose: self.verbose,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_tree_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
