//! The sample project: a copy of `examples/hello` of the person's own, to try things with.

use anyhow::{Context as _, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

const PAGE: &str = "web/dist/index.html";
/// Somebody's sign-in and tenants, when the example was used where it lies.
const PRIVATE: [&str; 3] = ["credentials.json", "tenants.json", "secrets.json"];
const STAMP: &str = "<!-- changed by cargo xtask up: ";

/// The copy, made when it is absent: what a person changed in it is never overwritten.
pub(super) fn copy_if_absent(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    let folder = to.parent().context("the copy lies in a folder")?;
    // Aside first: a copy that was cut off must not pass for a whole one.
    let aside = tempfile::Builder::new().prefix(".hello-").tempdir_in(folder)?;
    let whole = aside.path().join("hello");
    copy_folder(from, &whole).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    fs::rename(&whole, to).with_context(|| format!("cannot create {}", to.display()))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if PRIVATE.iter().any(|private| entry.file_name() == *private) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

/// What `GET /` has to answer.
pub(super) fn page(project: &Path) -> Result<String> {
    let file = page_file(project);
    fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))
}

/// Changes the page, so that what is served next tells whether it is the new one.
pub(super) fn change_page(project: &Path, stamp: &str) -> Result<()> {
    let file = page_file(project);
    fs::write(&file, stamped(&page(project)?, stamp)).with_context(|| format!("cannot write {}", file.display()))
}

fn page_file(project: &Path) -> PathBuf {
    project.join(PAGE)
}

fn stamped(page: &str, stamp: &str) -> String {
    let original = page.split(STAMP).next().unwrap_or_default();
    format!("{original}{STAMP}{stamp} -->\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_stamped_once_however_often_it_is_changed() {
        let once = stamped("<p>hello</p>\n", "1");
        assert_eq!(once, "<p>hello</p>\n<!-- changed by cargo xtask up: 1 -->\n");
        assert_eq!(stamped(&once, "2"), "<p>hello</p>\n<!-- changed by cargo xtask up: 2 -->\n");
    }

    #[test]
    fn the_copy_is_whole_without_anybody_s_sign_in_and_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let (profile, credentials) = (".systemprompt/profiles/a/profile.yaml", ".systemprompt/credentials.json");
        for (file, text) in [(PAGE, "<p>"), (profile, "a: 1"), (credentials, "{}")] {
            fs::create_dir_all(from.join(file).parent().unwrap()).unwrap();
            fs::write(from.join(file), text).unwrap();
        }
        copy_if_absent(&from, &to).unwrap();
        assert_eq!(page(&to).unwrap(), "<p>");
        assert!(to.join(profile).exists());
        assert!(!to.join(credentials).exists());

        change_page(&to, "1").unwrap();
        copy_if_absent(&from, &to).unwrap();
        assert!(page(&to).unwrap().contains("changed"), "the person's copy is left alone");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left aside");
    }
}
