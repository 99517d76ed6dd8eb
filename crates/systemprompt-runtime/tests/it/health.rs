use crate::tenant::{SOON, Tenant, cluster, database_name, http};
use serde_json::Value;
use std::{fs, time::Duration};
use tokio::time::Instant;

async fn health(tenant: &Tenant) -> (u16, Value) {
    let answer = http().get(tenant.url("/api/v1/health")).send().await.expect("an answer");
    assert_eq!(answer.headers()["cache-control"], "no-store");
    (answer.status().as_u16(), answer.json().await.expect("JSON"))
}

#[tokio::test]
async fn health_names_the_database_of_this_connection() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let (status, health) = health(&tenant).await;
    assert_eq!(status, 200);
    assert_eq!(health["checks"]["database"]["name"], database_name(&url).as_str());
    assert_eq!(health["checks"]["database"]["status"], "healthy");
    assert!(health["checks"]["database"]["latency_ms"].is_u64() && health["response_time_ms"].is_u64());
    assert!(health["memory"]["resident_bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    for (check, field) in [("agents", "count"), ("mcp", "count")] {
        assert_eq!(health["checks"][check][field], 0);
    }
    assert!(health["timestamp"].as_str().is_some_and(|at| at.ends_with('Z')));
    tenant.end().await.expect("a clean end");
}

#[tokio::test]
async fn a_missing_page_degrades_and_is_still_alive() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    assert_eq!(health(&tenant).await.1["status"], "degraded", "no sitemap.xml");
    fs::write(tenant.web.path().join("dist/sitemap.xml"), "<urlset/>").expect("written");
    assert_eq!(health(&tenant).await.1["status"], "healthy");
    fs::remove_dir_all(tenant.web.path().join("dist")).expect("removed");
    let (status, health) = health(&tenant).await;
    assert_eq!(
        (status, &health["status"], &health["checks"]["static_content"]["index_html"]),
        (200, &"degraded".into(), &false.into())
    );
    assert!(tenant.get("/").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn only_a_lost_database_makes_it_unhealthy_and_it_comes_back_by_itself() {
    let (cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let name = database_name(&url);
    let terminate = format!("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'");
    cluster.execute("postgres", &format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")).await;
    cluster.execute("postgres", &terminate).await;
    let (status, body) = health(&tenant).await;
    assert_eq!(
        (status, &body["status"], &body["checks"]["database"]["name"]),
        (503, &"unhealthy".into(), &Value::Null)
    );
    assert!(tenant.get("/").await.contains("<h1>hello</h1>"), "pages need no database");
    cluster.execute("postgres", &format!("ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")).await;
    let deadline = Instant::now() + SOON;
    while health(&tenant).await.0 != 200 {
        assert!(Instant::now() < deadline, "it does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A terminated idle connection costs no failed check.
    cluster.execute("postgres", &terminate).await;
    assert_eq!(health(&tenant).await.0, 200);
}
