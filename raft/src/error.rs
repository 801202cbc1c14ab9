//! What can go wrong for those who use consensus.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use holdfast_model::MemberId;
use holdfast_store::StoreError;
use openraft::errors::Fatal;

use crate::health::Fault;
use crate::log_store::LogStoreError;
use crate::member_identity::MarkerError;
use crate::snapshot_file::SnapshotFileError;
use crate::state_machine::StateMachineError;
use crate::types::{CommandError, TypeConfig};

/// Why a request to the running consensus had no result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConsensusError {
    /// Nothing was done, because there was no leader that could do it.
    #[error("there is no leader with a majority right now; nothing was changed, try again")]
    NoLeader,
    /// It is not known whether it was done.
    #[error(
        "the cluster did not answer in time; whether the request was carried out is unknown, so repeat it with the same idempotency key"
    )]
    Unknown,
    /// Too much is under way.
    #[error("this member has too many requests under way; nothing was changed, try again later")]
    Busy,
    /// This member may not serve.
    #[error("this member has stopped serving")]
    Stopped(#[source] Fault),
    /// This member is shutting down.
    #[error("this member is shutting down; ask another one")]
    ShuttingDown,
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The member asked for is not in the membership.
    #[error("member {0} is not in the cluster; check the id")]
    UnknownMember(MemberId),
    /// The member asked for did not answer.
    #[error("member {0} did not answer; nothing is known of what it did")]
    Unreachable(MemberId),
}

impl ConsensusError {
    /// Whether the same request may succeed later without a change.
    pub fn is_retryable(&self) -> bool {
        match self {
            ConsensusError::NoLeader
            | ConsensusError::Unknown
            | ConsensusError::Busy
            | ConsensusError::Stopped(_)
            | ConsensusError::ShuttingDown
            | ConsensusError::Unreachable(_) => true,
            ConsensusError::Invalid(_) | ConsensusError::UnknownMember(_) => false,
        }
    }
}

/// Why a member could not be prepared or started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The folder could not be made.
    #[error("the data folder {path} could not be made; check its parent's permissions")]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder belongs to no member.
    #[error(
        "the data folder {path} belongs to no member; run `holdfast server init` or `holdfast server join` first. If it did belong to one, its disk was lost: remove that member from the cluster and join under a new id"
    )]
    NotPrepared {
        /// The folder.
        path: PathBuf,
    },
    /// The folder belongs to another member than was asked for.
    #[error(
        "the data folder {path} belongs to member {found} and not to member {wanted}; check the configuration"
    )]
    OtherMember {
        /// The folder.
        path: PathBuf,
        /// Whose it is.
        found: MemberId,
        /// Whose it should be.
        wanted: MemberId,
    },
    /// The folder belongs to another cluster than the certificates.
    #[error(
        "the data folder {path} belongs to another cluster than this member's certificate; check the configuration"
    )]
    OtherCluster {
        /// The folder.
        path: PathBuf,
    },
    /// Marker and log disagree.
    #[error(
        "the marker and the log in {path} name different members; remove this member from the cluster and join under a new id"
    )]
    MarkerMismatch {
        /// The folder.
        path: PathBuf,
    },
    /// The member found out before that it must not serve.
    #[error("the member of this folder must not start again, as {path} says")]
    OutOfService {
        /// The verdict.
        path: PathBuf,
        /// What was found.
        #[source]
        fault: Fault,
    },
    /// The member's verdict on itself cannot be read.
    #[error(
        "{path} says that the member of this folder must not start again, and cannot be read; remove the member from the cluster and let a new one join in an empty folder"
    )]
    VerdictUnreadable {
        /// The verdict.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// No peer could give this member a state.
    #[error(
        "the state of {path} had to be given up and no peer could fill it in time; start this member again when another one runs"
    )]
    NotFilled {
        /// The folder.
        path: PathBuf,
        /// Why the state was given up.
        #[source]
        fault: Fault,
    },
    /// This member never had a log.
    #[error(
        "the log of {path} is empty, so there is nothing to go on with; choose another survivor, the one with the most entries"
    )]
    NothingToRecover {
        /// The folder.
        path: PathBuf,
    },
    /// The marker could not be used.
    #[error("the identity of the data folder could not be read or written")]
    Marker(#[from] MarkerError),
    /// The log could not be opened.
    #[error("the raft log could not be opened")]
    Log(#[from] LogStoreError),
    /// The state could not be opened.
    #[error("the state could not be opened")]
    Store(#[from] StoreError),
    /// The state machine could not be opened.
    #[error("the state machine could not be opened")]
    StateMachine(#[from] StateMachineError),
    /// The snapshot folder could not be opened.
    #[error("the snapshot folder could not be opened")]
    Snapshots(#[from] SnapshotFileError),
    /// The address could not be listened on.
    #[error("the raft address {address} cannot be listened on; check that it is this host's and free")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The times are not in order.
    #[error(
        "the raft times are wrong: {0}; the heartbeat must be the shortest and the election times a range"
    )]
    Timing(String),
    /// openraft could not start.
    #[error("the consensus core could not start; check the disk, then start the member again")]
    Core(#[source] Box<Fatal<TypeConfig>>),
    /// Work on the disk did not come to its end.
    #[error(
        "work on the disk of this member was cut off, by a panic or by the end of the process; report a panic, and start the member again"
    )]
    Work(#[source] io::Error),
    /// A state that is ahead of its log has no snapshot.
    #[error(
        "the state is ahead of the log, and the snapshot that must reach as far could not be made; check the disk and its free space, then start the member again"
    )]
    OwnSnapshot(#[source] io::Error),
    /// The member was to be filled, and could not take in what there is.
    #[error(
        "the state of {path} had to be given up and a new one could not be put in its place; check the disk and its free space, then start the member again"
    )]
    Fill {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A filled member stopped before it had what was acknowledged meanwhile.
    #[error("this member was filled and stopped before it had caught up")]
    StoppedCatchingUp(#[source] Fault),
    /// The command that begins an incarnation has no form in the log.
    #[error("the command that begins the new incarnation could not be encoded; this is a bug, report it")]
    Command(#[source] CommandError),
    /// The cluster exists already.
    #[error("this member is part of a cluster already; `server init` is for a new one")]
    AlreadyBootstrapped,
}
