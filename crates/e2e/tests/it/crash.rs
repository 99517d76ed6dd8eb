//! SIGKILL at every step boundary and inside steps: everything converges, nothing is left, nothing is there twice.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TestApp, World, until};
use reqwest::Method;
use systemprompt_contract::paths;

const BOUNDARIES: [&str; 4] = ["before_intent", "after_intent", "after_act", "after_commit"];
const PROVISION: [&str; 6] = ["reserve", "secrets", "app", "database", "route", "ready"];
const DEPLOY: [&str; 6] = ["verify", "launch", "probe", "switch", "retire", "finish"];
const DELETE: [&str; 6] = ["settle", "stop", "destroy", "database", "images", "forget"];

fn points(workflow: &str, steps: &[&str]) -> Vec<String> {
    let each =
        steps.iter().flat_map(|step| BOUNDARIES.iter().map(move |boundary| format!("{workflow}.{step}.{boundary}")));
    each.collect()
}

/// Kills the control plane at every point in turn, each time finishing the work of the one before up to there.
async fn through(stack: &mut Stack, points: &[String], begin: impl AsyncFnOnce(&Stack)) -> anyhow::Result<()> {
    stack.terminate()?;
    let (first, rest) = points.split_first().context("points")?;
    stack.serve(&Start { crash_point: Some(first), ..Start::default() })?;
    // Its answer may die with the process: that it was taken is what the test is about.
    begin(stack).await;
    stack.wait_died().with_context(|| format!("at {first}"))?;
    for point in rest {
        stack.serve_unready(&Start { crash_point: Some(point), ..Start::default() })?;
        stack.wait_died().with_context(|| format!("at {point}"))?;
    }
    stack.serve(&Start::default())
}

#[tokio::test(flavor = "multi_thread")]
async fn provision_converges_from_every_boundary() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let mut points = points("provision_tenant", &PROVISION);
    let inside = points.iter().position(|point| point == "provision_tenant.database.after_act").context("point")?;
    points.insert(inside, "provision_tenant.database.after_create".to_owned());
    points.insert(inside, "provision_tenant.database.after_role".to_owned());
    let checkout = stack.order("crashing").await?;
    through(&mut stack, &points, async |stack| drop(stack.confirm(&checkout).await)).await?;
    let tenant = stack.bought(&checkout).await?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    settled(&stack, &[tenant.id], &[]).await?;
    stack.deploy(&tenant).await?;
    settled(&stack, &[tenant.id], &[tenant.id]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn deploy_converges_from_every_boundary() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("crashing").await?;
    stack.deploy(&tenant).await?;
    let second = TestApp { behaviour: "healthy", text: "second" }.push(&stack, &tenant).await?;
    let mut points = points("deploy_tenant", &DEPLOY);
    let inside = points.iter().position(|point| point == "deploy_tenant.launch.after_act").context("point")?;
    let launch = ["locked", "unpacking", "spawned", "ordered"].map(|at| format!("compute.launch.{at}"));
    points.splice(inside..inside, launch);
    through(&mut stack, &points, async |stack| {
        drop(second.submit(stack, &tenant).await);
    })
    .await?;
    stack.wait_status(&tenant, "running").await?;
    settled(&stack, &[tenant.id], &[tenant.id]).await?;
    until("the second release is served", async || {
        stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 200 && body == "second")
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn delete_converges_from_every_boundary() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("crashing").await?;
    stack.deploy(&tenant).await?;
    through(&mut stack, &points("delete_tenant", &DELETE), async |stack| {
        let path = format!("{}?purge=true", paths::tenant(tenant.id, ""));
        drop(stack.call(Method::DELETE, &path, None).await);
    })
    .await?;
    settled(&stack, &[], &[]).await?;
    let (status, _) = stack.get(&tenant, "/").await?;
    ensure!(status == 502, "{status}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_postgres_and_everything_else_loses_nothing() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("unlucky").await?;
    stack.deploy(&tenant).await?;
    stack.kill()?;
    stack.kill_clusters()?;
    stack.serve(&Start::default())?;
    until("the tenant answers again", async || stack.get(&tenant, "/").await.is_ok_and(|(status, _)| status == 200))
        .await?;
    settled(&stack, &[tenant.id], &[tenant.id]).await
}

/// The world as it must be, once what still runs has ended.
async fn settled(
    stack: &Stack,
    tenants: &[systemprompt_contract::TenantId],
    running: &[systemprompt_contract::TenantId],
) -> anyhow::Result<()> {
    let mut last = String::new();
    until("the world is as the rows say", async || {
        let checked = match World::look(stack).await {
            Ok(world) => world.check(tenants, running),
            Err(error) => Err(error),
        };
        last = checked.err().map(|error| format!("{error:#}")).unwrap_or_default();
        last.is_empty()
    })
    .await
    .with_context(|| format!("{last}\n{}", stack.log_tail()))
}

/// The way back is crashed too: an app that never gets healthy is unwound from every boundary of the undos.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_deploy_unwinds_from_every_boundary() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("crashing").await?;
    stack.deploy(&tenant).await?;
    let bad = TestApp { behaviour: "crash", text: "" }.push(&stack, &tenant).await?;
    let undos = ["launch", "verify"]
        .iter()
        .flat_map(|step| BOUNDARIES.iter().map(move |at| format!("deploy_tenant.{step}.undo_{at}")));
    let mut operation = Ok(String::new());
    through(&mut stack, &undos.collect::<Vec<_>>(), async |stack| operation = bad.submit(stack, &tenant).await).await?;
    let view = e2e::wait_over(&stack, &operation?).await?;
    ensure!(view["status"] == "failed" && view["error"]["code"] == "app_crashed", "{view}");
    stack.wait_status(&tenant, "running").await?;
    let (status, _) = stack.get(&tenant, "/").await?;
    ensure!(status == 200, "the old release still serves: {status}");
    settled(&stack, &[tenant.id], &[tenant.id]).await
}

/// The look at the world can fail, and what it finds is taken away: a database, an app that no row knows.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_row_knows_is_found_and_taken_away() -> anyhow::Result<()> {
    use sqlx::Executor as _;
    let stack = Stack::start().await?;
    World::look(&stack).await?.check(&[], &[])?;
    let mut cluster = e2e::connect(&stack, "tenants", "postgres").await?;
    cluster.execute("CREATE ROLE sp_0123456789ab").await?;
    cluster.execute("CREATE DATABASE sp_0123456789ab OWNER sp_0123456789ab").await?;
    let orphan = World::look(&stack).await?.check(&[], &[]);
    ensure!(orphan.is_err_and(|error| error.to_string().contains("sp_0123456789ab")), "the orphan is seen");
    settled(&stack, &[], &[]).await?;

    let tenant = stack.provision("known").await?;
    let apps = stack.data().join("compute/apps");
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(apps.join(tenant.id.slug().app_name().as_str()))
        .arg(apps.join("sp-0123456789ab"))
        .status()?;
    ensure!(copied.success() && World::look(&stack).await?.check(&[tenant.id], &[]).is_err(), "the orphan is seen");
    settled(&stack, &[tenant.id], &[]).await
}
