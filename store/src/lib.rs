//! The state machine: decide and evolve over redb tables, digests, rebuild.
//!
//! [`Store::apply`] takes entries of the Raft log in order. Each command is decided against the views and makes events
//! or a rejection; each event evolves the views and joins the history. What it changes stays in memory until a
//! checkpoint writes it down, apart from the applies. [`View`] reads a consistent moment while all that goes on.
//!
//! This crate never reads a clock, never draws randomness, never opens a socket and knows no async runtime: time and
//! fresh ids come with each command. Invariants kept here: I1 (the same entries give the same state; digests are
//! compared), I4 (first outcomes are kept), I8 (a hostname has one owner), I9 (what lies outside the caller's org is
//! answered as absent), I11 (a revoked token decides nothing), I12 (events are chained), I13 (views are a function of
//! the events), I14 (a rejection leaves the state as it was). I2 is kept together with the Raft log: it replays what
//! is in memory only, and [`Store::checkpoint`] says up to where it is no longer needed.

pub mod agents;
mod apply;
mod chain;
mod checkpoint;
mod database;
mod decide;
mod error;
mod event_bytes;
mod evolve;
mod evolve_secrets;
mod evolve_volume_snapshots;
mod evolve_volumes;
mod generation;
mod greatest;
mod head;
mod merge;
mod outcomes;
mod overlay;
mod packed;
mod placement;
#[cfg(feature = "planted-bugs")]
pub mod planted;
mod recent;
mod replay;
mod replay_events;
mod replay_rows;
mod rollout;
mod rows;
mod secret_views;
mod settled;
mod snapshot;
mod store;
mod tables;
mod view;
mod views;
mod volume_snapshot_views;
mod volume_snapshots;
mod volumes;
mod writer;

pub use chain::{Chain, ChainError};
pub use database::{DIGEST_EVERY, DIGESTS_KEPT};
pub use error::StoreError;
pub use outcomes::REQUEST_KEPT_MS;
pub use replay::{Rebuilt, Replayed, Verified};
pub use rollout::{FAILURE_REMEMBERED_MS, REPLACE_PAUSE_MS, REPLACE_PAUSE_MS_MAX};
pub use rows::{RowList, Rows};
pub use secret_views::{ENVELOPES_PAGE, SecretViews};
pub use snapshot::{SnapshotSource, SnapshotSummary};
pub use store::{ACTIVE_BYTES_MAX, Store};
pub use tables::{Table, Value};
pub use view::{EventPage, View};
pub use views::{ENV_ENDED_KEPT, NodeLoad, Views};
pub use volume_snapshot_views::SnapshotViews;

#[cfg(test)]
mod tests;
