//! One error type at the border: a code for programs, a message, a hint, an exit code.

use std::{error::Error, process::ExitCode};
use systemprompt_cloud::{
    ApiUrl, CheckoutError, CloudError, CredentialsError, DeployError, HttpError, LoginError, ProjectError,
    TenantStoreError,
};
use systemprompt_contract::RequestId;

/// How a command ends when it does not succeed.
#[derive(Debug)]
pub(crate) enum CliError {
    /// To be told.
    Failed(Failure),
    /// The arguments cannot be used together, or not here.
    Usage(Failure),
    /// The person pressed Ctrl-C; with what goes on without us.
    Interrupted(Failure),
    /// The person said no.
    Declined,
    /// Whoever read standard output left: nothing to say to anybody.
    BrokenPipe,
}

/// What a person and a program learn.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) code: String,
    pub(crate) message: String,
    pub(crate) hint: Option<String>,
    /// Finds the call in the log of the cloud.
    pub(crate) request_id: Option<RequestId>,
    /// Lines to show before the message: the last words of a failed instance.
    pub(crate) details: Vec<String>,
}

impl CliError {
    pub(crate) fn new(code: &str, message: impl Into<String>) -> Self {
        Self::Failed(Failure::new(code, message))
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::Usage(Failure::new("usage", message))
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        if let Self::Failed(failure) | Self::Usage(failure) | Self::Interrupted(failure) = &mut self {
            failure.hint = Some(hint.into());
        }
        self
    }

    /// A hint that stands before the one that is there.
    pub(crate) fn hint_before(mut self, hint: &str) -> Self {
        if let Self::Failed(failure) = &mut self {
            let other = failure.hint.as_deref().map_or_else(String::new, |other| format!(". {other}"));
            failure.hint = Some(format!("{hint}{other}"));
        }
        self
    }

    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::Interrupted(Failure::new("interrupted", message))
    }

    #[allow(clippy::needless_pass_by_value, reason = "used as `map_err(CliError::runtime)`")]
    pub(crate) fn runtime(error: std::io::Error) -> Self {
        Self::new("system", format!("the system gave no resources to start with: {error}"))
    }

    pub(crate) fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed(failure) | Self::Usage(failure) | Self::Interrupted(failure) => Some(failure),
            Self::Declined | Self::BrokenPipe => None,
        }
    }

    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Self::Failed(_) => ExitCode::from(1),
            Self::Usage(_) => ExitCode::from(2),
            Self::Interrupted(_) => ExitCode::from(130),
            Self::Declined => ExitCode::FAILURE,
            Self::BrokenPipe => ExitCode::SUCCESS,
        }
    }

    /// `api_url` is who is to be called.
    pub(crate) fn credentials(error: &CredentialsError, api_url: &ApiUrl) -> Self {
        Self::of(error, error.code(), error.hint(api_url))
    }

    /// `api_url` is who was to be signed in to.
    pub(crate) fn sign_in(error: &LoginError, api_url: &ApiUrl) -> Self {
        Self::of(error, error.code(), error.hint(api_url)).request(error.request_id())
    }

    fn of(error: &(dyn Error + 'static), code: &str, hint: Option<String>) -> Self {
        Self::Failed(Failure { hint, ..Failure::new(code, with_causes(error)) })
    }

    fn request(mut self, id: Option<RequestId>) -> Self {
        if let Self::Failed(failure) = &mut self {
            failure.request_id = id;
        }
        self
    }
}

impl Failure {
    fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into(), hint: None, request_id: None, details: Vec::new() }
    }
}

/// The message and those of its causes that it does not already say itself.
pub(crate) fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}

impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::new("system", with_causes(&error)),
        }
    }
}

impl From<TenantStoreError> for CliError {
    fn from(error: TenantStoreError) -> Self {
        Self::of(&error, error.code(), error.hint())
    }
}

impl From<CloudError> for CliError {
    fn from(error: CloudError) -> Self {
        Self::of(&error, error.code(), error.hint()).request(error.request_id())
    }
}

impl From<ProjectError> for CliError {
    fn from(error: ProjectError) -> Self {
        Self::of(&error, error.code(), None)
    }
}

impl From<HttpError> for CliError {
    fn from(error: HttpError) -> Self {
        Self::of(&error, "no_http_client", Some("Check --ca-file and SYSTEMPROMPT_CA_FILE.".to_owned()))
    }
}

impl From<CheckoutError> for CliError {
    fn from(error: CheckoutError) -> Self {
        match error {
            CheckoutError::Sink(error) => match error.downcast::<TenantStoreError>() {
                Ok(error) => (*error).into(),
                Err(error) => Self::new("system", error.to_string()),
            },
            other => Self::of(&other, other.code(), other.hint()).request(other.request_id()),
        }
    }
}

impl From<DeployError> for CliError {
    fn from(error: DeployError) -> Self {
        let mut failed = Self::of(&error, error.code(), error.hint()).request(error.request_id());
        if let (Self::Failed(failure), DeployError::Failed { logs, .. }) = (&mut failed, error) {
            failure.details = logs;
        }
        failed
    }
}
