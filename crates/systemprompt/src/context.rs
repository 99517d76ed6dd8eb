//! What most commands begin with: who is signed in, which API, which tenant.

use crate::{error::CliError, output::Printer, settings::Settings};
use chrono::Utc;
use std::path::PathBuf;
use systemprompt_cloud::{
    ApiUrl, CloudApiClient, CloudCredentials, CredentialsError, Profile, TenantStore, TenantStoreError, TokenLife,
    http_client,
};
use systemprompt_contract::TenantId;

/// A signed-in client.
pub(crate) struct Session {
    pub(crate) client: CloudApiClient,
    pub(crate) credentials: CloudCredentials,
}

impl Settings {
    /// The client of whoever is signed in here. The token goes to the API that issued it and to no other.
    pub(crate) fn session(&self, printer: &Printer) -> Result<Session, CliError> {
        let credentials = self.credentials()?.load().map_err(|error| self.unusable(&error))?;
        let api_url = self.api_url.clone().unwrap_or_else(|| credentials.api_url.clone());
        let token = credentials.token_for(&api_url).map_err(|error| self.unusable(&error))?;
        match credentials.token_life(Utc::now()) {
            TokenLife::Good => {}
            TokenLife::EndsSoon(end) => {
                printer.warn(&format!(
                    "the token ends on {}; sign in again: {}",
                    end.format("%F"),
                    api_url.sign_in_command()
                ));
            }
            TokenLife::Ended(end) => printer.warn(&format!("the token ended on {}", end.format("%F"))),
        }
        Ok(Session { client: CloudApiClient::new(api_url, token, http_client(&self.http)?), credentials })
    }

    /// The API to sign in to: the one asked for, else the one that was signed in to before, else production.
    pub(crate) fn sign_in_url(&self) -> ApiUrl {
        let stored = || self.credentials().ok()?.load().ok().map(|credentials| credentials.api_url);
        self.api_url.clone().or_else(stored).unwrap_or_default()
    }

    pub(crate) fn tenants_path(&self, profile: Option<&Profile>) -> Result<PathBuf, CliError> {
        Ok(self.project.tenants_path(profile)?)
    }

    /// The tenants this project knows; none when they were never fetched.
    pub(crate) fn tenants(&self, profile: Option<&Profile>) -> Result<TenantStore, CliError> {
        match TenantStore::load_from_path(&self.tenants_path(profile)?) {
            Err(TenantStoreError::NotSynced { .. }) => Ok(TenantStore::default()),
            other => Ok(other?),
        }
    }

    /// The id of the tenant in force: the one asked for, else the profile's, else the selected one.
    pub(crate) fn tenant_in_force(&self, asked: Option<&str>, profile: Option<&Profile>) -> Result<String, CliError> {
        let named = asked.or_else(|| profile.and_then(|profile| profile.tenant_id.as_deref())).map(str::to_owned);
        let found = match named {
            Some(id) => Some(id),
            None => self.tenants(profile)?.selected,
        };
        found.ok_or_else(|| {
            CliError::new("no_tenant", "no tenant is named: not by --tenant, not by the profile, and none is selected")
                .hint("Buy one: systemprompt cloud tenant create, or choose one: systemprompt cloud tenant select ID")
        })
    }
}

/// An id of the cloud, which is a UUID; a local tenant's is not.
pub(crate) fn cloud_tenant(id: &str) -> Result<TenantId, CliError> {
    id.parse().map_err(|_| {
        CliError::new("not_a_cloud_tenant", format!("expected the id of a tenant in the cloud, a UUID, got {id:?}"))
            .hint("List them: systemprompt cloud tenant list")
    })
}

/// Whether the failure is only that nobody signed in here.
pub(crate) fn is_signed_out(error: &CredentialsError) -> bool {
    matches!(error, CredentialsError::Missing { .. })
}
