//! SIGKILL at every step boundary and inside steps: everything converges, nothing is left, nothing is there twice.

use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TestApp, World, until};
use futures_util::{StreamExt as _, stream};
use reqwest::Method;
use systemprompt_contract::{TenantId, paths};

const BOUNDARIES: [&str; 4] = ["before_intent", "after_intent", "after_act", "after_commit"];
const PROVISION: [&str; 6] = ["reserve", "secrets", "app", "database", "route", "ready"];
const DEPLOY: [&str; 6] = ["verify", "launch", "probe", "switch", "retire", "finish"];
const DELETE: [&str; 6] = ["settle", "stop", "destroy", "database", "images", "forget"];

/// All boundaries of a workflow's steps, and behind the act of each step named in `inside`, what is inside of it.
fn points(workflow: &str, steps: &[&str], inside: &[(&str, &[&str])]) -> Vec<String> {
    let mut points = Vec::new();
    for step in steps {
        for boundary in BOUNDARIES {
            if boundary == "after_act" {
                let inside = inside.iter().filter(|(of, _)| of == step).flat_map(|(_, points)| *points);
                points.extend(inside.map(|point| (*point).to_owned()));
            }
            points.push(format!("{workflow}.{step}.{boundary}"));
        }
    }
    points
}

/// The journal of the last operation of a workflow has these steps: none is missing in the list above.
async fn has_steps(stack: &Stack, workflow: &str, steps: &[&str]) -> anyhow::Result<()> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    let query = "SELECT name FROM operation_steps WHERE operation_id =
                   (SELECT id FROM operations WHERE workflow = $1 ORDER BY created_at DESC LIMIT 1) ORDER BY position";
    let found: Vec<String> = sqlx::query_scalar(query).bind(workflow).fetch_all(&mut control).await?;
    ensure!(found == steps, "steps of {workflow}: expected {steps:?}, found {found:?}");
    Ok(())
}

/// Kills the control plane at every point in turn, each time finishing the work of the one before up to there.
async fn through(stack: &mut Stack, points: &[String], begin: impl AsyncFnOnce(&Stack)) -> anyhow::Result<()> {
    stack.terminate()?;
    let (first, rest) = points.split_first().context("points")?;
    stack.serve(&Start { crash_point: Some(first), ..Start::default() })?;
    // Its answer may die with the process: that it was taken is what the test is about.
    begin(stack).await;
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
    let inside: [(&str, &[&str]); 2] = [
        ("app", &["compute.app.directory", "compute.app.storage"]),
        ("database", &["provision_tenant.database.after_role", "provision_tenant.database.after_create"]),
    ];
    let points = points("provision_tenant", &PROVISION, &inside);
    let checkout = stack.order("crashing").await?;
    through(&mut stack, &points, async |stack| drop(stack.confirm(&checkout).await)).await?;
    let tenant = stack.bought(&checkout).await?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    has_steps(&stack, "provision_tenant", &PROVISION).await?;
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
    let launch = ["locked", "recorded", "firewall", "namespace", "network", "unpacking", "image", "cgroup", "spawned"];
    let launch: Vec<_> = launch.iter().chain(&["ordered"]).map(|at| format!("compute.launch.{at}")).collect();
    let launch: Vec<_> = launch.iter().map(String::as_str).collect();
    let inside: [(&str, &[&str]); 2] = [("launch", &launch), ("retire", &["compute.stop.told", "compute.stop.killed"])];
    let points = points("deploy_tenant", &DEPLOY, &inside);
    through(&mut stack, &points, async |stack| {
        drop(second.submit(stack, &tenant).await);
    })
    .await?;
    stack.wait_status(&tenant, "running").await?;
    has_steps(&stack, "deploy_tenant", &DEPLOY).await?;
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
    let inside: [(&str, &[&str]); 3] = [
        ("stop", &["compute.stop.told", "compute.stop.killed"]),
        ("destroy", &["compute.destroy.discarded"]),
        ("database", &["databases.drop.after_database"]),
    ];
    let points = points("delete_tenant", &DELETE, &inside);
    through(&mut stack, &points, async |stack| {
        let path = format!("{}?purge=true", paths::tenant(tenant.id, ""));
        drop(stack.call(Method::DELETE, &path, None).await);
    })
    .await?;
    settled(&stack, &[], &[]).await?;
    has_steps(&stack, "delete_tenant", &DELETE).await?;
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

/// The registry is in the same process: a push that is cut by its end goes on where it stood.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_after_the_control_plane_was_killed_in_the_middle() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("cut-off").await?;
    let token = stack.call(Method::GET, &paths::tenant(tenant.id, "/registry-token"), None).await?;
    let part = |name: &str| token["data"][name].as_str().map(str::to_owned).context("a text");
    let (registry, password) = (format!("https://{}", part("registry")?), part("token")?);
    let repository = format!("{registry}/v2/{}", part("repository")?);
    let content: Vec<u8> =
        (0..6_u32 << 18).flat_map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
    let client = stack.client().clone();
    let request = |method, url: &str| client.request(method, url).basic_auth("x", Some(&password));
    let begun = request(Method::POST, &format!("{repository}/blobs/uploads/")).send().await?.error_for_status()?;
    let location = begun.headers()["location"].to_str()?.to_owned();
    let upload = format!("{registry}{location}");

    // Four of six megabytes come, then nothing any more until the control plane is gone.
    let (never, silence) = tokio::sync::oneshot::channel::<()>();
    let first = bytes::Bytes::copy_from_slice(&content[..4 << 20]);
    let body = stream::iter([Ok::<_, std::io::Error>(first)]).chain(stream::once(async move {
        let _ = silence.await;
        Ok(bytes::Bytes::new())
    }));
    let patch = tokio::spawn(request(Method::PATCH, &upload).body(reqwest::Body::wrap_stream(body)).send());
    let file = stack.data().join("registry/tenants").join(tenant.id.to_string()).join("uploads");
    let file = file.join(location.rsplit('/').next().context("an id")?);
    let stored = || std::fs::metadata(&file).map_or(0, |file| file.len());
    until("a megabyte is stored", async || stored() >= 1 << 20).await?;
    stack.kill()?;
    drop(never);
    ensure!(patch.await?.map_or(true, |answer| !answer.status().is_success()), "the push was cut off");
    let length = stored();
    stack.serve(&Start::default())?;

    let status = request(Method::GET, &upload).send().await?.error_for_status()?;
    let next = usize::try_from(length)?;
    ensure!(status.headers()["range"] == format!("0-{}", next - 1), "{:?}", status.headers());
    let digest = systemprompt_oci::Digest::of(&content);
    let put = request(Method::PUT, &format!("{upload}?digest={digest}"))
        .header("content-range", format!("{next}-{}", content.len() - 1))
        .body(content[next..].to_vec());
    put.send().await?.error_for_status()?;
    let pulled = request(Method::GET, &format!("{repository}/blobs/{digest}")).send().await?.error_for_status()?;
    ensure!(pulled.bytes().await? == content, "other bytes came back");
    ensure!(!file.exists(), "the upload is over");
    settled(&stack, &[tenant.id], &[]).await
}

/// The world as it must be, once what still runs has ended.
pub(crate) async fn settled(stack: &Stack, tenants: &[TenantId], running: &[TenantId]) -> anyhow::Result<()> {
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
    let mut operation = Ok(String::new());
    through(&mut stack, &undos.collect::<Vec<_>>(), async |stack| operation = bad.submit(stack, &tenant).await).await?;
    let view = e2e::wait_over(&stack, &operation?).await?;
    ensure!(view["status"] == "failed" && view["error"]["code"] == "app_crashed", "{view}");
    stack.wait_status(&tenant, "running").await?;
    let (status, _) = stack.get(&tenant, "/").await?;
    ensure!(status == 200, "the old release still serves: {status}");
    settled(&stack, &[tenant.id], &[tenant.id]).await
}

/// Healthy once is not healthy now: the new app dies while nobody is there to see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_died_after_its_probe_is_not_switched_to() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("doubtful").await?;
    TestApp { behaviour: "healthy", text: "first" }.release(&stack, &tenant).await?;
    let old = app_processes(&tenant)?;
    let second = TestApp { behaviour: "healthy", text: "second" }.push(&stack, &tenant).await?;
    stack.terminate()?;
    stack.serve_edge()?;
    let point = Some("deploy_tenant.probe.after_commit");
    stack.serve(&Start { crash_point: point, without_edge: true, ..Start::default() })?;
    let stop = tokio_util::sync::CancellationToken::new();
    let url = format!("{}/", tenant.url);
    let clients = e2e::LoadClients::new(&stack.ca_file(), &tenant.url)?;
    let load = tokio::spawn(e2e::open_loop(clients, url, 20, stop.clone()));
    let operation = second.submit(&stack, &tenant).await?;
    stack.wait_died()?;
    for process in app_processes(&tenant)?.into_iter().filter(|process| !old.contains(process)) {
        let process = rustix::process::Pid::from_raw(process).context("a process")?;
        rustix::process::kill_process(process, rustix::process::Signal::KILL)?;
    }
    until("the new app is dead", async || app_processes(&tenant).is_ok_and(|left| left == old)).await?;

    stack.serve(&Start { without_edge: true, ..Start::default() })?;
    let view = e2e::wait_over(&stack, &operation).await?;
    ensure!(view["status"] == "failed" && view["error"]["code"] == "app_crashed", "{view}");
    stack.wait_status(&tenant, "running").await?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "first", "{status} {body}");
    stop.cancel();
    let report = load.await?;
    ensure!(report.sent > 0 && report.failed == 0, "{report:?}");
    settled(&stack, &[tenant.id], &[tenant.id]).await
}

/// Pids of the tenant's app, oldest first.
fn app_processes(tenant: &e2e::TenantRef) -> anyhow::Result<Vec<i32>> {
    let mut found = Vec::new();
    let wanted = format!("TENANT_ID={}", tenant.id);
    for process in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(environment) = std::fs::read(process.path().join("environ")) else { continue };
        let Ok(command) = std::fs::read_to_string(process.path().join("comm")) else { continue };
        if command.trim() == "systemprompt" && environment.split(|b| *b == 0).any(|text| text == wanted.as_bytes()) {
            found.push(pid);
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Whoever stops the cloud in the middle of a deploy stops the new instance too: that is not the app's failure.
#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_goes_on_after_the_cloud_was_stopped() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("interrupted").await?;
    let app = TestApp { behaviour: "healthy", text: "there" }.push(&stack, &tenant).await?;
    stack.terminate()?;
    stack.serve(&Start { crash_point: Some("deploy_tenant.launch.after_commit"), ..Start::default() })?;
    let operation = app.submit(&stack, &tenant).await?;
    stack.wait_died()?;
    stack.stop_what_is_left()?;
    stack.serve(&Start::default())?;
    let view = e2e::wait_over(&stack, &operation).await?;
    ensure!(view["status"] == "succeeded", "{view}");
    settled(&stack, &[tenant.id], &[tenant.id]).await?;
    let (status, body) = stack.get(&tenant, "/").await?;
    ensure!(status == 200 && body == "there", "{status} {body}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_dies_under_the_control_plane_is_started_again() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("before").await?;
    stack.kill_clusters()?;
    until("the control plane answers again", async || stack.status(&tenant).await.is_ok()).await?;
    let after = stack.provision("after").await?;
    settled(&stack, &[tenant.id, after.id], &[]).await
}

/// These tests can fail: a step that does nothing is seen, whatever the journal says.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_step_is_seen() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let checkout = stack.order("broken").await?;
    stack.terminate()?;
    let skip = Some("provision_tenant.database");
    stack.serve(&Start { skip, crash_point: Some("provision_tenant.database.after_act"), ..Start::default() })?;
    drop(stack.confirm(&checkout).await);
    stack.wait_died()?;
    stack.serve(&Start { skip, ..Start::default() })?;
    let tenant = stack.bought(&checkout).await?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    let checked = World::look(&stack).await?.check(&[tenant.id], &[]);
    ensure!(checked.as_ref().is_err_and(|error| error.to_string().contains("databases")), "{checked:?}");
    Ok(())
}

/// Nor is one that does not undo, or does not delete, missed.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_way_back_is_seen() -> anyhow::Result<()> {
    let mut stack = Stack::start().await?;
    let tenant = stack.provision("broken").await?;
    let sick = TestApp { behaviour: "sick", text: "" }.push(&stack, &tenant).await?;
    let arguments = &["--healthy-within", "1"];
    stack.terminate()?;
    stack.serve(&Start { skip: Some("deploy_tenant.launch.undo"), arguments, ..Start::default() })?;
    let mut checked = Ok(());
    // Whoever looks for what no row knows may be faster once, but not always.
    for _ in 0..4 {
        let view = e2e::wait_over(&stack, &sick.submit(&stack, &tenant).await?).await?;
        ensure!(view["status"] == "failed", "{view}");
        checked = World::look(&stack).await?.check(&[tenant.id], &[]);
        if checked.is_err() {
            break;
        }
    }
    ensure!(checked.as_ref().is_err_and(|error| error.to_string().contains("instances:")), "{checked:?}");

    stack.terminate()?;
    stack.serve(&Start { skip: Some("delete_tenant.images"), ..Start::default() })?;
    let path = format!("{}?purge=true", paths::tenant(tenant.id, ""));
    let accepted = stack.call(Method::DELETE, &path, None).await?;
    e2e::wait_over(&stack, accepted["data"]["operation_id"].as_str().context("an operation")?).await?;
    let checked = World::look(&stack).await?.check(&[], &[]);
    ensure!(checked.as_ref().is_err_and(|error| error.to_string().contains("tenants that are gone")), "{checked:?}");
    Ok(())
}

/// The look at the world can fail, and what it finds is taken away: a database, an app that no row knows.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_row_knows_is_found_and_taken_away() -> anyhow::Result<()> {
    use sqlx::Executor as _;
    let mut stack = Stack::start().await?;
    World::look(&stack).await?.check(&[], &[])?;
    let mut cluster = e2e::connect(&stack, "tenants", "postgres").await?;
    cluster.execute("CREATE ROLE sp_0123456789ab").await?;
    cluster.execute("CREATE DATABASE sp_0123456789ab OWNER sp_0123456789ab").await?;
    let orphan = World::look(&stack).await?.check(&[], &[]);
    ensure!(orphan.is_err_and(|error| error.to_string().contains("sp_0123456789ab")), "the orphan is seen");
    settled(&stack, &[], &[]).await?;

    let tenant = stack.provision("known").await?;
    let apps = stack.data().join("compute/apps");
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .arg(apps.join(tenant.id.slug().app_name().as_str()))
        .arg(apps.join("sp-0123456789ab"))
        .status()?;
    ensure!(copied.success() && World::look(&stack).await?.check(&[tenant.id], &[]).is_err(), "the orphan is seen");
    settled(&stack, &[tenant.id], &[]).await?;

    // Blobs are collected once an hour, and at the start.
    let registry = stack.data().join("registry");
    let orphans =
        [registry.join("blobs").join("00".repeat(32)), registry.join("tenants").join(TenantId::new().to_string())];
    std::fs::write(&orphans[0], "no tenant's")?;
    std::fs::create_dir(&orphans[1])?;
    let seen = World::look(&stack).await?.check(&[tenant.id], &[]);
    ensure!(seen.is_err_and(|error| error.to_string().contains("tenants that are gone")), "the folder is seen");
    std::fs::remove_dir(&orphans[1])?;
    let seen = World::look(&stack).await?.check(&[tenant.id], &[]);
    ensure!(seen.is_err_and(|error| error.to_string().contains(&"00".repeat(32))), "the blob is seen");
    std::fs::create_dir(&orphans[1])?;
    stack.terminate()?;
    stack.serve(&Start::default())?;
    settled(&stack, &[tenant.id], &[]).await
}
