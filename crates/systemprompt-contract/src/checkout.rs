use crate::{
    ids::{CheckoutId, TenantId},
    names::{Region, TenantName},
};
use serde::{Deserialize, Serialize};

/// One entry of `GET /checkout/plans` (a bare array).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Plan id.
    pub id: String,
    /// Shown name.
    pub name: String,
    /// What `POST /checkout` sends back as `price_id`; the billing provider's name for it.
    pub paddle_price_id: String,
    /// Memory of an instance, MiB.
    pub memory_mb_default: u32,
    /// Volume, GiB.
    pub volume_gb: u32,
    /// How many tenants one account may hold; none: no limit.
    pub max_tenants: Option<u32>,
}

/// `POST /checkout`. The existing client sends the first three fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckoutRequest {
    /// `paddle_price_id` of a plan.
    pub price_id: String,
    /// Where.
    pub region: Region,
    /// Loopback address for the browser's return.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redirect_uri: Option<String>,
    /// Name of the tenant to be; made from the account when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<TenantName>,
}

/// Answer of `POST /checkout`, bare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckoutCreated {
    /// Page to open in a browser.
    pub checkout_url: String,
    /// The provider's transaction.
    pub transaction_id: String,
    /// Our id; names the event stream.
    pub checkout_session_id: CheckoutId,
}

/// `GET /checkout/{id}` and the answer of `POST /checkout/{id}/confirm`, wrapped in `data`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckoutState {
    /// Our id.
    pub checkout_session_id: CheckoutId,
    /// `open` or `confirmed`.
    pub status: String,
    /// Known once confirmed.
    pub tenant_id: Option<TenantId>,
    /// Name of the tenant to be.
    pub tenant_name: String,
    /// Where.
    pub region: Region,
    /// `paddle_price_id` of its plan.
    pub price_id: String,
}
