//! The tenant's database: a small pool, a first answer before anything listens, and the check of the health page.

use sqlx::{
    Row as _,
    postgres::{PgConnectOptions, PgPool, PgPoolOptions},
};
use std::{str::FromStr as _, time::Duration};
use systemprompt_contract::Secret;
use tokio::time::Instant;

/// Enough for a site; the role's connection limit is shared by the old and the new instance during a deploy.
const MAX_CONNECTIONS: u32 = 4;
const ACQUIRE_WITHIN: Duration = Duration::from_secs(3);
/// How long a database may take to come up before the start is given up.
const FIRST_ANSWER_WITHIN: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The database did not answer; the text never carries the URL.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// The URL cannot be read.
    #[error("DATABASE_URL must be a postgres:// URL")]
    Url,
    /// It answered, and waiting will not change the answer.
    #[error("the database refused the connection; check the role, the password and the database of DATABASE_URL")]
    Refused(#[source] sqlx::Error),
    /// No answer within the time given.
    #[error("the database did not answer within {} ms", within.as_millis())]
    Silent {
        /// How long it was given.
        within: Duration,
        /// The last failure, when there was one.
        #[source]
        source: Option<sqlx::Error>,
    },
}

/// A pool that has answered at least once.
#[derive(Debug, Clone)]
pub(crate) struct Database {
    pool: PgPool,
}

pub(crate) fn is_valid_url(url: &str) -> bool {
    let scheme = url.starts_with("postgres://") || url.starts_with("postgresql://");
    scheme && PgConnectOptions::from_str(url).is_ok()
}

impl Database {
    /// Connects and waits until the database answers once, with growing pauses, for at most 30 seconds.
    pub(crate) async fn connect(url: &Secret) -> Result<Self, DatabaseError> {
        Self::connect_within(url, FIRST_ANSWER_WITHIN).await
    }

    async fn connect_within(url: &Secret, within: Duration) -> Result<Self, DatabaseError> {
        let options = PgConnectOptions::from_str(url.expose()).map_err(|_| DatabaseError::Url)?;
        let pool = PgPoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(ACQUIRE_WITHIN)
            .connect_lazy_with(options.application_name("systemprompt"));
        let database = Self { pool };
        let deadline = Instant::now() + within;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match database.name().await {
                Ok(name) => {
                    tracing::info!(database.name = name, "the database answers");
                    return Ok(database);
                }
                Err(error) if is_final(&error) => return Err(DatabaseError::Refused(error)),
                Err(error) => error,
            };
            if Instant::now() + pause >= deadline {
                return Err(DatabaseError::Silent { within, source: Some(error) });
            }
            tracing::debug!(error = %error, "the database does not answer yet");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// `current_database()`, asked now.
    pub(crate) async fn check(&self, within: Duration) -> Result<String, DatabaseError> {
        match tokio::time::timeout(within, self.name()).await {
            Ok(Ok(name)) => Ok(name),
            Ok(Err(source)) => Err(DatabaseError::Silent { within, source: Some(source) }),
            Err(_) => Err(DatabaseError::Silent { within, source: None }),
        }
    }

    async fn name(&self) -> Result<String, sqlx::Error> {
        sqlx::query("SELECT current_database()::text").fetch_one(&self.pool).await?.try_get(0)
    }

    pub(crate) async fn close(&self) {
        self.pool.close().await;
    }
}

/// Wrong role, password or database: SQLSTATE classes 28 and 3D (PostgreSQL, appendix A). "Starting up" (57P03) and
/// "too many connections" (53300) pass by themselves.
fn is_final(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| code.starts_with("28") || code.starts_with("3D"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_database_that_is_not_there_ends_the_start_in_time() {
        let url = Secret::new("postgres://role:hunter2@localhost/x?host=/no/such/directory");
        let within = Duration::from_millis(200);
        let error = Database::connect_within(&url, within).await.expect_err("nothing there");
        assert!(matches!(error, DatabaseError::Silent { .. }), "{error:?}");
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    #[test]
    fn only_postgres_urls_are_valid() {
        assert!(is_valid_url("postgres://role:pw@localhost/sp_x?host=/run/postgresql"));
        assert!(is_valid_url("postgresql://role:pw@db:5432/sp_x"));
        for bad in ["", "mysql://x", "postgres:", "http://localhost/x", "postgres://[::1"] {
            assert!(!is_valid_url(bad), "{bad}");
        }
    }
}
