use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::fmt;
use systemprompt_contract::{Secret, TenantId, token};

/// What the holder of a registry token may do: with one tenant's tag, for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Whose images.
    pub tenant: TenantId,
    /// May send blobs and manifests.
    pub push: bool,
    /// May read them.
    pub pull: bool,
    /// The first moment at which the token is no longer good. Kept to the second.
    pub expires_at: DateTime<Utc>,
}

/// The key with which the control plane makes registry tokens and the registry checks them. Tokens cannot be revoked
/// one by one, so they should live ten minutes; another key ends them all.
#[derive(Clone)]
pub struct TokenKey(Hmac<Sha256>);

impl fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TokenKey(«redacted»)")
    }
}

#[derive(Serialize, Deserialize)]
struct Payload {
    tenant: TenantId,
    push: bool,
    pull: bool,
    exp: i64,
}

impl TokenKey {
    /// A key of 32 random bytes.
    ///
    /// # Panics
    /// Never: HMAC takes keys of any length.
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(bytes).expect("HMAC takes keys of any length"))
    }

    /// A token that carries the grant: `sp_reg_{payload}.{mac}{checksum}`.
    ///
    /// # Panics
    /// Never: the payload is a plain structure.
    pub fn mint(&self, grant: &Grant) -> Secret {
        let Grant { tenant, push, pull, expires_at } = *grant;
        let payload = Payload { tenant, push, pull, exp: expires_at.timestamp() };
        let payload = URL_SAFE_NO_PAD.encode(serde_json::to_vec(&payload).expect("a plain structure serialises"));
        let signed = format!("{}{payload}", token::REGISTRY_PREFIX);
        let mac = URL_SAFE_NO_PAD.encode(self.mac(&signed).finalize().into_bytes());
        token::with_checksum(format!("{signed}.{mac}"))
    }

    /// The grant of a token that this key made and that is still good at `now`.
    pub fn verify(&self, token: &str, now: DateTime<Utc>) -> Option<Grant> {
        let (signed, mac) = token::verify_checksum(token)?.rsplit_once('.')?;
        let payload = signed.strip_prefix(token::REGISTRY_PREFIX)?;
        // Constant time; nothing of the payload is looked at before.
        self.mac(signed).verify_slice(&URL_SAFE_NO_PAD.decode(mac).ok()?).ok()?;
        let payload: Payload = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()?;
        let expires_at = DateTime::from_timestamp(payload.exp, 0)?;
        (now < expires_at).then_some(Grant {
            tenant: payload.tenant,
            push: payload.push,
            pull: payload.pull,
            expires_at,
        })
    }

    fn mac(&self, signed: &str) -> Hmac<Sha256> {
        self.0.clone().chain_update(signed.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use chrono::TimeDelta;

    fn grant() -> Grant {
        let expires_at = DateTime::from_timestamp(1_900_000_000, 0).expect("valid");
        Grant { tenant: TenantId::new(), push: true, pull: false, expires_at }
    }

    #[test]
    fn a_token_carries_its_grant_until_it_ends() {
        let (key, grant) = (TokenKey::from_bytes(&[7; 32]), grant());
        let token = key.mint(&grant);
        let second = TimeDelta::seconds(1);
        assert_eq!(key.verify(token.expose(), grant.expires_at - second), Some(grant.clone()));
        assert_eq!(key.verify(token.expose(), grant.expires_at), None);
        assert_eq!(TokenKey::from_bytes(&[8; 32]).verify(token.expose(), grant.expires_at - second), None);
        assert_eq!(format!("{key:?}"), "TokenKey(«redacted»)");
    }

    #[test]
    fn no_changed_letter_is_accepted_even_with_a_new_checksum() {
        let (key, grant) = (TokenKey::from_bytes(&[7; 32]), grant());
        let now = grant.expires_at - TimeDelta::minutes(1);
        let token = key.mint(&grant);
        let body = token::verify_checksum(token.expose()).expect("own token");
        assert!(key.verify(body, now).is_none(), "without checksum");
        for at in token::REGISTRY_PREFIX.len()..body.len() {
            let mut changed = body.as_bytes().to_vec();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = token::with_checksum(String::from_utf8(changed).expect("ASCII"));
            let verified = key.verify(changed.expose(), now);
            // The last letter of a MAC has unused bits, which the decoder refuses to see set.
            assert!(verified.is_none(), "letter {at}");
        }
        for other in ["", "sp_reg_", "sp_reg_.", "x", &token.expose().replace("sp_reg_", "sp_sync_")] {
            assert!(key.verify(other, now).is_none(), "{other}");
        }
    }
}
