//! The project a command runs in: the nearest directory upwards with a `.systemprompt` directory, and its profiles.

use serde::Deserialize;
use std::path::{Component, Path, PathBuf};

const STATE_DIR: &str = ".systemprompt";
const PROFILE_FILES: [&str; 2] = ["profile.yaml", "profile.yml"];
const MAX_PROFILE: u64 = 1024 * 1024;

/// A directory with a `.systemprompt` directory in it, or where one will be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    root: PathBuf,
}

/// Where a profile's tenant runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProfileTarget {
    /// On this machine.
    #[default]
    Local,
    /// On SystemPrompt Cloud.
    Cloud,
}

/// What is needed of a `profile.yaml`; whatever else it says is left to the tenant's own server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// Its file.
    pub path: PathBuf,
    /// `name`.
    pub name: String,
    /// `display_name`; the name where it is absent.
    pub display_name: String,
    /// `target`.
    pub target: ProfileTarget,
    /// `cloud.tenant_id`; opaque.
    pub tenant_id: Option<String>,
    /// `cloud.tenants_path`, relative to the profile's directory.
    pub tenants_path: Option<PathBuf>,
    /// `server.host`.
    pub host: Option<String>,
    /// `server.port`.
    pub port: Option<u16>,
}

/// Why there is no profile to use.
#[derive(Debug, thiserror::Error)]
pub enum ProjectError {
    /// It cannot be read.
    #[error("cannot read the profile {}: {source}", path.display())]
    Read {
        /// Its file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// No such profile.
    #[error("there is no profile {name:?} in {}; there are: {}", directory.display(), list(known))]
    NoProfile {
        /// What was asked for.
        name: String,
        /// Where profiles are.
        directory: PathBuf,
        /// Those that exist.
        known: Vec<String>,
    },
    /// Not YAML, or not a profile.
    #[error("{} is not a profile: {reason}", path.display())]
    Invalid {
        /// Its file.
        path: PathBuf,
        /// With line and column.
        reason: String,
    },
    /// A profile wants a file outside of the project's private directory.
    #[error("cloud.tenants_path of {} leads to {}, which is not below .systemprompt", profile.display(), path.display())]
    Outside {
        /// The profile's file.
        profile: PathBuf,
        /// Where it leads.
        path: PathBuf,
    },
}

impl ProjectError {
    /// For programs, lower snake case.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoProfile { .. } => "profile_not_found",
            Self::Read { .. } | Self::Invalid { .. } | Self::Outside { .. } => "invalid_profile",
        }
    }
}

impl Project {
    /// The nearest project from `directory` upwards.
    pub fn discover(directory: &Path) -> Option<Self> {
        let holds_state = |directory: &&Path| directory.join(STATE_DIR).is_dir();
        directory.ancestors().find(holds_state).map(|root| Self { root: root.to_owned() })
    }

    /// The project in `root`, whether or not it has state yet.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Its directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// `.systemprompt/credentials.json`.
    pub fn credentials_path(&self) -> PathBuf {
        self.state().join("credentials.json")
    }

    /// `.systemprompt/tenants.json`, or where the profile says, which must be below `.systemprompt` too.
    ///
    /// # Errors
    /// [`ProjectError::Outside`].
    pub fn tenants_path(&self, profile: Option<&Profile>) -> Result<PathBuf, ProjectError> {
        let given = profile.and_then(|profile| profile.tenants_path.as_deref().map(|path| (profile, path)));
        let Some((profile, relative)) = given else { return Ok(self.state().join("tenants.json")) };
        let base = profile.path.parent().unwrap_or(&self.root);
        let path = without_dots(&base.join(relative));
        let outside = || ProjectError::Outside { profile: profile.path.clone(), path: path.clone() };
        let parent = path.parent().ok_or_else(outside)?;
        // The text must stay inside, and no link on the way may lead out of it.
        let inside = parent.starts_with(without_dots(&self.state())) && path.file_name().is_some();
        let honest = match (deepest_real(parent), self.state().canonicalize()) {
            (Some(parent), Ok(state)) => parent.starts_with(state),
            // Nothing is there yet, so no link either.
            (_, Err(_)) | (None, _) => true,
        };
        if inside && honest { Ok(path) } else { Err(outside()) }
    }

    /// Names of the profiles, sorted.
    pub fn profile_names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.profiles()).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries
            .filter(|entry| profile_file(&entry.path()).is_some())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }

    /// The profile that was asked for, by name or by path; without one the only profile there is, or the only one of
    /// them for the cloud. `variables` fills in `${NAME}`.
    ///
    /// # Errors
    /// [`ProjectError`] when the one that was asked for cannot be used.
    pub fn profile(
        &self,
        asked: Option<&str>,
        variables: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Profile>, ProjectError> {
        let path = match asked {
            Some(asked) if is_path(asked) => PathBuf::from(asked),
            Some(name) => self.profile_path(name)?,
            None => return self.only_profile(&variables),
        };
        let path = if path.is_dir() { profile_file(&path).unwrap_or(path) } else { path };
        Profile::load(&path, &variables).map(Some)
    }

    fn only_profile(&self, variables: &impl Fn(&str) -> Option<String>) -> Result<Option<Profile>, ProjectError> {
        let names = self.profile_names();
        let load = |name: &String| self.profile_path(name).and_then(|path| Profile::load(&path, variables));
        if let [only] = names.as_slice() {
            return load(only).map(Some);
        }
        let of_cloud = |profile: &Profile| profile.target == ProfileTarget::Cloud;
        let mut cloud: Vec<_> = names.iter().filter_map(|name| load(name).ok()).filter(of_cloud).collect();
        Ok(if cloud.len() == 1 { cloud.pop() } else { None })
    }

    fn profile_path(&self, name: &str) -> Result<PathBuf, ProjectError> {
        let known = self.profile_names();
        let path = known.iter().find(|known| *known == name).and_then(|name| profile_file(&self.profiles().join(name)));
        path.ok_or_else(|| ProjectError::NoProfile { name: name.to_owned(), directory: self.profiles(), known })
    }

    fn state(&self) -> PathBuf {
        self.root.join(STATE_DIR)
    }

    fn profiles(&self) -> PathBuf {
        self.state().join("profiles")
    }
}

impl Profile {
    fn load(path: &Path, variables: &impl Fn(&str) -> Option<String>) -> Result<Self, ProjectError> {
        let read = |source| ProjectError::Read { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(read)?.len() > MAX_PROFILE {
            return Err(ProjectError::Invalid { path: path.to_owned(), reason: "larger than 1 MiB".to_owned() });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        Self::parse(path, &with_variables(&text, variables))
    }

    /// The name of its directory: what the image builder calls it.
    pub fn directory_name(&self) -> &str {
        let directory = self.path.parent().and_then(Path::file_name).and_then(|name| name.to_str());
        directory.unwrap_or(&self.name)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, ProjectError> {
        let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
        let file: ProfileFile = serde_saphyr::from_str_with_options(text, options)
            .map_err(|error| ProjectError::Invalid { path: path.to_owned(), reason: error.to_string() })?;
        let (cloud, server) = (file.cloud.unwrap_or_default(), file.server.unwrap_or_default());
        Ok(Self {
            path: path.to_owned(),
            display_name: file.display_name.unwrap_or_else(|| file.name.clone()),
            name: file.name,
            target: file.target,
            tenant_id: cloud.tenant_id.filter(|id| !id.is_empty()),
            tenants_path: cloud.tenants_path,
            host: server.host,
            port: server.port,
        })
    }
}

#[derive(Deserialize)]
struct ProfileFile {
    name: String,
    #[serde(default)]
    display_name: Option<String>,
    #[serde(default)]
    target: ProfileTarget,
    #[serde(default)]
    cloud: Option<CloudSection>,
    #[serde(default)]
    server: Option<ServerSection>,
}

#[derive(Default, Deserialize)]
struct CloudSection {
    #[serde(default)]
    tenant_id: Option<String>,
    #[serde(default)]
    tenants_path: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
struct ServerSection {
    #[serde(default)]
    host: Option<String>,
    #[serde(default)]
    port: Option<u16>,
}

fn profile_file(directory: &Path) -> Option<PathBuf> {
    PROFILE_FILES.map(|name| directory.join(name)).into_iter().find(|path| path.is_file())
}

/// A value with a slash, of a YAML file, or starting with a dot or a tilde is a path; everything else is a name.
fn is_path(asked: &str) -> bool {
    let yaml = Path::new(asked).extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
    yaml || asked.contains('/') || asked.starts_with(['.', '~'])
}

/// Replaces `${NAME}` where the variable is set and leaves it as it is where not.
fn with_variables(text: &str, variables: &impl Fn(&str) -> Option<String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("${") {
        out.push_str(before);
        let value = after.split_once('}').and_then(|(name, tail)| Some((variables(name)?, tail)));
        if let Some((value, tail)) = value {
            out.push_str(&value);
            rest = tail;
        } else {
            out.push_str("${");
            rest = after;
        }
    }
    out + rest
}

/// What really is the deepest directory of `path` that exists: missing ones below it cannot lead elsewhere.
fn deepest_real(path: &Path) -> Option<PathBuf> {
    path.ancestors().find_map(|ancestor| ancestor.canonicalize().ok())
}

/// Resolves `.` and `..` in the text alone, so that what is judged is what is opened.
fn without_dots(path: &Path) -> PathBuf {
    path.components().fold(PathBuf::new(), |mut clean, component| {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(clean.pop()),
            other => clean.push(other),
        }
        clean
    })
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Profile, ProjectError> {
        Profile::parse(Path::new("/p/.systemprompt/profiles/x/profile.yaml"), text)
    }

    #[test]
    fn a_full_profile_is_read_and_the_rest_of_it_left_alone() {
        let text = "name: production\ntarget: cloud\nserver:\n  host: 0.0.0.0\n  port: 8080\n  more: [1, 2]\n\
                    rate_limits:\n  disabled: false\ncloud:\n  tenant_id: 999bc654-9a64-49bc-98be-db976fc84e76\n  validation: strict\n";
        let profile = parse(text).expect("a profile");
        assert_eq!((profile.name.as_str(), profile.display_name.as_str()), ("production", "production"));
        assert_eq!((profile.target, profile.port), (ProfileTarget::Cloud, Some(8080)));
        assert_eq!(profile.tenant_id.as_deref(), Some("999bc654-9a64-49bc-98be-db976fc84e76"));
    }

    #[test]
    fn a_profile_without_a_name_says_where() {
        let error = parse("target: cloud\n").expect_err("no name").to_string();
        assert!(error.contains("name"), "{error}");
        assert!(parse("name: n\ntarget: moon\n").is_err());
        assert!(parse("- just\n- a list\n").is_err());
    }

    #[test]
    fn tenants_path_stays_below_the_state_directory() {
        let project = Project::at("/p");
        let with = |path: &str| {
            let text = format!("name: n\ncloud:\n  tenants_path: {path:?}\n");
            project.tenants_path(Some(&parse(&text).expect("profile")))
        };
        assert_eq!(with("../../tenants.json").expect("the seed's").to_str(), Some("/p/.systemprompt/tenants.json"));
        for bad in
            ["../../../tenants.json", "/etc/passwd", "../../../.systemprompt-x/t.json", "../..", "../../../../../etc/x"]
        {
            assert!(matches!(with(bad), Err(ProjectError::Outside { .. })), "{bad}");
        }
    }

    #[test]
    fn no_link_leads_tenants_path_out_of_the_project() {
        let (root, elsewhere) = (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        let state = root.path().join(STATE_DIR);
        std::fs::create_dir_all(state.join("profiles/p")).expect("made");
        std::os::unix::fs::symlink(elsewhere.path(), state.join("link")).expect("linked");
        let with = |path: &str| {
            let profile = parse(&format!("name: n\ncloud:\n  tenants_path: {path:?}\n")).expect("profile");
            let path = state.join("profiles/p/profile.yaml");
            Project::at(root.path()).tenants_path(Some(&Profile { path, ..profile }))
        };
        assert!(with("../../own/new/tenants.json").is_ok());
        for bad in ["../../link/tenants.json", "../../link/new/tenants.json", "../../link/a/b/tenants.json"] {
            assert!(matches!(with(bad), Err(ProjectError::Outside { .. })), "{bad}");
        }
    }

    #[test]
    fn variables_are_filled_in_where_they_are_set() {
        let fill = |text| with_variables(text, &|name: &str| (name == "A").then(|| "1".to_owned()));
        assert_eq!(fill("x ${A} ${B} ${A"), "x 1 ${B} ${A");
        assert_eq!(fill("${${A}}"), "${1}");
    }
}
