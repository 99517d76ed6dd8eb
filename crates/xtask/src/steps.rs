//! `check`, the inner loop, and `test`, everything: named steps with their times, each with the command that
//! repeats it.

use crate::{packages, shell::Shell, sqlx, tidy};
use anyhow::{Context as _, Result, ensure};
use std::{process::Command, time::Instant};

/// Formatting, lints, tidy, unit tests.
pub(crate) fn check(shell: &Shell) -> Result<()> {
    let started = Instant::now();
    step("packages", "cargo xtask check", || packages::ensure(shell, &[packages::TO_RUN]))?;
    formatting(shell)?;
    lints(shell)?;
    rules(shell)?;
    let unit = if has_nextest(shell) {
        vec!["nextest", "run", "--workspace", "--lib", "--bins"]
    } else {
        vec!["test", "--workspace", "--lib", "--bins"]
    };
    step_cargo(shell, "unit tests", &unit)?;
    closing("check", started);
    Ok(())
}

/// Everything, on real parts. Installs what is missing first.
pub(crate) fn test(shell: &Shell) -> Result<()> {
    let started = Instant::now();
    step("privileges", "cargo xtask test", || privileged(rustix::process::geteuid().is_root()))?;
    step("packages", "cargo xtask test", || packages::ensure(shell, &[packages::TO_RUN, packages::TO_TEST]))?;
    formatting(shell)?;
    rules(shell)?;
    lints(shell)?;
    step("queries", "cargo xtask sqlx --check", || sqlx::run(shell, &sqlx::Options { check: true }))?;
    optional_tools(shell)?;
    step("documentation", "RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps", || {
        let mut doc = offline(shell.cargo(["doc", "--quiet", "--workspace", "--no-deps"]));
        shell.run(doc.env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    // The whole-stack tests run these as their own processes.
    step_cargo(shell, "build", &["build", "--workspace", "--bins"])?;
    tests(shell)?;
    closing("test", started);
    Ok(())
}

/// Said at once, and not by a hundred tests an hour later.
fn privileged(root: bool) -> Result<()> {
    ensure!(
        root,
        "the tests of sandboxes, networks and whole stacks need root: `sudo -E env \"PATH=$PATH\" cargo xtask test`; \
         as an ordinary user, `cargo xtask check` runs all that needs no more"
    );
    Ok(())
}

fn formatting(shell: &Shell) -> Result<()> {
    step("formatting", "cargo fmt --all", || shell.run(&mut shell.cargo(["fmt", "--all", "--check"])))
}

fn lints(shell: &Shell) -> Result<()> {
    let args = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    // The first step that compiles queries, and what the compiler says of stale ones names a tool we do not use.
    let rerun = format!("cargo {}; after a change of a query or a migration first: cargo xtask sqlx", args.join(" "));
    step("lints", &rerun, || shell.run(&mut offline(shell.cargo(args))))
}

fn rules(shell: &Shell) -> Result<()> {
    step("tidy", "cargo xtask tidy", || tidy::run(shell, &tidy::Options::default()))
}

fn tests(shell: &Shell) -> Result<()> {
    if has_nextest(shell) {
        step_cargo(shell, "examples in the documentation", &["test", "--quiet", "--workspace", "--doc"])?;
        // Last, so that its summary is the last a test runner says.
        step_cargo(shell, "tests", &["nextest", "run", "--workspace", "--no-fail-fast"])
    } else {
        let tests = step_cargo(shell, "tests", &["test", "--workspace", "--exclude", "e2e", "--no-fail-fast"]);
        // One after the other, as `.config/nextest.toml` says: stacks at once wait for each other, and a browser gives
        // up what it loads when another test's network comes or goes.
        let whole = ["test", "-p", "e2e", "--no-fail-fast", "--", "--test-threads=1"];
        let whole = step_cargo(shell, "whole-stack tests", &whole);
        tests.and(whole)
    }
}

/// Tools that a fresh machine does not have: used where they are, never required.
fn optional_tools(shell: &Shell) -> Result<()> {
    if has_subcommand(shell, "deny") {
        // Without advisories: those need a download, and a new one must not turn an unchanged tree red.
        step_cargo(shell, "dependency rules", &["deny", "--offline", "check", "bans", "licenses", "sources"])?;
    }
    if has_subcommand(shell, "machete") {
        step_cargo(shell, "unused dependencies", &["machete"])?;
    }
    if has_subcommand(shell, "fuzz") {
        for target in ["gate", "image"] {
            // The sanitizers need a nightly compiler.
            let fuzz = ["fuzz", "run", "--sanitizer", "none", target, "--", "-max_total_time=10", "-verbosity=0"];
            step_cargo(shell, &format!("fuzz target {target}"), &fuzz)?;
        }
    }
    Ok(())
}

fn has_nextest(shell: &Shell) -> bool {
    has_subcommand(shell, "nextest")
}

fn has_subcommand(shell: &Shell, name: &str) -> bool {
    shell.read_quiet(&mut shell.cargo([name, "--version"])).is_ok()
}

fn step_cargo(shell: &Shell, name: &str, args: &[&str]) -> Result<()> {
    step(name, &format!("cargo {}", args.join(" ")), || shell.run(&mut offline(shell.cargo(args))))
}

/// Queries are checked against `.sqlx`, whatever database the caller's environment names.
fn offline(mut command: Command) -> Command {
    command.env("SQLX_OFFLINE", "true").env_remove("DATABASE_URL");
    command
}

fn step(name: &str, rerun: &str, run: impl FnOnce() -> Result<()>) -> Result<()> {
    eprintln!("── {name}");
    let started = Instant::now();
    run().with_context(|| format!("{name} failed (to repeat it: {rerun})"))?;
    eprintln!("── {name}: {:.1} s", started.elapsed().as_secs_f32());
    Ok(())
}

fn closing(task: &str, started: Instant) {
    eprintln!("── {task}: all good, {:.0} s", started.elapsed().as_secs_f32());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_run_all_tests_is_told_what_to_type() {
        assert!(privileged(true).is_ok());
        assert!(privileged(false).unwrap_err().to_string().contains("sudo -E"));
    }

    #[test]
    fn a_failing_step_names_itself_and_how_to_repeat_it() {
        let error = step("lints", "cargo clippy", || anyhow::bail!("two warnings")).unwrap_err();
        assert_eq!(format!("{error:#}"), "lints failed (to repeat it: cargo clippy): two warnings");
    }
}
