//! Figures, measured the same way every time.

mod control;
mod load;
mod nginx;
mod row;
mod spine;

use crate::{shell::Shell, up::Profile};
use anyhow::Result;

/// Options of `cargo xtask bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    suite: Suite,
}

#[derive(Debug, clap::Subcommand)]
enum Suite {
    /// The spine: provision, deploy, redeploy, route, memory, the edge against nginx.
    Spine {
        /// Unoptimised binaries: to try the measuring itself, the figures mean nothing.
        #[arg(long)]
        dev: bool,
    },
}

/// Prints exactly one line a figure.
pub(crate) fn run(shell: &Shell, options: &Options) -> Result<()> {
    match options.suite {
        Suite::Spine { dev: false } => spine::run(shell, Profile::Release),
        Suite::Spine { dev: true } => spine::run(shell, Profile::Dev),
    }
}
