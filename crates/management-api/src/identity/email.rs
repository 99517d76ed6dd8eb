use std::{fmt, str::FromStr};
use systemprompt_contract::Hostname;

/// A sign-in address in its one spelling: ASCII, lower case, `local@host`, at most 254 bytes (RFC 5321).
///
/// Quoted local parts and address literals are refused: no provider gives them out, and they carry odd characters.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Email(String);

/// Text that is not an e-mail address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an e-mail address such as ada@example.com, got {0:?}")]
pub(crate) struct InvalidEmail(String);

impl Email {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Email {
    type Err = InvalidEmail;
    fn from_str(text: &str) -> Result<Self, InvalidEmail> {
        let address = text.trim().to_ascii_lowercase();
        match address.split_once('@') {
            Some((local, host)) if address.len() <= 254 && is_local_part(local) && host.parse::<Hostname>().is_ok() => {
                Ok(Self(address))
            }
            _ => Err(InvalidEmail(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `dot-atom` of RFC 5322, at most 64 bytes.
fn is_local_part(text: &str) -> bool {
    let is_atom = |atom: &str| {
        !atom.is_empty() && atom.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-/=?^_`{|}~".contains(&b))
    };
    text.len() <= 64 && text.split('.').all(is_atom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_one_spelling() {
        let email: Email = " Ada.Lovelace+x@Example.COM ".parse().unwrap();
        assert_eq!(email.as_str(), "ada.lovelace+x@example.com");
        assert!("a@localhost".parse::<Email>().is_ok());
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("{}@example.com", "a".repeat(65));
        for bad in [
            "",
            "a",
            "@",
            "a@",
            "@b.c",
            "a@@b.c",
            "a@b@c.d",
            "a b@c.d",
            ".a@b.c",
            "a.@b.c",
            "a..b@c.d",
            "a@b..c",
            "a@-b.c",
            "\"a b\"@c.d",
            "a@[127.0.0.1]",
            "a@127.0.0.1",
            "a@b.c\r\nBcc: x@y.z",
            "ä@b.c",
            "a@b.c.",
            &long,
        ] {
            assert!(bad.parse::<Email>().is_err(), "{bad:?}");
        }
    }
}
