//! Helpers that break, repeat and restart the steps of a workflow.
//!
//! They run the real engine with altered steps on a real database, once for each step, and let the caller look at
//! the world afterwards. Give them a database of their own: their engine takes whatever of the workflow is queued.

use crate::{
    Db, Engine, EngineConfig, NewOperation, Step, StepError, Workflow, enqueue, operation, release_leases, retry_stuck,
    step::{Undo, boxed},
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use systemprompt_contract::{ApiError, ErrorCode, OperationId, OperationStatus, OperationView, Subject};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The name of the helpers' engines.
const WORKER: &str = "testing";
/// How long one operation may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// What a workflow acts upon in a test. Each case gets a fresh one.
pub trait World: Send + Sync + Sized {
    /// The workflow under test.
    type Workflow: Workflow;
    /// A world in which nothing has happened yet.
    fn fresh(db: &Db) -> impl Future<Output = Self> + Send;
    /// What the engine hands to the steps; asked for again after each restart.
    fn context(&self) -> <Self::Workflow as Workflow>::Context;
    /// What is enqueued.
    fn input(&self) -> Self::Workflow;
    /// Whose operation it is.
    fn subject(&self) -> Subject;
    /// Looks whether everything, or nothing, of the operation is there; says what is wrong.
    fn check(&self, expected: Expected) -> impl Future<Output = Result<(), String>> + Send;
}

/// What a world must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// All steps took effect, each once.
    Done,
    /// Nothing is left of any step.
    Undone,
}

/// What was found wrong, case by case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Which workflow.
    pub workflow: &'static str,
    /// One line for each case that went wrong.
    pub failures: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "workflow {}:", self.workflow)?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "- {failure}"))
    }
}

impl std::error::Error for Report {}

/// Every step fails once before and once after it acted: nothing may be left. Behind the pivot the operation is
/// parked instead, and comes through once it is resumed.
///
/// # Errors
/// The cases that went wrong.
pub async fn each_step_can_fail_and_unwind<S: World>(db: &Db) -> Result<(), Report> {
    let mut cases = Cases::<S>::new(db);
    for index in 0..count::<S>() {
        for when in [When::Before, When::After] {
            let broken = altered::<S>(|steps| steps[index] = failing(&steps[index], when));
            let name = format!("step {} fails {when:?} acting", name_of::<S>(index));
            if index > last_undoable::<S>() {
                cases.run(name, |world| parks_and_comes_through(db, world, broken)).await;
            } else {
                cases.run(name, |world| ends(db, world, broken, Expected::Undone)).await;
            }
        }
    }
    cases.report()
}

/// Every act is done twice, then every undo: the second time must change nothing. What a step commits in the
/// engine's transaction is committed once, for so it is in life.
///
/// # Errors
/// The cases that went wrong.
pub async fn each_step_is_idempotent<S: World>(db: &Db) -> Result<(), Report> {
    let mut cases = Cases::<S>::new(db);
    for index in 0..count::<S>() {
        let name = name_of::<S>(index);
        let twice = altered::<S>(|steps| steps[index].act = doubled(&steps[index].act));
        cases.run(format!("step {name} acts twice"), |world| ends(db, world, twice, Expected::Done)).await;
        if index > last_undoable::<S>() {
            continue;
        }
        let twice = altered::<S>(|steps| {
            let last = last_undoable::<S>();
            steps[last] = failing(&steps[last], When::After);
            if let Undo::By(undo) = &steps[index].undo {
                steps[index].undo = Undo::By(doubled(undo));
            }
        });
        cases.run(format!("step {name} is undone twice"), |world| ends(db, world, twice, Expected::Undone)).await;
    }
    cases.report()
}

/// The engine dies before, inside and after every act and every undo; another one takes over and comes to the end.
///
/// # Errors
/// The cases that went wrong.
pub async fn survives_restart_at_each_step<S: World>(db: &Db) -> Result<(), Report> {
    let mut cases = Cases::<S>::new(db);
    for index in 0..count::<S>() {
        let name = name_of::<S>(index);
        for moment in [Moment::Before, Moment::After, Moment::Committed] {
            let restart = Restart { index, moment, side: Side::Act };
            cases.run(format!("dies {moment:?} the act of {name}"), |world| restarts(db, world, restart)).await;
            if index <= last_undoable::<S>() && matches!(S::Workflow::steps()[index].undo, Undo::By(_)) {
                let restart = Restart { side: Side::Undo, ..restart };
                cases.run(format!("dies {moment:?} the undo of {name}"), |world| restarts(db, world, restart)).await;
            }
        }
    }
    cases.report()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Before,
    After,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The intent is committed, nothing is done.
    Before,
    /// It is done, nothing is committed.
    After,
    /// It is done and committed; the next step has not begun.
    Committed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Act,
    Undo,
}

#[derive(Debug, Clone, Copy)]
struct Restart {
    index: usize,
    moment: Moment,
    side: Side,
}

/// Runs cases and collects what went wrong.
struct Cases<'a, S: World> {
    db: &'a Db,
    failures: Vec<String>,
    world: std::marker::PhantomData<fn() -> S>,
}

impl<'a, S: World> Cases<'a, S> {
    const fn new(db: &'a Db) -> Self {
        Self { db, failures: Vec::new(), world: std::marker::PhantomData }
    }

    async fn run<F, Fut>(&mut self, name: String, case: F)
    where
        F: FnOnce(Arc<S>) -> Fut,
        Fut: Future<Output = Result<(), String>>,
    {
        let world = Arc::new(S::fresh(self.db).await);
        if let Err(failure) = case(world).await {
            self.failures.push(format!("{name}: {failure}"));
        }
    }

    fn report(self) -> Result<(), Report> {
        if self.failures.is_empty() {
            return Ok(());
        }
        Err(Report { workflow: S::Workflow::NAME, failures: self.failures })
    }
}

async fn ends<S: World>(
    db: &Db,
    world: Arc<S>,
    steps: Vec<Step<S::Workflow>>,
    expected: Expected,
) -> Result<(), String> {
    let id = ask(db, &*world).await?;
    let view = Running::start(db, &*world, steps).until_over(db, id).await?;
    judge(&*world, &view, expected).await
}

async fn parks_and_comes_through<S: World>(
    db: &Db,
    world: Arc<S>,
    broken: Vec<Step<S::Workflow>>,
) -> Result<(), String> {
    let id = ask(db, &*world).await?;
    let view = Running::start(db, &*world, broken).until_over(db, id).await?;
    if view.status != OperationStatus::Stuck {
        return Err(format!("expected it to be parked behind the pivot, it is {}", describe(&view)));
    }
    retry_stuck(db, id).await.map_err(|error| error.to_string())?;
    let view = Running::start(db, &*world, S::Workflow::steps()).until_over(db, id).await?;
    judge(&*world, &view, Expected::Done).await
}

async fn restarts<S: World>(db: &Db, world: Arc<S>, restart: Restart) -> Result<(), String> {
    let Restart { index, moment, side } = restart;
    let (halt, stop) = (Arc::new(Halt::default()), CancellationToken::new());
    let unwinding = |steps: &mut Vec<Step<S::Workflow>>| {
        let last = last_undoable::<S>();
        if side == Side::Undo {
            steps[last] = failing(&steps[last], When::After);
        }
    };
    let dying = altered::<S>(|steps| {
        unwinding(steps);
        let step = &mut steps[index];
        match (&step.undo, side) {
            (_, Side::Act) => step.act = halted(&step.act, moment, &halt, &stop),
            (Undo::By(undo), Side::Undo) => step.undo = Undo::By(halted(undo, moment, &halt, &stop)),
            (Undo::NotNeeded, Side::Undo) => {}
        }
    });
    let id = ask(db, &*world).await?;
    let running = Running::start_with(db, &*world, dying, stop);
    let reached = tokio::time::timeout(PATIENCE, halt.reached.notified()).await;
    if reached.is_err() {
        return Err("the step was never reached".to_owned());
    }
    match moment {
        Moment::Before | Moment::After => running.crash(db).await?,
        Moment::Committed => running.ended().await?,
    }
    let second = altered::<S>(unwinding);
    let view = Running::start(db, &*world, second).until_over(db, id).await?;
    let expected = match side {
        Side::Act => Expected::Done,
        Side::Undo => Expected::Undone,
    };
    judge(&*world, &view, expected).await
}

async fn ask<S: World>(db: &Db, world: &S) -> Result<OperationId, String> {
    let (input, key) = (world.input(), OperationId::new().to_string());
    let mut tx = db.begin().await.map_err(|error| error.to_string())?;
    let new = NewOperation { input: &input, subject: world.subject(), key: &key };
    let enqueued = enqueue(&mut tx, new).await.map_err(|error| error.to_string())?;
    tx.commit().await.map_err(|error| error.to_string())?;
    Ok(enqueued.id)
}

async fn judge<S: World>(world: &S, view: &OperationView, expected: Expected) -> Result<(), String> {
    let wanted = match expected {
        Expected::Done => OperationStatus::Succeeded,
        Expected::Undone => OperationStatus::Failed,
    };
    if view.status != wanted {
        return Err(format!("expected it to end as {}, it is {}", wanted.as_str(), describe(view)));
    }
    world.check(expected).await
}

fn describe(view: &OperationView) -> String {
    let error = view.error.as_ref().map_or_else(String::new, |error| format!(" ({error})"));
    format!("{} at step {}{error}", view.status.as_str(), view.step.as_deref().unwrap_or("none"))
}

/// An engine at work in a task of its own.
struct Running {
    task: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
}

impl Running {
    fn start<S: World>(db: &Db, world: &S, steps: Vec<Step<S::Workflow>>) -> Self {
        Self::start_with(db, world, steps, CancellationToken::new())
    }

    fn start_with<S: World>(db: &Db, world: &S, steps: Vec<Step<S::Workflow>>, stop: CancellationToken) -> Self {
        let config = EngineConfig {
            poll: Duration::from_millis(100),
            // Short, should a claim that was under way at a crash still come in.
            lease: Duration::from_secs(2),
            heartbeat: Duration::from_millis(500),
            ..EngineConfig::new(WORKER)
        };
        let engine = Engine::new(db.clone(), config).register_steps::<S::Workflow>(world.context(), steps);
        Self { task: tokio::spawn(engine.run(stop.clone())), stop }
    }

    async fn until_over(self, db: &Db, id: OperationId) -> Result<OperationView, String> {
        let deadline = Instant::now() + PATIENCE;
        let view = loop {
            match operation(db, id).await {
                Ok(Some(view)) if view.status.is_over() => break view,
                Ok(Some(view)) if Instant::now() > deadline => {
                    return Err(format!("it does not come to an end, it is {}", describe(&view)));
                }
                Ok(None) => return Err("the operation is gone".to_owned()),
                Err(error) if Instant::now() > deadline => return Err(error.to_string()),
                Ok(Some(_)) | Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        };
        self.stop.cancel();
        self.ended().await?;
        Ok(view)
    }

    async fn ended(self) -> Result<(), String> {
        let ended = tokio::time::timeout(PATIENCE, self.task).await;
        ended.map_err(|_| "the engine does not stop".to_owned())?.map_err(|error| error.to_string())
    }

    /// As a SIGKILL would, and the lease's time passes at once.
    async fn crash(self, db: &Db) -> Result<(), String> {
        self.task.abort();
        let _ = self.task.await;
        // Not by its deadline: a heartbeat that was under way may still come in and push that.
        release_leases(db, WORKER).await.map_err(|error| error.to_string())?;
        Ok(())
    }
}

fn count<S: World>() -> usize {
    S::Workflow::steps().len()
}

fn name_of<S: World>(index: usize) -> &'static str {
    S::Workflow::steps()[index].name
}

/// The last step whose failure unwinds: the first pivot, or the last step of all.
fn last_undoable<S: World>() -> usize {
    let steps = S::Workflow::steps();
    steps.iter().position(|step| step.pivot).unwrap_or(steps.len() - 1)
}

fn altered<S: World>(alter: impl FnOnce(&mut Vec<Step<S::Workflow>>)) -> Vec<Step<S::Workflow>> {
    let mut steps = S::Workflow::steps();
    alter(&mut steps);
    steps
}

fn failing<W: Workflow>(step: &Step<W>, when: When) -> Step<W> {
    let act = step.act.clone();
    let broken = boxed(move |cx, state| {
        let act = act.clone();
        async move {
            if when == When::After {
                drop(act(cx, state).await?);
            }
            Err(StepError::Permanent(ApiError::new(ErrorCode::Internal, "broken on purpose")))
        }
    });
    Step { act: broken, name: step.name, probe: None, undo: step.undo.clone(), retry: step.retry, pivot: step.pivot }
}

fn doubled<W: Workflow>(act: &crate::step::Act<W>) -> crate::step::Act<W> {
    let act = act.clone();
    boxed(move |cx, state| {
        let act = act.clone();
        async move {
            drop(act(cx.clone(), state.clone()).await?);
            act(cx, state).await
        }
    })
}

#[derive(Default)]
struct Halt {
    reached: Notify,
    used: AtomicBool,
}

fn halted<W: Workflow>(
    act: &crate::step::Act<W>,
    moment: Moment,
    halt: &Arc<Halt>,
    stop: &CancellationToken,
) -> crate::step::Act<W> {
    let (act, halt, stop) = (act.clone(), halt.clone(), stop.clone());
    boxed(move |cx, state| {
        let (act, halt, stop) = (act.clone(), halt.clone(), stop.clone());
        async move {
            if halt.used.swap(true, Ordering::SeqCst) {
                return act(cx, state).await;
            }
            if moment == Moment::Committed {
                let completion = act(cx, state).await?;
                stop.cancel();
                halt.reached.notify_one();
                return Ok(completion);
            }
            if moment == Moment::After {
                drop(act(cx, state).await?);
            }
            halt.reached.notify_one();
            std::future::pending().await
        }
    })
}
