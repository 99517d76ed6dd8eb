//! Signing in by browser: authorisation code with PKCE (RFC 7636, S256) and `state` on a loopback redirect (RFC 8252).

use crate::{
    api_url::ApiUrl,
    callback::{CallbackError, CallbackListener, Page, Parameters, Verdict},
    client::CloudApiClient,
    error::CloudError,
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use std::time::Duration;
use systemprompt_contract::{RequestId, Secret, SignedIn, TokenExchange, paths, token::random_text};
use url::form_urlencoded;

const PORT: u16 = 8765;
const CLIENT_ID: &str = "cli";
/// How long a person may take.
const WITHIN: Duration = Duration::from_mins(5);

/// Why nobody is signed in.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The browser did not come back.
    #[error(transparent)]
    Callback(#[from] CallbackError),
    /// The person, or the server, said no.
    #[error("the sign-in was refused: {reason}")]
    Denied {
        /// In the server's words.
        reason: String,
    },
    /// The code was not accepted.
    #[error(transparent)]
    Cloud(#[from] CloudError),
}

impl LoginError {
    /// For programs, lower snake case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Callback(CallbackError::TimedOut(_)) => "timeout",
            Self::Callback(CallbackError::Bind(_)) => "no_loopback_port",
            Self::Denied { .. } => "sign_in_refused",
            Self::Cloud(error) => error.code(),
        }
    }

    /// Finds the call that failed in the log of the cloud.
    pub fn request_id(&self) -> Option<RequestId> {
        match self {
            Self::Cloud(error) => error.request_id(),
            Self::Callback(_) | Self::Denied { .. } => None,
        }
    }

    /// What to do next, where `api_url` is who was to be signed in to.
    pub fn hint(&self, api_url: &ApiUrl) -> Option<String> {
        match self {
            Self::Cloud(error) => error.hint(),
            _ => Some(format!("Try again, or sign in with a token: {} --token -", api_url.sign_in_command())),
        }
    }
}

/// Signs in with a browser on this machine: `open` gets the address to show. Waits up to 300 seconds; a hit with a
/// wrong state is refused and does not end the wait. Cancelling it closes the port and leaves nothing behind.
///
/// # Errors
/// [`LoginError`].
pub async fn sign_in_with_browser(
    api_url: &ApiUrl,
    http: reqwest::Client,
    open: impl FnOnce(&str),
) -> Result<SignedIn, LoginError> {
    let listener = CallbackListener::bind(PORT).await?;
    let redirect_uri = listener.redirect_uri();
    let attempt = Attempt::new();
    open(&attempt.address(api_url, &redirect_uri));
    let code = listener.wait(WITHIN, |parameters| attempt.judge(parameters)).await??;
    let exchange = TokenExchange { code, code_verifier: attempt.verifier, redirect_uri };
    Ok(CloudApiClient::without_token(api_url.clone(), http).exchange_token(&exchange).await?)
}

/// The two secrets of one sign-in.
struct Attempt {
    state: Secret,
    verifier: Secret,
}

impl Attempt {
    fn new() -> Self {
        Self { state: Secret::new(random_text()), verifier: Secret::new(random_text()) }
    }

    fn address(&self, api_url: &ApiUrl, redirect_uri: &str) -> String {
        let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(self.verifier.expose().as_bytes()));
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("response_type", "code")
            .append_pair("client_id", CLIENT_ID)
            .append_pair("redirect_uri", redirect_uri)
            .append_pair("state", self.state.expose())
            .append_pair("code_challenge", &challenge)
            .append_pair("code_challenge_method", "S256")
            .finish();
        format!("{}?{query}", api_url.join(paths::LOGIN_PAGE))
    }

    fn judge(&self, parameters: &Parameters) -> Verdict<Result<Secret, LoginError>> {
        let state_is_ours = parameters.get("state").is_some_and(|state| Secret::new(state) == self.state);
        if !state_is_ours {
            return Verdict::Refuse(NOT_OURS);
        }
        match (parameters.get("error"), parameters.get("code")) {
            (Some(error), _) => {
                let reason = parameters.get("error_description").unwrap_or(error).clone();
                Verdict::Take(Err(LoginError::Denied { reason }), REFUSED)
            }
            (None, Some(code)) if !code.is_empty() => Verdict::Take(Ok(Secret::new(code)), SIGNED_IN),
            (None, _) => Verdict::Refuse(NOT_OURS),
        }
    }
}

const SIGNED_IN: Page = Page { title: "Almost there", text: "You can close this page and return to the terminal." };
const REFUSED: Page = Page { title: "Not signed in", text: "The sign-in was refused. Return to the terminal." };
const NOT_OURS: Page = Page {
    title: "Not from this terminal",
    text: "This sign-in was not started by the command that is waiting. Start again from the terminal.",
};

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(attempt: &Attempt, pairs: &[(&str, &str)]) -> &'static str {
        let parameters = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        match attempt.judge(&parameters) {
            Verdict::Take(Ok(_), _) => "signed in",
            Verdict::Take(Err(_), _) => "denied",
            Verdict::Refuse(_) => "refused",
        }
    }

    #[test]
    fn only_an_answer_with_our_state_counts() {
        let attempt = Attempt::new();
        let state = attempt.state.expose();
        assert_eq!(judge(&attempt, &[("state", state), ("code", "c")]), "signed in");
        assert_eq!(judge(&attempt, &[("state", state), ("error", "access_denied")]), "denied");
        assert_eq!(judge(&attempt, &[("state", "x"), ("error", "access_denied")]), "refused");
        assert_eq!(judge(&attempt, &[("state", "x"), ("code", "c")]), "refused");
        assert_eq!(judge(&attempt, &[("code", "c")]), "refused");
        assert_eq!(judge(&attempt, &[("state", state), ("code", "")]), "refused");
    }

    #[test]
    fn the_address_carries_the_challenge_and_never_the_verifier() {
        let attempt = Attempt::new();
        let address = attempt.address(&ApiUrl::default(), "http://127.0.0.1:8765/callback");
        assert!(
            address.starts_with("https://api.systemprompt.io/login?response_type=code&client_id=cli&"),
            "{address}"
        );
        assert!(address.contains("redirect_uri=http%3A%2F%2F127.0.0.1%3A8765%2Fcallback"), "{address}");
        assert!(address.ends_with("&code_challenge_method=S256") && !address.contains(attempt.verifier.expose()));
    }
}
