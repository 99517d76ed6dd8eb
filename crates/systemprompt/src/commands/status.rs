use crate::{
    context::is_signed_out,
    error::CliError,
    output::{ArtifactType, Printer},
    settings::Settings,
};
use chrono::Utc;
use serde::Serialize;
use systemprompt_cloud::{CloudApiClient, CloudError, Profile, TokenLife};
use systemprompt_contract::{TenantId, TenantStatusView, TenantSummary};

#[derive(Serialize)]
struct Status {
    profile: Option<ProfileView>,
    credentials: CredentialsView,
    tenants: Vec<TenantRow>,
}

#[derive(Serialize)]
struct ProfileView {
    name: String,
    display_name: String,
    tenant_id: Option<String>,
}

#[derive(Serialize)]
struct CredentialsView {
    authenticated: bool,
    user_email: Option<String>,
    token_expired: bool,
}

#[derive(Serialize)]
struct TenantRow {
    id: TenantId,
    name: String,
    status: String,
    url: Option<String>,
    message: Option<String>,
    configured_in_profile: bool,
}

pub(crate) async fn status(asked: Option<&str>, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let profile = settings.profile()?;
    let status = match settings.credentials()?.load() {
        Err(error) if is_signed_out(&error) => Status {
            profile: profile.map(ProfileView::from),
            credentials: CredentialsView { authenticated: false, user_email: None, token_expired: false },
            tenants: Vec::new(),
        },
        Err(error) => return Err(settings.unusable(&error)),
        Ok(_) => signed_in(asked, profile, settings, printer).await?,
    };
    printer.value(ArtifactType::PresentationCard, &status, |text| {
        text.pair("profile", status.profile.as_ref().map(|profile| &profile.display_name));
        text.pair("user", Some(status.credentials.user_email.as_deref().unwrap_or("not signed in")));
        for tenant in &status.tenants {
            let url = tenant.url.as_deref().unwrap_or_default();
            text.line(format!("{}  {}  {}  {url}", tenant.id, tenant.name, tenant.status));
            if let Some(message) = &tenant.message {
                text.line(format!("  {message}"));
            }
        }
    })?;
    if !status.credentials.authenticated {
        printer.next(&settings.sign_in_url().sign_in_command());
    }
    Ok(())
}

async fn signed_in(
    asked: Option<&str>,
    profile: Option<Profile>,
    settings: &Settings,
    printer: &Printer,
) -> Result<Status, CliError> {
    let session = settings.session(printer)?;
    let in_force = settings.tenant_in_force(asked, profile.as_ref()).ok();
    let mut tenants = session.client.tenants().await?;
    if asked.is_some() {
        tenants.retain(|tenant| in_force.as_deref() == Some(&tenant.id.to_string()));
        if tenants.is_empty() {
            return Err(CliError::new("not_found", format!("there is no tenant {:?}", asked.unwrap_or_default()))
                .hint("List them: systemprompt cloud tenant list"));
        }
    }
    let mut rows = Vec::with_capacity(tenants.len());
    for tenant in tenants {
        let configured = in_force.as_deref() == Some(&tenant.id.to_string());
        if let Some(row) = row(&session.client, tenant, configured).await? {
            rows.push(row);
        }
    }
    Ok(Status {
        profile: profile.map(ProfileView::from),
        credentials: CredentialsView {
            authenticated: true,
            token_expired: matches!(session.credentials.token_life(Utc::now()), TokenLife::Ended(_)),
            user_email: Some(session.credentials.user_email),
        },
        tenants: rows,
    })
}

/// None for a tenant that was deleted since the list was made.
async fn row(
    client: &CloudApiClient,
    tenant: TenantSummary,
    configured_in_profile: bool,
) -> Result<Option<TenantRow>, CloudError> {
    let TenantStatusView { status, message, app_url, .. } = match client.status(tenant.id).await {
        Err(error) if error.is_not_found() => return Ok(None),
        other => other?,
    };
    Ok(Some(TenantRow { id: tenant.id, name: tenant.name, status, url: app_url, message, configured_in_profile }))
}

impl From<Profile> for ProfileView {
    fn from(profile: Profile) -> Self {
        Self { name: profile.name, display_name: profile.display_name, tenant_id: profile.tenant_id }
    }
}
