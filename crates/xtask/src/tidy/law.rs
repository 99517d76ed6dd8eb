//! Who may depend on whom. The law is read from ARCHITECTURE.md, so that the page and the check cannot disagree.
//!
//! It is written there as lines `L2   name ──► name, name   name ──► name` (highest level first; a name may lack
//! `systemprompt-`) and as "sqlx only in a, b;" (each name in backticks) among the laws below them.

use super::{Finding, has_extension};
use crate::metadata::{Dependency, DependencyKind, Package};
use anyhow::{Result, ensure};
use std::collections::{BTreeMap, BTreeSet};

/// Every crate may use it.
const CONTRACT: &str = "systemprompt-contract";
/// Whole-stack tests: may use everything.
const WHOLE_STACK: &str = "e2e";
/// Must build in seconds: uses nothing of ours.
const TASKS: &str = "xtask";
/// Tests of any level may start a private PostgreSQL.
const TEST_DATABASE: &str = "systemprompt-postgres";
/// The crate that accepts TLS connections.
const TLS_SERVER: &str = "systemprompt-edge";
/// Libraries whose users the page names.
const CONFINED: [&str; 2] = ["sqlx", "axum"];

/// The dependency law.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Law {
    levels: BTreeMap<String, u8>,
    arrows: BTreeMap<String, BTreeSet<String>>,
    confined: BTreeMap<&'static str, BTreeSet<String>>,
}

impl Law {
    /// Reads it; fails when the page has no such lines, rather than allow everything.
    pub(super) fn parse(page: &str) -> Result<Self> {
        let mut levels = BTreeMap::new();
        let mut arrows: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (level, rest) in page.lines().filter_map(level_line) {
            for segment in rest.split("  ").map(str::trim).filter(|segment| !segment.is_empty()) {
                let (name, targets) = segment.split_once(" ──► ").unwrap_or((segment, ""));
                if name.contains(' ') {
                    continue; // prose beside the names
                }
                levels.insert(name.to_owned(), level);
                let targets = targets.split(", ").filter(|target| !target.is_empty()).map(full_name);
                arrows.entry(name.to_owned()).or_default().extend(targets);
            }
        }
        ensure!(levels.len() > 5, "ARCHITECTURE.md has no `L3   crate ──► crate, crate` lines any more");
        for (from, targets) in &arrows {
            for to in targets {
                let down = levels.get(to).is_some_and(|level| level < &levels[from]);
                ensure!(down, "ARCHITECTURE.md draws {from} ──► {to}, which does not point down");
            }
        }
        let lowest = levels.get(CONTRACT).is_some_and(|contract| levels.values().all(|level| level >= contract));
        ensure!(lowest, "ARCHITECTURE.md has to draw {CONTRACT} on the lowest level: every crate may use it");
        let mut confined = BTreeMap::new();
        for library in CONFINED {
            let users = confined_to(page, library);
            ensure!(!users.is_empty(), "ARCHITECTURE.md does not say \"`{library}` only in `…`\" any more");
            confined.insert(library, users);
        }
        Ok(Self { levels, arrows, confined })
    }

    /// Everything in the workspace that breaks it.
    pub(super) fn check(&self, packages: &[Package]) -> Vec<Finding> {
        let ours: BTreeMap<&str, &Package> = packages.iter().map(|package| (package.name.as_str(), package)).collect();
        let mut findings = Vec::new();
        for package in packages {
            let place = format!("crates/{}/Cargo.toml", package.name);
            let outside = [WHOLE_STACK, TASKS].contains(&package.name.as_str());
            if !outside && !self.levels.contains_key(&package.name) {
                findings.push(Finding::new(&place, "has no level in ARCHITECTURE.md: draw it into the diagram"));
            }
            for dependency in &package.dependencies {
                let broken = match ours.get(dependency.name.as_str()) {
                    Some(target) => self.check_ours(package, dependency, target),
                    None => self.check_library(package, dependency),
                };
                findings.extend(broken.map(|message| Finding::new(&place, message)));
            }
        }
        findings
    }

    fn check_ours(&self, package: &Package, dependency: &Dependency, target: &Package) -> Option<String> {
        let (from, to) = (package.name.as_str(), target.name.as_str());
        if from == WHOLE_STACK || from == to {
            return None;
        }
        if from == TASKS {
            return Some(format!("must build in seconds and so depends on none of our crates, but does on {to}"));
        }
        if target.is_binary_only() {
            return Some(format!("depends on the binary {to}; only {WHOLE_STACK} may"));
        }
        if dependency.kind == Some(DependencyKind::Dev) {
            let down = self.levels.get(to) < self.levels.get(from);
            return (!down && to != TEST_DATABASE).then(|| format!("its tests depend on {to}, which is not below it"));
        }
        if dependency.features.iter().any(|feature| feature == "testing") {
            return Some(format!("turns on `testing` of {to} outside its tests"));
        }
        let drawn = self.arrows.get(from).is_some_and(|targets| targets.contains(to));
        (to != CONTRACT && !drawn).then(|| format!("depends on {to}; ARCHITECTURE.md draws no such arrow"))
    }

    fn check_library(&self, package: &Package, dependency: &Dependency) -> Option<String> {
        let users = self.confined.get(dependency.name.as_str())?;
        let for_tests = dependency.kind == Some(DependencyKind::Dev) || package.name == WHOLE_STACK;
        (!for_tests && !users.contains(&package.name))
            .then(|| format!("depends on {}; only {} may", dependency.name, join(users)))
    }

    /// deny.toml repeats who may use the confined libraries, for what comes in by other people's crates: the crates
    /// that do use them, neither more nor less.
    pub(super) fn check_wrappers(&self, packages: &[Package], deny: &str) -> Vec<Finding> {
        let differs = |library: &str| {
            let users = packages.iter().filter(|package| package.uses(library)).map(|package| package.name.as_str());
            let users: BTreeSet<&str> = users.collect();
            let wrappers = wrappers(deny, library);
            (wrappers != users).then(|| format!("wrappers of {library}: has {wrappers:?}, but {users:?} use it"))
        };
        self.confined
            .keys()
            .filter_map(|library| differs(library))
            .map(|message| Finding::new("deny.toml", message))
            .collect()
    }

    /// Server-side TLS lives in one crate. Which side of rustls a crate uses, only its source shows.
    #[allow(clippy::unused_self, reason = "a part of the law, asked for beside the others")]
    pub(super) fn check_source(&self, path: &str, text: &str) -> Option<Finding> {
        let (package, file) = path.strip_prefix("crates/")?.split_once('/')?;
        if [TLS_SERVER, TASKS].contains(&package) || !file.starts_with("src/") || !has_extension(path, "rs") {
            return None;
        }
        let code = without_tests(text);
        let word = ["rustls::ServerConfig", "rustls::server", "TlsAcceptor", "LazyConfigAcceptor"]
            .into_iter()
            .find(|word| code.contains(word))?;
        Some(Finding::new(path, format!("uses {word}: server-side TLS lives in {TLS_SERVER}")))
    }
}

/// The names of the list `wrappers` in the section that bans `library`.
fn wrappers<'a>(deny: &'a str, library: &str) -> BTreeSet<&'a str> {
    let section = deny.split("[[bans.deny]]").find(|section| section.contains(&format!("crate = \"{library}\"")));
    let list = section.and_then(|section| section.split_once("wrappers = [")?.1.split(']').next());
    list.unwrap_or_default()
        .split(',')
        .map(|name| name.trim().trim_matches('"'))
        .filter(|name| !name.is_empty())
        .collect()
}

/// The text without its `mod tests { … }`. What else is for tests only, such as a module in a file of its own that is
/// declared at the top, hides nothing behind it.
fn without_tests(text: &str) -> String {
    let Some((before, rest)) = text.split_once("#[cfg(test)]\nmod tests {") else { return text.to_owned() };
    let after = rest.split_once("\n}\n").map_or("", |(_, after)| after);
    [before, after].concat()
}

fn level_line(line: &str) -> Option<(u8, &str)> {
    let (level, rest) = line.strip_prefix('L')?.split_once(' ')?;
    Some((level.parse().ok()?, rest))
}

fn full_name(short: &str) -> String {
    if short.starts_with("systemprompt") { short.to_owned() } else { format!("systemprompt-{short}") }
}

fn confined_to(page: &str, library: &str) -> BTreeSet<String> {
    let Some((_, rest)) = page.split_once(&format!("`{library}` only in ")) else { return BTreeSet::new() };
    let sentence = rest.split(['.', ';']).next().unwrap_or_default();
    sentence.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn join(names: &BTreeSet<String>) -> String {
    names.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Target;

    const PAGE: &str = "\
L3   systemprompt ──► cloud, runtime        management-api ──► registry, postgres
L2   systemprompt-cloud ──► oci     systemprompt-registry ──► oci
L1   systemprompt-oci   systemprompt-postgres   systemprompt-runtime
L0   systemprompt-contract        every crate may use it; it uses none of ours
Laws: `sqlx` only in `management-api`, `systemprompt-runtime`; `axum` only in `management-api`.";

    fn package(name: &str, kind: &str, dependencies: &[Dependency]) -> Package {
        Package {
            name: name.to_owned(),
            manifest_path: format!("/crates/{name}/Cargo.toml").into(),
            publish: Some(Vec::new()),
            dependencies: dependencies.to_vec(),
            targets: vec![Target { kind: vec![kind.to_owned()], src_path: "lib.rs".into() }],
        }
    }

    fn on(name: &str) -> Dependency {
        Dependency { name: name.to_owned(), kind: None, features: Vec::new() }
    }

    fn for_tests(name: &str) -> Dependency {
        Dependency { kind: Some(DependencyKind::Dev), ..on(name) }
    }

    /// The messages for one package among a workspace of all.
    fn check(name: &str, dependencies: &[Dependency]) -> Vec<String> {
        let mut packages: Vec<Package> =
            ["systemprompt-cloud", "systemprompt-registry", "systemprompt-oci", "systemprompt-postgres"]
                .into_iter()
                .chain(["systemprompt-runtime", "systemprompt-contract"])
                .map(|name| package(name, "lib", &[]))
                .chain(["systemprompt", "management-api"].map(|name| package(name, "bin", &[])))
                .filter(|package| package.name != name)
                .collect();
        packages.push(package(name, "lib", dependencies));
        let findings = Law::parse(PAGE).unwrap().check(&packages);
        findings.into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn what_is_drawn_is_allowed() {
        assert!(check("systemprompt-cloud", &[on("systemprompt-oci"), on("systemprompt-contract")]).is_empty());
        assert!(check("management-api", &[on("systemprompt-postgres"), on("sqlx"), on("axum")]).is_empty());
        assert!(check("e2e", &[on("management-api"), on("sqlx")]).is_empty(), "it is a test altogether");
    }

    #[test]
    fn an_arrow_that_is_not_drawn_is_found() {
        for (from, to) in [
            ("systemprompt-oci", "systemprompt-cloud"),
            ("systemprompt-oci", "systemprompt-postgres"),
            ("systemprompt-cloud", "systemprompt-postgres"),
        ] {
            assert_eq!(check(from, &[on(to)]), [format!("depends on {to}; ARCHITECTURE.md draws no such arrow")]);
        }
    }

    #[test]
    fn nothing_depends_on_a_binary_and_xtask_on_nothing_of_ours() {
        assert!(check("systemprompt-cloud", &[on("systemprompt")])[0].contains("depends on the binary systemprompt"));
        assert!(check("xtask", &[on("systemprompt-oci")])[0].contains("must build in seconds"));
    }

    #[test]
    fn tests_may_use_what_is_below_and_the_private_database() {
        assert!(check("systemprompt-runtime", &[for_tests("systemprompt-postgres")]).is_empty());
        assert!(check("systemprompt-cloud", &[for_tests("systemprompt-oci")]).is_empty());
        assert!(check("systemprompt-oci", &[for_tests("systemprompt-runtime")])[0].contains("not below it"));
    }

    #[test]
    fn test_support_stays_in_tests() {
        let testing = Dependency { features: vec!["testing".to_owned()], ..on("systemprompt-oci") };
        assert!(check("systemprompt-cloud", &[testing])[0].contains("turns on `testing`"));
    }

    #[test]
    fn confined_libraries_are_found_elsewhere() {
        assert_eq!(
            check("systemprompt-cloud", &[on("sqlx"), for_tests("axum")]),
            ["depends on sqlx; only management-api, systemprompt-runtime may"]
        );
    }

    #[test]
    fn a_crate_outside_the_diagram_is_found() {
        assert!(check("systemprompt-new", &[])[0].contains("has no level"));
    }

    #[test]
    fn server_side_tls_is_found_outside_the_edge_but_not_in_tests() {
        let law = Law::parse(PAGE).unwrap();
        let code = "let config = rustls::ServerConfig::builder();";
        assert!(law.check_source("crates/management-api/src/serve.rs", code).is_some());
        assert_eq!(law.check_source("crates/systemprompt-edge/src/tls.rs", code), None);
        let test_only = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{ {code} }}");
        assert_eq!(law.check_source("crates/management-api/src/serve.rs", &test_only), None);
        for hidden in ["#[cfg(test)]\nmod testing;\n", "#[cfg(test)]\nmod tests {\n    fn f() {}\n}\n"] {
            let behind = format!("{hidden}{code}");
            assert!(law.check_source("crates/management-api/src/serve.rs", &behind).is_some(), "{behind}");
        }
    }

    #[test]
    fn an_arrow_that_does_not_point_down_is_refused() {
        let page = |from: &str, to: &str| Law::parse(&PAGE.replace(from, to)).unwrap_err().to_string();
        let aside = page("L1   systemprompt-oci ", "L1   systemprompt-oci ──► runtime ");
        assert!(aside.contains("systemprompt-oci ──► systemprompt-runtime"), "{aside}");
        let up = page("L1   systemprompt-oci ", "L1   systemprompt-oci ──► cloud ");
        assert!(up.contains("does not point down"), "{up}");
        let contract = page("L0   systemprompt-contract", "L4   systemprompt-contract");
        assert!(contract.contains("lowest level"), "{contract}");
        assert!(!check("systemprompt-contract", &[on("systemprompt-oci")]).is_empty());
    }

    #[test]
    fn the_list_of_cargo_deny_is_who_uses_it() {
        let law = Law::parse(PAGE).unwrap();
        let packages =
            [package("management-api", "bin", &[on("sqlx"), on("axum")]), package("e2e", "lib", &[for_tests("sqlx")])];
        let deny = |sqlx: &str| {
            format!(
                "[[bans.deny]]\ncrate = \"sqlx\"\nwrappers = [{sqlx}]\n\
                 [[bans.deny]]\ncrate = \"axum\"\nwrappers = [\"management-api\"]\n"
            )
        };
        assert_eq!(law.check_wrappers(&packages, &deny("\"management-api\", \"e2e\"")), []);
        assert_eq!(law.check_wrappers(&packages, &deny("\"management-api\"")).len(), 1);
        assert_eq!(law.check_wrappers(&packages, &deny("\"management-api\", \"e2e\", \"edge\"")).len(), 1);
        assert_eq!(law.check_wrappers(&packages, "").len(), 2);
    }

    #[test]
    fn a_page_without_the_law_is_refused() {
        assert!(Law::parse("# Architecture\n").is_err());
        assert!(Law::parse(&PAGE.replace("`axum` only in", "axum anywhere:")).is_err());
    }
}
