//! Durable operations on PostgreSQL: steps with probe, act and undo, a journal, leases with fencing tokens,
//! retry, unwinding in reverse, and the event log that reports on them.
//!
//! A [`Workflow`] is a list of [`Step`]s with a typed state. [`enqueue`] writes it in the caller's transaction,
//! an [`Engine`] runs it: any worker may die at any instant, another adopts the operation from its journal.
//! What a step must do in return: its act and its undo are idempotent, and its undo copes with an act whose
//! outcome is unknown.

mod crash;
mod db;
mod engine;
pub mod events;
pub mod journal;
mod listen;
mod queue;
mod retry;
mod run;
mod step;
mod store;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use crash::crash_point;
pub use db::Db;
pub use engine::{Engine, EngineConfig};
pub use queue::{
    CancelOutcome, EnqueueError, Enqueued, NewOperation, StuckOperation, active_for, enqueue, find, give_up_stuck,
    operation, release_leases, request_cancel, retry_stuck, stuck,
};
pub use retry::Retry;
pub use step::{Completion, Probe, Step, StepContext, StepDraft, StepError, Workflow};
