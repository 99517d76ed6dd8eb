//! Whatever a tenant or a server says, the terminal only shows it.

use crate::{
    cli::Cli,
    cloud::{CHECKOUT, Cloud, Manner, TENANT},
};
use serde_json::json;

/// Titles, clipboards, answers, colours, movements, C1, directions, hidden text; each must arrive as text.
const ATTACKS: [&str; 22] = [
    "\u{1b}[31mred",
    "\u{1b}]0;title\u{7}",
    "\u{1b}]52;c;cm0gLXJm\u{7}",
    "\u{1b}]8;;http://evil\u{1b}\\link",
    "\u{1b}[2J\u{1b}[H",
    "\u{1b}P+q544e\u{1b}\\",
    "\u{1b}[6n",
    "\u{1b}c",
    "\u{1b}%G",
    "good\rbad",
    "a\u{8}\u{8}b",
    "\u{9b}31m",
    "\u{9d}0;t\u{9c}",
    "\u{90}q\u{9c}",
    "\u{7f}",
    "\u{0}",
    "\u{202e}txt.exe",
    "\u{2066}x\u{2069}",
    "\u{200f}",
    "line\u{2028}break",
    "\u{feff}hidden",
    "\u{e0041}tag",
];

fn is_safe(c: char) -> bool {
    let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}');
    c == '\n' || !(c.is_control() || hidden)
}

#[test]
fn no_command_lets_a_text_act_upon_the_terminal() {
    let text = ATTACKS.join(" ");
    let manner = Manner { text: text.clone(), deploy_ends: Some("failed"), ..Manner::default() };
    let cloud = Cloud::with(manner.clone());
    let cli = Cli::signed_in(&cloud);
    let refusal = json!({"error": {"code": "conflict", "message": text, "hint": text}});
    let refusing = Cloud::with(Manner { refusal: Some((409, refusal)), ..manner });
    let refused = Cli::new(&refusing);
    let credentials = cli.read(".systemprompt/credentials.json").replace(&cloud.url, &refusing.url);
    refused.write(".systemprompt/credentials.json", &credentials);
    let commands: [&[&str]; 10] = [
        &["cloud", "auth", "whoami"],
        &["cloud", "tenant", "list"],
        &["cloud", "tenant", "show", TENANT],
        &["cloud", "tenant", "create", "--checkout", CHECKOUT],
        &["cloud", "checkout", "confirm", CHECKOUT],
        &["cloud", "status"],
        &["cloud", "logs", "--tenant", TENANT],
        &["cloud", "deploy", "--binary", "/bin/true", "--tenant", TENANT],
        &["cloud", "tenant", "show", "\u{1b}[31m"],
        &["cloud", "tenant", "delete", TENANT, "--yes"],
    ];
    let mut shown = 0;
    for command in commands {
        for json in [&[][..], &["--json"]] {
            for cli in [&cli, &refused] {
                let ended = cli.run(&[command, json].concat());
                let all = ended.stdout + &ended.stderr;
                assert!(all.chars().all(is_safe), "{command:?} {json:?}: {all:?}");
                shown += usize::from(all.contains("txt.exe"));
            }
        }
    }
    assert!(shown > 25, "the texts did reach the output: {shown}");
}

#[test]
fn raw_lines_are_for_programs() {
    let text = "\u{1b}[31mred".to_owned();
    let cloud = Cloud::with(Manner { text: text.clone(), ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    let ended = cli.run(&["cloud", "logs", "--tenant", TENANT, "--raw"]);
    assert_eq!(ended.stdout, format!("{text}\n[platform] {text}\n"));
}
