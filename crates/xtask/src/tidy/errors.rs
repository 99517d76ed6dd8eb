//! The table of error codes in `docs/errors.md` is the list in the contract crate, word for word.

use super::Finding;
use std::fmt::Write as _;

/// One code as the contract crate declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Code {
    name: String,
    status: u16,
    meaning: String,
}

const HEAD: &str = "| code | status | meaning |\n|---|---|---|\n";

/// Reads `codes! { /// meaning⏎ Name = "name", 400; … }`.
pub(super) fn codes(source: &str) -> Vec<Code> {
    let body = source.split_once("\ncodes! {").map_or("", |(_, rest)| rest.split("\n}").next().unwrap_or_default());
    let mut meaning = String::new();
    let mut codes = Vec::new();
    for line in body.lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            if !meaning.is_empty() {
                meaning.push(' ');
            }
            meaning.push_str(text.trim());
        } else if let Some((name, status)) = declaration(line) {
            codes.push(Code { name, status, meaning: std::mem::take(&mut meaning) });
        }
    }
    codes.sort_by(|a, b| (a.status, &a.name).cmp(&(b.status, &b.name)));
    codes
}

fn declaration(line: &str) -> Option<(String, u16)> {
    let (_, rest) = line.strip_suffix(';')?.split_once(" = \"")?;
    let (name, status) = rest.split_once("\", ")?;
    Some((name.to_owned(), status.parse().ok()?))
}

/// The page with its table made from `codes`; everything around the table stays.
pub(super) fn with_table(page: &str, codes: &[Code]) -> String {
    let (before, rest) = page.split_once(HEAD).unwrap_or((page, ""));
    let after = rest.split_inclusive('\n').skip_while(|line| line.starts_with('|')).collect::<String>();
    let mut table = String::from(HEAD);
    for Code { name, status, meaning } in codes {
        let _ = writeln!(table, "| `{name}` | {status} | {meaning} |");
    }
    format!("{before}{table}{after}")
}

/// Whether the page says exactly what the code does.
pub(super) fn check(page: &str, codes: &[Code]) -> Option<Finding> {
    let message = if codes.is_empty() {
        "no `codes! { … }` found in the contract crate"
    } else if with_table(page, codes) != page {
        "is not the list of `ErrorCode`: run `cargo xtask tidy --fix`"
    } else {
        return None;
    };
    Some(Finding::new("docs/errors.md", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "macro_rules! codes {}\n\ncodes! {\n    /// Absent, or\n    /// not yours.\n    \
        NotFound = \"not_found\", 404;\n    /// Wrong.\n    BadRequest = \"bad_request\", 400;\n}\n";

    #[test]
    fn codes_are_read_with_their_meaning_and_ordered_by_status() {
        let found = codes(SOURCE);
        assert_eq!(found[0], Code { name: "bad_request".into(), status: 400, meaning: "Wrong.".into() });
        assert_eq!(found[1], Code { name: "not_found".into(), status: 404, meaning: "Absent, or not yours.".into() });
    }

    #[test]
    fn a_written_table_passes_and_any_change_of_the_code_is_found() {
        let page = with_table(&format!("# Errors\n\n{HEAD}| old | 1 | x |\n\nAfter.\n"), &codes(SOURCE));
        assert!(page.starts_with("# Errors\n\n| code"));
        assert!(page.ends_with("| `not_found` | 404 | Absent, or not yours. |\n\nAfter.\n"), "{page}");
        assert_eq!(check(&page, &codes(SOURCE)), None);
        assert!(check(&page, &codes(&SOURCE.replace("404", "410"))).is_some());
        assert!(check(&page, &codes(&SOURCE.replace("Wrong.", "Bad."))).is_some());
        assert!(check(&page, &codes("nothing here")).is_some());
    }
}
