//! Developer tasks: set up, run, check, test and measure, each one command.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line for people: it prints")]

mod bench;
mod database;
mod http;
mod interrupt;
mod metadata;
mod packages;
mod shell;
mod sqlx;
mod steps;
mod tidy;
mod up;

use clap::{Parser, Subcommand};
use interrupt::Interrupted;
use shell::Shell;
use std::process::ExitCode;

/// Sets up, runs, checks, tests and measures SystemPrompt Cloud.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing, build, start the whole cloud in the foreground and deploy the example to it.
    Up(up::Options),
    /// The inner loop: formatting, lints, tidy, unit tests.
    Check,
    /// Everything: formatting, lints, tidy, queries, unit, integration and whole-stack tests, documentation.
    Test,
    /// Write `.sqlx` anew from the migrations, on a private PostgreSQL cluster.
    Sqlx(sqlx::Options),
    /// The project's own rules: who may depend on whom, what no file may say, tables that must match the code.
    Tidy(tidy::Options),
    /// Measure.
    Bench(bench::Options),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<Interrupted>() { 130 } else { 1 })
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let shell = Shell::open()?;
    match task {
        Task::Up(options) => up::run(&shell, &options),
        Task::Check => steps::check(&shell),
        Task::Test => steps::test(&shell),
        Task::Sqlx(options) => sqlx::run(&shell, &options),
        Task::Tidy(options) => tidy::run(&shell, &options),
        Task::Bench(options) => bench::run(&shell, &options),
    }
}
