//! The first account: made once with the one-time token that the first start wrote.

use crate::{http::Http, shell::Shell};
use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Command,
};

const EMAIL: &str = "admin@localhost.localdomain";

/// What is kept in `DATA/first-account.json`, for the person who runs this.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct FirstAccount {
    email: String,
    password: String,
}

/// A token of an operator: of the first account, made now when there is none, else by the operator's own command,
/// which asks nothing but to be run where the data lies. So no token that was lost, revoked or ended stops us.
pub(super) fn token(
    shell: &Shell,
    http: &Http,
    api_url: &str,
    setup_token: Option<&Path>,
    data: &Path,
    mint: &mut Command,
) -> Result<String> {
    match setup_token {
        Some(setup_token) => make(shell, http, api_url, setup_token, &file(data)),
        None => access_token(&shell.read_quiet(mint)?),
    }
}

/// Where the account is kept.
pub(super) fn file(data: &Path) -> PathBuf {
    data.join("first-account.json")
}

fn make(shell: &Shell, http: &Http, api_url: &str, setup_token: &Path, file: &Path) -> Result<String> {
    let setup_token =
        fs::read_to_string(setup_token).with_context(|| format!("cannot read {}", setup_token.display()))?;
    // A run that ended between request and answer left its password: the same one again.
    let account = match read(file)? {
        Some(account) => account,
        None => FirstAccount { email: EMAIL.to_owned(), password: random_password()? },
    };
    write(file, &account)?;
    let request = json!({ "setup_token": setup_token.trim(), "email": account.email, "password": account.password });
    let answer = http.post(shell, &format!("{api_url}/api/v1/auth/setup"), &request)?;
    if !matches!(answer.status, 200 | 201) {
        bail!("the first account was refused with {}: {}", answer.status, answer.body);
    }
    access_token(&answer.body)
}

fn access_token(body: &str) -> Result<String> {
    let answer: Value = serde_json::from_str(body).context("the account's answer is not JSON")?;
    let token = answer.get("access_token").and_then(Value::as_str);
    token.map(str::to_owned).context("the account's answer has no access_token")
}

fn random_password() -> Result<String> {
    let mut bytes = [0_u8; 16];
    getrandom::fill(&mut bytes).context("the operating system gives no random bytes")?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    }))
}

fn read(file: &Path) -> Result<Option<FirstAccount>> {
    match fs::read(file) {
        Ok(text) => serde_json::from_slice(&text).map(Some).with_context(|| format!("{} is damaged", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", file.display())),
    }
}

/// 0600 from its first byte on, and never half.
fn write(file: &Path, account: &FirstAccount) -> Result<()> {
    let folder = file.parent().context("the account's file lies in a folder")?;
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer_pretty(&mut temporary, account)?;
    temporary.flush()?;
    temporary.as_file().sync_all()?;
    temporary.persist(file).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_account_is_kept_private_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = file(folder.path());
        assert!(read(&path).unwrap().is_none());
        let account = FirstAccount { email: EMAIL.into(), password: random_password().unwrap() };
        write(&path, &account).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap().unwrap().password, account.password);
        fs::write(&path, "{").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("damaged"));
    }

    #[test]
    fn a_password_is_long_and_never_the_same() {
        let (one, two) = (random_password().unwrap(), random_password().unwrap());
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }

    #[test]
    fn without_a_setup_token_the_operator_s_command_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        let shell = Shell::open().unwrap();
        let http = Http::new(Path::new("ca.pem"));
        let ask = |script: &str| {
            let mut mint = Command::new("sh");
            token(&shell, &http, "https://api.z", None, folder.path(), mint.args(["-c", script]))
        };
        assert_eq!(ask("echo '{\"access_token\":\"sp_live_x\"}'").unwrap(), "sp_live_x");
        let error = ask("echo 'there is no operator yet' >&2; exit 1").unwrap_err().to_string();
        assert!(error.contains("no operator yet"), "{error}");
    }
}
