//! Finds secrets by their whole form: a prefix alone is no secret, so our own program (which knows the prefixes) and
//! a text with `sk-ant-xxxxx` pass.
//!
//! One pass of one automaton looks for all prefixes; only where one stands is the rest of the token looked at.

use aho_corasick::AhoCorasick;
use serde::Serialize;
use std::{
    fmt,
    io::{self, Read},
    path::PathBuf,
    sync::OnceLock,
};
use systemprompt_contract::token;

/// Raised whenever a rule changes, so that cached verdicts of older rules are not trusted.
pub(crate) const RULES_VERSION: u32 = 2;

/// What kind of secret was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "`Display` says it")]
pub enum SecretKind {
    SystemPromptToken,
    AnthropicKey,
    OpenAiKey,
    GoogleApiKey,
    GitHubToken,
    SlackToken,
    AwsAccessKey,
    PrivateKey,
}

impl fmt::Display for SecretKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SystemPromptToken => "SystemPrompt token",
            Self::AnthropicKey => "Anthropic key",
            Self::OpenAiKey => "OpenAI key",
            Self::GoogleApiKey => "Google API key",
            Self::GitHubToken => "GitHub token",
            Self::SlackToken => "Slack token",
            Self::AwsAccessKey => "AWS access key id",
            Self::PrivateKey => "private key",
        })
    }
}

/// Where a secret stands; never the secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SecretFinding {
    /// Relative to the project.
    pub path: PathBuf,
    /// Counted from 1.
    pub line: usize,
    /// What it looks like.
    pub kind: SecretKind,
}

impl fmt::Display for SecretFinding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.kind)
    }
}

/// No token is longer; a longer run of token letters is some other data.
const MAX_TOKEN: usize = 2048;
const WINDOW: usize = 1 << 18;
/// 256 bits (random, or a MAC) in 43 characters, and the checksum: how every token of ours ends.
const LAST_PART: usize = 43 + 6;
/// Longest escape that is looked for before a token: `\u003d`.
const MAX_ESCAPE: usize = 6;
/// Findings beyond it say nothing new.
const MAX_FINDINGS: usize = 20;

/// Line and kind of each secret in what `reader` gives; `also` sees every byte once (for the digest).
pub(crate) fn scan(reader: &mut impl Read, mut also: impl FnMut(&[u8])) -> io::Result<Vec<(usize, SecretKind)>> {
    let mut window = Vec::with_capacity(WINDOW + MAX_TOKEN);
    let mut state = State { findings: Vec::new(), lines: 0 };
    // So much of the window was decided before and is kept to see what stands before the rest.
    let mut known = 0;
    loop {
        let kept = window.len();
        let read = reader.by_ref().take((WINDOW - MAX_TOKEN) as u64).read_to_end(&mut window)?;
        also(&window[kept..]);
        let last = read == 0;
        // A token that starts near the end may go on in the next window: it is looked at there.
        let decided = if last { window.len() } else { window.len().saturating_sub(MAX_TOKEN) };
        state.scan_window(&window, known, decided);
        if last {
            return Ok(state.findings);
        }
        known = decided.min(MAX_ESCAPE);
        window.drain(..decided - known);
    }
}

struct State {
    findings: Vec<(usize, SecretKind)>,
    /// Line ends in all that is decided.
    lines: usize,
}

impl State {
    /// Looks at the secrets that start in `known..decided`.
    fn scan_window(&mut self, window: &[u8], known: usize, decided: usize) {
        for (start, rule) in prefixes().find_all(window) {
            if start >= decided || self.findings.len() >= MAX_FINDINGS {
                break;
            }
            if start < known {
                continue;
            }
            let before = start.checked_sub(1).map(|at| window[at]);
            // `task-…` is no `sk-…`: a token starts where no word goes on, but `_` joins names to it (`TOKEN_ghp_…`).
            // Ours has a checksum and needs no such help, so nothing before it hides it.
            if before.is_some_and(|byte| byte.is_ascii_alphanumeric())
                && !matches!(rule, Rule::PrivateKey | Rule::Ours)
                && !after_escape(window, start)
            {
                continue;
            }
            let end = window.len().min(start + MAX_TOKEN);
            if let Some(kind) = rule.whole_secret(&window[start..end]) {
                self.findings.push((self.lines + line_ends(&window[known..start]) + 1, kind));
            }
        }
        self.lines += line_ends(&window[known..decided]);
    }
}

/// Behind `\n`, `\r`, `\t`, `\x3d`, `\u003d` or `%3D`: the word character belongs to an escape and not to the text.
fn after_escape(window: &[u8], start: usize) -> bool {
    let before = &window[start.saturating_sub(MAX_ESCAPE)..start];
    let coded = |opening: &[u8], digits: usize| {
        let at = before.len().saturating_sub(digits);
        before[..at].ends_with(opening) && before[at..].iter().all(u8::is_ascii_hexdigit)
    };
    matches!(before, [.., b'\\', b'n' | b'r' | b't']) || coded(b"%", 2) || coded(br"\x", 2) || coded(br"\u", 4)
}

fn line_ends(bytes: &[u8]) -> usize {
    bytes.iter().map(|&byte| usize::from(byte == b'\n')).sum()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    Ours,
    Anthropic,
    OpenAiProject,
    OpenAi,
    Google,
    GitHub,
    GitHubFineGrained,
    Slack,
    Aws,
    PrivateKey,
}

const RULES: [(&str, Rule); 21] = [
    (token::API_PREFIX, Rule::Ours),
    (token::SYNC_PREFIX, Rule::Ours),
    (token::REGISTRY_PREFIX, Rule::Ours),
    (token::SETUP_PREFIX, Rule::Ours),
    ("sk-ant-", Rule::Anthropic),
    ("sk-proj-", Rule::OpenAiProject),
    ("sk-svcacct-", Rule::OpenAiProject),
    ("sk-admin-", Rule::OpenAiProject),
    ("sk-", Rule::OpenAi),
    ("AIza", Rule::Google),
    ("ghp_", Rule::GitHub),
    ("gho_", Rule::GitHub),
    ("ghu_", Rule::GitHub),
    ("ghs_", Rule::GitHub),
    ("ghr_", Rule::GitHub),
    ("github_pat_", Rule::GitHubFineGrained),
    ("xoxb-", Rule::Slack),
    ("xoxp-", Rule::Slack),
    ("AKIA", Rule::Aws),
    ("ASIA", Rule::Aws),
    ("-----BEGIN ", Rule::PrivateKey),
];

struct Prefixes(AhoCorasick);

fn prefixes() -> &'static Prefixes {
    static PREFIXES: OnceLock<Prefixes> = OnceLock::new();
    PREFIXES.get_or_init(|| {
        let patterns = RULES.iter().map(|(prefix, _)| prefix);
        let automaton = AhoCorasick::builder()
            .match_kind(aho_corasick::MatchKind::LeftmostLongest)
            .build(patterns)
            .expect("a few short fixed patterns");
        Prefixes(automaton)
    })
}

impl Prefixes {
    /// Start and rule of every prefix, the longest where several stand.
    fn find_all<'a>(&'a self, window: &'a [u8]) -> impl Iterator<Item = (usize, Rule)> + 'a {
        self.0.find_iter(window).map(|found| (found.start(), RULES[found.pattern().as_usize()].1))
    }
}

impl Rule {
    /// The kind, when a whole secret starts at the start of `text`.
    fn whole_secret(self, text: &[u8]) -> Option<SecretKind> {
        let is_whole = match self {
            Self::Ours => is_whole_token_of_ours(text),
            Self::Anthropic => looks_random(run_after(text, b"sk-ant-", is_word_or_dash), 80, 200),
            Self::OpenAiProject => {
                let after = text.iter().skip(3).position(|&byte| byte == b'-').map_or(0, |dash| dash + 4);
                looks_random(run_after(text, &text[..after], is_word_or_dash), 40, 300)
            }
            Self::OpenAi => looks_random(run_after(text, b"sk-", |byte| byte.is_ascii_alphanumeric()), 48, 48),
            Self::Google => looks_random(run_after(text, b"AIza", is_word_or_dash), 35, 35),
            Self::GitHub => looks_random(run_after(text, &text[..4], |byte| byte.is_ascii_alphanumeric()), 36, 36),
            Self::GitHubFineGrained => looks_random(run_after(text, b"github_pat_", is_word), 82, 82),
            Self::Slack => {
                let run = run_after(text, &text[..5], |byte| byte.is_ascii_alphanumeric() || byte == b'-');
                run.first().is_some_and(u8::is_ascii_digit) && looks_random(run, 40, 300)
            }
            Self::Aws => {
                let run = run_after(text, &text[..4], is_word);
                let spelled = |byte: &u8| byte.is_ascii_uppercase() || byte.is_ascii_digit();
                run.len() == 16 && run.iter().all(spelled) && !run.ends_with(b"EXAMPLE") && distinct(run) >= 6
            }
            Self::PrivateKey => is_private_key(text),
        };
        is_whole.then(|| self.kind())
    }

    fn kind(self) -> SecretKind {
        match self {
            Self::Ours => SecretKind::SystemPromptToken,
            Self::Anthropic => SecretKind::AnthropicKey,
            Self::OpenAiProject | Self::OpenAi => SecretKind::OpenAiKey,
            Self::Google => SecretKind::GoogleApiKey,
            Self::GitHub | Self::GitHubFineGrained => SecretKind::GitHubToken,
            Self::Slack => SecretKind::SlackToken,
            Self::Aws => SecretKind::AwsAccessKey,
            Self::PrivateKey => SecretKind::PrivateKey,
        }
    }
}

/// By checksum: at the end of the run of token letters, or where the last part of such a token ends, since a file's
/// ending or any other text may go on behind it.
fn is_whole_token_of_ours(text: &[u8]) -> bool {
    let run = run_after(text, b"", |byte| is_word_or_dash(byte) || byte == b'.');
    let Ok(run) = std::str::from_utf8(run) else { return false };
    let trimmed = run.trim_end_matches(['.', '-', '_']);
    let cut = last_part_of_ours(run).and_then(|start| run.get(..start + LAST_PART)).unwrap_or_default();
    [run, trimmed, cut].into_iter().any(|candidate| token::verify_checksum(candidate).is_some())
}

/// Where the last part of a token of ours begins: behind the prefix, or behind as many dots as its kind has.
fn last_part_of_ours(run: &str) -> Option<usize> {
    let prefix = token::PREFIXES.iter().find(|prefix| run.starts_with(**prefix))?;
    let dots = match *prefix {
        token::API_PREFIX => 2,
        token::REGISTRY_PREFIX => 1,
        _ => 0,
    };
    match dots {
        0 => Some(prefix.len()),
        dots => run.match_indices('.').nth(dots - 1).map(|(at, _)| at + 1),
    }
}

/// A header, a line end (also one escaped in JSON), and the start of a body.
fn is_private_key(text: &[u8]) -> bool {
    const END: &[u8] = b"PRIVATE KEY-----";
    let Some(end) =
        text.iter().take(80).collect::<Vec<_>>().windows(END.len()).position(|part| part.iter().copied().eq(END))
    else {
        return false;
    };
    let body = &text[end + END.len()..];
    let gap =
        body.iter().take_while(|&&byte| matches!(byte, b'\r' | b'\n' | b' ' | b'\t' | b'\\' | b'n' | b'r')).count();
    // Old keys carry headers (`Proc-Type:`) before the body; those are encrypted, and still no content of an image.
    gap > 0
        && body[gap..]
            .iter()
            .take_while(|&&byte| is_base64(byte) || byte == b':' || byte == b'-' || byte == b',')
            .count()
            >= 16
}

fn run_after<'a>(text: &'a [u8], prefix: &[u8], is_part: impl Fn(u8) -> bool) -> &'a [u8] {
    let rest = text.get(prefix.len()..).unwrap_or_default();
    &rest[..rest.iter().take_while(|&&byte| is_part(byte)).count()]
}

/// Of a secret's length, and not a placeholder such as `xxxx…`: digits, letters and some variety.
fn looks_random(run: &[u8], min: usize, max: usize) -> bool {
    (min..=max).contains(&run.len())
        && run.iter().any(u8::is_ascii_digit)
        && run.iter().any(u8::is_ascii_alphabetic)
        && distinct(run) >= 10
}

fn distinct(run: &[u8]) -> usize {
    let mut seen = [false; 256];
    for &byte in run {
        seen[usize::from(byte)] = true;
    }
    seen.iter().filter(|&&seen| seen).count()
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn is_word_or_dash(byte: u8) -> bool {
    is_word(byte) || byte == b'-'
}

fn is_base64(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'/'
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Random-looking text, made here so that no whole secret stands in this file.
    fn letters(count: usize) -> String {
        let alphabet = b"aB3dE6gH9jK2mN5pQ8sT1vW4yZ7";
        (0..count).map(|at| char::from(alphabet[(at * 7 + at / 5) % alphabet.len()])).collect()
    }

    fn kinds(text: &str) -> Vec<SecretKind> {
        let found = scan(&mut text.as_bytes(), |_| {}).expect("memory");
        found.into_iter().map(|(_, kind)| kind).collect()
    }

    #[test]
    fn whole_secrets_are_found() {
        let ours = token::new_api_token(1_900_000_000).expose().to_owned();
        let sync = token::new_random_token(token::SYNC_PREFIX).expose().to_owned();
        let registry = format!("{}{}.{}", token::REGISTRY_PREFIX, letters(90), token::random_text());
        let registry = token::with_checksum(registry).expose().to_owned();
        for (text, kind) in [
            (format!("token: {ours}\n"), SecretKind::SystemPromptToken),
            (format!("It is {ours}."), SecretKind::SystemPromptToken),
            (format!("\"{sync}\""), SecretKind::SystemPromptToken),
            (format!("{sync}-and-more"), SecretKind::SystemPromptToken),
            (format!("backup_{ours}.json"), SecretKind::SystemPromptToken),
            (format!("{ours}-old"), SecretKind::SystemPromptToken),
            (format!("see {registry}.html"), SecretKind::SystemPromptToken),
            (format!("{registry}_"), SecretKind::SystemPromptToken),
            (format!("KEY=sk-ant-api03-{}", letters(95)), SecretKind::AnthropicKey),
            (format!(r#"{{"a":"\u003dsk-ant-api03-{}"}}"#, letters(95)), SecretKind::AnthropicKey),
            (format!(r#""\x22sk-ant-api03-{}""#, letters(95)), SecretKind::AnthropicKey),
            (format!("a%3Dsk-ant-api03-{}", letters(95)), SecretKind::AnthropicKey),
            (format!("TOKEN_ghp_{}", letters(36)), SecretKind::GitHubToken),
            (format!("sk-proj-{}", letters(74)), SecretKind::OpenAiKey),
            (format!("'sk-{}'", letters(48)), SecretKind::OpenAiKey),
            (format!("AIza{}", letters(35)), SecretKind::GoogleApiKey),
            (format!("ghp_{}", letters(36)), SecretKind::GitHubToken),
            (format!("github_pat_{}", letters(82)), SecretKind::GitHubToken),
            (format!("xoxb-123456789012-123456789012-{}", letters(24)), SecretKind::SlackToken),
            (format!("AKIA{}", letters(16).to_uppercase()), SecretKind::AwsAccessKey),
            (format!("-----BEGIN PRIVATE KEY-----\n{}\n", letters(64)), SecretKind::PrivateKey),
            (format!("\"-----BEGIN RSA PRIVATE KEY-----\\n{}", letters(64)), SecretKind::PrivateKey),
        ] {
            assert_eq!(kinds(&text), [kind], "{text}");
        }
    }

    #[test]
    fn mentions_and_placeholders_pass() {
        let cut = token::new_random_token(token::SYNC_PREFIX).expose()[..40].to_owned();
        for text in [
            "sk-ant-xxxxx".to_owned(),
            format!("sk-ant-{}", "x".repeat(100)),
            "OPENAI_API_KEY=sk-...".to_owned(),
            format!("task-{}", letters(48)),
            format!("u003dsk-{}", letters(48)),
            format!("x22sk-{}", letters(48)),
            format!("TOKEN_ghp_{}", letters(60)),
            format!("sk-{}", letters(60)),
            "AIza".to_owned(),
            format!("AIza{}", letters(60)),
            "sp_live_abc123...".to_owned(),
            cut,
            "AKIAIOSFODNN7EXAMPLE".to_owned(),
            "-----BEGIN PRIVATE KEY-----".to_owned(),
            "-----BEGIN PRIVATE KEY-----\n...\n".to_owned(),
            format!("-----BEGIN CERTIFICATE-----\n{}", letters(64)),
            "-----BEGIN ".to_owned(),
            "sk-".to_owned(),
        ] {
            assert_eq!(kinds(&text), [], "{text}");
        }
    }

    #[test]
    fn a_secret_across_two_windows_is_found_once_with_its_line() {
        let secret = format!("sk-ant-api03-{}", letters(95));
        for distance in [0, 1, 3, 50, 107, 200, MAX_TOKEN, MAX_TOKEN + 1] {
            let mut text = "ab\n".repeat((WINDOW - MAX_TOKEN - distance) / 3);
            let line = text.lines().count() + 1;
            text += &secret;
            text += &"\ncd".repeat(WINDOW);
            let found = scan(&mut text.as_bytes(), |_| {}).expect("memory");
            assert_eq!(found, [(line, SecretKind::AnthropicKey)], "{distance} before the border");
        }
    }

    #[test]
    fn an_escape_before_the_border_is_remembered() {
        let border = WINDOW - 2 * MAX_TOKEN;
        for start in border - 8..border + 8 {
            let text = format!("{}\n\\u003dsk-ant-api03-{}", "-".repeat(start - 7), letters(95));
            let text = text + &"\n".repeat(WINDOW);
            let found = scan(&mut text.as_bytes(), |_| {}).expect("memory");
            assert_eq!(found, [(2, SecretKind::AnthropicKey)], "starts at {start}");
        }
    }

    #[test]
    fn every_byte_is_seen_once() {
        let text = letters(3 * WINDOW + 17);
        let mut seen = Vec::new();
        scan(&mut text.as_bytes(), |part| seen.extend_from_slice(part)).expect("memory");
        assert_eq!(seen, text.as_bytes());
    }
}
