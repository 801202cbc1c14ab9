//! How much of what instances wrote is kept, and for how long.

use std::time::Duration;

/// Segments of a full ring: what goes at once when there is no room, or is too old, is one of so many parts.
pub const SEGMENTS: u64 = 8;

/// The least that a ring may be bounded to, in bytes: a segment must hold the longest line.
pub const INSTANCE_BYTES_MIN: u64 = 2 << 20;

/// Logs of instances that have ended which are kept at most, newest first.
pub const ENDED_MAX: usize = 1_024;

/// What an operator sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retention {
    /// Bytes of one instance at most, as they are stored.
    pub instance_bytes: u64,
    /// Bytes of all instances of the node at most: first the logs of those that ended longest ago go, then the oldest
    /// part of whichever is largest.
    pub node_bytes: u64,
    /// Lines older than this go, in milliseconds.
    pub age_ms: u64,
    /// How long the log of an instance that has ended is kept, in milliseconds.
    pub ended_ms: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            instance_bytes: 8 << 20,
            node_bytes: 2 << 30,
            age_ms: 7 * 24 * 3_600_000,
            ended_ms: 72 * 3_600_000,
        }
    }
}

/// What cannot be kept to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RetentionError {
    /// Too little for one instance.
    #[error("An instance's log needs at least {INSTANCE_BYTES_MIN} bytes.")]
    Instance,
    /// Less for all than for one.
    #[error("The logs of all instances need at least as much as that of one.")]
    Node,
    /// No time.
    #[error("Logs must be kept for a second at least.")]
    Age,
}

impl Retention {
    /// These bounds, if they can be kept to.
    ///
    /// # Errors
    /// [`RetentionError`].
    pub fn new(
        instance_bytes: u64,
        node_bytes: u64,
        age: Duration,
        ended: Duration,
    ) -> Result<Self, RetentionError> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        if instance_bytes < INSTANCE_BYTES_MIN {
            return Err(RetentionError::Instance);
        }
        if node_bytes < instance_bytes {
            return Err(RetentionError::Node);
        }
        if millis(age.min(ended)) < 1_000 {
            return Err(RetentionError::Age);
        }
        Ok(Self { instance_bytes, node_bytes, age_ms: millis(age), ended_ms: millis(ended) })
    }

    /// The size at which a segment is full.
    pub(super) fn segment_bytes(&self) -> u64 {
        self.instance_bytes / SEGMENTS
    }
}
