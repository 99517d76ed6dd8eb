//! An open-loop generator: requests go out on a fixed schedule, whatever the answers do, so that a stall counts.

use serde::Serialize;
use std::time::Duration;
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
    /// Answers other than 200, errors, and answers that took over five seconds.
    pub failed: u64,
    /// The first few failures, in words.
    pub failures: Vec<String>,
    /// Latency from the intended start, microseconds.
    pub p50_us: u64,
    /// Latency from the intended start, microseconds.
    pub p99_us: u64,
}

const TIMEOUT: Duration = Duration::from_secs(5);

/// Sends `per_second` requests a second to `url` until `stop`, then waits for the last answers.
pub async fn open_loop(client: reqwest::Client, url: String, per_second: u32, stop: CancellationToken) -> LoadReport {
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / per_second);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut flying = JoinSet::new();
    let mut report = LoadReport::default();
    let mut latencies = Vec::new();
    loop {
        tokio::select! {
            intended = ticks.tick() => {
                let request = client.get(&url).timeout(TIMEOUT);
                report.sent += 1;
                flying.spawn(async move {
                    let outcome = match request.send().await {
                        Ok(answer) if answer.status() == 200 => answer.bytes().await.map(drop).map_err(|error| format!("{error:?}")),
                        Ok(answer) => Err(format!("{} {:?}", answer.status(), answer.headers().get("x-systemprompt-error"))),
                        Err(error) => Err(format!("{error:?}")),
                    };
                    (outcome, Instant::now().duration_since(intended))
                });
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
