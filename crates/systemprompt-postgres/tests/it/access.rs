//! Who may connect to what.

use crate::support::{Place, sql, start};
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
    let cluster = start(place.config("tenants", Access::Tenants)).await.unwrap();
    sql(&cluster.url("postgres"), "ALTER ROLE nobody_here PASSWORD 'hunter2'").unwrap_err();
    let log = std::fs::read_to_string(place.path().join("tenants.log")).unwrap();
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
