//! Rules for `Cargo.toml` files.

use super::Finding;
use crate::metadata::Package;

/// A dependency stands with its reason: beside it, or over the group it stands in.
pub(super) fn check_workspace(manifest: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut group_has_reason = false;
    for line in section(manifest, "workspace.dependencies") {
        let line = line.trim();
        if line.is_empty() {
            group_has_reason = false;
        } else if line.starts_with('#') {
            group_has_reason = true;
        } else if let Some((name, rest)) = line.split_once('=')
            && !group_has_reason
            && !rest.contains(" # ")
        {
            findings.push(Finding::new("Cargo.toml", format!("{}: say in a comment what it is for", name.trim())));
        }
    }
    findings
}

/// Every crate takes part in the workspace's lints and is never published by accident.
pub(super) fn check_member(package: &Package, path: &str, manifest: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !section(manifest, "lints").any(|line| line.trim() == "workspace = true") {
        findings.push(Finding::new(path, "lacks `[lints] workspace = true`"));
    }
    if package.publish.as_ref().is_none_or(|registries| !registries.is_empty()) {
        findings.push(Finding::new(path, "lacks `publish.workspace = true` (false there)"));
    }
    for key in ["edition", "rust-version", "license"] {
        if !manifest.lines().any(|line| line.trim() == format!("{key}.workspace = true")) {
            findings.push(Finding::new(path, format!("lacks `{key}.workspace = true`")));
        }
    }
    findings
}

fn section<'a>(manifest: &'a str, name: &str) -> impl Iterator<Item = &'a str> {
    let head = format!("[{name}]");
    manifest.lines().skip_while(move |line| line.trim() != head).skip(1).take_while(|line| !line.starts_with('['))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "[package]\nedition.workspace = true\nrust-version.workspace = true\n\
                        license.workspace = true\n\n[lints]\nworkspace = true\n";

    fn member(publish: Option<Vec<String>>, manifest: &str) -> Vec<String> {
        let package = Package {
            name: "a".to_owned(),
            manifest_path: "Cargo.toml".into(),
            publish,
            dependencies: Vec::new(),
            targets: Vec::new(),
        };
        check_member(&package, "crates/a/Cargo.toml", manifest).into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn a_good_member_passes_and_each_lack_is_found() {
        assert!(member(Some(Vec::new()), GOOD).is_empty());
        assert_eq!(member(None, GOOD), ["lacks `publish.workspace = true` (false there)"]);
        let no_lints = GOOD.replace("[lints]", "[features]");
        assert_eq!(member(Some(Vec::new()), &no_lints), ["lacks `[lints] workspace = true`"]);
        let own_edition = GOOD.replace("edition.workspace = true", "edition = \"2021\"");
        assert_eq!(member(Some(Vec::new()), &own_edition), ["lacks `edition.workspace = true`"]);
    }

    #[test]
    fn a_dependency_without_a_reason_is_found() {
        let manifest = "[workspace.dependencies]\n# Time.\na = \"1\"\nb = \"1\"\n\nc = \"1\"\n\
                        d = \"1\"  # beside it\n[profile.dev]\ne = 1\n";
        let found: Vec<String> = check_workspace(manifest).into_iter().map(|finding| finding.message).collect();
        assert_eq!(found, ["c: say in a comment what it is for"]);
    }
}
