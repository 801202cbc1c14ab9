//! Volume snapshots: what was on a volume's disk at one moment, kept in the operator's store of backups, and what is
//! restored from it. A restore makes another volume and never writes to one that is there.

use crate::agent::DETAIL_BYTES_MAX;
use crate::sealed::Recipient;
use crate::{AppId, Digest, EnvId, InstanceId, NodeId, OrgId, SnapshotId, Timestamp, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A snapshot of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VolumeSnapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Of which volume; that may be deleted by now.
    pub volume: VolumeId,
    /// What the volume was called.
    pub name: VolumeName,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// The volume's size in MiB.
    pub size_mib: u64,
    /// The volume's home: who takes it and keeps it up to its end.
    pub node: NodeId,
    /// Why it was asked for.
    pub cause: SnapshotCause,
    /// How far it is.
    pub state: SnapshotState,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When its state last changed.
    pub changed_at: Timestamp,
}

/// Why a snapshot was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotCause {
    /// Somebody asked for it. It stays until somebody deletes it.
    Asked,
    /// The manifest says `backup = true`, and a day was over. Only so many are kept.
    Daily,
}

/// How far a snapshot is. Only an uploaded one can be restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// The node is to take it.
    Requested,
    /// It is taken, and lies on the node beside the volume: not safe from the loss of that node.
    Snapshotted,
    /// All of it is in the store of backups.
    Uploaded {
        /// Of the sealed list of its parts: what is fetched later is compared with it.
        manifest: Digest,
        /// What it takes in the store, in bytes.
        stored_bytes: u64,
    },
    /// It will not come to anything.
    Failed {
        /// Why, in the node's words.
        detail: String,
    },
}

impl SnapshotState {
    /// Whether a node still has something to do for it.
    pub const fn is_under_way(&self) -> bool {
        matches!(self, Self::Requested | Self::Snapshotted)
    }

    /// Whether it can be restored.
    pub const fn is_good(&self) -> bool {
        matches!(self, Self::Uploaded { .. })
    }

    /// Whether it came to nothing.
    pub const fn is_failed(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// Whether it may follow `before`: a state never goes back.
    pub const fn follows(&self, before: &Self) -> bool {
        match before {
            Self::Requested => !matches!(self, Self::Requested),
            Self::Snapshotted => matches!(self, Self::Uploaded { .. } | Self::Failed { .. }),
            Self::Uploaded { .. } | Self::Failed { .. } => false,
        }
    }
}

/// A volume that is being made from a snapshot; nothing mounts it before it is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct VolumeRestore {
    /// The new volume.
    pub volume: VolumeId,
    /// From which snapshot.
    pub snapshot: SnapshotId,
    /// The new volume's home.
    pub node: NodeId,
    /// Why it came to nothing, if it did: delete the volume then.
    pub failed: Option<String>,
}

/// What the home of volumes has to do about snapshots, as a member answers its report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotWork {
    /// Snapshots to take and upload.
    pub take: Vec<TakeSnapshot>,
    /// Volumes to restore.
    pub restore: Vec<RestoreVolume>,
    /// Snapshots whose objects are to be erased.
    pub forget: BTreeSet<SnapshotId>,
}

/// A snapshot to take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct TakeSnapshot {
    /// Which, and of what.
    pub of: SnapshotOf,
    /// The volume's size in MiB.
    pub size_mib: u64,
    /// Who has the volume, as far as the member knows.
    pub attached: Option<InstanceId>,
    /// To whom it is sealed: a key of this one snapshot's, which no node has.
    pub recipient: Recipient,
}

/// What each part of a snapshot says that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct SnapshotOf {
    /// Whose.
    pub org: OrgId,
    /// Of which volume.
    pub volume: VolumeId,
    /// Which.
    pub snapshot: SnapshotId,
}

/// A volume to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RestoreVolume {
    /// The new volume.
    pub volume: VolumeId,
    /// Its size in MiB.
    pub size_mib: u64,
    /// From what.
    pub from: SnapshotOf,
    /// Of the sealed list of the snapshot's parts.
    pub manifest: Digest,
}

/// What a node tells of its snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotNews {
    /// How far snapshots are, until they are no work any more.
    #[serde(default)]
    pub taken: BTreeMap<SnapshotId, SnapshotState>,
    /// Volumes that are restored, or why they cannot be.
    #[serde(default)]
    pub restored: BTreeMap<VolumeId, Restored>,
    /// Snapshots whose objects are erased.
    #[serde(default)]
    pub forgotten: BTreeSet<SnapshotId>,
}

impl SnapshotNews {
    /// Whether it tells nothing.
    pub fn is_empty(&self) -> bool {
        self.taken.is_empty() && self.restored.is_empty() && self.forgotten.is_empty()
    }

    /// How many things it tells.
    pub fn len(&self) -> usize {
        self.taken.len() + self.restored.len() + self.forgotten.len()
    }

    /// Whether each text in it is short enough.
    pub fn fits(&self) -> bool {
        let taken = self.taken.values().filter_map(|state| match state {
            SnapshotState::Failed { detail } => Some(detail),
            _ => None,
        });
        let restored = self.restored.values().filter_map(|restored| match restored {
            Restored::Failed { detail } => Some(detail),
            Restored::Whole => None,
        });
        taken.chain(restored).all(|detail| detail.len() <= DETAIL_BYTES_MAX)
    }
}

/// How a restore ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restored {
    /// The disk is whole, verified and durable.
    Whole,
    /// It cannot be made.
    Failed {
        /// Why, in the node's words.
        detail: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_never_goes_back() {
        let states = [
            SnapshotState::Requested,
            SnapshotState::Snapshotted,
            SnapshotState::Uploaded { manifest: Digest([1; 32]), stored_bytes: 1 },
            SnapshotState::Failed { detail: "full".into() },
        ];
        let follows = |after: &SnapshotState| -> Vec<usize> {
            (0..states.len()).filter(|before| after.follows(&states[*before])).collect()
        };
        let expected: [&[usize]; 4] = [&[], &[0], &[0, 1], &[0, 1]];
        for (state, expected) in states.iter().zip(expected) {
            assert_eq!(follows(state), expected, "{state:?}");
        }
    }

    #[test]
    fn news_with_a_long_text_do_not_fit() {
        let of = |length: usize| SnapshotNews {
            restored: [(VolumeId::from_bits(1), Restored::Failed { detail: "x".repeat(length) })].into(),
            ..SnapshotNews::default()
        };
        assert!(of(DETAIL_BYTES_MAX).fits());
        assert!(!of(DETAIL_BYTES_MAX + 1).fits());
    }
}
