//! Rows of tenants and deployments. One query a function, named for what it answers.

use super::state::{self, TenantEvent};
use chrono::{DateTime, Utc};
use sqlx::{PgExecutor, PgPool, PgTransaction};
use systemprompt_contract::{
    AccountId, CheckoutId, DeploymentId, OperationId, Region, TenantId, TenantName, TenantPhase, TenantSlug,
    TenantStatus,
};
use systemprompt_oci::Digest;
use uuid::Uuid;

/// `tenant_phase` in PostgreSQL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "tenant_phase", rename_all = "snake_case")]
pub(crate) enum StoredPhase {
    Provisioning,
    AwaitingDeploy,
    Deploying,
    Running,
    Stopped,
    Suspended,
    Failed,
    Deleted,
}

impl From<StoredPhase> for TenantPhase {
    fn from(phase: StoredPhase) -> Self {
        match phase {
            StoredPhase::Provisioning => Self::Provisioning,
            StoredPhase::AwaitingDeploy => Self::AwaitingDeploy,
            StoredPhase::Deploying => Self::Deploying,
            StoredPhase::Running => Self::Running,
            StoredPhase::Stopped => Self::Stopped,
            StoredPhase::Suspended => Self::Suspended,
            StoredPhase::Failed => Self::Failed,
            StoredPhase::Deleted => Self::Deleted,
        }
    }
}

impl From<TenantPhase> for StoredPhase {
    fn from(phase: TenantPhase) -> Self {
        match phase {
            TenantPhase::Provisioning => Self::Provisioning,
            TenantPhase::AwaitingDeploy => Self::AwaitingDeploy,
            TenantPhase::Deploying => Self::Deploying,
            TenantPhase::Running => Self::Running,
            TenantPhase::Stopped => Self::Stopped,
            TenantPhase::Suspended => Self::Suspended,
            TenantPhase::Failed => Self::Failed,
            TenantPhase::Deleted => Self::Deleted,
        }
    }
}

/// A tenant's row.
#[derive(Debug, Clone)]
pub(crate) struct Tenant {
    pub(crate) id: TenantId,
    pub(crate) account: AccountId,
    pub(crate) name: String,
    pub(crate) region: Region,
    pub(crate) memory_mb: u32,
    pub(crate) phase: TenantPhase,
    pub(crate) active_operation: Option<OperationId>,
    pub(crate) live_deployment: Option<DeploymentId>,
    pub(crate) app_handle: Option<String>,
    pub(crate) failure: Option<String>,
    pub(crate) created_at: DateTime<Utc>,
    pub(crate) purge_after: Option<DateTime<Utc>>,
}

impl Tenant {
    pub(crate) fn slug(&self) -> TenantSlug {
        self.id.slug()
    }
    /// Whether `release` is live and to be served.
    pub(crate) fn serves(&self, release: DeploymentId) -> bool {
        matches!(self.phase, TenantPhase::Running | TenantPhase::Deploying) && self.live_deployment == Some(release)
    }
    pub(crate) fn status(&self) -> TenantStatus {
        state::status(self.phase, self.failure.as_deref(), self.purge_after)
    }
}

struct TenantRow {
    id: Uuid,
    account_id: Uuid,
    name: String,
    region: String,
    memory_mb: i32,
    phase: StoredPhase,
    active_operation: Option<Uuid>,
    live_deployment: Option<Uuid>,
    app_handle: Option<String>,
    failure: Option<String>,
    created_at: DateTime<Utc>,
    purge_after: Option<DateTime<Utc>>,
}

impl From<TenantRow> for Tenant {
    fn from(row: TenantRow) -> Self {
        Self {
            id: TenantId::from_uuid(row.id),
            account: AccountId::from_uuid(row.account_id),
            name: row.name,
            region: row.region.parse().unwrap_or_default(),
            memory_mb: row.memory_mb.unsigned_abs(),
            phase: row.phase.into(),
            active_operation: row.active_operation.map(OperationId::from_uuid),
            live_deployment: row.live_deployment.map(DeploymentId::from_uuid),
            app_handle: row.app_handle,
            failure: row.failure,
            created_at: row.created_at,
            purge_after: row.purge_after,
        }
    }
}

macro_rules! select_tenants {
    ($condition:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            TenantRow,
            r#"SELECT id, account_id, name, region, memory_mb, phase AS "phase: StoredPhase",
                      active_operation, live_deployment, app_handle, failure, created_at, purge_after
               FROM tenants WHERE "# + $condition
            $(, $argument)*
        )
    };
}

/// One tenant, whoever it belongs to and also when deleted: for workflows and reconcilers.
pub(crate) async fn tenant(pool: &PgPool, id: TenantId) -> Result<Option<Tenant>, sqlx::Error> {
    Ok(select_tenants!("id = $1", id.uuid()).fetch_optional(pool).await?.map(Tenant::from))
}

/// One tenant, its row locked until the transaction ends.
pub(crate) async fn lock(tx: &mut PgTransaction<'_>, id: TenantId) -> Result<Option<Tenant>, sqlx::Error> {
    Ok(select_tenants!("id = $1 FOR UPDATE", id.uuid()).fetch_optional(&mut **tx).await?.map(Tenant::from))
}

/// The tenants of an account that are not deleted, oldest first.
pub(crate) async fn of_account(pool: &PgPool, account: AccountId) -> Result<Vec<Tenant>, sqlx::Error> {
    let rows = select_tenants!("account_id = $1 AND phase <> 'deleted' ORDER BY created_at, id", account.uuid())
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(Tenant::from).collect())
}

/// Every tenant that is not deleted, oldest first: for the operator.
pub(crate) async fn all(pool: &PgPool) -> Result<Vec<Tenant>, sqlx::Error> {
    let rows = select_tenants!("phase <> 'deleted' ORDER BY created_at, id").fetch_all(pool).await?;
    Ok(rows.into_iter().map(Tenant::from).collect())
}

/// Tenants with a release that should be served, whatever else is going on; as [`Tenant::serves`].
pub(crate) async fn serving(pool: &PgPool) -> Result<Vec<Tenant>, sqlx::Error> {
    let rows =
        select_tenants!("phase IN ('running', 'deploying') AND live_deployment IS NOT NULL").fetch_all(pool).await?;
    Ok(rows.into_iter().map(Tenant::from).collect())
}

/// Deleted tenants whose data is due to go and that no operation works on, with the last one that did not get there.
pub(crate) async fn due_for_purge(pool: &PgPool) -> Result<Vec<(TenantId, Option<OperationId>)>, sqlx::Error> {
    let rows = sqlx::query!(
        "SELECT id, active_operation FROM tenants t
         WHERE phase = 'deleted' AND purge_after <= now() AND NOT EXISTS (
             SELECT 1 FROM operations o WHERE o.id = t.active_operation AND o.status NOT IN ('succeeded', 'failed'))"
    )
    .fetch_all(pool)
    .await?;
    let due = |id, active: Option<Uuid>| (TenantId::from_uuid(id), active.map(OperationId::from_uuid));
    Ok(rows.into_iter().map(|row| due(row.id, row.active_operation)).collect())
}

/// Every tenant id there is, deleted ones included: what is not among them is an orphan.
pub(crate) async fn known_ids(pool: &PgPool) -> Result<Vec<TenantId>, sqlx::Error> {
    let ids = sqlx::query_scalar!("SELECT id FROM tenants").fetch_all(pool).await?;
    Ok(ids.into_iter().map(TenantId::from_uuid).collect())
}

/// What phase 1 starts from.
pub(crate) struct NewTenant<'a> {
    pub(crate) id: TenantId,
    pub(crate) account: AccountId,
    pub(crate) checkout: CheckoutId,
    pub(crate) name: &'a TenantName,
    pub(crate) region: Region,
    pub(crate) memory_mb: u32,
    pub(crate) operation: OperationId,
}

/// Reserves id, slug and name. Idempotent on the id.
pub(crate) async fn insert(tx: &mut PgTransaction<'_>, new: &NewTenant<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO tenants (id, account_id, checkout_id, name, region, memory_mb, active_operation)
         VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO NOTHING",
        new.id.uuid(),
        new.account.uuid(),
        new.checkout.uuid(),
        new.name.as_str(),
        new.region.as_str(),
        i32::try_from(new.memory_mb).unwrap_or(i32::MAX),
        new.operation.uuid(),
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Remembers the driver's handle of the app.
pub(crate) async fn set_app_handle(
    tx: &mut PgTransaction<'_>,
    id: TenantId,
    handle: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query!("UPDATE tenants SET app_handle = $2 WHERE id = $1", id.uuid(), handle).execute(&mut **tx).await?;
    Ok(())
}

/// Why a tenant could not be moved on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MoveError {
    #[error(transparent)]
    Illegal(#[from] state::IllegalTransition),
    #[error("the tenant is gone")]
    Gone,
    #[error("storing the tenant's phase")]
    Database(#[from] sqlx::Error),
}

/// What a move leaves behind beside the phase.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Moved<'a> {
    pub(crate) operation: Option<OperationId>,
    pub(crate) failure: Option<&'a str>,
    pub(crate) purge_after: Option<DateTime<Utc>>,
}

/// Applies `event` to the tenant's stored phase, in the caller's transaction.
pub(crate) async fn advance(
    tx: &mut PgTransaction<'_>,
    id: TenantId,
    event: TenantEvent,
    moved: Moved<'_>,
) -> Result<TenantPhase, MoveError> {
    let tenant = lock(tx, id).await?.ok_or(MoveError::Gone)?;
    let phase = state::apply(tenant.phase, event)?;
    sqlx::query!(
        "UPDATE tenants SET phase = $2, active_operation = $3, failure = $4, purge_after = $5,
                ready_at = CASE WHEN $2 = 'awaiting_deploy'::tenant_phase THEN coalesce(ready_at, now()) ELSE ready_at END
         WHERE id = $1",
        id.uuid(),
        StoredPhase::from(phase) as StoredPhase,
        moved.operation.map(OperationId::uuid),
        moved.failure,
        moved.purge_after,
    )
    .execute(&mut **tx)
    .await?;
    Ok(phase)
}

/// A deployment's row; the release it makes.
#[derive(Debug, Clone)]
pub(crate) struct Deployment {
    pub(crate) id: DeploymentId,
    pub(crate) image: String,
    pub(crate) digest: Digest,
    pub(crate) operation: OperationId,
    pub(crate) instance: Option<String>,
    pub(crate) restarts: i32,
    pub(crate) last_exit: Option<String>,
    pub(crate) live_at: Option<DateTime<Utc>>,
}

struct DeploymentRow {
    id: Uuid,
    image: String,
    digest: String,
    operation_id: Uuid,
    instance: Option<String>,
    restarts: i32,
    last_exit: Option<String>,
    live_at: Option<DateTime<Utc>>,
}

impl TryFrom<DeploymentRow> for Deployment {
    type Error = sqlx::Error;
    fn try_from(row: DeploymentRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: DeploymentId::from_uuid(row.id),
            image: row.image,
            digest: row.digest.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?,
            operation: OperationId::from_uuid(row.operation_id),
            instance: row.instance,
            restarts: row.restarts,
            last_exit: row.last_exit,
            live_at: row.live_at,
        })
    }
}

macro_rules! select_deployments {
    ($condition:literal $(, $argument:expr)*) => {
        sqlx::query_as!(
            DeploymentRow,
            r#"SELECT id, image, digest, operation_id, instance, restarts, last_exit, live_at
               FROM deployments WHERE "# + $condition
            $(, $argument)*
        )
    };
}

pub(crate) async fn deployment(pool: &PgPool, id: DeploymentId) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!("id = $1", id.uuid()).fetch_optional(pool).await?.map(Deployment::try_from).transpose()
}

/// The release that serves.
pub(crate) async fn live_deployment(
    executor: impl PgExecutor<'_>,
    tenant: TenantId,
) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!("tenant_id = $1 AND state = 'live'", tenant.uuid())
        .fetch_optional(executor)
        .await?
        .map(Deployment::try_from)
        .transpose()
}

/// The deployment whose output is shown: the live one or, while its operation works on the tenant, the one that is
/// to take its place. A tenant with neither shows the newest that got an instance.
pub(crate) async fn shown_deployment(pool: &PgPool, tenant: TenantId) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!(
        "tenant_id = $1 AND instance IS NOT NULL
         ORDER BY state = 'live' OR operation_id IS NOT DISTINCT FROM (SELECT active_operation FROM tenants WHERE id = $1) DESC,
                  created_at DESC LIMIT 1",
        tenant.uuid()
    )
    .fetch_optional(pool)
    .await?
    .map(Deployment::try_from)
    .transpose()
}

/// The deployment whose output goes on where that of `before` ended: the next that became live or, as long as none
/// is, the next at all.
pub(crate) async fn next_deployment(
    pool: &PgPool,
    tenant: TenantId,
    before: DeploymentId,
) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!(
        "tenant_id = $1 AND instance IS NOT NULL AND created_at > (SELECT created_at FROM deployments WHERE id = $2)
           AND (live_at IS NOT NULL OR NOT EXISTS (SELECT 1 FROM deployments WHERE tenant_id = $1 AND state = 'live'))
         ORDER BY created_at LIMIT 1",
        tenant.uuid(),
        before.uuid()
    )
    .fetch_optional(pool)
    .await?
    .map(Deployment::try_from)
    .transpose()
}

/// A deployment of this tenant; nothing for that of another.
pub(crate) async fn deployment_of(
    pool: &PgPool,
    tenant: TenantId,
    id: DeploymentId,
) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!("tenant_id = $1 AND id = $2", tenant.uuid(), id.uuid())
        .fetch_optional(pool)
        .await?
        .map(Deployment::try_from)
        .transpose()
}

/// An earlier deploy call with the same idempotency key.
pub(crate) async fn deployment_by_key(
    tx: &mut PgTransaction<'_>,
    tenant: TenantId,
    key: &str,
) -> Result<Option<Deployment>, sqlx::Error> {
    select_deployments!("tenant_id = $1 AND request_key = $2", tenant.uuid(), key)
        .fetch_optional(&mut **tx)
        .await?
        .map(Deployment::try_from)
        .transpose()
}

/// Deployments that may have an instance: pending and live ones, and all of a tenant that an operation works on,
/// which stops what it replaced itself, when every edge has let go of it.
pub(crate) async fn with_instance(pool: &PgPool) -> Result<Vec<DeploymentId>, sqlx::Error> {
    let ids = sqlx::query_scalar!(
        "SELECT d.id FROM deployments d JOIN tenants t ON t.id = d.tenant_id
         WHERE d.state IN ('pending', 'live') OR t.active_operation IS NOT NULL"
    )
    .fetch_all(pool)
    .await?;
    Ok(ids.into_iter().map(DeploymentId::from_uuid).collect())
}

/// The newest retired or failed deployments, whose output is kept for a while.
pub(crate) async fn recently_ended(pool: &PgPool, per_tenant: i64) -> Result<Vec<DeploymentId>, sqlx::Error> {
    let ids = sqlx::query_scalar!(
        "SELECT id FROM (
           SELECT id, row_number() OVER (PARTITION BY tenant_id ORDER BY created_at DESC) AS place
           FROM deployments WHERE state IN ('retired', 'failed')
         ) ended WHERE place <= $1",
        per_tenant
    )
    .fetch_all(pool)
    .await?;
    Ok(ids.into_iter().map(DeploymentId::from_uuid).collect())
}

/// Images that must stay in the registry: pending ones, and the newest `releases` that ever were live.
pub(crate) async fn kept_images(pool: &PgPool, releases: i64) -> Result<Vec<(TenantId, Digest)>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"SELECT tenant_id AS "tenant_id!", digest AS "digest!" FROM deployments WHERE state IN ('pending', 'live')
           UNION
           SELECT tenant_id, digest FROM (
             SELECT tenant_id, digest, dense_rank() OVER (PARTITION BY tenant_id ORDER BY live_at DESC) AS place
             FROM deployments WHERE live_at IS NOT NULL
           ) releases WHERE place <= $1"#,
        releases
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter()
        .map(|row| {
            let digest = row.digest.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
            Ok((TenantId::from_uuid(row.tenant_id), digest))
        })
        .collect()
}

/// A deploy that was asked for.
pub(crate) struct NewDeployment<'a> {
    pub(crate) id: DeploymentId,
    pub(crate) tenant: TenantId,
    pub(crate) image: &'a str,
    pub(crate) digest: &'a Digest,
    pub(crate) operation: OperationId,
    pub(crate) key: &'a str,
}

pub(crate) async fn insert_deployment(tx: &mut PgTransaction<'_>, new: &NewDeployment<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "INSERT INTO deployments (id, tenant_id, image, digest, operation_id, request_key) VALUES ($1, $2, $3, $4, $5, $6)",
        new.id.uuid(),
        new.tenant.uuid(),
        new.image,
        new.digest.to_string(),
        new.operation.uuid(),
        new.key,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Remembers which instance runs a deployment.
pub(crate) async fn set_instance(
    tx: &mut PgTransaction<'_>,
    id: DeploymentId,
    instance: Option<&str>,
) -> Result<(), sqlx::Error> {
    sqlx::query!("UPDATE deployments SET instance = $2 WHERE id = $1", id.uuid(), instance).execute(&mut **tx).await?;
    Ok(())
}

/// Makes `id` the tenant's live release and retires the one before it. Idempotent.
pub(crate) async fn make_live(
    tx: &mut PgTransaction<'_>,
    tenant: TenantId,
    id: DeploymentId,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE deployments SET state = 'retired', ended_at = now() WHERE tenant_id = $1 AND state = 'live' AND id <> $2",
        tenant.uuid(),
        id.uuid(),
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("UPDATE deployments SET state = 'live', live_at = coalesce(live_at, now()) WHERE id = $1", id.uuid())
        .execute(&mut **tx)
        .await?;
    sqlx::query!("UPDATE tenants SET live_deployment = $2 WHERE id = $1", tenant.uuid(), id.uuid())
        .execute(&mut **tx)
        .await?;
    Ok(())
}

/// Ends a deployment that never became live.
pub(crate) async fn fail_deployment(
    tx: &mut PgTransaction<'_>,
    id: DeploymentId,
    failure: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE deployments SET state = 'failed', failure = $2, ended_at = now() WHERE id = $1 AND state = 'pending'",
        id.uuid(),
        failure,
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Ends the live release, because its tenant is deleted.
pub(crate) async fn retire_all(tx: &mut PgTransaction<'_>, tenant: TenantId) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE deployments SET state = CASE WHEN live_at IS NULL THEN 'failed' ELSE 'retired' END::deployment_state,
                ended_at = now(), instance = NULL
         WHERE tenant_id = $1 AND state IN ('pending', 'live')",
        tenant.uuid()
    )
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// Counts an end of the live instance, once for each `at`, and returns how many there were; nothing when it was
/// counted before.
pub(crate) async fn note_exit(
    pool: &PgPool,
    id: DeploymentId,
    exit: &str,
    at: DateTime<Utc>,
) -> Result<Option<i32>, sqlx::Error> {
    sqlx::query_scalar!(
        "UPDATE deployments SET restarts = restarts + 1, last_exit = $2, last_exit_at = $3
         WHERE id = $1 AND (last_exit_at IS NULL OR last_exit_at < $3) RETURNING restarts",
        id.uuid(),
        exit,
        at,
    )
    .fetch_optional(pool)
    .await
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
