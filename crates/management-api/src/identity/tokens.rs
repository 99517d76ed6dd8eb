use super::accounts::{Account, Role};
use chrono::{DateTime, DurationRound as _, TimeDelta, Utc};
use sqlx::{PgConnection, PgPool};
use systemprompt_contract::{AccountId, Secret, SignedIn, token};
use uuid::Uuid;

/// One API token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenId(Uuid);

impl TokenId {
    pub(super) const fn uuid(self) -> Uuid {
        self.0
    }
}

/// Who a request comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Principal {
    pub(crate) account: AccountId,
    pub(crate) role: Role,
    /// The token it came with.
    pub(crate) token: TokenId,
}

impl Principal {
    pub(crate) fn is_operator(&self) -> bool {
        self.role == Role::Operator
    }
}

/// Who the token belongs to, if it is one of ours that has not ended and was not revoked.
///
/// The checksum spares the database texts that cannot be tokens; it proves nothing. The look-up is by SHA-256, so
/// its time tells nothing about the bytes of any stored token.
pub(super) async fn authenticate(pool: &PgPool, bearer: &str) -> Result<Option<Principal>, sqlx::Error> {
    if !bearer.starts_with(token::API_PREFIX) || token::verify_checksum(bearer).is_none() {
        return Ok(None);
    }
    let row = sqlx::query!(
        r#"SELECT t.id, t.account_id, a.role AS "role: Role",
                  (t.last_used_at IS NULL OR t.last_used_at < now() - interval '1 minute') AS "note_use!"
           FROM api_tokens t JOIN accounts a ON a.id = t.account_id
           WHERE t.token_hash = $1 AND t.revoked_at IS NULL AND t.expires_at > now()"#,
        &token::hash(bearer),
    )
    .fetch_optional(pool)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.note_use {
        note_use(pool, row.id).await?;
    }
    Ok(Some(Principal { account: AccountId::from_uuid(row.account_id), role: row.role, token: TokenId(row.id) }))
}

/// The condition is repeated here, so that requests at the same moment write once.
async fn note_use(pool: &PgPool, id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "UPDATE api_tokens SET last_used_at = now()
         WHERE id = $1 AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute')",
        id
    )
    .execute(pool)
    .await
    .map(drop)
}

/// A new API token of `account`, 90 days long; shown this once.
///
/// # Errors
/// Those of the database.
pub(crate) async fn issue_token(
    connection: &mut PgConnection,
    account: AccountId,
    label: &str,
) -> Result<(Secret, TokenId, DateTime<Utc>), sqlx::Error> {
    let expires_at = Utc::now() + TimeDelta::days(LIFETIME_DAYS);
    let expires_at = expires_at.duration_trunc(TimeDelta::seconds(1)).unwrap_or(expires_at);
    let secret = token::new_api_token(expires_at.timestamp());
    let id = TokenId(Uuid::new_v4());
    sqlx::query!(
        "INSERT INTO api_tokens (id, account_id, token_hash, label, expires_at) VALUES ($1, $2, $3, $4, $5)",
        id.0,
        account.uuid(),
        &token::hash(secret.expose()),
        label,
        expires_at,
    )
    .execute(connection)
    .await?;
    Ok((secret, id, expires_at))
}

/// A new token and whose it is, as the sign-in calls answer it.
pub(super) async fn sign_in(pool: &PgPool, account: Account, label: &str) -> Result<SignedIn, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    let (access_token, _, expires_at) = issue_token(&mut connection, account.id, label).await?;
    Ok(SignedIn { access_token, expires_at, user: account.into_user() })
}

/// Ends a token now; a second time changes nothing.
pub(super) async fn revoke(pool: &PgPool, id: TokenId) -> Result<(), sqlx::Error> {
    sqlx::query!("UPDATE api_tokens SET revoked_at = now() WHERE id = $1 AND revoked_at IS NULL", id.0)
        .execute(pool)
        .await
        .map(drop)
}

const LIFETIME_DAYS: i64 = 90;
