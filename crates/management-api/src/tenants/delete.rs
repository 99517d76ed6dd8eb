//! Deletion. The request itself takes the tenant out of every list and its host out of the routes; this workflow takes
//! down what runs and, with `purge`, everything that is left. Deleting goes forward only: every step is repeated until it
//! holds, and one that cannot go on parks the operation.

use super::{
    FOREVER,
    provision::{Nothing, again, destroy_app},
    routes, store,
};
use crate::app::Infrastructure;
use serde::{Deserialize, Serialize};
use systemprompt_contract::{AppName, Subject, TenantId};
use systemprompt_workflow::{Completion, Step, StepContext, StepError, Workflow};

/// Takes a deleted tenant down; with `purge` its data goes too.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct DeleteTenant {
    pub(crate) tenant: TenantId,
    pub(crate) purge: bool,
}

type Cx = StepContext<DeleteTenant>;
type Outcome = Result<Completion<Nothing>, StepError>;

const FORWARD: &str = "deleting goes forward only";

impl Workflow for DeleteTenant {
    const NAME: &'static str = "delete_tenant";
    type Context = Infrastructure;
    type State = Nothing;

    fn steps() -> Vec<Step<Self>> {
        vec![
            Step::new("settle", settle).retry(FOREVER).no_undo(FORWARD).pivot(),
            Step::new("stop", stop).retry(FOREVER).no_undo(FORWARD),
            Step::new("destroy", destroy).retry(FOREVER).no_undo(FORWARD),
            Step::new("database", drop_database).retry(FOREVER).no_undo(FORWARD),
            Step::new("images", remove_images).retry(FOREVER).no_undo(FORWARD),
            Step::new("forget", forget).retry(FOREVER).no_undo(FORWARD),
        ]
    }
}

/// Waits until no other operation works on the tenant; the request has asked it to stop. A parked one would never end
/// and is given up: the steps below find by name whatever it left. Every error is worth another try, for this step
/// makes the deletion irrevocable.
async fn settle(cx: Cx, state: Nothing) -> Outcome {
    let subject = Subject::Tenant(cx.input.tenant);
    let mut tx = cx.db.begin().await.map_err(again)?;
    systemprompt_workflow::give_up_stuck(&mut tx, subject).await.map_err(again)?;
    let others = systemprompt_workflow::active_for(&mut *tx, subject).await.map_err(again)?;
    if others.iter().any(|id| *id != cx.operation) {
        return Err(again("another operation on this tenant is ending"));
    }
    Ok(Completion::in_tx(state, tx))
}

/// Only when no edge leads there any more: open requests end, and no edge finds another tenant at the address.
async fn stop(cx: Cx, state: Nothing) -> Outcome {
    routes::wait_settled(cx.db.pool(), cx.input.tenant).await?;
    let app = app_name(&cx);
    for found in cx.app.driver.instances().await.map_err(again)? {
        if found.app == app {
            cx.app.driver.stop(&found.handle, cx.app.limits.stop_grace).await.map_err(again)?;
        }
    }
    let mut tx = cx.db.begin().await?;
    store::retire_all(&mut tx, cx.input.tenant).await?;
    Ok(Completion::in_tx(state, tx))
}

async fn destroy(cx: Cx, state: Nothing) -> Outcome {
    if cx.input.purge {
        destroy_app(&cx.app, cx.input.tenant).await?;
    }
    Ok(Completion::new(state))
}

async fn drop_database(cx: Cx, state: Nothing) -> Outcome {
    if cx.input.purge {
        cx.app.databases.drop(&cx.input.tenant.slug().database()).await.map_err(again)?;
    }
    Ok(Completion::new(state))
}

async fn remove_images(cx: Cx, state: Nothing) -> Outcome {
    if cx.input.purge {
        cx.app.registry.remove_tenant(cx.input.tenant).await.map_err(again)?;
    }
    Ok(Completion::new(state))
}

/// The last step: the row goes (secrets and deployments with it), or waits for its purge.
async fn forget(cx: Cx, state: Nothing) -> Outcome {
    let mut tx = cx.db.begin().await?;
    if cx.input.purge {
        sqlx::query!("DELETE FROM tenants WHERE id = $1", cx.input.tenant.uuid()).execute(&mut *tx).await?;
    } else {
        sqlx::query!(
            "UPDATE tenants SET active_operation = NULL, live_deployment = NULL WHERE id = $1 AND phase = 'deleted'",
            cx.input.tenant.uuid()
        )
        .execute(&mut *tx)
        .await?;
    }
    Ok(Completion::in_tx(state, tx))
}

fn app_name(cx: &Cx) -> AppName {
    cx.input.tenant.slug().app_name()
}
