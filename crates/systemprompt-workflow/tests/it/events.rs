//! The log is complete, in order, and live.

use crate::lab::{Lab, event, message, other_subject, subject, wait_until};
use futures_util::StreamExt;
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use systemprompt_contract::{EventId, Subject};
use systemprompt_workflow::{
    Db,
    events::{EventHub, append, read_after},
};

async fn publish(db: &Db, subject: Subject, text: &str) -> EventId {
    let mut tx = db.begin().await.unwrap();
    let id = append(&mut tx, subject, &event(text), None).await.unwrap();
    tx.commit().await.unwrap();
    id
}

/// Reads until `count` events have come; fails when they do not.
async fn read(hub: &EventHub, subject: Subject, after: EventId, count: usize) -> Vec<(EventId, String)> {
    let events =
        hub.subscribe(subject, after).take(count).map(|event| event.map(|(id, event)| (id, message(&event))).unwrap());
    tokio::time::timeout(Duration::from_secs(30), events.collect()).await.expect("all events come")
}

#[tokio::test]
async fn a_subscriber_gets_the_log_and_then_what_comes() {
    let lab = Lab::new().await;
    let hub = EventHub::start(lab.db.clone());
    for text in ["1", "2"] {
        publish(&lab.db, subject(), text).await;
    }
    publish(&lab.db, other_subject(), "not mine").await;
    let reader = tokio::spawn({
        let hub = hub.clone();
        async move { read(&hub, subject(), EventId(0), 4).await }
    });
    publish(&lab.db, subject(), "3").await;
    let last = publish(&lab.db, subject(), "4").await;
    let got = reader.await.unwrap();
    assert_eq!(got.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>(), ["1", "2", "3", "4"]);
    assert_eq!(got[3].0, last);
    // Resumed in the middle.
    let rest = read(&hub, subject(), got[1].0, 2).await;
    assert_eq!(rest, got[2..]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_missed_or_doubled_among_concurrent_writers_and_resuming_readers() {
    const WRITERS: usize = 6;
    const EACH: usize = 60;
    let lab = Lab::new().await;
    let hub = EventHub::start(lab.db.clone());
    // A reader that leaves after every few events and comes back with the last id it saw.
    let restless = tokio::spawn({
        let hub = hub.clone();
        async move {
            let (mut seen, mut after) = (Vec::new(), EventId(0));
            while seen.len() < WRITERS * EACH {
                let some = read(&hub, subject(), after, (WRITERS * EACH - seen.len()).min(7)).await;
                after = some.last().unwrap().0;
                seen.extend(some);
            }
            seen
        }
    });
    let steady = tokio::spawn({
        let hub = hub.clone();
        async move { read(&hub, subject(), EventId(0), WRITERS * EACH).await }
    });
    let writers = (0..WRITERS).map(|writer| {
        let db = lab.db.clone();
        tokio::spawn(async move {
            for index in 0..EACH {
                let mut tx = db.begin().await.unwrap();
                append(&mut tx, subject(), &event(&format!("{writer}-{index}")), None).await.unwrap();
                // An id that is taken early and committed late is what a reader could miss.
                sqlx::query("SELECT pg_sleep($1)")
                    .bind(f64::from(u32::try_from(index % 3).unwrap()) / 1000.0)
                    .execute(&mut *tx)
                    .await
                    .unwrap();
                if index % 10 == 9 {
                    tx.rollback().await.unwrap();
                    publish(&db, subject(), &format!("{writer}-{index}")).await;
                } else {
                    tx.commit().await.unwrap();
                }
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let late = read(&hub, subject(), EventId(0), WRITERS * EACH).await;
    for seen in [restless.await.unwrap(), steady.await.unwrap()] {
        assert!(seen.is_sorted_by(|one, next| one.0 < next.0), "out of order");
        assert_eq!(seen.iter().map(|(_, text)| text).collect::<BTreeSet<_>>().len(), WRITERS * EACH);
        assert_eq!(seen, late);
    }
}

#[tokio::test]
async fn an_event_vanishes_with_its_transaction() {
    let lab = Lab::new().await;
    let mut tx = lab.db.begin().await.unwrap();
    append(&mut tx, subject(), &event("never"), None).await.unwrap();
    tx.rollback().await.unwrap();
    assert!(read_after(&lab.db, subject(), EventId(0), 10).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_subscriber_outlives_the_death_of_the_database() {
    let lab = Lab::new().await;
    let hub = EventHub::start(lab.db.clone());
    publish(&lab.db, subject(), "before").await;
    let mut events = Box::pin(hub.subscribe(subject(), EventId(0)));
    assert_eq!(message(&events.next().await.unwrap().unwrap().1), "before");
    lab.cluster.kill().await;
    lab.cluster.start_again().await;
    wait_until("the pool is back", async || sqlx::query("SELECT 1").execute(lab.db.pool()).await.is_ok()).await;
    publish(&lab.db, subject(), "after").await;
    let next = tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("it goes on");
    assert_eq!(message(&next.unwrap().unwrap().1), "after");
}

#[tokio::test]
async fn events_of_an_unknown_form_are_left_out_and_the_stream_goes_on() {
    let lab = Lab::new().await;
    let hub = EventHub::start(lab.db.clone());
    publish(&lab.db, subject(), "before").await;
    // More than a reader takes at once.
    sqlx::query(
        "INSERT INTO events (subject, body)
         SELECT $1, '{\"event\": \"new_kind\", \"data\": {}}' FROM generate_series(1, 100)",
    )
    .bind(subject().to_string())
    .execute(lab.db.pool())
    .await
    .unwrap();
    publish(&lab.db, subject(), "after").await;
    let got = read(&hub, subject(), EventId(0), 2).await;
    assert_eq!(got.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>(), ["before", "after"]);
}

#[tokio::test]
async fn an_event_is_heard_long_before_the_next_poll() {
    let lab = Lab::new().await;
    let hub = EventHub::start(lab.db.clone());
    let mut events = hub.subscribe(subject(), EventId(0));
    // The first may come by a poll. Whoever missed a notification after it would wait for the next one, 4 s later.
    for count in 0..3 {
        let published = Instant::now();
        publish(&lab.db, subject(), "now").await;
        let next = tokio::time::timeout(Duration::from_secs(20), events.next()).await.expect("it comes");
        next.unwrap().unwrap();
        let waited = published.elapsed();
        assert!(count == 0 || waited < Duration::from_secs(2), "event {count} took {waited:?}");
    }
}
