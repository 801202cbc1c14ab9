//! The record that lies in the state machine beside the state: up to which entry it was applied, and the membership.
//!
//! The store keeps it as opaque bytes and writes it in the transaction of the entries that it speaks of, so state and
//! record can never disagree. A snapshot carries it too.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::log_record::{self, Place, RecordError};
use crate::types::{LeaderId, LogId, MemberNode, Membership, SnapshotMeta, StoredMembership};

/// What of Raft is part of the replicated state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct RaftMeta {
    /// The last entry that was applied.
    pub(crate) last_applied: Option<LogId>,
    /// The last membership that was applied.
    pub(crate) membership: StoredMembership,
    /// Members that were removed. Their ids are never given to another one: a member that comes back with the id and
    /// without the vote of an earlier one could make two quorums.
    pub(crate) former_members: BTreeSet<u64>,
}

#[derive(Serialize, Deserialize)]
struct Stored {
    last_applied: Option<StoredLogId>,
    membership_at: Option<StoredLogId>,
    configs: Vec<BTreeSet<u64>>,
    nodes: BTreeMap<u64, MemberNode>,
    former_members: BTreeSet<u64>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct StoredLogId {
    term: u64,
    leader: u64,
    index: u64,
}

impl From<&LogId> for StoredLogId {
    fn from(id: &LogId) -> Self {
        let leader = id.committed_leader_id();
        StoredLogId { term: leader.term, leader: leader.node_id, index: id.index() }
    }
}

impl From<StoredLogId> for LogId {
    fn from(stored: StoredLogId) -> Self {
        LogId::new(LeaderId { term: stored.term, node_id: stored.leader }, stored.index)
    }
}

/// The place that the checksum of the record covers.
const PLACE: Place<'static> = Place::Meta("raft state");

impl RaftMeta {
    /// The record as bytes.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let membership = self.membership.membership();
        let stored = Stored {
            last_applied: self.last_applied.as_ref().map(StoredLogId::from),
            membership_at: self.membership.log_id().as_ref().map(StoredLogId::from),
            configs: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
            former_members: self.former_members.clone(),
        };
        log_record::encode(PLACE, &stored)
    }

    /// The record from its bytes.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let stored: Stored = log_record::decode(PLACE, bytes)?;
        let membership = if stored.configs.is_empty() && stored.nodes.is_empty() {
            Membership::default()
        } else {
            Membership::new(stored.configs, stored.nodes)
                .map_err(|_| RecordError::Membership { place: "the raft state record".to_owned() })?
        };
        Ok(RaftMeta {
            last_applied: stored.last_applied.map(LogId::from),
            membership: StoredMembership::new(stored.membership_at.map(LogId::from), membership),
            former_members: stored.former_members,
        })
    }

    /// Takes a membership over.
    pub(crate) fn set_membership(&mut self, at: LogId, membership: Membership) {
        let gone = self.membership.nodes().map(|(id, _)| *id).filter(|id| membership.get_node(id).is_none());
        self.former_members.extend(gone);
        self.membership = StoredMembership::new(Some(at), membership);
    }

    /// What a snapshot of this state covers.
    pub(crate) fn snapshot_meta(&self) -> SnapshotMeta {
        SnapshotMeta { last_log_id: self.last_applied, last_membership: self.membership.clone() }
    }

    /// The index after the last applied entry.
    pub(crate) fn next_index(&self) -> u64 {
        self.last_applied.as_ref().map_or(0, |last| last.index() + 1)
    }
}
