use crate::{error::ApiError, ids::OperationId};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// Life of a durable operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationStatus {
    /// Waits for a worker.
    Queued,
    /// Steps run forward.
    Running,
    /// A step gave up; steps are undone in reverse.
    Unwinding,
    /// All steps done.
    Succeeded,
    /// Unwound; nothing is left of it.
    Failed,
    /// An undo failed: parked, an operator must look.
    Stuck,
}

impl OperationStatus {
    /// Snake case, as stored and on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Unwinding => "unwinding",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Stuck => "stuck",
        }
    }
    /// No worker will touch it again by itself.
    pub const fn is_over(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Stuck)
    }
}

/// `GET /operations/{id}`, wrapped in `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationView {
    /// Its id.
    pub id: OperationId,
    /// `provision_tenant`, `deploy_tenant`, …
    pub kind: String,
    /// Where it is.
    pub status: OperationStatus,
    /// The step that runs or ran last.
    pub step: Option<String>,
    /// Why it failed or waits.
    pub error: Option<ApiError>,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
}
