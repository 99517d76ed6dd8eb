//! An open-loop generator: requests go out on a fixed schedule, whatever the answers do, so that a stall counts.

use anyhow::Context as _;
use reqwest::Method;
use serde::Serialize;
use std::{net::SocketAddr, path::Path, time::Duration};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

/// What became of the requests.
#[derive(Debug, Clone, Default, Serialize)]
pub struct LoadReport {
    /// Requests that went out.
    pub sent: u64,
    /// Pages other than 200, answers to a POST that are not the app's, errors, and what took over five seconds.
    pub failed: u64,
    /// The first few failures, in words.
    pub failures: Vec<String>,
    /// Latency from the intended start, microseconds.
    pub p50_us: u64,
    /// Latency from the intended start, microseconds.
    pub p99_us: u64,
}

const TIMEOUT: Duration = Duration::from_secs(5);

/// How many bytes a POST brings along.
const BODY: usize = 16 * 1024;

/// The two ways to the same place. Neither tries anything again by itself: what a person sees fail has to count.
pub struct LoadClients {
    /// Keeps its connections; over HTTP/2 that is one, and so one worker of the edge.
    kept: reqwest::Client,
    /// Connects anew for every request, over HTTP/1.1: meets every worker.
    fresh: reqwest::Client,
}

impl LoadClients {
    /// Clients that trust the authorities in `ca_file` only, and know that the host of `url` is this machine.
    ///
    /// # Errors
    /// When the file cannot be read or `url` names no host.
    pub fn new(ca_file: &Path, url: &str) -> anyhow::Result<Self> {
        let authorities = reqwest::Certificate::from_pem_bundle(&std::fs::read(ca_file)?)?;
        let url: reqwest::Url = url.parse()?;
        let host = url.host_str().context("the URL names a host")?;
        let builder = || {
            reqwest::Client::builder()
                .no_proxy()
                .tls_certs_only(authorities.clone())
                .resolve(host, SocketAddr::from(([127, 0, 0, 1], 0)))
                .retry(reqwest::retry::never())
        };
        Ok(Self { kept: builder().build()?, fresh: builder().http1_only().pool_max_idle_per_host(0).build()? })
    }

    /// Every other request on a fresh connection, and of each sort one in four with a body.
    fn request(&self, number: u64, url: &str) -> reqwest::RequestBuilder {
        let client = if number.is_multiple_of(2) { &self.kept } else { &self.fresh };
        let request = if number % 8 < 2 { client.post(url).body(vec![b'x'; BODY]) } else { client.get(url) };
        request.timeout(TIMEOUT)
    }
}

/// A GET has to bring the page; what a POST means is the app's business, but the app has to answer it.
fn judge(method: &Method, answer: &reqwest::Response) -> Result<(), String> {
    let error = answer.headers().get("x-systemprompt-error");
    let status = answer.status();
    let good = if *method == Method::GET { status == 200 } else { error.is_none() && !status.is_server_error() };
    if good { Ok(()) } else { Err(format!("{method} {status} {error:?}")) }
}

/// Sends `per_second` requests a second to `url` until `stop`, then waits for the last answers.
pub async fn open_loop(clients: LoadClients, url: String, per_second: u32, stop: CancellationToken) -> LoadReport {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut flying = JoinSet::new();
    let mut report = LoadReport::default();
    let mut latencies = Vec::new();
    loop {
        tokio::select! {
            intended = ticks.tick() => {
                let request = clients.request(report.sent, &url);
                report.sent += 1;
                flying.spawn(async move { (exchange(request).await, Instant::now().duration_since(intended)) });
            }
            Some(done) = flying.join_next(), if !flying.is_empty() => count(&mut report, &mut latencies, done),
            () = stop.cancelled() => break,
        }
    }
    while let Some(done) = flying.join_next().await {
        count(&mut report, &mut latencies, done);
    }
    latencies.sort_unstable();
    report.p50_us = percentile(&latencies, 50);
    report.p99_us = percentile(&latencies, 99);
    report
}

async fn exchange(request: reqwest::RequestBuilder) -> Result<(), String> {
    let (client, request) = request.build_split();
    let request = request.map_err(|error| format!("{error:?}"))?;
    let method = request.method().clone();
    let answer = client.execute(request).await.map_err(|error| format!("{method} {error:?}"))?;
    judge(&method, &answer)?;
    answer.bytes().await.map(drop).map_err(|error| format!("{method} {error:?}"))
}

type Done = Result<(Result<(), String>, Duration), tokio::task::JoinError>;

fn count(report: &mut LoadReport, latencies: &mut Vec<u64>, done: Done) {
    let (outcome, latency) = done.unwrap_or_else(|error| (Err(error.to_string()), TIMEOUT));
    if let Err(failure) = outcome {
        report.failed += 1;
        if report.failures.len() < 10 {
            report.failures.push(failure);
        }
    }
    latencies.push(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX));
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get(sorted.len().saturating_mul(percent) / 100).or(sorted.last()).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #[test]
    fn percentiles_of_little() {
        assert_eq!(super::percentile(&[], 99), 0);
        assert_eq!(super::percentile(&[7], 99), 7);
        assert_eq!(super::percentile(&(0..100).collect::<Vec<_>>(), 50), 50);
    }
}
