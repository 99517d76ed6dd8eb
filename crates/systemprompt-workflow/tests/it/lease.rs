//! One worker at a time, and a worker that has lost its lease writes nothing.

use crate::lab::{Build, Lab, Site, Worker, config, is, wait_until};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use systemprompt_contract::{OperationId, OperationStatus};
use systemprompt_workflow::StepError;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn racing_workers_run_every_step_once() {
    let lab = Lab::new().await;
    let site = Site::quiet(&lab.db);
    let workers: Vec<_> =
        ["a", "b", "c"].map(|id| Worker::start_with::<Build>(&lab.db, site.clone(), config(id))).into_iter().collect();
    let ids = futures_util::future::join_all((0..40).map(|_| lab.enqueue(&Build {}))).await;
    for id in &ids {
        assert_eq!(lab.until_over(*id).await.status, OperationStatus::Succeeded);
    }
    assert_eq!(site.calls().len(), ids.len() * 4);
    let fences: Vec<i64> =
        sqlx::query_scalar("SELECT DISTINCT fence FROM operations").fetch_all(lab.db.pool()).await.unwrap();
    assert_eq!(fences, [1], "each was claimed once");
    for worker in workers {
        worker.stop().await;
    }
}

/// Ages a lease as if its time were up.
async fn expire(lab: &Lab, id: OperationId) {
    sqlx::query("UPDATE operations SET lease_until = clock_timestamp() WHERE id = $1 AND worker IS NOT NULL")
        .bind(id.uuid())
        .execute(lab.db.pool())
        .await
        .unwrap();
}

/// Blocks `act {step}` of the first worker until it is let go.
fn blocking_site(lab: &Lab, step: &'static str) -> (Site, Arc<tokio::sync::Notify>, Arc<AtomicBool>) {
    let (go, came_back) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicBool::new(false)));
    let (wait, flag) = (go.clone(), came_back.clone());
    let site = Site::hooked(&lab.db, move |call| {
        let (wait, flag) = (wait.clone(), flag.clone());
        async move {
            if call.what == step {
                wait.notified().await;
                flag.store(true, Ordering::SeqCst);
            }
            Ok::<_, StepError>(())
        }
    });
    (site, go, came_back)
}

#[tokio::test]
async fn what_a_worker_did_after_it_lost_its_lease_is_not_committed() {
    let lab = Lab::new().await;
    let (site, go, came_back) = blocking_site(&lab, "act three");
    // It never beats and believes in its lease for an hour: only the fence stands between it and the journal.
    let mut deaf = config("deaf");
    (deaf.lease, deaf.heartbeat) = (Duration::from_hours(1), Duration::from_hours(1));
    let _deaf = Worker::start_with::<Build>(&lab.db, site.clone(), deaf);
    let id = lab.enqueue(&Build {}).await;
    wait_until("it is inside step three", async || site.calls().contains(&"act three".to_owned())).await;
    expire(&lab, id).await;

    // The second worker claims it and stops in the step behind, so that there is still something to spoil. It
    // cannot insert its own row of step three before the deaf one's transaction has ended.
    let (second_site, second_go, _) = blocking_site(&lab, "act four");
    let worker = Worker::start_with::<Build>(&lab.db, second_site.clone(), config("second"));
    wait_until("the second has claimed it", async || {
        lab.journal(id).await == ["one done 0", "two done 0", "three started 2"]
    })
    .await;
    go.notify_one();
    wait_until("the deaf one comes back", async || came_back.load(Ordering::SeqCst)).await;
    wait_until("the second is at step four", async || second_site.calls().contains(&"act four".to_owned())).await;
    let fence: i64 = sqlx::query_scalar("SELECT fence FROM operations WHERE id = $1")
        .bind(id.uuid())
        .fetch_one(lab.db.pool())
        .await
        .unwrap();
    assert!(fence > 1);
    second_go.notify_one();
    assert_eq!(lab.until_over(id).await.status, OperationStatus::Succeeded);
    worker.stop().await;
    assert_eq!(lab.effects(id).await, ["one", "three", "two"]);
}

#[tokio::test]
async fn a_stolen_lease_ends_the_step_at_the_next_heartbeat() {
    let lab = Lab::new().await;
    let (site, _go, came_back) = blocking_site(&lab, "act two");
    let _first = Worker::start_with::<Build>(&lab.db, site.clone(), config("first"));
    let id = lab.enqueue(&Build {}).await;
    wait_until("it is inside step two", async || site.calls().contains(&"act two".to_owned())).await;
    // Somebody else claims it, and holds it.
    sqlx::query("UPDATE operations SET fence = fence + 1, worker = 'thief', lease_until = now() + interval '1 hour' WHERE id = $1")
        .bind(id.uuid())
        .execute(lab.db.pool())
        .await
        .unwrap();
    // The step's future is dropped, and with it the hook's share of the flag.
    wait_until("the step is dropped", async || Arc::strong_count(&came_back) == 2).await;
    assert_eq!(lab.journal(id).await, ["one done 0", "two started 1"]);
    assert_eq!(lab.view(id).await.status, OperationStatus::Running);
}

#[tokio::test]
async fn a_worker_that_cannot_beat_gives_up_when_its_lease_ends() {
    let lab = Lab::new().await;
    let (site, _go, came_back) = blocking_site(&lab, "act two");
    let mut mute = config("mute");
    (mute.lease, mute.heartbeat, mute.concurrency) = (Duration::from_millis(400), Duration::from_hours(1), 1);
    let _mute = Worker::start_with::<Build>(&lab.db, site.clone(), mute);
    let id = lab.enqueue(&Build {}).await;
    wait_until("it is inside step two", async || site.calls().contains(&"act two".to_owned())).await;
    // It runs the operation again and again, never twice at once: each attempt is dropped before the next.
    wait_until("the third attempt", async || {
        assert!(Arc::strong_count(&came_back) <= 3, "two attempts at once");
        lab.journal(id).await == ["one done 0", "two started 3"]
    })
    .await;
}

#[tokio::test]
async fn heartbeats_keep_a_long_step_alone() {
    let lab = Lab::new().await;
    let (site, go, _) = blocking_site(&lab, "act two");
    let mut short = config("short");
    (short.lease, short.heartbeat) = (Duration::from_millis(600), Duration::from_millis(100));
    let _one = Worker::start_with::<Build>(&lab.db, site.clone(), short.clone());
    let _two = Worker::start_with::<Build>(&lab.db, site.clone(), short);
    let id = lab.enqueue(&Build {}).await;
    wait_until("it is inside step two", async || site.calls().contains(&"act two".to_owned())).await;
    let long_after = "SELECT lease_until > created_at + interval '2.5 s' FROM operations WHERE id = $1";
    wait_until("four leases have passed", async || {
        sqlx::query_scalar(long_after).bind(id.uuid()).fetch_one(lab.db.pool()).await.unwrap()
    })
    .await;
    go.notify_one();
    lab.until(id, is(OperationStatus::Succeeded)).await;
    assert_eq!(site.calls(), ["act one", "act two", "act three", "act four"]);
}

#[tokio::test]
async fn a_stopping_worker_hands_over_between_steps_at_once() {
    let lab = Lab::new().await;
    let (site, go, _) = blocking_site(&lab, "act two");
    let mut patient = config("first");
    patient.lease = Duration::from_hours(1);
    let first = Worker::start_with::<Build>(&lab.db, site.clone(), patient);
    let id = lab.enqueue(&Build {}).await;
    wait_until("it is inside step two", async || site.calls().contains(&"act two".to_owned())).await;
    let stopping = tokio::spawn(first.stop());
    go.notify_one();
    stopping.await.unwrap();
    assert_eq!(site.calls(), ["act one", "act two"]);
    assert_eq!(lab.journal(id).await, ["one done 0", "two done 0"]);
    let second = Site::quiet(&lab.db);
    let _second = Worker::start_with::<Build>(&lab.db, second.clone(), config("second"));
    lab.until(id, is(OperationStatus::Succeeded)).await;
    assert_eq!(second.calls(), ["act three", "act four"]);
}
