//! Tenants go away, whenever and from wherever they are asked to.

use crate::{crash::settled, edge::instance_directory};
use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TenantRef, TestApp, World, until};
use reqwest::Method;
use serde_json::{Value, json};
use systemprompt_contract::{OperationId, Secret, paths};

async fn delete(stack: &Stack, tenant: &TenantRef, purge: bool) -> anyhow::Result<String> {
    let path = format!("{}?purge={purge}", paths::tenant(tenant.id, ""));
    let accepted = stack.call(Method::DELETE, &path, None).await?;
    Ok(accepted["data"]["operation_id"].as_str().unwrap_or_default().to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_deleted_without_purge_is_kept_until_it_is_due() -> anyhow::Result<()> {
    use sqlx::Executor as _;
    let stack = Stack::start().await?;
    let tenant = stack.provision("kept").await?;
    TestApp { behaviour: "healthy", text: "here" }.release(&stack, &tenant).await?;
    delete(&stack, &tenant, false).await?;
    settled(&stack, &[tenant.id], &[]).await?;
    let (status, _) = stack.get(&tenant, "/").await?;
    ensure!(status == 502, "{status}");
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    control.execute("UPDATE tenants SET purge_after = now()").await?;
    settled(&stack, &[], &[]).await
}

/// Whoever is being answered is answered to the end.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_cuts_no_request() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("slow").await?;
    TestApp { behaviour: "healthy", text: "to the end" }.release(&stack, &tenant).await?;
    let (client, url) = (stack.client().clone(), format!("{}/slow", tenant.url));
    let slow = tokio::spawn(async move { client.get(url).send().await?.text().await });
    let output = instance_directory(&stack, &tenant)?.join("output");
    until("the app has been asked", async || {
        std::fs::read_to_string(&output).is_ok_and(|said| said.contains("slowly"))
    })
    .await?;
    delete(&stack, &tenant, true).await?;
    until("nobody new gets there", async || stack.get(&tenant, "/").await.is_ok_and(|(status, _)| status == 502))
        .await?;
    let answer = slow.await??;
    ensure!(answer == "to the end", "{answer}");
    settled(&stack, &[], &[]).await
}

/// Its id is known from the confirmation on, and so is the tenant.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_can_be_deleted_while_it_is_made() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    for name in ["one", "two", "three"] {
        let tenant = stack.buy(name).await?;
        delete(&stack, &tenant, true).await?;
    }
    settled(&stack, &[], &[]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_can_be_deleted_while_it_is_deployed_to() -> anyhow::Result<()> {
    let stack = Stack::start_with(&Start { arguments: &["--healthy-within", "300"], ..Start::default() }).await?;
    let tenant = stack.provision("gone").await?;
    let app = TestApp { behaviour: "silent", text: "" }.push(&stack, &tenant).await?;
    app.submit(&stack, &tenant).await?;
    until("the new instance runs", async || World::look(&stack).await.is_ok_and(|world| world.instances.len() == 1))
        .await?;
    delete(&stack, &tenant, true).await?;
    settled(&stack, &[], &[]).await
}

/// Nothing of the tenant is left then but what it was bought with.
#[tokio::test(flavor = "multi_thread")]
async fn who_purged_a_tenant_can_read_how_that_ended_and_nobody_else_can() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let owner = stack.create_member("owner@systemprompt.localhost")?;
    let stranger = stack.create_member("stranger@systemprompt.localhost")?;
    let ask = async |who: &Secret, method: Method, path: &str| {
        let request = stack.client().request(method, format!("{}{path}", stack.api_url())).bearer_auth(who.expose());
        let order = json!({ "price_id": "pri_standard", "region": "iad", "name": "short-lived" });
        let answer = request.json(&order).send().await?;
        let status = answer.status().as_u16();
        let mut body: Value = answer.json().await?;
        body["error"]["request_id"] = Value::Null;
        anyhow::Ok((status, body))
    };
    let (_, ordered) = ask(&owner, Method::POST, paths::CHECKOUT).await?;
    let checkout = ordered["checkout_session_id"].as_str().context("checkout_session_id")?;
    stack.confirm(checkout).await?;
    let tenant = stack.bought(checkout).await?;
    let (status, purging) =
        ask(&owner, Method::DELETE, &format!("{}?purge=true", paths::tenant(tenant.id, ""))).await?;
    let operation = purging["data"]["operation_id"].as_str().with_context(|| format!("{status} {purging}"))?;
    settled(&stack, &[], &[]).await?;

    let path = format!("/api/v1/operations/{operation}");
    let (status, view) = ask(&owner, Method::GET, &path).await?;
    ensure!(status == 200 && view["data"]["status"] == "succeeded", "{status} {view}");
    let foreign = ask(&stranger, Method::GET, &path).await?;
    let absent = ask(&stranger, Method::GET, &format!("/api/v1/operations/{}", OperationId::new())).await?;
    ensure!(foreign.0 == 404 && foreign == absent, "{foreign:?} {absent:?}");
    Ok(())
}
