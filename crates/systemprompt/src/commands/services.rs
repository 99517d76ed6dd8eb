use crate::{
    error::{CliError, with_causes},
    output::{ArtifactType, Printer},
    settings::Settings,
};
use serde::Serialize;
use std::path::Path;
use systemprompt_runtime::{RuntimeConfig, RuntimeDefaults, log_to_stderr, serve as serve_tenant};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

#[derive(Serialize)]
struct Ended {
    status: &'static str,
}

/// Runs the tenant's server until SIGTERM or SIGINT; the environment beats the profile and the project. Its log goes to
/// standard error, so that standard output has the one value that says how it ended.
pub(crate) async fn serve(settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    log_to_stderr();
    let config = RuntimeConfig::from_env_or(&defaults(settings))
        .map_err(|error| CliError::new("invalid_environment", error.to_string()))?;
    let stop = CancellationToken::new();
    let signals = stop_on_signals(stop.clone());
    let served = serve_tenant(config, stop).await;
    drop(signals);
    served.map_err(|error| CliError::new("not_started", with_causes(&error)))?;
    if printer.is_json() { printer.value(ArtifactType::Text, &Ended { status: "stopped" }, |_| {}) } else { Ok(()) }
}

fn defaults(settings: &Settings) -> RuntimeDefaults {
    let mut defaults = RuntimeDefaults::default();
    // A profile that cannot be used is no reason to refuse a complete environment.
    if let Ok(Some(profile)) = settings.profile() {
        defaults.host = profile.host.and_then(|host| host.parse().ok()).unwrap_or(defaults.host);
        defaults.port = profile.port.unwrap_or(defaults.port);
    }
    let existing = |name: &Path| Some(settings.project.root().join(name)).filter(|path| path.is_dir());
    if settings.in_project {
        defaults.web_dir = existing(Path::new("web"));
        defaults.services_path = existing(Path::new("services"));
    }
    defaults
}

fn stop_on_signals(stop: CancellationToken) -> Option<tokio::task::JoinHandle<()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate()).ok()?, signal(SignalKind::interrupt()).ok()?);
    Some(tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM"),
            _ = interrupt.recv() => tracing::info!("SIGINT"),
        }
        stop.cancel();
    }))
}
