//! The API over one real member: [`access`] is who may call what, [`agents`] what agents and members meet.

// A test that cannot go on says so by a panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod access;
mod agents;
mod exec;
mod harness;
mod logs;
mod members;
mod revisions;
mod secrets;
mod volume_snapshots;
mod volumes;
