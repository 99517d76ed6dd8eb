//! `.sqlx`: what the compile-time checked queries look like, so that a build needs no database.
//!
//! The traps this avoids, all met in practice: a warm build writes nothing and would leave an empty cache behind;
//! cargo does not notice a changed schema; `DATABASE_URL` set to a dead server beats a complete cache.

use crate::{
    database::Cluster,
    metadata::{Metadata, Package},
    shell::Shell,
};
use anyhow::{Context as _, Result, bail};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Options of `cargo xtask sqlx`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Options {
    /// Only say whether `.sqlx` is up to date.
    #[arg(long)]
    pub(crate) check: bool,
}

/// File name to content, of every query.
type Queries = BTreeMap<String, Vec<u8>>;

/// Writes `.sqlx`, or compares it.
pub(crate) fn run(shell: &Shell, options: &Options) -> Result<()> {
    let committed = shell.root().join(".sqlx");
    let fresh = generate(shell)?;
    if fresh.is_empty() {
        bail!("no checked query was compiled: `.sqlx` would be empty, so it was left alone");
    }
    let changes = differences(&read_folder(&committed)?, &fresh);
    if changes.is_empty() {
        println!(".sqlx is up to date: {} queries", fresh.len());
        return Ok(());
    }
    if options.check {
        bail!("`.sqlx` does not match the code and the migrations:\n{}\nrun `cargo xtask sqlx`", changes.join("\n"));
    }
    replace(&committed, &fresh)?;
    println!(".sqlx written: {} queries\n{}", fresh.len(), changes.join("\n"));
    Ok(())
}

fn generate(shell: &Shell) -> Result<Queries> {
    let cluster = Cluster::start(shell)?;
    for migration in migrations(&shell.root().join("migrations"))? {
        cluster.run_file(shell, &migration)?;
    }
    let users: Vec<Package> =
        Metadata::read(shell)?.packages.into_iter().filter(|package| package.uses("sqlx")).collect();
    touch_roots(&users)?;
    let folder = tempfile::tempdir()?;
    let mut check = shell.cargo(["check", "--quiet", "--all-targets"]);
    for package in &users {
        check.args(["-p", &package.name]);
    }
    check.env("DATABASE_URL", cluster.url()).env("SQLX_OFFLINE", "false").env("SQLX_OFFLINE_DIR", folder.path());
    shell.run(&mut check)?;
    read_folder(folder.path())
}

/// The migrations in their order, which is the order of their names.
pub(crate) fn migrations(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "sql"));
    files.sort();
    Ok(files)
}

/// Makes cargo compile every crate that may hold a query, each target of it.
fn touch_roots(packages: &[Package]) -> Result<()> {
    for target in packages.iter().flat_map(|package| &package.targets) {
        fs::File::options()
            .append(true)
            .open(&target.src_path)
            .and_then(|file| file.set_modified(SystemTime::now()))
            .with_context(|| format!("cannot touch {}", target.src_path.display()))?;
    }
    Ok(())
}

fn read_folder(folder: &Path) -> Result<Queries> {
    if !folder.exists() {
        return Ok(Queries::new());
    }
    fs::read_dir(folder)?
        .map(|entry| {
            let entry = entry?;
            Ok((entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?))
        })
        .collect()
}

fn differences(committed: &Queries, fresh: &Queries) -> Vec<String> {
    let gone = committed.keys().filter(|name| !fresh.contains_key(*name)).map(|name| format!("- {name}"));
    let new = fresh.iter().filter_map(|(name, content)| match committed.get(name) {
        None => Some(format!("+ {name}")),
        Some(old) if old != content => Some(format!("~ {name}")),
        Some(_) => None,
    });
    gone.chain(new).collect()
}

fn replace(folder: &Path, queries: &Queries) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    for (name, content) in queries {
        fs::write(folder.join(name), content)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queries(entries: &[(&str, &str)]) -> Queries {
        entries.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect()
    }

    #[test]
    fn every_kind_of_difference_is_told() {
        let committed = queries(&[("gone", "1"), ("same", "2"), ("changed", "3")]);
        let fresh = queries(&[("same", "2"), ("changed", "4"), ("new", "5")]);
        assert_eq!(differences(&committed, &fresh), ["- gone", "~ changed", "+ new"]);
        assert!(differences(&fresh, &fresh).is_empty());
    }

    #[test]
    fn a_replaced_folder_holds_the_new_queries_only() {
        let folder = tempfile::tempdir().unwrap();
        let sqlx = folder.path().join(".sqlx");
        replace(&sqlx, &queries(&[("old", "1")])).unwrap();
        replace(&sqlx, &queries(&[("new", "2")])).unwrap();
        assert_eq!(read_folder(&sqlx).unwrap(), queries(&[("new", "2")]));
    }

    #[test]
    fn migrations_come_in_order_and_nothing_else_with_them() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["0002_b.sql", "0001_a.sql", "README.md"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = migrations(folder.path()).unwrap();
        assert_eq!(found, ["0001_a.sql", "0002_b.sql"].map(|name| folder.path().join(name)));
    }
}
