//! The engine's rows. Every write names the fence it was claimed with and is void when another worker has claimed
//! since.

use crate::{
    Db,
    journal::{Heading, Mark, Phase, StoredStep},
};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use std::time::Duration;
use systemprompt_contract::{ApiError, ErrorCode, OperationId, OperationStatus};
use uuid::Uuid;

/// Workers hear on this channel that there may be something to do; payload `cancel` when a running operation is to
/// end.
pub(crate) const CHANNEL: &str = "systemprompt_operations";

/// The right to write one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) operation: OperationId,
    pub(crate) fence: i64,
    /// How far each write and each heartbeat pushes the deadline.
    pub(crate) length: Duration,
}

/// An operation this worker has just got the lease of.
#[derive(Debug)]
pub(crate) struct Claimed {
    pub(crate) lease: Lease,
    pub(crate) workflow: String,
    pub(crate) input: Value,
    pub(crate) state: Option<Value>,
    pub(crate) phase: Phase,
    pub(crate) cancel_requested: bool,
}

/// Whom to claim for, and what.
#[derive(Debug, Clone)]
pub(crate) struct ClaimRequest<'a> {
    pub(crate) workflows: &'a [String],
    pub(crate) worker: &'a str,
    pub(crate) lease: Duration,
    pub(crate) limit: usize,
}

/// Takes operations that nobody holds and that are due, the longest waiting first.
pub(crate) async fn claim(db: &Db, request: ClaimRequest<'_>) -> Result<Vec<Claimed>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"
        WITH due AS (
            SELECT id FROM operations
            WHERE status IN ('queued', 'running', 'unwinding')
              AND workflow = ANY($1)
              AND available_at <= clock_timestamp()
              AND (lease_until IS NULL OR lease_until <= clock_timestamp())
            ORDER BY available_at
            LIMIT $2
            FOR UPDATE SKIP LOCKED
        )
        UPDATE operations o
        SET fence = o.fence + 1, worker = $3, lease_until = clock_timestamp() + make_interval(secs => $4)
        FROM due WHERE o.id = due.id
        RETURNING o.id, o.fence, o.workflow, o.input, o.state, o.status AS "status: StatusRow", o.failure,
                  o.cancel_requested
        "#,
        request.workflows,
        i64::try_from(request.limit).unwrap_or(i64::MAX),
        request.worker,
        request.lease.as_secs_f64(),
    )
    .fetch_all(db.pool())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Claimed {
            lease: Lease { operation: OperationId::from_uuid(row.id), fence: row.fence, length: request.lease },
            workflow: row.workflow,
            input: row.input,
            state: row.state,
            phase: claimed_phase(row.status, row.failure),
            cancel_requested: row.cancel_requested,
        })
        .collect())
}

/// How long until something that waits now becomes due: a backoff ends or a lease lapses.
pub(crate) async fn next_due(db: &Db, workflows: &[String]) -> Result<Option<Duration>, sqlx::Error> {
    let seconds = sqlx::query_scalar!(
        r#"
        SELECT extract(epoch FROM min(greatest(available_at, lease_until)) - clock_timestamp())::float8
        FROM operations WHERE status IN ('queued', 'running', 'unwinding') AND workflow = ANY($1)
        "#,
        workflows
    )
    .fetch_one(db.pool())
    .await?;
    Ok(seconds.map(|seconds| Duration::from_secs_f64(seconds.max(0.0))))
}

/// What the heartbeat learns about one held operation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Beat {
    pub(crate) operation: OperationId,
    pub(crate) fence: i64,
    pub(crate) standing: Standing,
    pub(crate) cancel_requested: bool,
}

/// Whether a lease still stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// Its deadline was pushed.
    Extended,
    /// Ours, but a write of ours has the row locked at this moment; that write pushes the deadline itself.
    Locked,
    /// Another worker has it, or it is over.
    Lost,
}

/// Pushes the deadlines of all held leases. Never waits for a row lock.
pub(crate) async fn heartbeat(pool: &PgPool, held: &[Lease], length: Duration) -> Result<Vec<Beat>, sqlx::Error> {
    let ids: Vec<Uuid> = held.iter().map(|lease| lease.operation.uuid()).collect();
    let fences: Vec<i64> = held.iter().map(|lease| lease.fence).collect();
    let rows = sqlx::query!(
        r#"
        WITH held AS (SELECT * FROM unnest($1::uuid[], $2::bigint[]) AS h (id, fence)),
        free AS (
            SELECT o.id FROM operations o JOIN held h ON o.id = h.id AND o.fence = h.fence
            WHERE o.worker IS NOT NULL
            FOR UPDATE OF o SKIP LOCKED
        ),
        beat AS (
            UPDATE operations o SET lease_until = clock_timestamp() + make_interval(secs => $3)
            FROM free WHERE o.id = free.id RETURNING o.id
        )
        SELECT h.id AS "id!", h.fence AS "fence!", beat.id IS NOT NULL AS "extended!", o.id IS NOT NULL AS "ours!",
               coalesce(o.cancel_requested, false) AS "cancel_requested!"
        FROM held h
        LEFT JOIN beat ON beat.id = h.id
        LEFT JOIN operations o ON o.id = h.id AND o.fence = h.fence AND o.worker IS NOT NULL
        "#,
        &ids,
        &fences,
        length.as_secs_f64(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Beat {
            operation: OperationId::from_uuid(row.id),
            fence: row.fence,
            standing: match (row.extended, row.ours) {
                (true, _) => Standing::Extended,
                (false, true) => Standing::Locked,
                (false, false) => Standing::Lost,
            },
            cancel_requested: row.cancel_requested,
        })
        .collect())
}

/// The marks of an operation's steps.
pub(crate) async fn stored_steps(db: &Db, operation: OperationId) -> Result<Vec<StoredStep>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"
        SELECT position, name, mark AS "mark: MarkRow", attempts FROM operation_steps
        WHERE operation_id = $1 ORDER BY position
        "#,
        operation.uuid()
    )
    .fetch_all(db.pool())
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let attempts = u32::try_from(row.attempts).unwrap_or(0);
            let mark = match row.mark {
                MarkRow::Started => Mark::Started { attempts },
                MarkRow::Done => Mark::Done,
                MarkRow::Undoing => Mark::Undoing { attempts },
                MarkRow::Undone => Mark::Undone,
            };
            StoredStep { position: usize::try_from(row.position).unwrap_or(usize::MAX), name: row.name, mark }
        })
        .collect())
}

/// What one transition changes in the operation's row.
#[derive(Debug)]
pub(crate) struct OperationChange<'a> {
    pub(crate) phase: &'a Phase,
    /// `None` leaves the stored one.
    pub(crate) state: Option<Value>,
    pub(crate) keep: Keep,
    /// A cancellation would be heard: then it also ends a pause that begins with this write.
    pub(crate) can_cancel: bool,
}

/// What becomes of the lease with a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Its deadline is pushed.
    Lease,
    /// Anybody may claim the operation after this long, if it is not at rest.
    Release { after: Duration },
}

/// Writes the operation's row; false when the lease is lost, and then nothing was written.
pub(crate) async fn save_operation(
    connection: &mut PgConnection,
    lease: Lease,
    change: OperationChange<'_>,
) -> Result<bool, sqlx::Error> {
    let status = change.phase.status();
    let (parked, parked_unwinding) = match change.phase {
        Phase::Stuck { heading, because } => {
            (Some(error_value(because)), Some(matches!(heading, Heading::Back { .. })))
        }
        _ => (None, None),
    };
    let (keep, pause) = match change.keep {
        Keep::Lease if !status.is_over() => (true, Duration::ZERO),
        Keep::Lease => (false, Duration::ZERO),
        Keep::Release { after } => (false, after),
    };
    let done = sqlx::query!(
        r#"
        UPDATE operations SET
            status = $3,
            failure = $4,
            parked = $5,
            parked_unwinding = $6,
            state = coalesce($7, state),
            worker = CASE WHEN $8 THEN worker END,
            lease_until = CASE WHEN $8 THEN clock_timestamp() + make_interval(secs => $9) END,
            available_at = clock_timestamp()
                + CASE WHEN $12 AND cancel_requested THEN interval '0' ELSE make_interval(secs => $10) END,
            finished_at = CASE WHEN $11 THEN clock_timestamp() END
        WHERE id = $1 AND fence = $2 AND worker IS NOT NULL
        "#,
        lease.operation.uuid(),
        lease.fence,
        StatusRow::from(status) as StatusRow,
        change.phase.failure().map(error_value),
        parked,
        parked_unwinding,
        change.state,
        keep,
        lease.length.as_secs_f64(),
        pause.as_secs_f64(),
        matches!(status, OperationStatus::Succeeded | OperationStatus::Failed),
        change.can_cancel,
    )
    .execute(connection)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// One step's new mark.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StepChange<'a> {
    pub(crate) position: usize,
    pub(crate) name: &'a str,
    pub(crate) mark: Mark,
    pub(crate) error: Option<&'a str>,
}

/// Writes one step's mark, in the transaction that has just written the operation's row.
pub(crate) async fn save_step(
    connection: &mut PgConnection,
    operation: OperationId,
    change: StepChange<'_>,
) -> Result<(), sqlx::Error> {
    let (mark, attempts) = match change.mark {
        Mark::Untouched => return Ok(()),
        Mark::Started { attempts } => (MarkRow::Started, attempts),
        Mark::Done => (MarkRow::Done, 0),
        Mark::Undoing { attempts } => (MarkRow::Undoing, attempts),
        Mark::Undone => (MarkRow::Undone, 0),
    };
    sqlx::query!(
        r#"
        INSERT INTO operation_steps (operation_id, position, name, mark, attempts, error)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT (operation_id, position)
        DO UPDATE SET mark = $4, attempts = $5, error = $6, changed_at = clock_timestamp()
        "#,
        operation.uuid(),
        i16::try_from(change.position).unwrap_or(i16::MAX),
        change.name,
        mark as MarkRow,
        i32::try_from(attempts).unwrap_or(i32::MAX),
        change.error,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Gives the lease back as it is; a lease that is lost already is no error.
pub(crate) async fn release(pool: &PgPool, lease: Lease) -> Result<(), sqlx::Error> {
    sqlx::query!(
        r#"
        WITH released AS (
            UPDATE operations SET worker = NULL, lease_until = NULL
            WHERE id = $1 AND fence = $2 AND worker IS NOT NULL RETURNING id
        )
        SELECT pg_notify($3, '') FROM released
        "#,
        lease.operation.uuid(),
        lease.fence,
        CHANNEL,
    )
    .fetch_all(pool)
    .await?;
    Ok(())
}

/// May pass by itself: connections, restarts, resources, locks, serialization, timeouts.
pub(crate) fn is_transient(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            matches!(code.get(..2), Some("08" | "40" | "53" | "57" | "58")) || matches!(&*code, "55P03" | "25P03")
        }
        _ => outcome_is_unknown(error),
    }
}

/// A commit that ended so may have happened or not.
pub(crate) fn outcome_is_unknown(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Database(error) => {
            matches!(error.code().unwrap_or_default().get(..3), Some("57P" | "08P" | "080" | "XX0" | "580"))
        }
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        _ => false,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "operation_status", rename_all = "snake_case")]
pub(crate) enum StatusRow {
    Queued,
    Running,
    Unwinding,
    Succeeded,
    Failed,
    Stuck,
}

impl From<OperationStatus> for StatusRow {
    fn from(status: OperationStatus) -> Self {
        match status {
            OperationStatus::Queued => Self::Queued,
            OperationStatus::Running => Self::Running,
            OperationStatus::Unwinding => Self::Unwinding,
            OperationStatus::Succeeded => Self::Succeeded,
            OperationStatus::Failed => Self::Failed,
            OperationStatus::Stuck => Self::Stuck,
        }
    }
}

impl From<StatusRow> for OperationStatus {
    fn from(row: StatusRow) -> Self {
        match row {
            StatusRow::Queued => Self::Queued,
            StatusRow::Running => Self::Running,
            StatusRow::Unwinding => Self::Unwinding,
            StatusRow::Succeeded => Self::Succeeded,
            StatusRow::Failed => Self::Failed,
            StatusRow::Stuck => Self::Stuck,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "operation_step_mark", rename_all = "snake_case")]
enum MarkRow {
    Started,
    Done,
    Undoing,
    Undone,
}

/// The phases that can be claimed.
fn claimed_phase(status: StatusRow, failure: Option<Value>) -> Phase {
    match (status, failure) {
        (StatusRow::Queued, _) => Phase::Queued,
        (StatusRow::Running | StatusRow::Succeeded, _) => Phase::Running,
        (StatusRow::Unwinding | StatusRow::Failed | StatusRow::Stuck, failure) => {
            Phase::Unwinding { failure: stored_error(failure) }
        }
    }
}

fn error_value(error: &ApiError) -> Value {
    serde_json::to_value(error).expect("a plain struct serialises")
}

/// An error that a newer version wrote with a code we do not know is still an error.
pub(crate) fn stored_error(value: Option<Value>) -> ApiError {
    value
        .and_then(|value| serde_json::from_value(value).ok())
        .unwrap_or_else(|| ApiError::new(ErrorCode::Internal, "the stored error cannot be read"))
}
