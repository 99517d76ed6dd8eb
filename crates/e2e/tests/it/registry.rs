//! The registry as other people's programs use it: through the edge, over TLS, with the local CA and nothing else.

use anyhow::{Context as _, bail, ensure};
use e2e::{Stack, TenantRef, TestApp, wait_over};
use reqwest::Method;
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use systemprompt_contract::{IMAGE_REPOSITORY, TenantId, TenantTag, paths};
use systemprompt_oci::{BuiltImage, media_type};
use tempfile::TempDir;
use tokio::process::Command;

#[tokio::test(flavor = "multi_thread")]
async fn what_skopeo_pushed_is_what_runs_and_what_comes_back() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("skopeo").await?;
    let client = Client::new(&stack)?;
    let token = Token::of(&stack, tenant.id).await?;
    let image = TestApp { behaviour: "healthy", text: "pushed by skopeo" }.build(&stack)?;
    let layout = client.layout("in", &image)?;
    done(client.skopeo_push(&token, &layout, &token.image()).output().await?)?;

    // Without a digest the tag counts, and the answer says what it stood for.
    let digest = deploy(&stack, &tenant, &token.image()).await?;
    ensure!(digest == image.digest.to_string(), "pushed {}, accepted {digest}", image.digest);
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "pushed by skopeo", "{status} {body}");

    let by_digest = format!("{}/{IMAGE_REPOSITORY}@{}", token.registry, image.digest);
    for (folder, name) in [("tag", token.image()), ("digest", by_digest)] {
        done(client.skopeo_pull(&token, &name, folder).output().await?)?;
        for (digest, pushed) in blobs(&image)? {
            let pulled = fs::read(client.path(folder).join("blobs/sha256").join(&digest))
                .with_context(|| format!("{digest} by {folder}"))?;
            ensure!(pulled == pushed, "{digest} came back by {folder} with other bytes");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_podman_pushed_runs_and_podman_can_pull_it() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("podman").await?;
    let client = Client::new(&stack)?;
    let token = Token::of(&stack, tenant.id).await?;
    let image = TestApp { behaviour: "healthy", text: "pushed by podman" }.build(&stack)?;
    let layout = client.layout("in", &image)?;
    let local = done(client.podman_moves("one", "pull").arg(format!("oci:{}", layout.display())).output().await?)?;
    ensure!(local == image.config_descriptor.digest.hex(), "podman names images by their configuration: {local}");
    done(
        client.podman_moves("one", "push").args(client.access(&token)).args([&local, &token.image()]).output().await?,
    )?;

    let digest = deploy(&stack, &tenant, &token.image()).await?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "pushed by podman", "{status} {body}");

    // Into an empty store: the same image, under the very digest that runs.
    let pull = client.podman_moves("two", "pull").args(client.access(&token)).arg(token.image()).output().await?;
    ensure!(done(pull)? == local, "another image came back");
    let inspect = ["image", "inspect", "--format", "{{.Digest}}", &local];
    let pulled = done(client.podman("two").args(inspect).output().await?)?;
    ensure!(pulled == digest, "pulled {pulled}, runs {digest}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_opens_one_tenants_tag_and_nothing_else() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let (victim, attacker) = (stack.provision("victim").await?, stack.provision("attacker").await?);
    let client = Client::new(&stack)?;
    let (theirs, own) = (Token::of(&stack, victim.id).await?, Token::of(&stack, attacker.id).await?);
    let image = TestApp { behaviour: "healthy", text: "the victim's" }.build(&stack)?;
    let layout = client.layout("victim", &image)?;
    done(client.skopeo_push(&theirs, &layout, &theirs.image()).output().await?)?;
    let other = TestApp { behaviour: "healthy", text: "the attacker's" }.build(&stack)?;
    let layout = client.layout("attacker", &other)?;
    // The token is a good one.
    done(client.skopeo_push(&own, &layout, &own.image()).output().await?)?;

    // Somebody else's tag is refused in the words for one that never was.
    let absent = Token { tag: TenantTag(TenantId::new()).to_string(), ..own.clone() };
    let mut words = Vec::new();
    for tag in [&theirs, &absent] {
        let image = tag.image();
        let push = refused(client.skopeo_push(&own, &layout, &image).output().await?)?;
        let pull = refused(client.skopeo_pull(&own, &image, "stolen").output().await?)?;
        let with_podman = client.podman_moves("thief", "pull").args(client.access(&own)).arg(&image).output().await?;
        let told = [push, pull, refused(with_podman)?];
        words.push(told.map(|text| without_times(&text.replace(&tag.tag, "TAG"))));
    }
    ensure!(words[0] == words[1], "somebody else's and absent differ: {words:#?}");
    // So is what the tag stands for, by its digest.
    let by_digest = format!("{}/{IMAGE_REPOSITORY}@{}", own.registry, image.digest);
    refused(client.skopeo_pull(&own, &by_digest, "stolen").output().await?)?;
    ensure!(!client.path("stolen").join("index.json").exists(), "something came with the refusal");
    // And whoever has no token, or none of ours.
    for secret in ["", "sp_live_x", stack.token().expose()] {
        let stranger = Token { secret: secret.to_owned(), ..theirs.clone() };
        refused(client.skopeo_pull(&stranger, &theirs.image(), "stolen").output().await?)?;
        refused(client.skopeo_push(&stranger, &layout, &theirs.image()).output().await?)?;
    }

    // The victim's tag still stands for the victim's image.
    let digest = deploy(&stack, &victim, &theirs.image()).await?;
    ensure!(digest == image.digest.to_string(), "{digest}");
    let (status, body) = stack.get(&victim, "/").await?;
    ensure!(status == 200 && body == "the victim's", "{status} {body}");
    Ok(())
}

/// What `registry-token` says, asked as `https://localhost`: programs without a resolver for `*.localhost` do so.
#[derive(Clone)]
struct Token {
    registry: String,
    secret: String,
    tag: String,
}

impl Token {
    async fn of(stack: &Stack, tenant: TenantId) -> anyhow::Result<Self> {
        let url = format!("https://localhost:{}{}", stack.https_port(), paths::tenant(tenant, "/registry-token"));
        let answer = stack.client().get(url).bearer_auth(stack.token().expose()).send().await?.error_for_status()?;
        let answer: Value = answer.json().await?;
        let part = |name: &str| answer["data"][name].as_str().map(str::to_owned).context("a text");
        let (registry, secret, tag) = (part("registry")?, part("token")?, part("tag")?);
        ensure!(registry == format!("localhost:{}", stack.https_port()), "named as it was called: {registry}");
        ensure!(part("repository")? == IMAGE_REPOSITORY && tag == TenantTag(tenant).to_string(), "{answer}");
        Ok(Self { registry, secret, tag })
    }

    fn image(&self) -> String {
        format!("{}/{IMAGE_REPOSITORY}:{}", self.registry, self.tag)
    }

    fn credentials(&self) -> String {
        format!("x:{}", self.secret)
    }
}

/// Skopeo and podman with everything they keep in one folder.
struct Client {
    folder: TempDir,
}

impl Client {
    fn new(stack: &Stack) -> anyhow::Result<Self> {
        // Podman takes the path of a layout for an image name, which must be in lower case, and wants it short.
        let name = format!("sp-clients-{}", TenantId::new().slug());
        let folder = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir()?;
        fs::create_dir(folder.path().join("certs"))?;
        fs::copy(stack.ca_file(), folder.path().join("certs/ca.crt"))?;
        fs::write(folder.path().join("policy.json"), r#"{"default":[{"type":"insecureAcceptAnything"}]}"#)?;
        // Its locks would be in the memory that the whole machine shares.
        fs::write(folder.path().join("containers.conf"), "[engine]\nlock_type = \"file\"\n")?;
        Ok(Self { folder })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An OCI image layout with the image in it, as the `oci:` transport reads it.
    fn layout(&self, name: &str, image: &BuiltImage) -> anyhow::Result<PathBuf> {
        let layout = self.path(name);
        fs::create_dir_all(layout.join("blobs/sha256"))?;
        for (digest, content) in blobs(image)? {
            fs::write(layout.join("blobs/sha256").join(digest), content)?;
        }
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let index = json!({ "schemaVersion": 2, "manifests": [{
            "mediaType": media_type::OCI_MANIFEST,
            "digest": image.digest.to_string(),
            "size": image.manifest.len(),
        }]});
        fs::write(layout.join("index.json"), index.to_string())?;
        Ok(layout)
    }

    fn skopeo_push(&self, token: &Token, layout: &Path, image: &str) -> Command {
        let mut skopeo = self.skopeo("--dest-creds", token);
        skopeo.arg("--dest-cert-dir").arg(self.path("certs"));
        skopeo.args([format!("oci:{}", layout.display()), format!("docker://{image}")]);
        skopeo
    }

    /// Finds the CA in `SSL_CERT_FILE`, as a machine that trusts it as a whole would have it.
    fn skopeo_pull(&self, token: &Token, image: &str, folder: &str) -> Command {
        let mut skopeo = self.skopeo("--src-creds", token);
        skopeo.env("SSL_CERT_FILE", self.path("certs/ca.crt"));
        skopeo.args([format!("docker://{image}"), format!("oci:{}", self.path(folder).display())]);
        skopeo
    }

    fn skopeo(&self, credentials: &str, token: &Token) -> Command {
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--quiet", "--preserve-digests"]);
        skopeo.args([credentials, &token.credentials()]).env("TMPDIR", self.folder.path()).kill_on_drop(true);
        skopeo
    }

    /// With a store of its own; `store` tells several apart.
    fn podman(&self, store: &str) -> Command {
        let mut podman = Command::new("podman");
        for part in ["root", "runroot", "tmpdir"] {
            podman.arg(format!("--{part}")).arg(self.path(&format!("{store}-{part}")));
        }
        podman.args(["--storage-driver", "vfs", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        podman
            .env("CONTAINERS_CONF", self.path("containers.conf"))
            .env("TMPDIR", self.folder.path())
            .kill_on_drop(true);
        podman
    }

    /// `pull` or `push`.
    fn podman_moves(&self, store: &str, how: &str) -> Command {
        let mut podman = self.podman(store);
        podman.args([how, "--quiet", "--signature-policy"]).arg(self.path("policy.json"));
        podman
    }

    fn access(&self, token: &Token) -> [String; 4] {
        let certs = self.path("certs").display().to_string();
        ["--cert-dir".to_owned(), certs, "--creds".to_owned(), token.credentials()]
    }
}

/// Every blob of the image by the hex of its digest.
fn blobs(image: &BuiltImage) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let mut blobs = vec![
        (image.digest.hex(), image.manifest.to_vec()),
        (image.config_descriptor.digest.hex(), image.config.to_vec()),
    ];
    for layer in &image.layers {
        blobs.push((layer.descriptor.digest.hex(), fs::read(&layer.path)?));
    }
    Ok(blobs)
}

/// Deploys without naming a digest and waits for its good end; returns the digest that was accepted.
async fn deploy(stack: &Stack, tenant: &TenantRef, image: &str) -> anyhow::Result<String> {
    let request = json!({ "image": image });
    let accepted = stack.call(Method::POST, &paths::tenant(tenant.id, "/deploy"), Some(&request)).await?;
    let operation = accepted["data"]["operation_id"].as_str().context("operation_id")?;
    let view = wait_over(stack, operation).await?;
    ensure!(view["status"] == "succeeded", "{view}\n{}", stack.log_tail());
    Ok(accepted["data"]["digest"].as_str().context("digest")?.to_owned())
}

/// What a program that succeeded printed.
fn done(output: Output) -> anyhow::Result<String> {
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// What a program said that was refused by the registry, and failed for no other reason.
fn refused(output: Output) -> anyhow::Result<String> {
    let said = String::from_utf8(output.stderr)?;
    let by_registry = ["denied", "unauthorized", "authentication required", "manifest unknown"];
    if output.status.success() || !by_registry.iter().any(|word| said.to_lowercase().contains(word)) {
        bail!("expected a refusal, got {}: {said}", output.status);
    }
    Ok(said)
}

/// Log lines begin with a time: `time="…" level=…`.
fn without_times(text: &str) -> String {
    let line = |line: &str| line.split_once(" level=").map_or_else(|| line.to_owned(), |(_, rest)| rest.to_owned());
    text.lines().map(line).collect::<Vec<_>>().join("\n")
}
