//! The bytes of `log.redb`: how an entry and a row of the meta table are written, and how they are checked when read.
//!
//! A record is `version (1 byte) · checksum (16 bytes) · postcard`. The checksum is the first half of a BLAKE3 digest
//! over the place of the record (its table and key) and its body, so that a record that rotted, or that a faulty disk
//! returned from another place, is refused instead of applied (I1). Nothing here does I/O.

use std::collections::{BTreeMap, BTreeSet};

use openraft::EntryPayload;
use openraft::entry::RaftEntry;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::member_identity::MemberIdentity;
use crate::types::{Entry, LeaderId, LogCommand, LogId, MemberNode, Membership};

/// The version of every record but one.
const RECORD_VERSION: u8 = 1;
/// The version of the identity's row while entries may lie in the journal: a build that knows no journal refuses the log
/// instead of losing them. The form is the same.
const RECORD_VERSION_WITH_JOURNAL: u8 = 2;
/// Bytes of checksum kept per record: enough against rot, short enough not to matter beside an entry.
const CHECKSUM_BYTES: usize = 16;
/// Bytes before the body.
const HEADER_BYTES: usize = 1 + CHECKSUM_BYTES;
/// Room for a record, so that most never have to grow into a larger piece of memory.
const ROOM_BYTES: usize = 1024;

/// Why the bytes of a record were refused.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The record is shorter than its header.
    #[error(
        "the record at {place} is cut short; take this member out of service and let it heal from its peers"
    )]
    Short {
        /// Table and key of the record.
        place: String,
    },
    /// The record was written by a later version.
    #[error(
        "the record at {place} has format version {found}, which this build cannot read; run a newer build"
    )]
    Version {
        /// Table and key of the record.
        place: String,
        /// The version found.
        found: u8,
    },
    /// The checksum does not match.
    #[error(
        "the record at {place} fails its checksum; the disk returned other bytes than were written: take this member out of service and let it heal from its peers"
    )]
    Checksum {
        /// Table and key of the record.
        place: String,
    },
    /// The checksum matches but the body does not decode.
    #[error(
        "the record at {place} does not decode although its checksum is right; this is a bug, keep the file and report it"
    )]
    Decode {
        /// Table and key of the record.
        place: String,
        /// What postcard said.
        source: postcard::Error,
    },
    /// The record holds a membership with a voter that has no address.
    #[error(
        "the record at {place} names a voter without an address; this is a bug, keep the file and report it"
    )]
    Membership {
        /// Table and key of the record.
        place: String,
    },
    /// The record could not be encoded.
    #[error("the record for {place} could not be encoded; this is a bug, report it")]
    Encode {
        /// Table and key of the record.
        place: String,
        /// What postcard said.
        source: postcard::Error,
    },
}

/// Where a record lies. Part of what its checksum covers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place<'a> {
    /// The entry at an index of the log.
    Entry(u64),
    /// A row of the meta table.
    Meta(&'a str),
}

impl Place<'_> {
    fn describe(self) -> String {
        match self {
            Place::Entry(index) => format!("log index {index}"),
            Place::Meta(key) => format!("meta row `{key}`"),
        }
    }

    fn checksum(self, version: u8, body: &[u8]) -> [u8; CHECKSUM_BYTES] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[version]);
        match self {
            Place::Entry(index) => {
                hasher.update(b"entry");
                hasher.update(&index.to_le_bytes());
            }
            Place::Meta(key) => {
                hasher.update(b"meta");
                hasher.update(&(key.len() as u64).to_le_bytes());
                hasher.update(key.as_bytes());
            }
        }
        hasher.update(body);
        let digest = hasher.finalize();
        let mut checksum = [0_u8; CHECKSUM_BYTES];
        checksum.copy_from_slice(&digest.as_bytes()[..CHECKSUM_BYTES]);
        checksum
    }
}

/// Encodes a value as the record at `place`.
pub(crate) fn encode<T: Serialize>(place: Place<'_>, value: &T) -> Result<Vec<u8>, RecordError> {
    encode_version(RECORD_VERSION, place, value)
}

/// Encodes the identity of a log; `journal` says whether entries may lie beside it.
pub(crate) fn encode_identity(
    place: Place<'_>,
    identity: &MemberIdentity,
    journal: bool,
) -> Result<Vec<u8>, RecordError> {
    encode_version(if journal { RECORD_VERSION_WITH_JOURNAL } else { RECORD_VERSION }, place, identity)
}

fn encode_version<T: Serialize>(version: u8, place: Place<'_>, value: &T) -> Result<Vec<u8>, RecordError> {
    let mut bytes = Vec::with_capacity(ROOM_BYTES);
    bytes.resize(HEADER_BYTES, 0);
    let mut bytes = postcard::to_extend(value, bytes)
        .map_err(|source| RecordError::Encode { place: place.describe(), source })?;
    let checksum = place.checksum(version, &bytes[HEADER_BYTES..]);
    bytes[0] = version;
    bytes[1..HEADER_BYTES].copy_from_slice(&checksum);
    Ok(bytes)
}

/// Decodes the record at `place`, after its checksum.
pub(crate) fn decode<T: DeserializeOwned>(place: Place<'_>, bytes: &[u8]) -> Result<T, RecordError> {
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(RecordError::Short { place: place.describe() });
    };
    let version = header[0];
    if !(RECORD_VERSION..=RECORD_VERSION_WITH_JOURNAL).contains(&version) {
        return Err(RecordError::Version { place: place.describe(), found: version });
    }
    if place.checksum(version, body) != header[1..] {
        return Err(RecordError::Checksum { place: place.describe() });
    }
    postcard::from_bytes(body).map_err(|source| RecordError::Decode { place: place.describe(), source })
}

/// An entry as it is stored. Ours, not openraft's, so that a change of its types cannot change our files.
#[derive(Serialize, Deserialize)]
struct StoredEntry {
    term: u64,
    leader: u64,
    payload: StoredPayload,
}

#[derive(Serialize, Deserialize)]
enum StoredPayload {
    Blank,
    Command(LogCommand),
    Membership { configs: Vec<BTreeSet<u64>>, nodes: BTreeMap<u64, MemberNode> },
}

/// Encodes an entry as the record of its index.
pub(crate) fn encode_entry(entry: &Entry) -> Result<Vec<u8>, RecordError> {
    let log_id = entry.log_id();
    let leader = log_id.committed_leader_id();
    let payload = match &entry.payload {
        EntryPayload::Blank => StoredPayload::Blank,
        EntryPayload::Normal(command) => StoredPayload::Command(command.clone()),
        EntryPayload::Membership(membership) => StoredPayload::Membership {
            configs: membership.get_joint_config().clone(),
            nodes: membership.nodes().map(|(id, node)| (*id, node.clone())).collect(),
        },
    };
    let stored = StoredEntry { term: leader.term, leader: leader.node_id, payload };
    encode(Place::Entry(log_id.index()), &stored)
}

/// Decodes the entry that was stored at `index`.
pub(crate) fn decode_entry(index: u64, bytes: &[u8]) -> Result<Entry, RecordError> {
    let stored: StoredEntry = decode(Place::Entry(index), bytes)?;
    let log_id = LogId::new(LeaderId { term: stored.term, node_id: stored.leader }, index);
    let payload = match stored.payload {
        StoredPayload::Blank => EntryPayload::Blank,
        StoredPayload::Command(command) => EntryPayload::Normal(command),
        StoredPayload::Membership { configs, nodes } => {
            let membership = Membership::new(configs, nodes)
                .map_err(|_| RecordError::Membership { place: Place::Entry(index).describe() })?;
            EntryPayload::Membership(membership)
        }
    };
    Ok(Entry { log_id, payload })
}
