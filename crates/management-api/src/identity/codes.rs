//! Codes of the browser flow (RFC 6749 with PKCE, RFC 7636, and what RFC 9700 asks on top).

use super::{Identity, accounts, redirect::LoopbackRedirect, tokens, unauthorized};
use crate::http::error::Failure;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};
use sqlx::{PgConnection, PgPool};
use std::str::FromStr;
use subtle::ConstantTimeEq as _;
use systemprompt_contract::{AccountId, ErrorCode, Secret, SignedIn, TokenExchange, token};

/// The SHA-256 of a verifier (S256; the method `plain` proves nothing to who can read the request and is refused).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Challenge([u8; 32]);

/// Text that is not a challenge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("code_challenge: expected the SHA-256 of the verifier as 43 base64url characters")]
pub(super) struct InvalidChallenge;

impl FromStr for Challenge {
    type Err = InvalidChallenge;
    fn from_str(text: &str) -> Result<Self, InvalidChallenge> {
        let bytes = URL_SAFE_NO_PAD.decode(text).map_err(|_| InvalidChallenge)?;
        bytes.try_into().map(Self).map_err(|_| InvalidChallenge)
    }
}

impl Challenge {
    /// Of a verifier: 43 to 128 unreserved characters (RFC 7636, 4.1); none for any other text.
    pub(super) fn of_verifier(verifier: &str) -> Option<Self> {
        let unreserved = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
        let well_formed = (43..=128).contains(&verifier.len()) && verifier.bytes().all(unreserved);
        well_formed.then(|| Self(Sha256::digest(verifier.as_bytes()).into()))
    }

    pub(super) fn text(&self) -> String {
        URL_SAFE_NO_PAD.encode(self.0)
    }
}

/// A new code for `account`: good for 60 seconds, for one exchange, and for who made `challenge` and waits at `redirect`.
pub(super) async fn create(
    pool: &PgPool,
    account: AccountId,
    redirect: &LoopbackRedirect,
    challenge: Challenge,
) -> Result<Secret, sqlx::Error> {
    // Old ones are kept for a day, so that a replay is still seen as one.
    sqlx::query!("DELETE FROM login_codes WHERE expires_at < now() - interval '1 day'").execute(pool).await?;
    let code = Secret::new(token::random_text());
    sqlx::query!(
        "INSERT INTO login_codes (code_hash, account_id, redirect_uri, code_challenge, expires_at)
         VALUES ($1, $2, $3, $4, now() + interval '60 seconds')",
        &token::hash(code.expose()),
        account.uuid(),
        redirect.as_str(),
        &challenge.0,
    )
    .execute(pool)
    .await?;
    Ok(code)
}

/// Exchanges a code for a token. Any attempt burns the code, also one that fails: whoever has the code but not the
/// verifier must not get to try verifiers. A second attempt also revokes the token of the first (RFC 6749, 4.1.2).
pub(super) async fn exchange(identity: &Identity, request: &TokenExchange) -> Result<SignedIn, Failure> {
    let db = &identity.db;
    let code_hash = token::hash(request.code.expose());
    let mut tx = db.begin().await?;
    let Some(burnt) = burn(&mut tx, &code_hash).await? else {
        let replayed = revoke_exchanged(&mut tx, &code_hash).await?;
        tx.commit().await?;
        return Err(if replayed { already_used() } else { invalid_code() });
    };
    if !burnt.permits(request) {
        tx.commit().await?;
        return Err(invalid_code());
    }
    let (access_token, token_id, expires_at) = tokens::issue_token(&mut tx, burnt.account, "command line").await?;
    sqlx::query!("UPDATE login_codes SET token_id = $2 WHERE code_hash = $1", &code_hash, token_id.uuid())
        .execute(&mut *tx)
        .await?;
    tx.commit().await?;
    let account = accounts::account_by_id(db.pool(), burnt.account).await?;
    let account = account.ok_or_else(|| unauthorized(&identity.site, "the account is gone"))?;
    Ok(SignedIn { access_token, expires_at, user: account.into_user() })
}

/// A code that was just used up, and what it was bound to.
struct BurntCode {
    account: AccountId,
    redirect_uri: String,
    challenge: Vec<u8>,
    fresh: bool,
}

impl BurntCode {
    fn permits(&self, request: &TokenExchange) -> bool {
        let redirect = self.redirect_uri.as_bytes().ct_eq(request.redirect_uri.as_bytes());
        let verifier = Challenge::of_verifier(request.code_verifier.expose())
            .map_or(0.into(), |challenge| challenge.0.as_slice().ct_eq(&self.challenge));
        self.fresh && bool::from(redirect & verifier)
    }
}

async fn burn(connection: &mut PgConnection, code_hash: &[u8; 32]) -> Result<Option<BurntCode>, sqlx::Error> {
    let row = sqlx::query!(
        r#"UPDATE login_codes SET used_at = now() WHERE code_hash = $1 AND used_at IS NULL
           RETURNING account_id, redirect_uri, code_challenge, expires_at > now() AS "fresh!""#,
        code_hash,
    )
    .fetch_optional(connection)
    .await?;
    Ok(row.map(|row| BurntCode {
        account: AccountId::from_uuid(row.account_id),
        redirect_uri: row.redirect_uri,
        challenge: row.code_challenge,
        fresh: row.fresh,
    }))
}

/// Revokes what the code was exchanged for; false when there is no such code.
async fn revoke_exchanged(connection: &mut PgConnection, code_hash: &[u8; 32]) -> Result<bool, sqlx::Error> {
    let code = sqlx::query!("SELECT token_id FROM login_codes WHERE code_hash = $1", code_hash)
        .fetch_optional(&mut *connection)
        .await?;
    let Some(code) = code else { return Ok(false) };
    sqlx::query!("UPDATE api_tokens SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", code.token_id)
        .execute(connection)
        .await?;
    Ok(true)
}

fn invalid_code() -> Failure {
    Failure::new(
        ErrorCode::BadRequest,
        "expected a code made less than 60 seconds ago for this redirect_uri and code_verifier",
    )
    .hint("start the same command again")
}

fn already_used() -> Failure {
    Failure::new(ErrorCode::AlreadyUsed, "this code was exchanged before; the token it gave is revoked now")
        .hint("start the same command again")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_7636() {
        let challenge = Challenge::of_verifier("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk").unwrap();
        assert_eq!(challenge.text(), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
        assert_eq!(challenge.text().parse(), Ok(challenge));
    }

    #[test]
    fn what_is_no_challenge_or_verifier_is_refused() {
        for bad in
            ["", "short", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM=", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw+cM"]
        {
            assert!(bad.parse::<Challenge>().is_err(), "{bad}");
        }
        for bad in [&"a".repeat(42), &"a".repeat(129), &format!("{} ", "a".repeat(50)), &"ä".repeat(30)] {
            assert!(Challenge::of_verifier(bad).is_none(), "{bad}");
        }
    }
}
