//! What an app has written reaches who reads it, over restarts and releases.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TenantRef, TestApp, until};
use futures_util::{StreamExt as _, stream::BoxStream};
use reqwest::Method;
use serde_json::Value;
use std::fs;
use systemprompt_contract::paths;

#[tokio::test(flavor = "multi_thread")]
async fn followed_lines_are_all_there_over_a_restart_and_a_release() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("followed").await?;
    TestApp { behaviour: "lines", text: "first" }.release(&stack, &tenant).await?;
    let mut lines = Lines::follow(&stack, &tenant, None).await?;
    let greeting = lines.next().await?;
    ensure!(greeting["message"] == "behaviour: lines", "{greeting}");
    let first = greeting["deployment_id"].as_str().context("deployment_id")?.to_owned();
    let _ = stack.get(&tenant, "/die").await;
    until("it answers again", async || stack.get(&tenant, "/").await.is_ok_and(|(status, _)| status == 200)).await?;
    let again = lines.next().await?;
    ensure!(again["message"] == "behaviour: lines" && again["deployment_id"] == *first, "{again}");

    // Replaced while it writes and nobody reads: what is behind is more than anything on the way holds.
    let (status, _) = stack.get(&tenant, "/write").await?;
    ensure!(status == 200, "{status}");
    let output = stack.data().join("compute/apps").join(tenant.id.slug().app_name().as_str());
    let output = output.join("instances").join(&first).join("output");
    let written = || fs::read_to_string(&output).map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
    until("it has written much", async || written().is_ok_and(|lines| lines.len() > 40_000)).await?;
    TestApp { behaviour: "healthy", text: "second" }.release(&stack, &tenant).await?;
    let written = written()?;

    let mut seen = vec![greeting, again];
    let after = loop {
        let line = lines.next().await?;
        if line["deployment_id"] != *first {
            break line;
        }
        seen.push(line);
    };
    ensure!(seen.iter().map(|line| &line["message"]).eq(&written), "{} of {} lines", seen.len(), written.len());
    ensure!(after["message"] == "behaviour: healthy", "from its beginning: {after}");

    // Who comes back goes on where it was, in the release before.
    let place = &seen[seen.len() - 3];
    let mut lines = Lines::follow(&stack, &tenant, place["cursor"].as_str()).await?;
    for expected in &seen[seen.len() - 2..] {
        let line = lines.next().await?;
        ensure!(line == *expected, "the same line, with its time: {line} {expected}");
    }
    let line = lines.next().await?;
    ensure!(line == after, "{line} {after}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_deploy_does_not_hide_the_lines_of_what_serves() -> anyhow::Result<()> {
    let stack = Stack::start_with(&Start { arguments: &["--healthy-within", "1"], ..Start::default() }).await?;
    let tenant = stack.provision("readable").await?;
    TestApp { behaviour: "mortal", text: "serves" }.release(&stack, &tenant).await?;
    let failed = TestApp { behaviour: "sick", text: "never" }.deploy(&stack, &tenant).await?;
    ensure!(failed["status"] == "failed", "{failed}");
    let read = async |query: &str| {
        let page = stack.call(Method::GET, &paths::tenant(tenant.id, &format!("/logs{query}")), None).await?;
        Ok::<_, anyhow::Error>(page["logs"][0]["message"].as_str().unwrap_or_default().to_owned())
    };
    ensure!(read("").await? == "behaviour: mortal");
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    let query = "SELECT id::text FROM deployments WHERE state = 'failed'";
    let sick: String = sqlx::query_scalar(query).fetch_one(&mut control).await?;
    ensure!(read(&format!("?deployment={sick}")).await? == "behaviour: sick");
    let other = stack.provision("other").await?;
    let stolen = stack.call(Method::GET, &paths::tenant(other.id, &format!("/logs?deployment={sick}")), None).await;
    ensure!(stolen.as_ref().is_err_and(|error| error.to_string().contains("not_found")), "{stolen:?}");
    Ok(())
}

/// A followed log, as a client without anything of ours reads it.
struct Lines {
    body: BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    buffer: Vec<u8>,
}

impl Lines {
    async fn follow(stack: &Stack, tenant: &TenantRef, after: Option<&str>) -> anyhow::Result<Self> {
        let url = format!("{}{}", stack.api_url(), paths::tenant(tenant.id, "/logs?follow=true"));
        let mut request = stack.client().get(url).bearer_auth(stack.token().expose());
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let body = request.send().await?.error_for_status()?.bytes_stream().boxed();
        Ok(Self { body, buffer: Vec::new() })
    }

    async fn next(&mut self) -> anyhow::Result<Value> {
        loop {
            while let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                if let Some(data) = line.strip_prefix(b"data:") {
                    return Ok(serde_json::from_slice(data)?);
                }
            }
            let more = tokio::time::timeout(e2e::PATIENCE, self.body.next()).await.context("no line came")?;
            self.buffer.extend_from_slice(&more.context("the stream ended")??);
        }
    }
}
