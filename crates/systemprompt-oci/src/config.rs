use crate::{Digest, Manifest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What an image runs and with what: the part of an image configuration that matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ImageConfig {
    /// First words of the command.
    pub entrypoint: Vec<String>,
    /// Words after it.
    pub cmd: Vec<String>,
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// Where the command starts; empty: `/`.
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root inside the image.
    pub user: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
    /// Free text.
    pub labels: BTreeMap<String, String>,
}

/// A configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ConfigError {
    #[error("expected an image configuration of at most {max} bytes, got {0}", max = ImageConfig::MAX_BYTES)]
    TooLarge(usize),
    #[error("expected an image configuration as JSON: {0}")]
    Syntax(String),
    #[error("expected rootfs.type \"layers\", got {0:?}")]
    RootFs(String),
    #[error("expected at most {max} layers, got {0} diff_ids", max = Manifest::MAX_LAYERS)]
    TooManyLayers(usize),
    #[error("the image names no command: set ENTRYPOINT or CMD when building it")]
    NoEntrypoint,
    #[error("expected {0} of the image configuration without NUL bytes: take them out and build the image again")]
    Nul(&'static str),
    #[error("expected an absolute WorkingDir, got {0:?}: set WORKDIR to a path that begins with a slash")]
    WorkingDir(String),
}

impl ImageConfig {
    /// Largest configuration accepted.
    pub const MAX_BYTES: usize = 4 << 20;

    /// Reads an OCI or Docker image configuration.
    ///
    /// # Errors
    /// [`ConfigError`] when it is too large or not well-formed. A missing command is no error here; see
    /// [`ImageConfig::command`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(ConfigError::TooLarge(bytes.len()));
        }
        let wire: WireConfig = serde_json::from_slice(bytes).map_err(|error| ConfigError::Syntax(error.to_string()))?;
        if wire.rootfs.kind != LAYERS {
            return Err(ConfigError::RootFs(wire.rootfs.kind.chars().take(80).collect()));
        }
        if wire.rootfs.diff_ids.len() > Manifest::MAX_LAYERS {
            return Err(ConfigError::TooManyLayers(wire.rootfs.diff_ids.len()));
        }
        let run = wire.config.unwrap_or_default();
        run.check()?;
        Ok(Self {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env: run.env.unwrap_or_default(),
            working_dir: run.working_dir,
            user: run.user,
            architecture: wire.architecture,
            os: wire.os,
            diff_ids: wire.rootfs.diff_ids,
            labels: run.labels.unwrap_or_default(),
        })
    }

    /// The command to run: entrypoint, then cmd.
    ///
    /// # Errors
    /// [`ConfigError::NoEntrypoint`] when both are empty or the program's name is.
    pub fn command(&self) -> Result<Vec<String>, ConfigError> {
        let command: Vec<String> = self.entrypoint.iter().chain(&self.cmd).cloned().collect();
        match command.first() {
            Some(program) if !program.is_empty() => Ok(command),
            _ => Err(ConfigError::NoEntrypoint),
        }
    }

    /// The configuration as bytes; the same configuration always gives the same digest.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let wire = WireConfig {
            // Fixed: a clock in it would give every build another digest.
            created: Some("1980-01-01T00:00:00Z".to_owned()),
            architecture: self.architecture.clone(),
            os: self.os.clone(),
            config: Some(WireRun {
                user: self.user.clone(),
                env: Some(self.env.clone()),
                entrypoint: Some(self.entrypoint.clone()),
                cmd: (!self.cmd.is_empty()).then(|| self.cmd.clone()),
                working_dir: self.working_dir.clone(),
                labels: (!self.labels.is_empty()).then(|| self.labels.clone()),
            }),
            rootfs: WireRootFs { kind: LAYERS.to_owned(), diff_ids: self.diff_ids.clone() },
        };
        serde_json::to_vec(&wire).expect("strings serialise")
    }
}

const LAYERS: &str = "layers";

#[derive(Serialize, Deserialize)]
struct WireConfig {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created: Option<String>,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<WireRun>,
    rootfs: WireRootFs,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct WireRun {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    user: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    env: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    entrypoint: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cmd: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    working_dir: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<BTreeMap<String, String>>,
}

impl WireRun {
    /// What becomes an argument, a variable or a path must be able to be one. Drivers hand them on in lists that NUL
    /// separates, where a NUL within a word would make a second word out of its rest.
    fn check(&self) -> Result<(), ConfigError> {
        let lists = [("Env", &self.env), ("Entrypoint", &self.entrypoint), ("Cmd", &self.cmd)];
        let listed = lists.into_iter().flat_map(|(name, words)| words.iter().flatten().map(move |word| (name, word)));
        for (name, word) in listed.chain([("User", &self.user), ("WorkingDir", &self.working_dir)]) {
            if word.contains('\0') {
                return Err(ConfigError::Nul(name));
            }
        }
        if !self.working_dir.is_empty() && !self.working_dir.starts_with('/') {
            return Err(ConfigError::WorkingDir(self.working_dir.chars().take(80).collect()));
        }
        Ok(())
    }
}

#[derive(Serialize, Deserialize)]
struct WireRootFs {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_its_own_writing() {
        let config = ImageConfig {
            entrypoint: vec!["/app/bin/systemprompt".into(), "serve".into()],
            env: vec!["PORT=8080".into()],
            working_dir: "/app".into(),
            user: "app".into(),
            architecture: "amd64".into(),
            os: "linux".into(),
            diff_ids: vec![Digest::of(b"a")],
            ..ImageConfig::default()
        };
        assert_eq!(ImageConfig::parse(&config.to_bytes()).expect("own output"), config);
        assert_eq!(config.to_bytes(), config.to_bytes());
    }

    #[test]
    fn the_command_is_entrypoint_then_cmd_and_never_empty() {
        let mut config = ImageConfig { cmd: vec!["serve".into()], ..ImageConfig::default() };
        assert_eq!(config.command().expect("cmd alone"), ["serve"]);
        config.entrypoint = vec!["/bin/app".into()];
        assert_eq!(config.command().expect("both"), ["/bin/app", "serve"]);
        config = ImageConfig::default();
        assert_eq!(config.command(), Err(ConfigError::NoEntrypoint));
        config.entrypoint = vec![String::new()];
        assert_eq!(config.command(), Err(ConfigError::NoEntrypoint));
    }

    #[test]
    fn docker_writes_null_for_what_is_not_set() {
        let text = r#"{"architecture":"amd64","os":"linux","created":"2024-01-01T00:00:00Z","history":[{}],
            "config":{"Env":null,"Entrypoint":null,"Cmd":["sh"],"Labels":null,"ExposedPorts":{"80/tcp":{}}},
            "rootfs":{"type":"layers","diff_ids":[]}}"#;
        assert_eq!(ImageConfig::parse(text.as_bytes()).expect("docker").cmd, ["sh"]);
    }

    #[test]
    fn no_word_holds_a_nul_and_the_working_directory_is_absolute() {
        let parse = |field: &str, value: &str| {
            let text = format!(r#"{{"config":{{"{field}":{value}}},"rootfs":{{"type":"layers"}}}}"#);
            ImageConfig::parse(text.as_bytes())
        };
        let word = r#""/\u0000--bind\u0000/\u0000/host""#;
        for field in ["User", "WorkingDir"] {
            assert_eq!(parse(field, word), Err(ConfigError::Nul(field)));
        }
        for field in ["Env", "Entrypoint", "Cmd"] {
            assert_eq!(parse(field, &format!(r#"["a",{word}]"#)), Err(ConfigError::Nul(field)));
        }
        assert_eq!(parse("WorkingDir", r#""app""#), Err(ConfigError::WorkingDir("app".to_owned())));
        assert_eq!(parse("WorkingDir", r#""/app""#).expect("absolute").working_dir, "/app");
        assert_eq!(parse("WorkingDir", r#""""#).expect("none").working_dir, "");
    }
}
