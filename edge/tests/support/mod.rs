//! What the edge's tests share: TLS ends, backends, and an edge with its own loopback address.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod member;
pub(crate) mod programs;
pub(crate) mod tls;
pub(crate) mod world;
