//! The replicated log: openraft over mTLS and redb, membership, linearizable reads.
//!
//! [`Consensus`] is a member of the control plane's Raft group. It takes proposals and reads on any member, and feeds
//! committed proposals to `holdfast_store`, which alone knows what they mean. This crate never looks into a command but
//! for [`VerifyDigest`](holdfast_model::Command::VerifyDigest), never invents an outcome, and never answers before what
//! it says is durable.
//!
//! - **I1** Members compare digests of their states; one that differs from a majority stops ([`Fault::Diverged`]).
//! - **I2** An entry or a vote is acknowledged after its fsync and not before ([`log_store`]); a member that lost its disk
//!   does not start as itself ([`member_identity`]).
//! - **I3** [`Consensus::linearize`] returns only once this member has everything that was acknowledged before.
//! - **I4** A proposal may be sent again, because the state machine knows what it has carried out.
//! - **I14** No byte from a peer can panic this process ([`transport`]).

mod applier;
mod batches;
mod checkpoints;
mod cluster_version;
mod config;
#[cfg(test)]
mod conformance_tests;
mod consensus;
mod divergence;
mod error;
mod filling;
#[cfg(test)]
mod golden_tests;
mod healing;
mod health;
mod known_peers;
mod log_journal;
mod log_opening;
mod log_record;
pub mod log_store;
mod log_time;
mod log_view;
mod log_writer;
mod lost_memory;
pub mod member_identity;
mod membership;
mod network;
#[cfg(test)]
mod pipeline_tests;
#[cfg(feature = "planted-bugs")]
pub mod planted;
mod proposals;
mod raft_meta;
mod reads;
mod recovery;
mod removal;
mod scrub;
mod sealed_file;
mod service;
pub mod snapshot_file;
mod snapshot_receiver;
mod snapshot_source;
#[cfg(test)]
mod snapshot_transfer_tests;
mod start;
pub mod state_machine;
pub mod transport;
pub mod types;
mod unanswered;
mod verdict;

pub use holdfast_disk_work as disk_work;

pub use config::{Compaction, ConsensusConfig, Timing};
pub use consensus::{Consensus, MemberState, Parts, RaftStatus};
pub use error::{ConsensusError, StartError};
pub use health::Fault;
pub use log_record::RecordError;
pub use member_identity::MemberIdentity;
pub use recovery::Recovered;
pub use service::AppHandler;
pub use transport::RaftTls;
pub use transport::link::{Duplex, Handshake, Link, LinkError, PeerStream};
pub use types::MemberNode;
