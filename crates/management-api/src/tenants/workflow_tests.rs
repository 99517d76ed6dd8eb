//! The provision and the deletion in the hands of the engine's own tests, on real clusters, registry and driver: every
//! step fails, is repeated, dies. The deploy needs built programs; `crates/e2e` crashes it at every boundary.

use super::{
    databases::TenantDatabases,
    delete::DeleteTenant,
    deploy::DeployTenant,
    provision::ProvisionTenant,
    secrets::{self, SecretsError},
    store::{self, NewTenant},
};
use crate::{
    app::{DeployLimits, Infrastructure, Site},
    config::Layout,
    identity::{Role, testing::TestDatabase},
    installation::{open_driver, open_registry},
    seal::Sealer,
};
use std::{sync::Arc, time::Duration};
use systemprompt_compute::AppSpec;
use systemprompt_contract::{
    AccountId, CheckoutId, DeploymentId, ErrorCode, Event, EventId, OperationId, OperationStatus, OperationView,
    Region, Secret, Subject, TenantId, TenantPhase,
};
use systemprompt_postgres::testing::TestCluster;
use systemprompt_workflow::{
    Db, Engine, EngineConfig, NewOperation, StepError, Workflow, enqueue, events, operation,
    testing::{Expected, World, each_step_can_fail_and_unwind, each_step_is_idempotent, survives_restart_at_each_step},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

tokio::task_local! {
    /// What the worlds are made from; the engine's tests make them themselves.
    static RIG: Rig;
}

/// What steps act upon, and somebody who buys tenants.
#[derive(Clone)]
struct Rig {
    infrastructure: Infrastructure,
    account: AccountId,
}

/// Everything that a rig needs to stay.
struct Lab {
    database: TestDatabase,
    rig: Rig,
    _tenants: TestCluster,
    _directory: tempfile::TempDir,
}

impl Lab {
    async fn start() -> Self {
        let database = TestDatabase::start().await;
        let tenants = TestCluster::start_for_tenants().await;
        let directory = tempfile::tempdir().unwrap();
        let layout = Layout::new(directory.path());
        let seal = Arc::new(Sealer::ephemeral());
        let registry = open_registry(&layout, &seal).unwrap();
        let driver = open_driver(&layout, &registry, tenants.cluster().socket_dir(), true).unwrap();
        let admin = Db::connect(&tenants.cluster().url("postgres"), 4).await.unwrap();
        let infrastructure = Infrastructure {
            site: Site { zone: "example.org".parse().unwrap(), https_port: 8443 },
            driver: Arc::new(driver),
            databases: TenantDatabases::new(admin.pool().clone(), Arc::new(tenants.cluster().clone())),
            registry,
            seal,
            limits: DeployLimits {
                healthy_within: Duration::from_secs(1),
                stop_grace: Duration::from_secs(1),
                max_pids: 64,
            },
        };
        let account = database.account("ada@example.com", Role::Member).await.id;
        Self { database, rig: Rig { infrastructure, account }, _tenants: tenants, _directory: directory }
    }

    async fn enqueue<W: Workflow>(&self, subject: Subject, input: &W) -> OperationId {
        let mut tx = self.database.db.begin().await.unwrap();
        let id = enqueue(&mut tx, NewOperation { input, subject, key: "under test" }).await.unwrap().id;
        tx.commit().await.unwrap();
        id
    }

    /// As if these steps had been done already.
    async fn have_done(&self, id: OperationId, steps: &[&str]) {
        sqlx::query(
            "INSERT INTO operation_steps (operation_id, position, name, mark, attempts)
             SELECT $1, place - 1, name, 'done', 0 FROM unnest($2::text[]) WITH ORDINALITY AS step (name, place)",
        )
        .bind(id.uuid())
        .bind(steps)
        .execute(self.database.db.pool())
        .await
        .unwrap();
    }

    /// Runs one operation to its end with an engine of its own.
    async fn run<W: Workflow<Context = Infrastructure>>(&self, id: OperationId) -> OperationView {
        let db = &self.database.db;
        let stop = CancellationToken::new();
        let engine = Engine::new(db.clone(), EngineConfig::default()).register::<W>(self.rig.infrastructure.clone());
        let engine = tokio::spawn(engine.run(stop.clone()));
        let deadline = Instant::now() + Duration::from_mins(1);
        let view = loop {
            let view = operation(db, id).await.unwrap().unwrap();
            if view.status.is_over() {
                break view;
            }
            assert!(Instant::now() < deadline, "it does not end: {view:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        stop.cancel();
        engine.await.unwrap();
        view
    }
}

/// What there is of one tenant.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    phase: Option<TenantPhase>,
    secrets: i64,
    app: bool,
    database: bool,
    routed: bool,
}

/// A tenant that was bought.
struct Bought {
    db: Db,
    rig: Rig,
    tenant: TenantId,
    checkout: CheckoutId,
}

impl Bought {
    async fn new(db: &Db, rig: Rig) -> Self {
        let (tenant, checkout) = (TenantId::new(), CheckoutId::new());
        sqlx::query(
            "INSERT INTO checkouts (id, account_id, price_id, plan_name, memory_mb, volume_gb, region, tenant_name)
             VALUES ($1, $2, 'p', 'Plan', 1, 1, 'iad', 't')",
        )
        .bind(checkout.uuid())
        .bind(rig.account.uuid())
        .execute(db.pool())
        .await
        .unwrap();
        let new = NewTenant {
            id: tenant,
            account: rig.account,
            checkout,
            name: &"t".parse().unwrap(),
            region: Region::Iad,
            memory_mb: 64,
            operation: OperationId::new(),
        };
        let mut tx = db.begin().await.unwrap();
        store::insert(&mut tx, &new).await.unwrap();
        tx.commit().await.unwrap();
        Self { db: db.clone(), rig, tenant, checkout }
    }

    fn provision(&self) -> ProvisionTenant {
        ProvisionTenant { tenant: self.tenant, checkout: self.checkout, name: "t".parse().unwrap() }
    }

    fn deploy(&self) -> DeployTenant {
        DeployTenant { tenant: self.tenant, deployment: DeploymentId::new() }
    }

    /// As the call that deletes leaves it.
    async fn mark_deleted(&self) {
        sqlx::query("UPDATE tenants SET phase = 'deleted', purge_after = now() WHERE id = $1")
            .bind(self.tenant.uuid())
            .execute(self.db.pool())
            .await
            .unwrap();
    }

    async fn found(&self) -> Found {
        let Infrastructure { driver, databases, site, .. } = &self.rig.infrastructure;
        let slug = self.tenant.slug();
        let row = store::tenant(self.db.pool(), self.tenant).await.unwrap();
        let routes: i64 = sqlx::query_scalar("SELECT count(*) FROM routes WHERE host = $1 AND target IS NOT NULL")
            .bind(slug.hostname(&site.zone).as_str())
            .fetch_one(self.db.pool())
            .await
            .unwrap();
        Found {
            phase: row.map(|row| row.phase),
            secrets: sqlx::query_scalar("SELECT count(*) FROM tenant_secrets WHERE tenant_id = $1")
                .bind(self.tenant.uuid())
                .fetch_one(self.db.pool())
                .await
                .unwrap(),
            app: driver.apps().await.unwrap().iter().any(|found| found.app == slug.app_name()),
            database: databases.all().await.unwrap().contains(&slug.database()),
            routed: routes == 1,
        }
    }

    /// What the last event of the tenant's and of the checkout's stream is.
    async fn last_events(&self) -> [String; 2] {
        self.last("event_type").await
    }

    async fn last_messages(&self) -> [String; 2] {
        self.last("message").await
    }

    async fn last(&self, field: &str) -> [String; 2] {
        let mut found = [String::new(), String::new()];
        for (found, subject) in found.iter_mut().zip([Subject::Tenant(self.tenant), Subject::Checkout(self.checkout)]) {
            let log = events::read_after(&self.db, subject, EventId(0), 100).await.unwrap();
            let last = log.last().and_then(|(_, event)| event.as_ref()).map(Event::data).unwrap_or_default();
            let last: serde_json::Value = serde_json::from_str(&last).unwrap_or_default();
            *found = last[field].as_str().unwrap_or("none").to_owned();
        }
        found
    }
}

fn same<T: std::fmt::Debug + PartialEq>(found: &T, expected: &T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("expected {expected:?}, found {found:?}")) }
}

struct Provisioned(Bought);

impl World for Provisioned {
    type Workflow = ProvisionTenant;
    async fn fresh(db: &Db) -> Self {
        Self(Bought::new(db, RIG.with(Clone::clone)).await)
    }
    fn context(&self) -> Infrastructure {
        self.0.rig.infrastructure.clone()
    }
    fn input(&self) -> ProvisionTenant {
        self.0.provision()
    }
    fn subject(&self) -> Subject {
        Subject::Tenant(self.0.tenant)
    }
    async fn check(&self, expected: Expected) -> Result<(), String> {
        let (found, events) = match expected {
            Expected::Done => (
                Found { phase: Some(TenantPhase::AwaitingDeploy), secrets: 3, app: true, database: true, routed: true },
                ["tenant_ready", "infrastructure_ready"],
            ),
            Expected::Undone => (
                Found { phase: Some(TenantPhase::Failed), secrets: 0, app: false, database: false, routed: false },
                ["provisioning_failed", "provisioning_failed"],
            ),
        };
        same(&self.0.found().await, &found)?;
        same(&self.0.last_events().await, &events.map(str::to_owned))
    }
}

struct Purged(Bought);

impl World for Purged {
    type Workflow = DeleteTenant;
    async fn fresh(db: &Db) -> Self {
        let bought = Bought::new(db, RIG.with(Clone::clone)).await;
        let slug = bought.tenant.slug();
        let spec = AppSpec { app: slug.app_name(), tenant: bought.tenant, region: Region::Iad, memory_mb: 64 };
        let Infrastructure { driver, databases, .. } = &bought.rig.infrastructure;
        driver.ensure_app(&spec).await.unwrap();
        databases.ensure(&slug.database(), &Secret::new("password")).await.unwrap();
        assert!(databases.is_complete(&slug.database()).await.unwrap());
        bought.mark_deleted().await;
        Self(bought)
    }
    fn context(&self) -> Infrastructure {
        self.0.rig.infrastructure.clone()
    }
    fn input(&self) -> DeleteTenant {
        DeleteTenant { tenant: self.0.tenant, purge: true }
    }
    fn subject(&self) -> Subject {
        Subject::Tenant(self.0.tenant)
    }
    async fn check(&self, expected: Expected) -> Result<(), String> {
        let there = expected == Expected::Undone;
        let phase = there.then_some(TenantPhase::Deleted);
        same(&self.0.found().await, &Found { phase, secrets: 0, app: there, database: there, routed: false })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_step_of_a_provision_fails_nothing_is_left_and_it_is_said() {
    let lab = Lab::start().await;
    let done = RIG.scope(lab.rig.clone(), each_step_can_fail_and_unwind::<Provisioned>(&lab.database.db)).await;
    done.unwrap_or_else(|report| panic!("{report}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_of_a_provision_can_be_repeated() {
    let lab = Lab::start().await;
    let done = RIG.scope(lab.rig.clone(), each_step_is_idempotent::<Provisioned>(&lab.database.db)).await;
    done.unwrap_or_else(|report| panic!("{report}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provision_survives_restarts() {
    let lab = Lab::start().await;
    let done = RIG.scope(lab.rig.clone(), survives_restart_at_each_step::<Provisioned>(&lab.database.db)).await;
    done.unwrap_or_else(|report| panic!("{report}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_goes_forward_whatever_fails() {
    let lab = Lab::start().await;
    let db = &lab.database.db;
    let all = async {
        each_step_can_fail_and_unwind::<Purged>(db).await?;
        each_step_is_idempotent::<Purged>(db).await?;
        survives_restart_at_each_step::<Purged>(db).await
    };
    RIG.scope(lab.rig.clone(), all).await.unwrap_or_else(|report| panic!("{report}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_does_not_wait_for_what_is_parked() {
    let lab = Lab::start().await;
    let purged = RIG.scope(lab.rig.clone(), Purged::fresh(&lab.database.db)).await;
    let parked = OperationId::new();
    sqlx::query(
        "INSERT INTO operations (id, workflow, key, subject, input, status, failure, parked, parked_unwinding)
         VALUES ($1, 'deploy_tenant', 'parked', $2, '{}', 'stuck', '{\"a\": 1}', '{\"b\": 2}', true)",
    )
    .bind(parked.uuid())
    .bind(purged.subject().to_string())
    .execute(lab.database.db.pool())
    .await
    .unwrap();
    let view = lab.run::<DeleteTenant>(lab.enqueue(purged.subject(), &purged.input()).await).await;
    assert_eq!(view.status, OperationStatus::Succeeded, "{view:?}");
    purged.check(Expected::Done).await.unwrap();
    let parked = operation(&lab.database.db, parked).await.unwrap().unwrap();
    assert_eq!(parked.status, OperationStatus::Failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provision_whose_tenant_is_deleted_ends_and_the_checkout_hears_of_it() {
    let lab = Lab::start().await;
    let bought = Bought::new(&lab.database.db, lab.rig.clone()).await;
    bought.mark_deleted().await;
    let id = lab.enqueue(Subject::Tenant(bought.tenant), &bought.provision()).await;
    let view = lab.run::<ProvisionTenant>(id).await;
    assert_eq!((view.status, view.error.unwrap().code), (OperationStatus::Failed, ErrorCode::Cancelled));
    let left = Found { phase: Some(TenantPhase::Deleted), secrets: 0, app: false, database: false, routed: false };
    assert_eq!(bought.found().await, left);
    assert_eq!(bought.last_events().await, ["none", "provisioning_failed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provision_that_is_parked_says_so_and_can_be_deleted() {
    let lab = Lab::start().await;
    let bought = Bought::new(&lab.database.db, lab.rig.clone()).await;
    let subject = Subject::Tenant(bought.tenant);
    let id = lab.enqueue(subject, &bought.provision()).await;
    lab.have_done(id, &["reserve", "secrets"]).await;
    let failure = r#"{"code": "capacity_exhausted", "message": "there is no room."}"#;
    sqlx::query("UPDATE operations SET status = 'unwinding', failure = $1::jsonb")
        .bind(failure)
        .execute(lab.database.db.pool())
        .await
        .unwrap();
    // An undo that fails, and not in passing.
    sqlx::raw_sql("ALTER TABLE tenant_secrets RENAME TO elsewhere").execute(lab.database.db.pool()).await.unwrap();
    let view = lab.run::<ProvisionTenant>(id).await;
    assert_eq!(view.status, OperationStatus::Stuck, "{view:?}");
    assert_eq!(bought.last_events().await, ["provisioning_failed", "provisioning_failed"]);
    let [said, _] = bought.last_messages().await;
    assert!(said.starts_with("there is no room.") && said.contains("delete"), "{said}");

    sqlx::raw_sql("ALTER TABLE elsewhere RENAME TO tenant_secrets").execute(lab.database.db.pool()).await.unwrap();
    bought.mark_deleted().await;
    let delete = DeleteTenant { tenant: bought.tenant, purge: true };
    let view = lab.run::<DeleteTenant>(lab.enqueue(subject, &delete).await).await;
    assert_eq!((view.status, bought.found().await.phase), (OperationStatus::Succeeded, None));
}

const BEFORE_RETIRE: [&str; 4] = ["verify", "launch", "probe", "switch"];

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_that_is_parked_behind_the_switch_says_what_serves() {
    let lab = Lab::start().await;
    let bought = Bought::new(&lab.database.db, lab.rig.clone()).await;
    let id = lab.enqueue(Subject::Tenant(bought.tenant), &bought.deploy()).await;
    lab.have_done(id, &BEFORE_RETIRE).await;
    sqlx::query(
        "UPDATE operations SET status = 'running', state = '{\"old\": \"old\", \"generation\": 1, \"logs\": []}'",
    )
    .execute(lab.database.db.pool())
    .await
    .unwrap();
    sqlx::raw_sql("ALTER TABLE edges RENAME TO elsewhere").execute(lab.database.db.pool()).await.unwrap();
    let view = lab.run::<DeployTenant>(id).await;
    assert_eq!(view.status, OperationStatus::Stuck, "{view:?}");
    let [said, _] = bought.last_messages().await;
    assert!(said.contains("The new release serves") && said.contains("operator"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deploy_whose_tenant_is_deleted_does_not_say_that_it_is_live() {
    let lab = Lab::start().await;
    let bought = Bought::new(&lab.database.db, lab.rig.clone()).await;
    let id = lab.enqueue(Subject::Tenant(bought.tenant), &bought.deploy()).await;
    lab.have_done(id, &BEFORE_RETIRE).await;
    bought.mark_deleted().await;
    assert_eq!(lab.run::<DeployTenant>(id).await.status, OperationStatus::Succeeded);
    assert_eq!(bought.last_messages().await[0], "the tenant was deleted meanwhile");
}

#[tokio::test]
async fn a_purge_that_failed_is_found_again_and_one_that_runs_is_left_alone() {
    let lab = Lab::start().await;
    let db = &lab.database.db;
    let bought = Bought::new(db, lab.rig.clone()).await;
    bought.mark_deleted().await;
    let workflow = DeleteTenant { tenant: bought.tenant, purge: true };
    let id = lab.enqueue(Subject::Tenant(bought.tenant), &workflow).await;
    sqlx::query("UPDATE tenants SET active_operation = $2 WHERE id = $1")
        .bind(bought.tenant.uuid())
        .bind(id.uuid())
        .execute(db.pool())
        .await
        .unwrap();
    assert!(store::due_for_purge(db.pool()).await.unwrap().is_empty());
    sqlx::query("UPDATE operations SET status = 'failed', failure = '{}', finished_at = now()")
        .execute(db.pool())
        .await
        .unwrap();
    assert_eq!(store::due_for_purge(db.pool()).await.unwrap(), [(bought.tenant, Some(id))]);
}

#[tokio::test]
async fn secrets_behind_a_lock_are_tried_again_and_those_of_another_key_are_not() {
    let lab = Lab::start().await;
    let db = &lab.database.db;
    let bought = Bought::new(db, lab.rig.clone()).await;
    let seal = Sealer::ephemeral();
    let mut locking = db.begin().await.unwrap();
    sqlx::query("LOCK TABLE tenant_secrets IN ACCESS EXCLUSIVE MODE").execute(&mut *locking).await.unwrap();
    let mut tx = db.begin().await.unwrap();
    sqlx::query("SET LOCAL lock_timeout = '50ms'").execute(&mut *tx).await.unwrap();
    let error: StepError = secrets::generate(&mut tx, &seal, bought.tenant).await.unwrap_err().into();
    assert!(matches!(error, StepError::Transient(_)), "{error:?}");
    drop((tx, locking));

    let mut tx = db.begin().await.unwrap();
    secrets::generate(&mut tx, &seal, bought.tenant).await.unwrap();
    tx.commit().await.unwrap();
    let error = secrets::open_all(db.pool(), &Sealer::ephemeral(), bought.tenant).await.unwrap_err();
    assert!(matches!(error, SecretsError::Sealed(_)), "{error:?}");
    assert!(matches!(StepError::from(error), StepError::Permanent(_)));
}
