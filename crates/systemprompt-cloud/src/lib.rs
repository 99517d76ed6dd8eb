//! The client library of SystemPrompt Cloud: API calls, sign-in, checkout, deploy, and the project's private files.
//!
//! * [`CloudApiClient`]: one method a call of the Management API; event streams that survive the connection.
//! * [`CloudCredentials`], [`CredentialsBootstrap`], [`TenantStore`]: `.systemprompt/`, 0600, whole or absent.
//! * [`sign_in_with_browser`], [`run_checkout_callback_flow`]: the two flows that send a person to a page and back.
//! * [`Deploy`]: build, push, submit, watch.
//! * [`Project`], [`Profile`]: where a command runs.
//!
//! Nothing here prints: progress goes to the sink a caller gives, and every error can say a code and a hint.

mod api_url;
mod callback;
mod checkout;
mod client;
mod credentials;
mod deploy;
mod error;
mod http;
mod login;
mod private_file;
mod project;
mod tenants;

pub use api_url::{ApiUrl, InvalidApiUrl};
pub use callback::CallbackError;
pub use checkout::{
    CheckoutError, CheckoutOutcome, CheckoutProgress, CheckoutSink, follow_checkout, resume_command,
    run_checkout_callback_flow,
};
pub use client::{CloudApiClient, EventStream, LogFollower};
pub use credentials::{CloudCredentials, CredentialsBootstrap, CredentialsError, TokenLife};
pub use deploy::{
    Deploy, DeployError, DeployProgress, DeploySink, DeploySpec, DeployStage, DeployTimings, Deployed, HOW_TO_LOOK,
    PushMode,
};
pub use error::{CloudError, TransportFailure};
pub use http::{HttpError, HttpOptions, http_client};
pub use login::{LoginError, sign_in_with_browser};
pub use private_file::PrivateFileError;
pub use project::{Profile, ProfileTarget, Project, ProjectError};
pub use systemprompt_oci::{
    PushEvent, PushReport,
    build::{BuildError, BuildEvent, BuildSpec, ImageBuilder, LayerCache, LeftOut, Plan, PlannedLayer},
};
pub use tenants::{NewCloudTenantParams, StoredTenant, TenantStore, TenantStoreError, TenantType};
