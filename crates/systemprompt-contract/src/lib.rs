//! The contract every part of SystemPrompt Cloud shares: ids, names and their derivation rules,
//! wire types, token formats, error codes and paths. No I/O and no async runtime.
//!
//! A name is derived here and nowhere else: `TenantId -> TenantSlug -> AppName | Hostname`,
//! `TenantId -> TenantImage`, `Zone -> PlatformHost`.

mod account;
mod checkout;
mod deployment;
mod error;
mod event;
mod ids;
mod image;
mod names;
mod operation;
pub mod paths;
mod secret;
mod tenant;
pub mod token;

pub use account::{Me, MeTenant, MeUser, SetupRequest, SignedIn, TokenExchange};
pub use checkout::{CheckoutCreated, CheckoutRequest, CheckoutState, Plan};
pub use deployment::{DeployAccepted, DeployRequest, LogLine, LogPage, LogStream, RegistryToken};
pub use error::{ApiError, ErrorBody, ErrorCode};
pub use event::{
    DeploymentEvent, DeploymentState, DeploymentStep, Event, EventId, ProvisioningEvent, ProvisioningEventType, Subject,
};
pub use ids::{AccountId, CheckoutId, DeploymentId, InvalidId, OperationId, RequestId, TenantId};
pub use image::{IMAGE_REPOSITORY, ImageMismatch, TenantImage, TenantTag};
pub use names::{
    AppName, CertHost, DatabaseName, Hostname, InvalidName, PlatformHost, Region, TenantName, TenantSlug, Zone,
};
pub use operation::{OperationStatus, OperationView};
pub use secret::Secret;
pub use tenant::{Data, ReleaseView, TenantPhase, TenantStatus, TenantStatusView, TenantSummary, TenantView};
