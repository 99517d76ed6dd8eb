//! A worker dies by SIGKILL at every point of every step; another one takes over and comes to the same end.

use crate::lab::{Build, Lab, Site, Worker, config, permanent, wait_until};
use std::{
    os::unix::process::ExitStatusExt,
    process::{Command, Stdio},
    time::Duration,
};
use systemprompt_contract::{OperationId, OperationStatus};
use systemprompt_workflow::{Db, Engine, release_leases};
use tokio_util::sync::CancellationToken;

const CHILD: &str = "SYSTEMPROMPT_TEST_CHILD";
const BREAK: &str = "SYSTEMPROMPT_TEST_BREAK";

/// Step four fails when the test wants to see the way back.
fn site(db: &Db, breaks: bool) -> Site {
    Site::hooked(db, move |call| async move {
        if breaks && call.what == "act four" { Err(permanent("broken on purpose")) } else { Ok(()) }
    })
}

/// In a child: a worker that runs until it is killed.
async fn work_if_child() {
    let Ok(url) = std::env::var(CHILD) else { return };
    let db = Db::connect(&url, 5).await.unwrap();
    let site = site(&db, std::env::var_os(BREAK).is_some());
    let mut config = config("child");
    // Long, so that nothing but its death and our hand ends the lease.
    config.lease = Duration::from_hours(1);
    Engine::new(db, config).register::<Build>(site).run(CancellationToken::new()).await;
    unreachable!("nobody stops the child's engine");
}

fn child(test: &str, lab: &Lab, point: &str, breaks: bool) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, &lab.url)
        .env("SYSTEMPROMPT_CRASH_POINT", point)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    if breaks {
        command.env(BREAK, "1");
    }
    command
}

async fn die_at(test: &str, lab: &Lab, point: &str, breaks: bool) -> OperationId {
    let id = lab.enqueue(&Build {}).await;
    let mut command = child(test, lab, point, breaks);
    let status = tokio::task::spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if std::time::Instant::now() > deadline {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("the child never came to its end");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    });
    let status = status.await.unwrap_or_else(|error| panic!("{point}: {error}"));
    assert_eq!(status.signal(), Some(9), "{point}: {status}");
    release_leases(&lab.db, "child").await.unwrap();
    id
}

const POINTS: [&str; 4] = ["before_intent", "after_intent", "after_act", "after_commit"];

#[tokio::test]
async fn on_the_way_forward() {
    const TEST: &str = "crash::on_the_way_forward";
    work_if_child().await;
    let lab = Lab::new().await;
    for step in ["one", "two", "three", "four"] {
        for point in POINTS.into_iter().chain((step != "three").then_some("inside")) {
            let point = format!("build.{step}.{point}");
            if point == "build.two.inside" {
                continue; // Step two is the same code as step one.
            }
            let id = die_at(TEST, &lab, &point, false).await;
            let second = site(&lab.db, false);
            let worker = Worker::start::<Build>(&lab.db, second.clone());
            let view = lab.until_over(id).await;
            worker.stop().await;
            assert_eq!(view.status, OperationStatus::Succeeded, "{point}: {view:?}");
            assert_eq!(lab.effects(id).await, ["one", "three", "two"], "{point}");
            // An effect that was there is found, not made again.
            if point == "build.two.after_act" {
                assert_eq!(second.calls(), ["probe two", "act three", "act four"]);
            }
        }
    }
    // Once each, whatever died: the events are committed with their steps.
    let doubled: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM (SELECT 1 FROM events GROUP BY operation_id, body->'data'->>'message' HAVING count(*) > 1) d",
    )
    .fetch_one(lab.db.pool())
    .await
    .unwrap();
    assert_eq!(doubled, 0);
}

#[tokio::test]
async fn on_the_way_back() {
    const TEST: &str = "crash::on_the_way_back";
    work_if_child().await;
    let lab = Lab::new().await;
    for step in ["one", "two", "three"] {
        for point in POINTS.into_iter().chain((step == "one").then_some("inside")) {
            let point = format!("build.{step}.undo_{point}");
            let id = die_at(TEST, &lab, &point, true).await;
            let worker = Worker::start::<Build>(&lab.db, site(&lab.db, true));
            let view = lab.until_over(id).await;
            worker.stop().await;
            assert_eq!(view.status, OperationStatus::Failed, "{point}: {view:?}");
            assert!(lab.effects(id).await.is_empty(), "{point}");
        }
    }
}

/// The worker is not dead but stopped, for longer than its lease; when it wakes, another one has finished its work.
#[tokio::test]
async fn a_worker_that_slept_through_its_lease_writes_nothing() {
    const TEST: &str = "crash::a_worker_that_slept_through_its_lease_writes_nothing";
    work_if_child().await;
    let lab = Lab::new().await;
    // Its own lease of an hour makes it sure that it may go on: only the fence can stop it.
    let mut command = child(TEST, &lab, "none", false);
    let mut sleeper = KilledOnDrop(command.spawn().unwrap());
    let pid = sleeper.0.id().to_string();
    // It sleeps at any point of one of these; each must come out whole.
    let ids = futures_util::future::join_all((0..30).map(|_| lab.enqueue(&Build {}))).await;
    wait_until("it is at work", async || {
        let held: i64 =
            sqlx::query_scalar("SELECT count(*) FROM operations WHERE worker = 'child' AND status = 'running'")
                .fetch_one(lab.db.pool())
                .await
                .unwrap();
        held > 0
    })
    .await;
    signal(&pid, "-STOP");
    // Its open transactions would hold their rows for as long as the server lets a session idle.
    sqlx::query("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'idle in transaction' AND datname = current_database()")
        .execute(lab.db.pool())
        .await
        .unwrap();
    sqlx::query("UPDATE operations SET lease_until = clock_timestamp() WHERE worker = 'child'")
        .execute(lab.db.pool())
        .await
        .unwrap();
    let worker = Worker::start_with::<Build>(&lab.db, site(&lab.db, false), config("awake"));
    for id in &ids {
        assert_eq!(lab.until_over(*id).await.status, OperationStatus::Succeeded);
    }
    worker.stop().await;
    let before = everything(&lab).await;
    signal(&pid, "-CONT");
    // It is awake again when it has taken up new work.
    let id = lab.enqueue(&Build {}).await;
    assert_eq!(lab.until_over(id).await.status, OperationStatus::Succeeded);
    sleeper.0.kill().unwrap();
    sleeper.0.wait().unwrap();
    let after: Vec<_> = everything(&lab).await.into_iter().filter(|row| !row.contains(&id.to_string())).collect();
    assert_eq!(before, after);
}

async fn everything(lab: &Lab) -> Vec<String> {
    sqlx::query_scalar(
        "SELECT o::text FROM operations o UNION ALL SELECT s::text FROM operation_steps s UNION ALL
         SELECT e::text FROM events e ORDER BY 1",
    )
    .fetch_all(lab.db.pool())
    .await
    .unwrap()
}

fn signal(pid: &str, signal: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().unwrap().success());
}

struct KilledOnDrop(std::process::Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
