//! Bugs that are planted on purpose, for the simulator to find; only with the feature `planted-bugs`, which no part of
//! the product enables, and only once one is chosen.

use std::sync::atomic::{AtomicBool, Ordering};

static OUTCOMES_DROPPED: AtomicBool = AtomicBool::new(false);

/// Chooses the bug of this process. False when there is none of this name.
pub fn plant(name: &str) -> bool {
    let known = name == "drop-outcomes-on-snapshot";
    if known {
        OUTCOMES_DROPPED.store(true, Ordering::Relaxed);
    }
    known
}

/// Whether outcomes are left out when a snapshot is installed.
pub(crate) fn drops_outcomes() -> bool {
    OUTCOMES_DROPPED.load(Ordering::Relaxed)
}
