//! Phase 2: a pushed image becomes the tenant's live release, or nothing changes.
//!
//! | step | does | undo |
//! |---|---|---|
//! | verify | the image is complete and has a command; with nothing live, requests wait from here on | the last `deployment` frame; phase and route back |
//! | launch | an instance of exactly that digest, beside the old one | its last lines kept, stopped |
//! | probe | two healthy answers in a row | none: it only asks |
//! | switch | two more, then route and release, one transaction: the point of no return | none: the release is live |
//! | retire | every live edge serves the new route; the old instance drained and stopped | none |
//! | finish | phase `running`, the last frame | none |
//!
//! `switch` is the workflow's pivot: once it has committed the engine never unwinds.

use super::{
    FOREVER, databases,
    provision::{again, app_of, deleted, driver_error, gone, internal},
    routes, secrets,
    state::TenantEvent,
    store::{self, Moved},
};
use crate::app::Infrastructure;
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};
use systemprompt_compute::{DriverError, ExitReason, InstanceHandle, InstanceSpec, InstanceState, LogStart};
use systemprompt_contract::{
    ApiError, DeploymentEvent, DeploymentId, DeploymentState, DeploymentStep, ErrorCode, Event, Secret, Subject,
    TenantId, paths,
};
use systemprompt_edge::{Route, Upstream, Why, probe};
use systemprompt_registry::ImageError;
use systemprompt_workflow::{Completion, Probe, Step, StepContext, StepError, Workflow};
use tokio::time::Instant;

/// What to deploy; everything else stands in the deployment's row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DeployTenant {
    pub(crate) tenant: TenantId,
    pub(crate) deployment: DeploymentId,
}

/// What steps hand on.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Progress {
    instance: Option<InstanceHandle>,
    /// The instance that served before.
    old: Option<InstanceHandle>,
    /// Generation of the route to the new instance.
    generation: Option<i64>,
    /// Last lines of an instance that was given up.
    logs: Vec<String>,
}

type Cx = StepContext<DeployTenant>;
type Outcome = Result<Completion<Progress>, StepError>;

/// Healthy answers in a row that make a release.
const HEALTHY_ANSWERS: u32 = 2;
/// Lines of a failed instance that its owner is shown.
const LAST_LINES: usize = 20;
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

impl Workflow for DeployTenant {
    const NAME: &'static str = "deploy_tenant";
    type Context = Infrastructure;
    type State = Progress;

    fn steps() -> Vec<Step<Self>> {
        vec![
            Step::new("verify", verify).undo(undo_verify),
            Step::new("launch", launch).probe(find_launched).undo(undo_launch),
            Step::new("probe", wait_healthy).no_undo("it only asks"),
            Step::new("switch", switch).no_undo("it happened or it did not").pivot(),
            Step::new("retire", retire).retry(FOREVER).no_undo("the release is live"),
            Step::new("finish", finish).retry(FOREVER).no_undo("the release is live"),
        ]
    }

    fn parked(cx: &Cx, state: &Progress, because: &ApiError) -> Vec<(Subject, Event)> {
        let (reason, what) = match &cx.failure {
            Some(failure) => {
                (failure, "What served before still serves, but the rest of this deploy could not be taken back")
            }
            None => (because, "The new release serves, but the deploy could not be brought to its end"),
        };
        let error = ApiError::new(reason.code, format!("{} {what}: an operator has to.", reason.message));
        vec![(Subject::Tenant(cx.input.tenant), failed(cx, state, error.message.clone(), error))]
    }
}

async fn verify(cx: Cx, state: Progress) -> Outcome {
    let deployment = deployment(&cx).await?;
    cx.app.registry.image(cx.input.tenant, &deployment.digest).await.map_err(image_error)?;
    let message = format!("The image is complete: {}", deployment.digest);
    let mut tx = cx.db.begin().await?;
    let tenant = lock(&cx, &mut tx).await?;
    if store::live_deployment(&mut *tx, tenant.id).await?.is_none() {
        publish_unavailable(&cx, &mut tx, Why::Starting).await?;
    }
    Ok(told(&cx, Completion::in_tx(state, tx), DeploymentStep::VerifyImage, message))
}

/// Says the end of a deploy that did not make it and gives the tenant back to what serves.
async fn undo_verify(cx: Cx, state: Progress) -> Outcome {
    let error = cx.failure.clone().unwrap_or_else(|| ApiError::new(ErrorCode::Internal, "the deploy was given up"));
    let mut tx = cx.db.begin().await?;
    store::fail_deployment(&mut tx, cx.input.deployment, &error.to_string()).await?;
    let live = store::live_deployment(&mut *tx, cx.input.tenant).await?;
    let message = match &live {
        Some(release) => format!("{error} The release {} still serves.", short(release.id)),
        None => error.to_string(),
    };
    let event = TenantEvent::DeployFailed { release_is_live: live.is_some() };
    // Whoever did not follow the deploy finds it in the status, until the next one is asked for.
    let shown = format!("the last deploy failed: {message}");
    let moved = Moved { failure: Some(&shown), ..Moved::default() };
    match store::advance(&mut tx, cx.input.tenant, event, moved).await {
        Ok(_) if live.is_none() => publish_unavailable(&cx, &mut tx, Why::AwaitingDeploy).await?,
        // Deleted meanwhile: phase and route are the deletion's.
        Ok(_) | Err(store::MoveError::Illegal(_) | store::MoveError::Gone) => {}
        Err(store::MoveError::Database(error)) => return Err(error.into()),
    }
    let event = failed(&cx, &state, message, error);
    Ok(Completion::in_tx(state, tx).event(Subject::Tenant(cx.input.tenant), event))
}

async fn launch(cx: Cx, state: Progress) -> Outcome {
    let instance = launch_again(&cx).await?;
    launched(&cx, state, instance).await
}

/// The instance of this deployment, if an earlier attempt came so far that it runs.
async fn find_launched(cx: Cx, state: Progress) -> Result<Probe<Progress>, StepError> {
    let found = cx.app.driver.instances().await.map_err(driver_error)?;
    let runs = |state: &InstanceState| matches!(state, InstanceState::Running { .. });
    match found.into_iter().find(|found| found.deployment == cx.input.deployment && runs(&found.state)) {
        Some(found) => Ok(Probe::Done(launched(&cx, state, found.handle).await?)),
        None => Ok(Probe::NotDone),
    }
}

async fn launch_again(cx: &Cx) -> Result<InstanceHandle, StepError> {
    let tenant = store::tenant(cx.db.pool(), cx.input.tenant).await?.ok_or_else(gone)?;
    launch_release(&cx.app, cx.db.pool(), &tenant, &deployment(cx).await?).await
}

async fn launched(cx: &Cx, mut state: Progress, instance: InstanceHandle) -> Outcome {
    let mut tx = cx.db.begin().await?;
    store::set_instance(&mut tx, cx.input.deployment, Some(instance.as_str())).await?;
    state.instance = Some(instance);
    Ok(told(cx, Completion::in_tx(state, tx), DeploymentStep::Launch, "Started the new release.".to_owned()))
}

async fn undo_launch(cx: Cx, mut state: Progress) -> Outcome {
    // The launch may have happened without its journal entry: the driver is asked, not the journal.
    let found = cx.app.driver.instances().await.map_err(again)?;
    for instance in found.into_iter().filter(|found| found.deployment == cx.input.deployment) {
        if state.logs.is_empty() {
            state.logs = last_lines(&cx.app, &instance.handle).await;
        }
        cx.app.driver.stop(&instance.handle, cx.app.limits.stop_grace).await.map_err(again)?;
    }
    state.instance = None;
    Ok(Completion::new(state))
}

async fn wait_healthy(cx: Cx, state: Progress) -> Outcome {
    until_healthy(&cx, &state).await?;
    Ok(told(&cx, Completion::new(state), DeploymentStep::Probe, "Two healthy answers in a row.".to_owned()))
}

/// Waits for two 200s in a row from the health path, asked the way the edge will ask, and says where they came from.
/// An open port never counts.
async fn until_healthy(cx: &Cx, state: &Progress) -> Result<SocketAddr, StepError> {
    let mut instance = state.instance.clone().ok_or_else(|| internal("no instance was launched"))?;
    let mut launched_again = false;
    let host = cx.input.tenant.slug().hostname(&cx.app.site.zone);
    let deadline = Instant::now() + cx.app.limits.healthy_within;
    let mut healthy = 0;
    let mut last = "it does not listen yet".to_owned();
    let mut pause = Duration::from_millis(10);
    loop {
        if cx.cancel.is_cancelled() {
            return Err(StepError::Permanent(ApiError::new(ErrorCode::Cancelled, "the deploy was cancelled")));
        }
        match cx.app.driver.inspect(&instance).await.map_err(driver_error)? {
            // Once: an app that ends so by itself is told from one that was stopped with the cloud by the second time.
            ended if !launched_again && nobody_is_to_blame(&ended) => {
                instance = launch_again(cx).await?;
                launched_again = true;
                healthy = 0;
            }
            InstanceState::Exited { reason, .. } => return Err(crashed(&reason.to_string())),
            InstanceState::Absent => return Err(crashed("it is gone")),
            InstanceState::Starting => healthy = 0,
            InstanceState::Running { address, .. } => {
                match probe(&Upstream::Tcp(address), &host, paths::HEALTH, PROBE_TIMEOUT).await {
                    Ok(answer) if answer.status == 200 => {
                        healthy += 1;
                        if healthy == HEALTHY_ANSWERS {
                            return Ok(address);
                        }
                        continue;
                    }
                    Ok(answer) => {
                        healthy = 0;
                        last = format!("it answered {}", answer.status);
                    }
                    Err(error) => {
                        healthy = 0;
                        last = error.to_string();
                    }
                }
            }
        }
        if Instant::now() >= deadline {
            return Err(unhealthy(cx.app.limits.healthy_within, &last));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_millis(250));
    }
}

/// The host was restarted, or the cloud was stopped and took its instances along (by SIGTERM): not the app's failure.
const fn nobody_is_to_blame(state: &InstanceState) -> bool {
    matches!(
        state,
        InstanceState::Absent
            | InstanceState::Exited { reason: ExitReason::Unknown | ExitReason::Code(0) | ExitReason::Signal(15), .. }
    )
}

/// Route and release in one transaction: before it nothing changed, after it the new release is live.
///
/// The probe is asked again: what it saw was stored, and this may be another process, hours later, with the app long
/// dead.
async fn switch(cx: Cx, mut state: Progress) -> Outcome {
    let address = until_healthy(&cx, &state).await?;
    let slug = cx.input.tenant.slug();
    let mut tx = cx.db.begin().await?;
    let tenant = lock(&cx, &mut tx).await?;
    let old = store::live_deployment(&mut *tx, tenant.id).await?;
    let route = Route::Tenant { slug: slug.clone(), upstream: Upstream::Tcp(address) };
    let generation = routes::publish(&mut tx, tenant.id, &slug.hostname(&cx.app.site.zone), Some(&route)).await?;
    store::make_live(&mut tx, tenant.id, cx.input.deployment).await?;
    state.generation = Some(generation);
    state.old = old.filter(|old| old.id != cx.input.deployment).and_then(|old| old.instance).map(InstanceHandle::new);
    Ok(told(
        &cx,
        Completion::in_tx(state, tx),
        DeploymentStep::SwitchRoute,
        "Traffic goes to the new release.".to_owned(),
    ))
}

/// Old requests end twice over: edges acknowledge a route only when the old upstream's requests are done (or a
/// bound has passed), and the old instance drains on SIGTERM until the grace ends.
async fn retire(cx: Cx, state: Progress) -> Outcome {
    if let (Some(old), Some(generation)) = (&state.old, state.generation) {
        routes::wait_served(cx.db.pool(), generation).await?;
        cx.app.driver.stop(old, cx.app.limits.stop_grace).await.map_err(again)?;
    }
    let message = match state.old {
        Some(_) => "The old release is drained and stopped.",
        None => "There was no old release.",
    };
    Ok(told(&cx, Completion::new(state), DeploymentStep::RetireOld, message.to_owned()))
}

async fn finish(cx: Cx, state: Progress) -> Outcome {
    let mut tx = cx.db.begin().await?;
    let event = match store::advance(&mut tx, cx.input.tenant, TenantEvent::DeploySucceeded, Moved::default()).await {
        Ok(_) => {
            let live = "The release is live.".to_owned();
            Event::Deployment(frame(&cx, DeploymentStep::Finish, DeploymentState::Succeeded, live))
        }
        Err(store::MoveError::Illegal(_) | store::MoveError::Gone) => {
            let error = deleted();
            failed(&cx, &state, error.message.clone(), error)
        }
        Err(store::MoveError::Database(error)) => return Err(error.into()),
    };
    Ok(Completion::in_tx(state, tx).event(Subject::Tenant(cx.input.tenant), event))
}

/// An instance of a release: the first one of a deploy, or another after the last one ended. Idempotent.
pub(crate) async fn launch_release(
    infrastructure: &Infrastructure,
    pool: &sqlx::PgPool,
    tenant: &store::Tenant,
    release: &store::Deployment,
) -> Result<InstanceHandle, StepError> {
    let app = app_of(infrastructure, tenant).await.map_err(driver_error)?;
    let spec = InstanceSpec {
        deployment: release.id,
        tenant: tenant.id,
        image: release.digest,
        env: environment(infrastructure, pool, tenant).await?,
        memory_mb: tenant.memory_mb,
        max_pids: infrastructure.limits.max_pids,
    };
    let launched = infrastructure.driver.launch(&app, &spec).await;
    // It could be pushed, so it could be unpacked then: what is damaged since has to be sent again by the next push.
    if let Err(DriverError::Rejected(_)) = &launched
        && let Err(error) = infrastructure.registry.remove_damaged(tenant.id, &release.digest).await
    {
        tracing::warn!(%error, "looking for damaged blobs");
    }
    launched.map_err(driver_error)
}

/// The environment of every instance, as the README lists it. HOST and PORT are the driver's.
async fn environment(
    infrastructure: &Infrastructure,
    pool: &sqlx::PgPool,
    tenant: &store::Tenant,
) -> Result<BTreeMap<String, Secret>, StepError> {
    let mut secrets = secrets::open_all(pool, &infrastructure.seal, tenant.id).await?;
    let password = secrets
        .remove(secrets::DATABASE_PASSWORD)
        .ok_or_else(|| internal("the database password is missing among the tenant's secrets"))?;
    let known = [secrets::JWT_SECRET, secrets::SYNC_TOKEN];
    let custom: Vec<&str> = secrets.keys().map(String::as_str).filter(|name| !known.contains(name)).collect();
    let custom = custom.join(",");
    let slug = tenant.slug();
    let plain = [
        ("RUST_LOG", "info".to_owned()),
        ("SYSTEMPROMPT_SERVICES_PATH", "/app/services".to_owned()),
        ("WEB_DIR", "/app/web".to_owned()),
        ("DATABASE_TYPE", "postgres".to_owned()),
        ("JWT_ISSUER", "systemprompt".to_owned()),
        ("FLY_APP_NAME", slug.app_name().to_string()),
        ("SYSTEMPROMPT_CUSTOM_SECRETS", custom),
        ("TENANT_ID", tenant.id.to_string()),
        ("APP_URL", infrastructure.site.app_url(&slug)),
    ];
    secrets.insert("DATABASE_URL".to_owned(), databases::instance_url(&slug.database(), &password));
    secrets.extend(plain.map(|(name, value)| (name.to_owned(), Secret::new(value))));
    Ok(secrets)
}

/// The last lines of an instance; an empty list when they cannot be read, since they only explain a failure.
pub(crate) async fn last_lines(infrastructure: &Infrastructure, instance: &InstanceHandle) -> Vec<String> {
    let lines = infrastructure.driver.logs(instance, LogStart::Tail(LAST_LINES), false);
    lines.filter_map(|entry| async { entry.ok().map(|entry| entry.text) }).collect().await
}

/// The tenant's row, locked, as long as it is this deploy's: a deletion takes it over and its route with it.
async fn lock(cx: &Cx, tx: &mut PgTransaction<'_>) -> Result<store::Tenant, StepError> {
    let tenant = store::lock(tx, cx.input.tenant).await?;
    tenant.filter(|tenant| tenant.active_operation == Some(cx.operation)).ok_or_else(gone)
}

async fn publish_unavailable(cx: &Cx, tx: &mut PgTransaction<'_>, why: Why) -> Result<(), sqlx::Error> {
    let slug = cx.input.tenant.slug();
    let host = slug.hostname(&cx.app.site.zone);
    routes::publish(tx, cx.input.tenant, &host, Some(&Route::Unavailable { slug, why })).await.map(drop)
}

async fn deployment(cx: &Cx) -> Result<store::Deployment, StepError> {
    store::deployment(cx.db.pool(), cx.input.deployment).await?.ok_or_else(gone)
}

fn told(cx: &Cx, completion: Completion<Progress>, step: DeploymentStep, message: String) -> Completion<Progress> {
    let event = frame(cx, step, DeploymentState::Running, message);
    completion.event(Subject::Tenant(cx.input.tenant), Event::Deployment(event))
}

/// The last frame of a deploy that did not make it.
fn failed(cx: &Cx, state: &Progress, message: String, error: ApiError) -> Event {
    let frame = frame(cx, DeploymentStep::Finish, DeploymentState::Failed, message);
    Event::Deployment(DeploymentEvent { error: Some(error), logs: state.logs.clone(), ..frame })
}

fn frame(cx: &Cx, step: DeploymentStep, state: DeploymentState, message: String) -> DeploymentEvent {
    DeploymentEvent {
        operation_id: cx.operation,
        deployment_id: cx.input.deployment,
        step,
        state,
        message,
        app_url: cx.app.site.app_url(&cx.input.tenant.slug()),
        error: None,
        logs: Vec::new(),
    }
}

fn short(id: DeploymentId) -> String {
    id.to_string().chars().take(8).collect()
}

fn crashed(reason: &str) -> StepError {
    StepError::Permanent(
        ApiError::new(ErrorCode::AppCrashed, format!("the app ended before it was healthy: {reason}."))
            .hint("Its last lines are shown here; as long as no release is live, all of them: systemprompt cloud logs"),
    )
}

fn unhealthy(within: Duration, last: &str) -> StepError {
    StepError::Permanent(
        ApiError::new(
            ErrorCode::AppUnhealthy,
            format!("expected 200 from {} within {} s, but {last}.", paths::HEALTH, within.as_secs()),
        )
        .hint("The app must listen on HOST:PORT and answer its health path; see: systemprompt cloud logs"),
    )
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err(image_error)")]
fn image_error(error: ImageError) -> StepError {
    let code = match &error {
        ImageError::NotFound => ErrorCode::ImageNotFound,
        ImageError::Store(_) => return StepError::Transient(error.to_string()),
        _ => ErrorCode::ImageInvalid,
    };
    StepError::Permanent(
        ApiError::new(code, error.to_string()).hint("Build and push it again: systemprompt cloud deploy"),
    )
}
