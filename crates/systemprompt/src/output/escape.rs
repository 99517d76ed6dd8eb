//! Names, messages and logs come from elsewhere: nothing in them may move the cursor, change the clipboard or turn the
//! direction of a line.

use std::{borrow::Cow, fmt::Write as _};

/// The text on one line, with every character that a terminal would act upon made visible as `\u{1b}`.
pub(crate) fn escaped(text: &str) -> Cow<'_, str> {
    replaced(
        text,
        |c| c != '\t' && is_active(c),
        |out, c| {
            match c {
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                c => {
                    // Writing to a string cannot fail.
                    let _ = write!(out, "\\u{{{:x}}}", u32::from(c));
                }
            }
        },
    )
}

/// JSON text with the same characters as `\u001b`; serde escapes only those below U+0020. They can occur in strings
/// only, so the value stays the same.
pub(crate) fn escaped_json(json: &str) -> Cow<'_, str> {
    replaced(json, is_active, |out, c| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    })
}

fn replaced(text: &str, is_bad: impl Fn(char) -> bool, replace: impl Fn(&mut String, char)) -> Cow<'_, str> {
    if !text.contains(&is_bad) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_bad(c) { replace(&mut out, c) } else { out.push(c) }
    }
    Cow::Owned(out)
}

/// C0, DEL, C1; line and paragraph separators; marks, embeddings, overrides and isolates of direction (UAX 9);
/// zero-width and tag characters, which hide text from a reader.
fn is_active(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_acts_upon_becomes_visible() {
        assert_eq!(escaped("plain – ünïcödé ✓\tok"), "plain – ünïcödé ✓\tok");
        assert_eq!(escaped("a\u{1b}]52;c;cHduZWQ=\u{7}b"), "a\\u{1b}]52;c;cHduZWQ=\\u{7}b");
        assert_eq!(escaped("good\rbad\nline"), "good\\rbad\\nline");
        assert_eq!(escaped("\u{9b}31m\u{7f}\u{202e}gnp\u{2066}"), "\\u{9b}31m\\u{7f}\\u{202e}gnp\\u{2066}");
    }

    #[test]
    fn json_keeps_its_value() {
        let value = serde_json::json!({ "k": "\u{1b}[0m\u{9b}\u{7f}\u{202e}\u{e0041} é" });
        let json = serde_json::to_string(&value).expect("a value");
        let shown = escaped_json(&json);
        assert!(!shown.chars().any(is_active), "{shown}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).expect("still JSON"), value);
    }
}
