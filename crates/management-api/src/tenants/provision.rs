//! Phase 1: from a confirmed checkout to `awaiting_deploy`. No instance is made.
//!
//! | step | makes | undo |
//! |---|---|---|
//! | reserve | nothing: the row came with the confirmation; `tenant_created` | phase `failed`, `provisioning_failed` |
//! | secrets | generated, sealed | rows deleted |
//! | app | app and volume at the driver | destroyed |
//! | database | role and database | dropped |
//! | route | host -> `awaiting_deploy` | host gone |
//! | ready | phase, `infrastructure_ready`, `tenant_ready` | none: the last step |

use super::{
    routes, secrets,
    state::TenantEvent,
    store::{self, Moved},
};
use crate::app::Infrastructure;
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;
use std::time::Duration;
use systemprompt_compute::{AppHandle, AppSpec, DriverError, Next};
use systemprompt_contract::{
    ApiError, CheckoutId, ErrorCode, Event, ProvisioningEvent, ProvisioningEventType, Subject, TenantId, TenantName,
    TenantPhase, TenantStatus,
};
use systemprompt_edge::{Route, Why};
use systemprompt_workflow::{Completion, Probe, Retry, Step, StepContext, StepError, Workflow};

/// What to provision; everything else stands in the tenant's row.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ProvisionTenant {
    pub(crate) tenant: TenantId,
    pub(crate) checkout: CheckoutId,
    pub(crate) name: TenantName,
}

/// What steps hand to later steps: nothing, since every name is derived from the tenant's id.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Nothing {}

type Cx = StepContext<ProvisionTenant>;
type Outcome = Result<Completion<Nothing>, StepError>;

/// About an hour: it is paid for, and a full disk or a lost server is mended by whoever runs the host.
const PAID: Retry =
    Retry { attempts: 720, first: Duration::from_millis(200), max: Duration::from_secs(5), jitter: 0.3 };

impl Workflow for ProvisionTenant {
    const NAME: &'static str = "provision_tenant";
    type Context = Infrastructure;
    type State = Nothing;

    fn steps() -> Vec<Step<Self>> {
        vec![
            Step::new("reserve", reserve).undo(undo_reserve),
            Step::new("secrets", make_secrets).undo(undo_secrets),
            Step::new("app", make_app).retry(PAID).undo(undo_app),
            Step::new("database", make_database).retry(PAID).probe(find_database).undo(undo_database),
            Step::new("route", publish_route).undo(undo_route),
            Step::new("ready", ready).no_undo("the last step: it happened or it did not"),
        ]
    }

    fn parked(cx: &Cx, _: &Nothing, because: &ApiError) -> Vec<(Subject, Event)> {
        let reason = cx.failure.as_ref().unwrap_or(because);
        let text = format!(
            "{} What was made for it could not all be taken back: an operator has to, or you delete the tenant.",
            reason.message
        );
        events(cx, ProvisioningEventType::ProvisioningFailed, &text).into()
    }
}

async fn reserve(cx: Cx, state: Nothing) -> Outcome {
    let mut tx = cx.db.begin().await?;
    if !lock_own(&mut tx, &cx).await? {
        return Err(gone());
    }
    Ok(announced(
        &cx,
        Completion::in_tx(state, tx),
        ProvisioningEventType::TenantCreated,
        "Reserved the tenant's names.",
    ))
}

/// The row stays, so that its owner can read why; everything else was undone before.
async fn undo_reserve(cx: Cx, state: Nothing) -> Outcome {
    let reason = cx.failure.as_ref().map_or_else(|| "unknown".to_owned(), ToString::to_string);
    let mut tx = cx.db.begin().await?;
    match store::advance(
        &mut tx,
        cx.input.tenant,
        TenantEvent::ProvisionFailed,
        Moved { failure: Some(&reason), ..Moved::default() },
    )
    .await
    {
        Ok(_) => {}
        // Deleted meanwhile: nothing to mark, but whoever follows the checkout still waits for its end.
        Err(store::MoveError::Gone | store::MoveError::Illegal(_)) => {
            let [to_checkout, _] = events(&cx, ProvisioningEventType::ProvisioningFailed, &reason);
            return Ok(Completion::in_tx(state, tx).event(to_checkout.0, to_checkout.1));
        }
        Err(store::MoveError::Database(error)) => return Err(error.into()),
    }
    Ok(announced(&cx, Completion::in_tx(state, tx), ProvisioningEventType::ProvisioningFailed, &reason))
}

async fn make_secrets(cx: Cx, state: Nothing) -> Outcome {
    let mut tx = cx.db.begin().await?;
    secrets::generate(&mut tx, &cx.app.seal, cx.input.tenant).await?;
    Ok(announced(
        &cx,
        Completion::in_tx(state, tx),
        ProvisioningEventType::SecretsStored,
        "Generated and sealed its secrets.",
    ))
}

async fn undo_secrets(cx: Cx, state: Nothing) -> Outcome {
    let mut tx = cx.db.begin().await?;
    sqlx::query!("DELETE FROM tenant_secrets WHERE tenant_id = $1", cx.input.tenant.uuid()).execute(&mut *tx).await?;
    Ok(Completion::in_tx(state, tx))
}

async fn make_app(cx: Cx, state: Nothing) -> Outcome {
    let tenant = store::tenant(cx.db.pool(), cx.input.tenant).await?.ok_or_else(gone)?;
    let handle = app_of(&cx.app, &tenant).await.map_err(until_there_is_room)?;
    let mut tx = cx.db.begin().await?;
    store::set_app_handle(&mut tx, tenant.id, Some(handle.as_str())).await?;
    Ok(Completion::in_tx(state, tx))
}

async fn undo_app(cx: Cx, state: Nothing) -> Outcome {
    destroy_app(&cx.app, cx.input.tenant).await?;
    let mut tx = cx.db.begin().await?;
    store::set_app_handle(&mut tx, cx.input.tenant, None).await?;
    Ok(Completion::in_tx(state, tx))
}

async fn make_database(cx: Cx, state: Nothing) -> Outcome {
    let tenant = cx.input.tenant;
    let mut secrets = secrets::open_all(cx.db.pool(), &cx.app.seal, tenant).await?;
    let password = secrets
        .remove(secrets::DATABASE_PASSWORD)
        .ok_or_else(|| internal("the database password is missing among the tenant's secrets"))?;
    cx.app.databases.ensure(&tenant.slug().database(), &password).await.map_err(again)?;
    Ok(database_made(&cx, state))
}

/// Making a database is dear, and giving the role its password again would be one more thing to get wrong.
async fn find_database(cx: Cx, state: Nothing) -> Result<Probe<Nothing>, StepError> {
    let complete = cx.app.databases.is_complete(&cx.input.tenant.slug().database()).await.map_err(again)?;
    Ok(if complete { Probe::Done(database_made(&cx, state)) } else { Probe::NotDone })
}

fn database_made(cx: &Cx, state: Nothing) -> Completion<Nothing> {
    announced(cx, Completion::new(state), ProvisioningEventType::DatabaseCreated, "Created its database.")
}

async fn undo_database(cx: Cx, state: Nothing) -> Outcome {
    cx.app.databases.drop(&cx.input.tenant.slug().database()).await.map_err(again)?;
    Ok(Completion::new(state))
}

async fn publish_route(cx: Cx, state: Nothing) -> Outcome {
    let slug = cx.input.tenant.slug();
    let host = slug.hostname(&cx.app.site.zone);
    let mut tx = cx.db.begin().await?;
    if !lock_own(&mut tx, &cx).await? {
        return Err(gone());
    }
    routes::publish(&mut tx, cx.input.tenant, &host, Some(&Route::Unavailable { slug, why: Why::AwaitingDeploy }))
        .await?;
    Ok(Completion::in_tx(state, tx))
}

async fn undo_route(cx: Cx, state: Nothing) -> Outcome {
    let host = cx.input.tenant.slug().hostname(&cx.app.site.zone);
    let mut tx = cx.db.begin().await?;
    // A deletion has taken the route away itself.
    if lock_own(&mut tx, &cx).await? {
        routes::publish(&mut tx, cx.input.tenant, &host, None).await?;
    }
    Ok(Completion::in_tx(state, tx))
}

async fn ready(cx: Cx, state: Nothing) -> Outcome {
    let mut tx = cx.db.begin().await?;
    match store::advance(&mut tx, cx.input.tenant, TenantEvent::Ready, Moved::default()).await {
        Ok(_) => {}
        Err(store::MoveError::Database(error)) => return Err(error.into()),
        Err(error) => return Err(StepError::Permanent(ApiError::new(ErrorCode::Cancelled, error.to_string()))),
    }
    let text = "Its infrastructure stands; deploy to it: systemprompt cloud deploy";
    let ready = announced(&cx, Completion::in_tx(state, tx), ProvisioningEventType::InfrastructureReady, text);
    // Later clients of the existing line wait for `tenant_ready` on the tenant's own stream before they deploy.
    let event = event(&cx, ProvisioningEventType::TenantReady, text, None);
    Ok(ready.event(Subject::Tenant(cx.input.tenant), event))
}

/// The tenant's app at the driver. A handle that a crash kept from being stored is asked for again, which makes
/// nothing twice.
pub(super) async fn app_of(app: &Infrastructure, tenant: &store::Tenant) -> Result<AppHandle, DriverError> {
    if let Some(handle) = &tenant.app_handle {
        return Ok(AppHandle::new(handle.clone()));
    }
    let spec = AppSpec {
        app: tenant.slug().app_name(),
        tenant: tenant.id,
        region: tenant.region,
        memory_mb: tenant.memory_mb,
    };
    app.driver.ensure_app(&spec).await
}

/// Destroys the tenant's app and its volume, found by name: nothing is made in order to be destroyed. An app that is
/// not there is destroyed already, and every error is worth another try.
pub(super) async fn destroy_app(app: &Infrastructure, tenant: TenantId) -> Result<(), StepError> {
    let name = tenant.slug().app_name();
    for found in app.driver.apps().await.map_err(again)?.into_iter().filter(|found| found.app == name) {
        app.driver.destroy_app(&found.handle).await.map_err(again)?;
    }
    Ok(())
}

/// Locks the tenant's row; false when a deletion has taken the tenant over. Before any other lock, as the deletion
/// does it, or the two could wait for each other.
async fn lock_own(tx: &mut PgTransaction<'_>, cx: &Cx) -> Result<bool, sqlx::Error> {
    let tenant = store::lock(tx, cx.input.tenant).await?;
    Ok(tenant.is_some_and(|tenant| tenant.phase == TenantPhase::Provisioning))
}

pub(super) fn gone() -> StepError {
    StepError::Permanent(deleted())
}

pub(super) fn deleted() -> ApiError {
    ApiError::new(ErrorCode::Cancelled, "the tenant was deleted meanwhile")
}

/// Adds the event to the checkout's and the tenant's stream.
fn announced(
    cx: &Cx,
    completion: Completion<Nothing>,
    event_type: ProvisioningEventType,
    message: &str,
) -> Completion<Nothing> {
    let [to_checkout, to_tenant] = events(cx, event_type, message);
    completion.event(to_checkout.0, to_checkout.1).event(to_tenant.0, to_tenant.1)
}

fn events(cx: &Cx, event_type: ProvisioningEventType, message: &str) -> [(Subject, Event); 2] {
    let checkout = cx.input.checkout;
    [
        (Subject::Checkout(checkout), event(cx, event_type, message, Some(checkout))),
        (Subject::Tenant(cx.input.tenant), event(cx, event_type, message, None)),
    ]
}

fn event(cx: &Cx, event_type: ProvisioningEventType, message: &str, checkout: Option<CheckoutId>) -> Event {
    use ProvisioningEventType as T;
    let slug = cx.input.tenant.slug();
    let status = match event_type {
        T::InfrastructureReady | T::TenantReady => TenantStatus::AwaitingDeploy,
        T::ProvisioningFailed => TenantStatus::Failed { reason: String::new() },
        _ => TenantStatus::Provisioning,
    };
    Event::Provisioning(ProvisioningEvent {
        checkout_session_id: checkout,
        tenant_id: cx.input.tenant,
        tenant_name: cx.input.name.to_string(),
        event_type,
        status: status.as_str().to_owned(),
        message: Some(message.to_owned()),
        app_url: Some(cx.app.site.app_url(&slug)),
        fly_app_name: Some(slug.app_name().to_string()),
    })
}

/// A driver's error as a step's: what it says to do next decides.
#[allow(clippy::needless_pass_by_value, reason = "used as map_err(driver_error)")]
pub(super) fn driver_error(error: DriverError) -> StepError {
    match (error.next(), &error) {
        (Next::Retry, _) => StepError::Transient(error.to_string()),
        (_, DriverError::Capacity { .. }) => {
            StepError::Permanent(ApiError::new(ErrorCode::CapacityExhausted, error.to_string()))
        }
        // What a driver refuses for good is the image: it cannot be unpacked or has nothing to run.
        (_, DriverError::Rejected(_)) => {
            StepError::Permanent(ApiError::new(ErrorCode::ImageInvalid, error.to_string()))
        }
        _ => StepError::Permanent(ApiError::new(ErrorCode::Internal, error.to_string())),
    }
}

fn until_there_is_room(error: DriverError) -> StepError {
    if matches!(error, DriverError::Capacity { .. }) { again(error) } else { driver_error(error) }
}

/// For undos, for what only goes forward and for the tenants' cluster, which may be restarting: whatever went wrong, the
/// way is the same, and a full disk or a lost server comes back.
#[allow(clippy::needless_pass_by_value, reason = "used as map_err(again)")]
pub(super) fn again(error: impl ToString) -> StepError {
    StepError::Transient(error.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err(internal)")]
pub(super) fn internal(error: impl ToString) -> StepError {
    StepError::Permanent(ApiError::new(ErrorCode::Internal, error.to_string()))
}
