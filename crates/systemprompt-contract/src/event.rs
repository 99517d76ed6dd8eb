//! Events as server-sent events carry them; `contract` of the existing client for `provisioning` frames.

use crate::{
    error::ApiError,
    ids::{CheckoutId, DeploymentId, OperationId, TenantId},
};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Position in the event log; the `id:` of a frame and the `Last-Event-ID` of a resuming client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventId(pub i64);

/// Whose stream an event belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A tenant's stream.
    Tenant(TenantId),
    /// A checkout's stream.
    Checkout(CheckoutId),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tenant(id) => write!(f, "tenant:{id}"),
            Self::Checkout(id) => write!(f, "checkout:{id}"),
        }
    }
}

impl FromStr for Subject {
    type Err = crate::InvalidId;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("tenant", id)) => id.parse().map(Self::Tenant),
            Some(("checkout", id)) => id.parse().map(Self::Checkout),
            _ => Err(crate::InvalidId(text.chars().take(80).collect())),
        }
    }
}

/// One frame: `event:` and `data:`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data", rename_all = "snake_case")]
pub enum Event {
    /// Phase 1, in the existing client's words.
    Provisioning(ProvisioningEvent),
    /// Phase 2.
    Deployment(DeploymentEvent),
}

impl Event {
    /// The `event:` name.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Provisioning(_) => "provisioning",
            Self::Deployment(_) => "deployment",
        }
    }
    /// The `data:` JSON.
    ///
    /// # Panics
    /// Never: both payloads are plain structs.
    pub fn data(&self) -> String {
        match self {
            Self::Provisioning(event) => serde_json::to_string(event),
            Self::Deployment(event) => serde_json::to_string(event),
        }
        .expect("plain structs serialise")
    }
}

/// The eleven names the existing client knows; any other makes it drop the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it; the order of a provision is in ARCHITECTURE.md")]
pub enum ProvisioningEventType {
    SubscriptionCreated,
    TenantCreated,
    DatabaseCreated,
    SecretsStored,
    VmProvisioningStarted,
    VmProvisioningProgress,
    VmProvisioned,
    SecretsConfigured,
    InfrastructureReady,
    TenantReady,
    ProvisioningFailed,
}

/// `event: provisioning`. On the checkout stream all five first fields are present and not null.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProvisioningEvent {
    /// Present on the checkout stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkout_session_id: Option<CheckoutId>,
    /// Always, also before the tenant's row exists.
    pub tenant_id: TenantId,
    /// Display name.
    pub tenant_name: String,
    /// What happened.
    pub event_type: ProvisioningEventType,
    /// [`crate::TenantStatus`] as a word.
    pub status: String,
    /// For a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// `https://…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_url: Option<String>,
    /// `sp-…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fly_app_name: Option<String>,
}

/// Where a deploy stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentState {
    /// The step runs.
    Running,
    /// The release is live: the last frame.
    Succeeded,
    /// The release did not come through, or not to the end; the message says what serves: the last frame.
    Failed,
}

/// The steps a person sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentStep {
    /// Image complete, digest recorded.
    VerifyImage,
    /// New instance beside the old.
    Launch,
    /// Two healthy answers in a row.
    Probe,
    /// Route points at the new instance.
    SwitchRoute,
    /// Old instance drained and stopped.
    RetireOld,
    /// Done.
    Finish,
}

/// `event: deployment`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploymentEvent {
    /// The operation.
    pub operation_id: OperationId,
    /// The release to be.
    pub deployment_id: DeploymentId,
    /// Which step.
    pub step: DeploymentStep,
    /// Where it stands.
    pub state: DeploymentState,
    /// For a person.
    pub message: String,
    /// `https://…`.
    pub app_url: String,
    /// Why it failed, with the last lines of the failed instance in `logs`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ApiError>,
    /// Last lines of the failed instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<String>,
}
