//! Going on with one survivor after the majority was lost for good.
//!
//! Nothing can prove offline that the others are really gone: if they are not, two clusters exist from here on. So this
//! is an operator's explicit act, and it begins a new incarnation: members of an older one are refused by the transport,
//! and agents follow only by a hand-over that the cluster's authority signed (I6).
//!
//! Everything that the survivor's log has is kept, whether a majority had it or not: what was acknowledged and is on this
//! disk stays; what was acknowledged and is not, is lost. One transaction of the log appends the membership of one and
//! the command that begins the incarnation, so that a crash leaves either the old member or the new one. Safe to repeat.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use holdfast_checked_file::open_database;
use holdfast_model::Proposal;
use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use redb::Durability;

use crate::error::StartError;
use crate::log_record::{self, Place};
use crate::log_store::{
    CACHE_BYTES, ENTRIES, LogStore, LogStoreError, META, META_IDENTITY, META_VOTE, open_file,
};
use crate::member_identity::{self, MemberIdentity};
use crate::start::{LOG_FILE, once_closed};
use crate::types::{Entry, LeaderId, LogCommand, LogId, MemberNode, Membership, Vote};
use crate::verdict;

/// What a recovery did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The member with its new incarnation.
    pub identity: MemberIdentity,
    /// The last entry that the survivor had; it and all before it are kept.
    pub kept_through: u64,
}

/// Makes the stopped member of `data_dir` the only one, in the next incarnation. `command` makes the proposal that says
/// so in the history.
pub(crate) fn recover(
    data_dir: &Path,
    node: MemberNode,
    command: impl FnOnce(&MemberIdentity) -> Proposal,
) -> Result<Recovered, StartError> {
    verdict::check(data_dir)?;
    let path = data_dir.to_owned();
    let Some(marker) = member_identity::read(data_dir)? else { return Err(StartError::NotPrepared { path }) };
    let log_path = data_dir.join(LOG_FILE);
    let log = once_closed(|| LogStore::open(&log_path))?;
    let next = MemberIdentity { incarnation: marker.incarnation + 1, ..marker.clone() };
    let found = log.identity().cloned();
    let (vote, last) = log.ends()?;
    // Closes the file, so that it can be opened for writing below.
    drop(log);
    let Some(last) = last else { return Err(StartError::NothingToRecover { path }) };
    match found {
        Some(found) if found == marker => {
            let proposal = command(&next);
            let entry = LogCommand::encode(&proposal).map_err(StartError::Command)?;
            write(&log_path, &next, node, entry, vote, last)?;
            member_identity::replace(data_dir, &next)?;
            Ok(Recovered { identity: next, kept_through: last.index() })
        }
        // An earlier attempt stopped between the log and the marker.
        Some(found) if found == next => {
            member_identity::replace(data_dir, &next)?;
            Ok(Recovered { identity: next, kept_through: last.index().saturating_sub(2) })
        }
        _ => Err(StartError::MarkerMismatch { path }),
    }
}

/// Term and index of the last entry in a stopped member's log: of several survivors the one with the highest has most.
pub(crate) fn log_end(data_dir: &Path) -> Result<Option<(u64, u64)>, StartError> {
    let log = once_closed(|| LogStore::open(&data_dir.join(LOG_FILE)))?;
    let (_, last) = log.ends()?;
    Ok(last.map(|last| (last.committed_leader_id().term, last.index())))
}

fn write(
    log_path: &Path,
    identity: &MemberIdentity,
    node: MemberNode,
    command: LogCommand,
    vote: Option<Vote>,
    last: LogId,
) -> Result<(), LogStoreError> {
    let id = identity.member.0;
    // Above everything that anybody can have voted for here; the member then stands for election by itself.
    let term = vote.map_or(0, |vote| vote.leader_id.term).max(last.committed_leader_id().term) + 1;
    let membership = Membership::new(vec![BTreeSet::from([id])], BTreeMap::from([(id, node)]))
        .map_err(LogStoreError::Membership)?;
    let at = |index| LogId::new(LeaderId { term, node_id: id }, index);
    let entries = [
        Entry::new(at(last.index() + 1), EntryPayload::Membership(membership)),
        Entry::new(at(last.index() + 2), EntryPayload::Normal(command)),
    ];
    let database = open_database(open_file(log_path)?, CACHE_BYTES)?;
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    {
        let mut table = transaction.open_table(ENTRIES)?;
        for entry in &entries {
            table.insert(entry.index(), log_record::encode_entry(entry)?.as_slice())?;
        }
        let mut meta = transaction.open_table(META)?;
        let vote = log_record::encode(Place::Meta(META_VOTE), &Vote::new_committed(term, id))?;
        meta.insert(META_VOTE, vote.as_slice())?;
        let identity = log_record::encode(Place::Meta(META_IDENTITY), identity)?;
        meta.insert(META_IDENTITY, identity.as_slice())?;
    }
    transaction.commit()?;
    Ok(())
}
