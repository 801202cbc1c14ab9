//! Health: when an instance counts as serving, and when it has failed.
//!
//! The checks themselves run in the guest. This module decides how often one is asked for and what a row of answers
//! means; a guest that does not answer counts as one that is not well, and a guest can do no more than lie about
//! itself.

use std::time::Duration;

use holdfast_model::manifest::{Health, HealthCheck};
use tokio::time::Instant;

use crate::vmm::channel::{self, ChannelError, GuestSender};

/// The first pause between two checks of a workload that starts; doubled up to the interval.
const STARTING_PAUSE: Duration = Duration::from_millis(100);

/// What a row of answers means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Enough successes in a row: it serves.
    Healthy,
    /// Enough failures in a row outside the grace period: it must be started again.
    Unhealthy {
        /// The last failure, for people.
        detail: String,
    },
}

/// Counts answers against the manifest's thresholds.
#[derive(Clone, Debug)]
pub struct Thresholds {
    success: u32,
    failure: u32,
    grace: Duration,
    ready: bool,
    successes: u32,
    failures: u32,
}

impl Thresholds {
    /// Nothing was checked yet. `ready`: an earlier agent found it healthy.
    pub fn new(health: &Health, ready: bool) -> Self {
        Self {
            success: health.success.max(1),
            failure: health.failure.max(1),
            grace: Duration::from_millis(health.grace_ms),
            ready,
            successes: 0,
            failures: 0,
        }
    }

    /// Takes one answer, `since_start` after the workload started. Says something only when it changes.
    pub fn take(&mut self, answer: Result<(), String>, since_start: Duration) -> Option<Verdict> {
        match answer {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                let became = !self.ready && self.successes >= self.success;
                self.ready |= became;
                became.then_some(Verdict::Healthy)
            }
            Err(detail) => {
                self.successes = 0;
                // The grace is for a workload that starts; one that was ready has no such excuse.
                if !self.ready && since_start < self.grace {
                    return None;
                }
                self.failures = self.failures.saturating_add(1);
                (self.failures >= self.failure).then_some(Verdict::Unhealthy { detail })
            }
        }
    }

    /// How long to wait before the next check. A workload that starts is asked more often, so that it serves as
    /// soon as it can.
    fn pause(&self, interval: Duration, since_start: Duration, checks: u32) -> Duration {
        if self.ready || since_start >= self.grace {
            return interval;
        }
        STARTING_PAUSE.saturating_mul(1 << checks.min(16)).min(interval)
    }
}

/// Checks a workload until there is a new verdict.
#[derive(Debug)]
pub struct Checker {
    check: channel::HealthCheck,
    interval: Duration,
    timeout: Duration,
    thresholds: Thresholds,
    started_at: Instant,
    checks: u32,
}

impl Checker {
    /// A checker of a workload that has just started, or was just adopted.
    pub fn new(health: &Health, ready: bool) -> Self {
        Self {
            check: in_guest(&health.check),
            interval: Duration::from_millis(health.interval_ms.max(1)),
            timeout: Duration::from_millis(health.timeout_ms.max(1)),
            thresholds: Thresholds::new(health, ready),
            started_at: Instant::now(),
            checks: 0,
        }
    }

    /// Checks again and again until the verdict changes. Fails only if the channel broke, which says nothing about
    /// the workload. Safe to cancel: an answer that was not taken is asked for again.
    pub async fn next_verdict(&mut self, sender: &GuestSender) -> Result<Verdict, ChannelError> {
        loop {
            if self.checks > 0 {
                let since_start = self.started_at.elapsed();
                tokio::time::sleep(self.thresholds.pause(self.interval, since_start, self.checks)).await;
            }
            let answer = match sender.health(self.check.clone(), self.timeout).await {
                Ok(health) if health.healthy => Ok(()),
                Ok(health) => Err(health.detail),
                Err(error @ (ChannelError::NoAnswer { .. } | ChannelError::TooManyChecks)) => {
                    Err(error.to_string())
                }
                Err(error) => return Err(error),
            };
            self.checks = self.checks.saturating_add(1);
            if let Some(verdict) = self.thresholds.take(answer, self.started_at.elapsed()) {
                return Ok(verdict);
            }
        }
    }
}

fn in_guest(check: &HealthCheck) -> channel::HealthCheck {
    match check {
        HealthCheck::Tcp { port } => channel::HealthCheck::Tcp { port: *port },
        HealthCheck::Http { port, path } => channel::HealthCheck::Http { port: *port, path: path.clone() },
        HealthCheck::Command { argv } => channel::HealthCheck::Command { argv: argv.clone() },
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn health(success: u32, failure: u32, grace_ms: u64) -> Health {
        Health {
            check: HealthCheck::Tcp { port: 80 },
            interval_ms: 10_000,
            timeout_ms: 2_000,
            grace_ms,
            success,
            failure,
        }
    }

    fn bad() -> Result<(), String> {
        Err("refused".to_owned())
    }

    #[test]
    fn failures_in_the_grace_period_do_not_count() {
        let mut thresholds = Thresholds::new(&health(1, 2, 1_000), false);
        for ms in 0..1_000 {
            assert_eq!(thresholds.take(bad(), Duration::from_millis(ms)), None);
        }
        assert_eq!(thresholds.take(bad(), Duration::from_millis(1_000)), None);
        let unhealthy = Verdict::Unhealthy { detail: "refused".to_owned() };
        assert_eq!(thresholds.take(bad(), Duration::from_millis(1_001)), Some(unhealthy));
    }

    #[test]
    fn what_was_ready_has_no_grace_and_is_not_announced_twice() {
        let mut thresholds = Thresholds::new(&health(1, 1, 60_000), true);
        assert_eq!(thresholds.take(Ok(()), Duration::ZERO), None);
        assert!(matches!(thresholds.take(bad(), Duration::ZERO), Some(Verdict::Unhealthy { .. })));
    }

    #[test]
    fn a_starting_workload_is_asked_more_often() {
        let starting = Thresholds::new(&health(1, 3, 10_000), false);
        let pause = |since_ms, checks| {
            starting.pause(Duration::from_secs(10), Duration::from_millis(since_ms), checks)
        };
        assert_eq!(pause(0, 1), Duration::from_millis(200));
        assert_eq!(pause(9_000, 20), Duration::from_secs(10));
        assert_eq!(pause(10_000, 1), Duration::from_secs(10));
    }

    proptest! {
        #[test]
        fn verdicts_follow_from_rows(
            answers in prop::collection::vec(any::<bool>(), 0..60),
            success in 1..5u32,
            failure in 1..5u32,
        ) {
            let mut thresholds = Thresholds::new(&health(success, failure, 0), false);
            let (mut row, mut ready, mut last) = (0, false, None);
            for well in answers {
                row = if last == Some(well) { row + 1 } else { 1 };
                last = Some(well);
                let verdict = thresholds.take(if well { Ok(()) } else { bad() }, Duration::ZERO);
                let expected_healthy = well && !ready && row >= success;
                prop_assert_eq!(verdict == Some(Verdict::Healthy), expected_healthy);
                let unhealthy = matches!(verdict, Some(Verdict::Unhealthy { .. }));
                prop_assert_eq!(unhealthy, !well && row >= failure);
                ready |= expected_healthy;
                if unhealthy {
                    break;
                }
            }
        }
    }
}
