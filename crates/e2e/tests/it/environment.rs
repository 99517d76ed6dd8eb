//! What a tenant's processes are given: what the README lists, and nothing of the machine's or of the control plane's.

use anyhow::{Context as _, ensure};
use e2e::{Stack, TestApp};
use reqwest::Method;
use std::{collections::BTreeSet, fs, path::Path};
use systemprompt_contract::paths;

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_finds_the_variables_that_the_readme_lists_and_no_others() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("listed").await?;
    stack.deploy(&tenant).await?;

    let listed = listed()?;
    let inside = inside(&format!("TENANT_ID={}", tenant.id))?;
    let app = inside.iter().find(|process| process.name == "systemprompt").context("the app runs")?;
    ensure!(app.variables == listed, "found {:?}, listed {listed:?}", app.variables);
    // The app can read its neighbours in the sandbox too.
    for process in &inside {
        let more: Vec<_> = process.variables.difference(&listed).collect();
        ensure!(more.is_empty(), "{} has {more:?}", process.name);
    }
    ensure!(inside.len() > 1, "the sandbox's own process is looked at: {inside:?}");
    Ok(())
}

/// Not in what the platform logs, stores or shows in a process list; nor its users' own tokens.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_secrets_are_found_nowhere_else() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("secretive").await?;
    stack.deploy(&tenant).await?;
    let failed = TestApp { behaviour: "crash", text: "" }.deploy(&stack, &tenant).await?;
    ensure!(failed["status"] == "failed", "{failed}");
    let registry = stack.call(Method::GET, &paths::tenant(tenant.id, "/registry-token"), None).await?;
    let mut secrets = vec![
        ("API token", stack.token().expose().to_owned()),
        ("registry token", registry["data"]["token"].as_str().context("token")?.to_owned()),
    ];
    for name in ["DATABASE_URL", "JWT_SECRET", "SYNC_TOKEN"] {
        let value = variable(&format!("TENANT_ID={}", tenant.id), name)?;
        let password = value.split_once("://").and_then(|(_, rest)| rest.split_once(':')?.1.split_once('@'));
        secrets.push((name, password.map_or(value.clone(), |(password, _)| password.to_owned())));
    }
    ensure!(secrets.iter().all(|(_, secret)| secret.len() >= 16), "they are looked for, and not a part of each word");

    let mut places = vec![("the log".to_owned(), fs::read(stack.log_file())?)];
    for cluster in ["control", "tenants"] {
        let log = stack.data().join("postgres").join(format!("{cluster}.log"));
        places.push((log.display().to_string(), fs::read(&log).with_context(|| log.display().to_string())?));
    }
    for process in fs::read_dir("/proc")?.flatten() {
        if let Ok(line) = fs::read(process.path().join("cmdline")) {
            places.push((format!("a command line: {}", String::from_utf8_lossy(&line).replace('\0', " ")), line));
        }
    }
    let mut control = e2e::connect(&stack, "control", "systemprompt").await?;
    let tables: Vec<String> = sqlx::query_scalar("SELECT tablename::text FROM pg_tables WHERE schemaname = 'public'")
        .fetch_all(&mut control)
        .await?;
    ensure!(tables.len() > 5, "{tables:?}");
    for table in tables {
        let rows = sqlx::AssertSqlSafe(format!("SELECT coalesce(string_agg(row::text, ' '), '') FROM {table} row"));
        let rows: String = sqlx::query_scalar(rows).fetch_one(&mut control).await?;
        places.push((format!("the table {table}"), rows.into_bytes()));
    }
    for (place, content) in &places {
        for (name, secret) in &secrets {
            // Tables show bytes as hexadecimal digits.
            let digits = secret.bytes().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
            for text in [secret, &digits] {
                let there = content.windows(text.len()).any(|part| part == text.as_bytes());
                ensure!(!there, "{name} is in {place}");
            }
        }
    }
    Ok(())
}

/// What the app of who has `of` among its variables finds in `name`.
fn variable(of: &str, name: &str) -> anyhow::Result<String> {
    let environments = fs::read_dir("/proc")?.flatten().filter_map(|entry| fs::read(entry.path().join("environ")).ok());
    let found = environments.map(|text| String::from_utf8_lossy(&text).into_owned()).find_map(|text| {
        let mut variables = text.split('\0');
        variables.clone().find(|variable| *variable == of)?;
        variables.find_map(|variable| variable.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
    });
    found.with_context(|| format!("no {name} beside {of}"))
}

/// The first column of the README's table.
fn listed() -> anyhow::Result<BTreeSet<String>> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md"))?;
    let (_, section) = readme.split_once("## What an app finds in its environment").context("the section is there")?;
    let section = section.split("\n## ").next().unwrap_or_default();
    let names = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    Ok(names.flat_map(|names| names.split(", ")).map(|name| name.trim_matches('`').to_owned()).collect())
}

/// A process, and the names of the variables it was started with.
#[derive(Debug)]
struct Process {
    name: String,
    variables: BTreeSet<String>,
}

/// Everything that runs in the sandbox of who has this `variable`, seen from outside.
fn inside(variable: &str) -> anyhow::Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let file = |name: &str| fs::read(entry.path().join(name));
        let (Ok(environment), Ok(name)) = (file("environ"), file("comm")) else { continue };
        let Ok(namespace) = fs::read_link(entry.path().join("ns/pid")) else { continue };
        let variables = String::from_utf8_lossy(&environment).split_terminator('\0').map(str::to_owned).collect();
        all.push((namespace, String::from_utf8_lossy(&name).trim().to_owned(), variables));
    }
    let all: Vec<(_, String, Vec<String>)> = all;
    let has = |variables: &[String]| variables.iter().any(|found| found == variable);
    let (sandbox, ..) = all
        .iter()
        .find(|(_, name, variables)| name == "systemprompt" && has(variables))
        .context("nothing of this tenant runs")?;
    let names = |variables: &[String]| {
        variables.iter().map(|found| found.split('=').next().unwrap_or_default().to_owned()).collect()
    };
    let inside = all.iter().filter(|(namespace, ..)| namespace == sandbox);
    Ok(inside.map(|(_, name, variables)| Process { name: name.clone(), variables: names(variables) }).collect())
}
