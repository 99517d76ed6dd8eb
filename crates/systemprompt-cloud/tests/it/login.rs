use crate::api::{http, serve};
use axum::{Json, Router, routing::post};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::{collections::HashMap, sync::Arc, time::Duration};
use systemprompt_cloud::{ApiUrl, LoginError, sign_in_with_browser};
use systemprompt_contract::SignedIn;
use tokio::{
    io::AsyncReadExt as _,
    net::TcpStream,
    sync::{Mutex, oneshot},
    task::JoinHandle,
};
use url::Url;

/// What the browser is sent to, taken apart.
struct Address {
    url: Url,
    query: HashMap<String, String>,
}

impl Address {
    fn callback(&self, query: &str) -> String {
        format!("{}?{query}", self.query["redirect_uri"])
    }
}

/// A token endpoint that checks PKCE as a server must; remembers what it was sent.
async fn token_endpoint() -> (ApiUrl, Arc<Mutex<Vec<Value>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&seen);
    let exchange = move |Json(body): Json<Value>| async move {
        keep.lock().await.push(body);
        Json(json!({"access_token": "sp_live_x.y.z", "expires_at": "2030-01-01T00:00:00Z",
            "user": {"id": "999bc654-9a64-49bc-98be-db976fc84e76", "email": "dev@example.com", "name": null}}))
    };
    (serve(Router::new().route("/api/v1/auth/token", post(exchange))).await, seen)
}

async fn begin(api_url: &ApiUrl) -> (Address, JoinHandle<Result<SignedIn, LoginError>>) {
    let (sender, receiver) = oneshot::channel();
    let api_url = api_url.clone();
    let login = tokio::spawn(async move {
        sign_in_with_browser(&api_url, http(), |address| {
            sender.send(address.to_owned()).expect("the test waits");
        })
        .await
    });
    let url = Url::parse(&receiver.await.expect("an address")).expect("a URL");
    let query = url.query_pairs().into_owned().collect();
    (Address { url, query }, login)
}

async fn visit(address: &str) -> (u16, String) {
    let answer = http().get(address).send().await.expect("the listener answers");
    (answer.status().as_u16(), answer.text().await.expect("a page"))
}

#[tokio::test]
async fn a_code_with_our_state_is_exchanged_with_its_verifier() {
    let (api_url, seen) = token_endpoint().await;
    let (address, login) = begin(&api_url).await;
    assert_eq!(address.url.path(), "/login");
    assert_eq!((address.query["client_id"].as_str(), address.query["code_challenge_method"].as_str()), ("cli", "S256"));
    let (status, page) = visit(&address.callback(&format!("code=the-code&state={}", address.query["state"]))).await;
    assert_eq!(status, 200);
    assert!(page.contains("return to the terminal") && !page.contains("the-code"), "{page}");
    let signed_in = login.await.expect("no panic").expect("signed in");
    assert_eq!((signed_in.access_token.expose(), signed_in.user.email.as_str()), ("sp_live_x.y.z", "dev@example.com"));
    let sent = seen.lock().await.remove(0);
    assert_eq!(
        (sent["code"].as_str(), sent["redirect_uri"].as_str()),
        (Some("the-code"), Some(address.query["redirect_uri"].as_str()))
    );
    let verifier = sent["code_verifier"].as_str().expect("a verifier");
    assert_eq!(URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)), address.query["code_challenge"]);
}

#[tokio::test]
async fn strangers_neither_answer_for_the_browser_nor_end_the_wait() {
    let (api_url, seen) = token_endpoint().await;
    let (address, login) = begin(&api_url).await;
    let authority =
        address.query["redirect_uri"].strip_prefix("http://").and_then(|rest| rest.strip_suffix("/callback"));
    // A browser's preconnection that never says anything must not stand in the way.
    let _idle = TcpStream::connect(authority.expect("loopback")).await.expect("connected");
    for query in ["code=evil&state=wrong", "code=evil", "error=access_denied&state=wrong", "error=access_denied", ""] {
        assert_eq!(visit(&address.callback(query)).await.0, 400, "{query}");
    }
    assert_eq!(visit(&address.callback("code=evil").replace("/callback", "/callback/x")).await.0, 404);
    assert!(!login.is_finished() && seen.lock().await.is_empty());
    visit(&address.callback(&format!("code=ours&state={}", address.query["state"]))).await;
    login.await.expect("no panic").expect("signed in");
    assert_eq!(seen.lock().await[0]["code"], "ours");
}

#[tokio::test]
async fn a_refusal_with_our_state_ends_the_wait_and_closes_the_port() {
    let (api_url, seen) = token_endpoint().await;
    let (address, login) = begin(&api_url).await;
    let query = format!("error=access_denied&error_description=not+you&state={}", address.query["state"]);
    visit(&address.callback(&query)).await;
    let error = login.await.expect("no panic").expect_err("refused");
    assert_eq!(error.to_string(), "the sign-in was refused: not you");
    assert!(seen.lock().await.is_empty());
    // Closed at once; a listener that was only forgotten would accept and never answer. The well-known port may be
    // another test's by now, which refuses a foreign state.
    let late = http().get(address.callback("code=late")).timeout(Duration::from_secs(10)).send().await;
    assert!(late.as_ref().map_or_else(reqwest::Error::is_connect, |answer| answer.status() == 400), "{late:?}");
}

#[tokio::test]
async fn two_sign_ins_at_once_use_two_ports() {
    let (api_url, _) = token_endpoint().await;
    let (one, first) = begin(&api_url).await;
    let (two, second) = begin(&api_url).await;
    assert_ne!(one.query["redirect_uri"], two.query["redirect_uri"]);
    // The state of the one is wrong for the other.
    assert_eq!(visit(&one.callback(&format!("code=c&state={}", two.query["state"]))).await.0, 400);
    visit(&one.callback(&format!("code=c&state={}", one.query["state"]))).await;
    first.await.expect("no panic").expect("signed in");
    second.abort();
    // Dropping the flow drops its listener.
    let authority = two.query["redirect_uri"].replace("http://", "").replace("/callback", "");
    assert!(second.await.expect_err("aborted").is_cancelled());
    if let Ok(mut left) = TcpStream::connect(authority).await {
        assert_eq!(left.read(&mut [0]).await.unwrap_or(0), 0);
    }
}
