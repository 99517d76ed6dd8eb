//! Enqueued exactly once, and only with its transaction.

use crate::lab::{Build, Lab, Site, Worker, other_subject, subject};
use systemprompt_contract::OperationStatus;
use systemprompt_workflow::{Enqueued, NewOperation, active_for, enqueue, operation};

async fn enqueue_once(lab: &Lab, key: &str) -> Enqueued {
    let mut tx = lab.db.begin().await.unwrap();
    let enqueued = enqueue(&mut tx, NewOperation { input: &Build {}, subject: subject(), key }).await.unwrap();
    tx.commit().await.unwrap();
    enqueued
}

#[tokio::test]
async fn one_key_is_one_operation_however_many_ask_at_once() {
    let lab = Lab::new().await;
    let all = futures_util::future::join_all((0..24).map(|_| enqueue_once(&lab, "event-1"))).await;
    assert_eq!(all.iter().filter(|one| one.fresh).count(), 1);
    assert!(all.iter().all(|one| one.id == all[0].id));
    assert_ne!(enqueue_once(&lab, "event-2").await.id, all[0].id);
    let site = Site::quiet(&lab.db);
    let _worker = Worker::start::<Build>(&lab.db, site.clone());
    assert_eq!(lab.until_over(all[0].id).await.status, OperationStatus::Succeeded);
    // Also long after it is over.
    let later = enqueue_once(&lab, "event-1").await;
    assert_eq!(later, Enqueued { id: all[0].id, fresh: false });
}

#[tokio::test]
async fn an_operation_vanishes_with_its_transaction() {
    let lab = Lab::new().await;
    let mut tx = lab.db.begin().await.unwrap();
    let new = NewOperation { input: &Build {}, subject: other_subject(), key: "k" };
    let first = enqueue(&mut tx, new).await.unwrap();
    // Somebody else with the same key waits for our end and is then the first.
    let waiting = tokio::spawn({
        let db = lab.db.clone();
        async move {
            let mut tx = db.begin().await.unwrap();
            let new = NewOperation { input: &Build {}, subject: other_subject(), key: "k" };
            let second = enqueue(&mut tx, new).await.unwrap();
            tx.commit().await.unwrap();
            second
        }
    });
    tx.rollback().await.unwrap();
    let second = waiting.await.unwrap();
    assert!(second.fresh && second.id != first.id);
    assert_eq!(operation(&lab.db, first.id).await.unwrap(), None);
    assert_eq!(active_for(lab.db.pool(), other_subject()).await.unwrap(), [second.id]);
}
