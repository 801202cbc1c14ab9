//! How long to wait before something is tried again: ever longer, up to a bound, and never in step with other nodes.

use std::time::Duration;

/// Doublings after which the pause stays at its bound anyway.
const DOUBLINGS_MAX: u32 = 16;

/// A random part, at least half, of a pause that doubles with each attempt. `random` is in 0..1.
pub(crate) fn after(attempts: u32, random: f64, min: Duration, max: Duration) -> Duration {
    let whole = min.saturating_mul(1 << attempts.min(DOUBLINGS_MAX)).min(max);
    whole.mul_f64(0.5 + random / 2.0)
}
