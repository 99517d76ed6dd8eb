//! The pages on which a person signs in, and makes the first account.

use super::{
    Identity, LoopbackRedirect, accounts,
    codes::{self, Challenge},
    email::Email,
    page_guard::{self, FormSession},
    password, setup,
};
use crate::http::{
    error::Failure,
    pages::{Field, Markup, Page},
};
use axum::{
    extract::{
        Form, Query, State,
        rejection::{FormRejection, QueryRejection},
    },
    http::{HeaderMap, HeaderValue, StatusCode, Uri, header, uri::PathAndQuery},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use std::{
    net::Ipv6Addr,
    time::{Duration, Instant},
};
use systemprompt_contract::{AccountId, ErrorCode, Secret, paths};

/// What the command line asks for, as it stands in the query of the page and comes back with the form.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AuthorizationQuery {
    redirect_uri: String,
    state: String,
    code_challenge: String,
    code_challenge_method: String,
}

/// The same, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Authorization {
    redirect: LoopbackRedirect,
    state: String,
    challenge: Challenge,
}

impl Authorization {
    /// A request that does not check is answered with a page and never redirected: an error sent to an unchecked
    /// address would be the open redirect itself.
    fn parse(query: &AuthorizationQuery) -> Result<Self, Failure> {
        if query.code_challenge_method != "S256" {
            return Err(bad_link("code_challenge_method: expected S256"));
        }
        let state_is_text = (8..=512).contains(&query.state.len()) && query.state.bytes().all(|b| b.is_ascii_graphic());
        if !state_is_text {
            return Err(bad_link("state: expected 8 to 512 visible ASCII characters"));
        }
        Ok(Self {
            redirect: query.redirect_uri.parse().map_err(bad_link)?,
            challenge: query.code_challenge.parse().map_err(bad_link)?,
            state: query.state.clone(),
        })
    }

    fn with_code(&self, code: &Secret) -> String {
        self.redirect.with_query(&[("code", code.expose()), ("state", &self.state)])
    }

    /// For who changes their mind, so that the command line need not wait for its timeout.
    fn declined(&self) -> String {
        self.redirect.with_query(&[("error", "access_denied"), ("state", &self.state)])
    }
}

#[derive(Deserialize)]
pub(super) struct LoginForm {
    email: String,
    password: Secret,
    form_token: String,
    #[serde(flatten)]
    query: AuthorizationQuery,
}

#[derive(Deserialize)]
pub(super) struct SetupForm {
    setup_token: Secret,
    email: String,
    password: Secret,
    form_token: String,
}

/// `GET /login`.
pub(super) async fn show_login(
    State(identity): State<Identity>,
    headers: HeaderMap,
    uri: Uri,
    query: Result<Query<AuthorizationQuery>, QueryRejection>,
) -> Response {
    if let Some(url) = page_guard::home_of(&identity.site, &headers, &uri) {
        return moved(&url);
    }
    let authorization = query
        .map_err(|_| bad_link("expected redirect_uri, state, code_challenge and code_challenge_method, each once"))
        .and_then(|Query(query)| Authorization::parse(&query));
    match authorization {
        Ok(authorization) => {
            let session = FormSession::of(&headers);
            let page = login_page(&authorization, &session.form_token(&identity.form_key), "", None);
            with_cookie(page, &session.cookie())
        }
        Err(Failure(error)) => Page::failure(SIGN_IN, &error).into_response(),
    }
}

/// `GET /login` where no pages are served: to where they are, with what the command line asks for.
pub(crate) async fn login_page_elsewhere(State(identity): State<Identity>, uri: Uri) -> Response {
    let path = uri.path_and_query().map_or(paths::LOGIN_PAGE, PathAndQuery::as_str);
    moved(&format!("{}{path}", identity.site.cloud_url()))
}

/// `POST /login`: back to the command line with a code.
pub(super) async fn submit_login(
    State(identity): State<Identity>,
    headers: HeaderMap,
    form: Result<Form<LoginForm>, FormRejection>,
) -> Response {
    match try_login(&identity, &headers, form).await {
        Ok(response) => response,
        Err(Failure(error)) => Page::failure(SIGN_IN, &error).into_response(),
    }
}

async fn try_login(
    identity: &Identity,
    headers: &HeaderMap,
    form: Result<Form<LoginForm>, FormRejection>,
) -> Result<Response, Failure> {
    let Form(form) = form.map_err(|_| bad_form())?;
    let session = page_guard::check(headers, &identity.site, &identity.form_key, &form.form_token)?;
    let authorization = Authorization::parse(&form.query)?;
    match signed_in_account(identity, &client_of(headers), &form.email, form.password).await {
        Ok(account) => {
            let code =
                codes::create(identity.db.pool(), account, &authorization.redirect, authorization.challenge).await?;
            tracing::info!(account.id = %account, "signed in");
            Ok(redirect(&authorization.with_code(&code)))
        }
        Err(Failure(error)) if matches!(error.code, ErrorCode::Forbidden | ErrorCode::RateLimited) => {
            let form_token = session.form_token(&identity.form_key);
            let page = login_page(&authorization, &form_token, &form.email, Some(&error.message)).status(error.code);
            Ok(with_cookie(page, &session.cookie()))
        }
        Err(failure) => Err(failure),
    }
}

/// The account of an address and its password; the same answer and the same work for a wrong password, an unknown
/// address and a text that is no address.
async fn signed_in_account(
    identity: &Identity,
    client: &str,
    email: &str,
    password: Secret,
) -> Result<AccountId, Failure> {
    let email = email.parse::<Email>().ok();
    // What is no address is nobody's: only its client is held to account for it.
    let limited_as = email.as_ref().map_or(client, Email::as_str);
    identity.limits.admit(client, limited_as, Instant::now()).map_err(too_many_tries)?;
    let known = match &email {
        Some(email) => accounts::credentials(identity.db.pool(), email).await?,
        None => None,
    };
    let (account, stored) = known.unzip();
    let matches = password::verify(password, stored).await.map_err(|error| Failure::internal(&error))?;
    match account.filter(|_| matches) {
        Some(account) => {
            identity.limits.forgive(limited_as);
            Ok(account)
        }
        // Not 401: that would have to name a scheme (RFC 9110, 11.6.1), and a form has none.
        None => Err(Failure::new(ErrorCode::Forbidden, "The address or the password is not right.")),
    }
}

/// Who sent this, as the edge says, which overwrites the header. An IPv6 client has a whole /64 to itself.
fn client_of(headers: &HeaderMap) -> String {
    let said = headers.get("x-forwarded-for").and_then(|value| value.to_str().ok()).unwrap_or_default();
    match said.parse::<Ipv6Addr>() {
        Ok(address) => format!("{:?}", &address.segments()[..4]),
        Err(_) => said.to_owned(),
    }
}

/// `GET /setup`.
pub(super) async fn show_setup(State(identity): State<Identity>, headers: HeaderMap, uri: Uri) -> Response {
    if let Some(url) = page_guard::home_of(&identity.site, &headers, &uri) {
        return moved(&url);
    }
    match setup::is_open(identity.db.pool()).await {
        Ok(true) => {
            let session = FormSession::of(&headers);
            with_cookie(setup_page(&session.form_token(&identity.form_key), "", None), &session.cookie())
        }
        Ok(false) => {
            let body = Markup::new()
                .paragraph("This installation has its first account. Sign in from the command line:")
                .command(&identity.site.sign_in_command());
            Page::new(SET_UP, body).into_response()
        }
        Err(error) => Page::failure(SET_UP, &Failure::from(error).0).into_response(),
    }
}

/// `POST /setup`: makes the account; the token for the command line comes with the first sign-in.
pub(super) async fn submit_setup(
    State(identity): State<Identity>,
    headers: HeaderMap,
    form: Result<Form<SetupForm>, FormRejection>,
) -> Response {
    match try_setup(&identity, &headers, form).await {
        Ok(response) => response,
        Err(Failure(error)) => Page::failure(SET_UP, &error).into_response(),
    }
}

async fn try_setup(
    identity: &Identity,
    headers: &HeaderMap,
    form: Result<Form<SetupForm>, FormRejection>,
) -> Result<Response, Failure> {
    let Form(form) = form.map_err(|_| bad_form())?;
    let session = page_guard::check(headers, &identity.site, &identity.form_key, &form.form_token)?;
    match setup::create_first(identity, &form.setup_token, &form.email, &form.password).await {
        Ok(account) => {
            let body = Markup::new()
                .raw("<p>The account <strong>")
                .text(&account.email)
                .raw("</strong> was made; it runs this installation. Sign in from the command line:</p>")
                .command(&identity.site.sign_in_command());
            Ok(with_cookie(Page::new(SET_UP, body), &page_guard::EXPIRED_COOKIE))
        }
        Err(Failure(error)) if matches!(error.code, ErrorCode::BadRequest | ErrorCode::Forbidden) => {
            let form_token = session.form_token(&identity.form_key);
            let page = setup_page(&form_token, &form.email, Some(&error.message)).status(error.code);
            Ok(with_cookie(page, &session.cookie()))
        }
        Err(failure) => Err(failure),
    }
}

fn login_page(authorization: &Authorization, form_token: &str, email: &str, problem: Option<&str>) -> Page {
    let mut body = Markup::new();
    if let Some(problem) = problem {
        body = body.problem(problem);
    }
    let body = body
        .raw("<p>The SystemPrompt command line on this computer, waiting at <code>")
        .text(authorization.redirect.origin())
        .raw("</code>, asks to act as you for 90 days. Go on only if you have just started it.</p>")
        .raw("<form method=\"post\" action=\"/login\">")
        .hidden("form_token", form_token)
        .hidden("redirect_uri", authorization.redirect.as_str())
        .hidden("state", &authorization.state)
        .hidden("code_challenge", &authorization.challenge.text())
        .hidden("code_challenge_method", "S256")
        .field(&EMAIL, email)
        .field(&PASSWORD, "")
        .raw("<button type=\"submit\">Sign in</button></form><p class=\"small\"><a href=\"")
        .text(&authorization.declined())
        .raw("\">Cancel</a></p>");
    Page { form_target: Some(authorization.redirect.origin().to_owned()), ..Page::new(SIGN_IN, body) }
}

fn setup_page(form_token: &str, email: &str, problem: Option<&str>) -> Page {
    let mut body = Markup::new();
    if let Some(problem) = problem {
        body = body.problem(problem);
    }
    let body = body
        .paragraph(
            "Paste the setup token that the first start of management-api wrote into the file setup-token in its data \
             directory, and choose how you will sign in. The password needs at least 12 characters.",
        )
        .raw("<form method=\"post\" action=\"/setup\">")
        .hidden("form_token", form_token)
        .field(&SETUP_TOKEN, "")
        .field(&EMAIL, email)
        .field(&NEW_PASSWORD, "")
        .raw("<button type=\"submit\">Make the first account</button></form>");
    Page::new(SET_UP, body)
}

/// To the command line. The code in this URL ends within 60 seconds and is useless without the verifier.
fn redirect(location: &str) -> Response {
    let Ok(location) = HeaderValue::from_str(location) else {
        return Failure::new(ErrorCode::BadRequest, "the redirect is not a URL").into_response();
    };
    let headers = [
        (header::LOCATION, location),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (header::REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (header::SET_COOKIE, page_guard::EXPIRED_COOKIE),
    ];
    (StatusCode::FOUND, headers).into_response()
}

/// The same page under the name that its form is accepted from. No cookie goes along: it would be another host's.
fn moved(url: &str) -> Response {
    let Ok(location) = HeaderValue::from_str(url) else {
        return Failure::new(ErrorCode::BadRequest, "the address of the page is not a URL").into_response();
    };
    let headers = [(header::LOCATION, location), (header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
    (StatusCode::FOUND, headers).into_response()
}

fn with_cookie(page: Page, cookie: &HeaderValue) -> Response {
    let mut response = page.into_response();
    response.headers_mut().insert(header::SET_COOKIE, cookie.clone());
    response
}

pub(super) fn too_many_tries(wait: Duration) -> Failure {
    let seconds = wait.as_secs() + 1;
    Failure::new(ErrorCode::RateLimited, format!("Too many tries. Wait {seconds} seconds and try again."))
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err(bad_link)")]
fn bad_link(problem: impl ToString) -> Failure {
    Failure::new(
        ErrorCode::BadRequest,
        format!("This link does not come from the command line: {}", problem.to_string()),
    )
    .hint("Start the same command again.")
}

fn bad_form() -> Failure {
    Failure::new(ErrorCode::BadRequest, "The form did not arrive whole.").hint("Load the page again and fill it in.")
}

const SIGN_IN: &str = "Sign in";
const SET_UP: &str = "Set up this installation";
const EMAIL: Field = Field { name: "email", label: "E-mail", kind: "email", autocomplete: "username" };
const PASSWORD: Field =
    Field { name: "password", label: "Password", kind: "password", autocomplete: "current-password" };
const NEW_PASSWORD: Field =
    Field { name: "password", label: "Password", kind: "password", autocomplete: "new-password" };
const SETUP_TOKEN: Field = Field { name: "setup_token", label: "Setup token", kind: "password", autocomplete: "off" };
