//! What a person sees: every page in a real Chromium that trusts nothing but the local CA.

use anyhow::{Context as _, ensure};
use e2e::{Browser, Stack, Start, TestApp, until};
use reqwest::Method;
use serde_json::json;
use std::{fs, net::TcpListener, path::Path, process::Stdio};
use systemprompt_contract::paths;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::{Child, ChildStderr},
};

const EMAIL: &str = "operator@systemprompt.localhost";
const PASSWORD: &str = "a password for tests only";

#[tokio::test(flavor = "multi_thread")]
async fn the_example_shows_its_page_and_asks_its_own_database() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("hello").await?;
    let browser = Browser::start(&stack).await?;

    // Before the first deploy there is an answer, and TLS is as good as after it.
    browser.open(&tenant.url).await?;
    browser.until_shown("body", "awaiting_deploy").await?;
    browser.console_errors().await?;

    stack.deploy(&tenant).await?;
    browser.open(&format!("{}/", tenant.url)).await?;
    ensure!(browser.title().await? == "Hello from SystemPrompt", "{}", browser.title().await?);
    // Written by the page's script from the health of the instance.
    browser.until_shown("#database", tenant.id.slug().database().as_str()).await?;
    browser.until_shown("#summary", "Everything answers.").await?;
    let script = "return [performance.getEntriesByType('navigation')[0].nextHopProtocol,
                          document.querySelector('img').naturalWidth > 0,
                          getComputedStyle(document.body).margin]";
    let page = browser.script(script, &[]).await?;
    ensure!(page == json!(["h2", true, "0px"]), "HTTP/2, picture and style: {page}");
    let errors = browser.console_errors().await?;
    ensure!(errors.is_empty(), "{errors:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_signs_in_with_a_browser() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let browser = Browser::start(&stack).await?;
    let project = tempfile::tempdir()?;

    let mut login = Login::start(&stack, project.path()).await?;
    browser.open(&login.address).await?;
    ensure!(browser.title().await? == "Sign in · SystemPrompt Cloud", "{}", browser.title().await?);
    // The address names the API; the form is given, and accepted, under the pages' own name.
    ensure!(browser.url().await?.starts_with(&cloud(&stack, "/login?")), "{}", browser.url().await?);
    let errors = browser.console_errors().await?;
    ensure!(errors.is_empty(), "{errors:?}");

    // A wrong password is said on the page, the form stays, and the command goes on waiting.
    sign_in(&browser, "not the password").await?;
    browser.until_shown("[role=alert]", "The address or the password is not right.").await?;
    ensure!(browser.script("return document.querySelector('#email').value", &[]).await? == EMAIL, "the address stays");
    ensure!(login.child.try_wait()?.is_none(), "the command ended on a wrong password");
    blocked_nothing(&browser.console_errors().await?)?;

    sign_in(&browser, PASSWORD).await?;
    browser.until_shown("h1", "Almost there").await?;
    ensure!(browser.url().await?.starts_with("http://127.0.0.1:"), "{}", browser.url().await?);
    blocked_nothing(&browser.console_errors().await?)?;
    let (ok, said) = login.end().await?;
    ensure!(ok, "{said}");
    let whoami = stack.cli_as_is(project.path(), &["--json", "cloud", "auth", "whoami"]).await?.json()?;
    ensure!(whoami["data"]["user_email"] == EMAIL && whoami["data"]["token_status"] == "Valid", "{whoami}");
    Ok(())
}

/// The API in clear has no pages; its address is where the command line sends the person all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_person_signs_in_to_the_api_in_clear() -> anyhow::Result<()> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let stack = Stack::start_with(&Start { arguments: &["--http-api", &address], ..Start::default() }).await?;
    let browser = Browser::start(&stack).await?;
    let project = tempfile::tempdir()?;
    let mut login = Login::at(&format!("http://{address}"), &stack, project.path()).await?;
    browser.open(&login.address).await?;
    ensure!(browser.url().await?.starts_with(&cloud(&stack, "/login?")), "{}", browser.url().await?);
    sign_in(&browser, PASSWORD).await?;
    browser.until_shown("h1", "Almost there").await?;
    let (ok, said) = login.end().await?;
    ensure!(ok, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_changes_their_mind_ends_the_waiting_command() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let browser = Browser::start(&stack).await?;
    let project = tempfile::tempdir()?;
    let mut login = Login::start(&stack, project.path()).await?;
    browser.open(&login.address).await?;
    browser.click("form ~ p a").await?;
    browser.until_shown("h1", "Not signed in").await?;
    let (ok, said) = login.end().await?;
    ensure!(!ok && said.contains("the sign-in was refused"), "{said}");
    let whoami = stack.cli_as_is(project.path(), &["--json", "cloud", "auth", "whoami"]).await?.json()?;
    ensure!(whoami["data"]["token_status"] == "Not logged in", "{whoami}");
    Ok(())
}

/// Tenants are the same site for a browser, so its own `SameSite` rules keep none of them out.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_page_cannot_send_our_forms() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("evil").await?;
    let page = TestApp { behaviour: "healthy", text: "evil" }.deploy(&stack, &tenant).await?;
    ensure!(page["status"] == "succeeded", "{page}");
    let browser = Browser::start(&stack).await?;
    let project = tempfile::tempdir()?;
    let mut login = Login::start(&stack, project.path()).await?;

    // The victim has the form open, and with it the cookie; the tenant has everything the form holds.
    browser.open(&login.address).await?;
    let form = "const form = document.querySelector('form'); return [form.action, form.innerHTML]";
    let form = browser.script(form, &[]).await?;
    let (action, fields) = (form[0].as_str().context("action")?, form[1].as_str().context("fields")?);
    browser.open(&tenant.url).await?;
    let send = "const form = document.createElement('form');
        form.method = 'post'; form.action = arguments[0]; form.innerHTML = arguments[1];
        form.querySelector('#email').value = arguments[2]; form.querySelector('#password').value = arguments[3];
        document.body.append(form); form.submit();";
    browser.script(send, &[action, fields, EMAIL, PASSWORD]).await?;
    browser.until_shown("[role=alert]", "the form was not accepted: its Origin").await?;
    ensure!(login.child.try_wait()?.is_none(), "the command was answered");

    // And the same form from its own page is good.
    browser.open(&login.address).await?;
    sign_in(&browser, PASSWORD).await?;
    browser.until_shown("h1", "Almost there").await?;
    let (ok, said) = login.end().await?;
    ensure!(ok, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_account_is_made_in_a_browser() -> anyhow::Result<()> {
    let mut stack = Stack::prepare()?;
    stack.serve(&Start::default())?;
    let browser = Browser::start(&stack).await?;
    browser.open(&cloud(&stack, "/")).await?;
    browser.until_shown("h1", "SystemPrompt Cloud").await?;
    browser.click("a[href='/setup']").await?;
    browser.until_shown("h1", "Set up this installation").await?;
    let errors = browser.console_errors().await?;
    ensure!(errors.is_empty(), "{errors:?}");

    set_up(&browser, "sp_setup_not_the_token").await?;
    browser.until_shown("[role=alert]", "this is not the setup token of this installation").await?;
    let token = fs::read_to_string(stack.data().join("setup-token"))?;
    set_up(&browser, token.trim()).await?;
    browser.until_shown("main", "it runs this installation").await?;
    blocked_nothing(&browser.console_errors().await?)?;
    browser.open(&cloud(&stack, "/setup")).await?;
    browser.until_shown("main", "This installation has its first account").await?;

    // The account is one.
    let project = tempfile::tempdir()?;
    let mut login = Login::start(&stack, project.path()).await?;
    browser.open(&login.address).await?;
    sign_in(&browser, PASSWORD).await?;
    browser.until_shown("h1", "Almost there").await?;
    let (ok, said) = login.end().await?;
    ensure!(ok, "{said}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkout_can_be_watched_in_a_browser() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let request = json!({ "price_id": "pri_standard", "region": "fra", "name": "watched",
                          "redirect_uri": "http://127.0.0.1:1/callback" });
    let created = stack.call(Method::POST, paths::CHECKOUT, Some(&request)).await?;
    let id = created["checkout_session_id"].as_str().context("checkout_session_id")?;
    let browser = Browser::start(&stack).await?;
    browser.open(created["checkout_url"].as_str().context("checkout_url")?).await?;
    ensure!(browser.title().await? == "Checkout · SystemPrompt Cloud", "{}", browser.title().await?);
    let page = browser.text("main").await?;
    ensure!(page.contains("fra") && page.contains(&format!("cloud checkout confirm {id}")), "{page}");
    ensure!(!page.contains("watched") && !page.contains(EMAIL), "names neither buyer nor tenant: {page}");
    let errors = browser.console_errors().await?;
    ensure!(errors.is_empty(), "{errors:?}");

    stack.call(Method::POST, &format!("{}/{id}/confirm", paths::CHECKOUT), None).await?;
    browser.open(&browser.url().await?).await?;
    browser.until_shown("main", "This checkout is confirmed.").await?;
    browser.open(&cloud(&stack, "/checkout/none")).await?;
    browser.until_shown("[role=alert]", "checkout").await
}

/// `systemprompt cloud auth login` while it waits for its browser.
struct Login {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// What it asks the person to open.
    address: String,
}

impl Login {
    async fn start(stack: &Stack, project: &Path) -> anyhow::Result<Self> {
        Self::at(&stack.api_url(), stack, project).await
    }

    async fn at(api_url: &str, stack: &Stack, project: &Path) -> anyhow::Result<Self> {
        let arguments = ["cloud", "auth", "login", "--no-browser", "--api-url", api_url];
        let mut command = stack.cli_command(project, &arguments)?;
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let mut stderr = BufReader::new(child.stderr.take().context("stderr is piped")?);
        let mut said = String::new();
        loop {
            let mut line = String::new();
            ensure!(stderr.read_line(&mut line).await? > 0, "it ended before it said an address: {said}");
            if line.trim().starts_with(api_url) {
                return Ok(Self { child, stderr, address: line.trim().to_owned() });
            }
            said.push_str(&line);
        }
    }

    /// Waits for its end: whether it was a good one, and what else it said.
    async fn end(&mut self) -> anyhow::Result<(bool, String)> {
        let mut status = None;
        until("the command ends", async || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })
        .await?;
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).await?;
        Ok((status.context("it ended")?.success(), said))
    }
}

async fn sign_in(browser: &Browser, password: &str) -> anyhow::Result<()> {
    browser.fill("#email", EMAIL).await?;
    browser.fill("#password", password).await?;
    browser.click("button").await
}

async fn set_up(browser: &Browser, token: &str) -> anyhow::Result<()> {
    browser.fill("#setup_token", token).await?;
    sign_in(browser, PASSWORD).await
}

fn cloud(stack: &Stack, path: &str) -> String {
    format!("https://cloud.systemprompt.localhost:{}{path}", stack.https_port())
}

/// A status of 403 is an error for the console and right; a policy or a mixed form that stops our own page is not.
fn blocked_nothing(errors: &[String]) -> anyhow::Result<()> {
    let other: Vec<_> = errors.iter().filter(|error| !error.contains("status of 403")).collect();
    ensure!(other.is_empty(), "{other:?}");
    Ok(())
}
