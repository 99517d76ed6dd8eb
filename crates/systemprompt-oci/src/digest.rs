use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::{fmt, str::FromStr};

/// The SHA-256 of some content, and so its address: `sha256:<64 hex digits>`.
///
/// Other algorithms of the OCI specification are not accepted: one content has one name here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a digest such as sha256:<64 lower-case hex digits>, got {0:?}")]
pub struct InvalidDigest(String);

const PREFIX: &str = "sha256:";

impl Digest {
    /// The digest of `content`.
    pub fn of(content: &[u8]) -> Self {
        Self(Sha256::digest(content).into())
    }

    /// The 64 hex digits alone; safe as a file name.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The raw 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Reads the 64 hex digits back, as [`Digest::hex`] wrote them.
    ///
    /// # Errors
    /// [`InvalidDigest`] for any other text, upper-case digits included: one digest has one spelling.
    pub fn from_hex(text: &str) -> Result<Self, InvalidDigest> {
        let invalid = || InvalidDigest(text.chars().take(100).collect());
        if text.len() != 64 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| invalid())?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;
    fn from_str(text: &str) -> Result<Self, InvalidDigest> {
        text.strip_prefix(PREFIX)
            .and_then(|digits| Self::from_hex(digits).ok())
            .ok_or_else(|| InvalidDigest(text.chars().take(100).collect()))
    }
}

impl TryFrom<String> for Digest {
    type Error = InvalidDigest;
    fn try_from(text: String) -> Result<Self, InvalidDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// Computes a [`Digest`] piece by piece; cloning it keeps the state so far.
#[derive(Clone, Default)]
pub struct Digester(Sha256);

impl Digester {
    /// A digester that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next piece.
    pub fn update(&mut self, content: &[u8]) {
        self.0.update(content);
    }

    /// The digest of everything seen.
    pub fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Debug for Digester {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digester")
    }
}

impl std::io::Write for Digester {
    fn write(&mut self, content: &[u8]) -> std::io::Result<usize> {
        self.update(content);
        Ok(content.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_has_one_spelling() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(EMPTY.parse::<Digest>().expect("canonical"), Digest::of(b""));
        for bad in [
            "",
            "sha256:",
            &EMPTY.to_uppercase(),
            &EMPTY[7..],
            &EMPTY[..70],
            "sha512:e3b0",
            &format!("{EMPTY}0"),
            &format!("sha256:+{}", &EMPTY[8..]),
            "sha256:../../../../../../../../../../../../../../../../../../../../../etc",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn pieces_give_the_same_digest_as_the_whole() {
        let mut digester = Digester::new();
        digester.update(b"ab");
        digester.update(b"c");
        assert_eq!(digester.finish(), Digest::of(b"abc"));
    }

    #[test]
    fn json_is_the_printed_form() {
        let json = serde_json::to_string(&Digest::of(b"")).expect("serialise");
        assert_eq!(json, format!("\"{EMPTY}\""));
        assert!(serde_json::from_str::<Digest>("\"sha256:x\"").is_err());
    }
}
