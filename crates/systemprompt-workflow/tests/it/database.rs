//! The database dies, and callers walk away.

use crate::lab::{Build, Lab, Site, Worker, is, wait_until};
use futures_util::FutureExt;
use systemprompt_contract::OperationStatus;
use systemprompt_workflow::Db;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn operations_come_through_deaths_of_postgresql() {
    let lab = Lab::new().await;
    let site = Site::quiet(&lab.db);
    let _one = Worker::start_with::<Build>(&lab.db, site.clone(), crate::lab::config("one"));
    let _two = Worker::start_with::<Build>(&lab.db, site.clone(), crate::lab::config("two"));
    let mut ids = Vec::new();
    for _ in 0..3 {
        for _ in 0..10 {
            ids.push(lab.enqueue(&Build {}).await);
        }
        let first = *ids.last().unwrap();
        lab.until(first, |view| view.status != OperationStatus::Queued).await;
        lab.cluster.kill().await;
        lab.cluster.start_again().await;
        wait_until("the pool is back", async || sqlx::query("SELECT 1").execute(lab.db.pool()).await.is_ok()).await;
    }
    for id in ids {
        lab.until(id, is(OperationStatus::Succeeded)).await;
        assert_eq!(lab.effects(id).await, ["one", "three", "two"]);
    }
}

async fn backend(db: &Db) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(db.pool()).await.unwrap()
}

/// What `Db::begin` is for: with the pool's own `begin` the connection would be left inside a transaction, which the
/// pool notices, and another one would take its place.
#[tokio::test]
async fn a_dropped_begin_does_not_poison_the_pool() {
    let lab = Lab::new().await;
    let one = Db::connect(&lab.url, 1).await.unwrap();
    let before = backend(&one).await;
    for turns in 0..60 {
        // Dropped at every stage of its way.
        let mut begin = Box::pin(one.begin());
        for _ in 0..turns {
            if begin.as_mut().now_or_never().is_some() {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(begin);
        // Written outside of a transaction is visible to others at once.
        sqlx::query("INSERT INTO effects VALUES (gen_random_uuid(), 'seen')").execute(one.pool()).await.unwrap();
        let seen: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(lab.db.pool()).await.unwrap();
        assert_eq!(seen, i64::from(turns) + 1);
    }
    assert_eq!(backend(&one).await, before, "the connection had to be thrown away");
}

/// The second fence: whatever opened the transaction, nobody else gets the connection.
#[tokio::test]
async fn a_connection_inside_a_transaction_is_not_handed_out() {
    let lab = Lab::new().await;
    let one = Db::connect(&lab.url, 1).await.unwrap();
    let before = backend(&one).await;
    assert_eq!(backend(&one).await, before);
    sqlx::query("BEGIN").execute(one.pool()).await.unwrap();
    assert_ne!(backend(&one).await, before);
}

#[tokio::test]
async fn waiting_and_idling_have_their_limits() {
    let lab = Lab::new().await;
    for (setting, expected) in
        [("statement_timeout", "30s"), ("lock_timeout", "5s"), ("idle_in_transaction_session_timeout", "15s")]
    {
        let value: String =
            sqlx::query_scalar("SELECT current_setting($1)").bind(setting).fetch_one(lab.db.pool()).await.unwrap();
        assert_eq!(value, expected, "{setting}");
    }
}
