//! An instance's output: the last lines at once, or followed over releases.

use super::{
    follow::{KEEP_ALIVE, last_event_id},
    store::{self, Tenant},
};
use crate::{app::App, http::error::Failure};
use axum::{
    Extension,
    extract::{Query, State, rejection::QueryRejection},
    response::{IntoResponse as _, Response, sse},
};
use chrono::Utc;
use futures_util::StreamExt as _;
use http::HeaderMap;
use std::{convert::Infallible, time::Duration};
use systemprompt_compute::{InstanceHandle, LogEntry, LogStart};
use systemprompt_contract::{DeploymentId, LogLine, LogPage, LogStream, TenantId};
use tokio::sync::mpsc;

const DEFAULT_LINES: usize = 100;
const MAX_LINES: usize = 10_000;
/// How often a follower looks whether another release took over.
const RELEASE_POLL: Duration = Duration::from_secs(1);

#[derive(Debug, serde::Deserialize)]
pub(super) struct LogQuery {
    lines: Option<usize>,
    #[serde(default)]
    follow: bool,
}

/// `lines` newest lines of the newest instance; with `follow`, an endless stream of `event: log`.
pub(super) async fn logs(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
    query: Result<Query<LogQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let Query(query) = query?;
    let start = LogStart::Tail(query.lines.unwrap_or(DEFAULT_LINES).min(MAX_LINES));
    if query.follow {
        let resume = last_event_id(&headers)?.and_then(parse_cursor);
        return Ok(follow(app, tenant.id, start, resume));
    }
    let Some((deployment, instance)) = newest_instance(&app, tenant.id).await? else {
        return Ok(axum::Json(LogPage { logs: Vec::new() }).into_response());
    };
    let entries = app.infrastructure.driver.logs(&instance, start, false);
    let logs = entries.filter_map(|entry| async { entry.ok().map(|entry| line(deployment, entry)) }).collect().await;
    Ok(axum::Json(LogPage { logs }).into_response())
}

/// One task a follower; it ends with its client, since a closed channel ends it, or with this process.
fn follow(app: App, tenant: TenantId, start: LogStart, resume: Option<(DeploymentId, u64)>) -> Response {
    let (sender, receiver) = mpsc::channel::<LogLine>(64);
    let stop = app.stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            () = copy_releases(&app, tenant, start, resume, &sender) => {}
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

/// Copies the newest instance's lines, and those of every one that takes over from it.
async fn copy_releases(
    app: &App,
    tenant: TenantId,
    mut start: LogStart,
    resume: Option<(DeploymentId, u64)>,
    sender: &mpsc::Sender<LogLine>,
) {
    let mut shown = None;
    loop {
        let newest = newest_instance(app, tenant).await.ok().flatten();
        if let Some((deployment, instance)) = newest.filter(|(deployment, _)| shown != Some(*deployment)) {
            if let Some((_, offset)) = resume.filter(|(id, _)| *id == deployment && shown.is_none()) {
                start = LogStart::After(offset);
            }
            shown = Some(deployment);
            let taken_over = wait_for_another(app, tenant, deployment);
            tokio::select! {
                () = copy(app, deployment, &instance, start, sender) => {}
                () = taken_over => {}
            }
            start = LogStart::Beginning;
        }
        tokio::time::sleep(RELEASE_POLL).await;
    }
}

async fn copy(
    app: &App,
    deployment: DeploymentId,
    instance: &InstanceHandle,
    start: LogStart,
    sender: &mpsc::Sender<LogLine>,
) {
    let mut entries = app.infrastructure.driver.logs(instance, start, true);
    while let Some(Ok(entry)) = entries.next().await {
        if sender.send(line(deployment, entry)).await.is_err() {
            return;
        }
    }
}

async fn wait_for_another(app: &App, tenant: TenantId, shown: DeploymentId) {
    loop {
        tokio::time::sleep(RELEASE_POLL).await;
        if let Ok(Some((newest, _))) = newest_instance(app, tenant).await
            && newest != shown
        {
            return;
        }
    }
}

async fn newest_instance(app: &App, tenant: TenantId) -> Result<Option<(DeploymentId, InstanceHandle)>, sqlx::Error> {
    let newest = store::newest_deployment(app.db.pool(), tenant).await?;
    Ok(newest.and_then(|row| Some((row.id, InstanceHandle::new(row.instance?)))))
}

fn line(deployment_id: DeploymentId, entry: LogEntry) -> LogLine {
    LogLine {
        deployment_id,
        timestamp: Utc::now(),
        stream: LogStream::Output,
        cursor: format!("{deployment_id}:{}", entry.cursor),
        message: entry.text,
    }
}

fn parse_cursor(text: &str) -> Option<(DeploymentId, u64)> {
    let (deployment, offset) = text.split_once(':')?;
    Some((deployment.parse().ok()?, offset.parse().ok()?))
}
