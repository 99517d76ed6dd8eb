use crate::{
    cli::{Cli, Ended},
    cloud::{CHECKOUT, Cloud, Manner, TENANT},
};
use insta::assert_snapshot;
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader, Read as _},
    os::unix::fs::PermissionsExt as _,
};

/// Sizes, digests and times differ from run to run.
fn steady(ended: &Ended) -> String {
    let mut settings = String::new();
    for line in ended.shown().lines() {
        let steady = match line.split_once(' ') {
            Some(("built", _)) => continue,
            Some(("pushed", _)) => "pushed [DIGEST]",
            Some(("digest:", _)) if !line.contains("sha256:000") => "digest:      [DIGEST]",
            Some(("sent:", _)) => "sent:        [SIZE]",
            Some(("took:", _)) => "took:        [TIME]",
            Some(("signed", _)) => "signed in:   [TIME]",
            _ => line,
        };
        settings.push_str(steady);
        settings.push('\n');
    }
    settings
}

#[test]
fn signing_in_and_out() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    let token = crate::cli::api_token();
    let login =
        cli.run_with(&["cloud", "auth", "login", "--token", "-", "--api-url", &cloud.url], &format!("  {token}\n"));
    assert!(!login.shown().contains(&token));
    assert_snapshot!(steady(&login), @r"
    exit 0
    ----- stdout
    Signed in to https://API as dev@example.com
    tenants:     1
    token ends:  2100-01-01
    kept in:     [PROJECT]/.systemprompt/credentials.json
    ----- stderr
    next: systemprompt cloud deploy
    ");
    let credentials: Value = serde_json::from_str(&cli.read(".systemprompt/credentials.json")).expect("JSON");
    assert_eq!((&credentials["api_token"], &credentials["user_email"]), (&token.into(), &"dev@example.com".into()));
    let path = cli.home.path().join(".systemprompt/credentials.json");
    assert_eq!(path.metadata().expect("there").permissions().mode() & 0o777, 0o600);
    let tenants: Value = serde_json::from_str(&cli.read(".systemprompt/tenants.json")).expect("JSON");
    assert_eq!((&tenants["tenants"][0]["id"], &tenants["selected"]), (&TENANT.into(), &Value::Null));
    assert_snapshot!(steady(&cli.run(&["cloud", "auth", "whoami"])), @r"
    exit 0
    ----- stdout
    user:        dev@example.com
    api:         https://API
    token:       Valid
    signed in:   [TIME]
    profiles:    0
    tenants:     1
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "auth", "logout"]).shown(), @"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: there is no terminal to ask at, and this cannot be taken back: say --yes
    ");
    assert_snapshot!(cli.run(&["cloud", "auth", "logout", "--yes"]).shown(), @r"
    exit 0
    ----- stdout
    Signed out
    ----- stderr
    ");
    assert!(!path.exists() && cloud.calls().contains(&"POST /api/v1/auth/logout".to_owned()));
    assert_snapshot!(cli.run(&["cloud", "auth", "logout"]).shown(), @r"
    exit 0
    ----- stdout
    Nobody was signed in
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "auth", "whoami"]).shown(), @r"
    exit 0
    ----- stdout
    token:       Not logged in
    profiles:    0
    ----- stderr
    ");
}

#[test]
fn signing_in_by_browser() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    let mut child = cli.start(&["cloud", "auth", "login", "--no-browser", "--api-url", &cloud.url]);
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("/login?") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).expect("text"), 0, "an address is printed");
    }
    let address = reqwest::Url::parse(line.trim()).expect("a URL");
    let query: std::collections::HashMap<_, _> = address.query_pairs().into_owned().collect();
    let callback = format!("{}?code=c&state={}", query["redirect_uri"], query["state"]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let page = runtime.block_on(async { reqwest::get(callback).await.expect("an answer").status() });
    assert!(page.is_success());
    let mut said = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut said).expect("text");
    assert!(child.wait().expect("ended").success() && said.contains("as dev@example.com"), "{said}");
    assert!(cli.read(".systemprompt/credentials.json").contains("sp_live_"));
}

#[test]
fn tenants() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    assert_snapshot!(cli.run(&["cloud", "tenant", "list"]).shown(), @r"
    exit 0
    ----- stdout
      ID                                    NAME  STATUS   REGION  HOST
      999bc654-9a64-49bc-98be-db976fc84e76  shop  running  iad     999bc6549a64.example
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "tenant", "select", TENANT]).shown(), @r"
    exit 0
    ----- stdout
    Selected 999bc654-9a64-49bc-98be-db976fc84e76
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "tenant", "show"]).shown(), @r"
    exit 0
    ----- stdout
    id:          999bc654-9a64-49bc-98be-db976fc84e76
    name:        shop
    status:      running
    url:         https://999bc6549a64.example
    region:      iad
    app:         sp-999bc6549a64
    digest:      sha256:0000000000000000000000000000000000000000000000000000000000000000
    live since:  2026-01-01 00:00:00 UTC
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "tenant", "delete"]).shown(), @"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: there is no terminal to ask at, and this cannot be taken back: say --yes
    ");
    assert_snapshot!(cli.run(&["cloud", "tenant", "delete", "--yes", "--purge"]).shown(), @r"
    exit 0
    ----- stdout
    shop: Deleted; its data is being removed
    ----- stderr
    ");
    assert!(cloud.calls().contains(&format!("DELETE /api/v1/tenants/{TENANT}?purge=true")));
    assert!(!cli.read(".systemprompt/tenants.json").contains(TENANT));
}

#[test]
fn buying() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    cli.write(".systemprompt/tenants.json", r#"{"tenants":[]}"#);
    assert_snapshot!(cli.run(&["cloud", "tenant", "create", "--name", "My shop", "--region", "fra"]).shown(), @r"
    exit 0
    ----- stdout
    shop is ready
    id:          999bc654-9a64-49bc-98be-db976fc84e76
    status:      running
    url:         https://999bc6549a64.example
    ----- stderr
    Complete the checkout in your browser:
      https://cloud.example/checkout/3
    With manual billing the operator confirms it:
      systemprompt cloud checkout confirm 33333333-3333-4333-8333-333333333333
    To go on waiting later: systemprompt cloud tenant create --checkout 33333333-3333-4333-8333-333333333333
    shop: bought, tenant 999bc654-9a64-49bc-98be-db976fc84e76
    shop: database made
    shop: shop
    next: systemprompt cloud deploy
    ");
    let tenants: Value = serde_json::from_str(&cli.read(".systemprompt/tenants.json")).expect("JSON");
    assert_eq!(
        (&tenants["selected"], &tenants["tenants"][0]["hostname"]),
        (&TENANT.into(), &"999bc6549a64.example".into())
    );
    assert!(
        !cli.read(".systemprompt/profiles/production/profile.yaml").contains(TENANT),
        "the profile is the person's"
    );
    assert_snapshot!(cli.run(&["cloud", "tenant", "create", "--checkout", CHECKOUT]).shown(), @r"
    exit 0
    ----- stdout
    shop is ready
    id:          999bc654-9a64-49bc-98be-db976fc84e76
    status:      running
    url:         https://999bc6549a64.example
    ----- stderr
    shop: bought, tenant 999bc654-9a64-49bc-98be-db976fc84e76
    shop: database made
    shop: shop
    next: systemprompt cloud deploy
    ");
    assert_snapshot!(cli.run(&["cloud", "checkout", "confirm", CHECKOUT]).shown(), @r#"
    exit 0
    ----- stdout
    The checkout of "shop" is confirmed
    tenant:      999bc654-9a64-49bc-98be-db976fc84e76
    ----- stderr
    "#);
}

#[test]
fn a_tenant_is_remembered_before_its_infrastructure_stands() {
    let cloud = Cloud::with(Manner { never_ready: true, ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    cli.write(".systemprompt/tenants.json", r#"{"tenants":[]}"#);
    let cut = cli.run(&["cloud", "tenant", "create", "--timeout", "2"]);
    assert_eq!(cut.code, Some(1));
    let tenants: Value = serde_json::from_str(&cli.read(".systemprompt/tenants.json")).expect("JSON");
    assert_eq!((&tenants["selected"], &tenants["tenants"][0]["name"]), (&TENANT.into(), &"shop".into()));
    assert!(
        cut.stderr.contains(&format!("hint: Go on waiting: systemprompt cloud tenant create --checkout {CHECKOUT}")),
        "{}",
        cut.stderr
    );
}

#[test]
fn deploying() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    let deploy = |more: &[&str]| {
        cli.write("ca.pem", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n");
        cli.run(&[&["cloud", "deploy", "--binary", "/bin/true"], more].concat())
    };
    assert_snapshot!(deploy(&[]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[no_tenant]: no tenant is named: not by --tenant, not by the profile, and none is selected
    hint: Buy one: systemprompt cloud tenant create, or choose one: systemprompt cloud tenant select ID
    ");
    cli.run(&["cloud", "tenant", "select", TENANT]);
    assert_snapshot!(steady(&deploy(&[])), @r"
    exit 0
    ----- stdout
    Running at https://999bc6549a64.example
    digest:      [DIGEST]
    sent:        [SIZE]
    took:        [TIME]
    ----- stderr
    pushed [DIGEST]
    deploy accepted, operation 11111111-1111-4111-8111-111111111111
    shop
    shop
    ");
    assert_snapshot!(steady(&deploy(&["--skip-push"])), @r"
    exit 0
    ----- stdout
    Running at https://999bc6549a64.example
    digest:      [DIGEST]
    sent:        [SIZE]
    took:        [TIME]
    ----- stderr
    deploy accepted, operation 11111111-1111-4111-8111-111111111111
    shop
    shop
    ");
    let plan = deploy(&["--dry-run"]);
    assert!(plan.stdout.contains("  /app/web/dist/index.html (5 B)\n"), "{}", plan.stdout);
    cli.write("services/.env", "X=1");
    assert!(deploy(&["--dry-run"]).stdout.contains("left out: services/.env (environment file)\n"));
    let told = "left out 1 of the project: services/.env (why: systemprompt cloud deploy --dry-run)\n";
    assert!(deploy(&[]).stderr.contains(told));
    // What a deploy would refuse, a dry run refuses too.
    cli.write("services/config.yaml", &crate::cli::api_token());
    assert_snapshot!(deploy(&["--dry-run"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[secrets_in_image]: secrets must not be in an image: services/config.yaml:1: SystemPrompt token; remove them, or allow a file by name
    hint: Take it out of the project, or allow one file: --allow-secret PATH
    ");
}

#[test]
fn a_deploy_that_fails_tells_the_last_words_first() {
    let cloud = Cloud::with(Manner { deploy_ends: Some("failed"), ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    let ended = cli.run(&["cloud", "deploy", "--binary", "/bin/true", "--tenant", TENANT, "-q"]);
    assert_snapshot!(ended.shown(), @"
    exit 1
    ----- stdout
    ----- stderr
      | shop
    error[app_crashed]: shop
    hint: shop
    ");
}

#[test]
fn looking() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    assert_snapshot!(cli.run(&["cloud", "status"]).shown(), @r"
    exit 0
    ----- stdout
    profile:     production
    user:        dev@example.com
    999bc654-9a64-49bc-98be-db976fc84e76  shop  running  https://999bc6549a64.example
      shop
    ----- stderr
    ");
    assert_snapshot!(cli.run(&["cloud", "logs", "--tenant", TENANT, "-n", "2"]).shown(), @r"
    exit 0
    ----- stdout
    shop
    [platform] shop
    ----- stderr
    ");
}
