//! Tenants' databases on the shared tenants' cluster: a role and a database of the same name each,
//! everything revoked from PUBLIC, SCRAM, a connection limit. `pg_hba.conf` (`sameuser`) refuses any other pair.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use sqlx::{AssertSqlSafe, Connection as _, Executor as _, PgConnection, PgPool};
use std::sync::Arc;
use systemprompt_contract::{DatabaseName, Secret};
use systemprompt_postgres::Cluster;

/// Where the cluster's socket directory appears inside every sandbox.
pub(crate) const SANDBOX_SOCKET_DIR: &str = "/run/postgresql";
/// Sessions one tenant may hold.
const CONNECTION_LIMIT: u32 = 20;

/// The tenants' cluster, as its superuser sees it.
#[derive(Debug, Clone)]
pub(crate) struct TenantDatabases {
    admin: PgPool,
    cluster: Arc<Cluster>,
}

impl TenantDatabases {
    pub(crate) fn new(admin: PgPool, cluster: Arc<Cluster>) -> Self {
        Self { admin, cluster }
    }

    /// Takes from PUBLIC what a new cluster gives it: `pg_hba.conf` refuses already, this refuses once more.
    ///
    /// # Errors
    /// Those of the cluster. Idempotent.
    pub(crate) async fn harden(&self) -> Result<(), sqlx::Error> {
        self.admin.execute("REVOKE ALL ON DATABASE postgres, template0, template1 FROM PUBLIC").await.map(drop)
    }

    /// Makes role and database, or mends what a crash left of them. Idempotent; the password is set anew each time.
    ///
    /// # Errors
    /// Those of the cluster; all are worth another try.
    pub(crate) async fn ensure(&self, name: &DatabaseName, password: &Secret) -> Result<(), sqlx::Error> {
        // The verifier, not the password: a failing statement may be logged by the server.
        let verifier = scram_verifier(password);
        let role_exists = sqlx::query_scalar::<_, bool>("SELECT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = $1)")
            .bind(name.as_str())
            .fetch_one(&self.admin)
            .await?;
        let verb = if role_exists { "ALTER" } else { "CREATE" };
        // `name` is `sp_` and 12 hex digits and the verifier is base64 and `$:`: neither can leave its quotes.
        self.admin
            .execute(AssertSqlSafe(format!(
                "{verb} ROLE {name} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS NOINHERIT
                 CONNECTION LIMIT {CONNECTION_LIMIT} PASSWORD '{verifier}'"
            )))
            .await?;
        systemprompt_workflow::crash_point("provision_tenant.database.after_role");
        if !self.exists(name).await? {
            self.admin
                .execute(AssertSqlSafe(format!("CREATE DATABASE {name} OWNER {name} TEMPLATE template0")))
                .await?;
        }
        systemprompt_workflow::crash_point("provision_tenant.database.after_create");
        self.admin.execute(AssertSqlSafe(format!("REVOKE ALL ON DATABASE {name} FROM PUBLIC"))).await?;
        let mut inside = PgConnection::connect(&self.cluster.url(name.as_str())).await?;
        inside
            .execute(AssertSqlSafe(format!(
                "REVOKE ALL ON SCHEMA public FROM PUBLIC; ALTER SCHEMA public OWNER TO {name}"
            )))
            .await?;
        inside.close().await
    }

    /// Whether [`Self::ensure`] came to its end: the last thing it changes is who owns the schema.
    ///
    /// # Errors
    /// Those of the cluster; all are worth another try.
    pub(crate) async fn is_complete(&self, name: &DatabaseName) -> Result<bool, sqlx::Error> {
        if !self.exists(name).await? {
            return Ok(false);
        }
        let mut inside = PgConnection::connect(&self.cluster.url(name.as_str())).await?;
        let owner = sqlx::query_scalar::<_, String>(
            "SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = 'public'",
        )
        .fetch_optional(&mut inside)
        .await?;
        inside.close().await?;
        Ok(owner.as_deref() == Some(name.as_str()))
    }

    /// Drops database and role, whatever is left of them. Idempotent.
    ///
    /// # Errors
    /// Those of the cluster; all are worth another try.
    pub(crate) async fn drop(&self, name: &DatabaseName) -> Result<(), sqlx::Error> {
        self.admin.execute(AssertSqlSafe(format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"))).await?;
        systemprompt_workflow::crash_point("databases.drop.after_database");
        self.admin.execute(AssertSqlSafe(format!("DROP ROLE IF EXISTS {name}"))).await?;
        Ok(())
    }

    /// Every tenant database and tenant role there is, for the search of orphans.
    ///
    /// # Errors
    /// Those of the cluster.
    pub(crate) async fn all(&self) -> Result<Vec<DatabaseName>, sqlx::Error> {
        let names = sqlx::query_scalar::<_, String>(
            "SELECT datname::text FROM pg_database WHERE datname LIKE 'sp\\_%'
             UNION SELECT rolname::text FROM pg_roles WHERE rolname LIKE 'sp\\_%'",
        )
        .fetch_all(&self.admin)
        .await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    async fn exists(&self, name: &DatabaseName) -> Result<bool, sqlx::Error> {
        sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM pg_database WHERE datname = $1)")
            .bind(name.as_str())
            .fetch_one(&self.admin)
            .await
    }
}

/// The URL an instance finds in `DATABASE_URL`: the socket bound into its sandbox.
pub(crate) fn instance_url(name: &DatabaseName, password: &Secret) -> Secret {
    // The password is base64url: nothing to escape.
    Secret::new(format!("postgres://{name}:{}@localhost/{name}?host={SANDBOX_SOCKET_DIR}", password.expose()))
}

/// What PostgreSQL stores of a password (RFC 5803, `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`).
fn scram_verifier(password: &Secret) -> String {
    let mut salt = [0; 16];
    getrandom::fill(&mut salt).expect("the operating system's random source answers");
    scram_verifier_with(password, &salt)
}

fn scram_verifier_with(password: &Secret, salt: &[u8; 16]) -> String {
    const ITERATIONS: u32 = 4096;
    // Hi() of RFC 5802: PBKDF2 with one block.
    let mut block = mac(password.expose().as_bytes(), &[salt.as_slice(), &1u32.to_be_bytes()].concat());
    let mut salted = block;
    for _ in 1..ITERATIONS {
        block = mac(password.expose().as_bytes(), &block);
        salted.iter_mut().zip(block).for_each(|(sum, byte)| *sum ^= byte);
    }
    let stored_key: [u8; 32] = Sha256::digest(mac(&salted, b"Client Key")).into();
    let server_key = mac(&salted, b"Server Key");
    format!(
        "SCRAM-SHA-256${ITERATIONS}:{}${}:{}",
        STANDARD.encode(salt),
        STANDARD.encode(stored_key),
        STANDARD.encode(server_key)
    )
}

fn mac(key: &[u8], message: &[u8]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifier_is_that_of_the_rfc() {
        // RFC 7677 section 3: user "user", password "pencil", salt W22ZaJ0SNY7soEsUEjb6gQ==, 4096 iterations.
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("base64").try_into().expect("16 bytes");
        assert_eq!(
            scram_verifier_with(&Secret::new("pencil"), &salt),
            "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
        );
    }
}
