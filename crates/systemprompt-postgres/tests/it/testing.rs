//! The throw-away clusters that other tests stand on.

use crate::support::{child_argument, is_running, pid_of, spawn_child, sql, wait_until};
use std::{fs, path::PathBuf};
use systemprompt_postgres::testing::TestCluster;

fn directory(cluster: &TestCluster) -> PathBuf {
    cluster.cluster().socket_dir().parent().unwrap().to_owned()
}

#[tokio::test]
async fn it_gives_databases_and_leaves_nothing() {
    let cluster = TestCluster::start().await;
    let (one, two) = (cluster.create_database().await, cluster.create_database().await);
    assert_ne!(one, two);
    assert_eq!(sql(&one, "SELECT 1").unwrap(), "1");
    let (directory, pid) = (directory(&cluster), pid_of(&directory(&cluster).join("data")));
    drop(cluster);
    assert!(!directory.exists() && !is_running(&pid));
}

#[tokio::test]
async fn a_killed_server_can_be_started_again() {
    let cluster = TestCluster::start_for_tenants().await;
    let url = cluster.create_database().await;
    sql(&url, "CREATE TABLE kept AS SELECT 42 AS answer").unwrap();
    cluster.kill().await;
    assert!(!cluster.cluster().is_alive().await);
    cluster.start_again().await;
    assert_eq!(sql(&url, "SELECT answer FROM kept").unwrap(), "42");
}

#[tokio::test]
async fn a_killed_test_leaves_nothing_either() {
    if let Some(root) = child_argument() {
        let cluster = TestCluster::start().await;
        fs::write(root.join("half"), directory(&cluster).display().to_string()).unwrap();
        fs::rename(root.join("half"), root.join("started")).unwrap();
        std::future::pending::<()>().await;
    }
    let root = tempfile::tempdir().unwrap();
    let mut child = spawn_child("testing::a_killed_test_leaves_nothing_either", root.path());
    wait_until("the child has a cluster", || root.path().join("started").exists());
    let directory = PathBuf::from(fs::read_to_string(root.path().join("started")).unwrap());
    let pid = pid_of(&directory.join("data"));
    assert!(is_running(&pid));
    child.kill();
    wait_until("its cluster is gone", || !directory.exists() && !is_running(&pid));
}
