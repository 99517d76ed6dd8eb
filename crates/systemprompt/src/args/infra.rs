use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum InfraCommand {
    /// The services of this project.
    #[command(subcommand)]
    Services(ServicesCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ServicesCommand {
    /// Run the tenant's server; settings come from the environment.
    #[command(visible_alias = "start")]
    Serve(ServeArgs),
}

/// Flags that scripts and images pass; the server always runs in the foreground with all it has.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Stay in the foreground (always so).
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Start everything (always so).
    #[arg(long)]
    pub(crate) all: bool,
}
