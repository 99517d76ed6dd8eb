use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};
use url::{Host, Url};

/// The origin of a Management API, `https://host[:port]`; plain `http` only to this machine.
///
/// A token belongs to the origin that issued it, so two URLs are equal only when scheme, host and port are.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ApiUrl(String);

/// Text that is not the origin of an API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an API URL such as https://api.systemprompt.io, {reason}, got {got:?}")]
pub struct InvalidApiUrl {
    reason: &'static str,
    got: String,
}

impl ApiUrl {
    /// `https://api.systemprompt.io`: used where nobody said otherwise.
    pub const PRODUCTION: &str = "https://api.systemprompt.io";

    /// The origin, without a slash at the end.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `host[:port]`, for messages.
    pub fn authority(&self) -> &str {
        self.0.split_once("://").map_or(&self.0, |(_, authority)| authority)
    }

    /// What to type to sign in here and nowhere else.
    pub fn sign_in_command(&self) -> String {
        let command = "systemprompt cloud auth login";
        if self.0 == Self::PRODUCTION { command.to_owned() } else { format!("{command} --api-url {self}") }
    }

    /// The URL of `path`, which starts with `/`.
    pub(crate) fn join(&self, path: &str) -> String {
        format!("{}{path}", self.0)
    }
}

impl Default for ApiUrl {
    fn default() -> Self {
        Self(Self::PRODUCTION.to_owned())
    }
}

impl FromStr for ApiUrl {
    type Err = InvalidApiUrl;
    fn from_str(text: &str) -> Result<Self, InvalidApiUrl> {
        let refuse = |reason| InvalidApiUrl { reason, got: shown(text) };
        let url = Url::parse(text).map_err(|_| refuse("with scheme and host"))?;
        let Some(host) = url.host() else { return Err(refuse("with a host")) };
        match url.scheme() {
            "https" => {}
            "http" if is_loopback(&host) => {}
            "http" => return Err(refuse("with http for this machine only (a token would travel in clear)")),
            _ => return Err(refuse("with https")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse("without a user name"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(refuse("without a path"));
        }
        Ok(Self(url.origin().ascii_serialization()))
    }
}

/// A password in a URL must not come back in a message.
fn shown(text: &str) -> String {
    match text.split_once('@') {
        Some((_, rest)) => format!("…@{}", rest.chars().take(100).collect::<String>()),
        None => text.chars().take(100).collect(),
    }
}

fn is_loopback(host: &Host<&str>) -> bool {
    match host {
        Host::Domain(name) => *name == "localhost" || name.ends_with(".localhost"),
        Host::Ipv4(address) => address.is_loopback(),
        Host::Ipv6(address) => address.is_loopback(),
    }
}

impl fmt::Display for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ApiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for ApiUrl {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for ApiUrl {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::ApiUrl;

    #[test]
    fn one_origin_has_one_spelling() {
        for (text, origin) in [
            ("https://api.systemprompt.io", "https://api.systemprompt.io"),
            ("https://API.SystemPrompt.io:443/", "https://api.systemprompt.io"),
            ("https://api.systemprompt.localhost:8443", "https://api.systemprompt.localhost:8443"),
            ("http://127.0.0.1:8480", "http://127.0.0.1:8480"),
            ("http://[::1]:1", "http://[::1]:1"),
            ("http://localhost:1", "http://localhost:1"),
        ] {
            assert_eq!(text.parse::<ApiUrl>().expect(text).as_str(), origin);
        }
    }

    #[test]
    fn a_token_never_travels_in_clear_or_to_a_hidden_host() {
        for bad in [
            "",
            "api.systemprompt.io",
            "http://api.systemprompt.io",
            "http://notlocalhost",
            "http://localhost.evil.example",
            "http://10.0.0.1",
            "ftp://localhost",
            "https://user@api.systemprompt.io",
            "https://api.systemprompt.io@evil.example",
            "https://api.systemprompt.io/v1",
            "https://api.systemprompt.io?x",
            "file:///etc/passwd",
        ] {
            assert!(bad.parse::<ApiUrl>().is_err(), "{bad}");
        }
        let error = "https://me:hunter2@api.systemprompt.io".parse::<ApiUrl>().expect_err("user name");
        assert!(!error.to_string().contains("hunter2"), "{error}");
    }
}
