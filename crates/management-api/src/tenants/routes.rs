//! Route rows. A change takes the next tick of `route_clock` in the caller's transaction, so generations
//! commit in order and a follower that has seen N has seen everything below N.

use sqlx::PgTransaction;
use std::time::Duration;
use systemprompt_contract::{Hostname, TenantId};
use systemprompt_edge::Route;

/// Channel on which followers wait.
pub(crate) const CHANNEL: &str = "systemprompt_routes";

/// Points `host` at `route`, or takes it away, and returns the generation that carries the change.
///
/// Idempotent: the same route again makes a new generation and changes nothing else.
///
/// # Errors
/// Those of the database.
pub(crate) async fn publish(
    tx: &mut PgTransaction<'_>,
    tenant: TenantId,
    host: &Hostname,
    route: Option<&Route>,
) -> Result<i64, sqlx::Error> {
    let target = route.map(|route| serde_json::to_value(route).expect("a route is plain data"));
    let generation = sqlx::query_scalar!("UPDATE route_clock SET generation = generation + 1 RETURNING generation")
        .fetch_one(&mut **tx)
        .await?;
    sqlx::query!(
        "INSERT INTO routes (host, tenant_id, target, generation) VALUES ($1, $2, $3, $4)
         ON CONFLICT (host) DO UPDATE
         SET tenant_id = excluded.tenant_id, target = excluded.target, generation = excluded.generation, changed_at = now()",
        host.as_str(),
        tenant.uuid(),
        target,
        generation,
    )
    .execute(&mut **tx)
    .await?;
    sqlx::query!("SELECT pg_notify($1, $2)", CHANNEL, generation.to_string()).execute(&mut **tx).await?;
    Ok(generation)
}

/// One changed host, as a follower reads it.
pub(crate) struct ChangedRoute {
    pub(crate) host: Hostname,
    pub(crate) route: Option<Route>,
    pub(crate) generation: i64,
}

/// Everything that changed after `generation`, oldest first.
///
/// # Errors
/// Those of the database. A row that does not parse is left out and logged: one bad row must not stop all routing.
pub(crate) async fn changed_since(pool: &sqlx::PgPool, generation: i64) -> Result<Vec<ChangedRoute>, sqlx::Error> {
    let rows = sqlx::query!(
        "SELECT host, target, generation FROM routes WHERE generation > $1 ORDER BY generation",
        generation
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .filter_map(|row| {
            let host = row.host.parse();
            let route = row.target.map(serde_json::from_value).transpose();
            match (host, route) {
                (Ok(host), Ok(route)) => Some(ChangedRoute { host, route, generation: row.generation }),
                (host, route) => {
                    tracing::error!(host = row.host, ?host, error = ?route.err(), "a route row does not parse and is not served");
                    None
                }
            }
        })
        .collect())
}

/// Waits until every edge that may still take requests serves `generation` and has let go of what it replaced, or is
/// taken for dead. Dropping the future ends the wait.
///
/// # Errors
/// Those of the database.
pub(crate) async fn wait_served(pool: &sqlx::PgPool, generation: i64) -> Result<(), sqlx::Error> {
    while !served_everywhere(pool, generation).await? {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// Waits like [`wait_served`] for the last change of any of a tenant's routes.
///
/// # Errors
/// Those of the database.
pub(crate) async fn wait_settled(pool: &sqlx::PgPool, tenant: TenantId) -> Result<(), sqlx::Error> {
    let query = sqlx::query_scalar!("SELECT max(generation) FROM routes WHERE tenant_id = $1", tenant.uuid());
    match query.fetch_one(pool).await? {
        Some(generation) => wait_served(pool, generation).await,
        None => Ok(()),
    }
}

async fn served_everywhere(pool: &sqlx::PgPool, generation: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"SELECT NOT EXISTS (
             SELECT 1 FROM edges WHERE generation < $1 AND seen_at > now() - make_interval(secs => $2)
           ) AS "served!""#,
        generation,
        EDGE_GONE_SECONDS,
    )
    .fetch_one(pool)
    .await
}

/// An edge that neither signed off nor gave a sign of life for so long is taken for dead and holds up no deploy. Twenty
/// times what lies between two signs: an edge that is slow, or is restarted, keeps its say.
pub(crate) const EDGE_GONE_SECONDS: f64 = 60.0;
