//! Log time: the leader measures by its monotonic clock how long it leads, and says so in the log (I4).
//!
//! What the state keeps for a while is kept by this time. No wall clock comes into it; time before a leader began to
//! lead, and time that nobody led, is not counted; nor is what a leader measured and could not report. So log time is
//! never ahead of the time that passed, and what is kept by it is never kept too short.

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_model::Command;
use holdfast_model::limits::LOG_TIME_STEP_MS_MAX;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::time::{MissedTickBehavior, interval};

use crate::consensus::Inner;

/// Reports log time for as long as this member leads. Ends with the member.
pub(crate) async fn keep_reporting(inner: Arc<Inner>, every: Duration) {
    let mut looks = interval(every);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut measure = Measure::default();
    loop {
        tokio::select! {
            _ = looks.tick() => {}
            () = inner.health.failed() => return,
            () = inner.stop.cancelled() => return,
        }
        let term = term_led(&inner).filter(|_| inner.store.cluster_version().has_log_time());
        let Some(by_ms) = measure.look(term, Instant::now()) else { continue };
        let proposal = inner.clockwork_proposal(Command::AdvanceLogTime { by_ms });
        // A step whose fate is unknown is not repeated: it could count twice.
        match inner.propose_as_leader(&proposal).await {
            Ok(Ok(_)) => {}
            Ok(Err(rejection)) => tracing::warn!(?rejection, "log time did not advance"),
            Err(error) => tracing::debug!(%error, "log time may not have advanced"),
        }
    }
}

/// The term in which this member leads, if it does.
fn term_led(inner: &Inner) -> Option<u64> {
    let metrics = inner.raft.metrics();
    let metrics = metrics.borrow_watched();
    let leads = inner.health.fault().is_none() && metrics.state == ServerState::Leader;
    leads.then_some(metrics.current_term)
}

/// Up to when a leader's time is counted, in one term.
#[derive(Debug, Default)]
struct Measure {
    counted: Option<(u64, Instant)>,
}

impl Measure {
    /// How much there is to report since the last look, in milliseconds: nothing at the first in a term. What is more
    /// than one step may hold is left out, as when this process stood still.
    fn look(&mut self, term: Option<u64>, now: Instant) -> Option<u64> {
        let before = self.counted.filter(|(counted, _)| Some(*counted) == term);
        self.counted = term.map(|term| (term, now));
        let (_, since) = before?;
        let elapsed = now.saturating_duration_since(since).as_millis();
        Some(u64::try_from(elapsed).unwrap_or(u64::MAX).min(LOG_TIME_STEP_MS_MAX)).filter(|ms| *ms > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i04_only_time_in_one_term_of_leading_is_counted_and_a_step_is_bounded() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut measure = Measure::default();
        assert_eq!(measure.look(None, at(0)), None);
        assert_eq!(measure.look(Some(1), at(50_000)), None, "it may have begun to lead just now");
        assert_eq!(measure.look(Some(1), at(65_000)), Some(15_000));
        assert_eq!(measure.look(Some(1), at(65_000)), None);
        assert_eq!(measure.look(Some(1), at(66_000)), Some(1_000));
        // It lost the leadership and won it again between two looks.
        assert_eq!(measure.look(Some(3), at(80_000)), None);
        assert_eq!(measure.look(Some(3), at(80_000 + 2 * LOG_TIME_STEP_MS_MAX)), Some(LOG_TIME_STEP_MS_MAX));
        let stopped = 80_001 + 2 * LOG_TIME_STEP_MS_MAX;
        assert_eq!(measure.look(None, at(stopped)), None);
        assert_eq!(measure.look(Some(3), at(stopped + 1)), None);
        assert_eq!(measure.look(Some(3), at(stopped + 11)), Some(10));
    }
}
