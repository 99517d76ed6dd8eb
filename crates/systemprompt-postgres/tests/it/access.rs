//! Who may connect to what.

use crate::support::{Place, sql, start, stop};
use std::os::unix::fs::MetadataExt as _;
use systemprompt_postgres::{Access, Cluster};

fn as_role(cluster: &Cluster, role: &str, password: &str, database: &str) -> String {
    cluster.url(database).replace("systemprompt@", &format!("{role}:{password}@"))
}

#[tokio::test]
async fn a_tenant_reaches_the_database_of_its_own_name_only() {
    let place = Place::new();
    let cluster = start(place.config("tenants", Access::Tenants)).await.unwrap();
    for role in ["a", "b"] {
        sql(&cluster.url("postgres"), &format!("CREATE ROLE {role} LOGIN PASSWORD 'secret-{role}'")).unwrap();
        sql(&cluster.url("postgres"), &format!("CREATE DATABASE {role} OWNER {role}")).unwrap();
    }
    assert_eq!(sql(&as_role(&cluster, "a", "secret-a", "a"), "SELECT current_user").unwrap(), "a");
    for other in ["b", "postgres", "template1", "template0"] {
        let error = sql(&as_role(&cluster, "a", "secret-a", other), "SELECT 1").unwrap_err();
        assert!(error.contains("no pg_hba.conf entry"), "{other}: {error}");
    }
    let error = sql(&as_role(&cluster, "a", "secret-b", "a"), "SELECT 1").unwrap_err();
    assert!(error.contains("password authentication failed"), "{error}");
    let error = sql(&as_role(&cluster, "a", "", "a"), "SELECT 1").unwrap_err();
    assert!(error.contains("no password supplied"), "{error}");
    // The superuser has no password, so a password does not make one.
    let log = std::fs::read_to_string(place.path().join("tenants.log")).unwrap();
    assert!(!log.contains("secret-"), "{log}");
}

#[tokio::test]
async fn a_password_in_a_failed_statement_is_not_logged() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    sql(&cluster.url("postgres"), "ALTER ROLE nobody_here PASSWORD 'hunter2'").unwrap_err();
    let log = std::fs::read_to_string(place.path().join("control.log")).unwrap();
    assert!(log.contains("does not exist") && !log.contains("hunter2"), "{log}");
}

#[tokio::test]
async fn the_control_planes_cluster_knows_nobody_but_its_superuser() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    sql(&cluster.url("postgres"), "CREATE ROLE a LOGIN PASSWORD 'secret-a'").unwrap();
    sql(&cluster.url("postgres"), "CREATE DATABASE a OWNER a").unwrap();
    let error = sql(&as_role(&cluster, "a", "secret-a", "a"), "SELECT 1").unwrap_err();
    assert!(error.contains("no pg_hba.conf entry"), "{error}");
    // The server's own user is not its superuser either.
    let output = std::process::Command::new("setpriv")
        .args([
            "--reuid=postgres",
            "--regid=postgres",
            "--clear-groups",
            "psql",
            "-d",
            &cluster.url("postgres"),
            "-c",
            "SELECT 1",
        ])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("Peer authentication failed"), "{error}");
}

#[tokio::test]
async fn a_tenant_cannot_fill_the_log() {
    let place = Place::new();
    let cluster = start(place.config("tenants", Access::Tenants)).await.unwrap();
    sql(&cluster.url("postgres"), "CREATE ROLE a LOGIN PASSWORD 'secret-a'").unwrap();
    sql(&cluster.url("postgres"), "CREATE DATABASE a OWNER a").unwrap();
    let url = as_role(&cluster, "a", "secret-a", "a");
    sql(&url, "DO $$ BEGIN FOR i IN 1..100 LOOP RAISE LOG '%', repeat('x', 100000); END LOOP; END $$").unwrap();
    for lift in
        ["SET log_min_messages = debug1", "SET log_statement = 'all'", "ALTER ROLE a SET log_min_messages = log"]
    {
        let error = sql(&url, lift).unwrap_err();
        assert!(error.contains("permission denied"), "{lift}: {error}");
    }
    let log = std::fs::metadata(place.path().join("tenants.log")).unwrap();
    assert!(log.len() < 10_000, "{} bytes", log.len());
}

/// The data directory is its server's: whoever that user is must not lead root's hand.
#[tokio::test]
async fn a_link_in_the_data_directory_is_not_followed() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    stop(&cluster).await;
    let victim = place.path().join("victim");
    std::fs::write(&victim, "root's own").unwrap();
    for name in ["pg_hba.conf", "pg_ident.conf"] {
        let path = place.path().join("control").join(name);
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
    }
    let before = std::fs::metadata(&victim).unwrap();
    start(place.control()).await.unwrap();
    let after = std::fs::metadata(&victim).unwrap();
    assert_eq!(std::fs::read_to_string(&victim).unwrap(), "root's own");
    assert_eq!((before.uid(), before.mode()), (after.uid(), after.mode()));
}
