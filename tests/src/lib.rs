//! End-to-end tests of the binary as a user runs it, and the harness that starts real clusters for them.

pub mod cluster;
pub mod history;
pub mod load;
pub mod netns;
pub mod oci;
pub mod shop;
