use crate::{
    ids::{DeploymentId, TenantId},
    names::Region,
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use std::fmt;

/// `{"data": …}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Data<T> {
    /// The answer.
    pub data: T,
}

/// What is stored of a tenant's life (`tenants.phase`). The shown [`TenantStatus`] is derived from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TenantPhase {
    /// Phase 1 runs.
    Provisioning,
    /// Infrastructure stands, nothing was ever deployed.
    AwaitingDeploy,
    /// A deploy runs; an earlier release may serve meanwhile.
    Deploying,
    /// A release is live.
    Running,
    /// A release is live but no instance of it runs, on purpose.
    Stopped,
    /// Billing stopped it.
    Suspended,
    /// Phase 1 failed and was unwound.
    Failed,
    /// Taken out of every list; data goes at `purge_after`.
    Deleted,
}

/// What the outside sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TenantStatus {
    /// Phase 1 runs.
    Provisioning,
    /// Ready for its first deploy.
    AwaitingDeploy,
    /// A deploy runs.
    Deploying,
    /// Serves.
    Running,
    /// Stopped on purpose.
    Stopped,
    /// Billing stopped it.
    Suspended,
    /// Did not get through phase 1.
    Failed {
        /// Why.
        reason: String,
    },
    /// Deleted; its data goes then.
    Deleted {
        /// When the data goes.
        purge_after: DateTime<Utc>,
    },
}

impl TenantStatus {
    /// Snake case, as on the wire.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::AwaitingDeploy => "awaiting_deploy",
            Self::Deploying => "deploying",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Suspended => "suspended",
            Self::Failed { .. } => "failed",
            Self::Deleted { .. } => "deleted",
        }
    }

    /// The four words `/auth/me` may use.
    pub const fn as_account_status(&self) -> &'static str {
        match self {
            Self::Provisioning | Self::AwaitingDeploy | Self::Failed { .. } => "pending",
            Self::Deploying | Self::Running | Self::Stopped => "active",
            Self::Suspended => "suspended",
            Self::Deleted { .. } => "deleted",
        }
    }
}

impl fmt::Display for TenantStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One entry of `GET /tenants`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantSummary {
    /// Tenant id.
    pub id: TenantId,
    /// Display name.
    pub name: String,
    /// `sp-…`.
    pub fly_app_name: Option<String>,
    /// `{slug}.{zone}`.
    pub fly_hostname: Option<String>,
    /// `{slug}.{zone}`.
    pub hostname: Option<String>,
    /// [`TenantStatus`] as a word.
    pub status: String,
    /// What was asked for.
    pub region: Region,
}

/// `GET /tenants/{id}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantView {
    /// What the list shows.
    #[serde(flatten)]
    pub summary: TenantSummary,
    /// `https://…`.
    pub app_url: String,
    /// The release that serves.
    pub release: Option<ReleaseView>,
    /// When it was bought.
    pub created_at: DateTime<Utc>,
}

/// A live release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseView {
    /// The deploy that made it.
    pub deployment_id: DeploymentId,
    /// What runs.
    pub digest: String,
    /// Since when.
    pub live_since: DateTime<Utc>,
}

/// `GET /tenants/{id}/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantStatusView {
    /// [`TenantStatus`] as a word.
    pub status: String,
    /// What a person should know: the failure, the crash loop.
    pub message: Option<String>,
    /// `https://…`.
    pub app_url: Option<String>,
    /// Path of the one-time credentials, for members who may read them.
    pub secrets_url: Option<String>,
}
