//! An edge with a fixed table, for measurements:
//!
//! ```text
//! static_edge --https 127.0.0.1:9443 --workers 2 --cert chain.pem --key key.pem --zone bench.localhost \
//!             --upstream 127.0.0.1:9080 [--tenants 100000]
//! ```
//!
//! Every tenant `{n as 12 hex digits}.{zone}` leads to the one upstream. Prints the address it listens on
//! and serves until SIGINT or SIGTERM.
#![allow(clippy::print_stdout, reason = "the address is the output")]

use std::{collections::HashMap, env, error::Error, fs, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};
use systemprompt_contract::{Secret, TenantSlug, Zone};
use systemprompt_edge::{CertTable, Certificate, Edge, EdgeConfig, Limits, Route, RouteTable, Upstream};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let options = Options::parse(env::args().skip(1))?;
    let zone: Zone = options.get("zone")?.parse()?;
    let certificate = Certificate {
        hosts: vec![format!("*.{zone}").parse()?, zone.as_str().parse()?],
        chain_pem: fs::read_to_string(options.get("cert")?)?,
        key_pem: Secret::new(fs::read_to_string(options.get("key")?)?),
    };
    let upstream = Upstream::Tcp(options.get("upstream")?.parse()?);
    let tenants: u64 = options.get("tenants").unwrap_or("1").parse()?;
    let routes = (0..tenants).map(|number| {
        let slug: TenantSlug = format!("{number:012x}").parse().expect("twelve hex digits");
        (slug.hostname(&zone), Some(Route::Tenant { slug, upstream: upstream.clone() }))
    });
    let (_routes, routes_feed) = watch::channel(Arc::new(RouteTable::new().apply(1, routes)));
    let (_certs, certs_feed) = watch::channel(Arc::new(CertTable::new(vec![certificate])?));
    let https: SocketAddr = options.get("https")?.parse()?;
    let config = EdgeConfig {
        https: vec![https],
        http: Vec::new(),
        public_https_port: 0,
        zone,
        workers: options.get("workers").unwrap_or("2").parse()?,
        platform: upstream.clone(),
        drain: Duration::from_secs(5),
        hold: Duration::from_secs(5),
        limits: Limits::default(),
    };
    let edge = Edge::new(config, routes_feed, certs_feed).bind().await?;
    println!("{}", edge.https_addr());
    let stop = CancellationToken::new();
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stopper = stop.clone();
    tokio::spawn(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        stopper.cancel();
    });
    let report = edge.serve(stop).await;
    println!("finished {} cut {}", report.finished, report.cut);
    Ok(())
}

/// `--name value` pairs.
struct Options(HashMap<String, String>);

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut options = HashMap::new();
        while let Some(name) = arguments.next() {
            let name = name.strip_prefix("--").ok_or_else(|| format!("expected --name, got {name}"))?.to_owned();
            let value = arguments.next().ok_or_else(|| format!("expected a value after --{name}"))?;
            options.insert(name, value);
        }
        Ok(Self(options))
    }

    fn get(&self, name: &str) -> Result<&str, String> {
        self.0.get(name).map(String::as_str).ok_or_else(|| format!("--{name} is missing"))
    }
}
