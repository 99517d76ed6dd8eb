//! Paths of the Management API, built here for the client and named once.

use crate::ids::{CheckoutId, OperationId, TenantId};

/// Prefix of every call.
pub const PREFIX: &str = "/api/v1";
/// Health of the platform, and of a tenant's app under its own host.
pub const HEALTH: &str = "/api/v1/health";
/// Who am I.
pub const ME: &str = "/api/v1/auth/me";
/// First administrator.
pub const SETUP: &str = "/api/v1/auth/setup";
/// Code for token.
pub const TOKEN: &str = "/api/v1/auth/token";
/// Revokes the token it is called with.
pub const LOGOUT: &str = "/api/v1/auth/logout";
/// The page a browser opens to sign in.
pub const LOGIN_PAGE: &str = "/login";
/// Plans.
pub const PLANS: &str = "/api/v1/checkout/plans";
/// Buy.
pub const CHECKOUT: &str = "/api/v1/checkout";
/// All tenants of the account.
pub const TENANTS: &str = "/api/v1/tenants";

/// One checkout, and below it `events` and `confirm`.
pub fn checkout(id: CheckoutId, rest: &str) -> String {
    format!("{CHECKOUT}/{id}{rest}")
}
/// One tenant, and below it `status`, `events`, `deploy`, …; `rest` starts with `/` or is empty.
pub fn tenant(id: TenantId, rest: &str) -> String {
    format!("{TENANTS}/{id}{rest}")
}
/// One operation.
pub fn operation(id: OperationId) -> String {
    format!("{PREFIX}/operations/{id}")
}
