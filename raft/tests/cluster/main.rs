//! Whole members in one process, over real mTLS on loopback and real files.

// A test that cannot go on says so by a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod batches;
mod bit_rot;
mod divergence;
mod failures;
mod golden;
mod group;
mod hostile;
mod membership;
mod out_of_service;
mod recovery;
mod requests;
mod snapshots;
mod upgrade;
