use std::{fmt, str::FromStr};
use url::form_urlencoded;

/// Where a native client waits for its answer: exactly `http://127.0.0.1:PORT/callback` (RFC 8252, 7.3).
///
/// The name `localhost` is refused, as 8.3 advises: it may resolve to a listener of somebody else. So is `[::1]`: a
/// content security policy cannot name it, and the page's form could not be allowed to redirect there. The text is
/// matched whole, never parsed as a URL and normalised: every bypass lives in what two parsers make of the same text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LoopbackRedirect(String);

/// Text that is not a loopback redirect.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("redirect_uri: expected http://127.0.0.1:PORT/callback, got {0:?}")]
pub(crate) struct InvalidRedirect(String);

impl LoopbackRedirect {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// `http://127.0.0.1:PORT`, for `form-action`.
    pub(crate) fn origin(&self) -> &str {
        self.0.strip_suffix(PATH).unwrap_or(&self.0)
    }

    /// The redirect with `parameters` as its query.
    pub(crate) fn with_query(&self, parameters: &[(&str, &str)]) -> String {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(parameters).finish();
        format!("{}?{query}", self.0)
    }
}

impl FromStr for LoopbackRedirect {
    type Err = InvalidRedirect;
    fn from_str(text: &str) -> Result<Self, InvalidRedirect> {
        match text.strip_prefix("http://127.0.0.1:").and_then(|rest| rest.strip_suffix(PATH)) {
            Some(port) if is_port(port) => Ok(Self(text.to_owned())),
            _ => Err(InvalidRedirect(text.chars().take(120).collect())),
        }
    }
}

impl fmt::Display for LoopbackRedirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0') && text.parse::<u16>().is_ok()
}

const PATH: &str = "/callback";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_literal_passes_with_any_port() {
        for good in ["http://127.0.0.1:8765/callback", "http://127.0.0.1:65535/callback", "http://127.0.0.1:1/callback"]
        {
            assert_eq!(good.parse::<LoopbackRedirect>().unwrap().as_str(), good);
        }
        let redirect: LoopbackRedirect = "http://127.0.0.1:8765/callback".parse().unwrap();
        assert_eq!(redirect.origin(), "http://127.0.0.1:8765");
        assert_eq!(
            redirect.with_query(&[("code", "a+b"), ("state", "x&error=1\r\n#")]),
            "http://127.0.0.1:8765/callback?code=a%2Bb&state=x%26error%3D1%0D%0A%23"
        );
    }

    #[test]
    fn no_other_spelling_passes() {
        let bypasses = [
            "",
            "http://127.0.0.1/callback",
            "http://127.0.0.1:/callback",
            "http://127.0.0.1:0/callback",
            "http://127.0.0.1:08765/callback",
            "http://127.0.0.1:65536/callback",
            "http://127.0.0.1:+80/callback",
            "http://127.0.0.1:8765",
            "http://127.0.0.1:8765/",
            "http://127.0.0.1:8765/callback/",
            "http://127.0.0.1:8765/callback?x=1",
            "http://127.0.0.1:8765/callback#x",
            "http://127.0.0.1:8765//callback",
            "http://127.0.0.1:8765/other/../callback",
            "http://127.0.0.1:8765/Callback",
            "http://127.0.0.1:8765/%63allback",
            "http://127.0.0.1:8765\\callback",
            "http://127.0.0.1:8765@evil.example/callback",
            "http://127.0.0.1:8765:80@evil.example/callback",
            "http://user@127.0.0.1:8765/callback",
            "http://evil.example#@127.0.0.1:8765/callback",
            "http://evil.example?@127.0.0.1:8765/callback",
            "http://evil.example\\@127.0.0.1:8765/callback",
            "http://127.0.0.1.evil.example:8765/callback",
            "http://evil.example/http://127.0.0.1:8765/callback",
            "https://127.0.0.1:8765/callback",
            "HTTP://127.0.0.1:8765/callback",
            "//127.0.0.1:8765/callback",
            "javascript://127.0.0.1:8765/callback",
            "http:127.0.0.1:8765/callback",
            "http:///127.0.0.1:8765/callback",
            "http://localhost:8765/callback",
            "http://localhost.evil.example:8765/callback",
            "http://127.1:8765/callback",
            "http://127.0.0.2:8765/callback",
            "http://127.0.0.01:8765/callback",
            "http://2130706433:8765/callback",
            "http://0x7f000001:8765/callback",
            "http://0177.0.0.1:8765/callback",
            "http://0.0.0.0:8765/callback",
            "http://0:8765/callback",
            "http://[::]:8765/callback",
            "http://[::1]:8765/callback",
            "http://[0:0:0:0:0:0:0:1]:8765/callback",
            "http://[::ffff:127.0.0.1]:8765/callback",
            "http://[::1%25lo]:8765/callback",
            "http://127.0.0.1\u{3002}evil.example:8765/callback",
            "http://127。0。0。1:8765/callback",
            "http://①27.0.0.1:8765/callback",
            "http://127.0.0.1:８７６５/callback",
            " http://127.0.0.1:8765/callback",
            "http://127.0.0.1:8765/callback ",
            "http://127.0.0.1:8765/callback\n",
            "http://127.0.0.1:8765/callback\r\nLocation: http://evil.example",
            "http://127.0.0.1:8765/callback\0",
            "ht\ttp://127.0.0.1:8765/callback",
            "http://127.0.0.1:8765\t/callback",
            "urn:ietf:wg:oauth:2.0:oob",
            "http://evil.example/callback",
            "http://systemprompt.localhost:8765/callback",
            "data:text/html,http://127.0.0.1:8765/callback",
        ];
        assert!(bypasses.len() >= 60, "{}", bypasses.len());
        for bypass in bypasses {
            assert!(bypass.parse::<LoopbackRedirect>().is_err(), "{bypass:?}");
        }
    }
}
