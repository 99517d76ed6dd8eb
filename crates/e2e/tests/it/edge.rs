//! Traffic never waits for the control plane.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TenantRef, TestApp, until};
use std::{
    fs,
    path::{Path, PathBuf},
};

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
    stack.serve_edge()?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "alive again", "from the snapshot: {status} {body}");

    let snapshot = stack.data().join("edge/snapshot.sealed");
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&snapshot)?.permissions()) & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    let sealed = fs::read(&snapshot)?;
    ensure!(!sealed.windows(11).any(|bytes| bytes == b"PRIVATE KEY"), "the key is sealed");
    Ok(())
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
fn instance_directory(stack: &Stack, tenant: &TenantRef) -> anyhow::Result<PathBuf> {
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
