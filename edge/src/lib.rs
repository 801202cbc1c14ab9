//! The ingress agent: routes TLS by SNI and TCP by port to microVMs, with or without a control plane.
//!
//! It reads a connection's ClientHello, looks its hostname up in the table in force, connects to a backend, replays
//! what it read and carries both directions to their end. It never terminates TLS, never holds a tenant's key, never
//! routes by default, and never dials the Raft port. It knows one set of routes and a revision.
//!
//! Invariants kept here: I5 (the routes come from the edge's own disk before anybody is contacted, backends are
//! judged by the edge itself), I6 and I7 (through the client crate's replica), I8 (a table is whole, unambiguous and
//! switched atomically), I9 (no byte of one connection reaches another), I14 (no byte from a socket panics the edge
//! or grows it without bound).
//!
//! Read [`process`] and [`agent`] first, then [`connection`], then what it calls: [`client_hello`], [`table`], [`connect`], [`relay`].

#![forbid(unsafe_code)]

pub mod admission;
pub mod agent;
pub mod backend;
pub mod balance;
pub mod client_hello;
pub mod config;
pub mod connect;
pub mod connection;
pub mod edge;
pub mod in_force;
pub mod introspect;
pub mod listeners;
pub mod metrics;
mod own_socket;
pub mod pipe;
pub mod probe;
pub mod process;
pub mod proxy_protocol;
pub mod relay;
pub mod table;
pub mod take_over;
#[cfg(test)]
mod testing;

pub use config::{EdgeConfig, Limits};
pub use edge::Edge;
