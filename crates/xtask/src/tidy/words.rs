//! What no file may say, and how long a source may grow.

use super::{Finding, has_extension};

/// Lines of one source file. More is two nouns in one file.
const MAX_LINES: usize = 600;

/// Paths of one machine, and hosts only a package client has to know. Written in two halves, or this file would
/// find itself.
const NOWHERE: [(&str, &str); 9] = [
    (concat!("/wo", "rk/"), "a path of one machine"),
    (concat!("/fa", "rm/"), "a path of one machine"),
    (concat!("/root/", ".cargo"), "a path of one machine"),
    (concat!("../sha", "red"), "a path outside the project"),
    (concat!(".libr", "ary"), "a path outside the project"),
    (concat!("sub", "agent"), "not a word of this project"),
    (concat!("crates", ".io"), "a registry's host"),
    (concat!("pypi", ".org"), "a registry's host"),
    (concat!("npmjs", ".org"), "a registry's host"),
];

/// Marks of work left over.
const NOT_IN_SOURCES: [(&str, &str); 7] = [
    (concat!("TO", "DO"), "do it now, or leave it out"),
    (concat!("FIX", "ME"), "mend it now"),
    (concat!("XX", "X"), "say what is meant"),
    (concat!("HA", "CK"), "say what is meant"),
    (concat!("todo", "!("), "do it now, or leave it out"),
    (concat!("unimplemented", "!("), "do it now, or leave it out"),
    (concat!("#[ign", "ore"), "a test that does not run tests nothing"),
];

/// Everything in one file that is against the rules.
pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    if path == "Cargo.lock" {
        return Vec::new();
    }
    let source = is_source(path);
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let more: &[(&str, &str)] = if source { &NOT_IN_SOURCES } else { &[] };
        let said = NOWHERE.iter().chain(more).filter(|(word, _)| says(line, word));
        findings.extend(
            said.map(|(word, why)| Finding::new(format!("{path}:{}", number + 1), format!("says {word}: {why}"))),
        );
    }
    let lines = text.lines().count();
    if has_extension(path, "rs") && lines > MAX_LINES {
        findings.push(Finding::new(path, format!("has {lines} lines; split it below {MAX_LINES}")));
    }
    findings
}

fn is_source(path: &str) -> bool {
    ["rs", "sql", "toml", "sh", "yaml", "yml"].iter().any(|extension| has_extension(path, extension))
}

/// Whether `line` has `word` by itself: capital words inside longer ones are other words.
fn says(line: &str, word: &str) -> bool {
    let inside = |character: Option<char>| character.is_some_and(|character| character.is_ascii_alphanumeric());
    line.match_indices(word).any(|(start, _)| {
        let bare = word.chars().all(|character| character.is_ascii_uppercase());
        let (before, after) = (&line[..start], &line[start + word.len()..]);
        !bare || (!inside(before.chars().next_back()) && !inside(after.chars().next()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(path: &str, text: &str) -> Vec<String> {
        check(path, text).into_iter().map(|Finding { place, message }| format!("{place}: {message}")).collect()
    }

    #[test]
    fn every_forbidden_word_is_found_where_it_stands() {
        for (word, why) in NOWHERE {
            let expected = format!("README.md:2: says {word}: {why}");
            assert_eq!(messages("README.md", &format!("fine\nsee {word}x")), [expected]);
        }
        for (word, why) in NOT_IN_SOURCES {
            assert_eq!(messages("src/a.rs", &format!("// {word} later")), [format!("src/a.rs:1: says {word}: {why}")]);
            assert!(messages("README.md", word).is_empty(), "only sources");
        }
    }

    #[test]
    fn the_same_letters_inside_other_words_are_fine() {
        let text = format!("let key = \"{}\"; // {}", concat!("sk-XXXX", "X"), concat!("HA", "CKNEY"));
        assert!(messages("src/a.rs", &text).is_empty());
    }

    #[test]
    fn the_lock_file_may_name_its_registry() {
        assert!(messages("Cargo.lock", concat!("https://github.com/rust-lang/crates", ".io-index")).is_empty());
    }

    #[test]
    fn a_long_source_is_found() {
        let long = "\n".repeat(MAX_LINES + 1);
        assert_eq!(messages("src/a.rs", &long), ["src/a.rs: has 601 lines; split it below 600"]);
        assert!(messages("src/a.rs", &"\n".repeat(MAX_LINES)).is_empty());
        assert!(messages("docs/a.md", &long).is_empty());
    }
}
