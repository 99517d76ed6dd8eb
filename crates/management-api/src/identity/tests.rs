//! Sign-in on a real database, through the handlers.

use super::{
    accounts::AccountError,
    codes::Challenge,
    testing::{PASSWORD, TestDatabase},
    tokens::issue_token,
    *,
};
use axum::{
    Router,
    body::Body,
    http::{Request, request::Builder},
    response::Response,
    routing::{get, post},
};
use http_body_util::BodyExt as _;
use std::os::unix::fs::PermissionsExt as _;
use systemprompt_contract::{ApiError, ErrorBody, Secret, token};
use tower::ServiceExt as _;
use url::{Url, form_urlencoded};

const ORIGIN: &str = "https://cloud.example.org:8443";
const REDIRECT: &str = "http://127.0.0.1:8765/callback";
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const STATE: &str = "state-of-the-client";

struct Rig {
    database: TestDatabase,
    identity: Identity,
    router: Router,
    _files: tempfile::TempDir,
}

impl Rig {
    async fn start() -> Self {
        let database = TestDatabase::start().await;
        let files = tempfile::tempdir().unwrap();
        let identity = Identity {
            db: database.db.clone(),
            site: Site { zone: "example.org".parse().unwrap(), https_port: 8443 },
            limits: Limits::default(),
            form_key: [7; 32],
            setup_token_file: files.path().join("setup-token"),
        };
        let router = Router::new()
            .route("/login", get(pages::show_login).post(pages::submit_login))
            .route("/setup", get(pages::show_setup).post(pages::submit_setup))
            .route("/api/v1/auth/setup", post(set_up))
            .route("/api/v1/auth/token", post(exchange))
            .with_state(identity.clone());
        Self { database, identity, router, _files: files }
    }

    async fn send(&self, request: Request<Body>) -> Response {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn post_json(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value, ApiError> {
        let request = Request::post(path).header("content-type", "application/json").body(Body::from(body.to_string()));
        let response = self.send(request.unwrap()).await;
        let status = response.status();
        let text = text_of(response).await;
        if status.is_success() {
            return Ok(serde_json::from_str(&text).unwrap());
        }
        let error = serde_json::from_str::<ErrorBody>(&text).unwrap().error;
        assert_eq!(status.as_u16(), error.code.status());
        Err(error)
    }

    /// Loads the login page as a browser does: its cookie, and the form it holds.
    async fn open_login(&self) -> Form {
        let challenge = Challenge::of_verifier(VERIFIER).unwrap().text();
        let query = form_urlencoded::Serializer::new(String::new())
            .extend_pairs([
                ("redirect_uri", REDIRECT),
                ("state", STATE),
                ("code_challenge", &challenge),
                ("code_challenge_method", "S256"),
            ])
            .finish();
        self.open(&format!("/login?{query}")).await
    }

    async fn open(&self, path: &str) -> Form {
        let response = self.send(Request::get(path).body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::OK);
        let cookie = response.headers()[header::SET_COOKIE].to_str().unwrap().split(';').next().unwrap().to_owned();
        let page = text_of(response).await;
        Form { path: path.split('?').next().unwrap().to_owned(), cookie, fields: hidden_fields(&page) }
    }

    async fn submit(&self, form: &Form, typed: &[(&str, &str)]) -> Response {
        self.send(form.request().body(form.body(typed)).unwrap()).await
    }

    async fn sign_in(&self, email: &str, password: &str) -> Response {
        let form = self.open_login().await;
        self.submit(&form, &[("email", email), ("password", password)]).await
    }

    /// A code as the command line gets it.
    async fn code(&self) -> String {
        let response = self.sign_in("ada@example.com", PASSWORD).await;
        assert_eq!(response.status(), StatusCode::FOUND);
        let location = Url::parse(response.headers()[header::LOCATION].to_str().unwrap()).unwrap();
        let query: std::collections::HashMap<_, _> = location.query_pairs().into_owned().collect();
        assert_eq!(location.as_str().split('?').next(), Some(REDIRECT));
        assert_eq!((query.len(), &*query["state"]), (2, STATE));
        query["code"].clone()
    }

    async fn exchange(&self, code: &str, verifier: &str, redirect: &str) -> Result<String, ErrorCode> {
        let body = serde_json::json!({ "code": code, "code_verifier": verifier, "redirect_uri": redirect });
        let answer = self.post_json("/api/v1/auth/token", &body).await.map_err(|error| error.code)?;
        Ok(answer["access_token"].as_str().unwrap().to_owned())
    }

    async fn principal(&self, token: &str) -> Option<Principal> {
        tokens::authenticate(self.database.db.pool(), token).await.unwrap()
    }

    async fn setup_token(&self) -> String {
        let file = ensure_setup_token(&self.database.db, &self.identity.setup_token_file).await.unwrap().unwrap();
        std::fs::read_to_string(file).unwrap().trim().to_owned()
    }

    async fn set_up(&self, token: &str, email: &str, password: &str) -> Result<serde_json::Value, ErrorCode> {
        let body = serde_json::json!({ "setup_token": token, "email": email, "password": password });
        self.post_json("/api/v1/auth/setup", &body).await.map_err(|error| error.code)
    }

    async fn execute(&self, statement: &'static str) {
        sqlx::query(statement).execute(self.database.db.pool()).await.unwrap();
    }
}

/// A form in a browser.
struct Form {
    path: String,
    cookie: String,
    fields: Vec<(String, String)>,
}

impl Form {
    fn request(&self) -> Builder {
        Request::post(&self.path)
            .header("content-type", "application/x-www-form-urlencoded")
            .header("origin", ORIGIN)
            .header("sec-fetch-site", "same-origin")
            .header("cookie", &self.cookie)
    }

    fn body(&self, typed: &[(&str, &str)]) -> Body {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.extend_pairs(&self.fields).extend_pairs(typed);
        Body::from(form.finish())
    }
}

fn hidden_fields(page: &str) -> Vec<(String, String)> {
    page.split("<input type=\"hidden\" name=\"")
        .skip(1)
        .map(|rest| {
            let (name, rest) = rest.split_once("\" value=\"").unwrap();
            (name.to_owned(), rest.split_once('"').unwrap().0.to_owned())
        })
        .collect()
}

async fn text_of(response: Response) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn the_first_account_is_made_once_with_the_token_from_the_file() {
    let rig = Rig::start().await;
    let token = rig.setup_token().await;
    assert_eq!(rig.setup_token().await, token, "a start that finds a waiting token keeps it");
    let mode = std::fs::metadata(&rig.identity.setup_token_file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(token::verify_checksum(&token).is_some());

    let other = token::new_random_token(token::SETUP_PREFIX);
    assert_eq!(rig.set_up(other.expose(), "ada@example.com", PASSWORD).await, Err(ErrorCode::Forbidden));
    assert_eq!(rig.set_up(&token, "ada@example.com", "too short").await, Err(ErrorCode::BadRequest));
    assert_eq!(rig.set_up(&token, "ada", PASSWORD).await, Err(ErrorCode::BadRequest));

    let signed_in = rig.set_up(&token, "Ada@Example.com", PASSWORD).await.expect("mistakes do not burn the token");
    assert_eq!(signed_in["user"]["email"], "ada@example.com");
    let principal = rig.principal(signed_in["access_token"].as_str().unwrap()).await.unwrap();
    assert!(principal.is_operator());

    assert_eq!(rig.set_up(&token, "eve@example.com", PASSWORD).await, Err(ErrorCode::AlreadyUsed));
    assert!(!rig.identity.setup_token_file.exists());
    assert_eq!(ensure_setup_token(&rig.database.db, &rig.identity.setup_token_file).await.unwrap(), None);
}

#[tokio::test]
async fn a_lost_or_stale_setup_file_is_replaced_by_a_token_that_works() {
    let rig = Rig::start().await;
    let first = rig.setup_token().await;
    std::fs::remove_file(&rig.identity.setup_token_file).unwrap();
    let second = rig.setup_token().await;
    assert_ne!(first, second);
    // As after a crash between file and commit.
    std::fs::write(&rig.identity.setup_token_file, "sp_setup_of_a_start_that_died").unwrap();
    let third = rig.setup_token().await;
    assert_eq!(rig.set_up(&second, "ada@example.com", PASSWORD).await, Err(ErrorCode::Forbidden));
    rig.set_up(&third, "ada@example.com", PASSWORD).await.unwrap();
}

#[tokio::test]
async fn of_many_setups_at_once_one_wins() {
    let rig = Rig::start().await;
    let token = rig.setup_token().await;
    let emails: Vec<_> = (0..8).map(|n| format!("a{n}@example.com")).collect();
    let all = emails.iter().map(|email| rig.set_up(&token, email, PASSWORD));
    let answers = futures_util::future::join_all(all).await;
    let won = answers.iter().filter(|answer| answer.is_ok()).count();
    let late = answers.iter().filter(|answer| **answer == Err(ErrorCode::AlreadyUsed)).count();
    assert_eq!((won, late), (1, 7), "{answers:?}");
    assert_eq!(rig.database.count("SELECT count(*) FROM accounts").await, 1);
}

#[tokio::test]
async fn a_setup_token_opens_nothing_once_an_account_exists_by_other_means() {
    let rig = Rig::start().await;
    let token = rig.setup_token().await;
    rig.database.account("ada@example.com", Role::Operator).await;
    assert_eq!(rig.set_up(&token, "eve@example.com", PASSWORD).await, Err(ErrorCode::AlreadyUsed));
}

#[tokio::test]
async fn the_setup_page_makes_the_account_and_hands_out_no_token() {
    let rig = Rig::start().await;
    let token = rig.setup_token().await;
    let form = rig.open("/setup").await;
    let typed = [("setup_token", &*token), ("email", "ada@example.com"), ("password", PASSWORD)];
    let foreign = Request::post("/setup")
        .header("content-type", "application/x-www-form-urlencoded")
        .header("origin", "https://999bc6549a64.example.org:8443")
        .header("sec-fetch-site", "same-site")
        .header("cookie", &form.cookie);
    assert_eq!(rig.send(foreign.body(form.body(&typed)).unwrap()).await.status(), StatusCode::FORBIDDEN);

    let response = rig.submit(&form, &[typed[0], typed[1], ("password", "short")]).await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let page = text_of(response).await;
    assert!(
        page.contains("at least 12 characters") && page.contains("value=\"ada@example.com\"") && !page.contains(&token)
    );

    let response = rig.submit(&form, &typed).await;
    assert_eq!(response.status(), StatusCode::OK);
    let page = text_of(response).await;
    assert!(page.contains("ada@example.com") && !page.contains("sp_live_") && !page.contains(PASSWORD));
    assert_eq!(rig.database.count("SELECT count(*) FROM api_tokens").await, 0);
    let page = text_of(rig.send(Request::get("/setup").body(Body::empty()).unwrap()).await).await;
    assert!(page.contains("has its first account"));
}

#[tokio::test]
async fn the_browser_flow_ends_in_a_token() {
    let rig = Rig::start().await;
    let account = rig.database.account("ada@example.com", Role::Member).await;
    let code = rig.code().await;
    let token = rig.exchange(&code, VERIFIER, REDIRECT).await.unwrap();
    let principal = rig.principal(&token).await.unwrap();
    assert_eq!((principal.account, principal.role), (account.id, Role::Member));
    assert_eq!(token.split('.').count(), 3);
    let days = (token::untrusted_expiry(&token).unwrap() - chrono::Utc::now().timestamp()) / 86_400;
    assert!((89..=90).contains(&days), "{days}");
    assert_eq!(rig.database.count("SELECT count(*) FROM login_codes WHERE used_at IS NULL").await, 0);
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_address_look_the_same() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let mut pages = Vec::new();
    for (email, password) in [
        ("ada@example.com", "wrong horse battery"),
        ("eve@example.com", PASSWORD),
        ("no address", PASSWORD),
        ("ada@example.com", ""),
    ] {
        let response = rig.sign_in(email, password).await;
        assert_eq!(response.status(), StatusCode::FORBIDDEN, "{email}");
        assert!(!response.headers().contains_key(header::LOCATION));
        let page = text_of(response).await;
        assert!(!page.contains("battery"), "the password is not sent back");
        let form_token = hidden_fields(&page).swap_remove(0).1;
        pages.push(page.replace(email, "EMAIL").replace(&form_token, "TOKEN"));
    }
    assert!(pages.iter().all(|page| *page == pages[0]), "{pages:?}");
    assert_eq!(rig.database.count("SELECT count(*) FROM login_codes").await, 0);
}

#[tokio::test]
async fn tries_run_out_and_the_right_password_no_longer_helps() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let mut statuses = Vec::new();
    for _ in 0..9 {
        statuses.push(rig.sign_in("ada@example.com", "wrong horse battery").await.status());
    }
    assert_eq!(statuses.pop(), Some(StatusCode::TOO_MANY_REQUESTS));
    assert!(statuses.iter().all(|status| *status == StatusCode::FORBIDDEN));
    let response = rig.sign_in("ADA@example.com", PASSWORD).await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(text_of(response).await.contains("Too many tries"));
}

#[tokio::test]
async fn a_login_link_that_is_not_the_command_lines_redirects_nowhere() {
    let rig = Rig::start().await;
    let challenge = "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM";
    let good = format!("redirect_uri={REDIRECT}&state={STATE}&code_challenge={challenge}&code_challenge_method=S256");
    let bad = [
        String::new(),
        good.replace(REDIRECT, "https://evil.example/callback"),
        good.replace(REDIRECT, "http://127.0.0.1:8765%40evil.example/callback"),
        good.replace(REDIRECT, "http://localhost:8765/callback"),
        good.replace("S256", "plain"),
        good.replace("&code_challenge_method=S256", ""),
        good.replace(challenge, "short"),
        good.replace(STATE, ""),
        good.replace(STATE, "has%20space"),
        good.replace(STATE, &"x".repeat(513)),
        format!("{good}&redirect_uri=https://evil.example/callback"),
    ];
    for query in bad {
        let response = rig.send(Request::get(format!("/login?{query}")).body(Body::empty()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::BAD_REQUEST, "{query}");
        assert!(!response.headers().contains_key(header::LOCATION));
        assert!(!text_of(response).await.contains("href=\"http"));
    }
}

#[tokio::test]
async fn a_form_whose_hidden_fields_were_changed_redirects_nowhere() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    for (name, value) in
        [("redirect_uri", "https://evil.example/callback"), ("code_challenge_method", "plain"), ("form_token", "AAAA")]
    {
        let mut form = rig.open_login().await;
        form.fields.iter_mut().find(|field| field.0 == name).unwrap().1 = value.to_owned();
        let response = rig.submit(&form, &[("email", "ada@example.com"), ("password", PASSWORD)]).await;
        assert!(response.status().is_client_error(), "{name}");
        assert!(!response.headers().contains_key(header::LOCATION));
    }
    assert_eq!(rig.database.count("SELECT count(*) FROM login_codes").await, 0);
}

#[tokio::test]
async fn a_code_needs_its_verifier_and_its_redirect_and_one_attempt_burns_it() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let challenge = Challenge::of_verifier(VERIFIER).unwrap().text();
    let other_verifier = "x".repeat(43);
    for (verifier, redirect) in [
        (other_verifier.as_str(), REDIRECT),
        (challenge.as_str(), REDIRECT), // "plain"
        ("", REDIRECT),
        (&VERIFIER[..42], REDIRECT),
        (VERIFIER, "http://127.0.0.1:8766/callback"),
        (VERIFIER, ""),
    ] {
        let code = rig.code().await;
        assert_eq!(rig.exchange(&code, verifier, redirect).await, Err(ErrorCode::BadRequest), "{verifier} {redirect}");
        assert_eq!(rig.exchange(&code, VERIFIER, REDIRECT).await, Err(ErrorCode::AlreadyUsed), "burnt");
    }
    assert_eq!(rig.exchange("never-made", VERIFIER, REDIRECT).await, Err(ErrorCode::BadRequest));
    assert_eq!(rig.database.count("SELECT count(*) FROM api_tokens").await, 0);
}

#[tokio::test]
async fn a_code_ends_after_sixty_seconds() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let code = rig.code().await;
    let seconds = "SELECT extract(epoch FROM expires_at - created_at)::bigint FROM login_codes";
    assert_eq!(rig.database.count(seconds).await, 60);
    rig.execute(
        "UPDATE login_codes SET created_at = created_at - interval '61 s', expires_at = expires_at - interval '61 s'",
    )
    .await;
    assert_eq!(rig.exchange(&code, VERIFIER, REDIRECT).await, Err(ErrorCode::BadRequest));
}

#[tokio::test]
async fn a_replayed_code_revokes_the_token_it_gave() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let code = rig.code().await;
    let token = rig.exchange(&code, VERIFIER, REDIRECT).await.unwrap();
    assert!(rig.principal(&token).await.is_some());
    assert_eq!(rig.exchange(&code, "stolen", REDIRECT).await, Err(ErrorCode::AlreadyUsed));
    assert!(rig.principal(&token).await.is_none());
}

#[tokio::test]
async fn of_many_exchanges_at_once_one_wins_and_the_others_revoke_it() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let code = rig.code().await;
    let answers = futures_util::future::join_all((0..12).map(|_| rig.exchange(&code, VERIFIER, REDIRECT))).await;
    let tokens: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    assert_eq!(tokens.len(), 1, "{answers:?}");
    assert!(rig.principal(tokens[0]).await.is_none());
}

#[tokio::test]
async fn a_token_is_good_until_it_ends_or_is_revoked_and_only_whole() {
    let rig = Rig::start().await;
    let account = rig.database.account("ada@example.com", Role::Member).await;
    let pool = rig.database.db.pool();
    let issue = async || {
        let mut connection = pool.acquire().await.unwrap();
        issue_token(&mut connection, account.id, "test").await.unwrap()
    };
    let (revoked, revoked_id, _) = issue().await;
    let (ended, ended_id, _) = issue().await;
    let (good, _, _) = issue().await;
    tokens::revoke(pool, revoked_id).await.unwrap();
    tokens::revoke(pool, revoked_id).await.unwrap();
    sqlx::query("UPDATE api_tokens SET created_at = now() - interval '91 d', expires_at = now() WHERE id = $1")
        .bind(ended_id.uuid())
        .execute(pool)
        .await
        .unwrap();
    let altered = good.expose().replacen("sp_live_e", "sp_live_f", 1);
    let never_issued = token::new_api_token(chrono::Utc::now().timestamp() + 1000);
    let other_kind = token::with_checksum(good.expose().replace("sp_live_", "sp_sync_"));
    for bad in [
        revoked.expose(),
        ended.expose(),
        &altered,
        &good.expose()[..good.expose().len() - 1],
        &format!("{}x", good.expose()),
        never_issued.expose(),
        other_kind.expose(),
        "sp_live_",
        "",
    ] {
        assert!(rig.principal(bad).await.is_none(), "{bad}");
    }
    assert!(rig.principal(good.expose()).await.is_some());
}

#[tokio::test]
async fn the_last_use_is_noted_at_most_once_a_minute() {
    let rig = Rig::start().await;
    let account = rig.database.account("ada@example.com", Role::Member).await;
    let mut connection = rig.database.db.pool().acquire().await.unwrap();
    let (token, _, _) = issue_token(&mut connection, account.id, "test").await.unwrap();
    let used = "SELECT (extract(epoch FROM last_used_at) * 1000000)::bigint FROM api_tokens";
    rig.principal(token.expose()).await.unwrap();
    let first = rig.database.count(used).await;
    rig.principal(token.expose()).await.unwrap();
    assert_eq!(rig.database.count(used).await, first);
    rig.execute("UPDATE api_tokens SET last_used_at = last_used_at - interval '61 s'").await;
    rig.principal(token.expose()).await.unwrap();
    assert!(rig.database.count(used).await >= first);
}

#[tokio::test]
async fn an_address_is_one_account_and_nothing_clear_is_stored() {
    let rig = Rig::start().await;
    rig.database.account("ada@example.com", Role::Member).await;
    let again = NewAccount {
        email: "ADA@example.com".parse().unwrap(),
        password: PASSWORD.parse().unwrap(),
        name: None,
        role: Role::Operator,
    };
    assert!(matches!(create_account(rig.database.db.pool(), again).await, Err(AccountError::Taken(_))));

    let code = rig.code().await;
    let token = rig.exchange(&code, VERIFIER, REDIRECT).await.unwrap();
    for clear in [PASSWORD, &code, &token] {
        let found: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT 1 FROM accounts a WHERE a::text LIKE $1)
                 OR EXISTS (SELECT 1 FROM api_tokens t WHERE t::text LIKE $1)
                 OR EXISTS (SELECT 1 FROM login_codes c WHERE c::text LIKE $1)",
        )
        .bind(format!("%{clear}%"))
        .fetch_one(rig.database.db.pool())
        .await
        .unwrap();
        assert!(!found);
    }
}

#[test]
fn one_bearer_header_counts_in_any_case_of_its_scheme() {
    let with = |values: &[&str]| {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::AUTHORIZATION, value.parse().unwrap());
        }
        bearer(&headers).map(ToOwned::to_owned)
    };
    assert_eq!(with(&["Bearer x"]), Some("x".to_owned()));
    assert_eq!(with(&["bearer  x"]), Some("x".to_owned()));
    for none in [&[][..], &["Basic x"], &["Bearer"], &["x"], &["Bearer x", "Bearer y"]] {
        assert_eq!(with(none), None, "{none:?}");
    }
}

#[test]
fn requests_refuse_fields_they_do_not_know() {
    let request = serde_json::json!({ "code": "c", "code_verifier": "v", "redirect_uri": "r", "client_secret": "s" });
    let error = crate::http::error::parse_json::<TokenExchange>(request.to_string().as_bytes()).unwrap_err();
    assert_eq!(error.0.code, ErrorCode::UnknownField);
    assert!(format!("{:?}", Secret::new("s")).contains("redacted"));
}
