//! One claimed operation, from its journal to rest or to the loss of its lease.

use crate::{
    Completion, Db, Probe, Step, StepContext, StepError, Workflow,
    crash::is_skipped,
    crash_point, events,
    journal::{IllegalTransition, Journal, Mark, Next, Phase, Plan, PlannedStep, Transition},
    retry,
    step::Undo,
    store::{self, Claimed, Keep, Lease, OperationChange, StepChange},
};
use futures_util::{FutureExt, future::BoxFuture};
use serde_json::Value;
use sqlx::PgTransaction;
use std::{
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use systemprompt_contract::{ApiError, ErrorCode, Event, Subject};
use tokio_util::sync::CancellationToken;

/// How long a step may go on after the engine was told to stop, or the operation to end.
const GRACE: Duration = Duration::from_secs(5);
/// Pause between attempts to give a lease back to a database that does not answer.
const RELEASE_PAUSE: Duration = Duration::from_millis(200);

/// What the engine and a run of it share about one lease.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub(crate) lease: Lease,
    /// The lease is gone: end at once, write nothing.
    pub(crate) lost: CancellationToken,
    /// Somebody asked for the operation to end.
    pub(crate) cancel: CancellationToken,
    /// By our own clock, counted from before the database was asked: when the lease may have lapsed.
    valid_until: Mutex<Instant>,
}

impl Ticket {
    pub(crate) fn new(lease: Lease, asked_at: Instant) -> Self {
        Self {
            lease,
            lost: CancellationToken::new(),
            cancel: CancellationToken::new(),
            valid_until: Mutex::new(asked_at + lease.length),
        }
    }

    pub(crate) fn valid_until(&self) -> Instant {
        *self.valid_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn extend(&self, asked_at: Instant) {
        let mut until = self.valid_until.lock().unwrap_or_else(PoisonError::into_inner);
        *until = (*until).max(asked_at + self.lease.length);
    }
}

/// A workflow with what its steps act upon.
pub(crate) struct Registration<W: Workflow> {
    plan: Plan,
    steps: Vec<Step<W>>,
    app: W::Context,
}

/// A registration whose workflow is not known any more to the caller.
pub(crate) trait Runner: Send + Sync {
    /// Runs a claimed operation until it rests, is handed back, or the lease is lost.
    fn run(self: Arc<Self>, claimed: Claimed, tools: Tools) -> BoxFuture<'static, ()>;
}

/// What a run borrows from its engine.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) db: Db,
    pub(crate) ticket: Arc<Ticket>,
    pub(crate) stop: CancellationToken,
}

impl<W: Workflow> Registration<W> {
    pub(crate) fn new(steps: Vec<Step<W>>, app: W::Context) -> Self {
        let plan = steps
            .iter()
            .map(|step| PlannedStep {
                name: step.name.to_owned(),
                has_undo: matches!(step.undo, Undo::By(_)),
                pivot: step.pivot,
            })
            .collect();
        Self { plan: Plan(plan), steps, app }
    }
}

impl<W: Workflow> Runner for Registration<W> {
    fn run(self: Arc<Self>, claimed: Claimed, tools: Tools) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let ticket = tools.ticket.clone();
            let db = tools.db.clone();
            let end = tokio::select! {
                biased;
                () = ticket.lost.cancelled() => End::Lost,
                end = drive(self, claimed, tools) => end,
            };
            finish::<W>(&db, &ticket, end).await;
        })
    }
}

/// Why a run ends.
#[derive(Debug)]
enum End {
    /// The operation is at rest, or waits for its next attempt, and the row says so.
    Written,
    /// The engine stops; the operation goes on elsewhere.
    Interrupted,
    /// Somebody else may have the operation now.
    Lost,
    /// The database failed, perhaps in the middle of a commit: only the journal knows what happened.
    Database(sqlx::Error),
    /// A bug of the engine.
    Bug(IllegalTransition),
}

impl From<sqlx::Error> for End {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Gives back what the run still holds.
async fn finish<W: Workflow>(db: &Db, ticket: &Ticket, end: End) {
    let operation = ticket.lease.operation;
    match end {
        End::Written => return,
        End::Lost => {
            tracing::warn!(operation.id = %operation, workflow = W::NAME, "lost the lease, wrote nothing more");
            return;
        }
        End::Interrupted => {}
        End::Database(error) => tracing::warn!(
            operation.id = %operation, workflow = W::NAME, error = &error as &dyn std::error::Error,
            "the journal could not be written; the operation is taken up again from what it says"
        ),
        // Not parked: the row is sound, and another version may know what to do.
        End::Bug(error) => {
            tracing::error!(operation.id = %operation, workflow = W::NAME, %error, "a bug in the engine");
        }
    }
    while let Err(error) = store::release(db.pool(), ticket.lease).await {
        tracing::debug!(operation.id = %operation, %error, "the lease could not be given back yet");
        tokio::select! {
            () = ticket.lost.cancelled() => return,
            () = tokio::time::sleep(RELEASE_PAUSE) => {}
        }
    }
}

async fn drive<W: Workflow>(registration: Arc<Registration<W>>, claimed: Claimed, tools: Tools) -> End {
    match open(registration, claimed, tools).await {
        Ok(mut run) => loop {
            if let Err(end) = run.advance().await {
                return end;
            }
        },
        Err(end) => end,
    }
}

/// Reads what was stored; parks an operation that this version cannot read.
async fn open<W: Workflow>(registration: Arc<Registration<W>>, claimed: Claimed, tools: Tools) -> Result<Run<W>, End> {
    let stored = store::stored_steps(&tools.db, claimed.lease.operation).await?;
    let Claimed { input, state, phase, .. } = claimed;
    let journal = Journal::load(registration.plan.clone(), phase.clone(), &stored).map_err(|error| error.to_string());
    let input = serde_json::from_value(input).map_err(|error| format!("its stored input cannot be read: {error}"));
    let state = state.map_or_else(|| Ok(W::State::default()), serde_json::from_value);
    let state = state.map_err(|error| format!("its stored state cannot be read: {error}"));
    match (journal, input, state) {
        (Ok(journal), Ok(input), Ok(state)) => Ok(Run {
            registration,
            db: tools.db,
            ticket: tools.ticket,
            stop: tools.stop,
            input: Arc::new(input),
            state,
            journal,
        }),
        (Err(reason), _, _) | (_, Err(reason), _) | (_, _, Err(reason)) => Err(park::<W>(&tools, phase, reason).await),
    }
}

async fn park<W: Workflow>(tools: &Tools, phase: Phase, reason: String) -> End {
    let operation = tools.ticket.lease.operation;
    tracing::error!(operation.id = %operation, workflow = W::NAME, reason, "parked an operation of another version");
    let because = ApiError::new(ErrorCode::Internal, reason)
        .hint("run the version that started it, or resume the operation once it is mended");
    let Some(phase) = phase.park(because) else { return End::Written };
    let change = OperationChange { phase: &phase, state: None, keep: Keep::Lease, can_cancel: false };
    let saved = async {
        let mut connection = tools.db.pool().acquire().await?;
        store::save_operation(&mut connection, tools.ticket.lease, change).await
    };
    match saved.await {
        Ok(true) => End::Written,
        Ok(false) => End::Lost,
        Err(error) => End::Database(error),
    }
}

struct Run<W: Workflow> {
    registration: Arc<Registration<W>>,
    db: Db,
    ticket: Arc<Ticket>,
    stop: CancellationToken,
    input: Arc<W>,
    state: W::State,
    journal: Journal,
}

/// What is committed together with a transition.
struct Write {
    step: Option<usize>,
    error: Option<String>,
    state: Option<Value>,
    keep: Keep,
    tx: Option<PgTransaction<'static>>,
    events: Vec<(Subject, Event)>,
}

impl Write {
    const fn of(step: Option<usize>) -> Self {
        Self { step, error: None, state: None, keep: Keep::Lease, tx: None, events: Vec::new() }
    }
}

/// How a guarded piece of a step ended.
enum Outcome<T> {
    Returned(Result<T, StepError>),
    /// It was asked to end and dropped where it waited.
    Cancelled,
    /// The engine stops and dropped it where it waited.
    Stopped,
}

/// Which of a step's two sides is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Act,
    Undo,
}

impl<W: Workflow> Run<W> {
    /// One step forward or back.
    async fn advance(&mut self) -> Result<(), End> {
        match self.journal.next() {
            Next::Rest => Err(End::Written),
            _ if self.stop.is_cancelled() => Err(End::Interrupted),
            Next::Act(_) if self.is_cancelled() => self.cancel(None).await,
            Next::Act(index) => self.act(index).await,
            Next::Undo(index) => self.undo(index).await,
        }
    }

    async fn act(&mut self, index: usize) -> Result<(), End> {
        let unknown = self.journal.mark(index) != Mark::Untouched;
        self.crash_point(index, Side::Act, "before_intent");
        self.write(Some(Transition::Start(index)), Write::of(Some(index))).await?;
        self.crash_point(index, Side::Act, "after_intent");

        let step = &self.registration.steps[index];
        let (act, probe) = (step.act.clone(), step.probe.clone().filter(|_| unknown));
        let skipped = is_skipped(W::NAME, step.name, "");
        let cancel = if self.journal.can_cancel() { self.ticket.cancel.clone() } else { CancellationToken::new() };
        let (cx, state) = (self.context(index, cancel.clone()), self.state.clone());
        let work = async move {
            if skipped {
                return Ok(Completion::new(state));
            }
            if let Some(probe) = probe
                && let Probe::Done(completion) = probe(cx.clone(), state.clone()).await?
            {
                return Ok(completion);
            }
            act(cx, state).await
        };
        match self.guard(index, work, &cancel).await {
            Outcome::Returned(Ok(completion)) => self.complete(index, Side::Act, completion).await,
            Outcome::Returned(Err(error)) if self.is_cancelled() => self.cancel(Some((index, error.to_string()))).await,
            Outcome::Returned(Err(error)) => self.give_up(index, Side::Act, error).await,
            Outcome::Cancelled => self.cancel(Some((index, "cancelled while it waited".to_owned()))).await,
            Outcome::Stopped => Err(End::Interrupted),
        }
    }

    async fn undo(&mut self, index: usize) -> Result<(), End> {
        self.crash_point(index, Side::Undo, "before_intent");
        self.write(Some(Transition::UndoStart(index)), Write::of(Some(index))).await?;
        self.crash_point(index, Side::Undo, "after_intent");

        // An undo cannot be cancelled, so its token never fires.
        let never = CancellationToken::new();
        let (cx, state) = (self.context(index, never.clone()), self.state.clone());
        let step = &self.registration.steps[index];
        let (undo, skipped) = (step.undo.clone(), is_skipped(W::NAME, step.name, ".undo"));
        let work = async move {
            match undo {
                Undo::By(undo) if !skipped => undo(cx, state).await,
                Undo::By(_) | Undo::NotNeeded => Ok(Completion::new(state)),
            }
        };
        match self.guard(index, work, &never).await {
            Outcome::Returned(Ok(completion)) => self.complete(index, Side::Undo, completion).await,
            Outcome::Returned(Err(error)) => self.give_up(index, Side::Undo, error).await,
            Outcome::Cancelled | Outcome::Stopped => Err(End::Interrupted),
        }
    }

    /// Commits what a step left, together with its mark.
    async fn complete(&mut self, index: usize, side: Side, done: Completion<W::State>) -> Result<(), End> {
        self.crash_point(index, side, "after_act");
        let state = match serde_json::to_value(&done.state) {
            Ok(state) => state,
            Err(error) => {
                let error = ApiError::new(ErrorCode::Internal, format!("the step's state cannot be stored: {error}"));
                return self.give_up(index, side, StepError::Permanent(error)).await;
            }
        };
        let transition = match side {
            Side::Act => Transition::Done(index),
            Side::Undo => Transition::UndoDone(index),
        };
        let write = Write { state: Some(state), tx: done.tx, events: done.events, ..Write::of(Some(index)) };
        match self.write(Some(transition), write).await {
            Ok(()) => {
                self.state = done.state;
                self.crash_point(index, side, "after_commit");
                Ok(())
            }
            // The server refused the commit, so nothing of it happened: the step's failure, not the journal's.
            Err(End::Database(error)) if !store::outcome_is_unknown(&error) => {
                self.give_up(index, side, error.into()).await
            }
            Err(end) => Err(end),
        }
    }

    /// After a failed attempt: another one later, or the end of this direction.
    async fn give_up(&mut self, index: usize, side: Side, error: StepError) -> Result<(), End> {
        let step = &self.registration.steps[index];
        let attempts = match self.journal.mark(index) {
            Mark::Started { attempts } | Mark::Undoing { attempts } => attempts,
            Mark::Untouched | Mark::Done | Mark::Undone => 0,
        };
        let text = error.to_string();
        let failure = match error {
            StepError::Permanent(failure) => failure,
            StepError::Transient(reason) => match step.retry.pause_after(attempts, retry::random()) {
                Some(after) => {
                    tracing::info!(
                        operation.id = %self.ticket.lease.operation, workflow = W::NAME, step = step.name,
                        ?side, attempts, reason, "a step will be tried again"
                    );
                    let keep = Keep::Release { after };
                    self.write(None, Write { error: Some(text), keep, ..Write::of(Some(index)) }).await?;
                    return Err(End::Written);
                }
                // The reason may name paths and addresses of ours; it is stored with the step.
                None => ApiError::new(
                    ErrorCode::Unavailable,
                    format!("step {} still failed after {attempts} attempts", step.name),
                ),
            },
        };
        tracing::warn!(
            operation.id = %self.ticket.lease.operation, workflow = W::NAME, step = step.name, ?side,
            error = %failure, reason = text, "a step gave up"
        );
        let transition = match side {
            Side::Act => Transition::Fail(index, failure),
            Side::Undo => Transition::UndoFail(index, failure),
        };
        self.write(Some(transition), Write { error: Some(text), ..Write::of(Some(index)) }).await
    }

    async fn cancel(&mut self, at: Option<(usize, String)>) -> Result<(), End> {
        let failure = ApiError::new(ErrorCode::Cancelled, "the operation was cancelled on request");
        let (step, error) = at.unzip();
        self.write(Some(Transition::Cancel(failure)), Write { error, ..Write::of(step) }).await
    }

    /// Commits a transition (or only an error and a release), or nothing at all.
    async fn write(&mut self, transition: Option<Transition>, write: Write) -> Result<(), End> {
        let next = match transition {
            Some(transition) => self.journal.clone().apply(transition).map_err(End::Bug)?,
            None => self.journal.clone(),
        };
        let mut events = write.events;
        if let Phase::Stuck { because, .. } = next.phase() {
            let cx = self.context(write.step.unwrap_or_default(), self.ticket.cancel.clone());
            events.extend(W::parked(&cx, &self.state, because));
        }
        let asked_at = Instant::now();
        let mut tx = match write.tx {
            Some(tx) => tx,
            None => self.db.begin().await?,
        };
        let lease = self.ticket.lease;
        let change = OperationChange {
            phase: next.phase(),
            state: write.state,
            keep: write.keep,
            can_cancel: next.can_cancel(),
        };
        if !store::save_operation(&mut tx, lease, change).await? {
            return Err(End::Lost);
        }
        if let Some(position) = write.step {
            let name = self.registration.steps[position].name;
            let change = StepChange { position, name, mark: next.mark(position), error: write.error.as_deref() };
            store::save_step(&mut tx, lease.operation, change).await?;
        }
        events::append_all(&mut tx, &events, lease.operation).await?;
        tx.commit().await?;
        self.ticket.extend(asked_at);
        self.journal = next;
        Ok(())
    }

    /// Runs a piece of a step; a panic is its failure, and it may not outstay a stop or a cancellation for long.
    async fn guard<T>(
        &self,
        index: usize,
        work: impl Future<Output = Result<T, StepError>> + Send,
        cancel: &CancellationToken,
    ) -> Outcome<T> {
        let mut work = pin!(AssertUnwindSafe(work).catch_unwind());
        let interrupted = async {
            let outcome = tokio::select! {
                () = self.stop.cancelled() => Outcome::Stopped,
                () = cancel.cancelled() => Outcome::Cancelled,
            };
            tokio::time::sleep(GRACE).await;
            outcome
        };
        tokio::select! {
            biased;
            result = &mut work => Outcome::Returned(result.unwrap_or_else(|_| Err(self.panicked(index)))),
            outcome = interrupted => outcome,
        }
    }

    fn panicked(&self, index: usize) -> StepError {
        let step = self.registration.steps[index].name;
        tracing::error!(operation.id = %self.ticket.lease.operation, workflow = W::NAME, step, "a step panicked");
        StepError::Permanent(ApiError::new(
            ErrorCode::Internal,
            format!("step {step} panicked; the log has the details"),
        ))
    }

    fn context(&self, index: usize, cancel: CancellationToken) -> StepContext<W> {
        let attempt = match self.journal.mark(index) {
            Mark::Started { attempts } | Mark::Undoing { attempts } => attempts,
            Mark::Untouched | Mark::Done | Mark::Undone => 1,
        };
        StepContext {
            input: self.input.clone(),
            app: self.registration.app.clone(),
            operation: self.ticket.lease.operation,
            db: self.db.clone(),
            attempt,
            failure: self.journal.phase().failure().cloned(),
            cancel,
        }
    }

    fn is_cancelled(&self) -> bool {
        self.ticket.cancel.is_cancelled() && self.journal.can_cancel()
    }

    fn crash_point(&self, index: usize, side: Side, point: &str) {
        if cfg!(debug_assertions) {
            let side = match side {
                Side::Act => "",
                Side::Undo => "undo_",
            };
            crash_point(&format!("{}.{}.{side}{point}", W::NAME, self.registration.steps[index].name));
        }
    }
}
