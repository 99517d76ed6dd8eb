//! A running cloud, and the public steps a user takes with it.

use super::{account, cli::Cli, example, orphan, report::Timings, server::Server};
use crate::{http::Http, shell::Shell};
use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// After a start the instance of an earlier run has to come up again first.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
/// Name of the sample's tenant; an earlier run's is found by it.
const TENANT: &str = "hello";

/// Where an installation keeps what, and by which names it is reached.
#[derive(Debug, Clone)]
pub(crate) struct Installation {
    /// Folder of the built binaries.
    pub(crate) programs: PathBuf,
    pub(crate) data: PathBuf,
    pub(crate) zone: String,
    pub(crate) https: u16,
    /// A port, or `off`.
    pub(crate) http: String,
    pub(crate) http_api: Option<SocketAddr>,
}

impl Installation {
    /// `https://{host}.{zone}[:port]`.
    pub(crate) fn url(&self, host: &str) -> String {
        let port = if self.https == 443 { String::new() } else { format!(":{}", self.https) };
        format!("https://{host}.{}{port}", self.zone)
    }

    /// The person's copy of the example.
    pub(crate) fn project(&self) -> PathBuf {
        self.data.join("hello")
    }

    /// What the command line keeps between deploys.
    pub(crate) fn caches(&self) -> PathBuf {
        self.data.join("cache")
    }

    pub(crate) fn ca_file(&self) -> PathBuf {
        self.data.join("ca/ca.pem")
    }

    fn log_file(&self) -> PathBuf {
        self.data.join("management-api.log")
    }

    pub(crate) fn management_api(&self, task: &str) -> Command {
        let mut command = Command::new(self.programs.join("management-api"));
        command.arg(task).arg("--data").arg(&self.data).env_remove("LD_LIBRARY_PATH");
        command
    }

    fn serve(&self) -> Command {
        let mut command = self.management_api("serve");
        command.args(["--zone", &self.zone, "--https", &self.https.to_string(), "--http", &self.http]);
        command.args(["--on-stop", "stop"]);
        if let Some(address) = self.http_api {
            command.arg("--http-api").arg(address.to_string());
        }
        command.env(orphan::MARK, std::process::id().to_string());
        command
    }
}

/// A tenant as the steps need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tenant {
    pub(crate) id: String,
    /// With a slash at the end.
    pub(crate) url: String,
    /// Nothing was ever deployed to it.
    pub(crate) is_new: bool,
}

/// How long a deploy took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deployed {
    /// From the start of the command to its end.
    pub(crate) wall: Duration,
    /// Of that, until the image was built.
    pub(crate) build: Duration,
}

/// A started cloud. Dropped, it is stopped.
pub(crate) struct Cloud {
    installation: Installation,
    server: Server,
    http: Http,
    cli: Cli,
}

impl Cloud {
    /// Starts `management-api` and makes the sample project.
    pub(crate) fn start(shell: &Shell, installation: Installation) -> Result<Self> {
        eprintln!("starting the cloud in {} …", installation.data.display());
        make_passable(&installation.data).with_context(|| format!("cannot create {}", installation.data.display()))?;
        orphan::stop(shell, &installation.data)?;
        let server = Server::start(shell, installation.serve(), &installation.log_file())?;
        example::copy_if_absent(&shell.root().join("examples/hello"), &installation.project())?;
        Ok(Self { http: Http::new(&server.ready.ca_file), cli: Cli::new(&installation), server, installation })
    }

    pub(crate) fn installation(&self) -> &Installation {
        &self.installation
    }

    /// Makes the first account when there is none, and signs the command line in.
    pub(crate) fn sign_in(&self, shell: &Shell) -> Result<()> {
        let ready = &self.server.ready;
        // Another operator who signed in there himself stays who he is.
        if self.cli.json(shell, &["cloud", "auth", "whoami"]).is_ok_and(|who| is_signed_in(&who, &ready.api_url)) {
            return Ok(());
        }
        let setup_token = ready.setup_token_file.as_deref().filter(|file| file.exists());
        let (data, mut mint) = (&self.installation.data, self.installation.management_api("token"));
        let token = account::token(shell, &self.http, &ready.api_url, setup_token, data, &mut mint)?;
        let login = ["cloud", "auth", "login", "--token", "-", "--api-url", &ready.api_url];
        self.cli.json_fed(shell, &login, &token).map(drop)
    }

    /// The sample's tenant: an earlier run's, or a new one.
    pub(crate) fn tenant(&self, shell: &Shell, timings: &mut Timings) -> Result<Tenant> {
        let list = self.cli.json(shell, &["cloud", "tenant", "list"])?;
        if let Some(id) = find_tenant(&list, TENANT)? {
            return self.tenant_by_id(shell, &id);
        }
        eprintln!("buying a tenant …");
        let (tenant, phase1) = self.provision(shell, TENANT)?;
        timings.phase1 = Some(phase1);
        Ok(tenant)
    }

    /// Buys a tenant and confirms as the operator; the time is from the confirmation to `awaiting_deploy`.
    pub(crate) fn provision(&self, shell: &Shell, name: &str) -> Result<(Tenant, Duration)> {
        let mut confirmed = Instant::now();
        let bought = self.cli.buy(shell, name, |checkout| {
            confirmed = Instant::now();
            self.cli.json(shell, &["cloud", "checkout", "confirm", checkout]).map(drop)
        })?;
        let phase1 = confirmed.elapsed();
        Ok((self.tenant_by_id(shell, &text(&bought, "/data/id")?)?, phase1))
    }

    fn tenant_by_id(&self, shell: &Shell, id: &str) -> Result<Tenant> {
        tenant_from(&self.cli.json(shell, &["cloud", "tenant", "show", id])?)
    }

    /// Process id of `management-api`.
    pub(crate) fn process(&self) -> u32 {
        self.server.id()
    }

    /// Deploys the sample project.
    pub(crate) fn deploy(&self, shell: &Shell, tenant: &Tenant) -> Result<Deployed> {
        let started = Instant::now();
        let said = self.cli.json(shell, &["cloud", "deploy", "--tenant", &tenant.id])?;
        let wall = started.elapsed();
        let build = said.pointer("/data/build_ms").and_then(Value::as_u64);
        let build = build.with_context(|| format!("the deploy tells no build_ms: {said}"))?;
        Ok(Deployed { wall, build: Duration::from_millis(build) })
    }

    /// Forgets the layers that earlier deploys have built, as on a machine where nothing was ever deployed.
    pub(crate) fn forget_layers(&self) -> Result<()> {
        let caches = self.installation.caches();
        match fs::remove_dir_all(&caches) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", caches.display()))
            }
            _ => Ok(()),
        }
    }

    /// Changes one file of the sample's site.
    pub(crate) fn change_example(&self) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        example::change_page(&self.installation.project(), &now.as_nanos().to_string())
    }

    /// The page over TLS is the project's, byte for byte, and the app stands on its own database.
    pub(crate) fn verify(&self, shell: &Shell, tenant: &Tenant) -> Result<()> {
        let expected = example::page(&self.installation.project())?;
        self.wait_for(shell, &tenant.url, |status, body| status == 200 && body == expected)?;
        self.verify_answers(shell, tenant)
    }

    /// The tenant answers beside its database, whatever its page is by now: a page that was edited and not deployed
    /// yet is its owner's business.
    pub(crate) fn verify_answers(&self, shell: &Shell, tenant: &Tenant) -> Result<()> {
        self.wait_for(shell, &tenant.url, |status, _| status == 200)?;
        let health = self.wait_for(shell, &format!("{}api/v1/health", tenant.url), |status, _| status == 200)?;
        match current_database(&health) {
            Some(database) => {
                eprintln!("{} answers 200 with its page; its database is {database}", tenant.url);
                Ok(())
            }
            None => bail!("the app's health does not show its database: {health}"),
        }
    }

    fn wait_for(&self, shell: &Shell, url: &str, good: impl Fn(u16, &str) -> bool) -> Result<String> {
        let deadline = Instant::now() + ANSWERS_WITHIN;
        loop {
            let answer = self.http.get(shell, url);
            match answer {
                Ok(answer) if good(answer.status, &answer.body) => return Ok(answer.body),
                Ok(answer) if Instant::now() > deadline => {
                    let begin: String = answer.body.chars().take(300).collect();
                    bail!("{url} answers {} with something else than expected:\n{begin}", answer.status);
                }
                Err(error) if Instant::now() > deadline => return Err(error),
                Ok(_) | Err(_) => {}
            }
            shell.interrupts.check()?;
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Blocks until a person interrupts.
    pub(crate) fn stay(&mut self) -> Result<()> {
        self.server.stay()
    }

    /// Drains and stops everything.
    pub(crate) fn stop(self) -> Result<()> {
        eprintln!("stopping …");
        self.server.stop()
    }

    /// Takes the control plane away and leaves instances and databases running.
    pub(crate) fn kill(self) -> Result<()> {
        self.server.kill()
    }

    pub(crate) fn log_file(&self) -> PathBuf {
        self.installation.log_file()
    }

    pub(crate) fn log_tail(&self) -> String {
        self.server.log_tail()
    }
}

/// Makes what is missing of a folder. PostgreSQL and the tenants run as other users and have to get through, whatever
/// our umask is.
fn make_passable(folder: &Path) -> std::io::Result<()> {
    for folder in folder.ancestors().take_while(|path| !path.exists()).collect::<Vec<_>>().into_iter().rev() {
        fs::create_dir(folder)?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o711))?;
    }
    Ok(())
}

/// Whether the cloud itself took the token, and as an operator's: `up` confirms what it buys.
fn is_signed_in(who: &Value, api_url: &str) -> bool {
    let said = who.pointer("/data/api_url").and_then(Value::as_str);
    let same = said.is_some_and(|said| said.trim_end_matches('/') == api_url.trim_end_matches('/'));
    same && who.pointer("/data/role").is_some_and(|role| role == "operator")
}

fn find_tenant(list: &Value, name: &str) -> Result<Option<String>> {
    let tenants = list.pointer("/data/tenants").and_then(Value::as_array).context("the list of tenants is no list")?;
    let found = tenants.iter().find(|tenant| tenant["name"] == name && tenant["status"] != "failed");
    found.map(|tenant| text(tenant, "/id")).transpose()
}

fn tenant_from(shown: &Value) -> Result<Tenant> {
    let url = text(shown, "/data/app_url")?;
    Ok(Tenant {
        id: text(shown, "/data/id")?,
        url: if url.ends_with('/') { url } else { url + "/" },
        is_new: shown.pointer("/data/release").is_none_or(Value::is_null),
    })
}

fn current_database(health: &str) -> Option<String> {
    let health: Value = serde_json::from_str(health).ok()?;
    health.pointer("/checks/database/name")?.as_str().map(str::to_owned)
}

fn text(value: &Value, pointer: &str) -> Result<String> {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.map(str::to_owned).with_context(|| format!("the command line's answer has no {pointer}: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_example_s_tenant_is_found_unless_it_failed() {
        let list = json!({ "data": { "tenants": [
            { "id": "a", "name": "other", "status": "running" },
            { "id": "b", "name": "hello", "status": "failed" },
            { "id": "c", "name": "hello", "status": "running" },
        ], "total": 3 } });
        assert_eq!(find_tenant(&list, "hello").unwrap().as_deref(), Some("c"));
        assert_eq!(find_tenant(&list, "absent").unwrap(), None);
        assert!(find_tenant(&json!({ "data": [] }), "hello").is_err());
    }

    #[test]
    fn only_an_operator_whom_this_cloud_took_is_signed_in() {
        let who = |url: &str, role| json!({ "data": { "api_url": url, "role": role } });
        assert!(is_signed_in(&who("https://api.z:1/", json!("operator")), "https://api.z:1"));
        assert!(!is_signed_in(&who("https://api.z:1", json!("member")), "https://api.z:1"));
        assert!(!is_signed_in(&who("https://api.z:1", json!(null)), "https://api.z:1"), "refused");
        assert!(!is_signed_in(&who("https://api.z:2", json!("operator")), "https://api.z:1"), "another cloud");
    }

    #[test]
    fn a_tenant_without_a_release_is_new() {
        let shown = |release| json!({ "data": { "id": "a", "app_url": "https://a.z", "release": release } });
        let new = Tenant { id: "a".into(), url: "https://a.z/".into(), is_new: true };
        assert_eq!(tenant_from(&shown(json!(null))).unwrap(), new);
        assert!(!tenant_from(&shown(json!({ "digest": "sha256:1" }))).unwrap().is_new);
    }

    #[test]
    fn the_database_is_the_one_the_server_named() {
        let health = r#"{"status":"healthy","checks":{"database":{"status":"healthy","name":"sp_3f2a91c04b7d"}}}"#;
        assert_eq!(current_database(health).as_deref(), Some("sp_3f2a91c04b7d"));
        assert_eq!(current_database(r#"{"checks":{"database":{"name":null}}}"#), None);
    }
}
