//! The walls around a VMM's process, and the launcher that puts it behind them.
//!
//! A guest that breaks out of its virtual machine owns the VMM's process. This crate is about what such a process can
//! still do: read the files that it was given, write to the descriptors that it was given, and burn its own share of
//! the host. It makes the [`plan::Plan`] of a jail (the agent's side, [`start`]) and carries it out (the
//! [`launcher`], the agent's own binary run again, single-threaded from its start).
//!
//! Each wall is a file: [`namespaces`](crate), `root`, `identity`, `access` (Landlock), `filter` (seccomp), `limits`
//! (rlimits), [`cgroup`]. The launcher puts them up in one order, and a wall that cannot be put up is a failure of the
//! start, never a warning: no filter, no start. It never leaves anything on the host that does not end with the
//! process: mounts live in its namespace, descriptors in it. What a VMM's process can leave are its folder and its
//! cgroup, whose names follow from its instance.
//!
//! Keeps I9 (a tenant that takes over its VMM reaches no other one), I10 (no core dump, no shared memory to read) and
//! I14 (what a VMM makes grow on the host is bounded).

mod access;
pub mod cgroup;
mod descriptors;
mod error;
mod filter;
mod identity;
pub mod ids;
pub mod launcher;
mod limits;
mod namespaces;
pub mod plan;
pub mod program;
mod report;
mod root;
pub mod start;

pub use access::landlock_version;
pub use error::{LaunchError, Step};
