//! Rows of checkouts.

use sqlx::{PgConnection, PgPool};
use systemprompt_contract::{AccountId, CheckoutId, CheckoutState, Plan, Region, TenantId, TenantName};

/// A checkout to be stored.
pub(super) struct NewCheckout<'a> {
    pub(super) account: AccountId,
    pub(super) plan: &'a Plan,
    pub(super) region: Region,
    pub(super) tenant_name: &'a TenantName,
    pub(super) redirect_uri: Option<&'a str>,
    pub(super) idempotency: Option<Idempotency<'a>>,
}

/// The caller's key, and what was asked under it.
#[derive(Clone, Copy)]
pub(super) struct Idempotency<'a> {
    pub(super) key: &'a str,
    pub(super) request_hash: [u8; 32],
}

/// What storing it came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// A new one, or the one that the same request made before.
    As(CheckoutId),
    /// The key belongs to another request.
    KeyTaken,
}

/// A size that does not fit its column; plans are checked against it.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error("plan {0}: memory and volume must fit 31 bits")]
    PlanSize(String),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Stores a checkout. Idempotent by its key, where it has one.
pub(super) async fn store(pool: &PgPool, new: &NewCheckout<'_>) -> Result<Stored, StoreError> {
    let id = CheckoutId::new();
    let size = |value| i32::try_from(value).map_err(|_| StoreError::PlanSize(new.plan.id.clone()));
    let inserted = sqlx::query!(
        "INSERT INTO checkouts (id, account_id, price_id, plan_name, memory_mb, volume_gb, region, tenant_name,
                                redirect_uri, idempotency_key, request_hash)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         ON CONFLICT (account_id, idempotency_key) DO NOTHING",
        id.uuid(),
        new.account.uuid(),
        new.plan.paddle_price_id,
        new.plan.name,
        size(new.plan.memory_mb_default)?,
        size(new.plan.volume_gb)?,
        new.region.as_str(),
        new.tenant_name.as_str(),
        new.redirect_uri,
        new.idempotency.map(|idempotency| idempotency.key),
        new.idempotency.as_ref().map(|idempotency| idempotency.request_hash.as_slice()),
    )
    .execute(pool)
    .await?;
    match new.idempotency {
        Some(idempotency) if inserted.rows_affected() == 0 => Ok(stored_before(pool, new.account, idempotency).await?),
        _ => Ok(Stored::As(id)),
    }
}

/// The conflicting insert has waited for the other transaction, so the row is there to be seen.
async fn stored_before(pool: &PgPool, account: AccountId, idempotency: Idempotency<'_>) -> Result<Stored, sqlx::Error> {
    let row = sqlx::query!(
        r#"SELECT id, request_hash = $3 AS "same!" FROM checkouts WHERE account_id = $1 AND idempotency_key = $2"#,
        account.uuid(),
        idempotency.key,
        idempotency.request_hash.as_slice(),
    )
    .fetch_one(pool)
    .await?;
    Ok(if row.same { Stored::As(CheckoutId::from_uuid(row.id)) } else { Stored::KeyTaken })
}

/// A stored checkout as its buyer and its page see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Checkout {
    pub(super) state: CheckoutState,
    pub(super) plan_name: String,
    pub(super) redirect_uri: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "checkout_status", rename_all = "lowercase")]
enum Status {
    Open,
    Confirmed,
}

impl Status {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Confirmed => "confirmed",
        }
    }
}

pub(super) async fn by_id(pool: &PgPool, id: CheckoutId) -> Result<Option<Checkout>, sqlx::Error> {
    let row = sqlx::query!(
        r#"SELECT status AS "status: Status", tenant_id, tenant_name, region, price_id, plan_name, redirect_uri
           FROM checkouts WHERE id = $1"#,
        id.uuid()
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| {
        let state = CheckoutState {
            checkout_session_id: id,
            status: row.status.as_str().to_owned(),
            tenant_id: row.tenant_id.map(TenantId::from_uuid),
            tenant_name: row.tenant_name,
            region: parsed(&row.region)?,
            price_id: row.price_id,
        };
        Ok(Checkout { state, plan_name: row.plan_name, redirect_uri: row.redirect_uri })
    })
    .transpose()
}

/// Whose checkout it is.
///
/// # Errors
/// Those of the database.
pub(crate) async fn buyer(pool: &PgPool, id: CheckoutId) -> Result<Option<AccountId>, sqlx::Error> {
    let account =
        sqlx::query_scalar!("SELECT account_id FROM checkouts WHERE id = $1", id.uuid()).fetch_optional(pool).await?;
    Ok(account.map(AccountId::from_uuid))
}

/// What a confirmed checkout is to become, from our own row and nothing that the confirmation said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) account: AccountId,
    pub(super) name: TenantName,
    pub(super) region: Region,
    pub(super) memory_mb: u32,
}

/// Marks an open checkout confirmed, to become `tenant`; none when there is no such checkout or it was confirmed.
pub(super) async fn confirm(
    connection: &mut PgConnection,
    id: CheckoutId,
    tenant: TenantId,
) -> Result<Option<Order>, sqlx::Error> {
    let row = sqlx::query!(
        "UPDATE checkouts SET status = 'confirmed', tenant_id = $2, confirmed_at = now()
         WHERE id = $1 AND status = 'open'
         RETURNING account_id, tenant_name, region, memory_mb",
        id.uuid(),
        tenant.uuid(),
    )
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        Ok(Order {
            account: AccountId::from_uuid(row.account_id),
            name: parsed(&row.tenant_name)?,
            region: parsed(&row.region)?,
            memory_mb: u32::try_from(row.memory_mb).map_err(decode)?,
        })
    })
    .transpose()
}

fn parsed<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(text: &str) -> Result<T, sqlx::Error> {
    text.parse().map_err(decode)
}

fn decode(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}
