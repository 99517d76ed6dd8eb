//! What was typed, made into values: with the environment, the terminal and the project it was typed in. The only
//! place that reads the environment.

use crate::{args::GlobalArgs, error::CliError};
use std::{io::IsTerminal as _, path::PathBuf};
use systemprompt_cloud::{ApiUrl, CredentialsBootstrap, CredentialsError, HttpOptions, Profile, Project};

/// Everything a command may know about where it runs.
#[derive(Debug)]
pub(crate) struct Settings {
    /// The nearest project, else the current directory.
    pub(crate) project: Project,
    /// Whether there is a project already.
    pub(crate) in_project: bool,
    /// The profile that was asked for, by name or path.
    pub(crate) profile: Option<String>,
    /// The API that was asked for.
    pub(crate) api_url: Option<ApiUrl>,
    pub(crate) http: HttpOptions,
    /// Whether a person can be asked.
    pub(crate) interactive: bool,
}

impl Settings {
    pub(crate) fn resolve(global: GlobalArgs) -> Result<Self, CliError> {
        let here = std::env::current_dir()
            .map_err(|error| CliError::new("system", format!("the current directory cannot be used: {error}")))?;
        let found = Project::discover(&here);
        let in_project = found.is_some();
        let project = found.unwrap_or_else(|| Project::at(&here));
        let terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        let interactive = terminal && !global.non_interactive && !global.output().json;
        // Not parsed with the arguments: the message there would show a password in it.
        let api_url = global.api_url.as_deref().map(str::parse::<ApiUrl>).transpose();
        let api_url = api_url.map_err(|error| CliError::usage(format!("--api-url: {error}")))?;
        Ok(Self {
            project,
            in_project,
            profile: global.profile,
            api_url,
            http: HttpOptions { ca_file: global.ca_file.map(|path| absolute(&here, path)) },
            interactive,
        })
    }

    /// Where the credentials come from; asked only by commands that need any, so that a tenant's server runs without.
    pub(crate) fn credentials(&self) -> Result<CredentialsBootstrap, CliError> {
        CredentialsBootstrap::find(self.project.credentials_path(), env).map_err(|error| self.unusable(&error))
    }

    /// Credentials that cannot be used, told with the sign-in to the API that was asked for.
    pub(crate) fn unusable(&self, error: &CredentialsError) -> CliError {
        CliError::credentials(error, &self.api_url.clone().unwrap_or_default())
    }

    /// The profile in force, when there is one.
    pub(crate) fn profile(&self) -> Result<Option<Profile>, CliError> {
        Ok(self.project.profile(self.profile.as_deref(), env)?)
    }
}

/// Where finished layers are kept, of all projects; may be removed at any time. In no project: one that was
/// fetched from somebody could bring layers of its own along.
pub(crate) fn layer_cache() -> Result<PathBuf, CliError> {
    let folder = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    caches.map(|caches| caches.join("systemprompt/layers")).ok_or_else(|| {
        let message =
            "expected XDG_CACHE_HOME or HOME to name a folder (absolute) to keep finished layers in, got neither";
        CliError::new("no_cache_folder", message).hint("Set XDG_CACHE_HOME to a folder of yours.")
    })
}

/// Whether `SYSTEMPROMPT_OUTPUT_FORMAT` asks for JSON, as programs that run this one set it.
pub(crate) fn env_wants_json() -> bool {
    env("SYSTEMPROMPT_OUTPUT_FORMAT").is_some_and(|format| format.eq_ignore_ascii_case("json"))
}

fn env(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

fn absolute(here: &std::path::Path, path: PathBuf) -> PathBuf {
    if path.is_absolute() { path } else { here.join(path) }
}
