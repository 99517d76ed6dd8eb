//! The project's own rules, those no other tool knows. Each is a pure function from text to findings.

mod errors;
mod law;
mod manifests;
mod migrations;
mod words;

use crate::{metadata::Metadata, shell::Shell, sqlx};
use anyhow::{Context as _, Result, bail};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Options of `cargo xtask tidy`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Write the tables that are made from the code.
    #[arg(long)]
    fix: bool,
}

/// Something against a rule: where, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    place: String,
    message: String,
}

impl Finding {
    fn new(place: impl Into<String>, message: impl Into<String>) -> Self {
        Self { place: place.into(), message: message.into() }
    }
}

const ERROR_CODES: &str = "crates/systemprompt-contract/src/error.rs";
const ERROR_TABLE: &str = "docs/errors.md";

/// Reports everything against the rules; fails when there is anything.
pub(crate) fn run(shell: &Shell, options: &Options) -> Result<()> {
    let tree = Tree::read(shell)?;
    if options.fix {
        let table = errors::with_table(tree.text(ERROR_TABLE)?, &errors::codes(tree.text(ERROR_CODES)?));
        fs::write(shell.root().join(ERROR_TABLE), table)?;
        return run(shell, &Options { fix: false });
    }
    let mut findings = findings(shell, &tree)?;
    if findings.is_empty() {
        eprintln!("tidy: {} files, nothing against the rules", tree.files.len());
        return Ok(());
    }
    findings.sort();
    let lines: Vec<String> = findings.iter().map(|Finding { place, message }| format!("{place}: {message}")).collect();
    bail!("against the rules:\n{}", lines.join("\n"))
}

fn findings(shell: &Shell, tree: &Tree) -> Result<Vec<Finding>> {
    let metadata = Metadata::read(shell)?;
    let law = law::Law::parse(tree.text("ARCHITECTURE.md")?)?;
    let mut findings = law.check(&metadata.packages);
    findings.extend(law.check_wrappers(&metadata.packages, tree.text("deny.toml")?));
    findings.extend(manifests::check_workspace(tree.text("Cargo.toml")?));
    for package in &metadata.packages {
        let manifest = tree.relative(&package.manifest_path);
        findings.extend(manifests::check_member(package, &manifest, tree.text(&manifest)?));
    }
    for (path, text) in &tree.files {
        findings.extend(words::check(path, text));
        findings.extend(law.check_source(path, text));
    }
    findings.extend(migrations::check(&sqlx::migrations(&shell.root().join("migrations"))?));
    findings.extend(errors::check(tree.text(ERROR_TABLE)?, &errors::codes(tree.text(ERROR_CODES)?)));
    Ok(findings)
}

fn has_extension(path: &str, extension: &str) -> bool {
    Path::new(path).extension().is_some_and(|found| found == extension)
}

/// Every text file that is, or would be, committed.
struct Tree {
    root: PathBuf,
    files: BTreeMap<String, String>,
}

impl Tree {
    fn read(shell: &Shell) -> Result<Self> {
        let mut git = Command::new("git");
        // A clone that belongs to somebody else, as in a container, is as good.
        git.args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
        git.current_dir(shell.root());
        let listed = shell.read_quiet(&mut git)?;
        let files = listed
            .split_terminator('\0')
            // Deleted but not committed yet, or not text: nothing to read.
            .filter_map(|path| Some((path.to_owned(), fs::read_to_string(shell.root().join(path)).ok()?)))
            .collect();
        Ok(Self { root: shell.root().to_owned(), files })
    }

    fn text(&self, path: &str) -> Result<&str> {
        self.files.get(path).map(String::as_str).with_context(|| format!("{path} is not there"))
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).to_string_lossy().into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_itself_is_read_and_its_law_understood() {
        let shell = Shell::open().unwrap();
        let tree = Tree::read(&shell).unwrap();
        assert!(tree.files.contains_key("Cargo.toml"));
        law::Law::parse(tree.text("ARCHITECTURE.md").unwrap()).unwrap();
        assert!(errors::codes(tree.text(ERROR_CODES).unwrap()).len() > 10);
    }
}
