//! Reading what nobody asks for, slowly: rot in a cold block is found before the block is needed (I1).
//!
//! Log and state are read from end to end about once in `pass`, some blocks at a time, off the runtime's threads. Who
//! hears of a rotten block is the member's health, whoever read it; here nothing is decided.
//!
//! What is read may come from the kernel's memory and not from the disk, as long as it is kept there; that ends sooner or
//! later for what is cold.

use std::sync::Arc;
use std::time::Duration;

use holdfast_checked_file::{Checks, SCRUB_BLOCKS};
use rand::RngExt;
use tokio::time::sleep;

use crate::consensus::Inner;
use crate::disk_work;

/// The shortest pause between two pieces of 256 KiB: no more than 5 MiB/s, however large the file.
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// The longest pause: a small file is read more often than it must.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// The pause after which a file of so many blocks is through in about `pass`.
fn pause(pass: Duration, blocks: u64) -> Duration {
    let pieces = u32::try_from(blocks.div_ceil(SCRUB_BLOCKS).max(1)).unwrap_or(u32::MAX);
    (pass / pieces).clamp(PAUSE_MIN, PAUSE_MAX)
}

/// Scrubs a file until the member ends.
pub(crate) async fn run(inner: Arc<Inner>, checks: Checks, pass: Duration) {
    let mut from = 0;
    loop {
        let full = pause(pass, checks.blocks().unwrap_or(0));
        tokio::select! {
            () = sleep(full.mul_f64(rand::rng().random_range(0.75..1.25))) => {}
            () = inner.health.failed() => return,
            () = inner.stop.cancelled() => return,
        }
        let piece = checks.clone();
        match disk_work::run(move || piece.scrub(from)).await {
            Ok(Ok(next)) => from = next.unwrap_or(0),
            Ok(Err(error)) | Err(error) => {
                tracing::error!(%error, "a block could not be scrubbed");
                from = from.saturating_add(SCRUB_BLOCKS);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_takes_its_time_within_bounds() {
        let day = Duration::from_secs(86_400);
        assert_eq!(pause(day, 1), PAUSE_MAX);
        assert_eq!(pause(day, SCRUB_BLOCKS * 86_400), Duration::from_secs(1));
        assert_eq!(pause(day, u64::MAX), PAUSE_MIN);
        assert_eq!(pause(Duration::ZERO, 0), PAUSE_MIN);
    }
}
