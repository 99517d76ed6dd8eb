//! Load for `cargo xtask bench`, in a process of its own so that its CPU is nobody else's.
//!
//! `load open-loop URL CA_FILE PER_SECOND`: requests on a fixed schedule until standard input ends, then one JSON
//! report. `load watch URL CA_FILE`: for each status on a line of standard input asks until the answer has it, then
//! prints when that answer came, in microseconds since the epoch.

#![allow(clippy::print_stdout, reason = "standard output is its result")]

use anyhow::{Context as _, bail, ensure};
use e2e::LoadClients;
use std::{
    io::Read as _,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};
use systemprompt_cloud::{HttpOptions, http_client};
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_secs(10);

fn main() -> anyhow::Result<()> {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        bail!("a TLS provider was installed before");
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match arguments[..] {
        ["open-loop", url, ca_file, per_second] => {
            let per_second = per_second.parse().context("PER_SECOND is a number")?;
            ensure!(per_second > 0, "PER_SECOND is at least 1");
            runtime.block_on(open_loop(LoadClients::new(Path::new(ca_file), url)?, url, per_second))
        }
        ["watch", url, ca_file] => runtime.block_on(watch(&client(ca_file)?, url)),
        _ => bail!("expected `open-loop URL CA_FILE PER_SECOND` or `watch URL CA_FILE`"),
    }
}

fn client(ca_file: &str) -> anyhow::Result<reqwest::Client> {
    Ok(http_client(&HttpOptions { ca_file: Some(PathBuf::from(ca_file)) })?)
}

async fn open_loop(clients: LoadClients, url: &str, per_second: u32) -> anyhow::Result<()> {
    let stop = CancellationToken::new();
    let ended = stop.clone();
    std::thread::spawn(move || {
        // Whatever ends it, also an error: nobody steers us any more.
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        ended.cancel();
    });
    let report = e2e::open_loop(clients, url.to_owned(), per_second, stop).await;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

async fn watch(client: &reqwest::Client, url: &str) -> anyhow::Result<()> {
    for line in std::io::stdin().lines() {
        let wanted: u16 = line?.trim().parse().context("expected a status")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let answer = client.get(url).timeout(PATIENCE).send().await?;
            let status = answer.status().as_u16();
            answer.bytes().await?;
            if status == wanted {
                break;
            }
            ensure!(Instant::now() < deadline, "{url} still answers {status}, not {wanted}");
        }
        println!("{}", SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_micros());
    }
    Ok(())
}
