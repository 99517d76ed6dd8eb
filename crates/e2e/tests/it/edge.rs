//! Traffic never waits for the control plane.

use anyhow::{Context as _, ensure};
use e2e::{LoadClients, Stack, Start, TenantRef, TestApp, open_loop, until};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{net::TcpStream, task::JoinHandle};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_alone_serves_from_its_snapshot_with_everything_else_dead() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("survivor").await?;
    let app = TestApp { behaviour: "healthy", text: "alive" };
    app.release(&stack, &tenant).await?;
    stack.terminate()?;

    // The edge as a process of its own, following a control plane without one.
    stack.serve_edge()?;
    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    TestApp { behaviour: "healthy", text: "alive again" }.release(&stack, &tenant).await?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "alive again", "{status} {body}");

    stack.kill()?;
    stack.kill_clusters()?;
    stack.kill_edge()?;
    let id = fs::read_to_string(stack.data().join("compute/installation"))?;
    let metric = (0x1000_0000 + u32::from_str_radix(&id, 16)?).to_string();
    // As after a boot.
    ip(&["route", "del", "unreachable", "10.231.0.0/16", "metric", &metric]).await?;
    stack.serve_edge()?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "alive again", "from the snapshot: {status} {body}");
    let refused = ip(&["route", "show", "type", "unreachable"]).await?;
    ensure!(refused.contains(&metric), "what is meant for an instance that does not run may leave the machine");

    let (host, key) = (tenant.id.slug().to_string(), "PRIVATE KEY".to_owned());
    for (name, secret) in [("edge/snapshot.sealed", host), ("ca/edge.sealed", key)] {
        let path = stack.data().join(name);
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path)?.permissions()) & 0o777;
        ensure!(mode == 0o600, "{name}: {mode:o}");
        let sealed = fs::read(&path)?;
        ensure!(!sealed.windows(secret.len()).any(|bytes| bytes == secret.as_bytes()), "{name} shows {secret}");
    }
    Ok(())
}

async fn ip(arguments: &[&str]) -> anyhow::Result<String> {
    let output = tokio::process::Command::new("ip").args(arguments).output().await?;
    ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_of_the_control_plane_loses_no_line_and_no_request() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("writer").await?;
    let app = TestApp { behaviour: "lines", text: "writing" };
    app.release(&stack, &tenant).await?;
    stack.terminate()?;
    stack.serve_edge()?;
    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    let instance = instance_directory(&stack, &tenant)?;
    let before = sandbox(&instance)?;
    let (status, _) = stack.get(&tenant, "/write").await?;
    ensure!(status == 200, "{status}");
    stack.kill()?;
    let written = numbers(&instance)?.len();
    ensure!(written < LINES, "it was to be killed while the app writes");
    for _ in 0..50 {
        let (status, _) = stack.get(&tenant, "/").await?;
        ensure!(status == 200, "the app keeps answering: {status}");
    }
    until("it writes on with nobody there", async || numbers(&instance).is_ok_and(|now| now.len() > written)).await?;
    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    until("all lines are written", async || numbers(&instance).is_ok_and(|now| now.len() >= LINES)).await?;
    ensure!(numbers(&instance)?.into_iter().eq(0..LINES), "every line once and in order");
    // Found again, and not started anew.
    let id = tenant.id.to_string();
    let read = stack.cli(&tenant, &["--json", "cloud", "logs", "--tenant", &id, "-n", "1"]).await?.json()?;
    let last = read["data"]["logs"][0]["message"].as_str().and_then(number).context("the last line")?;
    ensure!(last == LINES - 1, "{read}");
    let after = sandbox(&instance)?;
    ensure!(before == after, "the same sandbox: {before:?}, {after:?}");
    let live = fs::read_link(format!("/proc/{}/ns/pid", after.pid))?;
    ensure!(live.as_os_str() == format!("pid:[{}]", after.pid_namespace).as_str(), "it runs: {live:?}");
    Ok(())
}

/// What the app writes.
const LINES: usize = 100_000;

/// The files of a tenant's only instance.
pub(crate) fn instance_directory(stack: &Stack, tenant: &TenantRef) -> anyhow::Result<PathBuf> {
    let instances = stack.data().join("compute/apps").join(tenant.id.slug().app_name().as_str()).join("instances");
    let found: Vec<_> = fs::read_dir(instances)?.collect::<Result<_, _>>()?;
    ensure!(found.len() == 1, "{found:?}");
    Ok(found[0].path())
}

/// The numbers of all whole lines of an instance's output file.
fn numbers(instance: &Path) -> anyhow::Result<Vec<usize>> {
    let output = fs::read_to_string(instance.join("output"))?;
    Ok(output.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(number).collect())
}

fn number(line: &str) -> Option<usize> {
    line.strip_prefix("line ")?.get(..6)?.parse().ok()
}

/// Init of an instance's sandbox, as bwrap wrote it.
#[derive(Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sandbox {
    #[serde(rename = "child-pid")]
    pid: u32,
    pid_namespace: u64,
}

/// The last sandbox that was started for an instance.
fn sandbox(instance: &Path) -> anyhow::Result<Sandbox> {
    let status = fs::read_to_string(instance.join("status"))?;
    status.lines().rev().find_map(|line| serde_json::from_str(line).ok()).with_context(|| status.clone())
}

/// A stream holds up the end of one release; meanwhile the edge shows that it lives, and the other tenant's old
/// instance goes only when its requests are answered.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_one_tenant_costs_the_other_no_request() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let (streaming, busy) = (stack.provision("streaming").await?, stack.provision("busy").await?);
    for tenant in [&streaming, &busy] {
        TestApp { behaviour: "healthy", text: "0" }.release(&stack, tenant).await?;
    }
    let stream = stack.client().get(format!("{}/hold", streaming.url)).send().await?.error_for_status()?;
    let stop = CancellationToken::new();
    let silence = tokio::spawn(longest_silence(e2e::connect(&stack, "control", "systemprompt").await?, stop.clone()));
    let slow: Vec<_> = (0..4).map(|_| keep_asking(&stack, &busy, stop.clone())).collect();
    let clients = LoadClients::new(&stack.ca_file(), &busy.url)?;
    let load = tokio::spawn(open_loop(clients, format!("{}/", busy.url), 50, stop.clone()));

    let held = TestApp { behaviour: "healthy", text: "1" }.push(&stack, &streaming).await?;
    let held = held.submit(&stack, &streaming).await?;
    until("the new release serves", async || stack.get(&streaming, "/").await.is_ok_and(|(_, body)| body == "1"))
        .await?;
    for text in ["1", "2"] {
        TestApp { behaviour: "healthy", text }.release(&stack, &busy).await?;
    }
    let view = e2e::wait_over(&stack, &held).await?;
    ensure!(view["status"] == "succeeded", "{view}");
    stop.cancel();
    drop(stream);
    let report = load.await?;
    ensure!(report.failed == 0 && report.sent > 100, "{report:?}");
    for answers in slow {
        let answers = answers.await??;
        ensure!(answers.len() > 1 && answers.iter().all(|(status, _)| *status == 200), "{answers:?}");
    }
    let silence = silence.await??;
    ensure!(silence < 8.0, "the edge gave no sign of life for {silence} s");
    Ok(())
}

/// Of the edge, in seconds.
async fn longest_silence(mut control: sqlx::PgConnection, stop: CancellationToken) -> anyhow::Result<f64> {
    let mut longest = 0.0_f64;
    while !stop.is_cancelled() {
        let query = "SELECT extract(epoch FROM now() - min(seen_at))::float8 FROM edges";
        let silence: Option<f64> = sqlx::query_scalar(query).fetch_one(&mut control).await?;
        longest = longest.max(silence.context("the edge stands in the database")?);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(longest)
}

/// Asks for `/slow` again and again, from when the edge listens. What it was answered.
fn keep_asking(
    stack: &Stack,
    tenant: &TenantRef,
    stop: CancellationToken,
) -> JoinHandle<anyhow::Result<Vec<(u16, String)>>> {
    let (client, url) = (stack.client().clone(), format!("{}/slow", tenant.url));
    tokio::spawn(async move {
        let mut answers = Vec::new();
        while !stop.is_cancelled() {
            match client.get(&url).send().await {
                Err(error) if error.is_connect() && answers.is_empty() => {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
                answer => {
                    let answer = answer?;
                    answers.push((answer.status().as_u16(), answer.text().await?));
                }
            }
        }
        Ok(answers)
    })
}

/// Killed right behind the switch and started when its edge is long taken for dead: the snapshot still names the old
/// instance, which must live until the edge has let go of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_behind_the_switch_costs_no_request() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("unlucky").await?;
    TestApp { behaviour: "healthy", text: "old" }.release(&stack, &tenant).await?;
    let new = TestApp { behaviour: "healthy", text: "new" }.push(&stack, &tenant).await?;
    let url = format!("{}{}", stack.api_url(), systemprompt_contract::paths::tenant(tenant.id, "/deploy"));
    stack.terminate()?;
    let snapshot = stack.data().join("edge/snapshot.sealed");
    let old_snapshot = fs::read(&snapshot)?;
    stack.serve(&Start { crash_point: Some("deploy_tenant.switch.after_commit"), ..Start::default() })?;
    let body = serde_json::json!({ "image": new.image, "digest": new.digest });
    // The answer may die with the process.
    drop(stack.client().post(url).bearer_auth(stack.token().expose()).json(&body).send().await);
    stack.wait_died()?;
    fs::write(&snapshot, old_snapshot)?;
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    sqlx::query("UPDATE edges SET seen_at = now() - interval '1 hour'").execute(&mut control).await?;

    let stop = CancellationToken::new();
    let slow: Vec<_> = (0..4).map(|_| keep_asking(&stack, &tenant, stop.clone())).collect();
    stack.serve(&Start::default())?;
    stack.wait_status(&tenant, "running").await?;
    stop.cancel();
    let mut all = Vec::new();
    for answers in slow {
        all.extend(answers.await??);
    }
    ensure!(all.iter().all(|(status, _)| *status == 200), "{all:?}");
    ensure!(all.iter().any(|(_, body)| body == "old"), "the old instance was asked: {all:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edge_signs_off_when_it_has_drained_and_not_before() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("streaming").await?;
    TestApp { behaviour: "healthy", text: "0" }.release(&stack, &tenant).await?;
    stack.terminate()?;
    stack.serve_edge()?;
    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    let stream = stack.client().get(format!("{}/hold", tenant.url)).send().await?.error_for_status()?;
    let mut signs = async || {
        let signs: Result<Vec<String>, _> =
            sqlx::query_scalar("SELECT seen_at::text FROM edges").fetch_all(&mut control).await;
        signs.unwrap_or_default()
    };
    until("the edge stands in the database", async || signs().await.len() == 1).await?;

    stack.tell_edge_to_stop()?;
    let address = ("127.0.0.1", stack.https_port());
    until("the edge takes no more connections", async || TcpStream::connect(address).await.is_err()).await?;
    let before = signs().await;
    until("the draining edge gives a sign of life", async || {
        let now = signs().await;
        now.len() == 1 && now != before
    })
    .await?;
    drop(stream);
    stack.terminate_edge()?;
    ensure!(signs().await.is_empty(), "it has signed off");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_stops_an_edge_alone_and_no_control_plane() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("damaged").await?;
    TestApp { behaviour: "healthy", text: "found" }.release(&stack, &tenant).await?;
    stack.terminate()?;
    let snapshot = stack.data().join("edge/snapshot.sealed");
    fs::write(&snapshot, "damaged")?;
    let error = stack.serve_edge().expect_err("an edge alone has nothing else");
    ensure!(error.to_string().contains("snapshot.sealed"), "{error}");
    stack.kill_edge()?;
    stack.serve(&Start::default())?;
    until("the routes come from the database", async || {
        stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 200 && body == "found")
    })
    .await?;
    until("the snapshot is written anew", async || fs::read(&snapshot).is_ok_and(|sealed| sealed != b"damaged")).await
}
