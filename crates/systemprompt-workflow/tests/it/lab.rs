//! A database, a workflow that builds something outside of the engine's transactions, and workers.

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use systemprompt_contract::{
    ApiError, CheckoutId, DeploymentEvent, DeploymentId, DeploymentState, DeploymentStep, ErrorCode, Event,
    OperationId, OperationStatus, OperationView, Subject, TenantId,
};
use systemprompt_postgres::testing::TestCluster;
use systemprompt_workflow::{
    Completion, Db, Engine, EngineConfig, NewOperation, Probe, Retry, Step, StepContext, StepError, Workflow,
    crash_point, enqueue, operation,
};
use tokio_util::sync::CancellationToken;

pub(crate) const FAST: Retry =
    Retry { attempts: 3, first: Duration::from_millis(20), max: Duration::from_millis(100), jitter: 0.0 };

/// A cluster with the engine's tables and `effects`, the world that steps change.
pub(crate) struct Lab {
    pub(crate) cluster: TestCluster,
    pub(crate) url: String,
    pub(crate) db: Db,
}

impl Lab {
    pub(crate) async fn new() -> Self {
        let cluster = TestCluster::start().await;
        let url = cluster.create_database().await;
        let db = Db::connect(&url, 10).await.unwrap();
        sqlx::raw_sql(include_str!("../../../../migrations/0001_workflow.sql")).execute(db.pool()).await.unwrap();
        sqlx::raw_sql("CREATE TABLE effects (operation uuid, name text, PRIMARY KEY (operation, name))")
            .execute(db.pool())
            .await
            .unwrap();
        Self { cluster, url, db }
    }

    pub(crate) async fn enqueue<W: Workflow>(&self, input: &W) -> OperationId {
        let key = OperationId::new().to_string();
        let mut tx = self.db.begin().await.unwrap();
        let new = NewOperation { input, subject: subject(), key: &key };
        let enqueued = enqueue(&mut tx, new).await.unwrap();
        tx.commit().await.unwrap();
        enqueued.id
    }

    pub(crate) async fn view(&self, id: OperationId) -> OperationView {
        operation(&self.db, id).await.unwrap().unwrap()
    }

    pub(crate) async fn until_over(&self, id: OperationId) -> OperationView {
        self.until(id, |view| view.status.is_over()).await
    }

    pub(crate) async fn until(&self, id: OperationId, wanted: impl Fn(&OperationView) -> bool) -> OperationView {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut last = None;
        while Instant::now() < deadline {
            // The database may be down for a while: some tests kill it.
            if let Ok(Some(view)) = operation(&self.db, id).await {
                if wanted(&view) {
                    return view;
                }
                last = Some(view);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("waited too long, it is {last:?}");
    }

    pub(crate) async fn effects(&self, id: OperationId) -> Vec<String> {
        sqlx::query_scalar("SELECT name FROM effects WHERE operation = $1 ORDER BY name")
            .bind(id.uuid())
            .fetch_all(self.db.pool())
            .await
            .unwrap()
    }

    /// Name, mark and attempts of the stored steps.
    pub(crate) async fn journal(&self, id: OperationId) -> Vec<String> {
        sqlx::query_scalar(
            "SELECT name || ' ' || mark || ' ' || attempts FROM operation_steps WHERE operation_id = $1 ORDER BY position",
        )
        .bind(id.uuid())
        .fetch_all(self.db.pool())
        .await
        .unwrap()
    }
}

pub(crate) async fn wait_until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done().await {
        assert!(Instant::now() < deadline, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn subject() -> Subject {
    Subject::Tenant("999bc654-9a64-49bc-98be-db976fc84e76".parse::<TenantId>().unwrap())
}

pub(crate) fn other_subject() -> Subject {
    Subject::Checkout("1f0c2a94-7f0f-4b8c-9a55-0c1d4f3f9c11".parse::<CheckoutId>().unwrap())
}

pub(crate) fn event(message: &str) -> Event {
    Event::Deployment(DeploymentEvent {
        operation_id: OperationId::from_uuid(uuid::Uuid::nil()),
        deployment_id: DeploymentId::from_uuid(uuid::Uuid::nil()),
        step: DeploymentStep::Launch,
        state: DeploymentState::Running,
        message: message.to_owned(),
        app_url: String::new(),
        error: None,
        logs: Vec::new(),
    })
}

pub(crate) fn message(event: &Event) -> String {
    match event {
        Event::Deployment(event) => event.message.clone(),
        Event::Provisioning(event) => panic!("unexpected {event:?}"),
    }
}

/// What a hook is told about the call it may disturb.
pub(crate) struct Call {
    pub(crate) what: String,
    pub(crate) attempt: u32,
    pub(crate) cancel: CancellationToken,
    pub(crate) operation: OperationId,
}

type Hook = Arc<dyn Fn(Call) -> BoxFuture<'static, Result<(), StepError>> + Send + Sync>;

/// What the steps act upon: the table `effects`, a list of what was called, and a hook that may fail or wait.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) pool: PgPool,
    pub(crate) calls: Arc<Mutex<Vec<String>>>,
    hook: Hook,
}

impl Site {
    pub(crate) fn quiet(db: &Db) -> Self {
        Self::hooked(db, |_| async { Ok(()) })
    }

    /// The hook runs after the call is noted and before it takes effect.
    pub(crate) fn hooked<F, Fut>(db: &Db, hook: F) -> Self
    where
        F: Fn(Call) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<(), StepError>> + Send + 'static,
    {
        let hook: Hook = Arc::new(move |call| Box::pin(hook(call)));
        Self { pool: db.pool().clone(), calls: Arc::default(), hook }
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    async fn call<W: Workflow>(&self, what: String, cx: &StepContext<W>) -> Result<(), StepError> {
        self.calls.lock().unwrap().push(what.clone());
        let call = Call { what, attempt: cx.attempt, cancel: cx.cancel.clone(), operation: cx.operation };
        (self.hook)(call).await
    }
}

pub(crate) fn permanent(text: &str) -> StepError {
    StepError::Permanent(ApiError::new(ErrorCode::AppUnhealthy, text))
}

pub(crate) const MAKE: &str = "INSERT INTO effects VALUES ($1, $2) ON CONFLICT DO NOTHING";
pub(crate) const UNMAKE: &str = "DELETE FROM effects WHERE operation = $1 AND name = $2";

/// Four steps: two outside of PostgreSQL as far as the engine knows, the second with a probe; one in the engine's
/// transaction; one that needs no undo and reports.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Build {}

/// Names of the steps that are done.
pub(crate) type Built = Vec<String>;

impl Workflow for Build {
    const NAME: &'static str = "build";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        vec![
            outside("one").retry(FAST),
            outside("two").probe(look).retry(FAST),
            Step::new("three", make_inside).retry(FAST).undo(unmake_inside),
            Step::new("four", report).retry(FAST).no_undo("it only reports"),
        ]
    }
    fn parked(cx: &StepContext<Self>, _: &Built, _: &ApiError) -> Vec<(Subject, Event)> {
        let heading = if cx.failure.is_some() { "unwinding" } else { "forward" };
        vec![(subject(), event(&format!("parked, {heading}")))]
    }
}

pub(crate) fn outside<W: Workflow<Context = Site, State = Built>>(name: &'static str) -> Step<W> {
    Step::new(name, move |cx, state| make_outside(name, cx, state))
        .undo(move |cx, state| unmake_outside(name, cx, state))
}

type Outcome = Result<Completion<Built>, StepError>;

async fn make_outside<W: Workflow<Context = Site, State = Built>>(
    name: &'static str,
    cx: StepContext<W>,
    mut state: Built,
) -> Outcome {
    cx.app.call(format!("act {name}"), &cx).await?;
    crash_point(&format!("{}.{name}.inside", W::NAME));
    sqlx::query(MAKE).bind(cx.operation.uuid()).bind(name).execute(&cx.app.pool).await?;
    state.push(name.to_owned());
    Ok(Completion::new(state))
}

async fn unmake_outside<W: Workflow<Context = Site, State = Built>>(
    name: &'static str,
    cx: StepContext<W>,
    mut state: Built,
) -> Outcome {
    cx.app.call(format!("undo {name}"), &cx).await?;
    crash_point(&format!("{}.{name}.undo_inside", W::NAME));
    sqlx::query(UNMAKE).bind(cx.operation.uuid()).bind(name).execute(&cx.app.pool).await?;
    state.retain(|done| done != name);
    Ok(Completion::new(state))
}

async fn look(cx: StepContext<Build>, mut state: Built) -> Result<Probe<Built>, StepError> {
    cx.app.call("probe two".to_owned(), &cx).await?;
    let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT 1 FROM effects WHERE operation = $1 AND name = 'two')")
        .bind(cx.operation.uuid())
        .fetch_one(&cx.app.pool)
        .await?;
    if !there {
        return Ok(Probe::NotDone);
    }
    state.push("two".to_owned());
    Ok(Probe::Done(Completion::new(state)))
}

async fn make_inside(cx: StepContext<Build>, mut state: Built) -> Outcome {
    let mut tx = cx.db.begin().await?;
    // Without ON CONFLICT: a second commit of this step would fail.
    sqlx::query("INSERT INTO effects VALUES ($1, 'three')").bind(cx.operation.uuid()).execute(&mut *tx).await?;
    cx.app.call("act three".to_owned(), &cx).await?;
    state.push("three".to_owned());
    Ok(Completion::in_tx(state, tx).event(subject(), event("three is made")))
}

async fn unmake_inside(cx: StepContext<Build>, mut state: Built) -> Outcome {
    cx.app.call("undo three".to_owned(), &cx).await?;
    let mut tx = cx.db.begin().await?;
    sqlx::query(UNMAKE).bind(cx.operation.uuid()).bind("three").execute(&mut *tx).await?;
    state.retain(|done| done != "three");
    Ok(Completion::in_tx(state, tx).event(subject(), event("three is gone")))
}

async fn report(cx: StepContext<Build>, state: Built) -> Outcome {
    cx.app.call("act four".to_owned(), &cx).await?;
    crash_point("build.four.inside");
    if state != ["one", "two", "three"] {
        return Err(permanent(&format!("the state is {state:?}")));
    }
    Ok(Completion::new(state).event(subject(), event("all is made")))
}

/// An engine at work; stops when told, or as if killed when dropped.
pub(crate) struct Worker {
    task: tokio::task::JoinHandle<()>,
    stop: CancellationToken,
}

pub(crate) fn config(worker_id: &str) -> EngineConfig {
    EngineConfig {
        worker_id: worker_id.to_owned(),
        lease: Duration::from_secs(2),
        heartbeat: Duration::from_millis(500),
        concurrency: 8,
        poll: Duration::from_millis(200),
    }
}

impl Worker {
    pub(crate) fn start<W: Workflow>(db: &Db, context: W::Context) -> Self {
        Self::start_with::<W>(db, context, config("worker"))
    }

    pub(crate) fn start_with<W: Workflow>(db: &Db, context: W::Context, config: EngineConfig) -> Self {
        Self::run(Engine::new(db.clone(), config).register::<W>(context))
    }

    pub(crate) fn run(engine: Engine) -> Self {
        let stop = CancellationToken::new();
        Self { task: tokio::spawn(engine.run(stop.clone())), stop }
    }

    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        tokio::time::timeout(Duration::from_secs(20), &mut self.task).await.expect("the engine stops").unwrap();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn is(status: OperationStatus) -> impl Fn(&OperationView) -> bool {
    move |view| view.status == status
}
