//! `GET /api/v1/health`, in the shape the platform and the existing dashboards read.

use crate::database::Database;
use axum::Json;
use chrono::{DateTime, SecondsFormat, Utc};
use http::StatusCode;
use serde::Serialize;
use std::{path::Path, time::Duration};
use tokio::time::Instant;

/// Below the probe's own timeout, so that a silent database is reported and not just missing.
const DATABASE_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Overall {
    Healthy,
    Degraded,
    Unhealthy,
}

#[derive(Debug, Serialize)]
pub(crate) struct Health {
    status: Overall,
    timestamp: String,
    version: &'static str,
    checks: Checks,
    memory: Memory,
    response_time_ms: u64,
}

#[derive(Debug, Serialize)]
struct Checks {
    database: DatabaseCheck,
    agents: Counted,
    mcp: Counted,
    static_content: StaticContent,
}

#[derive(Debug, Serialize)]
struct DatabaseCheck {
    status: Overall,
    latency_ms: u64,
    /// `current_database()`, as the server said it just now.
    name: Option<String>,
}

#[derive(Debug, Serialize)]
struct Counted {
    status: Overall,
    count: usize,
}

#[derive(Debug, Serialize)]
struct StaticContent {
    status: Overall,
    index_html: bool,
    sitemap_xml: bool,
}

#[derive(Debug, Serialize)]
struct Memory {
    /// Resident set; 0 where the kernel does not tell.
    resident_bytes: u64,
}

/// 200 while the database answers, 503 otherwise; a missing page only degrades.
pub(crate) async fn check(database: &Database, site: &Path) -> (StatusCode, Json<Health>) {
    let started = Instant::now();
    let name = match database.check(DATABASE_WITHIN).await {
        Ok(name) => Some(name),
        Err(error) => {
            let error = with_causes(&error);
            tracing::warn!(error, "the database does not answer");
            None
        }
    };
    let latency_ms = millis(started.elapsed());
    let static_content = static_content(site).await;
    let status = overall(name.is_some(), static_content.status);
    let health = Health {
        status,
        timestamp: timestamp(Utc::now()),
        version: env!("CARGO_PKG_VERSION"),
        checks: Checks {
            database: DatabaseCheck {
                status: if name.is_some() { Overall::Healthy } else { Overall::Unhealthy },
                latency_ms,
                name,
            },
            agents: Counted { status: Overall::Healthy, count: 0 },
            mcp: Counted { status: Overall::Healthy, count: 0 },
            static_content,
        },
        memory: Memory { resident_bytes: resident_bytes().unwrap_or(0) },
        response_time_ms: millis(started.elapsed()),
    };
    let code = if status == Overall::Unhealthy { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, Json(health))
}

fn overall(database_answers: bool, static_content: Overall) -> Overall {
    match (database_answers, static_content) {
        (false, _) => Overall::Unhealthy,
        (true, Overall::Healthy) => Overall::Healthy,
        (true, _) => Overall::Degraded,
    }
}

async fn static_content(site: &Path) -> StaticContent {
    let is_file = async |name: &str| tokio::fs::metadata(site.join(name)).await.is_ok_and(|meta| meta.is_file());
    let (index_html, sitemap_xml) = (is_file("index.html").await, is_file("sitemap.xml").await);
    let status = if index_html && sitemap_xml { Overall::Healthy } else { Overall::Degraded };
    StaticContent { status, index_html, sitemap_xml }
}

/// Second field of `/proc/self/statm`, in pages (proc(5)).
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split(' ').nth(1)?.parse().ok()?;
    Some(pages * u64::try_from(rustix::param::page_size()).ok()?)
}

pub(crate) fn timestamp(time: DateTime<Utc>) -> String {
    time.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string);
    causes.collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_database_makes_it_unhealthy() {
        assert_eq!(overall(true, Overall::Healthy), Overall::Healthy);
        assert_eq!(overall(true, Overall::Degraded), Overall::Degraded);
        assert_eq!(overall(false, Overall::Healthy), Overall::Unhealthy);
    }

    #[test]
    fn this_process_uses_memory() {
        assert!(resident_bytes().expect("Linux") > 100_000);
    }
}
