//! Waiting between attempts: exponential, bounded, with full jitter so that a crowd does not return in step.

use std::time::Duration;

/// Doublings after which the delay stays at its bound anyway.
const DOUBLINGS_MAX: u32 = 20;

/// How long to wait before the next attempt.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Backoff {
        Backoff { first, longest, failures: 0 }
    }

    /// After an attempt that failed: anything from a tenth of the current bound up to it.
    pub(crate) fn next(&mut self) -> Duration {
        let bound = self.first.saturating_mul(1 << self.failures.min(DOUBLINGS_MAX)).min(self.longest);
        self.failures = self.failures.saturating_add(1);
        let bound_us = u64::try_from(bound.as_micros()).unwrap_or(u64::MAX).max(1);
        Duration::from_micros(rand::random_range(bound_us / 10..=bound_us))
    }

    /// After an attempt that succeeded.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_stay_bounded_and_start_over() {
        let (first, longest) = (Duration::from_millis(10), Duration::from_millis(500));
        let mut backoff = Backoff::new(first, longest);
        for failures in 0..100u32 {
            let bound = first.saturating_mul(1 << failures.min(20)).min(longest);
            let delay = backoff.next();
            assert!(delay <= bound && delay >= bound / 11, "{failures}: {delay:?}");
        }
        backoff.reset();
        assert!(backoff.next() <= first);
    }
}
