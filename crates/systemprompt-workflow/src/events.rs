//! The event log: appended in the transaction of what it reports, replayed by id, delivered live.
//!
//! PostgreSQL hands out ids when rows are inserted, not when they commit, so a reader that has seen event 8 could
//! later find event 7. [`append`] therefore takes a lock of the subject for the rest of the transaction: ids of one
//! stream commit in order, and "everything after N" misses nothing.

use crate::{
    Db,
    listen::{Heard, listen},
    store,
};
use futures_util::{Stream, stream};
use sqlx::PgTransaction;
use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use systemprompt_contract::{Event, EventId, OperationId, Subject};
use tokio::{sync::watch, task::AbortHandle};

const CHANNEL: &str = "systemprompt_events";
/// Subscribers look at the log this often even when nothing is heard.
const POLL: Duration = Duration::from_secs(4);
/// A subscriber holds at most this many events in memory.
const BATCH: i64 = 64;

/// Appends to a subject's stream; readers see and hear it when the transaction commits.
///
/// Until then other writers of the same subject wait. A transaction that writes several subjects should use the
/// order of their texts, or risk a deadlock, which PostgreSQL breaks with a transient error.
///
/// # Errors
/// The database refused or does not answer.
pub async fn append(
    tx: &mut PgTransaction<'_>,
    subject: Subject,
    event: &Event,
    operation: Option<OperationId>,
) -> Result<EventId, sqlx::Error> {
    lock_stream(tx, &subject.to_string()).await?;
    insert(tx, subject, event, operation).await
}

/// Appends in the given order, having locked all streams in the order of their names.
pub(crate) async fn append_all(
    tx: &mut PgTransaction<'_>,
    events: &[(Subject, Event)],
    operation: OperationId,
) -> Result<(), sqlx::Error> {
    let mut streams: Vec<String> = events.iter().map(|(subject, _)| subject.to_string()).collect();
    streams.sort_unstable();
    streams.dedup();
    for stream in &streams {
        lock_stream(tx, stream).await?;
    }
    for (subject, event) in events {
        insert(tx, *subject, event, Some(operation)).await?;
    }
    Ok(())
}

async fn lock_stream(tx: &mut PgTransaction<'_>, subject: &str) -> Result<(), sqlx::Error> {
    // Two streams with one hash only wait for each other.
    sqlx::query!("SELECT pg_advisory_xact_lock(hashtextextended($1, 7261))", subject).fetch_one(&mut **tx).await?;
    Ok(())
}

async fn insert(
    tx: &mut PgTransaction<'_>,
    subject: Subject,
    event: &Event,
    operation: Option<OperationId>,
) -> Result<EventId, sqlx::Error> {
    let body = serde_json::to_value(event).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
    let subject = subject.to_string();
    let id = sqlx::query_scalar!(
        "INSERT INTO events (subject, body, operation_id) VALUES ($1, $2, $3) RETURNING id",
        subject,
        body,
        operation.map(OperationId::uuid),
    )
    .fetch_one(&mut **tx)
    .await?;
    sqlx::query!("SELECT pg_notify($1, $2)", CHANNEL, subject).fetch_one(&mut **tx).await?;
    Ok(EventId(id))
}

/// The next events of a stream, oldest first. `None` is one in a form that this version does not know: its place is
/// kept, so that a reader gets past it.
///
/// # Errors
/// The database refused or does not answer.
pub async fn read_after(
    db: &Db,
    subject: Subject,
    after: EventId,
    limit: i64,
) -> Result<Vec<(EventId, Option<Event>)>, sqlx::Error> {
    let rows = sqlx::query_as!(
        StoredEvent,
        "SELECT id, body FROM events WHERE subject = $1 AND id > $2 ORDER BY id LIMIT $3",
        subject.to_string(),
        after.0,
        limit,
    )
    .fetch_all(db.pool())
    .await?;
    let read = |row: StoredEvent| match serde_json::from_value(row.body) {
        Ok(event) => (EventId(row.id), Some(event)),
        Err(error) => {
            tracing::error!(%subject, event.id = row.id, %error, "an event is of a form this version does not know; left out");
            (EventId(row.id), None)
        }
    };
    Ok(rows.into_iter().map(read).collect())
}

struct StoredEvent {
    id: i64,
    body: serde_json::Value,
}

/// Wakes subscribers when their stream grows: one listening connection for all of them.
#[derive(Clone)]
pub struct EventHub(Arc<Hub>);

struct Hub {
    db: Db,
    streams: Arc<Streams>,
    tasks: [AbortHandle; 2],
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

impl fmt::Debug for EventHub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventHub").finish_non_exhaustive()
    }
}

impl EventHub {
    /// Starts to listen, now or as soon as the database answers; ends when the last handle and subscription is gone.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(db: Db) -> Self {
        let streams = Arc::new(Streams::default());
        let heard = streams.clone();
        let listener = tokio::spawn(listen(db.side_pool(1), CHANNEL, move |what| match what {
            Heard::Payload(subject) => heard.wake(subject),
            Heard::Listening => heard.wake_all(),
        }));
        let polled = streams.clone();
        let poller = tokio::spawn(async move {
            loop {
                tokio::time::sleep(POLL).await;
                polled.wake_all();
            }
        });
        Self(Arc::new(Hub { db, streams, tasks: [listener.abort_handle(), poller.abort_handle()] }))
    }

    /// All events of a subject after `after`, first from the log, then live: no gap, no duplicate, in order, at most
    /// a small batch in memory however slow the reader is.
    ///
    /// While the database is away the stream waits; when it refuses the stream ends with its error. An event in a form
    /// that this version does not know is logged and left out.
    pub fn subscribe(
        &self,
        subject: Subject,
        after: EventId,
    ) -> impl Stream<Item = Result<(EventId, Event), sqlx::Error>> + Send + Unpin + 'static + use<> {
        let subscription = Subscription {
            hub: self.0.clone(),
            wake: self.0.streams.subscribe(subject),
            subject,
            after,
            batch: VecDeque::new(),
        };
        Box::pin(stream::unfold(Some(subscription), |subscription| async {
            let mut subscription = subscription?;
            match subscription.next().await {
                Ok(event) => Some((Ok(event), Some(subscription))),
                Err(error) => Some((Err(error), None)),
            }
        }))
    }
}

struct Subscription {
    hub: Arc<Hub>,
    wake: watch::Receiver<()>,
    subject: Subject,
    after: EventId,
    batch: VecDeque<(EventId, Option<Event>)>,
}

impl Subscription {
    async fn next(&mut self) -> Result<(EventId, Event), sqlx::Error> {
        loop {
            while let Some((id, event)) = self.batch.pop_front() {
                self.after = id;
                if let Some(event) = event {
                    return Ok((id, event));
                }
            }
            // Marked as seen before the log is read: what commits in between wakes us again.
            self.wake.mark_unchanged();
            match read_after(&self.hub.db, self.subject, self.after, BATCH).await {
                Ok(batch) if !batch.is_empty() => {
                    self.batch = batch.into();
                    continue;
                }
                Ok(_) => {}
                Err(error) if store::is_transient(&error) => {
                    tracing::debug!(subject = %self.subject, %error, "the event log does not answer, waiting");
                }
                Err(error) => return Err(error),
            }
            // Cannot fail while we hold the hub; if it did, waiting for ever would be as good as any answer.
            if self.wake.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// Who waits for which stream.
#[derive(Default)]
struct Streams(Mutex<HashMap<String, watch::Sender<()>>>);

impl Streams {
    fn subscribe(&self, subject: Subject) -> watch::Receiver<()> {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.entry(subject.to_string()).or_insert_with(|| watch::channel(()).0).subscribe()
    }

    fn wake(&self, subject: &str) {
        let streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = streams.get(subject) {
            sender.send_replace(());
        }
    }

    fn wake_all(&self) {
        let mut streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams.retain(|_, sender| sender.receiver_count() > 0);
        for sender in streams.values() {
            sender.send_replace(());
        }
    }
}
