//! How fast the host's time-stamp counter counts.
//!
//! A guest whose instructions are translated reads the host's counter, but has no device against which it could
//! calibrate it: left alone it falls back to a clock of 10 ms steps that loses time under load. So it is told.

use std::time::{Duration, Instant};

use tokio::sync::OnceCell;

/// Time over which the counter is measured: enough for a few parts in a million.
const MEASURE: Duration = Duration::from_millis(50);

static COUNTER_KHZ: OnceCell<Option<u64>> = OnceCell::const_new();

/// The counter's frequency in kHz, measured once; `None` where there is none that a guest of ours could read.
pub(crate) async fn counter_khz() -> Option<u64> {
    *COUNTER_KHZ.get_or_init(measure).await
}

async fn measure() -> Option<u64> {
    let (began, first) = (Instant::now(), counter()?);
    tokio::time::sleep(MEASURE).await;
    let (elapsed, last) = (began.elapsed(), counter()?);
    let ticks = u128::from(last.checked_sub(first)?);
    u64::try_from(ticks * 1_000_000 / elapsed.as_nanos().max(1)).ok().filter(|khz| *khz > 0)
}

#[cfg(target_arch = "x86_64")]
fn counter() -> Option<u64> {
    // SAFETY: every x86_64 processor has the instruction, and Linux lets programs use it.
    Some(unsafe { core::arch::x86_64::_rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}
