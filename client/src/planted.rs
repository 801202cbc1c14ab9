//! Bugs that are planted on purpose, for the simulator to find: each shows that a check means something.
//!
//! This module exists only with the feature `planted-bugs`, which no part of the product enables, and even then nothing
//! is wrong until a bug is chosen.

use std::sync::atomic::{AtomicU8, Ordering};

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// An agent says that it stands at the beginning, and takes an older state for a new one.
    ObeyOlderRevision = 1,
    /// A state is published before it is on the disk.
    PublishBeforeDurable,
    /// A stream that was lost is taken for a state without items.
    LostStreamIsEmpty,
}

const NAMES: [(&str, Bug); 3] = [
    ("edge-obeys-older-revision", Bug::ObeyOlderRevision),
    ("publish-before-durable", Bug::PublishBeforeDurable),
    ("lost-stream-is-empty", Bug::LostStreamIsEmpty),
];

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// Chooses the bug of this process. False when there is none of this name.
pub fn plant(name: &str) -> bool {
    let found = NAMES.iter().find(|(known, _)| *known == name);
    if let Some((_, bug)) = found {
        CHOSEN.store(*bug as u8, Ordering::Relaxed);
    }
    found.is_some()
}

/// Whether this process has this bug.
pub(crate) fn is(bug: Bug) -> bool {
    CHOSEN.load(Ordering::Relaxed) == bug as u8
}
