//! The control plane of SystemPrompt Cloud: `management-api serve` runs all of it on one host.

mod app;
mod billing;
mod certs;
mod commands;
mod config;
mod edge_role;
mod http;
mod identity;
mod images;
mod installation;
mod reconcile;
mod seal;
mod serve;
mod tenants;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    // The launcher runs between fork and exec of every instance: no runtime, no TLS, nothing but itself.
    let mut args = std::env::args_os();
    if args.nth(1).is_some_and(|first| first == config::LAUNCHER) {
        return systemprompt_compute::process::launcher_main(args);
    }
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        tracing::debug!("a TLS provider was installed before");
    }
    commands::run(config::Arguments::parse())
}
