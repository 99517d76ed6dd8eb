use crate::{
    Db, Workflow,
    store::{CHANNEL, StatusRow, stored_error},
};
use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgExecutor, PgTransaction};
use systemprompt_contract::{ApiError, OperationId, OperationStatus, OperationView, Subject};
use uuid::Uuid;

/// What to enqueue.
#[derive(Debug, Clone, Copy)]
pub struct NewOperation<'a, W> {
    /// Stored as it is; no secrets in it.
    pub input: &'a W,
    /// Whose operation it is.
    pub subject: Subject,
    /// Idempotency key, 1 to 200 characters: a second one of the same workflow and key is the first one.
    pub key: &'a str,
}

/// An operation that will run, or already has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Enqueued {
    /// Its id.
    pub id: OperationId,
    /// False: the key was known, this is the operation it named.
    pub fresh: bool,
}

/// Why an operation could not be enqueued.
#[derive(Debug, thiserror::Error)]
pub enum EnqueueError {
    /// The input does not serialise.
    #[error("the input of {workflow} cannot be stored as JSON")]
    Input {
        /// Which workflow.
        workflow: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The database refused or does not answer.
    #[error("the operation could not be stored")]
    Database(#[from] sqlx::Error),
}

/// Stores an operation and wakes a worker, both when the caller's transaction commits and not before.
///
/// # Errors
/// See [`EnqueueError`]. After a database error the transaction is of no use any more.
pub async fn enqueue<W: Workflow>(
    tx: &mut PgTransaction<'_>,
    new: NewOperation<'_, W>,
) -> Result<Enqueued, EnqueueError> {
    let input = serde_json::to_value(new.input).map_err(|source| EnqueueError::Input { workflow: W::NAME, source })?;
    let id = OperationId::new();
    // The conflicting insert waits for the other transaction: when that one rolls back, ours is the first.
    let inserted = sqlx::query!(
        r#"
        WITH inserted AS (
            INSERT INTO operations (id, workflow, key, subject, input) VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (workflow, key) DO NOTHING RETURNING id
        )
        SELECT pg_notify($6, '') FROM inserted
        "#,
        id.uuid(),
        W::NAME,
        new.key,
        new.subject.to_string(),
        input,
        CHANNEL,
    )
    .fetch_optional(&mut **tx)
    .await?;
    if inserted.is_some() {
        return Ok(Enqueued { id, fresh: true });
    }
    let known = find::<W>(&mut **tx, new.key).await?.ok_or(sqlx::Error::RowNotFound)?;
    Ok(Enqueued { id: known, fresh: false })
}

/// The operation of this workflow that was enqueued under `key`.
///
/// # Errors
/// The database refused or does not answer.
pub async fn find<W: Workflow>(db: impl PgExecutor<'_>, key: &str) -> Result<Option<OperationId>, sqlx::Error> {
    let id = sqlx::query_scalar!("SELECT id FROM operations WHERE workflow = $1 AND key = $2", W::NAME, key);
    Ok(id.fetch_optional(db).await?.map(OperationId::from_uuid))
}

/// What a request to cancel met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelOutcome {
    /// It will unwind and end as failed with the code `cancelled`, unless it ends or passes its pivot first.
    Requested,
    /// It unwinds already, is over, or is parked.
    TooLate(OperationStatus),
    /// There is no such operation.
    Unknown,
}

/// Asks for an operation to end, when the caller's transaction commits. Asking twice is asking once.
///
/// # Errors
/// The database refused or does not answer.
pub async fn request_cancel(tx: &mut PgTransaction<'_>, id: OperationId) -> Result<CancelOutcome, sqlx::Error> {
    let status = sqlx::query_scalar!(
        r#"SELECT status AS "status: StatusRow" FROM operations WHERE id = $1 FOR UPDATE"#,
        id.uuid()
    )
    .fetch_optional(&mut **tx)
    .await?;
    match status.map(OperationStatus::from) {
        None => Ok(CancelOutcome::Unknown),
        Some(OperationStatus::Queued | OperationStatus::Running) => {
            // It must not sleep through a backoff first.
            sqlx::query!(
                "UPDATE operations SET cancel_requested = true, available_at = least(available_at, now()) WHERE id = $1",
                id.uuid()
            )
            .execute(&mut **tx)
            .await?;
            sqlx::query!("SELECT pg_notify($1, 'cancel')", CHANNEL).fetch_one(&mut **tx).await?;
            Ok(CancelOutcome::Requested)
        }
        Some(status) => Ok(CancelOutcome::TooLate(status)),
    }
}

/// One operation as the outside sees it.
///
/// # Errors
/// The database does not answer.
pub async fn operation(db: &Db, id: OperationId) -> Result<Option<OperationView>, sqlx::Error> {
    let row = sqlx::query_as!(
        OperationRow,
        r#"
        SELECT o.id, o.workflow, o.subject, o.status AS "status: StatusRow", o.failure, o.parked, o.created_at,
               o.finished_at, s.name AS "step?", s.error AS "step_error?"
        FROM operations o
        LEFT JOIN LATERAL (
            SELECT name, error FROM operation_steps WHERE operation_id = o.id ORDER BY changed_at DESC LIMIT 1
        ) s ON true
        WHERE o.id = $1
        "#,
        id.uuid()
    )
    .fetch_optional(db.pool())
    .await?;
    Ok(row.map(OperationRow::view))
}

/// Operations of a subject that are not over, the parked ones included, oldest first.
///
/// # Errors
/// The database does not answer.
pub async fn active_for(executor: impl PgExecutor<'_>, subject: Subject) -> Result<Vec<OperationId>, sqlx::Error> {
    let ids = sqlx::query_scalar!(
        "SELECT id FROM operations WHERE subject = $1 AND status NOT IN ('succeeded', 'failed') ORDER BY created_at",
        subject.to_string()
    )
    .fetch_all(executor)
    .await?;
    Ok(ids.into_iter().map(OperationId::from_uuid).collect())
}

/// Ends the parked operations of a subject as failed, in the caller's transaction: whatever they left is taken away
/// by an operation that finds it by name. Says how many.
///
/// # Errors
/// The database refused or does not answer.
pub async fn give_up_stuck(tx: &mut PgTransaction<'_>, subject: Subject) -> Result<u64, sqlx::Error> {
    let ended = sqlx::query!(
        "UPDATE operations
         SET status = 'failed', failure = coalesce(failure, parked), parked = NULL, parked_unwinding = NULL,
             finished_at = clock_timestamp()
         WHERE subject = $1 AND status = 'stuck'",
        subject.to_string()
    )
    .execute(&mut **tx)
    .await?;
    Ok(ended.rows_affected())
}

/// Gives up every lease that `worker` holds, so that its operations are adopted at once; says how many.
///
/// Only for a caller who knows that no process of that name runs. Whatever such a process still wrote, heartbeats
/// included, would be refused; its effects outside of the database would go on beside the adopter's.
///
/// # Errors
/// The database refused or does not answer.
pub async fn release_leases(db: &Db, worker: &str) -> Result<u64, sqlx::Error> {
    let released = sqlx::query!(
        r#"
        WITH released AS (
            UPDATE operations SET worker = NULL, lease_until = NULL WHERE worker = $1 RETURNING id
        )
        SELECT pg_notify($2, '') FROM released
        "#,
        worker,
        CHANNEL,
    )
    .fetch_all(db.pool())
    .await?;
    Ok(u64::try_from(released.len()).unwrap_or(u64::MAX))
}

/// A parked operation, for operators.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StuckOperation {
    /// The operation; its error is what it could not get over.
    pub view: OperationView,
    /// `tenant:…` or `checkout:…`.
    pub subject: String,
    /// The last error of the step it stands at, in its own words.
    pub step_error: Option<String>,
    /// Why it was unwinding, when it was.
    pub failure: Option<ApiError>,
}

/// All parked operations, oldest first.
///
/// # Errors
/// The database does not answer.
pub async fn stuck(db: &Db) -> Result<Vec<StuckOperation>, sqlx::Error> {
    let rows = sqlx::query_as!(
        OperationRow,
        r#"
        SELECT o.id, o.workflow, o.subject, o.status AS "status: StatusRow", o.failure, o.parked, o.created_at,
               o.finished_at, s.name AS "step?", s.error AS "step_error?"
        FROM operations o
        LEFT JOIN LATERAL (
            SELECT name, error FROM operation_steps WHERE operation_id = o.id ORDER BY changed_at DESC LIMIT 1
        ) s ON true
        WHERE o.status = 'stuck' ORDER BY o.created_at
        "#,
    )
    .fetch_all(db.pool())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| StuckOperation {
            subject: row.subject.clone(),
            step_error: row.step_error.clone(),
            failure: row.failure.clone().map(|failure| stored_error(Some(failure))),
            view: row.view(),
        })
        .collect())
}

/// Lets a parked operation go on the way it was going, its attempts counted anew; false when it is not parked.
///
/// # Errors
/// The database does not answer.
pub async fn retry_stuck(db: &Db, id: OperationId) -> Result<bool, sqlx::Error> {
    // `Journal::apply(Resume)` in SQL: one statement, so that two operators cannot resume it twice.
    let resumed = sqlx::query!(
        r#"
        WITH resumed AS (
            UPDATE operations
            SET status = CASE WHEN parked_unwinding THEN 'unwinding' ELSE 'running' END::operation_status,
                parked = NULL, parked_unwinding = NULL, available_at = now()
            WHERE id = $1 AND status = 'stuck' RETURNING id
        ),
        recounted AS (
            UPDATE operation_steps SET attempts = 0 WHERE operation_id IN (SELECT id FROM resumed)
        )
        SELECT pg_notify($2, '') FROM resumed
        "#,
        id.uuid(),
        CHANNEL,
    )
    .fetch_optional(db.pool())
    .await?;
    Ok(resumed.is_some())
}

struct OperationRow {
    id: Uuid,
    workflow: String,
    subject: String,
    status: StatusRow,
    failure: Option<Value>,
    parked: Option<Value>,
    created_at: DateTime<Utc>,
    finished_at: Option<DateTime<Utc>>,
    step: Option<String>,
    step_error: Option<String>,
}

impl OperationRow {
    fn view(self) -> OperationView {
        OperationView {
            id: OperationId::from_uuid(self.id),
            kind: self.workflow,
            status: self.status.into(),
            step: self.step,
            error: self.parked.or(self.failure).map(|error| stored_error(Some(error))),
            created_at: self.created_at,
            finished_at: self.finished_at,
        }
    }
}
