//! The helpers pass what is right and catch what is wrong.

use crate::lab::{Build, Built, FAST, Lab, MAKE, Site, UNMAKE, outside, subject};
use serde::{Deserialize, Serialize};
use std::{
    marker::PhantomData,
    sync::atomic::{AtomicI64, Ordering},
};
use systemprompt_contract::{OperationId, Subject};
use systemprompt_workflow::{
    Completion, Db, Step, StepContext, StepError, Workflow,
    testing::{
        Expected, Report, World, each_step_can_fail_and_unwind, each_step_is_idempotent, survives_restart_at_each_step,
    },
};

/// A world is the rows of `effects` that came after it began; `W` says which names belong there.
struct Effects<W> {
    db: Db,
    before: i64,
    workflow: PhantomData<fn() -> W>,
}

trait Named {
    const NAMES: &'static [&'static str];
    fn new() -> Self;
}

static SEEN: AtomicI64 = AtomicI64::new(0);

impl<W: Workflow<Context = Site> + Named> World for Effects<W> {
    type Workflow = W;
    async fn fresh(db: &Db) -> Self {
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(db.pool()).await.unwrap();
        SEEN.fetch_add(1, Ordering::SeqCst);
        Self { db: db.clone(), before: rows, workflow: PhantomData }
    }
    fn context(&self) -> Site {
        Site::quiet(&self.db)
    }
    fn input(&self) -> W {
        W::new()
    }
    fn subject(&self) -> Subject {
        subject()
    }
    async fn check(&self, expected: Expected) -> Result<(), String> {
        let rows: i64 = sqlx::query_scalar("SELECT count(*) FROM effects").fetch_one(self.db.pool()).await.unwrap();
        let wanted = match expected {
            Expected::Done => self.before + i64::try_from(W::NAMES.len()).unwrap(),
            Expected::Undone => self.before,
        };
        if rows == wanted { Ok(()) } else { Err(format!("expected {wanted} effects, found {rows}")) }
    }
}

impl Named for Build {
    const NAMES: &'static [&'static str] = &["one", "two", "three"];
    fn new() -> Self {
        Self {}
    }
}

async fn all<W: Workflow<Context = Site> + Named>(lab: &Lab) -> [Result<(), Report>; 3] {
    [
        each_step_can_fail_and_unwind::<Effects<W>>(&lab.db).await,
        each_step_is_idempotent::<Effects<W>>(&lab.db).await,
        survives_restart_at_each_step::<Effects<W>>(&lab.db).await,
    ]
}

#[tokio::test]
async fn a_sound_workflow_passes() {
    let lab = Lab::new().await;
    for result in all::<Build>(&lab).await {
        result.unwrap_or_else(|report| panic!("{report}"));
    }
    // Each case had a world of its own: 8 failures, 4 + 4 repetitions, 12 + 9 restarts.
    assert_eq!(SEEN.load(Ordering::SeqCst), 37);
}

#[tokio::test]
async fn a_sound_workflow_with_a_pivot_passes() {
    let lab = Lab::new().await;
    for result in all::<Pivoted>(&lab).await {
        result.unwrap_or_else(|report| panic!("{report}"));
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pivoted {}

impl Named for Pivoted {
    const NAMES: &'static [&'static str] = &["pack", "pay", "ship"];
    fn new() -> Self {
        Self {}
    }
}

impl Workflow for Pivoted {
    const NAME: &'static str = "pivoted";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        vec![outside("pack").retry(FAST), outside("pay").retry(FAST).pivot(), outside("ship").retry(FAST)]
    }
}

type Outcome = Result<Completion<Built>, StepError>;

/// Forgets to take `b` back.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Forgetful {}

impl Named for Forgetful {
    const NAMES: &'static [&'static str] = &["a", "b"];
    fn new() -> Self {
        Self {}
    }
}

impl Workflow for Forgetful {
    const NAME: &'static str = "forgetful";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        async fn make(cx: StepContext<Forgetful>, state: Built) -> Outcome {
            sqlx::query(MAKE).bind(cx.operation.uuid()).bind("b").execute(&cx.app.pool).await?;
            Ok(Completion::new(state))
        }
        vec![outside("a").retry(FAST), Step::new("b", make).retry(FAST).no_undo("wrong: it leaves b")]
    }
}

#[tokio::test]
async fn a_missing_undo_is_caught() {
    let lab = Lab::new().await;
    let [unwinds, _, _] = all::<Forgetful>(&lab).await;
    let report = unwinds.unwrap_err();
    assert_eq!(report.workflow, "forgetful");
    assert_eq!(report.failures.len(), 1, "{report}");
    assert!(report.failures[0].starts_with("step b fails After acting: expected "), "{report}");
}

/// Makes a new thing with every attempt.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Wasteful {}

impl Named for Wasteful {
    const NAMES: &'static [&'static str] = &["a"];
    fn new() -> Self {
        Self {}
    }
}

impl Workflow for Wasteful {
    const NAME: &'static str = "wasteful";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        async fn make(cx: StepContext<Wasteful>, mut state: Built) -> Outcome {
            let name = OperationId::new().to_string();
            sqlx::query(MAKE).bind(cx.operation.uuid()).bind(&name).execute(&cx.app.pool).await?;
            state.push(name);
            Ok(Completion::new(state))
        }
        async fn unmake(cx: StepContext<Wasteful>, state: Built) -> Outcome {
            for name in &state {
                sqlx::query(UNMAKE).bind(cx.operation.uuid()).bind(name).execute(&cx.app.pool).await?;
            }
            Ok(Completion::new(state))
        }
        vec![Step::new("a", make).retry(FAST).undo(unmake)]
    }
}

#[tokio::test]
async fn an_act_that_is_not_idempotent_is_caught() {
    let lab = Lab::new().await;
    let [unwinds, repeats, restarts] = all::<Wasteful>(&lab).await;
    assert!(unwinds.unwrap_err().failures[0].contains("fails After"));
    assert!(repeats.unwrap_err().failures[0].starts_with("step a acts twice"));
    let report = restarts.unwrap_err();
    assert!(report.to_string().contains("dies After the act of a"), "{report}");
}

/// Its undo insists that there is something to undo.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Insisting {}

impl Named for Insisting {
    const NAMES: &'static [&'static str] = &["a"];
    fn new() -> Self {
        Self {}
    }
}

impl Workflow for Insisting {
    const NAME: &'static str = "insisting";
    type Context = Site;
    type State = Built;
    fn steps() -> Vec<Step<Self>> {
        async fn make(cx: StepContext<Insisting>, state: Built) -> Outcome {
            sqlx::query(MAKE).bind(cx.operation.uuid()).bind("a").execute(&cx.app.pool).await?;
            Ok(Completion::new(state))
        }
        async fn unmake(cx: StepContext<Insisting>, state: Built) -> Outcome {
            let done = sqlx::query(UNMAKE).bind(cx.operation.uuid()).bind("a").execute(&cx.app.pool).await?;
            if done.rows_affected() == 0 {
                return Err(crate::lab::permanent("there is no a"));
            }
            Ok(Completion::new(state))
        }
        vec![Step::new("a", make).retry(FAST).undo(unmake)]
    }
}

#[tokio::test]
async fn an_undo_that_does_not_cope_with_nothing_is_caught() {
    let lab = Lab::new().await;
    let [unwinds, repeats, restarts] = all::<Insisting>(&lab).await;
    let report = unwinds.unwrap_err();
    assert!(
        report.to_string().contains("step a fails Before acting: expected it to end as failed, it is stuck"),
        "{report}"
    );
    assert!(repeats.unwrap_err().to_string().contains("step a is undone twice"));
    assert!(restarts.unwrap_err().to_string().contains("dies After the undo of a"));
}
