//! What the log carries and how openraft is told about it.
//!
//! Members are plain numbers here, because openraft asks more of an id type than `model` should have to promise;
//! `MemberId` is turned into a number at this crate's border and nowhere else.

use std::fmt;

use bytes::Bytes;
use holdfast_model::{Outcome, Proposal};
use serde::{Deserialize, Serialize};

/// Where a member can be reached. It is part of the membership entry in the log, so every member knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberNode {
    /// `host:port` of the Raft listener (mTLS, members only).
    pub raft_addr: String,
    /// `host:port` of the HTTP API listener.
    pub api_addr: String,
}

/// One proposal as the log carries it: encoded once by the member that took it, decoded once by each member that applies
/// it, and copied as bytes in between. Cheap to clone, because the tail of the log, the replication streams and the
/// state machine share one copy. Its `Debug` and `Display` show no content: proposals hold tenants' words (I10).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogCommand(Bytes);

/// Why a proposal could not be turned into bytes or back.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The proposal does not encode.
    #[error("the proposal could not be encoded; this is a bug, report it")]
    Encode(#[source] postcard::Error),
    /// The proposal is larger than an entry of the log may be.
    #[error("the proposal has {bytes} bytes and {COMMAND_BYTES_MAX} are allowed; send less at a time")]
    TooLarge {
        /// Its size, encoded.
        bytes: usize,
    },
    /// The bytes are no proposal that this build knows.
    #[error(
        "the bytes are no proposal that this build knows; if the cluster was upgraded, upgrade this member as well"
    )]
    Decode(#[source] postcard::Error),
}

/// Room for a proposal, so that most never have to grow into a larger piece of memory.
const ROOM_BYTES: usize = 512;
/// The largest proposal, encoded: a request body of 1 MiB and what the API adds to it.
pub const COMMAND_BYTES_MAX: usize = 2 * 1024 * 1024;

impl LogCommand {
    /// Encodes a proposal.
    pub fn encode(proposal: &Proposal) -> Result<Self, CommandError> {
        let room = Vec::with_capacity(ROOM_BYTES);
        let mut bytes = postcard::to_extend(proposal, room).map_err(CommandError::Encode)?;
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(CommandError::TooLarge { bytes: bytes.len() });
        }
        // Many commands are kept at the log's tail.
        bytes.shrink_to_fit();
        Ok(LogCommand(Bytes::from(bytes)))
    }

    /// Decodes the proposal.
    pub fn decode(&self) -> Result<Proposal, CommandError> {
        postcard::from_bytes(&self.0).map_err(CommandError::Decode)
    }

    /// Takes bytes that another member sent, when they are within the bound. They may still fail to decode.
    pub fn from_wire(bytes: Bytes) -> Result<Self, CommandError> {
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(CommandError::TooLarge { bytes: bytes.len() });
        }
        Ok(LogCommand(bytes))
    }

    /// The encoded proposal.
    pub fn bytes(&self) -> &Bytes {
        &self.0
    }
}

impl fmt::Debug for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LogCommand({} bytes)", self.0.len())
    }
}

impl fmt::Display for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {} bytes", self.0.len())
    }
}

/// What applying an entry answered: the outcome of a proposal, nothing for a blank or a membership entry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply(pub Option<Outcome>);

openraft::declare_raft_types!(
    /// The types with which this crate uses openraft.
    pub TypeConfig:
        D = LogCommand,
        R = Reply,
        NodeId = u64,
        Node = MemberNode,
);

/// The identity of one log entry: the leader that proposed it and its index.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// A vote: the leader that a member follows or grants.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// A log entry.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// A membership and the log entry that set it.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;
/// A membership: voters and learners with their addresses.
pub type Membership = openraft::Membership<u64, MemberNode>;
/// What a snapshot covers.
pub type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<TypeConfig>;
/// The id of a leader: term and member.
pub type LeaderId = openraft::type_config::alias::LeaderIdOf<TypeConfig>;
