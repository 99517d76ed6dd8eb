//! Questions, asked on standard error and answered on standard input, only where a person is at both ends.

use crate::{error::CliError, output::escaped};
use std::io::Write as _;

/// Whether to go on; no answer is no.
pub(crate) fn confirm(question: &str) -> Result<bool, CliError> {
    let answer = ask(&format!("{question} [y/N] "))?;
    Ok(matches!(answer.to_ascii_lowercase().as_str(), "y" | "yes"))
}

/// One of `choices`, by number.
pub(crate) fn choose(question: &str, choices: &[String]) -> Result<usize, CliError> {
    for (index, choice) in choices.iter().enumerate() {
        writeln!(std::io::stderr(), "  {}. {}", index + 1, escaped(choice))?;
    }
    let answer = ask(&format!("{question} [1-{}] ", choices.len()))?;
    if answer.is_empty() {
        return Err(CliError::Declined);
    }
    let index = answer.parse::<usize>().ok().and_then(|number| number.checked_sub(1));
    let refuse = || CliError::usage(format!("expected a number from 1 to {}, got {answer:?}", choices.len()));
    index.filter(|index| *index < choices.len()).ok_or_else(refuse)
}

fn ask(question: &str) -> Result<String, CliError> {
    let mut stderr = std::io::stderr().lock();
    write!(stderr, "{}", escaped(question))?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}
