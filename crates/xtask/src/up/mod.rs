//! `cargo xtask up`: from a clean clone to a tenant that answers over HTTPS, by the same public steps as any user's.

mod account;
mod cli;
mod cloud;
mod example;
mod orphan;
mod report;
mod server;

pub(crate) use cloud::{Cloud, Installation, Tenant};
pub(crate) use server::Server;

use crate::{packages, shell::Shell};
use anyhow::{Context as _, Result, ensure};
use report::Timings;
use std::{
    net::{SocketAddr, ToSocketAddrs as _},
    path::{Path, PathBuf},
    time::Instant,
};

/// Options of `cargo xtask up`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// Verify, redeploy with one changed file, verify again, print the figures as the last line, stop.
    #[arg(long)]
    once: bool,
    /// Where everything is kept [default: /var/lib/systemprompt as root, ~/.local/share/systemprompt otherwise].
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// HTTPS port.
    #[arg(long, value_name = "PORT", default_value_t = 8443, value_parser = clap::value_parser!(u16).range(1..))]
    https: u16,
    /// HTTP port, which only redirects to HTTPS.
    #[arg(long, value_name = "PORT", default_value_t = 8480, value_parser = clap::value_parser!(u16).range(1..))]
    http: u16,
    /// Serve the API in clear here as well, for clients that trust public CAs only.
    #[arg(long, value_name = "127.0.0.1:PORT")]
    http_api: Option<SocketAddr>,
    /// DNS zone; every tenant gets a host in it.
    #[arg(long, default_value = "systemprompt.localhost")]
    zone: String,
    /// Optimised binaries: slow to build, fast to run (the default).
    #[arg(long, conflicts_with = "dev")]
    release: bool,
    /// Unoptimised binaries, as the tests use them.
    #[arg(long)]
    dev: bool,
    /// Run the binaries of this folder instead of building them: for tests, inside which cargo would wait for itself.
    #[arg(long, value_name = "DIR", hide = true)]
    programs: Option<PathBuf>,
}

/// Which binaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    Release,
    Dev,
}

/// Installs, builds, starts, deploys, and stays until Ctrl-C, or with `--once` measures and stops.
pub(crate) fn run(shell: &Shell, options: &Options) -> Result<()> {
    zone_leads_here(&options.zone)?;
    packages::ensure(shell, &[packages::TO_RUN])?;
    let programs = match &options.programs {
        Some(programs) => programs.clone(),
        None => build(shell, if options.dev { Profile::Dev } else { Profile::Release }, &[])?,
    };
    let installation = options.installation(programs)?;

    let started = Instant::now();
    let mut cloud = Cloud::start(shell, installation)?;
    let outcome = serve(shell, &mut cloud, options, started);
    match &outcome {
        // A reason of its own: the log would only bury it.
        Ok(_) => {}
        Err(error) if error.is::<crate::interrupt::Interrupted>() => {}
        Err(_) => eprintln!("\nlast lines of {}:\n{}", cloud.log_file().display(), cloud.log_tail()),
    }
    let stopped = cloud.stop();
    let last_line = outcome?;
    stopped?;
    if let Some(line) = last_line {
        println!("{line}");
    }
    Ok(())
}

/// Said at once, and not after the build. Names below `localhost` need no DNS: everybody concerned knows them.
fn zone_leads_here(zone: &str) -> Result<()> {
    let api = format!("api.{zone}");
    let known = zone == "localhost" || zone.ends_with(".localhost");
    ensure!(
        known || (api.as_str(), 0).to_socket_addrs().is_ok_and(|mut found| found.next().is_some()),
        "{api} leads nowhere: the names of --zone {zone} (*.{zone}) must lead to this machine, by DNS or /etc/hosts"
    );
    Ok(())
}

/// Builds the binaries a cloud consists of, and the `more` packages; the answer is their folder.
pub(crate) fn build(shell: &Shell, profile: Profile, more: &[&str]) -> Result<PathBuf> {
    eprintln!("building (the first time takes some minutes) …");
    let mut cargo = shell.cargo(["build"]);
    for package in ["management-api", "systemprompt"].iter().chain(more) {
        cargo.args(["-p", package]);
    }
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    // Queries are checked against `.sqlx`: no database is needed to build.
    cargo.env("SQLX_OFFLINE", "true").env_remove("DATABASE_URL");
    shell.run(&mut cargo)?;
    let folder = match profile {
        Profile::Release => "release",
        Profile::Dev => "debug",
    };
    Ok(crate::metadata::Metadata::read(shell)?.target_directory.join(folder))
}

fn serve(shell: &Shell, cloud: &mut Cloud, options: &Options, started: Instant) -> Result<Option<String>> {
    let mut timings = Timings::default();
    cloud.sign_in(shell)?;
    let tenant = cloud.tenant(shell, &mut timings)?;
    if tenant.is_new {
        eprintln!("deploying the example to {} …", tenant.url);
        timings.deploy = Some(cloud.deploy(shell, &tenant)?.wall);
        cloud.verify(shell, &tenant)?;
    } else {
        cloud.verify_answers(shell, &tenant)?;
    }
    timings.total = Some(started.elapsed());
    if !options.once {
        eprintln!("{}", report::welcome(cloud.installation(), &tenant));
        return cloud.stay().map(|()| None);
    }
    eprintln!("deploying again with one changed file …");
    cloud.change_example()?;
    timings.redeploy = Some(cloud.deploy(shell, &tenant)?.wall);
    cloud.verify(shell, &tenant)?;
    Ok(Some(report::last_line(&tenant.url, &timings)))
}

impl Options {
    fn installation(&self, programs: PathBuf) -> Result<Installation> {
        let data = match &self.data {
            Some(data) => std::path::absolute(data).context("--data is not a path")?,
            None => default_data(
                rustix::process::geteuid().is_root(),
                std::env::var_os("XDG_DATA_HOME").map(PathBuf::from),
                std::env::home_dir(),
            )?,
        };
        Ok(Installation {
            programs,
            data,
            zone: self.zone.clone(),
            https: self.https,
            http: self.http.to_string(),
            http_api: self.http_api,
        })
    }
}

fn default_data(root: bool, xdg: Option<PathBuf>, home: Option<PathBuf>) -> Result<PathBuf> {
    if root {
        return Ok("/var/lib/systemprompt".into());
    }
    xdg.filter(|folder| folder.is_absolute())
        .or_else(|| home.map(|home| home.join(".local/share")))
        .map(|folder: PathBuf| folder.join(Path::new("systemprompt")))
        .context("there is no home folder to keep data in: say where with --data")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_that_leads_nowhere_is_refused_before_anything_is_built() {
        zone_leads_here("cloud.localhost").unwrap();
        // No resolver can know it.
        let error = zone_leads_here("bad zone").unwrap_err().to_string();
        assert!(error.contains("bad zone") && error.contains("/etc/hosts"), "{error}");
    }

    #[test]
    fn data_lies_where_the_system_keeps_such_things() {
        let home = Some(PathBuf::from("/home/a"));
        let check = |root, xdg: Option<&str>, home, expected: &str| {
            assert_eq!(default_data(root, xdg.map(PathBuf::from), home).unwrap(), PathBuf::from(expected));
        };
        check(true, None, home.clone(), "/var/lib/systemprompt");
        check(false, None, home.clone(), "/home/a/.local/share/systemprompt");
        check(false, Some("/data"), home.clone(), "/data/systemprompt");
        check(false, Some("relative"), home, "/home/a/.local/share/systemprompt");
        assert!(default_data(false, None, None).is_err());
    }
}
