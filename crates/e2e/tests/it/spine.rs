//! From a checkout to a page over HTTPS, and back to nothing.

use anyhow::{Context as _, ensure};
use e2e::{LoadClients, Stack, Start, TestApp, World, open_loop, until};
use reqwest::Method;
use std::fs;
use systemprompt_contract::paths;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_is_bought_deployed_changed_and_deleted() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("hello").await?;

    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 503 && body.contains("awaiting_deploy"), "before the first deploy: {status} {body}");
    World::look(&stack).await?.check(&[tenant.id], &[])?;

    let deployed = stack.deploy(&tenant).await?;
    ensure!(deployed["data"]["status"] == "running", "{deployed}");
    let (status, page) = stack.get(&tenant, "/").await?;
    let source = fs::read_to_string(tenant.project.join("web/dist/index.html"))?;
    ensure!(status == 200 && page == source, "the page is the example's: {status}");
    let (status, health) = stack.get(&tenant, paths::HEALTH).await?;
    let health: serde_json::Value = serde_json::from_str(&health)?;
    let database = tenant.id.slug().database().to_string();
    ensure!(status == 200 && health["checks"]["database"]["name"] == database, "its own database: {health}");
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])?;

    // A second start finds everything as it was, with the instances stopped or still running.
    stack.terminate()?;
    stack.serve(&Start::default())?;
    until("the tenant answers after a restart", async || {
        stack.get(&tenant, "/").await.is_ok_and(|(status, _)| status == 200)
    })
    .await?;
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])?;

    fs::write(tenant.project.join("web/dist/index.html"), format!("{source}<!-- changed -->"))?;
    stack.deploy(&tenant).await?;
    let (_, page) = stack.get(&tenant, "/").await?;
    ensure!(page.ends_with("<!-- changed -->"), "the changed page is served");
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])?;

    let id = tenant.id.to_string();
    let deleted = stack.cli(&tenant, &["--json", "cloud", "tenant", "delete", &id, "--yes", "--purge"]).await?;
    ensure!(deleted.ok, "{deleted:?}");
    until("the deleted tenant is unknown", async || {
        stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 502 && body.contains("tenant_not_found"))
    })
    .await?;
    until("nothing is left", async || match World::look(&stack).await {
        Ok(world) => world.check(&[], &[]).is_ok(),
        Err(_) => false,
    })
    .await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_duplicate_confirmation_provisions_once() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let request = serde_json::json!({ "price_id": "pri_standard", "region": "lhr", "name": "twice" });
    let created = stack.call(Method::POST, paths::CHECKOUT, Some(&request)).await?;
    let checkout = created["checkout_session_id"].as_str().context("id")?;
    let path = format!("{}/{checkout}/confirm", paths::CHECKOUT);
    let confirmations = futures_util::future::join_all((0..20).map(|_| stack.call(Method::POST, &path, None))).await;
    let mut tenants: Vec<String> = Vec::new();
    for confirmation in confirmations {
        tenants.push(confirmation?["data"]["tenant_id"].as_str().context("tenant")?.to_owned());
    }
    tenants.dedup();
    ensure!(tenants.len() == 1, "one tenant, got {tenants:?}");
    let tenant = stack.tenant(tenants[0].parse()?)?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    World::look(&stack).await?.check(&[tenant.id], &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_subscriber_reads_every_event_once_and_in_order() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let checkout = stack.order("events").await?;
    stack.confirm(&checkout).await?;
    let tenant = stack.bought(&checkout).await?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    let wanted = [
        "subscription_created",
        "tenant_created",
        "secrets_stored",
        "database_created",
        "infrastructure_ready",
        "tenant_ready",
    ];
    // Who follows the checkout learns of the infrastructure last, and then deploys.
    for (path, wanted) in [
        (paths::tenant(tenant.id, "/events"), &wanted[..]),
        (paths::checkout(checkout.parse()?, "/events"), &wanted[..5]),
    ] {
        let last = wanted[wanted.len() - 1];
        let names = provisioning_events(&stack, &path, last, None).await?;
        let kinds: Vec<&str> = names.iter().map(|(_, kind)| kind.as_str()).collect();
        ensure!(kinds == wanted, "{path}: {kinds:?}");
        let resumed = provisioning_events(&stack, &path, last, Some(&names[2].0)).await?;
        ensure!(resumed == names[3..], "{path}, resumed after {}: {resumed:?}", names[2].0);
    }
    Ok(())
}

/// `(id, event_type)` up to one of the type `last`.
async fn provisioning_events(
    stack: &Stack,
    path: &str,
    last: &str,
    after: Option<&str>,
) -> anyhow::Result<Vec<(String, String)>> {
    use futures_util::StreamExt as _;
    let url = format!("{}{path}", stack.api_url());
    let mut request = stack.client().get(url).bearer_auth(stack.token().expose());
    if let Some(after) = after {
        request = request.header("last-event-id", after);
    }
    let mut body = request.send().await?.error_for_status()?.bytes_stream();
    let mut text = String::new();
    while !text.contains(last) || !text.ends_with("\n\n") {
        let more = tokio::time::timeout(e2e::PATIENCE, body.next()).await.with_context(|| text.clone())?;
        text.push_str(std::str::from_utf8(&more.context("the stream ended early")??)?);
    }
    let field = |frame: &str, name: &str| {
        frame.lines().find_map(|line| line.strip_prefix(name).map(|rest| rest.trim().to_owned()))
    };
    text.split("\n\n")
        .filter(|frame| frame.contains("data:"))
        .map(|frame| {
            let data: serde_json::Value = serde_json::from_str(&field(frame, "data:").context("data")?)?;
            Ok((field(frame, "id:").context("id")?, data["event_type"].as_str().context("event_type")?.to_owned()))
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_releases_change() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("busy").await?;
    stack.deploy(&tenant).await?;
    let stop = CancellationToken::new();
    let (url, clients) = (format!("{}/", tenant.url), LoadClients::new(&stack.ca_file(), &tenant.url)?);
    let load = tokio::spawn(open_loop(clients, url, 200, stop.clone()));
    for release in 0..3 {
        fs::write(tenant.project.join("web/dist/release.txt"), format!("release {release}"))?;
        stack.deploy(&tenant).await?;
    }
    stop.cancel();
    let report = load.await?;
    ensure!(report.failed == 0 && report.sent > 100, "{report:?}");
    Ok(())
}

/// The app ends at SIGTERM at once, so whoever stops it before the edge has let go of it cuts these requests; the
/// search for garbage passes several times meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn slow_requests_live_through_a_change_of_release() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("slow").await?;
    TestApp { behaviour: "healthy", text: "0" }.release(&stack, &tenant).await?;
    let stop = CancellationToken::new();
    let slow = (0..6).map(|_| {
        let (client, url, stop) = (stack.client().clone(), format!("{}/slow", tenant.url), stop.clone());
        tokio::spawn(async move {
            let mut answers = Vec::new();
            while !stop.is_cancelled() {
                answers.push(client.get(&url).send().await.map(|answer| answer.status().as_u16()));
            }
            answers
        })
    });
    let slow: Vec<_> = slow.collect();
    for text in ["1", "2", "3"] {
        TestApp { behaviour: "healthy", text }.release(&stack, &tenant).await?;
    }
    stop.cancel();
    for answers in slow {
        let answers = answers.await?;
        let failed: Vec<_> = answers.iter().filter(|answer| !matches!(answer, Ok(200))).collect();
        ensure!(failed.is_empty() && answers.len() > 2, "{failed:?} of {}", answers.len());
    }
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_a_first_release_and_are_told_when_there_is_none() -> anyhow::Result<()> {
    let arguments = &["--healthy-within", "13"];
    let stack = Stack::start_with(&Start { arguments, ..Start::default() }).await?;
    let tenant = stack.provision("first").await?;
    let silent = TestApp { behaviour: "silent", text: "" }.push(&stack, &tenant).await?;
    let operation = silent.submit(&stack, &tenant).await?;
    // Asked before the deploy has begun it is the old answer, at once; afterwards it is held as long as it may be.
    let mut held = std::time::Instant::now();
    until("a request is held", async || {
        held = std::time::Instant::now();
        stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 503 && body.contains("app_starting"))
    })
    .await?;
    ensure!(held.elapsed().as_secs() >= 9, "answered after {:?}", held.elapsed());
    let view = e2e::wait_over(&stack, &operation).await?;
    ensure!(view["status"] == "failed", "{view}");
    until("it waits for a deploy again", async || {
        stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 503 && body.contains("awaiting_deploy"))
    })
    .await
}
