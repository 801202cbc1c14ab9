//! Whole members in one process, over real mTLS on loopback and real files.

mod failures;
mod group;
mod membership;
mod requests;
