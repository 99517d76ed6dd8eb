use crate::{
    cli::Cli,
    cloud::{Cloud, Manner, TENANT},
};
use insta::assert_snapshot;
use serde_json::json;

#[test]
fn nobody_is_signed_in() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    assert_snapshot!(cli.run(&["cloud", "tenant", "list"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[not_signed_in]: not signed in: there is no [PROJECT]/.systemprompt/credentials.json
    hint: Sign in: systemprompt cloud auth login
    ");
    assert_snapshot!(cli.run(&["cloud", "auth", "login"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[not_interactive]: there is no terminal, so no browser can be used
    hint: Pipe a token: systemprompt cloud auth login --token - < FILE, or print the address: --no-browser
    ");
    // To this cloud and to no other.
    for (arguments, next) in [
        (&["cloud", "tenant", "list"][..], "hint: Sign in: systemprompt cloud auth login --api-url https://API\n"),
        (
            &["cloud", "auth", "login"],
            "hint: Pipe a token: systemprompt cloud auth login --api-url https://API --token -",
        ),
        (&["cloud", "status"], "next: systemprompt cloud auth login --api-url https://API\n"),
    ] {
        let ended = cli.run(&[arguments, &["--api-url", &cloud.url]].concat());
        assert!(ended.stderr.contains(next), "{arguments:?}: {}", ended.stderr);
    }
    assert_snapshot!(cli.run(&["cloud", "deploy"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[no_profile]: this project has no profile
    hint: Write .systemprompt/profiles/production/profile.yaml; examples/hello has one to start from.
    ");
    assert!(cloud.calls().is_empty());
    assert!(!cli.home.path().join(".systemprompt").exists(), "nothing was made");
}

#[test]
fn a_token_that_is_cut_or_on_the_command_line() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    let token = crate::cli::api_token();
    assert_snapshot!(cli.run_with(&["cloud", "auth", "login", "--token", "-"], &token[..token.len() - 1]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[invalid_token]: expected one whole token on standard input, sp_live_ and its three parts
    hint: Was it cut when it was copied?
    ");
    let seen = cli.run(&["cloud", "auth", "login", "--token", &token]);
    assert!(!seen.shown().contains(&token));
    assert_snapshot!(seen.shown(), @"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: a token as an argument can be seen by other users of this machine
    hint: Pipe it: systemprompt cloud auth login --token - < FILE
    ");
}

#[test]
fn a_token_that_ends_soon() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    let tomorrow = chrono::Utc::now() + chrono::TimeDelta::days(1);
    let token = systemprompt_contract::token::new_api_token(tomorrow.timestamp());
    cli.run_with(&["cloud", "auth", "login", "--token", "-", "--api-url", &cloud.url], token.expose());
    let ended = cli.run(&["cloud", "tenant", "list"]);
    let next = "; sign in again: systemprompt cloud auth login --api-url https://API\n";
    assert!(ended.code == Some(0) && ended.stderr.contains(next), "{}", ended.stderr);
}

#[test]
fn the_token_is_shown_to_its_own_cloud_only() {
    let (cloud, other) = (Cloud::start(), Cloud::start());
    let cli = Cli::signed_in(&cloud);
    let ended = cli.run(&["cloud", "tenant", "list", "--api-url", &other.url]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains(": the token in this project is for https://API, not for"), "{}", ended.stderr);
    assert!(other.calls().is_empty(), "not even a connection with a token");
    let clear = cli.run(&["cloud", "tenant", "list", "--api-url", "http://api.systemprompt.io"]);
    assert_eq!(clear.code, Some(2));
    assert!(clear.stderr.contains("http for this machine only"), "{}", clear.stderr);
}

#[test]
fn the_cloud_refuses_or_is_away() {
    let refusal = json!({"error": {
        "code": "operation_in_progress", "message": "another deploy runs", "hint": "wait for it",
        "request_id": "22222222-2222-4222-8222-222222222222",
    }});
    let busy = Cloud::start();
    let cli = Cli::signed_in(&busy);
    let refusing = |status, body| {
        let cloud = Cloud::with(Manner { refusal: Some((status, body)), ..Manner::default() });
        let text = cli.read(".systemprompt/credentials.json").replace(&busy.url, &cloud.url);
        let cli = Cli::new(&cloud);
        cli.write(".systemprompt/credentials.json", &text);
        (cli.run(&["cloud", "tenant", "show", TENANT]), cloud)
    };
    assert_snapshot!(refusing(409, refusal).0.shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[operation_in_progress]: another deploy runs
    hint: wait for it
    request: 22222222-2222-4222-8222-222222222222
    ");
    assert_snapshot!(refusing(401, json!({})).0.shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[unauthorized]: https://API does not accept this token
    hint: Sign in again: systemprompt cloud auth login --api-url https://API
    ");
    assert_snapshot!(refusing(502, json!("a proxy")).0.shown(), @r#"
    exit 1
    ----- stdout
    ----- stderr
    error[unexpected_answer]: https://API answered 502 with something that is not from the Management API: "a proxy"
    hint: Check --api-url; a proxy may have answered in its place.
    "#);
    let absent = Cloud::absent();
    let gone = Cli::new(&absent);
    let text = cli.read(".systemprompt/credentials.json").replace(&busy.url, &absent.url);
    gone.write(".systemprompt/credentials.json", &text);
    assert_snapshot!(gone.run(&["cloud", "tenant", "show", TENANT]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[unreachable]: cannot reach https://API: Connection refused (os error 111)
    hint: Is the cloud running? A local one is started with: cargo xtask up
    ");
}

#[test]
fn arguments_and_profiles() {
    let cloud = Cloud::with(Manner { many_plans: true, ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    assert_snapshot!(cli.run(&["cloud", "tenant", "create"]).shown(), @"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: there are several plans; name one with --plan: small, large
    ");
    assert_snapshot!(cli.run(&["cloud", "tenant", "create", "--plan", "huge"]).shown(), @r#"
    exit 1
    ----- stdout
    ----- stderr
    error[no_such_plan]: there is no plan "huge"; there are: small, large
    "#);
    assert_snapshot!(cli.run(&["cloud", "tenant", "create", "--region", "moon"]).shown(), @r#"
    exit 2
    ----- stdout
    ----- stderr
    error: invalid value 'moon' for '--region <REGION>': region: expected one of iad, lhr, fra, ams, sin, nrt, syd, gru, got "moon"

    For more information, try '--help'.
    "#);
    assert_snapshot!(cli.run(&["cloud", "tenant", "show", "../x"]).shown(), @r#"
    exit 1
    ----- stdout
    ----- stderr
    error[not_a_cloud_tenant]: expected the id of a tenant in the cloud, a UUID, got "../x"
    hint: List them: systemprompt cloud tenant list
    "#);
    assert_snapshot!(cli.run(&["cloud", "deploy", "--profile", "nope"]).shown(), @r#"
    exit 1
    ----- stdout
    ----- stderr
    error[profile_not_found]: there is no profile "nope" in [PROJECT]/.systemprompt/profiles; there are: production
    "#);
    assert_snapshot!(cli.run(&["cloud", "tenant", "list", "--ca-file", "/no/such.pem"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[no_http_client]: cannot read the CA file /no/such.pem: No such file or directory (os error 2)
    hint: Check --ca-file and SYSTEMPROMPT_CA_FILE.
    ");
    cli.write(".systemprompt/profiles/local/profile.yaml", "name: local\n");
    assert_snapshot!(cli.run(&["cloud", "deploy", "--profile", "local"]).shown(), @r#"
    exit 1
    ----- stdout
    ----- stderr
    error[local_profile]: the profile "local" has the target local; a deploy needs one with `target: cloud`
    hint: Name another with --profile: local, production
    "#);
    cli.write(".systemprompt/profiles/local/profile.yaml", "name: local\ntarget: cloud\n");
    assert_snapshot!(cli.run(&["cloud", "deploy"]).shown(), @"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: there are several profiles; name one with --profile: local, production
    ");
    cli.write(".systemprompt/profiles/local/profile.yaml", "name: [\n");
    let broken = cli.run(&["cloud", "deploy", "--profile", "local"]);
    assert!(
        broken.stderr.contains("profile.yaml is not a profile: ") && broken.stderr.contains("line"),
        "{}",
        broken.stderr
    );
}

#[test]
fn files_that_are_not_private() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    cli.write(".systemprompt/credentials.json", "{\"api_token\":\"hunter2\"");
    let ended = cli.run(&["cloud", "tenant", "list"]);
    assert!(!ended.shown().contains("hunter2"));
    assert_snapshot!(ended.shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[invalid_credentials_file]: [PROJECT]/.systemprompt/credentials.json is not a credentials file: line 1, column 22 is not as expected
    hint: Remove [PROJECT]/.systemprompt/credentials.json and sign in: systemprompt cloud auth login
    ");
    std::fs::remove_file(cli.home.path().join(".systemprompt/credentials.json")).expect("removed");
    std::os::unix::fs::symlink("/etc/hostname", cli.home.path().join(".systemprompt/credentials.json"))
        .expect("linked");
    assert_snapshot!(cli.run(&["cloud", "tenant", "list"]).shown(), @"
    exit 1
    ----- stdout
    ----- stderr
    error[file]: [PROJECT]/.systemprompt/credentials.json is a symbolic link; secrets are kept in plain files only: remove the link
    ");
    let profile = "name: production\ntarget: cloud\ncloud:\n  tenants_path: ../../../../outside.json\n";
    cli.write(".systemprompt/profiles/production/profile.yaml", profile);
    let ended = cli.run(&["cloud", "tenant", "select", TENANT]);
    assert!(ended.stderr.contains("which is not below .systemprompt"), "{}", ended.stderr);
}

#[test]
fn a_password_in_a_url_does_not_come_back() {
    let cloud = Cloud::start();
    let cli = Cli::new(&cloud);
    let url = "https://me:hunter2@x.example";
    let by_env = cli.command(&["cloud", "status"]).env("SYSTEMPROMPT_API_URL", url).output().expect("ran");
    let by_argument = cli.run(&["cloud", "status", "--api-url", url]);
    assert!(!String::from_utf8_lossy(&by_env.stderr).contains("hunter2"));
    assert_snapshot!(by_argument.shown(), @r#"
    exit 2
    ----- stdout
    ----- stderr
    error[usage]: --api-url: expected an API URL such as https://api.systemprompt.io, without a user name, got "…@x.example"
    "#);
}
