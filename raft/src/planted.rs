//! Bugs that are planted on purpose, for the simulator to find: each shows that a check means something.
//!
//! This module exists only with the feature `planted-bugs`, which no part of the product enables, and even then nothing
//! is wrong until a bug is chosen.

use std::sync::atomic::{AtomicU8, Ordering};

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Bug {
    /// Entries are acknowledged before the commit that makes them durable.
    AckBeforeFsync = 1,
    /// Whoever believes to lead tells the read index without asking a majority.
    ReadWithoutCheck,
    /// The entries of one batch are applied in the wrong order.
    ApplyOutOfOrder,
    /// The vote is not read when the log is opened.
    ForgetVote,
}

const NAMES: [(&str, Bug); 4] = [
    ("ack-before-fsync", Bug::AckBeforeFsync),
    ("read-without-check", Bug::ReadWithoutCheck),
    ("apply-out-of-order", Bug::ApplyOutOfOrder),
    ("forget-vote", Bug::ForgetVote),
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

/// Whether this process has any bug. Then members do not watch each other for lost memory: a second line of defence
/// that would find some bugs before the simulator's own checks do.
pub(crate) fn any() -> bool {
    CHOSEN.load(Ordering::Relaxed) != 0
}

/// Whether this process has this bug.
pub(crate) fn is(bug: Bug) -> bool {
    CHOSEN.load(Ordering::Relaxed) == bug as u8
}
