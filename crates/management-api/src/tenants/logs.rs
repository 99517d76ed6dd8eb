//! Instances' output: the last lines at once, or followed over restarts and releases.

use super::{
    follow::{KEEP_ALIVE, last_event_id},
    store::{self, Deployment, Tenant},
};
use crate::{
    app::App,
    http::error::{Failure, Query},
};
use axum::{
    Extension,
    extract::State,
    response::{IntoResponse as _, Response, sse},
};
use chrono::Utc;
use futures_util::StreamExt as _;
use http::HeaderMap;
use std::{convert::Infallible, time::Duration};
use systemprompt_compute::{InstanceHandle, InstanceState, LogEntry, LogStart};
use systemprompt_contract::{DeploymentId, ErrorCode, LogLine, LogPage, LogStream, TenantId};
use tokio::sync::mpsc;

const DEFAULT_LINES: usize = 100;
const MAX_LINES: usize = 10_000;
/// How long a follower waits for a line before it looks whether the instance's output is over.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogQuery {
    lines: Option<usize>,
    #[serde(default)]
    follow: bool,
    /// The deployment whose output to begin with; otherwise what is live.
    deployment: Option<DeploymentId>,
}

/// `lines` newest lines; with `follow`, an endless stream of `event: log`.
pub(super) async fn logs(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
    Query(query): Query<LogQuery>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let start = LogStart::Tail(query.lines.unwrap_or(DEFAULT_LINES).min(MAX_LINES));
    let mut first = match query.deployment {
        None => None,
        Some(id) => Some((Output::of(&app, tenant.id, id).await?.ok_or_else(|| unknown(id))?, start)),
    };
    if query.follow {
        if let Some((id, offset)) = last_event_id(&headers)?.and_then(parse_cursor)
            && let Some(output) = Output::of(&app, tenant.id, id).await?
        {
            first = Some((output, LogStart::After(offset)));
        }
        return Ok(follow(app, tenant.id, start, first));
    }
    let shown = match first {
        Some((output, _)) => Some(output),
        None => Output::shown(&app, tenant.id).await?,
    };
    let Some(Output { deployment, instance }) = shown else {
        return Ok(axum::Json(LogPage { logs: Vec::new() }).into_response());
    };
    let entries = app.infrastructure.driver.logs(&instance, start, false);
    let logs = entries.filter_map(|entry| async { entry.ok().map(|entry| line(deployment, entry)) }).collect().await;
    Ok(axum::Json(LogPage { logs }).into_response())
}

fn unknown(id: DeploymentId) -> Failure {
    Failure::new(ErrorCode::NotFound, format!("expected a deployment of this tenant that got an instance, got {id}"))
}

/// One task a follower; it ends with its client, since a closed channel ends it, or with this process.
fn follow(app: App, tenant: TenantId, start: LogStart, first: Option<(Output, LogStart)>) -> Response {
    let (sender, receiver) = mpsc::channel::<LogLine>(64);
    let stop = app.stop.clone();
    tokio::spawn(async move {
        let follower = Follower { app: &app, tenant, start, sender: &sender };
        tokio::select! {
            () = follower.run(first) => {}
            () = sender.closed() => {}
            () = app.stop.cancelled() => {}
        }
    });
    let lines = futures_util::stream::unfold(receiver, |mut receiver| async {
        let line = receiver.recv().await?;
        let event = sse::Event::default().id(line.cursor.clone()).event("log").json_data(&line);
        Some((Ok::<_, Infallible>(event.unwrap_or_default()), receiver))
    });
    let lines = lines.take_until(stop.cancelled_owned());
    sse::Sse::new(lines).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// Where a deployment's lines come from.
struct Output {
    deployment: DeploymentId,
    instance: InstanceHandle,
}

impl Output {
    fn new(row: Deployment) -> Option<Self> {
        Some(Self { deployment: row.id, instance: InstanceHandle::new(row.instance?) })
    }
    async fn of(app: &App, tenant: TenantId, id: DeploymentId) -> Result<Option<Self>, sqlx::Error> {
        Ok(store::deployment_of(app.db.pool(), tenant, id).await?.and_then(Self::new))
    }
    async fn shown(app: &App, tenant: TenantId) -> Result<Option<Self>, sqlx::Error> {
        Ok(store::shown_deployment(app.db.pool(), tenant).await?.and_then(Self::new))
    }
}

/// Copies the lines of one deployment after the other, each to its end.
struct Follower<'a> {
    app: &'a App,
    tenant: TenantId,
    /// Where to begin with the first, and with one that ran before it.
    start: LogStart,
    sender: &'a mpsc::Sender<LogLine>,
}

/// The client is gone.
struct Gone;

impl Follower<'_> {
    async fn run(&self, first: Option<(Output, LogStart)>) {
        let (mut output, mut start) = match first {
            Some(first) => first,
            None => (self.first().await, self.start),
        };
        while let Ok(next) = self.copy(&output, start).await {
            (output, start) = next;
        }
    }

    async fn first(&self) -> Output {
        loop {
            match Output::shown(self.app, self.tenant).await {
                Ok(Some(output)) => return output,
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "looking for an instance to follow; trying again"),
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Copies the lines of one deployment, over its restarts and whatever fails meanwhile, and returns what follows.
    async fn copy(&self, output: &Output, mut start: LogStart) -> Result<(Output, LogStart), Gone> {
        let driver = &self.app.infrastructure.driver;
        loop {
            let mut entries = driver.logs(&output.instance, start, true);
            loop {
                let quiet = match tokio::time::timeout(LOOK, entries.next()).await {
                    Ok(Some(Ok(entry))) => {
                        start = self.send(output, entry).await?;
                        continue;
                    }
                    Ok(Some(Err(error))) => {
                        tracing::debug!(instance = %output.instance, %error, "reading the output; trying again");
                        false
                    }
                    // Removed: whatever comes under this name is another file.
                    Ok(None) => {
                        start = LogStart::Beginning;
                        false
                    }
                    Err(_) => true,
                };
                match self.next(output).await {
                    Ok(Some(next)) => {
                        // What came since the last look, and a last line without its end.
                        let mut rest = driver.logs(&output.instance, start, false);
                        while let Some(Ok(entry)) = rest.next().await {
                            self.send(output, entry).await?;
                        }
                        return Ok(next);
                    }
                    Ok(None) => {}
                    Err(error) => {
                        tracing::warn!(error = format!("{error:#}"), "looking for the next release; trying again");
                    }
                }
                if !quiet {
                    tokio::time::sleep(LOOK).await;
                    break;
                }
            }
        }
    }

    /// What comes after an output that is over: nothing runs there, and it is not the live release, which will.
    async fn next(&self, output: &Output) -> anyhow::Result<Option<(Output, LogStart)>> {
        let pool = self.app.db.pool();
        let live = store::live_deployment(pool, self.tenant).await?.and_then(Output::new);
        if live.as_ref().is_some_and(|live| live.deployment == output.deployment) {
            return Ok(None);
        }
        let later = store::next_deployment(pool, self.tenant, output.deployment).await?.and_then(Output::new);
        let next = later.map(|later| (later, LogStart::Beginning)).or_else(|| Some((live?, self.start)));
        if next.is_none() {
            return Ok(None);
        }
        let state = self.app.infrastructure.driver.inspect(&output.instance).await?;
        let over = matches!(state, InstanceState::Exited { .. } | InstanceState::Absent);
        Ok(next.filter(|_| over))
    }

    async fn send(&self, output: &Output, entry: LogEntry) -> Result<LogStart, Gone> {
        let behind = LogStart::After(entry.cursor);
        self.sender.send(line(output.deployment, entry)).await.map_err(|_| Gone)?;
        Ok(behind)
    }
}

fn line(deployment_id: DeploymentId, entry: LogEntry) -> LogLine {
    LogLine {
        deployment_id,
        timestamp: entry.written.unwrap_or_else(Utc::now),
        stream: LogStream::Output,
        cursor: format!("{deployment_id}:{}", entry.cursor),
        message: entry.text,
    }
}

fn parse_cursor(text: &str) -> Option<(DeploymentId, u64)> {
    let (deployment, offset) = text.split_once(':')?;
    Some((deployment.parse().ok()?, offset.parse().ok()?))
}
