//! The cluster version: which rules and stored forms the whole cluster uses.
//!
//! It is part of the replicated state, so that it changes at one place of the log for every member alike (I1). A build
//! supports a range of versions; the version is raised, one step at a time, only when every member supports the next
//! one. Whatever `decide` and `evolve` do differently than in an earlier version asks for it first.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A cluster version. Never goes down.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(transparent)]
pub struct ClusterVersion(pub u32);

impl ClusterVersion {
    /// The first: commands one by one, and the retention of outcomes judged by wall clocks.
    pub const ONE: Self = Self(1);
    /// The second: the retention of outcomes is measured in log time, and a log entry may hold many commands.
    pub const TWO: Self = Self(2);
    /// The third: nodes are cordoned and quarantined, want of room is told more exactly, programs run in instances,
    /// instances have volumes, and there are secrets.
    pub const THREE: Self = Self(3);
    /// The fourth: volumes have snapshots, and are restored from them.
    pub const FOUR: Self = Self(4);
    /// The oldest version whose log entries and state this build takes part in.
    pub const OLDEST_SUPPORTED: Self = Self::ONE;
    /// The newest version that this build takes part in; new clusters begin with it.
    pub const NEWEST: Self = Self::FOUR;

    /// The version that may follow this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Whether the retention of outcomes is measured in log time.
    pub const fn has_log_time(self) -> bool {
        self.0 >= Self::TWO.0
    }

    /// Whether one log entry may hold many commands.
    pub const fn has_command_batches(self) -> bool {
        self.0 >= Self::TWO.0
    }

    /// Whether there are volumes.
    pub const fn has_volumes(self) -> bool {
        self.0 >= Self::THREE.0
    }

    /// Whether volumes have snapshots.
    pub const fn has_snapshots(self) -> bool {
        self.0 >= Self::FOUR.0
    }

    /// Whether nodes can be cordoned and quarantined, and which kind of room is missing is told.
    pub const fn has_cordon(self) -> bool {
        self.0 >= Self::THREE.0
    }

    /// Whether there are secrets and registry credentials.
    pub const fn has_secrets(self) -> bool {
        self.0 >= Self::THREE.0
    }
}

impl fmt::Display for ClusterVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The cluster versions that a build takes part in, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SupportedVersions {
    /// The oldest.
    pub oldest: ClusterVersion,
    /// The newest.
    pub newest: ClusterVersion,
}

impl SupportedVersions {
    /// What this build supports.
    pub const OURS: Self = Self { oldest: ClusterVersion::OLDEST_SUPPORTED, newest: ClusterVersion::NEWEST };
    /// What is known of a build that says nothing: those that say nothing came before the second version.
    pub const UNTOLD: Self = Self { oldest: ClusterVersion::ONE, newest: ClusterVersion::ONE };

    /// The same without what is newer than `newest`: one build acts as an earlier one, for tests.
    #[must_use]
    pub fn up_to(self, newest: ClusterVersion) -> Self {
        Self { newest: self.newest.min(newest.max(self.oldest)), ..self }
    }

    /// Whether a state of this version can be read, written and followed.
    pub fn includes(self, version: ClusterVersion) -> bool {
        (self.oldest..=self.newest).contains(&version)
    }
}

impl fmt::Display for SupportedVersions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.oldest == self.newest {
            true => write!(f, "{}", self.oldest),
            false => write!(f, "{}-{}", self.oldest, self.newest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_cuts_the_newest_off_and_never_leaves_nothing() {
        let ours = SupportedVersions { oldest: ClusterVersion(2), newest: ClusterVersion(4) };
        assert_eq!(ours.up_to(ClusterVersion(3)).newest, ClusterVersion(3));
        assert_eq!(ours.up_to(ClusterVersion(9)), ours);
        assert_eq!(ours.up_to(ClusterVersion(1)).newest, ClusterVersion(2));
        assert!(ours.includes(ClusterVersion(2)) && ours.includes(ClusterVersion(4)));
        assert!(!ours.includes(ClusterVersion(1)) && !ours.includes(ClusterVersion(5)));
        assert_eq!((ours.to_string(), SupportedVersions::UNTOLD.to_string()), ("2-4".into(), "1".into()));
    }

    #[test]
    fn a_version_is_stored_as_the_number_that_it_always_was() {
        assert_eq!(postcard::to_stdvec(&ClusterVersion(300)), postcard::to_stdvec(&300_u32));
    }
}
