//! A tenant's secrets: generated once, sealed in the database, opened only to start an instance.

use crate::seal::Sealer;
use sqlx::PgTransaction;
use std::collections::BTreeMap;
use systemprompt_contract::{ApiError, ErrorCode, Secret, TenantId, token};
use systemprompt_workflow::StepError;

/// Password of the tenant's database role; never handed to the instance by this name.
pub(crate) const DATABASE_PASSWORD: &str = "DATABASE_PASSWORD";
/// Key the tenant signs its own sessions with.
pub(crate) const JWT_SECRET: &str = "JWT_SECRET";
/// Token of the tenant's sync endpoint.
pub(crate) const SYNC_TOKEN: &str = "SYNC_TOKEN";

/// Why secrets could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SecretsError {
    #[error("reading or writing sealed secrets")]
    Database(#[from] sqlx::Error),
    #[error("the secret {0} cannot be opened; was keys/seal.key replaced?")]
    Sealed(String),
}

impl From<SecretsError> for StepError {
    fn from(error: SecretsError) -> Self {
        match error {
            SecretsError::Database(error) => error.into(),
            SecretsError::Sealed(_) => Self::Permanent(ApiError::new(ErrorCode::Internal, error.to_string())),
        }
    }
}

/// Makes the secrets that every tenant has, keeping those that exist: a repeat changes nothing.
///
/// # Errors
/// Those of the database.
pub(crate) async fn generate(tx: &mut PgTransaction<'_>, seal: &Sealer, tenant: TenantId) -> Result<(), SecretsError> {
    let generated = [
        (DATABASE_PASSWORD, Secret::new(token::random_text())),
        (JWT_SECRET, Secret::new(format!("{}{}", token::random_text(), token::random_text()))),
        (SYNC_TOKEN, token::new_random_token(token::SYNC_PREFIX)),
    ];
    for (name, value) in generated {
        let sealed = seal.seal(&context(tenant, name), value.expose().as_bytes());
        sqlx::query!(
            "INSERT INTO tenant_secrets (tenant_id, name, sealed) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
            tenant.uuid(),
            name,
            sealed,
        )
        .execute(&mut **tx)
        .await?;
    }
    Ok(())
}

/// All secrets of a tenant, opened.
///
/// # Errors
/// Those of the database, and [`SecretsError::Sealed`] when a value was sealed by another key.
pub(crate) async fn open_all(
    pool: &sqlx::PgPool,
    seal: &Sealer,
    tenant: TenantId,
) -> Result<BTreeMap<String, Secret>, SecretsError> {
    let rows = sqlx::query!("SELECT name, sealed FROM tenant_secrets WHERE tenant_id = $1", tenant.uuid())
        .fetch_all(pool)
        .await?;
    rows.into_iter()
        .map(|row| {
            let sealed = || SecretsError::Sealed(row.name.clone());
            let plain = seal.open(&context(tenant, &row.name), &row.sealed).map_err(|_| sealed())?;
            let text = std::str::from_utf8(&plain).map_err(|_| sealed())?;
            let secret = Secret::new(text);
            Ok((row.name, secret))
        })
        .collect()
}

/// Binds a sealed value to its tenant and name, so that rows cannot be swapped.
fn context(tenant: TenantId, name: &str) -> String {
    format!("tenant_secret/{tenant}/{name}")
}
