//! Who sees what: absent and not yours are one answer.

use crate::support::{Image, Server, config, error_code};
use chrono::{TimeDelta, Utc};
use reqwest::{Method, Response, StatusCode};
use std::collections::BTreeMap;
use systemprompt_contract::{IMAGE_REPOSITORY, TenantId, TenantTag};
use systemprompt_oci::Digest;
use systemprompt_registry::Grant;

/// Everything of an answer that could tell one case from another.
async fn whole(response: Response) -> (StatusCode, BTreeMap<String, String>, String) {
    let headers = response
        .headers()
        .iter()
        .filter(|(name, _)| *name != "date")
        .map(|(name, value)| (name.to_string(), value.to_str().expect("text").to_owned()))
        .collect();
    (response.status(), headers, response.text().await.expect("text"))
}

#[tokio::test]
async fn anothers_and_absent_are_answered_alike() {
    let server = Server::start().await;
    let (owner, stranger) = (server.tenant(), server.tenant());
    let image = Image::new("app", b"private program");
    let (owned, owned_layer) = (owner.push(&image).await, Digest::of(&image.layer));
    let owned_upload = owner.begin().await;
    let upload_id = owned_upload.rsplit('/').next().expect("an id");
    stranger.push_blob(b"something of its own").await;

    let absent_tag = TenantTag(TenantId::new()).to_string();
    let absent_id = uuid::Uuid::new_v4().to_string();
    let absent = Digest::of(b"absent");
    let mut compared = 0;
    for (path, foreign, missing) in [
        ("manifests/", owner.tag(), absent_tag.clone()),
        ("manifests/", owner.tag(), "latest".to_owned()),
        ("manifests/", owned.to_string(), absent.to_string()),
        ("blobs/", owned_layer.to_string(), absent.to_string()),
        ("blobs/uploads/", upload_id.to_owned(), absent_id.clone()),
    ] {
        for method in [Method::GET, Method::HEAD, Method::PUT, Method::PATCH, Method::DELETE] {
            let send = async |target: &str| {
                let query = if path == "blobs/uploads/" { format!("?digest={absent}") } else { String::new() };
                let request = stranger.request(method.clone(), &format!("{path}{target}{query}"));
                whole(request.body("x").send().await.expect("an answer")).await
            };
            let (theirs, nobodys) = (send(&foreign).await, send(&missing).await);
            assert_eq!(theirs, nobodys, "{method} {path}{foreign}");
            assert!(!theirs.0.is_success(), "{method} {path}{foreign}");
            compared += 1;
        }
    }
    assert_eq!(compared, 25);

    let mount = async |digest: Digest| {
        let path = format!("blobs/uploads/?mount={digest}&from={IMAGE_REPOSITORY}");
        stranger.status(Method::POST, &path).await
    };
    assert_eq!((mount(owned_layer).await, mount(absent).await), (StatusCode::ACCEPTED, StatusCode::ACCEPTED));
    let tags = stranger.send(Method::GET, "tags/list").await.text().await.expect("text");
    assert!(tags.contains("\"tags\":[]"), "{tags}");
    for path in ["/v2/_catalog", &format!("/v2/{IMAGE_REPOSITORY}/referrers/{owned}"), "/v2/other/tags/list"] {
        assert_eq!(error_code(stranger.send(Method::GET, path).await).await, "NAME_UNKNOWN", "{path}");
    }

    // A manifest that names another tenant's blobs gets nothing of them.
    let stolen = stranger.put_manifest(&stranger.tag(), &image.manifest).await;
    assert_eq!(error_code(stolen).await, "MANIFEST_BLOB_UNKNOWN");
    // And the owner is as before.
    assert_eq!(owner.status(Method::GET, &owned_upload).await, StatusCode::NO_CONTENT);
    assert_eq!(server.registry.resolve(owner.id).await.expect("disk"), Some(owned));
    assert!(server.registry.image(stranger.id, &owned).await.is_err());
}

#[tokio::test]
async fn contents_are_shared_on_disk_but_must_be_pushed_by_each() {
    let server = Server::start().await;
    let (one, two) = (server.tenant(), server.tenant());
    let image = Image::new("app", b"the same program");
    one.push(&image).await;
    let layer = format!("blobs/{}", Digest::of(&image.layer));
    assert_eq!(two.status(Method::HEAD, &layer).await, StatusCode::NOT_FOUND);
    two.push(&image).await;
    assert_eq!(two.status(Method::HEAD, &layer).await, StatusCode::OK);
    server.registry.remove_tenant(one.id).await.expect("disk");
    assert_eq!(two.send(Method::GET, &layer).await.bytes().await.expect("body"), image.layer);
    server.registry.image(two.id, &image.digest()).await.expect("still whole");
}

#[tokio::test]
async fn what_was_found_out_about_a_layer_is_the_tenants_own() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start_in(config(dir.path())).await;
    let (owner, stranger) = (server.tenant(), server.tenant());
    let image = Image::new("app", b"program");
    let layer = Digest::of(&image.layer);
    owner.push(&image).await;
    let verdict_of = |id: TenantId| dir.path().join("tenants").join(id.to_string()).join("checked").join(layer.hex());
    let path = verdict_of(owner.id);
    let verdict = std::fs::read_to_string(&path).expect("a verdict");
    // Whoever reads this one is misled, and nobody else does.
    let diff_id = verdict.split_whitespace().nth(1).expect("a diff id");
    let misleading = verdict.replace(diff_id, &Digest::of(b"other").to_string());
    std::fs::write(&path, &misleading).expect("write");
    assert_eq!(error_code(owner.put_manifest(&owner.tag(), &image.manifest).await).await, "MANIFEST_INVALID");
    stranger.push(&image).await;
    assert_eq!(std::fs::read_to_string(verdict_of(stranger.id)).expect("its own"), verdict);
    // Found by other rules: as if it were not there.
    let (_, rest) = misleading.split_once(' ').expect("the rules first");
    std::fs::write(&path, format!("0 {rest}")).expect("write");
    owner.push(&image).await;
    assert_eq!(std::fs::read_to_string(&path).expect("made anew"), verdict);
}

#[tokio::test]
async fn no_valid_token_no_answer() {
    let server = Server::start().await;
    let tenant = server.tenant();
    tenant.push(&Image::new("app", b"program")).await;
    let grant = |expires_in: i64| Grant {
        tenant: tenant.id,
        push: true,
        pull: true,
        expires_at: Utc::now() + TimeDelta::seconds(expires_in),
    };
    let url = format!("http://{}/v2/{IMAGE_REPOSITORY}/manifests/{}", server.address, tenant.tag());
    let get = || server.http.get(&url);
    for request in [
        get(),
        get().basic_auth("any", Some("")),
        get().basic_auth(server.token_of(&grant(600)), None::<&str>),
        get().basic_auth("any", Some(server.token_of(&grant(-1)))),
        get().bearer_auth("nonsense"),
        get().header("authorization", "Digest x"),
        get().header("authorization", "Basic !!!"),
        get().header("authorization", "Basic"),
    ] {
        let response = request.send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert!(response.headers()["www-authenticate"].to_str().expect("text").starts_with("Basic realm="));
        assert_eq!(error_code(response).await, "UNAUTHORIZED");
    }
    for request in [
        get().bearer_auth(server.token_of(&grant(600))),
        get().basic_auth("whoever", Some(server.token_of(&grant(600)))),
    ] {
        assert_eq!(request.send().await.expect("an answer").status(), StatusCode::OK);
    }
}

#[tokio::test]
async fn a_grant_allows_what_it_says() {
    let server = Server::start().await;
    let mut tenant = server.tenant();
    tenant.push(&Image::new("app", b"program")).await;
    let manifest = format!("manifests/{}", tenant.tag());
    for (push, pull, expected) in [
        (true, false, [StatusCode::OK, StatusCode::ACCEPTED]),
        (false, true, [StatusCode::OK, StatusCode::FORBIDDEN]),
        (false, false, [StatusCode::FORBIDDEN, StatusCode::FORBIDDEN]),
    ] {
        let expires_at = Utc::now() + TimeDelta::minutes(1);
        tenant.token = server.token_of(&Grant { tenant: tenant.id, push, pull, expires_at });
        let read = tenant.status(Method::GET, &manifest).await;
        let write = tenant.status(Method::POST, "blobs/uploads/").await;
        assert_eq!([read, write], expected, "push {push}, pull {pull}");
    }
}
