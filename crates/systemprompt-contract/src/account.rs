use crate::{
    ids::{AccountId, TenantId},
    names::Region,
    secret::Secret,
};
use serde::{Deserialize, Serialize};

/// `GET /auth/me`, bare, in the shape of the existing client (`database_url` is never null).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Me {
    /// Who the token belongs to.
    pub user: MeUser,
    /// The billing provider's customer, where there is one.
    pub customer: Option<serde_json::Value>,
    /// The tenants this account may see.
    pub tenants: Vec<MeTenant>,
}

/// The signed-in person.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeUser {
    /// Account id.
    pub id: AccountId,
    /// Sign-in address.
    pub email: String,
    /// Display name.
    pub name: Option<String>,
    /// `operator` or `member`; the existing client knows none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
}

/// A tenant as `/auth/me` lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MeTenant {
    /// Tenant id.
    pub id: TenantId,
    /// Display name.
    pub name: String,
    /// Billing provider's subscription.
    pub subscription_id: Option<String>,
    /// One of the provider's states.
    pub subscription_status: Option<String>,
    /// `sp-…`.
    pub app_id: Option<String>,
    /// `{slug}.{zone}`.
    pub hostname: Option<String>,
    /// What was asked for.
    pub region: Option<Region>,
    /// `pending`, `active`, `suspended` or `deleted`.
    pub status: Option<String>,
    /// Plan, when known.
    pub plan: Option<serde_json::Value>,
    /// Whether the database can be reached from outside.
    pub external_db_access: bool,
    /// Masked with exactly `:***@`, or empty.
    pub database_url: String,
}

/// `POST /auth/setup`: makes the first administrator, once.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetupRequest {
    /// The one-time token that the first start wrote.
    pub setup_token: Secret,
    /// Sign-in address.
    pub email: String,
    /// At least 12 characters.
    pub password: Secret,
}

/// `POST /auth/token`: exchanges the browser flow's code (RFC 6749, PKCE RFC 7636).
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenExchange {
    /// From the loopback redirect; 60 seconds, once.
    pub code: Secret,
    /// Whose SHA-256 was sent as the challenge.
    pub code_verifier: Secret,
    /// Must be the one the code was made for.
    pub redirect_uri: String,
}

/// A new API token.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignedIn {
    /// Shown once.
    pub access_token: Secret,
    /// When it ends.
    pub expires_at: chrono::DateTime<chrono::Utc>,
    /// Whose it is.
    pub user: MeUser,
}
