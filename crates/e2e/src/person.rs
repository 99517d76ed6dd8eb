//! What a person does with an installation: API calls, the command line, pages.

use crate::stack::{Stack, program, until};
use anyhow::{Context as _, ensure};
use serde_json::Value;
use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};
use systemprompt_contract::{Secret, TenantId, paths};

/// A proxy that answers nobody, for the environment of what must reach the loopback without one.
pub const NO_WAY_HOME: &str = "http://127.0.0.1:9";

/// A tenant as tests need it.
#[derive(Debug, Clone)]
pub struct TenantRef {
    /// Its id.
    pub id: TenantId,
    /// Where it answers.
    pub url: String,
    /// The project directory it is deployed from.
    pub project: PathBuf,
}

/// What a command said.
#[derive(Debug)]
pub struct CliOutput {
    /// Whether it exited 0.
    pub ok: bool,
    /// Everything on stdout.
    pub stdout: String,
    /// Everything on stderr.
    pub stderr: String,
}

impl CliOutput {
    /// The one JSON value on stdout.
    ///
    /// # Errors
    /// When stdout is anything else.
    pub fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| {
            format!("expected one JSON value on stdout, got {:?}; stderr: {}", self.stdout, self.stderr)
        })
    }
}

impl Stack {
    /// One API call as the first account; the body of an answer that is no success is the error.
    ///
    /// # Errors
    /// Transport errors and answers other than 2xx.
    pub async fn call(&self, method: reqwest::Method, path: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut request = self.client().request(method, format!("{}{path}", self.api_url()));
        request = request.bearer_auth(self.token().expose());
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status.is_success(), "{path}: {status} {text}");
        Ok(if text.is_empty() { Value::Null } else { serde_json::from_str(&text)? })
    }

    /// Checkout and confirmation of a new tenant; phase 1 may still run.
    ///
    /// # Errors
    /// When a call fails.
    pub async fn buy(&self, name: &str) -> anyhow::Result<TenantRef> {
        let checkout = self.order(name).await?;
        self.confirm(&checkout).await?;
        self.bought(&checkout).await
    }

    /// A checkout that waits for its confirmation; returns its id.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn order(&self, name: &str) -> anyhow::Result<String> {
        self.order_as(self.token(), name).await
    }

    /// A checkout of somebody else's.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn order_as(&self, who: &Secret, name: &str) -> anyhow::Result<String> {
        let order = serde_json::json!({ "price_id": "pri_standard", "region": "iad", "name": name });
        let request = self.client().post(format!("{}{}", self.api_url(), paths::CHECKOUT)).bearer_auth(who.expose());
        let created: Value = request.json(&order).send().await?.error_for_status()?.json().await?;
        Ok(created["checkout_session_id"].as_str().context("checkout_session_id")?.to_owned())
    }

    /// Confirms a checkout.
    ///
    /// # Errors
    /// When the call fails; it may have been taken all the same.
    pub async fn confirm(&self, checkout: &str) -> anyhow::Result<()> {
        self.call(reqwest::Method::POST, &format!("{}/{checkout}/confirm", paths::CHECKOUT), None).await.map(drop)
    }

    /// The tenant that a confirmed checkout became.
    ///
    /// # Errors
    /// When it is not confirmed.
    pub async fn bought(&self, checkout: &str) -> anyhow::Result<TenantRef> {
        let state = self.call(reqwest::Method::GET, &format!("{}/{checkout}", paths::CHECKOUT), None).await?;
        self.tenant(state["data"]["tenant_id"].as_str().context("tenant_id")?.parse()?)
    }

    /// A project directory for a tenant, with the example in it and the CLI signed in.
    ///
    /// # Errors
    /// When the files cannot be written.
    pub fn tenant(&self, id: TenantId) -> anyhow::Result<TenantRef> {
        let project = self.root().join("projects").join(id.slug().as_str());
        if !project.exists() {
            copy_tree(&workspace_root().join("examples/hello"), &project)?;
        }
        let zone = systemprompt_contract::Zone::default();
        let url = format!("https://{}:{}", id.slug().hostname(&zone), self.https_port());
        Ok(TenantRef { id, url, project })
    }

    /// A tenant that awaits its first deploy.
    ///
    /// # Errors
    /// When phase 1 does not get there.
    pub async fn provision(&self, name: &str) -> anyhow::Result<TenantRef> {
        let tenant = self.buy(name).await?;
        self.wait_status(&tenant, "awaiting_deploy").await?;
        Ok(tenant)
    }

    /// Waits until a tenant has a status.
    ///
    /// # Errors
    /// After [`crate::PATIENCE`], with the status it has.
    pub async fn wait_status(&self, tenant: &TenantRef, wanted: &str) -> anyhow::Result<()> {
        let mut last = String::new();
        until(&format!("the tenant is {wanted}"), async || {
            let status = self.status(tenant).await;
            last = status.unwrap_or_else(|error| error.to_string());
            last == wanted
        })
        .await
        .with_context(|| format!("it is {last}\n{}", self.log_tail()))
    }

    /// A tenant's status word.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn status(&self, tenant: &TenantRef) -> anyhow::Result<String> {
        let path = paths::tenant(tenant.id, "/status");
        let status = self.call(reqwest::Method::GET, &path, None).await?;
        Ok(status["data"]["status"].as_str().unwrap_or_default().to_owned())
    }

    /// Runs the command line in a tenant's project, signed in as the first account.
    ///
    /// # Errors
    /// When the program cannot be started; its own failure is in the output.
    pub async fn cli(&self, tenant: &TenantRef, arguments: &[&str]) -> anyhow::Result<CliOutput> {
        self.cli_in(&tenant.project, arguments).await
    }

    /// Runs the command line in a directory, signed in as the first account.
    ///
    /// # Errors
    /// When the program cannot be started; its own failure is in the output.
    pub async fn cli_in(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<CliOutput> {
        self.sign_in(directory)?;
        self.cli_as_is(directory, arguments).await
    }

    /// Runs the command line in a directory with whatever credentials lie there.
    ///
    /// # Errors
    /// When the program cannot be started; its own failure is in the output.
    pub async fn cli_as_is(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<CliOutput> {
        let output = self.cli_command(directory, arguments)?.output().await.context("running systemprompt")?;
        Ok(CliOutput {
            ok: output.status.success(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// The command line, ready to be started in a directory; for who watches it while it runs.
    ///
    /// # Errors
    /// When it was not built.
    pub fn cli_command(&self, directory: &Path, arguments: &[&str]) -> anyhow::Result<tokio::process::Command> {
        let mut command = tokio::process::Command::new(program("systemprompt")?);
        command.current_dir(directory).args(arguments).stdin(Stdio::null()).kill_on_drop(true);
        command.env("SYSTEMPROMPT_CA_FILE", self.ca_file()).env("XDG_CACHE_HOME", self.root().join("cache"));
        command.env("https_proxy", NO_WAY_HOME);
        Ok(command)
    }

    fn sign_in(&self, directory: &Path) -> anyhow::Result<()> {
        let credentials = directory.join(".systemprompt/credentials.json");
        if credentials.exists() {
            return Ok(());
        }
        let mut command = Command::new(program("systemprompt")?);
        command.current_dir(directory).args(["cloud", "auth", "login", "--token", "-", "--api-url", &self.api_url()]);
        command.env("SYSTEMPROMPT_CA_FILE", self.ca_file());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("stdin is piped")?.write_all(self.token().expose().as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "signing in: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// Deploys a tenant's project as a person would.
    ///
    /// # Errors
    /// With the command's words, when it fails.
    pub async fn deploy(&self, tenant: &TenantRef) -> anyhow::Result<Value> {
        let id = tenant.id.to_string();
        let output = self.cli(tenant, &["--json", "cloud", "deploy", "--tenant", &id]).await?;
        ensure!(output.ok, "deploy failed: {}\n{}\n{}", output.stdout, output.stderr, self.log_tail());
        output.json()
    }

    /// Status and body of a page of a tenant.
    ///
    /// # Errors
    /// Transport errors.
    pub async fn get(&self, tenant: &TenantRef, path: &str) -> anyhow::Result<(u16, String)> {
        let answer = self.client().get(format!("{}{path}", tenant.url)).send().await?;
        let status = answer.status().as_u16();
        Ok((status, answer.text().await?))
    }
}

fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}
