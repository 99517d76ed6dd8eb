use std::time::Duration;

/// How often and how fast a step is tried again after a transient error; holds for its act and for its undo.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retry {
    /// Attempts in all, the first one included; at least 1.
    pub attempts: u32,
    /// Pause after the first attempt; doubles from there.
    pub first: Duration,
    /// No pause is longer.
    pub max: Duration,
    /// Share of a pause that is random, 0.0 to 1.0, so that many operations do not come back at one instant.
    pub jitter: f64,
}

impl Default for Retry {
    /// Eight attempts over about sixteen seconds: longer than a restart of PostgreSQL.
    fn default() -> Self {
        Self { attempts: 8, first: Duration::from_millis(200), max: Duration::from_secs(5), jitter: 0.3 }
    }
}

impl Retry {
    /// A single attempt.
    pub const NEVER: Self = Self { attempts: 1, first: Duration::ZERO, max: Duration::ZERO, jitter: 0.0 };

    /// The pause after attempt number `attempt` (from 1), or `None` when it was the last. `random` is in 0.0..=1.0.
    pub(crate) fn pause_after(&self, attempt: u32, random: f64) -> Option<Duration> {
        if attempt >= self.attempts {
            return None;
        }
        let doublings = attempt.saturating_sub(1).min(20);
        let full = self.first.saturating_mul(1 << doublings).min(self.max);
        Some(full.mul_f64(1.0 - self.jitter.clamp(0.0, 1.0) * random.clamp(0.0, 1.0)))
    }
}

/// Evenly spread over 0.0..=1.0.
pub(crate) fn random() -> f64 {
    let mut bytes = [0; 4];
    // Without randomness the pauses are just not spread.
    if getrandom::fill(&mut bytes).is_err() {
        return 0.0;
    }
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_then_end() {
        let retry =
            Retry { attempts: 5, first: Duration::from_millis(100), max: Duration::from_millis(350), jitter: 0.5 };
        let pauses: Vec<_> = (1..=5).map(|attempt| retry.pause_after(attempt, 0.0).map(|p| p.as_millis())).collect();
        assert_eq!(pauses, [Some(100), Some(200), Some(350), Some(350), None]);
        assert_eq!(retry.pause_after(1, 1.0), Some(Duration::from_millis(50)));
        assert_eq!(Retry::NEVER.pause_after(1, 0.0), None);
    }
}
