//! What can go wrong with the state itself. A rejected command is not an error: it is an outcome.

use holdfast_model::{ClusterVersion, Digest, LogIndex, Revision, SupportedVersions};
use std::path::PathBuf;

/// The state could not be read, written or trusted. Fatal for the member (fail-stop): nothing of the call took effect.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file could not be opened.
    #[error(
        "The state file {path} could not be opened: check that it exists, is not in use and has not been damaged; a member can also be wiped and filled by its peers."
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// The database's own error.
        #[source]
        source: Box<redb::Error>,
    },
    /// The database refused an operation.
    #[error(
        "The state database failed while {doing}: check the disk for faults and free space, then restart the member."
    )]
    Database {
        /// What was being done.
        doing: &'static str,
        /// The database's own error.
        #[source]
        source: Box<redb::Error>,
    },
    /// A row could not be decoded.
    #[error(
        "A row of «{table}» could not be decoded: the state is damaged or was written by a newer build; run the newer build, or wipe the member and let its peers fill it."
    )]
    Decode {
        /// The table.
        table: &'static str,
        /// The codec's own error.
        #[source]
        source: postcard::Error,
    },
    /// A row's form is not known.
    #[error("A row of «{table}» has form {version}, which this build does not know: run a newer build.")]
    UnknownForm {
        /// The table.
        table: &'static str,
        /// The form found.
        version: u8,
    },
    /// A row could not be encoded.
    #[error("A row of «{table}» could not be encoded: this is a defect of Holdfast; please report it.")]
    Encode {
        /// The table.
        table: &'static str,
        /// The codec's own error.
        #[source]
        source: postcard::Error,
    },
    /// The views contradict themselves or the events.
    #[error("The state contradicts itself: {what}; stop the member and let its peers fill it anew.")]
    Corrupt {
        /// What contradicts what.
        what: String,
    },
    /// Entries were not handed over in log order.
    #[error(
        "Log entry {got} was handed to the state after entry {applied}: entries must be applied in order, each once; this is a defect of Holdfast."
    )]
    OutOfOrder {
        /// The last applied entry.
        applied: LogIndex,
        /// The entry that came.
        got: LogIndex,
    },
    /// This member's state is not its peers' (I1).
    #[error(
        "This member's state differs from its peers' after log entry {at} (here {ours}, there {theirs}): it must not serve; keep its files for analysis, then wipe it and let its peers fill it."
    )]
    Diverged {
        /// After which entry.
        at: LogIndex,
        /// This member's digest.
        ours: Digest,
        /// The digest in the log.
        theirs: Digest,
    },
    /// A snapshot could not be written or was refused.
    #[error("The snapshot was not usable and nothing was changed.")]
    Snapshot {
        /// Why.
        #[source]
        source: holdfast_snapshots::SnapshotError,
    },
    /// A revision that the history does not hold.
    #[error("Revision {asked} is not in this history, which ends at {head}: ask for an earlier one.")]
    NoSuchRevision {
        /// What was asked for.
        asked: Revision,
        /// The last one.
        head: Revision,
    },
    /// The cluster uses rules that this build does not know, or knows no more.
    #[error(
        "The cluster is at version {version} and this build supports {supported}: run a build that supports version {version} on this member."
    )]
    UnsupportedVersion {
        /// The cluster's.
        version: ClusterVersion,
        /// This build's.
        supported: SupportedVersions,
    },
    /// A revision that can no longer be read.
    #[error(
        "Revision {asked} can no longer be read here, only those from {oldest} on: ask for a later one, or for the newest."
    )]
    Compacted {
        /// What was asked for.
        asked: Revision,
        /// The oldest that is held.
        oldest: Revision,
    },
    /// An earlier failure makes this store unusable.
    #[error("The state is out of service because of an earlier failure: restart the member.")]
    OutOfService,
}

impl StoreError {
    pub(crate) fn database(doing: &'static str) -> impl Fn(redb::Error) -> Self {
        move |source| Self::Database { doing, source: Box::new(source) }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }
}

impl From<holdfast_snapshots::SnapshotError> for StoreError {
    fn from(source: holdfast_snapshots::SnapshotError) -> Self {
        Self::Snapshot { source }
    }
}
