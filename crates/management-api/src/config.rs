//! The command line, parsed once. Everything below gets values, never `clap` or the environment.

use crate::app::{DeployLimits, Site};
use clap::{Parser, Subcommand, ValueEnum};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};
use systemprompt_contract::Zone;

/// First argument of the hidden subcommand that turns this process into an instance's launcher.
pub(crate) const LAUNCHER: &str = "launch-instance";

/// The control plane of SystemPrompt Cloud.
#[derive(Debug, Parser)]
#[command(name = "management-api", version, about)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the whole control plane: PostgreSQL, API, registry, workers and the edge.
    Serve(ServeArguments),
    /// Run an edge alone, from its persisted snapshot; follows PostgreSQL when it is there.
    Edge(EdgeArguments),
    /// Stop what a `serve` left running: instances and database clusters.
    Stop(DataArguments),
    /// Make an account: the password on standard input, a first token as JSON on standard output.
    CreateAccount(AccountArguments),
    /// A new token of the installation's first operator, as JSON on standard output, for whoever may read its data.
    Token(DataArguments),
    /// Print every endpoint with who may call it, as JSON.
    #[command(hide = true)]
    Endpoints,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct DataArguments {
    /// Where everything is kept.
    #[arg(long, value_name = "DIR", env = "SYSTEMPROMPT_DATA")]
    pub(crate) data: PathBuf,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct AccountArguments {
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// Address to sign in with.
    #[arg(long)]
    pub(crate) email: String,
    /// It may run the installation, not only its own tenants.
    #[arg(long)]
    pub(crate) operator: bool,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct EdgeArguments {
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// DNS zone of this installation.
    #[arg(long, default_value_t = Zone::default())]
    pub(crate) zone: Zone,
    /// HTTPS: a port, or ADDRESS:PORT.
    #[arg(long, value_name = "LISTEN", default_value = "8443")]
    pub(crate) https: Listen,
    /// HTTP, which only redirects: a port, ADDRESS:PORT, or `off`.
    #[arg(long, value_name = "LISTEN", default_value = "8480")]
    pub(crate) http: Listen,
    /// The HTTPS port that clients use, when it is not the one listened on.
    #[arg(long, value_name = "PORT")]
    pub(crate) public_port: Option<u16>,
}

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ServeArguments {
    #[command(flatten)]
    pub(crate) edge: EdgeArguments,
    /// Serve the API in clear here as well; loopback only, for clients that trust public CAs only.
    #[arg(long, value_name = "127.0.0.1:PORT")]
    pub(crate) http_api: Option<SocketAddr>,
    /// No edge in this process; `management-api edge` serves instead.
    #[arg(long)]
    pub(crate) without_edge: bool,
    /// What becomes of instances and database clusters when this process is told to stop.
    #[arg(long, value_enum, default_value_t = OnStop::Leave)]
    pub(crate) on_stop: OnStop,
    /// Run tenants without isolation from each other where this host gives none (no root), and without limits where it
    /// has no control groups.
    #[arg(long)]
    pub(crate) unsafe_shared: bool,
    /// Seconds a new release may take to answer its health check.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) healthy_within: u64,
    /// Seconds from SIGTERM to SIGKILL when an instance is stopped.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    pub(crate) stop_grace: u64,
}

impl ServeArguments {
    pub(crate) fn deploy_limits(&self) -> DeployLimits {
        DeployLimits {
            healthy_within: Duration::from_secs(self.healthy_within),
            stop_grace: Duration::from_secs(self.stop_grace),
            max_pids: 256,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnStop {
    /// They go on; the next start finds them.
    Leave,
    /// Stopped as well, in order.
    Stop,
}

/// One listener of the edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Listen {
    Off,
    On(SocketAddr),
}

impl Listen {
    pub(crate) fn addresses(self) -> Vec<SocketAddr> {
        match self {
            Self::Off => Vec::new(),
            Self::On(address) => vec![address],
        }
    }
}

impl FromStr for Listen {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::Off);
        }
        if let Ok(port) = text.parse() {
            return Ok(Self::On(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)));
        }
        text.parse().map(Self::On).map_err(|_| format!("expected a port, ADDRESS:PORT or `off`, got {text:?}"))
    }
}

/// Where things lie below the data directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }
    pub(crate) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }
    pub(crate) fn seal_key(&self) -> PathBuf {
        self.root.join("keys/seal.key")
    }
    pub(crate) fn ca(&self) -> PathBuf {
        self.root.join("ca")
    }
    pub(crate) fn cluster(&self, name: &str) -> PathBuf {
        self.root.join("postgres").join(name)
    }
    pub(crate) fn registry(&self) -> PathBuf {
        self.root.join("registry")
    }
    pub(crate) fn compute(&self) -> PathBuf {
        self.root.join("compute")
    }
    pub(crate) fn setup_token(&self) -> PathBuf {
        self.root.join("setup-token")
    }
    /// Of whichever edge runs; nobody else writes there.
    pub(crate) fn edge(&self) -> PathBuf {
        self.root.join("edge")
    }
    /// Written by `serve` alone.
    pub(crate) fn edge_certificates(&self) -> PathBuf {
        self.root.join("ca/edge.sealed")
    }
}

impl EdgeArguments {
    /// The installation as clients see it; `bound` is the port an edge of this process has, if there is one.
    pub(crate) fn site(&self, bound: impl Into<Option<u16>>) -> Site {
        let listened = || self.https.addresses().first().map_or(443, SocketAddr::port);
        let https_port = self.public_port.or(bound.into()).unwrap_or_else(listened);
        Site { zone: self.zone.clone(), https_port }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_listener_is_a_port_an_address_or_off() {
        assert_eq!("8443".parse(), Ok(Listen::On("0.0.0.0:8443".parse().expect("address"))));
        assert_eq!("127.0.0.1:1".parse(), Ok(Listen::On("127.0.0.1:1".parse().expect("address"))));
        assert_eq!("off".parse(), Ok(Listen::Off));
        for bad in ["", "70000", "localhost:1", "1.2.3.4"] {
            assert!(bad.parse::<Listen>().is_err(), "{bad}");
        }
    }
}
