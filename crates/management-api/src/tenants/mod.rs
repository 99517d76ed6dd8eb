//! Tenants: their life, their two phases, and everything the API says about them.

pub(crate) mod databases;
pub(crate) mod delete;
pub(crate) mod deploy;
mod follow;
mod handlers;
mod logs;
pub(crate) mod provision;
pub(crate) mod routes;
pub(crate) mod secrets;
pub(crate) mod state;
pub(crate) mod store;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod workflow_tests;

pub(crate) use handlers::{asked_to_delete, endpoints, me_tenants};

/// For steps that only go forward: what they act upon may be away for long, and giving up would not help.
const FOREVER: systemprompt_workflow::Retry = systemprompt_workflow::Retry {
    attempts: u32::MAX,
    first: std::time::Duration::from_millis(50),
    max: std::time::Duration::from_secs(5),
    jitter: 0.2,
};
