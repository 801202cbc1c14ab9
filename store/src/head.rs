//! Where a state stands: its revision, the end of its chain, the sums of its rows, and the last log entry in it.

use crate::tables::{RowSum, views_digest};
use holdfast_model::{Digest, LogIndex, Revision};
use serde::{Deserialize, Serialize};

/// The place and the digests of a state. Stored with it in the same transaction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Head {
    /// The last event.
    pub(crate) revision: Revision,
    /// That event's chain digest.
    pub(crate) chain: Digest,
    /// The sum of the views' rows.
    pub(crate) views: RowSum,
    /// The sum of the log state's rows.
    pub(crate) log: RowSum,
    /// The last log entry.
    pub(crate) applied: Option<LogIndex>,
}

impl Head {
    /// The digest of the views: a function of the events (I13).
    pub(crate) fn views_digest(&self) -> Digest {
        views_digest(self.views, self.chain, self.revision.0)
    }

    /// The digest of everything that members must agree on (I1). The index is left out: entries that change nothing
    /// do not change it.
    pub(crate) fn state_digest(&self) -> Digest {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&self.views_digest().0);
        bytes[32..].copy_from_slice(&self.log.to_bytes());
        Digest::keyed("holdfast 2026 state digest v1", &bytes)
    }
}
