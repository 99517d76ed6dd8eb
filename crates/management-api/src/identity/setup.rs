//! The first account of a fresh installation, made with a one-time token that only who can read its files has.
//!
//! The link that is printed carries no secret: the page asks to paste the token, so that it reaches neither the
//! browser's history nor a log on the way.

use super::{
    Identity,
    accounts::{Account, HashedAccount, NewAccount, Role},
    email::Email,
    password::Password,
};
use crate::{
    http::error::Failure,
    seal::private_file::{self, PrivateFileError},
};
use sqlx::{PgConnection, PgPool};
use std::path::{Path, PathBuf};
use systemprompt_contract::{ErrorCode, Secret, token};
use systemprompt_workflow::Db;

/// The one-time token could not be prepared.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error("the setup token's file")]
    File(#[from] PrivateFileError),
    #[error("the setup token's row")]
    Database(#[from] sqlx::Error),
}

/// At every start: while no account exists, sees to it that a one-time token lies in `file` (0600) and answers where,
/// to be pasted into `https://cloud.{zone}/setup` or sent to `POST /api/v1/auth/setup`; once an account exists, removes
/// the file. Idempotent: a token that waits already is kept.
///
/// # Errors
/// When the file or the database cannot be written.
pub(crate) async fn ensure_setup_token(db: &Db, file: &Path) -> Result<Option<PathBuf>, SetupError> {
    let mut tx = db.begin().await?;
    sqlx::query!("LOCK TABLE setup_tokens IN SHARE ROW EXCLUSIVE MODE").execute(&mut *tx).await?;
    if any_account(&mut tx).await? {
        private_file::remove(file)?;
        return Ok(None);
    }
    if !is_waiting(&mut tx, file).await? {
        make_token(&mut tx, file).await?;
    }
    tx.commit().await?;
    Ok(Some(file.to_owned()))
}

/// Whether the token in the file is the one that is open.
async fn is_waiting(connection: &mut PgConnection, file: &Path) -> Result<bool, SetupError> {
    let Some(content) = private_file::read(file)? else { return Ok(false) };
    let text = std::str::from_utf8(&content).unwrap_or_default();
    let open = sqlx::query_scalar!(
        r#"SELECT EXISTS (SELECT 1 FROM setup_tokens WHERE token_hash = $1 AND used_at IS NULL) AS "open!""#,
        &token::hash(text.trim()),
    )
    .fetch_one(connection)
    .await?;
    Ok(open)
}

/// File before commit: a crash between the two leaves a file that the next start finds not to be the open one.
async fn make_token(connection: &mut PgConnection, file: &Path) -> Result<(), SetupError> {
    let token = token::new_random_token(token::SETUP_PREFIX);
    sqlx::query!("DELETE FROM setup_tokens WHERE used_at IS NULL").execute(&mut *connection).await?;
    sqlx::query!("INSERT INTO setup_tokens (token_hash) VALUES ($1)", &token::hash(token.expose()))
        .execute(connection)
        .await?;
    private_file::write(file, format!("{}\n", token.expose()).as_bytes())?;
    Ok(())
}

async fn any_account(connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(r#"SELECT EXISTS (SELECT 1 FROM accounts) AS "any!""#).fetch_one(connection).await
}

/// Whether a token waits to be used.
pub(super) async fn is_open(pool: &PgPool) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"SELECT (EXISTS (SELECT 1 FROM setup_tokens WHERE used_at IS NULL)
                   AND NOT EXISTS (SELECT 1 FROM accounts)) AS "open!""#
    )
    .fetch_one(pool)
    .await
}

/// Makes the first account, an operator, and burns the token in the same transaction: of two at once one wins.
///
/// # Errors
/// `forbidden` for a wrong token, `already_used` (410) for a used one, `bad_request` for the address or password.
pub(super) async fn create_first(
    identity: &Identity,
    setup_token: &Secret,
    email: &str,
    password: &Secret,
) -> Result<Account, Failure> {
    // No limit of tries, which strangers could use up: the token cannot be guessed. Before the expensive hash, and before the address and the password are judged for just anyone.
    let token_hash = token::hash(setup_token.expose().trim());
    check(identity.db.pool(), &token_hash).await?;
    let new = NewAccount {
        email: email.parse::<Email>().map_err(bad_request)?,
        password: password.expose().parse::<Password>().map_err(bad_request)?,
        name: None,
        role: Role::Operator,
    };
    let hashed = HashedAccount::new(new).await.map_err(|error| Failure::internal(&error))?;
    let mut tx = identity.db.begin().await?;
    let burnt = sqlx::query!(
        "UPDATE setup_tokens SET used_at = now() WHERE token_hash = $1 AND used_at IS NULL
         AND NOT EXISTS (SELECT 1 FROM accounts)",
        &token_hash,
    )
    .execute(&mut *tx)
    .await?;
    if burnt.rows_affected() == 0 {
        return Err(already_set_up());
    }
    let account = hashed.insert(&mut tx).await?;
    tx.commit().await?;
    tracing::info!(account.id = %account.id, "the first account was made");
    if let Err(error) = private_file::remove(&identity.setup_token_file) {
        tracing::warn!(%error, "the used setup token stays in its file; it opens nothing any more");
    }
    Ok(account)
}

async fn check(pool: &PgPool, token_hash: &[u8; 32]) -> Result<(), Failure> {
    let used = sqlx::query_scalar!(
        r#"SELECT (used_at IS NOT NULL OR EXISTS (SELECT 1 FROM accounts)) AS "used!"
           FROM setup_tokens WHERE token_hash = $1"#,
        token_hash,
    )
    .fetch_optional(pool)
    .await?;
    match used {
        Some(false) => Ok(()),
        Some(true) => Err(already_set_up()),
        None => Err(Failure::new(ErrorCode::Forbidden, "this is not the setup token of this installation")
            .hint("the first start of management-api wrote it into the file setup-token in the data directory")),
    }
}

fn already_set_up() -> Failure {
    Failure::new(ErrorCode::AlreadyUsed, "this installation has its first account already")
        .hint("sign in with its e-mail address and password")
}

#[allow(clippy::needless_pass_by_value, reason = "used as map_err(bad_request)")]
fn bad_request(error: impl ToString) -> Failure {
    Failure::new(ErrorCode::BadRequest, error.to_string())
}
