//! Figures, measured the same way every time.

mod control;
mod load;
mod nginx;
mod row;
mod spine;

use crate::shell::Shell;
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
    Spine,
}

/// Prints exactly one line a figure.
pub(crate) fn run(shell: &Shell, options: &Options) -> Result<()> {
    match options.suite {
        Suite::Spine => spine::run(shell),
    }
}
