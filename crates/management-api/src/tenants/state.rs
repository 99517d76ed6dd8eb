//! The tenant's state machine. Pure: values in, values out.
//!
//! | from \ event | Ready | DeployAsked | DeploySucceeded | DeployFailed | ProvisionFailed | DeleteAsked |
//! |---|---|---|---|---|---|---|
//! | Provisioning | AwaitingDeploy | – | – | – | Failed | Deleted |
//! | AwaitingDeploy | – | Deploying | – | – | – | Deleted |
//! | Deploying | – | – | Running | Running or AwaitingDeploy | – | Deleted |
//! | Running | – | Deploying | – | – | – | Deleted |
//! | Stopped | – | Deploying | – | – | – | Deleted |
//! | Suspended | – | – | – | – | – | Deleted |
//! | Failed | – | – | – | – | – | Deleted |
//! | Deleted | – | – | – | – | – | – |
//!
//! A failed deploy leads back to what serves: `Running` when a release is live, else `AwaitingDeploy`.

#![allow(clippy::doc_markdown, reason = "the table is read by a test, which wants plain names")]

use chrono::{DateTime, Utc};
use systemprompt_contract::{ApiError, ErrorCode, TenantPhase, TenantStatus};

/// What can happen to a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TenantEvent {
    Ready,
    DeployAsked,
    DeploySucceeded,
    DeployFailed { release_is_live: bool },
    ProvisionFailed,
    DeleteAsked,
}

impl TenantEvent {
    const fn words(self) -> &'static str {
        match self {
            Self::Ready => "become ready",
            Self::DeployAsked => "be deployed to",
            Self::DeploySucceeded => "have a deploy succeed",
            Self::DeployFailed { .. } => "have a deploy fail",
            Self::ProvisionFailed => "fail to be provisioned",
            Self::DeleteAsked => "be deleted",
        }
    }
}

/// An event that the phase does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a tenant that is {} cannot {}", word(*.phase), event.words())]
pub(crate) struct IllegalTransition {
    pub(crate) phase: TenantPhase,
    pub(crate) event: TenantEvent,
}

/// The next phase.
///
/// # Errors
/// [`IllegalTransition`] for every pair that the table above leaves out.
pub(crate) fn apply(phase: TenantPhase, event: TenantEvent) -> Result<TenantPhase, IllegalTransition> {
    use {TenantEvent as E, TenantPhase as P};
    match (phase, event) {
        (P::Provisioning, E::Ready) | (P::Deploying, E::DeployFailed { release_is_live: false }) => {
            Ok(P::AwaitingDeploy)
        }
        (P::Provisioning, E::ProvisionFailed) => Ok(P::Failed),
        (P::AwaitingDeploy | P::Running | P::Stopped, E::DeployAsked) => Ok(P::Deploying),
        (P::Deploying, E::DeploySucceeded | E::DeployFailed { release_is_live: true }) => Ok(P::Running),
        (
            P::Provisioning | P::AwaitingDeploy | P::Deploying | P::Running | P::Stopped | P::Suspended | P::Failed,
            E::DeleteAsked,
        ) => Ok(P::Deleted),
        (phase, event) => Err(IllegalTransition { phase, event }),
    }
}

impl From<IllegalTransition> for ApiError {
    fn from(error: IllegalTransition) -> Self {
        let code = match error.phase {
            TenantPhase::Provisioning | TenantPhase::Deploying => ErrorCode::OperationInProgress,
            _ => ErrorCode::Conflict,
        };
        let hint = match error.phase {
            TenantPhase::Provisioning | TenantPhase::Deploying => "Wait until it is done: systemprompt cloud status",
            TenantPhase::Failed => "Delete it and make a new one: systemprompt cloud tenant delete",
            TenantPhase::Suspended => "Its subscription has to be settled first.",
            _ => "See what it is doing: systemprompt cloud status",
        };
        Self::new(code, error.to_string()).hint(hint)
    }
}

/// What the outside sees of a stored phase.
pub(crate) fn status(phase: TenantPhase, failure: Option<&str>, purge_after: Option<DateTime<Utc>>) -> TenantStatus {
    match phase {
        TenantPhase::Provisioning => TenantStatus::Provisioning,
        TenantPhase::AwaitingDeploy => TenantStatus::AwaitingDeploy,
        TenantPhase::Deploying => TenantStatus::Deploying,
        TenantPhase::Running => TenantStatus::Running,
        TenantPhase::Stopped => TenantStatus::Stopped,
        TenantPhase::Suspended => TenantStatus::Suspended,
        TenantPhase::Failed => TenantStatus::Failed { reason: failure.unwrap_or("unknown").to_owned() },
        TenantPhase::Deleted => TenantStatus::Deleted { purge_after: purge_after.unwrap_or_default() },
    }
}

/// The phase as PostgreSQL and the wire spell it.
pub(crate) const fn word(phase: TenantPhase) -> &'static str {
    match phase {
        TenantPhase::Provisioning => "provisioning",
        TenantPhase::AwaitingDeploy => "awaiting_deploy",
        TenantPhase::Deploying => "deploying",
        TenantPhase::Running => "running",
        TenantPhase::Stopped => "stopped",
        TenantPhase::Suspended => "suspended",
        TenantPhase::Failed => "failed",
        TenantPhase::Deleted => "deleted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PHASES: [TenantPhase; 8] = [
        TenantPhase::Provisioning,
        TenantPhase::AwaitingDeploy,
        TenantPhase::Deploying,
        TenantPhase::Running,
        TenantPhase::Stopped,
        TenantPhase::Suspended,
        TenantPhase::Failed,
        TenantPhase::Deleted,
    ];
    const EVENTS: [TenantEvent; 7] = [
        TenantEvent::Ready,
        TenantEvent::DeployAsked,
        TenantEvent::DeploySucceeded,
        TenantEvent::DeployFailed { release_is_live: true },
        TenantEvent::DeployFailed { release_is_live: false },
        TenantEvent::ProvisionFailed,
        TenantEvent::DeleteAsked,
    ];

    proptest! {
        #[test]
        fn random_events_keep_the_laws(events in proptest::collection::vec(0..EVENTS.len(), 0..40)) {
            let mut phase = TenantPhase::Provisioning;
            let mut was_ready = false;
            for event in events {
                let before = phase;
                if let Ok(next) = apply(phase, EVENTS[event]) {
                    phase = next;
                }
                was_ready |= phase == TenantPhase::AwaitingDeploy;
                prop_assert!(before != TenantPhase::Deleted || phase == TenantPhase::Deleted, "deleted is the end");
                prop_assert!(phase != TenantPhase::Running || was_ready, "nothing runs before phase 1 is done");
                prop_assert!(before == phase || before != TenantPhase::Running || matches!(phase, TenantPhase::Deploying | TenantPhase::Deleted));
            }
        }
    }

    #[test]
    fn the_table_is_the_code() {
        let table = include_str!("state.rs");
        for phase in PHASES {
            let row = table
                .lines()
                .find(|line| line.starts_with(&format!("//! | {phase:?} |")))
                .unwrap_or_else(|| panic!("{phase:?} has no row"));
            let cells: Vec<&str> = row.split('|').skip(2).map(str::trim).collect();
            let columns = [0, 1, 2, 3, 3, 4, 5];
            for (event, column) in EVENTS.iter().zip(columns) {
                let legal = apply(phase, *event);
                let cell = cells[column];
                match legal {
                    Ok(next) => assert!(cell.contains(&format!("{next:?}")), "{phase:?} {event:?}: {cell}"),
                    Err(_) => assert_eq!(cell, "–", "{phase:?} {event:?}"),
                }
            }
        }
    }
}
