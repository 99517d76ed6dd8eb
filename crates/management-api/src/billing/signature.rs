//! Signatures of events, in the scheme that Paddle uses: a header `ts=<unix seconds>;h1=<hex>[;h1=<hex>…]`, each `h1`
//! the HMAC-SHA256 of `<ts>:<raw body>`. Several appear while a key is being changed.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::{fmt::Write as _, str::FromStr, time::Duration};
use subtle::{Choice, ConstantTimeEq as _};

/// A header as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    /// Unix seconds.
    timestamp: i64,
    tags: Vec<[u8; 32]>,
}

/// Why a delivery is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SignatureError {
    #[error("expected a signature of the form ts=<unix seconds>;h1=<64 hex digits>")]
    Malformed,
    #[error("the signature is older or newer than {} seconds", .0.as_secs())]
    Stale(Duration),
    #[error("the signature is not one of the body's under a key of ours")]
    Wrong,
}

impl FromStr for Signature {
    type Err = SignatureError;
    fn from_str(text: &str) -> Result<Self, SignatureError> {
        let (mut timestamp, mut tags) = (None, Vec::new());
        for part in text.split(';') {
            match part.trim().split_once('=').ok_or(SignatureError::Malformed)? {
                ("ts", digits) if timestamp.is_none() => timestamp = Some(unix_seconds(digits)?),
                ("h1", tag) if tags.len() < MAX_TAGS => tags.push(tag_bytes(tag)?),
                ("ts" | "h1", _) => return Err(SignatureError::Malformed),
                // Later versions of the scheme may stand beside ours.
                _ => {}
            }
        }
        match timestamp {
            Some(timestamp) if !tags.is_empty() => Ok(Self { timestamp, tags }),
            _ => Err(SignatureError::Malformed),
        }
    }
}

impl Signature {
    pub(super) fn new(keys: &[[u8; 32]], timestamp: i64, body: &[u8]) -> Self {
        let tags = keys.iter().map(|key| mac(key, timestamp, body).finalize().into_bytes().into()).collect();
        Self { timestamp, tags }
    }

    /// As the header carries it.
    pub(super) fn header(&self) -> String {
        let mut header = format!("ts={}", self.timestamp);
        for tag in &self.tags {
            let _ = write!(header, ";h1={}", hex::encode(tag));
        }
        header
    }

    /// Checks that one of the tags is `body`'s under one of `keys`, and that it was made within `tolerance` of `now`
    /// (Unix seconds). Every tag is compared with every key whatever the others gave.
    pub(super) fn verify(
        &self,
        keys: &[[u8; 32]],
        body: &[u8],
        now: i64,
        tolerance: Duration,
    ) -> Result<(), SignatureError> {
        let mut valid = Choice::from(0);
        for key in keys {
            let expected: [u8; 32] = mac(key, self.timestamp, body).finalize().into_bytes().into();
            for tag in &self.tags {
                valid |= tag.ct_eq(&expected);
            }
        }
        if !bool::from(valid) {
            return Err(SignatureError::Wrong);
        }
        if self.timestamp.abs_diff(now) > tolerance.as_secs() {
            return Err(SignatureError::Stale(tolerance));
        }
        Ok(())
    }
}

fn mac(key: &[u8; 32], timestamp: i64, body: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
    mac.update(timestamp.to_string().as_bytes());
    mac.update(b":");
    mac.update(body);
    mac
}

fn unix_seconds(text: &str) -> Result<i64, SignatureError> {
    let digits = (1..=12).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
    // One number has one spelling, since the number is what is signed.
    if !digits || (text.starts_with('0') && text.len() > 1) {
        return Err(SignatureError::Malformed);
    }
    text.parse().map_err(|_| SignatureError::Malformed)
}

fn tag_bytes(text: &str) -> Result<[u8; 32], SignatureError> {
    let mut tag = [0; 32];
    hex::decode_to_slice(text, &mut tag).map_err(|_| SignatureError::Malformed)?;
    Ok(tag)
}

/// Nobody changes more keys at once; a bound on the work that a stranger can ask for.
const MAX_TAGS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [1; 32];
    const OLD_KEY: [u8; 32] = [2; 32];
    const NOW: i64 = 1_800_000_000;
    const BODY: &[u8] = br#"{"event_id":"e"}"#;
    const TOLERANCE: Duration = Duration::from_secs(5);

    fn check(header: &str, body: &[u8], now: i64) -> Result<(), SignatureError> {
        header.parse::<Signature>()?.verify(&[KEY, OLD_KEY], body, now, TOLERANCE)
    }

    fn good() -> String {
        Signature::new(&[KEY], NOW, BODY).header()
    }

    #[test]
    fn the_vector_that_anybody_can_recompute() {
        // printf '1:{}' | openssl dgst -sha256 -mac HMAC -macopt hexkey:0101…01 (32 bytes)
        assert_eq!(
            Signature::new(&[KEY], 1, b"{}").header(),
            "ts=1;h1=bc4f12b9578cada91e146b40c8ae4cc4b4f224b9399f3acdf18e054d700484f8"
        );
    }

    #[test]
    fn a_signature_of_ours_passes_within_the_tolerance() {
        for skew in -5..=5 {
            assert_eq!(check(&good(), BODY, NOW + skew), Ok(()), "{skew}");
        }
        for skew in [-6, 6, 3600, -NOW] {
            assert_eq!(check(&good(), BODY, NOW + skew), Err(SignatureError::Stale(TOLERANCE)), "{skew}");
        }
    }

    #[test]
    fn any_changed_byte_is_refused() {
        for position in 0..BODY.len() {
            let mut body = BODY.to_vec();
            body[position] ^= 1;
            assert_eq!(check(&good(), &body, NOW), Err(SignatureError::Wrong), "byte {position}");
        }
        assert_eq!(check(&good(), &[BODY, b" "].concat(), NOW), Err(SignatureError::Wrong));
        let later = good().replace(&NOW.to_string(), &(NOW + 1).to_string());
        assert_eq!(check(&later, BODY, NOW), Err(SignatureError::Wrong), "the time is signed as well");
        let foreign = Signature::new(&[[9; 32]], NOW, BODY).header();
        assert_eq!(check(&foreign, BODY, NOW), Err(SignatureError::Wrong));
    }

    #[test]
    fn one_good_tag_of_several_is_enough_in_any_place() {
        let foreign = Signature::new(&[[9; 32]], NOW, BODY);
        for keys in [[[9; 32], KEY], [KEY, [9; 32]], [OLD_KEY, [9; 32]], [OLD_KEY, KEY]] {
            assert_eq!(check(&Signature::new(&keys, NOW, BODY).header(), BODY, NOW), Ok(()));
        }
        let two_bad = Signature { tags: vec![foreign.tags[0], [0; 32]], ..foreign };
        assert_eq!(check(&two_bad.header(), BODY, NOW), Err(SignatureError::Wrong));
    }

    #[test]
    fn odd_headers_are_refused_before_any_work() {
        let tag = hex::encode([0; 32]);
        let many = format!("ts=1{}", format!(";h1={tag}").repeat(9));
        for odd in [
            "",
            ";",
            "ts=1",
            &format!("h1={tag}"),
            &format!("ts=;h1={tag}"),
            &format!("ts=-1;h1={tag}"),
            &format!("ts=+1;h1={tag}"),
            &format!("ts=01;h1={tag}"),
            &format!("ts=1;ts=1;h1={tag}"),
            &format!("ts=1.0;h1={tag}"),
            &format!("ts=9999999999999;h1={tag}"),
            "ts=1;h1=",
            "ts=1;h1=zz",
            &format!("ts=1;h1={tag}00"),
            &format!("ts=1;h1={}", &tag[2..]),
            "ts=1;h1",
            &many,
        ] {
            assert_eq!(odd.parse::<Signature>(), Err(SignatureError::Malformed), "{odd}");
        }
        assert!(format!("ts=1;h1={tag};h2=future").parse::<Signature>().is_ok());
    }
}
