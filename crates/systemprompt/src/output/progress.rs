use super::escape::escaped;
use indicatif::{ProgressBar, ProgressStyle};
use std::{io::Write as _, time::Duration};

/// What is going on: a moving line on a terminal, a line for each thing that is done elsewhere, nothing when quiet.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    Moving(ProgressBar),
    Plain,
    Silent,
}

impl Progress {
    pub(crate) fn new(quiet: bool, terminal: bool, no_color: bool) -> Self {
        match (quiet, terminal) {
            (true, _) => Self::Silent,
            (false, false) => Self::Plain,
            (false, true) => {
                let bar = ProgressBar::new_spinner().with_style(style(if no_color {
                    "{spinner} {wide_msg}"
                } else {
                    "{spinner:.cyan} {wide_msg}"
                }));
                bar.enable_steady_tick(Duration::from_millis(120));
                Self::Moving(bar)
            }
        }
    }

    /// What is being done now; not worth a line of its own.
    pub(crate) fn now(&self, text: &str) {
        if let Self::Moving(bar) = self {
            bar.set_message(escaped(text).into_owned());
        }
    }

    /// Something is done, or begins and takes long.
    pub(crate) fn step(&self, text: &str) {
        match self {
            Self::Moving(bar) => bar.suspend(|| write_line(text)),
            Self::Plain => write_line(text),
            Self::Silent => {}
        }
    }

    /// Takes the moving line away.
    pub(crate) fn finish(&self) {
        if let Self::Moving(bar) = self {
            bar.finish_and_clear();
        }
    }
}

fn write_line(text: &str) {
    let _ = writeln!(anstream::stderr(), "{}", escaped(text));
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
