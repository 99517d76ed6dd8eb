//! What a tenant's processes are given: what the README lists, and nothing of the machine's or of the control plane's.

use anyhow::{Context as _, ensure};
use e2e::Stack;
use std::{collections::BTreeSet, fs, path::Path};

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
