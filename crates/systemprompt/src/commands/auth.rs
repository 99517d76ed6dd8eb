use crate::{
    commands::{confirmed, open_in_browser},
    context::is_signed_out,
    error::CliError,
    output::{ArtifactType, Printer},
    settings::Settings,
};
use chrono::{DateTime, Utc};
use serde::Serialize;
use std::{io::Read as _, path::PathBuf};
use systemprompt_cloud::{
    ApiUrl, CloudApiClient, CloudCredentials, CloudError, CredentialsBootstrap, CredentialsError, StoredTenant,
    TenantStore, TokenLife, http_client, sign_in_with_browser,
};
use systemprompt_contract::{Me, Secret, token};

const MAX_TOKEN: u64 = 16 * 1024;

/// How to sign in.
pub(crate) enum How {
    /// A token on standard input.
    Token,
    /// A page, opened for the person or by himself.
    Browser { open: bool },
}

#[derive(Serialize)]
struct SignedInView {
    user_email: String,
    api_url: ApiUrl,
    expires_at: Option<DateTime<Utc>>,
    tenants: usize,
    credentials_path: PathBuf,
}

pub(crate) async fn login(how: How, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let CredentialsBootstrap::File(path) = &settings.credentials()? else {
        return Err(CliError::new("inside_a_tenant", "a tenant's instance is signed in by its environment"));
    };
    let api_url = settings.sign_in_url();
    let http = http_client(&settings.http)?;
    let token = match how {
        How::Token => token_from_stdin()?,
        How::Browser { open } => {
            let show = |address: &str| show_address(address, open, printer);
            let signed_in = sign_in_with_browser(&api_url, http.clone(), show).await;
            signed_in.map_err(|error| CliError::sign_in(&error, &api_url))?.access_token
        }
    };
    let me = CloudApiClient::new(api_url.clone(), token.clone(), http).me().await?;
    let credentials = CloudCredentials {
        api_token: token,
        api_url,
        authenticated_at: Some(Utc::now()),
        user_email: me.user.email.clone(),
    };
    credentials.save_to_path(path).map_err(|error| settings.unusable(&error))?;
    remember_tenants(&me, settings)?;
    let view = SignedInView {
        expires_at: expiry(&credentials.api_token),
        user_email: credentials.user_email,
        api_url: credentials.api_url,
        tenants: me.tenants.len(),
        credentials_path: path.clone(),
    };
    printer.value(ArtifactType::PresentationCard, &view, |text| {
        text.line(format!("Signed in to {} as {}", view.api_url, view.user_email));
        text.pair("tenants", Some(view.tenants));
        text.pair("token ends", view.expires_at.map(|end| end.format("%F")));
        text.pair("kept in", Some(view.credentials_path.display()));
    })?;
    let next = if view.tenants == 0 { "systemprompt cloud tenant create" } else { "systemprompt cloud deploy" };
    printer.next(next);
    Ok(())
}

fn show_address(address: &str, open: bool, printer: &Printer) {
    printer.talk("Sign in with your browser:");
    printer.talk(&format!("  {address}"));
    if open && !open_in_browser(address) {
        printer.talk("No browser could be opened; open the address yourself.");
    }
}

fn token_from_stdin() -> Result<Secret, CliError> {
    let mut text = String::new();
    std::io::stdin().take(MAX_TOKEN).read_to_string(&mut text)?;
    let text = text.trim();
    if token::verify_checksum(text).is_some() {
        return Ok(Secret::new(text));
    }
    Err(CliError::new("invalid_token", "expected one whole token on standard input, sp_live_ and its three parts")
        .hint("Was it cut when it was copied?"))
}

fn remember_tenants(me: &Me, settings: &Settings) -> Result<(), CliError> {
    let path = settings.tenants_path(settings.profile().ok().flatten().as_ref())?;
    Ok(TenantStore::update(&path, |store| store.sync(me.tenants.iter().map(StoredTenant::from), Utc::now()))?)
}

#[derive(Serialize)]
struct LogoutView {
    message: &'static str,
    /// Whether the token is good for nothing any more; none was when there was none.
    revoked: bool,
    credentials_path: Option<PathBuf>,
}

pub(crate) async fn logout(yes: bool, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let CredentialsBootstrap::File(path) = &settings.credentials()? else {
        return Err(CliError::new("inside_a_tenant", "a tenant's instance is signed in by its environment"));
    };
    let credentials = match CloudCredentials::load_from_path(path) {
        Ok(None) => return said(printer, "Nobody was signed in", false, None),
        // A file that cannot be read can still be removed.
        Err(CredentialsError::Invalid { .. }) => None,
        other => other.map_err(|error| settings.unusable(&error))?,
    };
    confirmed("Sign out and revoke the token?", yes, settings)?;
    let revoked = match credentials {
        Some(credentials) => revoke(credentials, settings, printer).await?,
        None => false,
    };
    CloudCredentials::delete_at_path(path).map_err(|error| settings.unusable(&error))?;
    said(printer, "Signed out", revoked, Some(path.clone()))
}

/// A cloud that is away must not keep anybody signed in.
async fn revoke(credentials: CloudCredentials, settings: &Settings, printer: &Printer) -> Result<bool, CliError> {
    let http = http_client(&settings.http)?;
    match CloudApiClient::new(credentials.api_url, credentials.api_token, http).logout().await {
        Ok(()) | Err(CloudError::Unauthorized { .. }) => Ok(true),
        Err(error) => {
            printer.warn(&format!("the token could not be revoked and stays valid until it ends: {error}"));
            Ok(false)
        }
    }
}

fn said(
    printer: &Printer,
    message: &'static str,
    revoked: bool,
    credentials_path: Option<PathBuf>,
) -> Result<(), CliError> {
    printer.value(ArtifactType::Text, &LogoutView { message, revoked, credentials_path }, |text| text.line(message))
}

#[derive(Serialize)]
struct WhoamiView {
    user_email: Option<String>,
    /// `operator` or `member`, as the cloud says.
    role: Option<String>,
    api_url: Option<ApiUrl>,
    token_status: &'static str,
    authenticated_at: Option<DateTime<Utc>>,
    local_profiles: usize,
    cloud_tenants: Option<usize>,
}

pub(crate) async fn whoami(settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let local_profiles = settings.project.profile_names().len();
    let credentials = match settings.credentials()?.load() {
        Err(error) if is_signed_out(&error) => None,
        other => Some(other.map_err(|error| settings.unusable(&error))?),
    };
    let view = match credentials {
        None => WhoamiView {
            user_email: None,
            role: None,
            api_url: None,
            token_status: "Not logged in",
            authenticated_at: None,
            local_profiles,
            cloud_tenants: None,
        },
        Some(credentials) => {
            let (token_status, me) = ask(&credentials, settings, printer).await?;
            let cloud_tenants = me.as_ref().map(|me| me.tenants.len());
            WhoamiView {
                user_email: Some(credentials.user_email),
                role: me.and_then(|me| me.user.role),
                api_url: Some(credentials.api_url),
                token_status,
                authenticated_at: credentials.authenticated_at,
                local_profiles,
                cloud_tenants,
            }
        }
    };
    printer.value(ArtifactType::PresentationCard, &view, |text| {
        text.pair("user", view.user_email.as_ref());
        text.pair("role", view.role.as_ref());
        text.pair("api", view.api_url.as_ref());
        text.pair("token", Some(view.token_status));
        text.pair("signed in", view.authenticated_at.map(|at| at.format("%F %T UTC")));
        text.pair("profiles", Some(view.local_profiles));
        text.pair("tenants", view.cloud_tenants);
    })
}

/// What the cloud says of the token; offline only what the token says of itself.
async fn ask(
    credentials: &CloudCredentials,
    settings: &Settings,
    printer: &Printer,
) -> Result<(&'static str, Option<Me>), CliError> {
    let by_itself = match credentials.token_life(Utc::now()) {
        TokenLife::Good => "Valid",
        TokenLife::EndsSoon(_) => "Expires soon",
        TokenLife::Ended(_) => "Expired",
    };
    let (url, token) = (credentials.api_url.clone(), credentials.api_token.clone());
    match CloudApiClient::new(url, token, http_client(&settings.http)?).me().await {
        Ok(me) => Ok((by_itself, Some(me))),
        Err(CloudError::Unauthorized { .. }) => Ok(("Expired", None)),
        Err(error) => {
            printer.warn(&error.to_string());
            Ok((by_itself, None))
        }
    }
}

fn expiry(token: &Secret) -> Option<DateTime<Utc>> {
    token::untrusted_expiry(token.expose()).and_then(|exp| DateTime::from_timestamp(exp, 0))
}
