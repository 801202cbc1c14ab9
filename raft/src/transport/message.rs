//! What members say to each other. Stored nowhere, so it may change with [`super::PROTOCOL_VERSION`]; the handshake may
//! not, because it is what tells versions apart.

use bytes::Bytes;
use holdfast_model::{Outcome, SupportedVersions};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};

use crate::lost_memory::Remembered;
use crate::types::{LogCommand, LogId, MemberNode, SnapshotMeta, TypeConfig, Vote};

/// First word on a new connection, from the side that dialled.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// Tells this protocol from any other.
    pub(crate) magic: [u8; 4],
    /// The version that the dialling side speaks.
    pub(crate) version: u8,
    /// Its cluster.
    pub(crate) cluster: String,
    /// Its member id, as in its certificate.
    pub(crate) from: u64,
    /// Whom it wants to reach: an address may have passed to another member.
    pub(crate) to: u64,
    /// What the connection is for.
    pub(crate) purpose: Purpose,
}

/// The magic of [`Hello`].
pub(crate) const HELLO_MAGIC: [u8; 4] = *b"HFR1";

/// The answer to [`Hello`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum HelloAnswer {
    /// Go on, in this version.
    Welcome { version: u8 },
    /// No, and why. The connection is closed after it.
    Refused { reason: String },
    /// No: this cluster goes on in a newer incarnation, and the one who dialled is of an older one.
    Superseded { incarnation: u64 },
}

/// What the side that answers supports, behind the [`HelloAnswer`]. Builds before cluster version 2 say nothing there, and
/// do not look there.
pub(crate) fn with_versions(
    answer: &HelloAnswer,
    supported: SupportedVersions,
) -> (&HelloAnswer, SupportedVersions) {
    (answer, supported)
}

/// The answer to a greeting, and what is said behind it.
pub(crate) fn read_answer(bytes: &[u8]) -> Result<(HelloAnswer, SupportedVersions), postcard::Error> {
    let (answer, rest) = postcard::take_from_bytes(bytes)?;
    let supported = if rest.is_empty() { SupportedVersions::UNTOLD } else { postcard::from_bytes(rest)? };
    Ok((answer, supported))
}

/// What a connection carries. Each purpose has its own, so that none waits behind another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Purpose {
    /// Votes, heartbeats, read indexes, forwarded proposals, administration.
    Control,
    /// Log entries.
    Log,
    /// Messages of the layers above.
    App,
    /// Snapshots.
    Snapshot,
}

/// One frame of a connection.
#[derive(Serialize, Deserialize)]
pub(crate) enum Frame {
    /// A question; its answer has the same id.
    Ask { id: u64, request: Request },
    /// The answer.
    Answer { id: u64, response: Response },
    /// One request of an ordered stream of log entries. The first opens the stream.
    StreamItem { id: u64, request: AppendEntriesRequest<TypeConfig> },
    /// No more requests on this stream.
    StreamEnd { id: u64 },
    /// The answer to the oldest request of the stream that has none yet.
    StreamResult { id: u64, result: Result<StreamAppendResult<TypeConfig>, Refusal> },
}

/// A question.
#[derive(Serialize, Deserialize)]
pub(crate) enum Request {
    /// Append entries, or a heartbeat when there are none.
    Append(AppendEntriesRequest<TypeConfig>),
    /// Grant a vote.
    Vote(VoteRequest<TypeConfig>),
    /// Say whether a vote would be granted.
    PreVote(VoteRequest<TypeConfig>),
    /// Become the leader.
    TransferLeader(TransferLeaderRequest<TypeConfig>),
    /// Propose this; only the leader does.
    Forward(LogCommand),
    /// Say up to where a linearizable read must have applied; only the leader knows.
    ReadIndex,
    /// Change the membership; only the leader does.
    Admin(AdminRequest),
    /// A message of the layers above.
    App(Bytes),
    /// A snapshot is coming.
    SnapshotBegin(SnapshotOffer),
    /// A part of it.
    SnapshotChunk { digest: [u8; 32], offset: u64, data: Bytes },
    /// All of it was sent: check and install it.
    SnapshotEnd { digest: [u8; 32], vote: Vote },
    /// Which digest has your state after the entry at this index?
    DigestAt { index: u64 },
    /// A majority has another digest at this index than you reported: stop serving.
    Diverged { index: u64, expected: [u8; 32] },
    /// What do you remember that I acknowledged to you?
    Remembered,
    /// You acknowledged this to me, and now say that you do not have it: check, and stop if it is so.
    WentBack(Remembered),
    /// I have a log and no state: offer me a snapshot of at least so many entries.
    SnapshotWanted { at_least: u64 },
    /// Give me the part of the snapshot that you offered that begins here.
    SnapshotPart { digest: [u8; 32], offset: u64 },
    /// Propose these; only the leader does. Sent only when the cluster's version allows batches: an older member does
    /// not know it.
    ForwardAll(Vec<LogCommand>),
}

/// What a snapshot is, before it comes.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct SnapshotOffer {
    /// What it covers.
    pub(crate) meta: SnapshotMeta,
    /// Its size.
    pub(crate) bytes: u64,
    /// The digest of all its bytes.
    pub(crate) digest: [u8; 32],
}

/// A change of the membership. Each is safe to ask for again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum AdminRequest {
    /// Add a member that receives the log and does not vote.
    AddLearner { id: u64, node: MemberNode },
    /// Make a learner a voter.
    Promote { id: u64 },
    /// Make a voter a learner.
    Demote { id: u64 },
    /// Remove a member for good.
    Remove { id: u64 },
    /// Hand the leadership over.
    TransferLeader { to: u64 },
}

/// An answer.
#[derive(Serialize, Deserialize)]
pub(crate) enum Response {
    /// To [`Request::Append`].
    Append(AppendEntriesResponse<TypeConfig>),
    /// To [`Request::Vote`] and [`Request::PreVote`].
    Vote(VoteResponse<TypeConfig>),
    /// To [`Request::TransferLeader`].
    TransferLeader(TransferLeaderResponse<TypeConfig>),
    /// To [`Request::Forward`].
    Outcome(Outcome),
    /// To [`Request::ReadIndex`].
    ReadIndex(LogId),
    /// To [`Request::App`].
    App(Bytes),
    /// To [`Request::SnapshotBegin`]: bytes before this offset are here already.
    SnapshotFrom { offset: u64 },
    /// To [`Request::SnapshotEnd`].
    SnapshotStored(SnapshotResponse<TypeConfig>),
    /// To [`Request::DigestAt`]; `None` when it is not known any more or not yet.
    Digest(Option<[u8; 32]>),
    /// Done.
    Done,
    /// Not done, and why.
    Refused(Refusal),
    /// To [`Request::Remembered`].
    Remembered(Option<Remembered>),
    /// To [`Request::SnapshotWanted`].
    SnapshotOffered(SnapshotOffer),
    /// To [`Request::SnapshotPart`].
    SnapshotData(Bytes),
    /// To [`Request::ForwardAll`]: what became of each, in their order.
    Outcomes(Vec<Result<Outcome, Refusal>>),
    /// To [`Request::SnapshotEnd`]: it is still being checked or installed; ask again. A build that does not know this
    /// answer breaks the connection and begins the snapshot again, which is here by then.
    SnapshotInstalling,
}

/// Why a question was not answered as asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum Refusal {
    /// Nothing was done; the leader, if known, may.
    #[error("this member is not the leader")]
    NotLeader { leader: Option<u64> },
    /// Nothing was done; later may be better.
    #[error("this member is not able to answer now ({0}); try again")]
    Unavailable(String),
    /// It is not known whether it was done.
    #[error("it is not known whether the proposal was stored ({0}); ask again with the same request id")]
    Unknown(String),
    /// The question is wrong and will be wrong again.
    #[error("{0}")]
    Invalid(String),
    /// The one who asks is no member any more.
    #[error("the member that asks was removed from the cluster")]
    Removed,
}
