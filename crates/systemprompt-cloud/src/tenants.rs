use crate::private_file::{self, PrivateFileError};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use systemprompt_contract::{MeTenant, Secret, TenantSummary};

/// The mark of a masked password in a URL: exactly three stars.
const MASK: &str = ":***@";

/// Where a tenant lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TenantType {
    /// On this machine.
    #[default]
    Local,
    /// On SystemPrompt Cloud.
    Cloud,
}

/// One tenant this project knows.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoredTenant {
    /// Opaque: a UUID in the cloud, `local_…` here.
    pub id: String,
    /// Display name.
    pub name: String,
    /// `sp-…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_id: Option<String>,
    /// Public host name, without scheme.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Local: the database. Cloud: the external URL, where external access is enabled; may be masked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database_url: Option<Secret>,
    /// Cloud: the URL inside the platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_database_url: Option<Secret>,
    /// Where it lives.
    #[serde(default)]
    pub tenant_type: TenantType,
    /// Whether the database can be reached from outside.
    #[serde(default)]
    pub external_db_access: bool,
    /// `sp_sync_…`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync_token: Option<Secret>,
    /// Name of the database inside a container that several local tenants share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_container_db: Option<String>,
}

/// What a new cloud tenant is made from.
#[derive(Debug, Clone)]
pub struct NewCloudTenantParams {
    /// UUID.
    pub id: String,
    /// Display name.
    pub name: String,
    /// `sp-…`.
    pub app_id: Option<String>,
    /// Public host name.
    pub hostname: Option<String>,
    /// Region code.
    pub region: Option<String>,
    /// URL inside the platform, once known.
    pub internal_database_url: Option<Secret>,
    /// Once known.
    pub sync_token: Option<Secret>,
}

impl StoredTenant {
    /// A tenant on this machine with a database of its own.
    pub fn new_local(id: String, name: String, database_url: Secret) -> Self {
        Self { id, name, database_url: Some(database_url), tenant_type: TenantType::Local, ..Self::default() }
    }

    /// A tenant on this machine with a database in a shared container.
    pub fn new_local_shared(id: String, name: String, database_url: Secret, shared_container_db: String) -> Self {
        Self { shared_container_db: Some(shared_container_db), ..Self::new_local(id, name, database_url) }
    }

    /// A tenant in the cloud.
    pub fn new_cloud(params: NewCloudTenantParams) -> Self {
        Self {
            id: params.id,
            name: params.name,
            app_id: params.app_id,
            hostname: params.hostname,
            region: params.region,
            internal_database_url: params.internal_database_url,
            sync_token: params.sync_token,
            tenant_type: TenantType::Cloud,
            ..Self::default()
        }
    }

    /// Whether its database is in a shared container.
    pub fn uses_shared_container(&self) -> bool {
        self.shared_container_db.is_some()
    }

    /// Whether it can be given to a program that needs a database: local `database_url`, cloud the internal one.
    pub fn has_database_url(&self) -> bool {
        let url = if self.is_cloud() { &self.internal_database_url } else { &self.database_url };
        url.as_ref().is_some_and(|url| !url.expose().is_empty())
    }

    /// `database_url`.
    pub fn get_local_database_url(&self) -> Option<&Secret> {
        self.database_url.as_ref()
    }

    /// In the cloud.
    pub fn is_cloud(&self) -> bool {
        self.tenant_type == TenantType::Cloud
    }

    /// On this machine.
    pub fn is_local(&self) -> bool {
        self.tenant_type == TenantType::Local
    }

    /// A cloud tenant without its sync token.
    pub fn is_sync_token_missing(&self) -> bool {
        self.is_cloud() && self.sync_token.is_none()
    }

    /// Whether the password of a URL is masked.
    pub fn is_database_url_masked(&self) -> bool {
        let masked = |url: &Secret| url.expose().contains(MASK);
        self.internal_database_url.as_ref().or(self.database_url.as_ref()).is_some_and(masked)
    }

    /// A cloud tenant without sync token, or whose database URL is absent or masked. (The seed has the last part
    /// the other way round.)
    pub fn has_missing_credentials(&self) -> bool {
        self.is_cloud() && (self.is_sync_token_missing() || !self.has_database_url() || self.is_database_url_masked())
    }

    /// Takes over what the cloud says now and keeps what only this file knows: secrets, and a real URL over a masked.
    fn merge(&mut self, seen: Self) {
        self.name = seen.name;
        self.tenant_type = seen.tenant_type;
        self.external_db_access |= seen.external_db_access;
        for (mine, theirs) in
            [(&mut self.app_id, seen.app_id), (&mut self.hostname, seen.hostname), (&mut self.region, seen.region)]
        {
            *mine = theirs.or(mine.take());
        }
        for (mine, theirs) in [
            (&mut self.internal_database_url, seen.internal_database_url),
            (&mut self.sync_token, seen.sync_token),
            (&mut self.database_url, seen.database_url),
        ] {
            *mine = theirs.filter(|new| mine.is_none() || !new.expose().contains(MASK)).or(mine.take());
        }
    }
}

impl From<&TenantSummary> for StoredTenant {
    fn from(seen: &TenantSummary) -> Self {
        Self::new_cloud(NewCloudTenantParams {
            id: seen.id.to_string(),
            name: seen.name.clone(),
            app_id: seen.fly_app_name.clone(),
            hostname: seen.hostname.clone().or_else(|| seen.fly_hostname.clone()),
            region: Some(seen.region.to_string()),
            internal_database_url: None,
            sync_token: None,
        })
    }
}

impl From<&MeTenant> for StoredTenant {
    fn from(seen: &MeTenant) -> Self {
        let url = Some(&seen.database_url).filter(|url| !url.is_empty()).map(Secret::new);
        let params = NewCloudTenantParams {
            id: seen.id.to_string(),
            name: seen.name.clone(),
            app_id: seen.app_id.clone(),
            hostname: seen.hostname.clone(),
            region: seen.region.map(|region| region.to_string()),
            internal_database_url: url,
            sync_token: None,
        };
        Self { external_db_access: seen.external_db_access, ..Self::new_cloud(params) }
    }
}

/// `tenants.json`: the tenants of this project.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TenantStore {
    /// The tenant in force where neither a flag nor the profile names one.
    #[serde(default)]
    pub selected: Option<String>,
    /// All of them.
    pub tenants: Vec<StoredTenant>,
    /// When the cloud was asked last; absent in files of other clients, which then count as stale.
    #[serde(default)]
    pub synced_at: DateTime<Utc>,
}

/// Why the tenants are not known.
#[derive(Debug, thiserror::Error)]
pub enum TenantStoreError {
    /// Never fetched.
    #[error("no tenants are known here: there is no {}", path.display())]
    NotSynced {
        /// Where they would be.
        path: PathBuf,
    },
    /// Not what it should be.
    #[error("{} is not a tenants file: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, without values.
        reason: String,
    },
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] PrivateFileError),
}

impl TenantStoreError {
    /// For programs, lower snake case.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NotSynced { .. } => "tenants_not_synced",
            Self::Invalid { .. } => "invalid_tenants_file",
            Self::File(_) => "file",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotSynced { .. } => Some("Fetch them: systemprompt cloud tenant list".to_owned()),
            Self::Invalid { path, .. } => {
                Some(format!("Move {} away and fetch them: systemprompt cloud tenant list", path.display()))
            }
            Self::File(_) => None,
        }
    }
}

impl TenantStore {
    /// Reads `tenants.json`.
    ///
    /// # Errors
    /// [`TenantStoreError::NotSynced`] when there is none.
    pub fn load_from_path(path: &Path) -> Result<Self, TenantStoreError> {
        match private_file::read(path)? {
            Some(content) => Self::parse(path, &content),
            None => Err(TenantStoreError::NotSynced { path: path.to_owned() }),
        }
    }

    /// Replaces `tenants.json` as a whole, 0600 and git-ignored. To change it, use [`Self::update`]: two commands
    /// at once would otherwise lose one's change.
    ///
    /// # Errors
    /// [`TenantStoreError`]; the old file stays.
    pub fn save_to_path(&self, path: &Path) -> Result<(), TenantStoreError> {
        Ok(private_file::write(path, &self.serialise(path)?)?)
    }

    /// Reads, changes and replaces `tenants.json` with nobody in between; starts empty when there is none.
    ///
    /// # Errors
    /// [`TenantStoreError`]; the old file stays.
    pub fn update<T>(path: &Path, change: impl FnOnce(&mut Self) -> T) -> Result<T, TenantStoreError> {
        private_file::update(path, |content| {
            let mut store = content.map_or_else(|| Ok(Self::default()), |content| Self::parse(path, &content))?;
            let value = change(&mut store);
            Ok((store.serialise(path)?, value))
        })
    }

    fn parse(path: &Path, content: &[u8]) -> Result<Self, TenantStoreError> {
        let invalid = |reason: String| TenantStoreError::Invalid { path: path.to_owned(), reason };
        let store: Self = serde_json::from_slice(content)
            .map_err(|error| invalid(format!("line {}, column {} is not as expected", error.line(), error.column())))?;
        store.validate().map_err(invalid)?;
        Ok(store)
    }

    fn serialise(&self, path: &Path) -> Result<Vec<u8>, TenantStoreError> {
        let invalid = |reason: String| TenantStoreError::Invalid { path: path.to_owned(), reason };
        self.validate().map_err(invalid)?;
        let mut content = serde_json::to_vec_pretty(self).map_err(|error| invalid(error.to_string()))?;
        content.push(b'\n');
        Ok(content)
    }

    fn validate(&self) -> Result<(), String> {
        match self.tenants.iter().position(|tenant| tenant.id.is_empty() || tenant.name.is_empty()) {
            Some(index) => Err(format!("tenant {} has no id or no name", index + 1)),
            None => Ok(()),
        }
    }

    /// The tenant with this id.
    pub fn find_tenant(&self, id: &str) -> Option<&StoredTenant> {
        self.tenants.iter().find(|tenant| tenant.id == id)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tenants.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.tenants.len()
    }

    /// Whether the cloud was not asked within `max_age`.
    pub fn is_stale(&self, max_age: TimeDelta) -> bool {
        Utc::now() - self.synced_at > max_age
    }

    /// Adds a tenant or takes over what is new about it.
    pub fn upsert(&mut self, seen: StoredTenant) {
        match self.tenants.iter_mut().find(|tenant| tenant.id == seen.id) {
            Some(known) => known.merge(seen),
            None => self.tenants.push(seen),
        }
    }

    /// Takes a tenant out; unselects it.
    pub fn remove(&mut self, id: &str) -> Option<StoredTenant> {
        self.selected.take_if(|selected| selected == id);
        let index = self.tenants.iter().position(|tenant| tenant.id == id)?;
        Some(self.tenants.remove(index))
    }

    /// What the cloud says now: its tenants are added or renewed, those it no longer has go, local ones stay.
    pub fn sync(&mut self, seen: impl IntoIterator<Item = StoredTenant>, now: DateTime<Utc>) {
        let seen: Vec<_> = seen.into_iter().collect();
        self.tenants.retain(|tenant| tenant.is_local() || seen.iter().any(|other| other.id == tenant.id));
        for tenant in seen {
            self.upsert(tenant);
        }
        self.selected = self.selected.take().filter(|id| self.tenants.iter().any(|tenant| tenant.id == *id));
        self.synced_at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cloud(id: &str) -> StoredTenant {
        StoredTenant { id: id.to_owned(), name: "n".to_owned(), tenant_type: TenantType::Cloud, ..Default::default() }
    }

    #[test]
    fn missing_credentials_are_those_that_cannot_be_used() {
        let url = |text: &str| Some(Secret::new(text));
        let real = "postgres://u:p@h/d";
        for (sync, internal, missing) in [
            (true, Some(real), false),
            (false, Some(real), true),
            (true, None, true),
            (true, Some("postgres://u:***@h/d"), true),
        ] {
            let tenant = StoredTenant {
                sync_token: sync.then(|| Secret::new("sp_sync_x")),
                internal_database_url: internal.and_then(url),
                ..cloud("a")
            };
            assert_eq!(tenant.has_missing_credentials(), missing, "{sync} {internal:?}");
        }
        assert!(!StoredTenant::default().has_missing_credentials());
    }

    #[test]
    fn a_sync_keeps_local_tenants_and_real_passwords() {
        let mut store = TenantStore::default();
        store.upsert(StoredTenant::new_local("local_1".into(), "l".into(), Secret::new("postgres://x")));
        store.upsert(StoredTenant { internal_database_url: Some(Secret::new("postgres://u:p@h/d")), ..cloud("a") });
        store.upsert(cloud("gone"));
        store.selected = Some("gone".to_owned());
        let masked = StoredTenant { internal_database_url: Some(Secret::new("postgres://u:***@h/d")), ..cloud("a") };
        store.sync([masked, cloud("new")], Utc::now());
        let ids: Vec<_> = store.tenants.iter().map(|tenant| tenant.id.as_str()).collect();
        assert_eq!(ids, ["local_1", "a", "new"]);
        assert!(!store.tenants[1].is_database_url_masked());
        assert_eq!(store.selected, None);
        assert!(!store.is_stale(TimeDelta::minutes(1)));
    }

    #[test]
    fn both_seeds_forms_are_read_and_both_fields_written() {
        let path = Path::new("tenants.json");
        let seed_003 = br#"{"selected":"ten_abc123","tenants":[{"id":"ten_abc123","name":"p","app_id":"sp-x"}]}"#;
        let store = TenantStore::parse(path, seed_003).expect("seed 003");
        assert_eq!((store.selected.as_deref(), store.is_stale(TimeDelta::days(1))), (Some("ten_abc123"), true));
        let seed_004 =
            br#"{"tenants":[{"id":"local_1","name":"p","tenant_type":"local"}],"synced_at":"2026-02-01T10:00:00Z"}"#;
        let store = TenantStore::parse(path, seed_004).expect("seed 004");
        let text = String::from_utf8(store.serialise(path).expect("valid")).expect("UTF-8");
        assert!(
            text.contains("\"selected\": null") && text.contains("\"synced_at\": \"2026-02-01T10:00:00Z\""),
            "{text}"
        );
        assert!(TenantStore::parse(path, br#"{"tenants":[{"id":"","name":"p"}]}"#).is_err());
    }

    #[test]
    fn secrets_do_not_show() {
        let tenant = StoredTenant { sync_token: Some(Secret::new("hunter2")), ..cloud("a") };
        assert!(!format!("{tenant:?}").contains("hunter2"));
    }
}
