//! Who may call what: every endpoint of the table by every kind of caller.

use anyhow::{Context as _, ensure};
use e2e::{Stack, TestApp, World, program, until};
use reqwest::{Method, StatusCode};
use systemprompt_contract::{TenantId, paths, token};

/// A row of the router's own table: what is not in it does not answer.
#[derive(Debug, serde::Deserialize)]
struct Endpoint {
    method: String,
    path: String,
    access: String,
}

fn endpoints() -> anyhow::Result<Vec<Endpoint>> {
    let output = std::process::Command::new(program("management-api")?).arg("endpoints").output()?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What anybody may call, and why nothing is lost by it. A new endpoint is guarded, or stands here.
const PUBLIC: [(&str, &str); 10] = [
    ("GET", "/"),
    ("GET", "/api/v1/health"),
    ("GET", "/login"),
    ("POST", "/login"),
    ("GET", "/setup"),
    ("POST", "/setup"),
    ("POST", "/api/v1/auth/setup"),
    ("POST", "/api/v1/auth/token"),
    ("GET", "/checkout/{id}"),
    ("POST", "/webhooks/manual"),
];

#[test]
fn nothing_is_public_but_what_is_listed() -> anyhow::Result<()> {
    let endpoints = endpoints()?;
    let public: std::collections::BTreeSet<(&str, &str)> = endpoints
        .iter()
        .filter(|row| row.access == "public")
        .map(|row| (row.method.as_str(), row.path.as_str()))
        .collect();
    let listed = PUBLIC.into_iter().collect();
    ensure!(public == listed, "public: {public:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_gets_in_without_a_valid_token() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("guarded").await?;
    let registry = stack.call(Method::GET, &paths::tenant(tenant.id, "/registry-token"), None).await?;
    let registry = registry["data"]["token"].as_str().context("token")?.to_owned();
    let forged = token::new_api_token(4_000_000_000);
    let callers = [None, Some(""), Some("x"), Some(forged.expose()), Some(registry.as_str())];
    let guarded: Vec<Endpoint> = endpoints()?.into_iter().filter(|row| row.access != "public").collect();
    ensure!(guarded.len() >= 15, "{guarded:?}");
    let next = format!("sign in: systemprompt cloud auth login --api-url {}", stack.api_url());
    for Endpoint { method, path, .. } in guarded {
        for (name, id) in [("own", tenant.id), ("absent", TenantId::new())] {
            let path = path.replace("{id}", &id.to_string());
            for caller in callers {
                let mut request = stack.client().request(method.parse()?, format!("{}{path}", stack.api_url()));
                if let Some(caller) = caller {
                    request = request.header("authorization", format!("Bearer {caller}"));
                }
                let answer = request.send().await?;
                let status = answer.status();
                let body: serde_json::Value = answer.json().await?;
                ensure!(
                    status == StatusCode::UNAUTHORIZED
                        && body["error"]["code"] == "unauthorized"
                        && body["error"]["hint"] == next,
                    "{method} {path} ({name}) as {caller:?}: {status} {body}"
                );
            }
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_and_malformed_ids_are_the_same_answer() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let mut answers = std::collections::BTreeSet::new();
    for id in [
        TenantId::new().to_string(),
        "x".to_owned(),
        "..%2f".to_owned(),
        "%ff".to_owned(),
        "999BC654-9A64-49BC-98BE-DB976FC84E76".to_owned(),
    ] {
        for rest in ["", "/status", "/events", "/logs", "/registry-token"] {
            let request = stack.client().get(format!("{}/api/v1/tenants/{id}{rest}", stack.api_url()));
            let answer = request.bearer_auth(stack.token().expose()).send().await?;
            let status = answer.status();
            let mut body: serde_json::Value = answer.json().await?;
            body["error"]["request_id"] = "".into();
            answers.insert(format!("{status} {body}"));
        }
    }
    ensure!(answers.len() == 1, "{answers:?}");
    Ok(())
}

/// A member in what he has bought, and the operator where only he may go.
#[tokio::test(flavor = "multi_thread")]
async fn the_owner_gets_in_and_no_cache_keeps_what_he_gets() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let owner = stack.create_member("member@systemprompt.localhost")?;
    let checkout = stack.order_as(&owner, "own").await?;
    stack.confirm(&checkout).await?;
    let tenant = stack.bought(&checkout).await?;
    stack.wait_status(&tenant, "awaiting_deploy").await?;
    let operations = operations(&stack).await?;
    // What ends the tenant or the token goes last: after it there is nothing to ask about.
    let mut rows: Vec<Endpoint> = endpoints()?.into_iter().filter(|row| row.path.starts_with("/api/")).collect();
    rows.sort_by_key(|row| (row.path.ends_with("/logout"), row.method == "DELETE"));
    for Endpoint { method, path, access } in rows {
        let id = match access.as_str() {
            "checkout" => checkout.clone(),
            "operation" | "operator" => operations.first().cloned().context("an operation")?,
            _ => tenant.id.to_string(),
        };
        let url = format!("{}{}", stack.api_url(), path.replace("{id}", &id));
        let ask = |token: &str| {
            let request = stack.client().request(method.parse().unwrap_or_default(), &url).bearer_auth(token);
            if method == "GET" { request } else { request.json(&serde_json::json!({})) }
        };
        // Its buyer may see a checkout, and not pay himself.
        let operators = access == "operator" || path.ends_with("/confirm");
        let token = if operators { stack.token() } else { &owner };
        if operators {
            let answer = ask(owner.expose()).send().await?;
            ensure!(answer.status() == StatusCode::FORBIDDEN, "{method} {path} as a member: {}", answer.status());
        }
        let answer = ask(token.expose()).send().await?;
        let (status, cache) = (answer.status(), answer.headers().get("cache-control").cloned());
        ensure!(!matches!(status.as_u16(), 401 | 403 | 404) || access == "public", "{method} {path}: {status}");
        ensure!(cache.as_ref().is_some_and(|cache| cache == "no-store"), "{method} {path}: {cache:?}");
    }
    Ok(())
}

/// A client that lost an answer asks again. What hands out a secret once has no second answer to give.
#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_can_be_asked_twice_under_one_key() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("twice").await?;
    let app = TestApp { behaviour: "healthy", text: "twice" }.push(&stack, &tenant).await?;
    let (checkout, operation) = (checkout_of(&stack, tenant.id).await?, operations(&stack).await?.swap_remove(0));
    let image = serde_json::json!({ "image": app.image, "digest": app.digest });
    let order = serde_json::json!({ "price_id": "pri_standard", "region": "fra" });
    let nothing = serde_json::json!({});
    let calls = [
        (Method::POST, paths::CHECKOUT.to_owned(), order),
        (Method::POST, paths::checkout(checkout.parse()?, "/confirm"), nothing.clone()),
        (Method::POST, format!("/api/v1/operations/{operation}/retry"), nothing.clone()),
        (Method::POST, paths::tenant(tenant.id, "/deploy"), image),
        (Method::DELETE, paths::tenant(tenant.id, "?purge=true"), nothing),
    ];
    // Secrets are made and ended once; a form is a page's; the webhook has its event's id.
    let once = ["/login", "/setup", "/auth/setup", "/auth/token", "/auth/logout", "/webhooks/manual"];
    let changing = endpoints()?.into_iter().filter(|row| row.method != "GET");
    let repeatable = changing.filter(|row| !once.iter().any(|path| row.path.ends_with(path))).count();
    ensure!(repeatable == calls.len(), "{repeatable} rows can be repeated, {} are called", calls.len());
    for (method, path, body) in calls {
        let ask = async |key: &str| {
            let request = stack.client().request(method.clone(), format!("{}{path}", stack.api_url()));
            let request = request.bearer_auth(stack.token().expose()).header("idempotency-key", key).json(&body);
            let answer = request.send().await?;
            anyhow::Ok((answer.status(), answer.json::<serde_json::Value>().await?))
        };
        let (status, refused) = ask("").await?;
        ensure!(status == StatusCode::BAD_REQUEST, "{method} {path} with an empty key: {refused}");
        let (first, second) = (ask("one").await?, ask("one").await?);
        ensure!(first.0.is_success() && first == second, "{method} {path}: {first:?}, then {second:?}");
        if method == Method::DELETE {
            until("the purge is through", async || {
                World::look(&stack).await.is_ok_and(|world| world.check(&[], &[]).is_ok())
            })
            .await?;
            ensure!(ask("one").await? == first, "the tenant's row is gone, the answer is not");
            ensure!(ask("two").await?.0 == StatusCode::NOT_FOUND);
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_words_are_refused() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.buy("worded").await?;
    for (method, path) in [
        (Method::GET, paths::TENANTS.to_owned()),
        (Method::GET, paths::tenant(tenant.id, "/logs")),
        (Method::DELETE, paths::tenant(tenant.id, "")),
    ] {
        let request = stack.client().request(method, format!("{}{path}?colour=red", stack.api_url()));
        let answer = request.bearer_auth(stack.token().expose()).send().await?;
        let body: serde_json::Value = answer.json().await?;
        ensure!(body["error"]["code"] == "unknown_field", "{path}: {body}");
    }
    // Nor does a body's word that nobody knows pass for done.
    for (path, mut body) in [
        (paths::CHECKOUT.to_owned(), serde_json::json!({ "price_id": "pri_standard", "region": "iad" })),
        (paths::tenant(tenant.id, "/deploy"), serde_json::json!({ "image": "x" })),
    ] {
        body["env"] = serde_json::json!({ "COLOUR": "red" });
        let request = stack.client().post(format!("{}{path}", stack.api_url())).json(&body);
        let answer = request.bearer_auth(stack.token().expose()).send().await?;
        let body: serde_json::Value = answer.json().await?;
        ensure!(body["error"]["code"] == "unknown_field", "{path}: {body}");
    }
    Ok(())
}

/// The command line keeps what `/tenants` and `/auth/me` say in one file: both must say the same.
#[tokio::test(flavor = "multi_thread")]
async fn the_operator_lists_his_own_tenants_and_everybodys_by_asking() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let member = stack.create_member("member@systemprompt.localhost")?;
    stack.buy("mine").await?;
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    let given = "UPDATE tenants SET account_id = (SELECT id FROM accounts WHERE email LIKE 'member@%')";
    sqlx::query(given).execute(&mut control).await?;
    let list = async |query: &str| stack.call(Method::GET, &format!("{}{query}", paths::TENANTS), None).await;
    ensure!(list("").await?["data"] == serde_json::json!([]));
    ensure!(list("?all=true").await?["data"][0]["name"] == "mine");
    let everybodys = format!("{}{}?all=true", stack.api_url(), paths::TENANTS);
    let answer = stack.client().get(everybodys).bearer_auth(member.expose()).send().await?;
    ensure!(answer.status() == StatusCode::FORBIDDEN, "{}", answer.status());
    Ok(())
}

/// A stranger with a valid token of his own: everything that is not his does not exist for him.
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_cannot_tell_others_things_from_absent_ones() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("private").await?;
    let stranger = stack.create_member("stranger@systemprompt.localhost")?;
    let view = stack.call(Method::GET, &paths::tenant(tenant.id, ""), None).await?;
    ensure!(view["data"]["name"] == "private", "{view}");
    let operations = operations(&stack).await?;
    for Endpoint { method, path, access } in endpoints()? {
        let own = match access.as_str() {
            "tenant" | "deletion" => tenant.id.to_string(),
            "checkout" => checkout_of(&stack, tenant.id).await?,
            "operation" => operations.first().cloned().context("an operation")?,
            _ => continue,
        };
        let mut answers = Vec::new();
        for id in [own, TenantId::new().to_string()] {
            let url = format!("{}{}", stack.api_url(), path.replace("{id}", &id));
            let request = stack.client().request(method.parse()?, url).bearer_auth(stranger.expose());
            let answer = request.json(&serde_json::json!({})).send().await?;
            let status = answer.status();
            let mut body: serde_json::Value = answer.json().await?;
            body["error"]["request_id"] = "".into();
            answers.push((status, body));
        }
        ensure!(answers[0].0 == StatusCode::NOT_FOUND, "{method} {path}: {answers:?}");
        ensure!(answers[0] == answers[1], "{method} {path}: {answers:?}");
    }
    let listed = stack.client().get(format!("{}{}", stack.api_url(), paths::TENANTS)).bearer_auth(stranger.expose());
    let listed: serde_json::Value = listed.send().await?.json().await?;
    ensure!(listed["data"] == serde_json::json!([]), "{listed}");
    Ok(())
}

async fn operations(stack: &Stack) -> anyhow::Result<Vec<String>> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    Ok(sqlx::query_scalar("SELECT id::text FROM operations").fetch_all(&mut control).await?)
}

async fn checkout_of(stack: &Stack, tenant: TenantId) -> anyhow::Result<String> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    let id = sqlx::query_scalar("SELECT checkout_id::text FROM tenants WHERE id = $1").bind(tenant.uuid());
    Ok(id.fetch_one(&mut control).await?)
}
