use crate::tenant::{Tenant, cluster, http};
use serde_json::Value;
use std::{fs, os::unix::fs::symlink};

#[tokio::test]
async fn pages_come_with_type_tag_and_length() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    for (path, content_type, body) in [
        ("/", "text/html; charset=utf-8", "<h1>hello</h1>"),
        ("/index.html", "text/html; charset=utf-8", "<h1>hello</h1>"),
        ("/style.css?v=1", "text/css; charset=utf-8", "body{}"),
        ("/docs/", "text/html; charset=utf-8", "docs"),
    ] {
        let answer = http().get(tenant.url(path)).send().await.expect("an answer");
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["content-type"]),
            (200, &content_type.parse().expect("text"))
        );
        assert_eq!(answer.headers()["x-content-type-options"], "nosniff");
        assert!(answer.headers().contains_key("x-trace-id"));
        let tag = answer.headers()["etag"].clone();
        assert_eq!(answer.text().await.expect("text"), body);
        let again = http().get(tenant.url(path)).header("if-none-match", &tag).send().await.expect("an answer");
        assert_eq!((again.status().as_u16(), again.headers().get("etag")), (304, Some(&tag)));
        assert_eq!(again.bytes().await.expect("a body").len(), 0);
        let head = http().head(tenant.url(path)).send().await.expect("an answer");
        assert_eq!((head.status().as_u16(), &head.headers()["content-length"]), (200, &body.len().into()));
    }
    let redirect = http().get(tenant.url("/docs")).send().await.expect("an answer");
    assert_eq!((redirect.status().as_u16(), &redirect.headers()["location"]), (308, &"/docs/".parse().expect("text")));
}

#[tokio::test]
async fn the_tag_follows_the_content_and_not_the_clock() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let tag = async |path: &str| {
        http().get(tenant.url(path)).send().await.expect("an answer").headers()["etag"]
            .to_str()
            .expect("text")
            .to_owned()
    };
    let (page, copy) = (tenant.web.path().join("dist/index.html"), tenant.web.path().join("dist/copy.html"));
    fs::copy(&page, &copy).expect("copied");
    let before = tag("/").await;
    assert_eq!(before, tag("/copy.html").await);
    // Same length and, as in every image, the same time stamp.
    let modified = fs::metadata(&page).expect("there").modified().expect("a time");
    fs::write(&page, "<h1>HELLO</h1>").expect("written");
    fs::File::open(&page).expect("opened").set_modified(modified).expect("set");
    assert_ne!(before, tag("/").await);
}

#[tokio::test]
async fn a_large_file_is_streamed_whole() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    fs::write(tenant.web.path().join("dist/big.bin"), &content).expect("written");
    let answer = http().get(tenant.url("/big.bin")).send().await.expect("an answer");
    assert_eq!(answer.headers()["content-length"], "3000000");
    assert_eq!(answer.headers()["content-type"], "application/octet-stream");
    assert!(answer.bytes().await.expect("whole") == content);
}

#[tokio::test]
async fn nothing_outside_of_the_site_can_be_had() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let dist = tenant.web.path().join("dist");
    symlink("../secret.txt", dist.join("out.txt")).expect("linked");
    symlink(tenant.web.path(), dist.join("up")).expect("linked");
    symlink("/proc/self/environ", dist.join("environ")).expect("linked");
    symlink("loop", dist.join("loop")).expect("linked");
    symlink("style.css", dist.join("in.css")).expect("linked");
    assert!(tenant.get("/in.css").await.ends_with("body{}"), "a link inside is fine");
    for path in [
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e%2fsecret.txt",
        "/docs/../../secret.txt",
        "/docs/..%5c..%5csecret.txt",
        "//secret.txt",
        "/./../secret.txt",
        "/out.txt",
        "/up/secret.txt",
        "/environ",
        "/loop",
        "/.env",
        "/%2eenv",
        "/index.html%00.css",
        "/index.html/",
        "/docs/%2e%2e/.env",
        "/%c0%ae%c0%ae/secret.txt",
        "/nothing",
        "/etc/passwd",
    ] {
        let answer = tenant.get(path).await;
        assert!(answer.starts_with("HTTP/1.1 404") && !answer.contains("SECRET"), "{path}: {answer}");
        assert!(answer.contains("There is no page at this address."), "{path}: {answer}");
    }
    let absolute = tenant.raw("GET http://evil/../secret.txt HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").await;
    assert!(!absolute.contains("SECRET"), "{absolute}");
    let post = tenant.raw("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
    assert!(post.starts_with("HTTP/1.1 405") && post.contains("allow: GET, HEAD"), "{post}");
}

#[tokio::test]
async fn a_page_for_what_is_not_there_can_be_the_sites_own() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    fs::write(tenant.web.path().join("dist/404.html"), "<h1>lost?</h1>").expect("written");
    let answer = http().get(tenant.url("/nothing")).header("if-none-match", "*").send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.text().await.expect("text").as_str()), (404, "<h1>lost?</h1>"));
}

#[tokio::test]
async fn an_unknown_call_answers_in_the_apps_own_error_shape() {
    let (_cluster, url) = cluster().await;
    let tenant = Tenant::start(&url).await;
    let id = "999bc654-9a64-49bc-98be-db976fc84e76";
    for path in ["/api", "/api/", "/api/v1/nothing", "/api/index.html"] {
        let answer = http().get(tenant.url(path)).header("x-request-id", id).send().await.expect("an answer");
        assert_eq!((answer.status().as_u16(), &answer.headers()["x-trace-id"]), (404, &id.parse().expect("text")));
        let error: Value = answer.json().await.expect("JSON");
        assert_eq!(
            (&error["code"], &error["path"], &error["trace_id"]),
            (&"not_found".into(), &path.into(), &id.into())
        );
        for field in ["message", "details", "error_key", "validation_errors", "timestamp"] {
            assert!(error.get(field).is_some(), "{field}");
        }
    }
    let slash = http().get(tenant.url("/api/v1/health/")).send().await.expect("an answer");
    assert_eq!(
        (slash.status().as_u16(), &slash.headers()["location"]),
        (308, &"/api/v1/health".parse().expect("text"))
    );
}
