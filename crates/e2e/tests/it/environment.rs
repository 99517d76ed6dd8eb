//! What a tenant's processes are given: what the README lists, and nothing of the machine's or of the control plane's.

use anyhow::{Context as _, ensure};
use e2e::{Stack, TestApp};
use reqwest::Method;
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};
use systemprompt_contract::paths;

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_finds_the_variables_that_the_readme_lists_and_no_others() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenant = stack.provision("listed").await?;
    stack.deploy(&tenant).await?;

    let listed = listed()?;
    let inside = inside(&format!("TENANT_ID={}", tenant.id))?;
    let app = inside.iter().find(|process| process.name == "systemprompt").context("the app runs")?;
    ensure!(app.names() == listed, "found {:?}, listed {listed:?}", app.names());
    // The app can read its neighbours in the sandbox too.
    for process in &inside {
        let more: Vec<_> = process.names().into_iter().filter(|name| !listed.contains(name)).collect();
        ensure!(more.is_empty(), "{} has {more:?}", process.name);
    }
    ensure!(inside.len() > 1, "the sandbox's own process is looked at");
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
    let inside = inside(&format!("TENANT_ID={}", tenant.id))?;
    let app = inside.iter().find(|process| process.name == "systemprompt").context("the app runs")?;
    for name in ["DATABASE_URL", "JWT_SECRET", "SYNC_TOKEN"] {
        let value = app.variables.get(name).context(name)?;
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

/// The first column of the README's table.
fn listed() -> anyhow::Result<BTreeSet<String>> {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md"))?;
    let (_, section) = readme.split_once("## What an app finds in its environment").context("the section is there")?;
    let section = section.split("\n## ").next().unwrap_or_default();
    let names = section.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
    Ok(names.flat_map(|names| names.split(", ")).map(|name| name.trim_matches('`').to_owned()).collect())
}

/// A process, and the variables it was started with.
struct Process {
    name: String,
    variables: BTreeMap<String, String>,
}

impl Process {
    fn names(&self) -> BTreeSet<String> {
        self.variables.keys().cloned().collect()
    }
}

/// Everything that runs in the sandbox of who has this `variable`, seen from outside.
fn inside(variable: &str) -> anyhow::Result<Vec<Process>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let file = |name: &str| fs::read(entry.path().join(name));
        let (Ok(environment), Ok(name)) = (file("environ"), file("comm")) else { continue };
        let Ok(namespace) = fs::read_link(entry.path().join("ns/pid")) else { continue };
        let environment = String::from_utf8_lossy(&environment).into_owned();
        let pairs = environment.split_terminator('\0').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let variables = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        all.push((namespace, Process { name: String::from_utf8_lossy(&name).trim().to_owned(), variables }));
    }
    let (name, value) = variable.split_once('=').context("a name and a value")?;
    let is_app = |process: &Process| {
        process.name == "systemprompt" && process.variables.get(name).is_some_and(|found| found == value)
    };
    let app = all.iter().find(|(_, process)| is_app(process)).context("nothing of this tenant runs")?;
    let sandbox = app.0.clone();
    Ok(all.into_iter().filter(|(namespace, _)| *namespace == sandbox).map(|(_, process)| process).collect())
}
