//! The client's side of Holdfast: the typed HTTP client for people and agents, and how an agent follows the control
//! plane and keeps what it learnt.
//!
//! - [`http`]: requests over several members, with deadlines, retries that do nothing twice (I4), and streams.
//! - [`follow`] and [`report`]: an agent's stream to the control plane, and what it tells.
//! - [`exec`]: a session with a program in an instance, as a person and as a node have it.
//! - [`dial`]: where the bytes under HTTP/2 come from.
//! - [`typed`]: one method for each thing that the API offers.
//! - [`replica`]: an agent's desired state on its own disk (I5–I8).
//!
//! This crate must never know the Raft port, the store or any server code; it dials the API port and nothing else. Every
//! wait has a deadline, every retry has jitter and an end, and bytes from a server never panic it (I14). It never logs a
//! token (I10).

mod backoff;
pub mod connection;
pub mod dial;
pub mod endpoint;
pub mod error;
pub mod exec;
pub mod follow;
pub mod frames;
pub mod hand_over;
pub mod http;
pub mod lines;
#[cfg(feature = "planted-bugs")]
pub mod planted;
pub mod replica;
pub mod report;
pub mod typed;

pub use dial::{ByteStream, Dial, Dialled};
pub use endpoint::{Endpoint, EndpointError};
pub use error::{ApiError, ClientError, TransportError, exit};
pub use exec::{ExecReceiver, ExecSender, ExecStream};
pub use follow::{CallHandler, Follower, Link, NoCalls};
pub use http::{Client, fresh_key};
pub use lines::Lines;
pub use replica::{Applied, DiskError, Items, Published, Refusal, Replica, ReplicaFile, View};
pub use report::{ReportSlot, Reporter, reporter};
pub use typed::All;
