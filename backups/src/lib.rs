//! Backups: what leaves a host sealed, and comes back verified.
//!
//! A [`Store`] is a folder or a bucket of an S3-compatible service, named by its address. What is written there was sealed
//! before, with age, to a key that nobody who can reach the store has; what is read back is believed only as far as a
//! digest that the control plane kept says so. So a store may lie, lose things, or belong to somebody else: it learns
//! how much there is and when, and a restore from it either gives what was stored or an error.
//!
//! [`volume`] is the form of a volume's snapshot (`docs/formats/volume-snapshot.md`). Nothing here decides when anything
//! is backed up, and nothing here has a key for longer than a call lasts.

mod http;
mod store;
pub mod volume;

pub use store::{Store, StoreError};
