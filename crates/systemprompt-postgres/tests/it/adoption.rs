//! Whatever is killed: one server, all data.

use crate::support::{Place, child_argument, is_running, pid_of, spawn_child, sql, start, stop, wait_until};
use std::{fs, os::unix::fs::PermissionsExt, process::Command};
use systemprompt_postgres::{Access, Cluster, ClusterConfig, Durability, StopMode};

#[tokio::test]
async fn a_first_start_makes_the_cluster_and_a_second_adopts_it() {
    let place = Place::new();
    let first = start(place.control()).await.unwrap();
    let pid = pid_of(&place.path().join("control"));
    sql(&first.url("postgres"), "CREATE TABLE kept AS SELECT 42 AS answer").unwrap();
    let second = start(place.control()).await.unwrap();
    assert_eq!(pid_of(&place.path().join("control")), pid);
    assert_eq!(sql(&second.url("postgres"), "SELECT answer FROM kept").unwrap(), "42");
    assert!(second.is_alive().await);
    assert!(second.version() >= 15);
    stop(&second).await;
    assert!(!first.is_alive().await && !is_running(&pid));
    stop(&second).await;
    let third = start(place.control()).await.unwrap();
    assert_eq!(sql(&third.url("postgres"), "SELECT answer FROM kept").unwrap(), "42");
    third.stop(StopMode::Immediate).await.unwrap();
}

#[tokio::test]
async fn it_is_durable_local_private_and_not_root() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    for (setting, expected) in [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("data_checksums", "on"),
        ("listen_addresses", ""),
        ("log_min_error_statement", "panic"),
    ] {
        assert_eq!(sql(&cluster.url("postgres"), &format!("SHOW {setting}")).unwrap(), expected, "{setting}");
    }
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&place.path().join("control.log")), 0o600);
    assert_eq!(mode(&place.path().join("control")), 0o700);
    assert_eq!(mode(cluster.socket_dir()), 0o700);
    let pid = pid_of(&place.path().join("control"));
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(!status.contains("Uid:\t0\t"), "{status}");
    // A session of its own: nothing that happens to our terminal reaches it.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    assert_eq!(stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3), Some(pid.as_str()));
}

#[tokio::test]
async fn a_server_outlives_who_started_it_and_is_adopted() {
    if let Some(root) = child_argument() {
        start(child_config(&root)).await.unwrap();
        fs::write(root.join("started"), "").unwrap();
        std::future::pending::<()>().await;
    }
    let place = Place::new();
    let mut child = spawn_child("adoption::a_server_outlives_who_started_it_and_is_adopted", place.path());
    wait_until("the child has started a cluster", || place.path().join("started").exists());
    let pid = pid_of(&place.path().join("control"));
    child.kill();
    assert!(is_running(&pid));
    let cluster = start(place.control()).await.unwrap();
    assert_eq!(pid_of(&place.path().join("control")), pid);
    assert_eq!(sql(&cluster.url("postgres"), "SELECT 1").unwrap(), "1");
}

fn child_config(root: &std::path::Path) -> ClusterConfig {
    ClusterConfig {
        name: "control".to_owned(),
        data: root.join("control"),
        access: Access::ControlPlane,
        settings: vec![("dynamic_shared_memory_type".to_owned(), "mmap".to_owned())],
        durability: Durability::Full,
    }
}

#[tokio::test]
async fn a_start_killed_while_it_makes_the_cluster_is_redone() {
    const TEST: &str = "adoption::a_start_killed_while_it_makes_the_cluster_is_redone";
    if let Some(root) = child_argument() {
        start(child_config(&root)).await.unwrap();
        std::future::pending::<()>().await;
    }
    let place = Place::new();
    let half_made = place.path().join("control.init-tmp");
    // At different depths of `initdb`, each time with its orphan still at work.
    for progress in ["", "PG_VERSION", "base/1"] {
        let mut child = spawn_child(TEST, place.path());
        wait_until("the cluster is being made", || half_made.join(progress).exists());
        child.kill();
        assert!(!place.path().join("control").exists());
    }
    let cluster = start(place.control()).await.unwrap();
    assert_eq!(sql(&cluster.url("postgres"), "SELECT count(*) FROM pg_database").unwrap(), "3");
    assert!(!half_made.exists());
}

#[tokio::test]
async fn a_half_made_cluster_is_thrown_away() {
    let place = Place::new();
    let half_made = place.path().join("control.init-tmp");
    fs::create_dir_all(half_made.join("base/1")).unwrap();
    fs::write(half_made.join("PG_VERSION"), "15\n").unwrap();
    let cluster = start(place.control()).await.unwrap();
    assert_eq!(sql(&cluster.url("postgres"), "SELECT 1").unwrap(), "1");
    assert!(!half_made.exists());
}

#[tokio::test]
async fn a_killed_server_starts_again_with_its_data_even_while_its_sessions_linger() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    sql(&cluster.url("postgres"), "CREATE TABLE kept AS SELECT 42 AS answer").unwrap();
    let busy = cluster.url("postgres");
    let session = std::thread::spawn(move || sql(&busy, "SELECT pg_sleep(60)"));
    let count = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(60)'";
    wait_until("a session is busy", || sql(&cluster.url("postgres"), count).as_deref() == Ok("1"));
    let pid = pid_of(&place.path().join("control"));
    assert!(Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let again = start(place.control()).await.unwrap();
    assert_ne!(pid_of(&place.path().join("control")), pid);
    assert_eq!(sql(&again.url("postgres"), "SELECT answer FROM kept").unwrap(), "42");
    session.join().unwrap().unwrap_err();
}

#[tokio::test]
async fn a_pid_file_of_a_dead_or_strange_process_stops_nobody() {
    let place = Place::new();
    let data = place.path().join("control");
    let cluster = start(place.control()).await.unwrap();
    stop(&cluster).await;
    // The worst of strangers: another server of the same user, which PostgreSQL itself would take for the old one.
    let other = start(place.config("other", Access::ControlPlane)).await.unwrap();
    let stranger = pid_of(&place.path().join("other"));
    let socket = cluster.socket_dir().display();
    for pid in [stranger.as_str(), "4194304"] {
        let text = format!("{pid}\n{}\n1700000000\n5432\n{socket}\n\n\nready   \n", data.display());
        fs::write(data.join("postmaster.pid"), text).unwrap();
        let cluster = start(place.control()).await.unwrap();
        assert_ne!(pid_of(&data), pid);
        stop(&cluster).await;
    }
    assert!(other.is_alive().await, "the stranger was touched");
}

#[tokio::test]
async fn many_starts_at_once_are_one_start() {
    let place = Place::new();
    let starts: Vec<_> = (0..6).map(|_| tokio::spawn(start(place.control()))).collect();
    for one in starts {
        let cluster = one.await.unwrap().unwrap();
        assert!(cluster.is_alive().await);
    }
    let log = fs::read_to_string(place.path().join("control.log")).unwrap();
    assert_eq!(log.matches("database system is ready").count(), 1, "{log}");
}

#[tokio::test]
async fn two_clusters_live_side_by_side() {
    let place = Place::new();
    let control = start(place.control()).await.unwrap();
    let tenants = start(place.config("tenants", Access::Tenants)).await.unwrap();
    assert_ne!(control.socket_dir(), tenants.socket_dir());
    let mode = fs::metadata(tenants.socket_dir()).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o711);
    stop(&control).await;
    assert!(tenants.is_alive().await && !control.is_alive().await);
}

/// The environment that says where sockets lie may be another one at the next start.
#[tokio::test]
async fn a_server_is_adopted_where_its_socket_is() {
    let place = Place::new();
    let first = start(place.control()).await.unwrap();
    let data = place.path().join("control");
    let (pid, elsewhere) = (pid_of(&data), place.path().join("elsewhere"));
    fs::rename(first.socket_dir(), &elsewhere).unwrap();
    let pid_file = data.join("postmaster.pid");
    let text = fs::read_to_string(&pid_file).unwrap();
    let (here, there) = (first.socket_dir().display().to_string(), elsewhere.display().to_string());
    fs::write(&pid_file, text.replace(&here, &there)).unwrap();
    let second = start(place.control()).await.unwrap();
    assert_eq!((pid_of(&data), second.socket_dir()), (pid, elsewhere.as_path()));
    assert_eq!(sql(&second.url("postgres"), "SELECT 1").unwrap(), "1");
    stop(&second).await;
}

#[tokio::test]
async fn a_server_whose_socket_was_removed_is_started_anew() {
    let place = Place::new();
    let first = start(place.control()).await.unwrap();
    let pid = pid_of(&place.path().join("control"));
    sql(&first.url("postgres"), "CREATE TABLE kept AS SELECT 42 AS answer").unwrap();
    fs::remove_dir_all(first.socket_dir()).unwrap();
    let second = start(place.control()).await.unwrap();
    assert_ne!(pid_of(&place.path().join("control")), pid);
    assert_eq!(sql(&second.url("postgres"), "SELECT answer FROM kept").unwrap(), "42");
    stop(&second).await;
}

#[tokio::test]
async fn what_exists_is_found_without_starting_it() {
    let place = Place::new();
    let data = place.path().join("control");
    assert!(Cluster::existing("control", &data).await.unwrap().is_none());
    assert!(!data.exists(), "nothing was made");
    stop(&start(place.control()).await.unwrap()).await;
    let found = Cluster::existing("control", &data).await.unwrap().expect("the cluster");
    assert!(!found.is_alive().await);
    let running = start(place.control()).await.unwrap();
    assert!(found.is_alive().await && found.socket_dir() == running.socket_dir());
    stop(&found).await;
    assert!(!running.is_alive().await);
}
