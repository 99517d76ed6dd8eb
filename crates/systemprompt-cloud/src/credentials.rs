use crate::{
    api_url::{ApiUrl, InvalidApiUrl},
    error::log_in_to,
    private_file::{self, PrivateFileError},
};
use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use systemprompt_contract::{Secret, token};

/// From here on the command line warns that the token ends soon.
const SOON: TimeDelta = TimeDelta::days(3);

/// `credentials.json`: a token and the origin it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudCredentials {
    /// The API token.
    pub api_token: Secret,
    /// Who issued it; it is shown to nobody else.
    pub api_url: ApiUrl,
    /// When it was stored; absent in files of other clients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authenticated_at: Option<DateTime<Utc>>,
    /// Whose it is.
    pub user_email: String,
}

/// Why there are no credentials to use.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// Nobody signed in here.
    #[error("not signed in: there is no {}", path.display())]
    Missing {
        /// Where they would be.
        path: PathBuf,
    },
    /// The file is there but not what it should be; its content is not shown.
    #[error("{} is not a credentials file: {reason}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong, without values.
        reason: String,
    },
    /// A container without its variables.
    #[error("inside a tenant SYSTEMPROMPT_API_TOKEN and SYSTEMPROMPT_USER_EMAIL must be set; missing: {0}")]
    Environment(String),
    /// `SYSTEMPROMPT_API_URL` is wrong.
    #[error("SYSTEMPROMPT_API_URL: {0}")]
    Url(#[from] InvalidApiUrl),
    /// The token is of another cloud than the one that was asked for.
    #[error("the token in this project is for {stored}, not for {asked}; it is not shown to anybody else")]
    OtherOrigin {
        /// Who issued the token.
        stored: ApiUrl,
        /// Who was to be called.
        asked: ApiUrl,
    },
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] PrivateFileError),
}

impl CredentialsError {
    /// For programs, lower snake case.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } | Self::Environment(_) => "not_signed_in",
            Self::Invalid { .. } => "invalid_credentials_file",
            Self::Url(_) => "invalid_api_url",
            Self::OtherOrigin { .. } => "token_of_another_cloud",
            Self::File(_) => "file",
        }
    }

    /// What to do next, where `api_url` is who is to be called.
    pub fn hint(&self, api_url: &ApiUrl) -> Option<String> {
        match self {
            Self::Missing { .. } => Some(format!("Sign in: {}", api_url.sign_in_command())),
            Self::Invalid { path, .. } => {
                Some(format!("Remove {} and sign in: {}", path.display(), api_url.sign_in_command()))
            }
            Self::OtherOrigin { asked, .. } => Some(log_in_to(asked)),
            Self::Environment(_) | Self::Url(_) | Self::File(_) => None,
        }
    }
}

/// How long a token is still good, by its own untrusted word: for warnings only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenLife {
    /// Good for a while, or it does not say.
    Good,
    /// Ends within three days.
    EndsSoon(DateTime<Utc>),
    /// Ended.
    Ended(DateTime<Utc>),
}

impl CloudCredentials {
    /// Reads `credentials.json`; none when there is none.
    ///
    /// # Errors
    /// [`CredentialsError`] when it cannot be read or is not valid.
    pub fn load_from_path(path: &Path) -> Result<Option<Self>, CredentialsError> {
        let Some(content) = private_file::read(path)? else { return Ok(None) };
        let invalid = |reason: String| CredentialsError::Invalid { path: path.to_owned(), reason };
        // serde's message may quote the value it stumbled over, so only the place is shown.
        let credentials: Self = serde_json::from_slice(&content)
            .map_err(|error| invalid(format!("line {}, column {} is not as expected", error.line(), error.column())))?;
        match credentials.problem() {
            Some(problem) => Err(invalid(problem.to_owned())),
            None => Ok(Some(credentials)),
        }
    }

    /// Writes `credentials.json`, 0600 and as a whole, git-ignored.
    ///
    /// # Errors
    /// [`CredentialsError`]; the old file stays.
    pub fn save_to_path(&self, path: &Path) -> Result<(), CredentialsError> {
        let invalid = |reason: String| CredentialsError::Invalid { path: path.to_owned(), reason };
        if let Some(problem) = self.problem() {
            return Err(invalid(problem.to_owned()));
        }
        let mut content = serde_json::to_vec_pretty(self).map_err(|error| invalid(error.to_string()))?;
        content.push(b'\n');
        Ok(private_file::write(path, &content)?)
    }

    /// Removes `credentials.json`; whether there was one.
    ///
    /// # Errors
    /// [`CredentialsError`].
    pub fn delete_at_path(path: &Path) -> Result<bool, CredentialsError> {
        Ok(private_file::remove(path)?)
    }

    /// The token, when it was issued by `asked`.
    ///
    /// # Errors
    /// [`CredentialsError::OtherOrigin`].
    pub fn token_for(&self, asked: &ApiUrl) -> Result<Secret, CredentialsError> {
        if self.api_url == *asked {
            return Ok(self.api_token.clone());
        }
        Err(CredentialsError::OtherOrigin { stored: self.api_url.clone(), asked: asked.clone() })
    }

    /// How long the token is still good at `now`.
    pub fn token_life(&self, now: DateTime<Utc>) -> TokenLife {
        let end = token::untrusted_expiry(self.api_token.expose()).and_then(|exp| DateTime::from_timestamp(exp, 0));
        match end {
            Some(end) if end <= now => TokenLife::Ended(end),
            Some(end) if end - now <= SOON => TokenLife::EndsSoon(end),
            _ => TokenLife::Good,
        }
    }

    fn problem(&self) -> Option<&'static str> {
        let token = self.api_token.expose();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Some("api_token must be one printable word");
        }
        let email_ok = self.user_email.split_once('@').is_some_and(|(user, host)| !user.is_empty() && !host.is_empty());
        (!email_ok).then_some("user_email must be an e-mail address")
    }
}

/// Where credentials come from: the project's file, or the environment inside a tenant's instance.
#[derive(Debug, Clone)]
pub enum CredentialsBootstrap {
    /// `.systemprompt/credentials.json`.
    File(PathBuf),
    /// `FLY_APP_NAME` is set: only the environment counts.
    Environment(Box<CloudCredentials>),
}

impl CredentialsBootstrap {
    /// Decides by the environment, read with `lookup`; `path` is where the file would be.
    ///
    /// # Errors
    /// [`CredentialsError`] when this is a tenant's instance and its variables are incomplete.
    pub fn find(path: PathBuf, lookup: impl Fn(&str) -> Option<String>) -> Result<Self, CredentialsError> {
        let given = |name: &str| lookup(name).filter(|value| !value.is_empty());
        if given("FLY_APP_NAME").is_none() {
            return Ok(Self::File(path));
        }
        let names = ["SYSTEMPROMPT_API_TOKEN", "SYSTEMPROMPT_USER_EMAIL"];
        let (Some(token), Some(user_email)) = (given(names[0]), given(names[1])) else {
            let missing: Vec<_> = names.into_iter().filter(|name| given(name).is_none()).collect();
            return Err(CredentialsError::Environment(missing.join(", ")));
        };
        let api_url = given("SYSTEMPROMPT_API_URL").map_or_else(|| Ok(ApiUrl::default()), |url| url.parse())?;
        let api_token = Secret::new(token);
        Ok(Self::Environment(Box::new(CloudCredentials { api_token, api_url, authenticated_at: None, user_email })))
    }

    /// The credentials.
    ///
    /// # Errors
    /// [`CredentialsError::Missing`] when nobody signed in.
    pub fn load(&self) -> Result<CloudCredentials, CredentialsError> {
        match self {
            Self::Environment(credentials) => Ok((**credentials).clone()),
            Self::File(path) => {
                CloudCredentials::load_from_path(path)?.ok_or_else(|| CredentialsError::Missing { path: path.clone() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_shown_to_its_own_origin_only() {
        let credentials = CloudCredentials {
            api_token: Secret::new("sp_live_a.b.c"),
            api_url: ApiUrl::default(),
            authenticated_at: None,
            user_email: "a@b".to_owned(),
        };
        assert!(credentials.token_for(&ApiUrl::default()).is_ok());
        let evil = "https://api.systemprompt.io.evil.example".parse().expect("url");
        assert!(matches!(credentials.token_for(&evil), Err(CredentialsError::OtherOrigin { .. })));
    }

    #[test]
    fn a_tenant_instance_reads_its_environment_only() {
        let find = |pairs: &'static [(&str, &str)]| {
            CredentialsBootstrap::find("/no/such/credentials.json".into(), |name| {
                pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
            })
        };
        assert!(matches!(find(&[]), Ok(CredentialsBootstrap::File(_))));
        let error = find(&[("FLY_APP_NAME", "sp-x"), ("SYSTEMPROMPT_USER_EMAIL", "a@b")]).expect_err("incomplete");
        assert!(error.to_string().ends_with("missing: SYSTEMPROMPT_API_TOKEN"), "{error}");
        let pairs = &[("FLY_APP_NAME", "x"), ("SYSTEMPROMPT_USER_EMAIL", "a@b"), ("SYSTEMPROMPT_API_TOKEN", "t")];
        assert_eq!(find(pairs).expect("complete").load().expect("complete").user_email, "a@b");
    }

    #[test]
    fn the_end_of_a_token_is_told_in_time() {
        let now = Utc::now();
        let life = |days: i64| {
            let api_token = token::new_api_token((now + TimeDelta::days(days)).timestamp());
            let api_url = ApiUrl::default();
            CloudCredentials { api_token, api_url, authenticated_at: None, user_email: String::new() }.token_life(now)
        };
        assert_eq!(life(90), TokenLife::Good);
        assert!(matches!(life(2), TokenLife::EndsSoon(_)));
        assert!(matches!(life(-1), TokenLife::Ended(_)));
    }
}
