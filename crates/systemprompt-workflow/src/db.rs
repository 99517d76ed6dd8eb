use sqlx::{
    PgPool, PgTransaction, Row as _,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::time::Duration;

/// How long a caller waits for a free connection before it is told that the database is busy or down.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(5);

/// The control plane's database: a pool whose connections never come back inside somebody else's transaction.
#[derive(Debug, Clone)]
pub struct Db(PgPool);

impl Db {
    /// Connects with bounded statements (30 s), lock waits (5 s) and idle transactions (15 s).
    ///
    /// # Errors
    /// The URL is not one, or the server does not answer.
    pub async fn connect(url: &str, max_connections: u32) -> Result<Self, sqlx::Error> {
        let options = url.parse::<PgConnectOptions>()?.application_name("systemprompt").options([
            ("statement_timeout", "30s"),
            ("lock_timeout", "5s"),
            ("idle_in_transaction_session_timeout", "15s"),
        ]);
        pool(max_connections).connect_with(options).await.map(Self)
    }

    /// Opens a transaction. Dropping the returned future is safe at any instant.
    ///
    /// sqlx 0.9.0 counts a transaction only after `BEGIN` was answered: a caller dropped while it waits gives the
    /// connection back inside an open transaction (transact-rs/sqlx 4385). So `BEGIN` runs in a task of its own,
    /// to the end; nobody may call `Pool::begin` elsewhere.
    ///
    /// # Errors
    /// No connection within five seconds, or the server refuses.
    pub async fn begin(&self) -> Result<PgTransaction<'static>, sqlx::Error> {
        let pool = self.0.clone();
        tokio::spawn(async move { pool.begin().await }).await.map_err(|_| sqlx::Error::WorkerCrashed)?
    }

    /// For queries that need no transaction.
    pub const fn pool(&self) -> &PgPool {
        &self.0
    }

    /// A few more connections with the same options, for what must go on when the pool is exhausted.
    pub(crate) fn side_pool(&self, max_connections: u32) -> PgPool {
        pool(max_connections).connect_lazy_with((*self.0.connect_options()).clone())
    }
}

fn pool(max_connections: u32) -> PgPoolOptions {
    PgPoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // In place of the ping, at the same price: it also finds a connection that is inside a transaction, where
        // `now()` stands still. Such a one is closed, never handed out. By the simple protocol: with the extended one
        // the two differ by some microseconds outside of transactions too.
        .test_before_acquire(false)
        .before_acquire(|connection, _| {
            Box::pin(async move {
                let row = sqlx::raw_sql("SELECT now() = statement_timestamp()").fetch_one(connection).await?;
                let outside: bool = row.try_get(0)?;
                if !outside {
                    tracing::error!("a pooled connection was inside a transaction; closed it");
                }
                Ok(outside)
            })
        })
}
