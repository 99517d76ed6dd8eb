use crate::{Db, Retry, store};
use futures_util::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use sqlx::PgTransaction;
use std::{fmt, sync::Arc};
use systemprompt_contract::{ApiError, ErrorCode, Event, OperationId, Subject};
use tokio_util::sync::CancellationToken;

/// A fixed list of steps with a typed state. The value itself is the input, stored with the operation.
pub trait Workflow: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// Stored with every operation: lower snake case, never renamed while an operation of it may be unfinished.
    const NAME: &'static str;
    /// What its steps act upon; small, not the whole application.
    type Context: Clone + Send + Sync + 'static;
    /// What steps hand to later steps and to undos.
    type State: Default + Clone + Serialize + DeserializeOwned + Send + Sync + 'static;
    /// The steps in their order. Names are unique and never renamed; new steps go to the end.
    fn steps() -> Vec<Step<Self>>;
    /// What is published in the commit that parks an operation, since nothing else will be said until somebody
    /// resumes it. `cx.failure` is there when it was unwinding; `because` is what it could not get over.
    fn parked(_cx: &StepContext<Self>, _state: &Self::State, _because: &ApiError) -> Vec<(Subject, Event)> {
        Vec::new()
    }
}

/// What an act or an undo is called with.
pub struct StepContext<W: Workflow> {
    /// The operation's input.
    pub input: Arc<W>,
    /// What was registered with the engine.
    pub app: W::Context,
    /// The operation; a good idempotency key towards other systems, together with the step's name.
    pub operation: OperationId,
    /// The control plane's database.
    pub db: Db,
    /// Counts from 1; above 1 the outcome of the one before is unknown.
    pub attempt: u32,
    /// While unwinding: why.
    pub failure: Option<ApiError>,
    /// Cancelled when somebody asked for the operation to end. Long waits should watch it; a step that does not
    /// come back within a few seconds is dropped where it waits.
    pub cancel: CancellationToken,
}

impl<W: Workflow> Clone for StepContext<W> {
    fn clone(&self) -> Self {
        Self {
            input: self.input.clone(),
            app: self.app.clone(),
            operation: self.operation,
            db: self.db.clone(),
            attempt: self.attempt,
            failure: self.failure.clone(),
            cancel: self.cancel.clone(),
        }
    }
}

impl<W: Workflow> fmt::Debug for StepContext<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepContext")
            .field("workflow", &W::NAME)
            .field("operation", &self.operation)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

/// What a successful act, probe or undo leaves: the state for the next step, and what is to be committed with it.
pub struct Completion<S> {
    pub(crate) state: S,
    pub(crate) tx: Option<PgTransaction<'static>>,
    pub(crate) events: Vec<(Subject, Event)>,
}

impl<S> Completion<S> {
    /// Nothing to commit but the state.
    pub const fn new(state: S) -> Self {
        Self { state, tx: None, events: Vec::new() }
    }

    /// The step's rows, written in `tx` (from `cx.db.begin()`), commit together with the journal entry and the
    /// events, or not at all.
    pub const fn in_tx(state: S, tx: PgTransaction<'static>) -> Self {
        Self { state, tx: Some(tx), events: Vec::new() }
    }

    /// Publishes `event` in the same commit; any number, in order.
    #[must_use]
    pub fn event(mut self, subject: Subject, event: Event) -> Self {
        self.events.push((subject, event));
        self
    }
}

impl<S: fmt::Debug> fmt::Debug for Completion<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Completion")
            .field("state", &self.state)
            .field("in_tx", &self.tx.is_some())
            .field("events", &self.events)
            .finish()
    }
}

/// What a look at the world says about an earlier attempt whose outcome is unknown.
#[derive(Debug)]
pub enum Probe<S> {
    /// It was done; the step counts as completed with this.
    Done(Completion<S>),
    /// It was not, or not wholly: act again.
    NotDone,
}

/// Why a step did not complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// May pass: tried again after a pause, and unwound when the attempts are used up. The text is for operators:
    /// it stands with the step and goes no further.
    #[error("{0}")]
    Transient(String),
    /// Will not pass: the operation unwinds. The error is what the outside sees.
    #[error(transparent)]
    Permanent(ApiError),
}

impl From<ApiError> for StepError {
    fn from(error: ApiError) -> Self {
        Self::Permanent(error)
    }
}

impl From<sqlx::Error> for StepError {
    /// Lost connections, restarts, lock and serialization failures are transient; anything else is a bug of ours,
    /// whose details go to the log and not to the outside.
    fn from(error: sqlx::Error) -> Self {
        if store::is_transient(&error) {
            return Self::Transient(format!("the database: {error}"));
        }
        tracing::error!(error = &error as &dyn std::error::Error, "a step's query failed");
        Self::Permanent(ApiError::new(ErrorCode::Internal, "a query failed; the log has the details"))
    }
}

pub(crate) type Act<W> = Arc<
    dyn Fn(
            StepContext<W>,
            <W as Workflow>::State,
        ) -> BoxFuture<'static, Result<Completion<<W as Workflow>::State>, StepError>>
        + Send
        + Sync,
>;
pub(crate) type Look<W> = Arc<
    dyn Fn(
            StepContext<W>,
            <W as Workflow>::State,
        ) -> BoxFuture<'static, Result<Probe<<W as Workflow>::State>, StepError>>
        + Send
        + Sync,
>;

/// How a step is taken back.
pub(crate) enum Undo<W: Workflow> {
    By(Act<W>),
    NotNeeded,
}

impl<W: Workflow> Clone for Undo<W> {
    fn clone(&self) -> Self {
        match self {
            Self::By(undo) => Self::By(undo.clone()),
            Self::NotNeeded => Self::NotNeeded,
        }
    }
}

/// One step of a workflow: an idempotent act, a look at its effect, and its undo or the reason why none is needed.
pub struct Step<W: Workflow> {
    pub(crate) name: &'static str,
    pub(crate) act: Act<W>,
    pub(crate) probe: Option<Look<W>>,
    pub(crate) undo: Undo<W>,
    pub(crate) retry: Retry,
    pub(crate) pivot: bool,
}

/// A step that has not said yet how it is undone.
pub struct StepDraft<W: Workflow> {
    name: &'static str,
    act: Act<W>,
    probe: Option<Look<W>>,
    retry: Retry,
}

impl<W: Workflow> Step<W> {
    /// A step named `name` (stored; lower snake case) that does `act`. Follow with [`StepDraft::undo`] or
    /// [`StepDraft::no_undo`].
    #[expect(clippy::new_ret_no_self, reason = "a step without an answer to `undo` must not exist")]
    pub fn new<F, Fut>(name: &'static str, act: F) -> StepDraft<W>
    where
        F: Fn(StepContext<W>, W::State) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Completion<W::State>, StepError>> + Send + 'static,
    {
        StepDraft { name, act: boxed(act), probe: None, retry: Retry::default() }
    }

    /// Called before the act whenever the outcome of an earlier attempt is unknown.
    #[must_use]
    pub fn probe<F, Fut>(mut self, probe: F) -> Self
    where
        F: Fn(StepContext<W>, W::State) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Probe<W::State>, StepError>> + Send + 'static,
    {
        self.probe = Some(Arc::new(move |cx, state| Box::pin(probe(cx, state))));
        self
    }

    /// Other pauses after transient errors than [`Retry::default`].
    #[must_use]
    pub const fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// The point of no return: once this step is done nothing is unwound any more. A cancellation comes too late,
    /// and a later step that gives up parks the operation instead of undoing it.
    #[must_use]
    pub const fn pivot(mut self) -> Self {
        self.pivot = true;
        self
    }
}

impl<W: Workflow> StepDraft<W> {
    /// Called before the act whenever the outcome of an earlier attempt is unknown.
    #[must_use]
    pub fn probe<F, Fut>(mut self, probe: F) -> Self
    where
        F: Fn(StepContext<W>, W::State) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Probe<W::State>, StepError>> + Send + 'static,
    {
        self.probe = Some(Arc::new(move |cx, state| Box::pin(probe(cx, state))));
        self
    }

    /// Other pauses after transient errors than [`Retry::default`].
    #[must_use]
    pub const fn retry(mut self, retry: Retry) -> Self {
        self.retry = retry;
        self
    }

    /// Takes the act back; also called when the act's outcome is unknown, so it copes with nothing being there.
    pub fn undo<F, Fut>(self, undo: F) -> Step<W>
    where
        F: Fn(StepContext<W>, W::State) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Completion<W::State>, StepError>> + Send + 'static,
    {
        self.finish(Undo::By(boxed(undo)))
    }

    /// The step leaves nothing that would have to be taken back; `why` says so to the reader.
    pub fn no_undo(self, why: &'static str) -> Step<W> {
        debug_assert!(!why.is_empty(), "step {}: say why it needs no undo", self.name);
        self.finish(Undo::NotNeeded)
    }

    fn finish(self, undo: Undo<W>) -> Step<W> {
        Step { name: self.name, act: self.act, probe: self.probe, undo, retry: self.retry, pivot: false }
    }
}

pub(crate) fn boxed<W, F, Fut>(act: F) -> Act<W>
where
    W: Workflow,
    F: Fn(StepContext<W>, W::State) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = Result<Completion<W::State>, StepError>> + Send + 'static,
{
    Arc::new(move |cx, state| Box::pin(act(cx, state)))
}

impl<W: Workflow> fmt::Debug for Step<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Step")
            .field("name", &self.name)
            .field("probe", &self.probe.is_some())
            .field("undo", &matches!(self.undo, Undo::By(_)))
            .field("retry", &self.retry)
            .field("pivot", &self.pivot)
            .finish_non_exhaustive()
    }
}

impl<W: Workflow> fmt::Debug for StepDraft<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StepDraft").field("name", &self.name).field("retry", &self.retry).finish_non_exhaustive()
    }
}
