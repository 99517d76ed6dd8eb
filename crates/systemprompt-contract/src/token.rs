//! Token formats. Every token ends in six checksum characters, so that a scanner can tell a whole token
//! from a text that merely mentions its prefix.
//!
//! | kind | form | verified by |
//! |---|---|---|
//! | API | `sp_live_{header}.{payload}.{random}{checksum}` | SHA-256 of the whole, looked up in the database |
//! | sync | `sp_sync_{random}{checksum}` | equality with the tenant's secret |
//! | registry | `sp_reg_{payload}.{mac}{checksum}` | the MAC, by the registry itself |
//! | setup | `sp_setup_{random}{checksum}` | SHA-256, once |
//!
//! The API token's payload is base64url JSON with an integer `exp`, which the existing client reads and nobody trusts.

use crate::secret::Secret;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use sha2::{Digest as _, Sha256};

/// Prefix of API tokens.
pub const API_PREFIX: &str = "sp_live_";
/// Prefix of a tenant's sync token.
pub const SYNC_PREFIX: &str = "sp_sync_";
/// Prefix of registry tokens.
pub const REGISTRY_PREFIX: &str = "sp_reg_";
/// Prefix of the first administrator's one-time token.
pub const SETUP_PREFIX: &str = "sp_setup_";
/// All prefixes of ours.
pub const PREFIXES: [&str; 4] = [API_PREFIX, SYNC_PREFIX, REGISTRY_PREFIX, SETUP_PREFIX];

const CHECKSUM_LEN: usize = 6;
const HEADER: &str = "eyJhbGciOiJub25lIiwidHlwIjoic3AifQ"; // {"alg":"none","typ":"sp"}

/// 256 random bits as 43 base64url characters.
///
/// # Panics
/// When the operating system has no randomness to give; nothing safe can be done then.
pub fn random_text() -> String {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).expect("the operating system's random source answers");
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A new API token that ends at `exp` (Unix seconds).
pub fn new_api_token(exp: i64) -> Secret {
    let payload = URL_SAFE_NO_PAD.encode(format!("{{\"exp\":{exp}}}"));
    with_checksum(format!("{API_PREFIX}{HEADER}.{payload}.{}", random_text()))
}

/// A new token of random text behind `prefix`.
pub fn new_random_token(prefix: &str) -> Secret {
    with_checksum(format!("{prefix}{}", random_text()))
}

/// Appends the checksum.
pub fn with_checksum(body: String) -> Secret {
    let sum = checksum(&body);
    Secret::new(body + &sum)
}

/// The token without its checksum, when the prefix is ours and the checksum is right.
pub fn verify_checksum(token: &str) -> Option<&str> {
    if !PREFIXES.iter().any(|prefix| token.starts_with(prefix)) {
        return None;
    }
    let (body, sum) = token.split_at_checked(token.len().checked_sub(CHECKSUM_LEN)?)?;
    (checksum(body) == sum).then_some(body)
}

/// What is stored of a token: the SHA-256 of the whole text.
pub fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token.as_bytes()).into()
}

/// `exp` of an API token, without any trust in it: for warnings only.
pub fn untrusted_expiry(token: &str) -> Option<i64> {
    #[derive(serde::Deserialize)]
    struct Claims {
        exp: i64,
    }
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice::<Claims>(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok().map(|claims| claims.exp)
}

fn checksum(body: &str) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let digest = Sha256::digest(body.as_bytes());
    digest.iter().take(CHECKSUM_LEN).map(|byte| char::from(ALPHABET[usize::from(byte & 63)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_api_token_has_three_parts_and_an_expiry() {
        let token = new_api_token(1_900_000_000);
        assert_eq!(token.expose().split('.').count(), 3);
        assert_eq!(untrusted_expiry(token.expose()), Some(1_900_000_000));
        assert!(verify_checksum(token.expose()).is_some());
    }

    #[test]
    fn a_changed_or_cut_token_fails_its_checksum() {
        let token = new_random_token(SYNC_PREFIX);
        let text = token.expose();
        assert!(verify_checksum(&text[..text.len() - 1]).is_none());
        assert!(verify_checksum(&text.replace("sp_sync_", "sp_live_")).is_none());
        assert!(verify_checksum("sp_live_abc123...").is_none());
        assert!(verify_checksum("sp_live_").is_none());
    }
}
