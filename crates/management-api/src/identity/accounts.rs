use super::{email::Email, password, password::Password};
use crate::http::error::Failure;
use sqlx::{PgConnection, PgPool};
use systemprompt_contract::{AccountId, ApiError, ErrorCode, MeUser};

/// What an account may do beyond its own things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "account_role", rename_all = "lowercase")]
pub(crate) enum Role {
    /// Runs the installation: sees and may do everything.
    Operator,
    /// Its own tenants and checkouts.
    Member,
}

impl Role {
    const fn word(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Member => "member",
        }
    }
}

/// An account as others may see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) id: AccountId,
    pub(crate) email: String,
    pub(crate) name: Option<String>,
    pub(crate) role: Role,
}

impl Account {
    pub(crate) fn into_user(self) -> MeUser {
        MeUser { id: self.id, email: self.email, name: self.name, role: Some(self.role.word().to_owned()) }
    }
}

/// An account to be made.
pub(crate) struct NewAccount {
    pub(crate) email: Email,
    pub(crate) password: Password,
    pub(crate) name: Option<String>,
    pub(crate) role: Role,
}

/// An account that could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AccountError {
    #[error("there is an account for {0} already: use another address, or sign in")]
    Taken(Email),
    #[error("the password could not be hashed")]
    Hashing(#[from] password::HashingError),
    #[error("the account could not be stored")]
    Database(#[from] sqlx::Error),
}

impl From<AccountError> for Failure {
    fn from(error: AccountError) -> Self {
        match error {
            AccountError::Taken(_) => Self(ApiError::new(ErrorCode::Conflict, error.to_string())),
            AccountError::Hashing(error) => Self::internal(&error),
            AccountError::Database(error) => error.into(),
        }
    }
}

/// Makes an account.
///
/// # Errors
/// When the address is taken; not idempotent.
pub(crate) async fn create_account(pool: &PgPool, new: NewAccount) -> Result<Account, AccountError> {
    let hashed = HashedAccount::new(new).await?;
    let mut connection = pool.acquire().await?;
    hashed.insert(&mut connection).await
}

/// An account whose password is hashed already, so that no transaction is open while that takes its time.
pub(super) struct HashedAccount {
    account: Account,
    email: Email,
    password_hash: String,
}

impl HashedAccount {
    pub(super) async fn new(new: NewAccount) -> Result<Self, password::HashingError> {
        let password_hash = password::hash(new.password).await?;
        let account = Account { id: AccountId::new(), email: new.email.to_string(), name: new.name, role: new.role };
        Ok(Self { account, email: new.email, password_hash })
    }

    pub(super) async fn insert(self, connection: &mut PgConnection) -> Result<Account, AccountError> {
        let Self { account, email, password_hash } = self;
        let inserted = sqlx::query!(
            "INSERT INTO accounts (id, email, name, role, password_hash) VALUES ($1, $2, $3, $4, $5)
             ON CONFLICT (email) DO NOTHING",
            account.id.uuid(),
            account.email,
            account.name,
            account.role as Role,
            password_hash,
        )
        .execute(connection)
        .await?;
        if inserted.rows_affected() == 1 { Ok(account) } else { Err(AccountError::Taken(email)) }
    }
}

/// The account behind an id.
pub(crate) async fn account_by_id(pool: &PgPool, id: AccountId) -> Result<Option<Account>, sqlx::Error> {
    let row = sqlx::query!(r#"SELECT email, name, role AS "role: Role" FROM accounts WHERE id = $1"#, id.uuid())
        .fetch_optional(pool)
        .await?;
    Ok(row.map(|row| Account { id, email: row.email, name: row.name, role: row.role }))
}

/// Who has run the installation for longest.
pub(super) async fn first_operator(pool: &PgPool) -> Result<Option<Account>, sqlx::Error> {
    let id = sqlx::query_scalar!("SELECT id FROM accounts WHERE role = 'operator' ORDER BY created_at, id LIMIT 1")
        .fetch_optional(pool)
        .await?;
    match id {
        Some(id) => account_by_id(pool, AccountId::from_uuid(id)).await,
        None => Ok(None),
    }
}

/// The account id and password hash of an address, for signing in.
pub(super) async fn credentials(pool: &PgPool, email: &Email) -> Result<Option<(AccountId, String)>, sqlx::Error> {
    let row = sqlx::query!("SELECT id, password_hash FROM accounts WHERE email = $1", email.as_str())
        .fetch_optional(pool)
        .await?;
    Ok(row.map(|row| (AccountId::from_uuid(row.id), row.password_hash)))
}
