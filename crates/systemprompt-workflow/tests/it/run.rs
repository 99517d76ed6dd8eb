//! Forward, back, retried, cancelled, parked.

use crate::lab::{Build, Built, FAST, Lab, Site, Worker, is, message, outside, permanent, subject, wait_until};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use systemprompt_contract::{ErrorCode, EventId, OperationStatus};
use systemprompt_workflow::{
    CancelOutcome, Step, StepError, Workflow, active_for, events::read_after, give_up_stuck, request_cancel,
    retry_stuck, stuck,
};

async fn messages(lab: &Lab) -> Vec<String> {
    let events = read_after(&lab.db, subject(), EventId(0), 100).await.unwrap();
    events.iter().filter_map(|(_, event)| event.as_ref()).map(message).collect()
}

#[tokio::test]
async fn steps_run_in_order_and_hand_over_their_state() {
    let lab = Lab::new().await;
    let site = Site::quiet(&lab.db);
    let id = lab.enqueue(&Build {}).await;
    assert_eq!(lab.view(id).await.status, OperationStatus::Queued);
    assert_eq!(active_for(lab.db.pool(), subject()).await.unwrap(), [id]);
    let worker = Worker::start::<Build>(&lab.db, site.clone());
    let view = lab.until_over(id).await;
    assert_eq!(
        (view.status, view.kind.as_str(), view.step.as_deref()),
        (OperationStatus::Succeeded, "build", Some("four"))
    );
    assert!(view.finished_at.is_some() && view.error.is_none());
    assert_eq!(site.calls(), ["act one", "act two", "act three", "act four"]);
    assert_eq!(lab.effects(id).await, ["one", "three", "two"]);
    assert_eq!(messages(&lab).await, ["three is made", "all is made"]);
    assert_eq!(lab.journal(id).await, ["one done 0", "two done 0", "three done 0", "four done 0"]);
    assert!(active_for(lab.db.pool(), subject()).await.unwrap().is_empty());
    worker.stop().await;
}

#[tokio::test]
async fn an_enqueued_operation_wakes_a_sleeping_worker() {
    let lab = Lab::new().await;
    let mut config = crate::lab::config("sleeper");
    config.poll = Duration::from_hours(1);
    let _worker = Worker::start_with::<Build>(&lab.db, Site::quiet(&lab.db), config);
    // Two, one after the other: the first may be found by the look at the start.
    for _ in 0..2 {
        let id = lab.enqueue(&Build {}).await;
        lab.until(id, is(OperationStatus::Succeeded)).await;
    }
}

#[tokio::test]
async fn a_permanent_error_unwinds_in_reverse_the_failing_step_included() {
    let lab = Lab::new().await;
    let site = Site::hooked(&lab.db, async |call| match call.what.as_str() {
        "act four" => Err(permanent("it is broken")),
        _ => Ok(()),
    });
    let id = lab.enqueue(&Build {}).await;
    let worker = Worker::start::<Build>(&lab.db, site.clone());
    let view = lab.until_over(id).await;
    assert_eq!(view.status, OperationStatus::Failed);
    let error = view.error.unwrap();
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::AppUnhealthy, "it is broken"));
    assert_eq!(site.calls(), ["act one", "act two", "act three", "act four", "undo three", "undo two", "undo one"]);
    assert!(lab.effects(id).await.is_empty());
    assert_eq!(messages(&lab).await, ["three is made", "three is gone"]);
    worker.stop().await;

    // A step that failed itself is undone too: what it did is unknown.
    let site = Site::hooked(&lab.db, async |call| match call.what.as_str() {
        "act two" => Err(permanent("it is broken")),
        _ => Ok(()),
    });
    let id = lab.enqueue(&Build {}).await;
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    lab.until(id, is(OperationStatus::Failed)).await;
    assert_eq!(site.calls(), ["act one", "act two", "undo two", "undo one"]);
}

#[tokio::test]
async fn a_transient_error_is_tried_again_after_growing_pauses() {
    let lab = Lab::new().await;
    let times = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = times.clone();
    let site = Site::hooked(&lab.db, move |call| {
        let seen = seen.clone();
        async move {
            if call.what == "act one" {
                seen.lock().unwrap().push((Instant::now(), call.attempt));
            }
            match (call.what.as_str(), call.attempt) {
                ("act one" | "probe two", 3) | ("undo one" | "undo two", _) => Ok(()),
                _ => Err(StepError::Transient("not now".to_owned())),
            }
        }
    });
    let id = lab.enqueue(&Build {}).await;
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    let view = lab.until_over(id).await;
    // Step two is acted once, then probed, then probed and acted.
    assert_eq!(view.status, OperationStatus::Failed, "{:?}", site.calls());
    let error = view.error.unwrap();
    assert_eq!(error.code, ErrorCode::Unavailable);
    assert_eq!(error.message, "step two still failed after 3 attempts", "the reason is for operators");
    let times = times.lock().unwrap();
    assert_eq!(times.iter().map(|(_, attempt)| *attempt).collect::<Vec<_>>(), [1, 2, 3]);
    assert!(times[1].0 - times[0].0 >= FAST.first, "{times:?}");
    assert!(times[2].0 - times[1].0 >= FAST.first * 2, "{times:?}");
    let two: Vec<_> = site.calls().into_iter().filter(|call| call.ends_with("two")).collect();
    assert_eq!(two, ["act two", "probe two", "probe two", "act two", "undo two"]);
}

#[tokio::test]
async fn a_probe_that_finds_the_effect_saves_the_act() {
    let lab = Lab::new().await;
    let pool = lab.db.pool().clone();
    let site = Site::hooked(&lab.db, move |call| {
        let pool = pool.clone();
        async move {
            if call.what == "act two" {
                // It took effect, but the answer was lost.
                sqlx::query(crate::lab::MAKE).bind(call.operation.uuid()).bind("two").execute(&pool).await?;
                return Err(StepError::Transient("the answer was lost".to_owned()));
            }
            Ok(())
        }
    });
    let id = lab.enqueue(&Build {}).await;
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    lab.until(id, is(OperationStatus::Succeeded)).await;
    assert_eq!(site.calls(), ["act one", "act two", "probe two", "act three", "act four"]);
}

#[tokio::test]
async fn a_panicking_step_is_a_failed_step_and_the_worker_lives() {
    let lab = Lab::new().await;
    let site = Site::hooked(&lab.db, async |call| {
        assert!(call.what != "act two" || call.operation.uuid().is_nil(), "a bug");
        Ok(())
    });
    let _worker = Worker::start::<Build>(&lab.db, site);
    for _ in 0..2 {
        let id = lab.enqueue(&Build {}).await;
        let view = lab.until(id, is(OperationStatus::Failed)).await;
        assert_eq!(view.error.unwrap().code, ErrorCode::Internal);
        assert!(lab.effects(id).await.is_empty());
    }
}

#[tokio::test]
async fn an_undo_that_gives_up_parks_the_operation_until_it_is_resumed() {
    let lab = Lab::new().await;
    let mended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_mended = mended.clone();
    let site = Site::hooked(&lab.db, move |call| {
        let mended = is_mended.load(std::sync::atomic::Ordering::SeqCst);
        async move {
            match call.what.as_str() {
                "act three" => Err(permanent("it is broken")),
                "undo two" if !mended => Err(StepError::Transient("the undo is broken too".to_owned())),
                _ => Ok(()),
            }
        }
    });
    let id = lab.enqueue(&Build {}).await;
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    let view = lab.until_over(id).await;
    assert_eq!((view.status, view.step.as_deref()), (OperationStatus::Stuck, Some("two")));
    assert_eq!(view.error.unwrap().message, "step two still failed after 3 attempts");
    assert_eq!(messages(&lab).await, ["three is gone", "parked, unwinding"]);
    let parked = stuck(&lab.db).await.unwrap();
    assert_eq!(parked.len(), 1);
    assert_eq!((parked[0].view.id, parked[0].subject.clone()), (id, subject().to_string()));
    assert_eq!(parked[0].step_error.as_deref(), Some("the undo is broken too"));
    assert_eq!(parked[0].failure.as_ref().unwrap().message, "it is broken");
    assert_eq!(active_for(lab.db.pool(), subject()).await.unwrap(), [id], "a parked operation is not over");
    assert_eq!(lab.effects(id).await, ["one", "two"]);

    mended.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(retry_stuck(&lab.db, id).await.unwrap());
    let view = lab.until_over(id).await;
    assert_eq!((view.status, view.error.unwrap().message.as_str()), (OperationStatus::Failed, "it is broken"));
    assert!(lab.effects(id).await.is_empty());
    assert!(stuck(&lab.db).await.unwrap().is_empty());
    assert!(!retry_stuck(&lab.db, id).await.unwrap());
}

#[tokio::test]
async fn a_parked_operation_that_is_given_up_is_over() {
    let lab = Lab::new().await;
    let site = Site::hooked(&lab.db, async |call| match call.what.as_str() {
        "act two" | "undo two" => Err(permanent("it is broken")),
        _ => Ok(()),
    });
    let id = lab.enqueue(&Build {}).await;
    let worker = Worker::start::<Build>(&lab.db, site);
    lab.until(id, is(OperationStatus::Stuck)).await;
    worker.stop().await;
    let queued = lab.enqueue(&Build {}).await;
    let mut tx = lab.db.begin().await.unwrap();
    assert_eq!(give_up_stuck(&mut tx, crate::lab::other_subject()).await.unwrap(), 0);
    assert_eq!(give_up_stuck(&mut tx, subject()).await.unwrap(), 1);
    tx.commit().await.unwrap();
    let view = lab.view(id).await;
    assert_eq!((view.status, view.error.unwrap().message.as_str()), (OperationStatus::Failed, "it is broken"));
    assert!(!retry_stuck(&lab.db, id).await.unwrap());
    assert_eq!(active_for(lab.db.pool(), subject()).await.unwrap(), [queued]);
}

/// `pay` cannot be taken back.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Sell {}

impl Workflow for Sell {
    const NAME: &'static str = "sell";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        vec![outside("pack").retry(FAST), outside("pay").retry(FAST).pivot(), outside("ship").retry(FAST)]
    }
}

#[tokio::test]
async fn behind_the_pivot_nothing_is_undone() {
    let lab = Lab::new().await;
    let mended = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let is_mended = mended.clone();
    let site = Site::hooked(&lab.db, move |call| {
        let mended = is_mended.load(std::sync::atomic::Ordering::SeqCst);
        async move { if call.what == "act ship" && !mended { Err(permanent("no ship")) } else { Ok(()) } }
    });
    let id = lab.enqueue(&Sell {}).await;
    let _worker = Worker::start::<Sell>(&lab.db, site.clone());
    let view = lab.until_over(id).await;
    assert_eq!((view.status, view.error.unwrap().message.as_str()), (OperationStatus::Stuck, "no ship"));
    assert_eq!(site.calls(), ["act pack", "act pay", "act ship"]);
    mended.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(retry_stuck(&lab.db, id).await.unwrap());
    lab.until(id, is(OperationStatus::Succeeded)).await;
    assert_eq!(lab.effects(id).await, ["pack", "pay", "ship"]);
}

async fn cancel(lab: &Lab, id: systemprompt_contract::OperationId) -> CancelOutcome {
    let mut tx = lab.db.begin().await.unwrap();
    let outcome = request_cancel(&mut tx, id).await.unwrap();
    tx.commit().await.unwrap();
    outcome
}

#[tokio::test]
async fn a_queued_operation_is_cancelled_without_any_step() {
    let lab = Lab::new().await;
    let site = Site::quiet(&lab.db);
    let id = lab.enqueue(&Build {}).await;
    assert_eq!(cancel(&lab, id).await, CancelOutcome::Requested);
    assert_eq!(cancel(&lab, id).await, CancelOutcome::Requested);
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    let view = lab.until(id, is(OperationStatus::Failed)).await;
    assert_eq!(view.error.unwrap().code, ErrorCode::Cancelled);
    assert!(site.calls().is_empty());
    assert_eq!(cancel(&lab, id).await, CancelOutcome::TooLate(OperationStatus::Failed));
    assert_eq!(cancel(&lab, systemprompt_contract::OperationId::new()).await, CancelOutcome::Unknown);
}

#[tokio::test]
async fn a_waiting_step_hears_the_cancellation_and_everything_is_undone() {
    let lab = Lab::new().await;
    let site = Site::hooked(&lab.db, async |call| {
        if call.what == "act three" {
            call.cancel.cancelled().await;
            return Err(permanent("gave up waiting"));
        }
        Ok(())
    });
    let id = lab.enqueue(&Build {}).await;
    let mut config = crate::lab::config("worker");
    // Not by a heartbeat: the cancellation itself wakes the worker.
    (config.lease, config.heartbeat) = (Duration::from_mins(10), Duration::from_mins(5));
    let _worker = Worker::start_with::<Build>(&lab.db, site.clone(), config);
    wait_until("step three waits", async || site.calls().contains(&"act three".to_owned())).await;
    assert_eq!(cancel(&lab, id).await, CancelOutcome::Requested);
    let view = lab.until(id, is(OperationStatus::Failed)).await;
    assert_eq!(view.error.unwrap().code, ErrorCode::Cancelled);
    assert_eq!(site.calls()[3..], ["undo three", "undo two", "undo one"]);
    assert!(lab.effects(id).await.is_empty());
}

#[tokio::test]
async fn a_deaf_step_is_dropped_where_it_waits() {
    let lab = Lab::new().await;
    let site = Site::hooked(&lab.db, async |call| {
        if call.what == "act two" {
            std::future::pending::<()>().await;
        }
        Ok(())
    });
    let id = lab.enqueue(&Build {}).await;
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    wait_until("step two waits", async || site.calls().contains(&"act two".to_owned())).await;
    cancel(&lab, id).await;
    let view = lab.until(id, is(OperationStatus::Failed)).await;
    assert_eq!(view.error.unwrap().code, ErrorCode::Cancelled);
    assert!(lab.effects(id).await.is_empty());
}

#[tokio::test]
async fn a_cancellation_ends_a_backoff() {
    let lab = Lab::new().await;
    let _worker = Worker::start::<Slow>(&lab.db, ());
    let backing_off = "SELECT worker IS NULL FROM operations WHERE id = $1";
    for already in [true, false] {
        let id = lab.enqueue(&Slow {}).await;
        // Both when the pause has begun and when the cancellation comes in just before it.
        wait_until("it has begun", async || lab.journal(id).await == ["slow started 1"]).await;
        wait_until("it backs off", async || {
            !already || sqlx::query_scalar(backing_off).bind(id.uuid()).fetch_one(lab.db.pool()).await.unwrap()
        })
        .await;
        cancel(&lab, id).await;
        let view = lab.until(id, is(OperationStatus::Failed)).await;
        assert_eq!(view.error.unwrap().code, ErrorCode::Cancelled);
    }
}

/// Backs off for an hour.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Slow {}

impl Workflow for Slow {
    const NAME: &'static str = "slow";
    type Context = ();
    type State = ();
    fn steps() -> Vec<Step<Self>> {
        let hour = Duration::from_hours(1);
        let retry = systemprompt_workflow::Retry { attempts: 2, first: hour, max: hour, jitter: 0.0 };
        let step = Step::new("slow", async |_, ()| Err(StepError::Transient("not yet".to_owned())));
        vec![step.retry(retry).no_undo("it does nothing")]
    }
}

#[tokio::test]
async fn what_a_worker_does_not_know_it_leaves_alone_and_what_it_cannot_read_it_parks() {
    let lab = Lab::new().await;
    let strange = lab.enqueue(&Slow {}).await;
    let unreadable = lab.enqueue(&Build {}).await;
    let renamed = lab.enqueue(&Build {}).await;
    sqlx::query("UPDATE operations SET input = '[1]' WHERE id = $1")
        .bind(unreadable.uuid())
        .execute(lab.db.pool())
        .await
        .unwrap();
    sqlx::query("INSERT INTO operation_steps VALUES ($1, 0, 'once', 'done', 0)")
        .bind(renamed.uuid())
        .execute(lab.db.pool())
        .await
        .unwrap();
    let site = Site::quiet(&lab.db);
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    for (id, expected) in [(unreadable, "stored input"), (renamed, "another version")] {
        let view = lab.until(id, is(OperationStatus::Stuck)).await;
        assert!(view.error.unwrap().message.contains(expected));
    }
    assert!(site.calls().is_empty());
    assert_eq!(lab.view(strange).await.status, OperationStatus::Queued);
    // Mended by hand and resumed, it runs.
    sqlx::query("UPDATE operations SET input = '{}' WHERE id = $1")
        .bind(unreadable.uuid())
        .execute(lab.db.pool())
        .await
        .unwrap();
    assert!(retry_stuck(&lab.db, unreadable).await.unwrap());
    lab.until(unreadable, is(OperationStatus::Succeeded)).await;
}
