//! One figure: how it is called, what was measured, and whether that is good enough.

use std::{
    fmt,
    io::{self, Write},
};

/// What a figure must not exceed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Goal {
    pub(super) figure: &'static str,
    pub(super) unit: &'static str,
    pub(super) at_most: f64,
}

/// A figure after its measurement; unmeasured is short.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Row {
    goal: Goal,
    value: Option<f64>,
}

impl Row {
    fn new(goal: Goal, value: Option<f64>) -> Self {
        Self { goal, value }
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Goal { figure, unit, at_most } = self.goal;
        write!(f, "figure={figure} value=")?;
        match self.value {
            Some(value) if value.fract() == 0.0 => write!(f, "{value:.0}")?,
            Some(value) => write!(f, "{value:.2}")?,
            None => write!(f, "unmeasured")?,
        }
        let verdict = if self.value.is_some_and(|value| value <= at_most) { "ok" } else { "short" };
        write!(f, " unit={unit} goal={at_most} verdict={verdict}")
    }
}

/// Prints each row once: as soon as it is measured, or at the end as unmeasured.
pub(super) struct Report<W: Write> {
    output: W,
    missing: Vec<Goal>,
}

impl<W: Write> Report<W> {
    pub(super) fn new(goals: &[Goal], output: W) -> Self {
        Self { output, missing: goals.to_vec() }
    }

    pub(super) fn measured(&mut self, goal: Goal, value: f64) -> io::Result<()> {
        self.missing.retain(|missing| *missing != goal);
        writeln!(self.output, "{}", Row::new(goal, Some(value)))
    }

    /// Whatever became of the measuring.
    pub(super) fn finish(mut self) -> io::Result<()> {
        self.missing.iter().try_for_each(|goal| writeln!(self.output, "{}", Row::new(*goal, None)))
    }
}

/// The middle value; of an even number, the mean of the two in the middle. None of nothing.
pub(super) fn median(values: &[f64]) -> Option<f64> {
    let sorted = sorted(values);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        length if length % 2 == 1 => Some(sorted[middle]),
        _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
    }
}

/// The smallest value that at least `percent` of all do not exceed (nearest rank).
pub(super) fn percentile(values: &[f64], percent: usize) -> Option<f64> {
    let sorted = sorted(values);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOAL: Goal = Goal { figure: "phase1_ms", unit: "ms", at_most: 500.0 };

    #[test]
    fn a_row_is_one_line_and_unmeasured_is_short() {
        let line = |value| Row::new(GOAL, value).to_string();
        assert_eq!(line(Some(321.456)), "figure=phase1_ms value=321.46 unit=ms goal=500 verdict=ok");
        assert_eq!(line(Some(500.0)), "figure=phase1_ms value=500 unit=ms goal=500 verdict=ok");
        assert_eq!(line(Some(500.1)), "figure=phase1_ms value=500.10 unit=ms goal=500 verdict=short");
        assert_eq!(line(None), "figure=phase1_ms value=unmeasured unit=ms goal=500 verdict=short");
    }

    #[test]
    fn every_figure_has_exactly_one_row_wherever_the_measuring_ends() {
        let other = Goal { figure: "route_ms", unit: "ms", at_most: 50.0 };
        let mut printed = Vec::new();
        let mut report = Report::new(&[GOAL, other], &mut printed);
        report.measured(other, 1.0).unwrap();
        report.finish().unwrap();
        let expected = "figure=route_ms value=1 unit=ms goal=50 verdict=ok\n\
                        figure=phase1_ms value=unmeasured unit=ms goal=500 verdict=short\n";
        assert_eq!(String::from_utf8(printed).unwrap(), expected);
    }

    #[test]
    fn middles_and_percentiles() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(&[]), None);
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&hundred, 95), Some(95.0));
        assert_eq!(percentile(&[7.0], 95), Some(7.0));
        assert_eq!(percentile(&[], 95), None);
    }
}
