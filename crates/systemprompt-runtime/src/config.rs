//! What the server needs to know, from the environment, all problems reported together and by name only:
//! a value may be a secret.

use std::{
    ffi::OsString,
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};
use systemprompt_contract::Secret;

const DEFAULT_DRAIN: Duration = Duration::from_secs(10);

/// Everything [`crate::serve`] needs.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// `HOST`: the address to listen on.
    pub host: IpAddr,
    /// `PORT`: 0 takes a free one.
    pub port: u16,
    /// `WEB_DIR`: the site is its `dist` directory.
    pub web_dir: PathBuf,
    /// `SYSTEMPROMPT_SERVICES_PATH`: must exist.
    pub services_path: PathBuf,
    /// `DATABASE_URL`.
    pub database_url: Secret,
    /// `DRAIN_SECONDS`: how long requests in flight may take after the stop; 10 seconds when not given.
    pub drain: Duration,
}

/// What a profile and the project around it say; the environment beats it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeDefaults {
    /// Used without `HOST`.
    pub host: IpAddr,
    /// Used without `PORT`.
    pub port: u16,
    /// Used without `WEB_DIR`.
    pub web_dir: Option<PathBuf>,
    /// Used without `SYSTEMPROMPT_SERVICES_PATH`.
    pub services_path: Option<PathBuf>,
}

impl Default for RuntimeDefaults {
    /// Loopback, since a server that was told nothing should not be reachable from elsewhere; port 8080.
    fn default() -> Self {
        Self { host: IpAddr::V4(Ipv4Addr::LOCALHOST), port: 8080, web_dir: None, services_path: None }
    }
}

/// Every variable that is missing or wrong, without the values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// One sentence for each variable.
    pub problems: Vec<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the environment is not complete: {}", self.problems.join("; "))
    }
}

impl RuntimeConfig {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// [`ConfigError`] with every missing or invalid variable at once.
    pub fn from_env() -> Result<Self, ConfigError> {
        Self::from_env_or(&RuntimeDefaults::default())
    }

    /// Reads the environment of this process; `defaults` fill the gaps.
    ///
    /// # Errors
    /// [`ConfigError`] with every missing or invalid variable at once.
    pub fn from_env_or(defaults: &RuntimeDefaults) -> Result<Self, ConfigError> {
        Self::parse(defaults, |name| std::env::var_os(name))
    }

    fn parse(defaults: &RuntimeDefaults, lookup: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        let mut reader = Reader { lookup, problems: Vec::new() };
        let host = reader.parsed("HOST", "an IP address such as 0.0.0.0");
        let port = reader.parsed("PORT", "a number from 0 to 65535");
        let drain = reader.parsed("DRAIN_SECONDS", "a whole number of seconds");
        let web_dir = reader.path("WEB_DIR", defaults.web_dir.as_ref());
        let services_path = reader.directory("SYSTEMPROMPT_SERVICES_PATH", defaults.services_path.as_ref());
        let database_url = reader.database_url();
        match (reader.problems, web_dir, services_path, database_url) {
            (problems, Some(web_dir), Some(services_path), Some(database_url)) if problems.is_empty() => Ok(Self {
                host: host.unwrap_or(defaults.host),
                port: port.unwrap_or(defaults.port),
                web_dir,
                services_path,
                database_url,
                drain: drain.map_or(DEFAULT_DRAIN, Duration::from_secs),
            }),
            (problems, ..) => Err(ConfigError { problems }),
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::new(self.host, self.port)
    }
}

struct Reader<L> {
    lookup: L,
    problems: Vec<String>,
}

impl<L: Fn(&str) -> Option<OsString>> Reader<L> {
    fn optional(&self, name: &str) -> Option<OsString> {
        (self.lookup)(name).filter(|value| !value.is_empty())
    }

    fn required(&mut self, name: &str) -> Option<OsString> {
        let value = self.optional(name);
        if value.is_none() {
            self.problems.push(format!("{name} is missing"));
        }
        value
    }

    fn parsed<T: std::str::FromStr>(&mut self, name: &str, expected: &str) -> Option<T> {
        let value = self.optional(name)?;
        let parsed = value.to_str().and_then(|text| text.parse().ok());
        if parsed.is_none() {
            self.problems.push(format!("{name} must be {expected}"));
        }
        parsed
    }

    fn path(&mut self, name: &str, default: Option<&PathBuf>) -> Option<PathBuf> {
        match (self.optional(name), default) {
            (None, Some(default)) => Some(default.clone()),
            _ => self.required(name).map(PathBuf::from),
        }
    }

    fn directory(&mut self, name: &str, default: Option<&PathBuf>) -> Option<PathBuf> {
        let path = self.path(name, default)?;
        if path.is_dir() {
            return Some(path);
        }
        self.problems.push(format!("{name} must name a directory that exists"));
        None
    }

    fn database_url(&mut self) -> Option<Secret> {
        const NAME: &str = "DATABASE_URL";
        let value = self.required(NAME)?;
        let url = value.to_str().filter(|url| crate::database::is_valid_url(url)).map(Secret::new);
        if url.is_none() {
            self.problems.push(format!("{NAME} must be a postgres:// URL"));
        }
        url
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn parse(pairs: &[(&str, &str)]) -> Result<RuntimeConfig, ConfigError> {
        let map: HashMap<_, _> = pairs.iter().map(|(name, value)| (*name, OsString::from(*value))).collect();
        RuntimeConfig::parse(&RuntimeDefaults::default(), |name| map.get(name).cloned())
    }

    const COMPLETE: [(&str, &str); 3] =
        [("WEB_DIR", "/app/web"), ("SYSTEMPROMPT_SERVICES_PATH", "/"), ("DATABASE_URL", "postgres://a:b@localhost/c")];

    #[test]
    fn all_problems_come_together_and_without_values() {
        let error = parse(&[("HOST", "hunter2"), ("PORT", "hunter2"), ("DATABASE_URL", "hunter2")]).expect_err("bad");
        assert_eq!(
            error.to_string(),
            "the environment is not complete: HOST must be an IP address such as 0.0.0.0; \
             PORT must be a number from 0 to 65535; WEB_DIR is missing; SYSTEMPROMPT_SERVICES_PATH is missing; \
             DATABASE_URL must be a postgres:// URL"
        );
        let error = parse(&[("SYSTEMPROMPT_SERVICES_PATH", "/no/such")]).expect_err("bad");
        assert_eq!(error.problems[1], "SYSTEMPROMPT_SERVICES_PATH must name a directory that exists");
    }

    #[test]
    fn host_and_port_beat_the_defaults() {
        let config = parse(&COMPLETE).expect("complete");
        assert_eq!(config.address().to_string(), "127.0.0.1:8080");
        let given = [&COMPLETE[..], &[("HOST", "0.0.0.0"), ("PORT", "9000"), ("DRAIN_SECONDS", "3")]].concat();
        let config = parse(&given).expect("complete");
        assert_eq!(config.address().to_string(), "0.0.0.0:9000");
        assert_eq!(config.drain, Duration::from_secs(3));
    }

    #[test]
    fn the_database_url_is_never_shown() {
        let config = parse(&COMPLETE).expect("complete");
        assert!(!format!("{config:?}").contains("postgres://"));
    }
}
