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

/// One proposal, or a batch of them, as the log carries it: encoded once by the member that took it, decoded once by each
/// member that applies it, and copied as bytes in between. Cheap to clone, because the tail of the log, the replication
/// streams and the state machine share one copy. Its `Debug` and `Display` show no content: proposals hold tenants'
/// words (I10).
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
    /// The bytes begin like a batch and are none.
    #[error("the batch of proposals is cut short or empty; this is a bug, keep the log and report it")]
    Batch,
}

/// Room for a proposal, so that most never have to grow into a larger piece of memory.
const ROOM_BYTES: usize = 512;
/// The largest proposal, encoded: a request body of 1 MiB and what the API adds to it.
pub const COMMAND_BYTES_MAX: usize = 2 * 1024 * 1024;
/// The first byte of a batch. No single proposal begins so: its first byte is a small number that says who asks.
const BATCH_TAG: u8 = 0x80;
/// Bytes of a length within a batch.
const LENGTH_BYTES: usize = 4;

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

    /// Decodes the proposal, which must be a single one.
    pub fn decode(&self) -> Result<Proposal, CommandError> {
        postcard::from_bytes(&self.0).map_err(CommandError::Decode)
    }

    /// One command of many that were encoded each by itself; the one, if it is alone. Their sizes are the caller's to
    /// bound: see `batches`.
    pub(crate) fn batch(commands: Vec<LogCommand>) -> Self {
        match <[LogCommand; 1]>::try_from(commands) {
            Ok([single]) => single,
            Err(commands) => {
                let room = commands.iter().map(|command| LENGTH_BYTES + command.0.len()).sum::<usize>();
                let mut bytes = Vec::with_capacity(1 + room);
                bytes.push(BATCH_TAG);
                for command in &commands {
                    // COMMAND_BYTES_MAX is far below what the length can say.
                    bytes.extend_from_slice(&(command.0.len() as u32).to_le_bytes());
                    bytes.extend_from_slice(&command.0);
                }
                LogCommand(Bytes::from(bytes))
            }
        }
    }

    /// Decodes the proposals, one or a batch of them, in their order.
    pub fn decode_all(&self) -> Result<Vec<Proposal>, CommandError> {
        let Some(mut rest) = self.0.strip_prefix(&[BATCH_TAG]) else { return Ok(vec![self.decode()?]) };
        let mut proposals = Vec::new();
        while let Some((length, after)) = rest.split_first_chunk::<LENGTH_BYTES>() {
            let length = u32::from_le_bytes(*length) as usize;
            let (bytes, after) = after.split_at_checked(length).ok_or(CommandError::Batch)?;
            proposals.push(postcard::from_bytes(bytes).map_err(CommandError::Decode)?);
            rest = after;
        }
        if !rest.is_empty() || proposals.is_empty() {
            return Err(CommandError::Batch);
        }
        Ok(proposals)
    }

    /// Takes bytes that another member sent, when they are within the bound. They may still fail to decode.
    pub fn from_wire(bytes: Bytes) -> Result<Self, CommandError> {
        if bytes.len() > COMMAND_BYTES_MAX {
            return Err(CommandError::TooLarge { bytes: bytes.len() });
        }
        Ok(LogCommand(bytes))
    }

    /// The encoded proposals.
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

/// What applying an entry answered: for each of its proposals the outcome, or nothing when it was a comparison of
/// digests, which is not the state's to decide. Empty for a blank or a membership entry.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply(pub Vec<Option<Outcome>>);

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

#[cfg(test)]
mod tests {
    use holdfast_model::{Actor, Command, Context, MemberId, RequestId, Timestamp};

    use super::*;

    fn proposal(name: &str) -> Proposal {
        let context = Context {
            actor: Actor::System(MemberId(1)),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(1),
            idempotency_key: Some(name.to_owned()),
            now: Timestamp(0),
            entropy: 0,
        };
        Proposal { context, command: Command::CreateOrg { name: name.parse().unwrap() } }
    }

    #[test]
    fn a_batch_holds_its_proposals_in_their_order() {
        let proposals = [proposal("one"), proposal("two"), proposal("three")];
        let commands: Vec<_> = proposals.iter().map(|one| LogCommand::encode(one).unwrap()).collect();
        let batch = LogCommand::batch(commands.clone());
        assert_eq!(batch.decode_all().unwrap(), proposals);
        assert_eq!(batch.bytes()[0], BATCH_TAG);
        assert!(batch.decode().is_err(), "a batch is no proposal, or one could hide in another");
        let nested = LogCommand::batch(vec![commands[0].clone(), batch.clone()]);
        assert!(nested.decode_all().is_err());
        // The form of old: a single proposal has no frame around it.
        assert_eq!(LogCommand::batch(vec![commands[0].clone()]), commands[0]);
        assert_eq!(commands[0].decode_all().unwrap(), proposals[..1]);
        assert!(commands[0].bytes()[0] < BATCH_TAG);
    }

    #[test]
    fn i14_a_batch_that_is_cut_short_is_refused_everywhere() {
        let commands = [proposal("one"), proposal("two")].map(|one| LogCommand::encode(&one).unwrap());
        let first = 1 + LENGTH_BYTES + commands[0].bytes().len();
        let whole = LogCommand::batch(commands.to_vec());
        for end in 1..whole.bytes().len() {
            let cut = LogCommand::from_wire(whole.bytes().slice(..end)).unwrap();
            assert_eq!(cut.decode_all().is_ok(), end == first, "cut at {end}");
        }
    }
}
