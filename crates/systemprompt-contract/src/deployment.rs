use crate::{
    ids::{DeploymentId, OperationId},
    secret::Secret,
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// `GET /tenants/{id}/registry-token`: who may push, what, where. Ten minutes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RegistryToken {
    /// `host[:port]` of the registry.
    pub registry: String,
    /// For HTTP Basic.
    pub username: String,
    /// For HTTP Basic or Bearer; good for exactly this tenant's tag.
    pub token: Secret,
    /// Always [`crate::IMAGE_REPOSITORY`].
    pub repository: String,
    /// `tenant-{uuid}`.
    pub tag: String,
}

/// `POST /tenants/{id}/deploy`. The existing client sends `image` only. A field of a later version is refused: what
/// it asks for must not seem done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeployRequest {
    /// The exact image name.
    pub image: String,
    /// `sha256:…` that was pushed; without it the digest that the tag has when the call comes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// Answer of `POST /tenants/{id}/deploy`, 202, wrapped in `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployAccepted {
    /// `deploying`.
    pub status: String,
    /// `https://…`.
    pub app_url: Option<String>,
    /// Follow it on the tenant's event stream.
    pub operation_id: OperationId,
    /// The release to be.
    pub deployment_id: DeploymentId,
    /// What will run.
    pub digest: String,
}

/// Which of an instance's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// Standard output and standard error, as the app wrote them.
    Output,
    /// The platform's own words about the instance.
    Platform,
}

/// One line of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Which deployment's instance.
    pub deployment_id: DeploymentId,
    /// When it was written, to a second or so; when it was read, where that is not known.
    pub timestamp: DateTime<Utc>,
    /// From where.
    pub stream: LogStream,
    /// Without its line end; bytes that are not UTF-8 are replaced.
    pub message: String,
    /// Continue after this line with it.
    pub cursor: String,
}

/// `GET /tenants/{id}/logs`, bare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogPage {
    /// Oldest first.
    pub logs: Vec<LogLine>,
}
