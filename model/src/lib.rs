//! The vocabulary of Holdfast: ids, names, resources, commands, events, errors, and the pure rules over them.
//!
//! Everything here is plain data and pure functions. This crate never does I/O, never reads a clock, never draws
//! randomness and knows no async runtime; time and fresh ids arrive in a [`Context`]. It is the bottom of the
//! workspace: it depends on nothing of ours.
//!
//! Invariants that begin here: I4 (a [`Context`] carries the idempotency key), I8 (one [`Hostname`] spelling per
//! name), I9 (every resource carries its org), I14 (bytes become typed values once, with an error that says what
//! to do).

pub mod agent;
pub mod api;
pub mod audit;
pub mod cluster_version;
pub mod command;
pub mod context;
pub mod delivery;
pub mod event;
pub mod exec;
pub mod framing;
pub mod hostname;
pub mod id;
pub mod limits;
pub mod logs;
pub mod manifest;
pub mod name;
pub mod node_prefix;
pub mod number;
pub mod rejection;
pub mod resource;
mod schema;
pub mod scope;
pub mod sealed;
pub mod secrets;
pub mod volume;
pub mod volume_snapshot;

pub use cluster_version::{ClusterVersion, SupportedVersions};
pub use command::Command;
pub use context::{Actor, Context, Proposal};
pub use event::{Aggregate, Event, EventPayload};
pub use hostname::Hostname;
pub use id::{
    AppId, ClusterId, DeploymentId, EdgeId, EnrolmentId, EnvId, ExecGrantId, InstanceId, NodeId, OrgId,
    ReleaseId, RequestId, RouteId, ServiceId, SnapshotId, TokenId, UserId, VolumeId,
};
pub use manifest::Manifest;
pub use name::{AgentName, AppName, EnvName, OrgName, PortName, ProcessName, VolumeName};
pub use number::{Digest, Incarnation, LogIndex, MemberId, Revision, Timestamp};
pub use rejection::{Accepted, Code, Outcome, Output, Rejection};
pub use scope::{Role, Scope, ScopeSet};
pub use secrets::SecretKey;
