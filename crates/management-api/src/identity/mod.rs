//! Accounts and how they prove themselves.
//!
//! A person has an account (argon2id password). A program has an API token: 90 days, stored as SHA-256, revocable.
//! The command line gets its token by the browser flow: `GET /login` with a loopback redirect, a state and a PKCE
//! challenge; the person signs in there; the browser carries a code back (60 seconds, once); `POST /api/v1/auth/token`
//! exchanges it. No token ever stands in a URL.

mod accounts;
mod codes;
mod email;
mod limits;
mod page_guard;
mod pages;
mod password;
mod redirect;
mod setup;
mod tokens;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

pub(crate) use accounts::{NewAccount, Role, account_by_id, create_account};
pub(crate) use limits::Limits;
pub(crate) use pages::login_page_elsewhere;
pub(crate) use redirect::LoopbackRedirect;
pub(crate) use setup::ensure_setup_token;
pub(crate) use tokens::Principal;

use crate::{
    app::{App, Site},
    http::{
        Access, Endpoints,
        error::{Failure, Json},
    },
};
use axum::{
    Extension,
    extract::{FromRef, State},
    http::{HeaderMap, StatusCode, header},
    routing::MethodFilter as M,
};
use std::path::PathBuf;
use systemprompt_contract::{ErrorCode, Me, SetupRequest, SignedIn, TokenExchange};
use systemprompt_workflow::Db;

/// What the handlers of this module need, and nothing else of the application.
#[derive(Clone)]
pub(crate) struct Identity {
    db: Db,
    site: Site,
    limits: Limits,
    /// Binds a page's form to the browser that was given the page.
    form_key: [u8; 32],
    setup_token_file: PathBuf,
}

impl FromRef<App> for Identity {
    fn from_ref(app: &App) -> Self {
        Self {
            db: app.db.clone(),
            site: app.site.clone(),
            limits: app.identity.clone(),
            form_key: app.seal.derive("login-form"),
            setup_token_file: app.setup_token_file.clone(),
        }
    }
}

pub(crate) fn endpoints(endpoints: Endpoints) -> Endpoints {
    endpoints
        .add(M::GET, "/", Access::Public, crate::http::pages::landing)
        .add(M::GET, "/login", Access::Public, pages::show_login)
        .add(M::POST, "/login", Access::Public, pages::submit_login)
        .add(M::GET, "/setup", Access::Public, pages::show_setup)
        .add(M::POST, "/setup", Access::Public, pages::submit_setup)
        .add(M::POST, "/api/v1/auth/setup", Access::Public, set_up)
        .add(M::POST, "/api/v1/auth/token", Access::Public, exchange)
        .add(M::POST, "/api/v1/auth/logout", Access::SignedIn, sign_out)
        .add(M::GET, "/api/v1/auth/me", Access::SignedIn, me)
}

/// Who sends this request, by its bearer token.
///
/// # Errors
/// `unauthorized`, the same for a token that never was, ended or was revoked; those of the database.
pub(crate) async fn principal(app: &App, headers: &HeaderMap) -> Result<Principal, Failure> {
    let token = bearer(headers).ok_or_else(|| unauthorized(&app.site, "this call needs a token, and none came"))?;
    tokens::authenticate(app.db.pool(), token)
        .await?
        .ok_or_else(|| unauthorized(&app.site, "the token is not valid, or not any more"))
}

/// Makes an account and a first token for it, for the operator's own command.
///
/// # Errors
/// When the address is taken; not idempotent.
pub(crate) async fn create_signed_in(db: &Db, new: NewAccount) -> Result<SignedIn, accounts::AccountError> {
    let account = create_account(db.pool(), new).await?;
    Ok(tokens::sign_in(db.pool(), account, "created by the operator").await?)
}

/// A token for the installation's first operator, whom only his own command asks for; none without an operator.
///
/// # Errors
/// Those of the database.
pub(crate) async fn sign_in_operator(db: &Db) -> Result<Option<SignedIn>, sqlx::Error> {
    match accounts::first_operator(db.pool()).await? {
        Some(account) => tokens::sign_in(db.pool(), account, "made on the installation's machine").await.map(Some),
        None => Ok(None),
    }
}

/// The token of `Authorization: Bearer …` (RFC 6750, 2.1); only one such header counts.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn unauthorized(site: &Site, message: &str) -> Failure {
    Failure::new(ErrorCode::Unauthorized, message).hint(format!("sign in: {}", site.sign_in_command()))
}

/// `POST /auth/setup`: the first account, an operator, and a token for it.
async fn set_up(
    State(identity): State<Identity>,
    Json(request): Json<SetupRequest>,
) -> Result<axum::Json<SignedIn>, Failure> {
    let account = setup::create_first(&identity, &request.setup_token, &request.email, &request.password).await?;
    Ok(axum::Json(tokens::sign_in(identity.db.pool(), account, "setup").await?))
}

/// `POST /auth/token`: a code for a token.
async fn exchange(
    State(identity): State<Identity>,
    Json(request): Json<TokenExchange>,
) -> Result<axum::Json<SignedIn>, Failure> {
    Ok(axum::Json(codes::exchange(&identity, &request).await?))
}

/// `POST /auth/logout`: the token it came with ends now.
async fn sign_out(
    State(identity): State<Identity>,
    Extension(principal): Extension<Principal>,
) -> Result<StatusCode, Failure> {
    tokens::revoke(identity.db.pool(), principal.token).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `GET /auth/me`, bare.
async fn me(State(app): State<App>, Extension(principal): Extension<Principal>) -> Result<axum::Json<Me>, Failure> {
    let account = account_by_id(app.db.pool(), principal.account).await?;
    let account = account.ok_or_else(|| unauthorized(&app.site, "the account is gone"))?;
    let tenants = crate::tenants::me_tenants(&app, &principal).await?;
    Ok(axum::Json(Me { user: account.into_user(), customer: None, tenants }))
}
