//! Images of the app that misbehaves on request, pushed and submitted without the command line.

use crate::{Stack, TenantRef, program, until};
use anyhow::{Context as _, ensure};
use reqwest::Method;
use serde_json::Value;
use std::fs;
use systemprompt_contract::{Secret, paths};
use systemprompt_oci::{
    BuiltImage, ImageBuilder, RegistryClient,
    build::{BuildSpec, LayerCache},
};

/// What the app in the image does; `src/bin/tenant-app.rs` has the table.
#[derive(Debug, Clone, Copy)]
pub struct TestApp<'a> {
    /// First line of its behaviour file.
    pub behaviour: &'a str,
    /// What it answers.
    pub text: &'a str,
}

impl TestApp<'_> {
    /// Builds the image.
    ///
    /// # Errors
    /// When it cannot be built.
    pub fn build(&self, stack: &Stack) -> anyhow::Result<BuiltImage> {
        let project = tempfile::tempdir()?;
        for folder in ["services", "web/dist", ".systemprompt/profiles/production"] {
            fs::create_dir_all(project.path().join(folder))?;
        }
        fs::write(project.path().join("services/behaviour"), format!("{}\n{}\n", self.behaviour, self.text))?;
        fs::write(project.path().join("web/dist/index.html"), "test")?;
        fs::write(project.path().join(".systemprompt/profiles/production/profile.yaml"), "name: production\n")?;
        let builder = ImageBuilder::new(BuildSpec::new(project.path(), program("tenant-app")?, "production"));
        let cache = LayerCache::open(stack.data().join("test-layers"))?;
        Ok(builder.build(&builder.plan()?, &cache, &|_| {})?)
    }

    /// Builds and pushes the image for a tenant.
    ///
    /// # Errors
    /// When the registry refuses it.
    pub async fn push(&self, stack: &Stack, tenant: &TenantRef) -> anyhow::Result<Pushed> {
        push(stack, tenant, &self.build(stack)?).await
    }

    /// Makes it the tenant's live release.
    ///
    /// # Errors
    /// With the operation's view, when it does not become that.
    pub async fn release(&self, stack: &Stack, tenant: &TenantRef) -> anyhow::Result<()> {
        let view = self.deploy(stack, tenant).await?;
        ensure!(view["status"] == "succeeded", "{view}\n{}", stack.log_tail());
        Ok(())
    }

    /// Builds, pushes and submits, and waits for the end of the operation, whichever it is.
    ///
    /// # Errors
    /// When a call fails; the operation's failure is in its view.
    pub async fn deploy(&self, stack: &Stack, tenant: &TenantRef) -> anyhow::Result<Value> {
        let operation = self.push(stack, tenant).await?.submit(stack, tenant).await?;
        wait_over(stack, &operation).await
    }
}

/// An image in the registry.
#[derive(Debug, Clone)]
pub struct Pushed {
    /// Its full name.
    pub image: String,
    /// What was pushed.
    pub digest: String,
}

impl Pushed {
    /// The deploy call; returns the operation's id.
    ///
    /// # Errors
    /// When the call is refused.
    pub async fn submit(&self, stack: &Stack, tenant: &TenantRef) -> anyhow::Result<String> {
        let body = serde_json::json!({ "image": self.image, "digest": self.digest });
        let accepted = stack.call(Method::POST, &paths::tenant(tenant.id, "/deploy"), Some(&body)).await?;
        Ok(accepted["data"]["operation_id"].as_str().context("operation_id")?.to_owned())
    }
}

/// Pushes a built image with the tenant's registry token.
///
/// # Errors
/// When the registry refuses it.
pub async fn push(stack: &Stack, tenant: &TenantRef, image: &BuiltImage) -> anyhow::Result<Pushed> {
    let token = stack.call(Method::GET, &paths::tenant(tenant.id, "/registry-token"), None).await?;
    let part = |name: &str| token["data"][name].as_str().unwrap_or_default().to_owned();
    let base = format!("https://{}", part("registry")).parse()?;
    let client = RegistryClient::new(stack.client().clone(), base, part("username"), Secret::new(part("token")));
    let report = client.push(image, &part("repository"), &part("tag"), &|_| {}).await?;
    let image = format!("{}/{}:{}", part("registry"), part("repository"), part("tag"));
    Ok(Pushed { image, digest: report.digest.to_string() })
}

/// Waits until an operation is over and returns its view.
///
/// # Errors
/// When it is not over in time.
pub async fn wait_over(stack: &Stack, operation: &str) -> anyhow::Result<Value> {
    let path = format!("/api/v1/operations/{operation}");
    let mut view = Value::Null;
    until("the operation is over", async || {
        view = stack.call(Method::GET, &path, None).await.map_or(Value::Null, |answer| answer["data"].clone());
        matches!(view["status"].as_str(), Some("succeeded" | "failed" | "stuck"))
    })
    .await
    .with_context(|| view.to_string())?;
    ensure!(view["status"] != "stuck", "parked: {view}");
    Ok(view)
}
