//! The running cloud as seen from outside: `curl` over TLS, trusting the local CA only.
//!
//! A TLS stack of our own would make this crate as slow to build as those it sets up.

use crate::shell::Shell;
use anyhow::{Context as _, Result};
use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::Command,
};

/// One way to the cloud: whom to trust. Every host is this machine.
pub(crate) struct Http {
    ca_file: PathBuf,
}

/// An answer, whatever its status.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: String,
}

impl Http {
    pub(crate) fn new(ca_file: &Path) -> Self {
        Self { ca_file: ca_file.to_owned() }
    }

    /// Fails only when there is no answer: no connection, or TLS that this CA does not vouch for.
    pub(crate) fn get(&self, shell: &Shell, url: &str) -> Result<Answer> {
        parse(&shell.read_quiet(self.curl(url)?.arg(url))?)
    }

    /// Posts JSON. It goes by standard input: it may hold secrets, and everyone can read a process list.
    pub(crate) fn post(&self, shell: &Shell, url: &str, body: &Value) -> Result<Answer> {
        let mut curl = self.curl(url)?;
        curl.args(["--header", "content-type: application/json", "--data-binary", "@-"]).arg(url);
        parse(&shell.read_fed(&mut curl, &body.to_string())?)
    }

    fn curl(&self, url: &str) -> Result<Command> {
        let mut curl = Command::new("curl");
        // --disable first: a person's .curlrc must not change what is checked.
        curl.args(["--disable", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30"]);
        curl.arg("--cacert").arg(&self.ca_file);
        curl.arg("--resolve").arg(format!("{}:127.0.0.1", host_and_port(url)?));
        curl.args(["--write-out", "\n%{http_code}"]);
        Ok(curl)
    }
}

fn host_and_port(url: &str) -> Result<String> {
    let rest = url.strip_prefix("https://").with_context(|| format!("expected an https:// URL, got {url}"))?;
    let authority = rest.split('/').next().unwrap_or_default();
    Ok(if authority.contains(':') { authority.to_owned() } else { format!("{authority}:443") })
}

fn parse(output: &str) -> Result<Answer> {
    let (body, status) = output.rsplit_once('\n').context("curl printed no status")?;
    let status = status.trim().parse().with_context(|| format!("curl printed {status:?} as the status"))?;
    Ok(Answer { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_the_last_line_and_the_body_all_before_it() {
        assert_eq!(parse("<p>\n</p>\n\n200").unwrap(), Answer { status: 200, body: "<p>\n</p>\n".to_owned() });
        assert!(parse("").is_err());
    }

    #[test]
    fn a_url_names_its_port_or_has_the_scheme_s() {
        assert_eq!(host_and_port("https://a.b:8443/x:1").unwrap(), "a.b:8443");
        assert_eq!(host_and_port("https://a.b/").unwrap(), "a.b:443");
        assert!(host_and_port("http://a.b/").is_err());
    }
}
