//! The tenant's server inside the image: the static site of `WEB_DIR/dist` and the health of the tenant's database.
//!
//! The order of a start is the promise the platform's probe relies on: configuration is read and reported as a
//! whole, the database answers once, only then the listener exists. A connection that is refused therefore means
//! "not ready", and the first answer is already a true one.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let config = systemprompt_runtime::RuntimeConfig::from_env()?;
//! systemprompt_runtime::serve(config, tokio_util::sync::CancellationToken::new()).await?;
//! # Ok(()) }
//! ```

mod answer;
mod config;
mod database;
mod health;
mod server;
mod site;

pub use config::{ConfigError, RuntimeConfig, RuntimeDefaults};
pub use database::DatabaseError;
pub use server::{RuntimeError, serve, serve_on};

/// Sends the log to standard error, one JSON object a line; `RUST_LOG` chooses what (default `info`).
///
/// Call it once, from `main`; a second call changes nothing.
pub fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let subscriber =
        tracing_subscriber::fmt().json().flatten_event(true).with_writer(std::io::stderr).with_env_filter(filter);
    if subscriber.try_init().is_err() {
        tracing::debug!("a log was set up before");
    }
}
