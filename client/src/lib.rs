//! The client's side of Holdfast: the typed HTTP client for people and agents, and how an agent follows the control
//! plane and keeps what it learnt.
//!
//! - [`replica`]: an agent's desired state on its own disk (I5–I8).
//!
//! This crate must never know the Raft port, the store or any server code; it dials the API port and nothing else. Every
//! wait has a deadline, every retry has jitter and an end, and bytes from a server never panic it (I14). It never logs a
//! token (I10).

pub mod replica;
