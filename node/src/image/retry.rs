//! Trying a request again: few times, ever later, never in step with other nodes.

use std::time::Duration;

use rand::RngExt;

use super::error::RegistryError;

/// Attempts in a row that bring nothing, at most.
pub(crate) const ATTEMPTS_MAX: u32 = 5;
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Counts attempts and says how long to wait before the next.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// Something was achieved: count from the start again.
    pub(crate) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Waits before the next attempt, or gives the error back if there shall be none.
    pub(crate) async fn pause(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let pause = self.next(error, rand::rng().random())?;
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// How long to wait, from a random number in 0..1.
    fn next(&mut self, error: RegistryError, random: f64) -> Result<Duration, RegistryError> {
        self.attempts += 1;
        if self.attempts >= ATTEMPTS_MAX || !error.is_transient() {
            return Err(error);
        }
        let pause = pause_after(self.attempts, random);
        tracing::info!(attempt = self.attempts, ?pause, %error, "a registry request failed; trying again");
        Ok(pause)
    }
}

/// A random part, at least half, of a pause that doubles with each attempt. `random` is in 0..1.
fn pause_after(attempts: u32, random: f64) -> Duration {
    crate::pause::after(attempts, random, PAUSE_MIN, PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_differ() {
        for attempts in 1..100 {
            let (least, most) = (pause_after(attempts, 0.0), pause_after(attempts, 0.999));
            assert!(least >= PAUSE_MIN && most <= PAUSE_MAX && least < most, "{attempts}");
        }
        assert!(pause_after(2, 0.0) > pause_after(1, 0.0));
    }

    #[test]
    fn attempts_are_limited_and_only_for_transient_errors() {
        let silent = || RegistryError::Silent { host: "h".into(), seconds: 1 };
        let mut backoff = Backoff::default();
        for _ in 1..ATTEMPTS_MAX {
            assert!(backoff.next(silent(), 0.5).is_ok());
        }
        assert!(backoff.next(silent(), 0.5).is_err());
        backoff.reset();
        assert!(backoff.next(silent(), 0.5).is_ok());
        let missing = RegistryError::NotFound { host: "h".into(), what: "it".into() };
        assert!(Backoff::default().next(missing, 0.5).is_err());
    }
}
