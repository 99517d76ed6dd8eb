//! Bad input and missing things: an error that says what to do, and nothing lost.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TestApp, World, push, until};
use reqwest::Method;
use serde_json::json;
use std::{fs, process::Command};
use systemprompt_contract::paths;

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_that_fails_leaves_the_old_release_serving() -> anyhow::Result<()> {
    let stack = Stack::start_with(&Start { arguments: &["--healthy-within", "2"], ..Start::default() }).await?;
    let tenant = stack.provision("careful").await?;
    TestApp { behaviour: "healthy", text: "first" }.release(&stack, &tenant).await?;

    for (behaviour, code) in [("crash", "app_crashed"), ("sick", "app_unhealthy"), ("silent", "app_unhealthy")] {
        let failed = TestApp { behaviour, text: "second" }.deploy(&stack, &tenant).await?;
        ensure!(failed["status"] == "failed" && failed["error"]["code"] == code, "{behaviour}: {failed}");
        let (status, body) = stack.get(&tenant, "/").await?;
        ensure!(status == 200 && body == "first", "{behaviour}: {status} {body}");
        stack.wait_status(&tenant, "running").await?;
        let view = stack.call(Method::GET, &paths::tenant(tenant.id, "/status"), None).await?;
        let message = view["data"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains("the last deploy failed") && message.contains(code), "{behaviour}: {view}");
    }
    TestApp { behaviour: "healthy", text: "third" }.release(&stack, &tenant).await?;
    let view = stack.call(Method::GET, &paths::tenant(tenant.id, "/status"), None).await?;
    ensure!(view["data"]["message"].is_null(), "{view}");
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_shows_the_last_lines_of_an_app_that_crashes_and_exits_non_zero() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("loud").await?;
    fs::write(tenant.project.join("services/behaviour"), "crash\n")?;
    let (id, app) = (tenant.id.to_string(), e2e::program("tenant-app")?.display().to_string());
    let arguments = ["cloud", "deploy", "--tenant", &id, "--binary", &app];
    let failed = stack.cli(&tenant, &arguments).await?;
    ensure!(!failed.ok && failed.stdout.is_empty(), "{failed:?}");
    ensure!(failed.stderr.contains("the configuration is missing its most important line"), "{failed:?}");
    ensure!(failed.stderr.contains("code 7") && failed.stderr.contains("systemprompt cloud logs"), "{failed:?}");
    let failed = stack.cli(&tenant, &[&["--json"], &arguments[..]].concat()).await?.json()?;
    ensure!(failed["error"]["code"] == "app_crashed", "{failed}");
    ensure!(failed["error"]["logs"].as_array().is_some_and(|lines| lines.len() >= 2), "{failed}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_cannot_run_are_refused_before_anything_starts() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("strict").await?;
    let other = stack.provision("other").await?;

    let pushed = TestApp { behaviour: "healthy", text: "x" }.push(&stack, &tenant).await?;
    let others = pushed.image.replace(&tenant.id.to_string(), &other.id.to_string());
    let refused = deploy(&stack, &tenant, &json!({ "image": others })).await;
    ensure!(refused.contains("image_mismatch") && refused.contains(&pushed.image), "{refused}");
    // The other tenant cannot run what was pushed for this one, not even by its digest.
    let refused = deploy(&stack, &other, &json!({ "image": others, "digest": pushed.digest })).await;
    ensure!(refused.contains("image_not_found"), "{refused}");
    let refused = deploy(&stack, &other, &json!({ "image": others })).await;
    ensure!(refused.contains("image_not_found"), "{refused}");
    let refused = deploy(&stack, &tenant, &json!({ "image": pushed.image, "digest": "sha256:short" })).await;
    ensure!(refused.contains("bad_request"), "{refused}");

    let mut image = TestApp { behaviour: "healthy", text: "x" }.build(&stack)?;
    without_entrypoint(&mut image)?;
    match push(&stack, &tenant, &image).await {
        Err(error) => ensure!(format!("{error:#}").contains("ENTRYPOINT"), "{error:#}"),
        Ok(pushed) => {
            let refused = deploy(&stack, &tenant, &json!({ "image": pushed.image, "digest": pushed.digest })).await;
            ensure!(refused.contains("image_invalid") && refused.contains("ENTRYPOINT"), "{refused}");
        }
    }
    World::look(&stack).await?.check(&[tenant.id, other.id], &[])
}

async fn deploy(stack: &Stack, tenant: &e2e::TenantRef, body: &serde_json::Value) -> String {
    match stack.call(Method::POST, &paths::tenant(tenant.id, "/deploy"), Some(body)).await {
        Ok(answer) => format!("accepted: {answer}"),
        Err(error) => error.to_string(),
    }
}

fn without_entrypoint(image: &mut systemprompt_oci::BuiltImage) -> anyhow::Result<()> {
    let mut config: serde_json::Value = serde_json::from_slice(&image.config)?;
    config["config"]["Entrypoint"] = json!(null);
    config["config"]["Cmd"] = json!(null);
    image.config = serde_json::to_vec(&config)?.into();
    let mut manifest: serde_json::Value = serde_json::from_slice(&image.manifest)?;
    let digest = systemprompt_oci::Digest::of(&image.config);
    manifest["config"]["digest"] = json!(digest.to_string());
    manifest["config"]["size"] = json!(image.config.len());
    image.config_descriptor.digest = digest;
    image.config_descriptor.size = image.config.len() as u64;
    image.manifest = serde_json::to_vec(&manifest)?.into();
    image.digest = systemprompt_oci::Digest::of(&image.manifest);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_deploys_at_once_are_one_and_a_conflict_or_the_same() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("twice").await?;
    let pushed = TestApp { behaviour: "healthy", text: "once" }.push(&stack, &tenant).await?;
    let url = format!("{}{}", stack.api_url(), paths::tenant(tenant.id, "/deploy"));
    let call = |key: &'static str| {
        let body = json!({ "image": pushed.image, "digest": pushed.digest });
        let request = stack.client().post(&url).bearer_auth(stack.token().expose()).header("idempotency-key", key);
        async move {
            let answer = request.json(&body).send().await?;
            let status = answer.status().as_u16();
            anyhow::Ok((status, answer.json::<serde_json::Value>().await?))
        }
    };
    let (first, again, other) = tokio::try_join!(call("one"), call("one"), call("two"))?;
    let accepted: Vec<_> = [&first, &again, &other].into_iter().filter(|(status, _)| *status == 202).collect();
    let refused: Vec<_> = [&first, &again, &other].into_iter().filter(|(status, _)| *status == 409).collect();
    ensure!(!accepted.is_empty() && accepted.len() + refused.len() == 3, "{first:?} {again:?} {other:?}");
    let operations: std::collections::BTreeSet<String> =
        accepted.iter().map(|(_, body)| body["data"]["operation_id"].to_string()).collect();
    ensure!(operations.len() == 1, "one operation: {operations:?}");
    ensure!(refused.iter().all(|(_, body)| body["error"]["code"] == "operation_in_progress"), "{refused:?}");
    stack.wait_status(&tenant, "running").await?;
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])
}

#[tokio::test(flavor = "multi_thread")]
async fn an_app_that_dies_is_started_again_and_its_owner_is_told_why() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("mortal").await?;
    TestApp { behaviour: "mortal", text: "back" }.release(&stack, &tenant).await?;
    // Also the first end, and one that the app calls a good one.
    for (times, path, exit) in [("once", "/leave", "code 0"), ("2 times", "/die", "code 9")] {
        let died = stack.get(&tenant, path).await;
        ensure!(died.as_ref().map_or(true, |(status, _)| *status == 502), "{died:?}");
        let mut status = serde_json::Value::Null;
        until("its end is told", async || {
            let answer = stack.call(Method::GET, &paths::tenant(tenant.id, "/status"), None).await;
            status = answer.unwrap_or_default();
            let message = status["data"]["message"].as_str().unwrap_or_default();
            message.contains(&format!("restarted {times} since")) && message.contains(exit)
        })
        .await
        .with_context(|| status.to_string())?;
        ensure!(status["data"]["status"] == "running", "{status}");
        until("it answers again", async || stack.get(&tenant, "/").await.is_ok_and(|(status, _)| status == 200))
            .await?;
    }
    World::look(&stack).await?.check(&[tenant.id], &[tenant.id])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_serves_is_started_again_while_a_sick_release_is_waited_for() -> anyhow::Result<()> {
    let stack = Stack::start_with(&Start { arguments: &["--healthy-within", "3600"], ..Start::default() }).await?;
    let tenant = stack.provision("guarded").await?;
    TestApp { behaviour: "mortal", text: "serves" }.release(&stack, &tenant).await?;
    let sick =
        TestApp { behaviour: "sick", text: "never" }.push(&stack, &tenant).await?.submit(&stack, &tenant).await?;
    until("the sick release runs beside it", async || {
        World::look(&stack).await.is_ok_and(|world| world.instances.len() == 2)
    })
    .await?;
    for ended in ["/die", "/leave"] {
        let _ = stack.get(&tenant, ended).await;
        until("it answers again", async || {
            stack.get(&tenant, "/").await.is_ok_and(|(status, body)| status == 200 && body == "serves")
        })
        .await?;
    }
    let view = stack.call(Method::GET, &format!("/api/v1/operations/{sick}"), None).await?;
    ensure!(view["data"]["status"] == "running", "{view}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn names_with_odd_characters_are_kept_or_refused_with_a_reason() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let kept = "Zoë's «shop» — 北京 \"x\" <b>'; DROP TABLE tenants; --";
    let tenant = stack.provision(kept).await?;
    let view = stack.call(Method::GET, &paths::tenant(tenant.id, ""), None).await?;
    ensure!(view["data"]["name"] == kept, "{view}");
    for bad in ["", " x", "a\nb", "\u{202e}evil", &"x".repeat(65)] {
        let request = json!({ "price_id": "pri_standard", "region": "iad", "name": bad });
        let refused = stack.call(Method::POST, paths::CHECKOUT, Some(&request)).await;
        ensure!(refused.as_ref().is_err_and(|error| error.to_string().contains("bad_request")), "{bad:?}: {refused:?}");
    }
    Ok(())
}

/// As many as the engine runs at once wait for apps that never answer.
#[tokio::test(flavor = "multi_thread")]
async fn deploys_that_wait_hold_up_no_provision() -> anyhow::Result<()> {
    let stack = Stack::start_with(&Start { arguments: &["--healthy-within", "300"], ..Start::default() }).await?;
    for number in 0..16 {
        let tenant = stack.provision(&format!("silent {number}")).await?;
        TestApp { behaviour: "silent", text: "" }.push(&stack, &tenant).await?.submit(&stack, &tenant).await?;
    }
    until("all wait", async || World::look(&stack).await.is_ok_and(|world| world.instances.len() == 16)).await?;
    stack.provision("quick").await?;
    // They still wait: it was not one of their slots that became free.
    let open = World::look(&stack).await?.open_operations;
    ensure!(open.len() == 16, "{open:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_in_the_middle_of_a_deploy_changes_nothing() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("impatient").await?;
    let pushed = TestApp { behaviour: "healthy", text: "there" }.push(&stack, &tenant).await?;
    let operation = pushed.submit(&stack, &tenant).await?;
    // A follower that hangs up at once.
    let url = format!("{}{}", stack.api_url(), paths::tenant(tenant.id, "/events"));
    drop(stack.client().get(url).bearer_auth(stack.token().expose()).send().await?);
    let view = e2e::wait_over(&stack, &operation).await?;
    ensure!(view["status"] == "succeeded", "{view}");
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "there", "{status} {body}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_control_plane_is_refused_by_directory_and_by_port() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let error = stack.serve_twice(&stack.data())?;
    ensure!(error.contains("in use by another management-api") && error.contains("--data"), "{error}");
    let holder = fs::read_to_string(stack.data().join("lock"))?;
    ensure!(error.contains(&format!("`kill {}`", holder.trim())), "{holder}: {error}");
    let elsewhere = tempfile::tempdir()?;
    let error = stack.serve_twice(elsewhere.path())?;
    ensure!(error.contains(&stack.https_port().to_string()) && error.contains("--https"), "{error}");
    ensure!(error.matches("Address already in use").count() == 1, "said once: {error}");
    stack.terminate()
}

#[test]
fn a_taken_port_of_the_api_in_clear_is_said_with_its_option() -> anyhow::Result<()> {
    let mut stack = Stack::prepare()?;
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = taken.local_addr()?.to_string();
    let output = Command::new(e2e::program("management-api")?)
        .args(["serve", "--https", "127.0.0.1:0", "--http", "off", "--http-api", &address, "--data"])
        .arg(stack.data())
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && error.contains(&address) && error.contains("--http-api"), "{error}");
    ensure!(!stack.data().join("postgres").exists(), "said before anything was made");
    // But for keys, which the next start takes.
    let data = stack.data();
    let files = ["keys/seal.key", "ca/ca-key.pem", "ca/ca.pem", "ca/edge.sealed"];
    let keys = || files.map(|file| fs::read(data.join(file)).ok());
    let made = keys();
    ensure!(made.iter().all(Option::is_some), "not all keys are there");
    stack.serve(&Start::default())?;
    ensure!(keys() == made, "the next start made keys of its own");
    stack.terminate()
}

#[test]
fn a_missing_or_old_postgresql_is_said_with_what_to_type() -> anyhow::Result<()> {
    let stack = Stack::prepare()?;
    let data = stack.data();
    fs::create_dir_all(&data)?;
    let program = e2e::program("management-api")?;
    let old = "mkdir -p /usr/lib/postgresql/14/bin && cd /usr/lib/postgresql/14/bin && \
               printf '#!/bin/sh\\necho \"postgres (PostgreSQL) 14.9\"\\n' >postgres && cp postgres initdb && \
               chmod 755 postgres initdb";
    for (installed, wanted) in [("true", "apt-get install"), (old, "found 14")] {
        // A mount namespace of its own, in which nothing else is installed.
        let script = format!(
            "mount -t tmpfs none /usr/lib/postgresql && {installed} && \
             PATH=/nowhere exec {} serve --data {} --https 127.0.0.1:0 --http off",
            program.display(),
            data.display()
        );
        let output =
            Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output()?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && error.contains("PostgreSQL") && error.contains(wanted), "{error}");
        ensure!(error.contains("15"), "what is needed: {error}");
    }
    Ok(())
}

#[test]
fn a_start_that_fails_leaves_nothing_running() -> anyhow::Result<()> {
    let stack = Stack::prepare()?;
    // A mount namespace of its own, in which there is no bubblewrap.
    let script = format!(
        "mount --bind /dev/null /usr/bin/bwrap && exec {} serve --data {} --https 127.0.0.1:0 --http off --on-stop stop",
        e2e::program("management-api")?.display(),
        stack.data().display()
    );
    let output = Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c", &script]).output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && error.contains("bubblewrap"), "{error}");
    for cluster in ["control", "tenants"] {
        ensure!(!stack.data().join("postgres").join(cluster).join("postmaster.pid").exists(), "{cluster} still runs");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_made_cluster_is_made_anew() -> anyhow::Result<()> {
    let mut stack = Stack::prepare()?;
    let half = stack.data().join("postgres/control.init-tmp");
    fs::create_dir_all(&half)?;
    fs::write(half.join("PG_VERSION"), "15\n")?;
    stack.serve(&Start::default())?;
    ensure!(!half.exists(), "the half cluster is gone");
    stack.terminate()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_while_pushing_is_said_and_nothing_is_lost() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("full").await?;
    let app = TestApp { behaviour: "healthy", text: "fits" };
    app.release(&stack, &tenant).await?;
    stack.terminate()?;
    let registry = stack.data().join("registry");
    let size: u64 = directory_size(&registry)?;
    // The registry moves to a file system with little room left.
    let moved = stack.data().join("registry-moved");
    fs::rename(&registry, &moved)?;
    fs::create_dir(&registry)?;
    let mount = TmpfsMount::new(&registry, size + 4 * 1024 * 1024)?;
    ensure!(Command::new("cp").arg("-a").arg(format!("{}/.", moved.display())).arg(&registry).status()?.success());
    stack.serve(&Start::default())?;
    let mut image = TestApp { behaviour: "healthy", text: "does not fit" }.build(&stack)?;
    big_layer(&stack, &mut image)?;
    let error = push(&stack, &tenant, &image).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains("disk") && error.contains("full"), "{error}");
    // That was refused by its length. One of unknown length is refused when the disk is really full.
    let before = World::look(&stack).await?;
    let (status, text) = endless_blob(&stack, &tenant).await?;
    ensure!(status == 507 && text.contains("disk is full"), "{status} {text}");
    let uploads = registry.join("tenants").join(tenant.id.to_string()).join("uploads");
    let staged = fs::read_dir(&uploads)?.flatten().filter_map(|upload| Some(upload.metadata().ok()?.len()));
    ensure!(staged.sum::<u64>() == 0, "nothing half-pushed keeps the disk full");
    ensure!(World::look(&stack).await? == before, "nothing came and nothing went");
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "fits", "{status} {body}");
    TestApp { behaviour: "healthy", text: "fits" }.release(&stack, &tenant).await?;
    stack.terminate()?;
    drop(mount);
    Ok(())
}

/// Sends 8 MiB in pieces, without saying how many will come.
async fn endless_blob(stack: &Stack, tenant: &e2e::TenantRef) -> anyhow::Result<(u16, String)> {
    let token = stack.call(Method::GET, &paths::tenant(tenant.id, "/registry-token"), None).await?;
    let part = |name: &str| token["data"][name].as_str().unwrap_or_default().to_owned();
    let digest = systemprompt_oci::Digest::of(b"never comes to its end");
    let url = format!("https://{}/v2/{}/blobs/uploads/?digest={digest}", part("registry"), part("repository"));
    let pieces = futures_util::stream::iter((0..128).map(|_| Ok::<_, std::io::Error>(vec![7_u8; 1 << 16])));
    let request = stack.client().post(url).basic_auth("x", Some(part("token")));
    let answer = request.body(reqwest::Body::wrap_stream(pieces)).send().await?;
    Ok((answer.status().as_u16(), answer.text().await?))
}

/// A layer of 8 MiB that does not compress, beside the others.
fn big_layer(stack: &Stack, image: &mut systemprompt_oci::BuiltImage) -> anyhow::Result<()> {
    let mut content = vec![0; 8 * 1024 * 1024];
    let mut seed = 1u64;
    for byte in &mut content {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = seed.to_be_bytes()[0];
    }
    let path = stack.data().join("big-layer");
    fs::write(&path, &content)?;
    let digest = systemprompt_oci::Digest::of(&content);
    let mut descriptor = image.layers[0].descriptor.clone();
    descriptor.digest = digest;
    descriptor.size = content.len() as u64;
    image.layers.push(systemprompt_oci::StoredLayer { descriptor, diff_id: digest, path });
    Ok(())
}

fn directory_size(directory: &std::path::Path) -> anyhow::Result<u64> {
    let output = Command::new("du").args(["-sb", "--apparent-size"]).arg(directory).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().unwrap_or("0").parse()?)
}

struct TmpfsMount(std::path::PathBuf);

impl TmpfsMount {
    fn new(at: &std::path::Path, size: u64) -> anyhow::Result<Self> {
        let options = format!("size={size},mode=0700");
        ensure!(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status()?.success());
        Ok(Self(at.to_owned()))
    }
}

impl Drop for TmpfsMount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
