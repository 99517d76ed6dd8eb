//! The rules of `.dockerignore`: unlike `.gitignore`, every pattern is anchored at the root, a pattern that names a
//! folder covers what is in it, and the last line that matches decides, also inside an excluded folder.

/// The parsed file.
#[derive(Debug, Default)]
pub(crate) struct DockerIgnore(Vec<Rule>);

#[derive(Debug)]
struct Rule {
    line: usize,
    keep: bool,
    segments: Vec<String>,
}

impl DockerIgnore {
    pub(crate) fn parse(text: &str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        Self(text.lines().enumerate().filter_map(|(index, line)| Rule::parse(index + 1, line)).collect())
    }

    /// The line that leaves `path` (relative, `/`-separated) out, if one does.
    pub(crate) fn excluded_by(&self, path: &str) -> Option<usize> {
        let segments: Vec<&str> = path.split('/').collect();
        let last = self.0.iter().rev().find(|rule| rule.covers(&segments))?;
        (!last.keep).then_some(last.line)
    }

    /// Whether a later `!` line may bring back something below an excluded folder.
    pub(crate) fn has_exceptions(&self) -> bool {
        self.0.iter().any(|rule| rule.keep)
    }
}

impl Rule {
    fn parse(line: usize, text: &str) -> Option<Self> {
        if text.starts_with('#') {
            return None;
        }
        let text = text.trim();
        let (keep, pattern) = match text.strip_prefix('!') {
            Some(rest) => (true, rest.trim()),
            None => (false, text),
        };
        let mut segments: Vec<String> = Vec::new();
        for segment in pattern.split('/') {
            match segment {
                "" | "." => {}
                ".." => drop(segments.pop()),
                other => segments.push(other.to_owned()),
            }
        }
        (!segments.is_empty()).then_some(Self { line, keep, segments })
    }

    /// The path itself or a folder above it matches.
    fn covers(&self, path: &[&str]) -> bool {
        (1..=path.len()).any(|depth| matches(&self.segments, &path[..depth]))
    }
}

fn matches(pattern: &[String], path: &[&str]) -> bool {
    match pattern.split_first() {
        None => path.is_empty(),
        Some((first, rest)) if first == "**" => (0..=path.len()).any(|taken| matches(rest, &path[taken..])),
        Some((first, rest)) => {
            path.split_first().is_some_and(|(name, below)| matches_name(first, name) && matches(rest, below))
        }
    }
}

/// One segment: `*`, `?`, `[a-z]`, `[^a]` and `\` before a literal character.
fn matches_name(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // Walks back only to the last star: linear memory, quadratic time at worst.
    let (mut at, mut seen) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&'*') {
            star = Some((at + 1, seen));
            at += 1;
        } else if at == pattern.len() && seen == name.len() {
            return true;
        } else if let Some(after) = name.get(seen).and_then(|&letter| step(&pattern[at..], letter)) {
            at += after;
            seen += 1;
        } else if let Some((after_star, from)) = star.filter(|&(_, from)| from < name.len()) {
            star = Some((after_star, from + 1));
            (at, seen) = (after_star, from + 1);
        } else {
            return false;
        }
    }
}

/// How much of the pattern one letter uses up, if it matches.
fn step(pattern: &[char], letter: char) -> Option<usize> {
    match pattern.first()? {
        '?' => Some(1),
        '\\' => (pattern.get(1) == Some(&letter)).then_some(2),
        '[' => class(pattern, letter),
        &literal => (literal == letter).then_some(1),
    }
}

fn class(pattern: &[char], letter: char) -> Option<usize> {
    let end = pattern.iter().skip(2).position(|&c| c == ']')? + 2;
    let (negated, set) = match &pattern[1..end] {
        ['^', set @ ..] => (true, set),
        set => (false, set),
    };
    let mut found = false;
    let mut rest = set;
    while let Some(&low) = rest.first() {
        if let ['-', high, ..] = rest[1..] {
            found |= (low..=high).contains(&letter);
            rest = &rest[3..];
        } else {
            found |= low == letter;
            rest = &rest[1..];
        }
    }
    (found != negated).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(file: &str, path: &str, expected: Option<usize>) {
        assert_eq!(DockerIgnore::parse(file).excluded_by(path), expected, "{file:?} on {path:?}");
    }

    #[test]
    fn patterns_are_anchored_and_cover_what_is_below() {
        check("*.md", "README.md", Some(1));
        check("*.md", "web/README.md", None);
        check("**/*.md", "web/a/README.md", Some(1));
        check("**/*.md", "README.md", Some(1));
        check("web/node_modules", "web/node_modules/a/b.js", Some(1));
        check("node_modules", "web/node_modules/a", None);
        check("/services/", "services/x", Some(1));
        check("services/**", "services/a/b", Some(1));
        check("a/../b", "b/c", Some(1));
        check("# comment\n\n  logs  ", "logs/x", Some(3));
        check("", "anything", None);
    }

    #[test]
    fn the_last_matching_line_decides() {
        check("*\n!web", "web/dist/index.html", None);
        check("*\n!web", "services/x", Some(1));
        check("web\n!web/dist\nweb/dist/*.map", "web/dist/app.js.map", Some(3));
        check("web\n!web/dist\nweb/dist/*.map", "web/dist/app.js", None);
        check("web\n!web/dist", "web/src/a.ts", Some(1));
    }

    #[test]
    fn segments_know_stars_classes_and_escapes() {
        for (pattern, name, expected) in [
            ("a*c", "abbc", true),
            ("a*c", "ac", true),
            ("a*c", "acd", false),
            ("*a*b*", "xxaxxbxx", true),
            ("?", "", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("[", "[", false),
            ("*", "", true),
        ] {
            assert_eq!(matches_name(pattern, name), expected, "{pattern} on {name}");
        }
    }

    proptest! {
        #[test]
        fn any_pattern_ends(pattern in "[ab*?\\[\\]^\\\\!/.-]{0,30}", path in "[ab/.]{0,30}") {
            let _ = DockerIgnore::parse(&pattern).excluded_by(&path);
        }

        #[test]
        fn a_literal_path_excludes_itself(path in "[a-z]{1,5}(/[a-z]{1,5}){0,3}") {
            prop_assert_eq!(DockerIgnore::parse(&path).excluded_by(&path), Some(1));
        }
    }
}
