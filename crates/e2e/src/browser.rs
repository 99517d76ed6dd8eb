//! A real Chromium, driven through chromedriver over the W3C `WebDriver` protocol.

use crate::{Stack, until};
use anyhow::{Context as _, bail, ensure};
use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tempfile::TempDir;

/// How long a browser may take to end after its group was killed.
const GONE_WITHIN: Duration = Duration::from_secs(10);

const NETWORK_CHANGED: &str = "ERR_NETWORK_CHANGED";

/// A browser with a profile of its own that trusts one installation's CA and nobody's word: certificate errors stay
/// errors. Dropping it ends all of its processes and removes the profile.
pub struct Browser {
    driver: Child,
    http: reqwest::Client,
    /// Base of the session's calls; none until the session stands.
    session: Option<String>,
    /// Home, profile and temporary files.
    home: TempDir,
}

impl Browser {
    /// A browser that trusts `stack`'s CA.
    ///
    /// # Errors
    /// When chromium, chromedriver or certutil is missing or does not come up.
    pub async fn start(stack: &Stack) -> anyhow::Result<Self> {
        let home = tempfile::Builder::new().prefix("sp-browser-").tempdir()?;
        fs::create_dir(home.path().join("tmp"))?;
        trust(home.path(), &stack.ca_file())?;
        let driver = spawn_driver(home.path())?;
        let http = reqwest::Client::builder().no_proxy().build()?;
        let mut browser = Self { driver, http, session: None, home };
        let driver = browser.driver_url().await?;
        let capabilities = json!({ "capabilities": { "alwaysMatch": {
            "browserName": "chrome",
            "acceptInsecureCerts": false,
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": { "args": arguments(browser.home.path()) },
        }}});
        let created = browser.call_at(Method::POST, &format!("{driver}/session"), Some(&capabilities)).await?;
        let id = created["sessionId"].as_str().context("sessionId")?;
        browser.session = Some(format!("{driver}/session/{id}"));
        Ok(browser)
    }

    async fn driver_url(&self) -> anyhow::Result<String> {
        let log = self.home.path().join("driver.log");
        let mut port = None;
        until("chromedriver says its port", async || {
            port = port_of(&fs::read_to_string(&log).unwrap_or_default());
            port.is_some()
        })
        .await?;
        Ok(format!("http://127.0.0.1:{}", port.context("it said one")?))
    }

    /// Loads a page and waits for its load event.
    ///
    /// # Errors
    /// When there is no page, also for a certificate that does not verify.
    pub async fn open(&self, url: &str) -> anyhow::Result<()> {
        // A link that another test adds or takes away is a network change, which makes Chromium give up what it loads.
        for _ in 0..5 {
            let opened = self.call(Method::POST, "url", Some(&json!({ "url": url }))).await.map(drop);
            let interrupted = match &opened {
                Ok(()) => self.text("body").await.is_ok_and(|text| text.contains(NETWORK_CHANGED)),
                Err(error) => format!("{error:#}").contains(NETWORK_CHANGED),
            };
            if !interrupted {
                return opened;
            }
        }
        anyhow::bail!("{url}: the network changed during each of five tries")
    }

    /// The address of the page as the browser has it.
    ///
    /// # Errors
    /// Those of the driver.
    pub async fn url(&self) -> anyhow::Result<String> {
        text_of(&self.call(Method::GET, "url", None).await?)
    }

    /// The page's title.
    ///
    /// # Errors
    /// Those of the driver.
    pub async fn title(&self) -> anyhow::Result<String> {
        text_of(&self.call(Method::GET, "title", None).await?)
    }

    /// What a person can read of the first element that `css` selects.
    ///
    /// # Errors
    /// When there is no such element.
    pub async fn text(&self, css: &str) -> anyhow::Result<String> {
        let element = self.element(css).await?;
        text_of(&self.call(Method::GET, &format!("{element}/text"), None).await?)
    }

    /// Waits until an element shows `text`, on this page or the next.
    ///
    /// # Errors
    /// With what is to be seen instead.
    pub async fn until_shown(&self, css: &str, text: &str) -> anyhow::Result<()> {
        let what = format!("{css} shows {text:?}");
        let shown = until(&what, async || self.text(css).await.is_ok_and(|seen| seen.contains(text))).await;
        if let Err(error) = shown {
            let (url, page) = (self.url().await.unwrap_or_default(), self.text("body").await.unwrap_or_default());
            return Err(error.context(format!("{url} shows: {page}")));
        }
        Ok(())
    }

    /// Clears a field and types into it.
    ///
    /// # Errors
    /// When there is no such field, or nobody could type into it.
    pub async fn fill(&self, css: &str, text: &str) -> anyhow::Result<()> {
        let element = self.element(css).await?;
        self.call(Method::POST, &format!("{element}/clear"), Some(&json!({}))).await?;
        self.call(Method::POST, &format!("{element}/value"), Some(&json!({ "text": text }))).await.map(drop)
    }

    /// Clicks; a navigation that follows has begun when it returns.
    ///
    /// # Errors
    /// When there is no such element, or nobody could click it.
    pub async fn click(&self, css: &str) -> anyhow::Result<()> {
        let element = self.element(css).await?;
        self.call(Method::POST, &format!("{element}/click"), Some(&json!({}))).await.map(drop)
    }

    /// Runs the body of a function in the page and returns its value.
    ///
    /// # Errors
    /// What the script throws.
    pub async fn script(&self, body: &str, arguments: &[&str]) -> anyhow::Result<Value> {
        self.call(Method::POST, "execute/sync", Some(&json!({ "script": body, "args": arguments }))).await
    }

    /// Errors on the console since the last call: of scripts, of the content security policy, of resources.
    ///
    /// # Errors
    /// Those of the driver.
    pub async fn console_errors(&self) -> anyhow::Result<Vec<String>> {
        let log = self.call(Method::POST, "se/log", Some(&json!({ "type": "browser" }))).await?;
        let entries = log.as_array().context("a list of entries")?;
        let severe = entries.iter().filter(|entry| entry["level"] == "SEVERE");
        severe.map(|entry| text_of(&entry["message"])).collect()
    }

    /// The path of an element, for further calls.
    async fn element(&self, css: &str) -> anyhow::Result<String> {
        let found = self.call(Method::POST, "element", Some(&json!({ "using": "css selector", "value": css }))).await?;
        // The one key of the answer is a constant of the protocol.
        let id = found.as_object().and_then(|object| object.values().next()).and_then(Value::as_str);
        Ok(format!("element/{}", id.context("an element reference")?))
    }

    async fn call(&self, method: Method, command: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let session = self.session.as_ref().context("the session stands")?;
        self.call_at(method, &format!("{session}/{command}"), body).await
    }

    async fn call_at(&self, method: Method, url: &str, body: Option<&Value>) -> anyhow::Result<Value> {
        let mut request = self.http.request(method, url);
        if let Some(body) = body {
            request = request.json(body);
        }
        let answer = request.send().await?;
        let status = answer.status();
        let mut answer: Value = answer.json().await?;
        let value = answer["value"].take();
        ensure!(status.is_success(), "{url}: {}: {}", value["error"], value["message"]);
        Ok(value)
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = kill_process_group(Pid::from_child(&self.driver), Signal::KILL);
        let _ = self.driver.wait();
        // Whatever left the group, such as crash handlers, names the folder in its command line.
        let deadline = Instant::now() + GONE_WITHIN;
        while kill_all_that_name(self.home.path()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn spawn_driver(home: &Path) -> anyhow::Result<Child> {
    let log = File::create(home.join("driver.log"))?;
    let mut command = Command::new("chromedriver");
    // HOME is where Chromium looks for the certificate database; nothing of the person who runs the tests is read.
    command.arg("--port=0").env("HOME", home).env("TMPDIR", home.join("tmp")).process_group(0);
    for variable in ["XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY"] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.spawn().context("starting chromedriver; is chromium-driver installed?")
}

fn port_of(log: &str) -> Option<u16> {
    log.lines().find_map(|line| line.split_once("successfully on port ")?.1.trim_end_matches('.').parse().ok())
}

fn arguments(home: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--headless=new",
        // Tests run as root, where Chromium's own sandbox refuses to start.
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--disable-dev-shm-usage",
        "--disable-breakpad",
        // Nothing but what a test opens.
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-proxy-server",
    ]
    .map(str::to_owned)
    .to_vec();
    arguments.push(format!("--user-data-dir={}", home.join("profile").display()));
    arguments
}

/// Makes the certificate database of `home` trust a CA.
fn trust(home: &Path, ca: &Path) -> anyhow::Result<()> {
    let folder = home.join(".pki/nssdb");
    fs::create_dir_all(&folder)?;
    let database = format!("sql:{}", folder.display());
    let certutil = |arguments: &[&str]| -> anyhow::Result<()> {
        let output = Command::new("certutil").args(["-d", &database]).args(arguments).output();
        let output = output.context("starting certutil; is libnss3-tools installed?")?;
        if !output.status.success() {
            bail!("certutil {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    };
    certutil(&["-N", "--empty-password"])?;
    certutil(&["-A", "-n", "local CA", "-t", "C,,", "-i", &ca.display().to_string()])
}

/// Sends SIGKILL to every process whose command line names `folder`; whether there was any.
fn kill_all_that_name(folder: &Path) -> bool {
    let needle = folder.as_os_str().as_bytes();
    let mut any = false;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let Ok(command_line) = fs::read(entry.path().join("cmdline")) else { continue };
        if command_line.windows(needle.len()).any(|part| part == needle) {
            any = true;
            let _ = kill_process(pid, Signal::KILL);
        }
    }
    any
}

fn text_of(value: &Value) -> anyhow::Result<String> {
    value.as_str().map(str::to_owned).with_context(|| format!("expected a text, got {value}"))
}
