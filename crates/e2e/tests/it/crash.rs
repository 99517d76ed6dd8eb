//! SIGKILL at every step boundary and inside steps: everything converges, nothing is left, nothing is there twice.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TenantRef, TestApp, World, until};
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
async fn through(
    stack: &mut Stack,
    points: &[String],
    begin: impl AsyncFnOnce(&Stack) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    stack.terminate()?;
    let (first, rest) = points.split_first().context("points")?;
    stack.serve(&Start { crash_point: Some(first), ..Start::default() })?;
    begin(stack).await.with_context(|| format!("before {first}"))?;
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
    let mut bought: Option<TenantRef> = None;
    through(&mut stack, &points, async |stack| {
        bought = Some(stack.buy("crashing").await?);
        Ok(())
    })
    .await?;
    let tenant = bought.context("bought")?;
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
    through(&mut stack, &points("deploy_tenant", &DEPLOY), async |stack| second.submit(stack, &tenant).await.map(drop))
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
        stack.call(Method::DELETE, &format!("{}?purge=true", paths::tenant(tenant.id, "")), None).await.map(drop)
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
    let mut operation = String::new();
    through(&mut stack, &undos.collect::<Vec<_>>(), async |stack| {
        operation = bad.submit(stack, &tenant).await?;
        Ok(())
    })
    .await?;
    let view = e2e::wait_over(&stack, &operation).await?;
    ensure!(view["status"] == "failed" && view["error"]["code"] == "app_crashed", "{view}");
    stack.wait_status(&tenant, "running").await?;
    let (status, _) = stack.get(&tenant, "/").await?;
    ensure!(status == 200, "the old release still serves: {status}");
    settled(&stack, &[tenant.id], &[tenant.id]).await
}
