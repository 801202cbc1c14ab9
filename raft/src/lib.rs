//! The replicated log: openraft over mTLS and redb, membership, linearizable reads.

pub mod log_record;
pub mod log_store;
mod log_view;
mod log_writer;
pub mod member_identity;
mod raft_meta;
pub mod snapshot_file;
pub mod transport;
pub mod types;
