//! Starts that fail or are interrupted, and what they leave.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TestApp, until};
use std::{fs, process::Command};
use systemprompt_contract::paths;

const STOP: Start<'_> = Start { crash_point: None, skip: None, without_edge: false, arguments: &["--on-stop", "stop"] };

/// What a start that fails has to say.
fn failing(stack: &mut Stack) -> anyhow::Result<String> {
    let error = stack.serve(&STOP).err().context("expected the start to fail")?;
    stack.wait_failed()?;
    Ok(error.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_is_told_to_stop_stops_what_it_started() -> anyhow::Result<()> {
    let mut stack = Stack::prepare()?;
    stack.serve_unready(&STOP)?;
    until("the first cluster comes up", async || stack.cluster_runs("control") || stack.cluster_runs("tenants"))
        .await?;
    stack.terminate()?;
    ensure!(!stack.cluster_runs("control") && !stack.cluster_runs("tenants"), "a cluster still runs");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_came_up_without_the_other_is_stopped() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    stack.terminate()?;
    stack.kill_clusters()?;
    let version = stack.data().join("postgres/tenants/PG_VERSION");
    let good = fs::read(&version)?;
    fs::write(&version, "9\n")?;
    let error = failing(&mut stack);
    let runs = stack.cluster_runs("control");
    fs::write(&version, good)?;
    let error = error?;
    ensure!(error.contains("tenants") && !runs, "the control cluster runs: {runs}; {error}");
    Ok(())
}

/// Instances that an earlier control plane left are adopted by one that then fails to start.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_start_stops_adopted_instances_before_their_cluster() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("adopted").await?;
    TestApp { behaviour: "healthy", text: "adopted" }.release(&stack, &tenant).await?;
    stack.terminate()?;
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    ensure!(e2e::app_processes(stack.https_port())?.len() == 1, "the instance was left running");
    // Fails behind the driver: migrations are not what was applied.
    sqlx::query("UPDATE _sqlx_migrations SET checksum = ''").execute(&mut control).await?;
    let error = failing(&mut stack)?;
    ensure!(error.contains("migration"), "{error}");
    ensure!(e2e::app_processes(stack.https_port())?.is_empty(), "the instance was left without its database");
    ensure!(!stack.cluster_runs("control") && !stack.cluster_runs("tenants"), "a cluster still runs");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_stop_instances_leaves_them_their_database() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("left").await?;
    stack.deploy(&tenant).await?;
    stack.terminate()?;
    // A mount namespace of its own, in which there is no bubblewrap.
    let script = format!(
        "mount --bind /dev/null /usr/bin/bwrap && exec {} serve --data {} --https 127.0.0.1:0 --http off --on-stop stop",
        e2e::program("management-api")?.display(),
        stack.data().display()
    );
    let output = Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && error.contains("management-api stop --data"), "{error}");
    stack.serve(&Start::default())?;
    let mut last = String::new();
    until("the same instance reaches its database", async || {
        let health = stack.get(&tenant, paths::HEALTH).await;
        last = format!("{health:?}");
        health.is_ok_and(|(status, _)| status == 200)
    })
    .await
    .context(last)
}

/// What was sealed with it cannot be opened with another.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_master_key_is_said_and_not_replaced() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    stack.terminate()?;
    let (key, away) = (stack.data().join("keys/seal.key"), stack.data().join("keys/away"));
    fs::rename(&key, &away)?;
    let error = failing(&mut stack);
    ensure!(!key.exists(), "a new key was made");
    fs::rename(&away, &key)?;
    let error = error?;
    ensure!(error.contains("seal.key: put the file back"), "{error}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_beside_a_stopped_cloud_leaves_no_server() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    stack.create_member("early@systemprompt.localhost")?;
    ensure!(stack.cluster_runs("control"), "a running cloud keeps its server");
    stack.terminate()?;
    stack.stop_what_is_left()?;
    stack.create_member("late@systemprompt.localhost")?;
    ensure!(!stack.cluster_runs("control"), "the server still runs");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_in_clear_is_for_this_machine_only() -> anyhow::Result<()> {
    let mut stack = Stack::prepare()?;
    let arguments = &["--http-api", "0.0.0.0:0", "--on-stop", "stop"];
    let error = stack.serve(&Start { arguments, ..Start::default() }).err().context("expected the start to fail")?;
    stack.wait_failed()?;
    ensure!(error.to_string().contains("takes a loopback address such as 127.0.0.1:8090, not 0.0.0.0:0"), "{error}");
    Ok(())
}
