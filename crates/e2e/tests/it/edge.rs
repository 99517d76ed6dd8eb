//! Traffic never waits for the control plane.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TestApp, until};

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
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&snapshot)?.permissions()) & 0o777;
    ensure!(mode == 0o600, "{mode:o}");
    let sealed = std::fs::read(&snapshot)?;
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
    let (status, _) = stack.get(&tenant, "/write").await?;
    ensure!(status == 200, "{status}");
    stack.kill()?;
    for _ in 0..50 {
        let (status, _) = stack.get(&tenant, "/").await?;
        ensure!(status == 200, "the app keeps answering: {status}");
    }
    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    // Found again, and every line is there.
    let id = tenant.id.to_string();
    let mut numbers = Vec::new();
    until("all lines are written", async || {
        let output = stack.cli(&tenant, &["--json", "cloud", "logs", "--tenant", &id, "-n", "10000"]).await;
        let Ok(output) = output else { return false };
        let Ok(json) = output.json() else { return false };
        let lines = json["data"]["logs"].as_array().cloned().unwrap_or_default();
        let number =
            |line: &serde_json::Value| line["message"].as_str()?.strip_prefix("line ")?.get(..6)?.parse::<u32>().ok();
        numbers = lines.iter().filter_map(number).collect();
        numbers.last() == Some(&99_999)
    })
    .await
    .with_context(|| format!("{} lines, last {:?}", numbers.len(), numbers.last()))?;
    ensure!(numbers.len() >= 9_999, "{}", numbers.len());
    ensure!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "no line is lost");
    Ok(())
}
