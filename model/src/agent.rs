//! What the control plane and its agents say to one another: the frames of the follow stream, and reports.
//!
//! An agent holds one stream and receives only what is its own. A frame never means «you have nothing to do» unless
//! it says so: the absence of frames, of items or of a control plane changes nothing (I5).

use crate::exec::ExecCall;
use crate::logs::{LogChunk, LogStart};
use crate::manifest::{Health, Port, Resources, Restart};
use crate::resource::{Capacity, Image, InstanceReason, InstanceState};
use crate::volume::NodeVolume;
use crate::volume_snapshot::SnapshotNews;
use crate::{
    AppName, ClusterId, EnvName, Hostname, Incarnation, InstanceId, OrgName, ProcessName, RequestId,
    Revision, RouteId, VolumeId,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

mod wire;

/// The version of these frames.
pub const FOLLOW_PROTOCOL: u16 = 1;
/// The longest encoded frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Items in one frame at most.
pub const FRAME_ITEMS_MAX: usize = 1_000;
/// Observations in one report at most.
pub const REPORT_OBSERVATIONS_MAX: usize = 1_000;
/// The longest detail of an observation, in bytes.
pub const DETAIL_BYTES_MAX: usize = 512;
/// Images of which one report tells how far they are, at most.
pub const REPORT_PULLS_MAX: usize = 256;
/// Lines of one page of logs at most.
pub const LOG_LINES_MAX: usize = 1_000;

/// Where an agent follows: `GET` with the query [`FollowQuery`]. The body is an endless stream of frames, each a
/// big-endian `u32` of its length, at most [`FRAME_BYTES_MAX`], and then so many bytes of postcard.
pub const FOLLOW_PATH: &str = "/v1/agent/follow";
/// Where an agent reports: `POST` of a [`Report`] as JSON.
pub const REPORT_PATH: &str = "/v1/agent/report";
/// Where an agent answers a [`Frame::Call`]: `POST` of a [`CallAnswer`] as JSON to this path, `/` and the call's id.
pub const ANSWER_PATH: &str = "/v1/agent/answers";
/// The media type of the follow stream.
pub const FRAMES_MEDIA_TYPE: &str = "application/vnd.holdfast.frames";
/// What an agent accepts as a follow stream: frames, with the greatest [`AgentCall::level`] that it understands. Members
/// that know nothing of levels do not look at it.
pub const FRAMES_ACCEPTED: &str = "application/vnd.holdfast.frames; calls=4";
/// The level from which an agent knows of volumes: one below it is not given instances that have any.
pub const LEVEL_OF_VOLUMES: u16 = 4;

/// The greatest [`AgentCall::level`] that an agent understands which accepts this as a follow stream.
pub fn accepted_level(accept: &str) -> u16 {
    let level = accept.split(';').skip(1).find_map(|part| part.trim().strip_prefix("calls=")?.parse().ok());
    level.unwrap_or(1)
}

/// What an agent says when it begins to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FollowQuery {
    /// [`FOLLOW_PROTOCOL`] of the agent.
    pub protocol: u16,
    /// The incarnation that it has; absent when it has nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<Incarnation>,
    /// The revision that it has; absent when it has nothing. The answer begins with a snapshot, or with a delta or
    /// heartbeat that builds on exactly this revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
}

/// Where in which history a state stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// The revision.
    pub revision: Revision,
}

/// What an agent follows: items with a key.
pub trait Followed:
    Serialize + DeserializeOwned + Clone + PartialEq + std::fmt::Debug + Send + Sync + 'static
{
    /// What identifies an item.
    type Key: Serialize + DeserializeOwned + Copy + Ord + std::fmt::Debug + Send + Sync + 'static;

    /// The item's key.
    fn key(&self) -> Self::Key;

    /// Big-endian bytes of a key, for an ordered table.
    fn key_bytes(key: &Self::Key) -> [u8; 16];
}

/// One message from the control plane to an agent. New kinds are added at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "T: Followed")]
pub enum Frame<T: Followed> {
    /// A whole state begins; items follow in frames of their own.
    SnapshotBegin {
        /// The state's place.
        stamp: Stamp,
        /// How many items will follow.
        items: u64,
        /// Removals up to this revision are confirmed (I7).
        confirmed_through: Revision,
    },
    /// Some of a snapshot's items.
    SnapshotItems(Vec<T>),
    /// The snapshot is whole.
    SnapshotEnd,
    /// A change from one revision to another.
    Delta {
        /// The revision that it builds on: any other is refused.
        from: Revision,
        /// The state's place after it.
        stamp: Stamp,
        /// New or changed items.
        upserts: Vec<T>,
        /// Keys of items that are gone.
        removes: Vec<T::Key>,
        /// Removals up to this revision are confirmed (I7).
        confirmed_through: Revision,
    },
    /// Nothing changed for this agent up to here.
    Heartbeat {
        /// The state's place.
        stamp: Stamp,
        /// Removals up to this revision are confirmed (I7).
        confirmed_through: Revision,
    },
    /// A question to the agent; the answer travels in a request of the agent's own.
    Call {
        /// Names the answer.
        id: RequestId,
        /// What is asked.
        call: AgentCall,
    },
    /// The cluster began a new incarnation and hands this agent over to it; a snapshot of it follows.
    HandOver(SignedHandOver),
}

/// That a history goes on in a newer incarnation, said to an agent that followed an older one (I6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOver {
    /// The cluster.
    pub cluster: ClusterId,
    /// The incarnation that the agent follows.
    pub from: Incarnation,
    /// The incarnation that it is to follow.
    pub to: Incarnation,
    /// The last revision before `to` began, as its survivor had it. Later ones of the older incarnation are lost.
    pub last: Revision,
}

/// A hand-over with the signature of the cluster's authority over its bytes: no member can make one up without the
/// authority's key, and no listener can be anybody else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedHandOver {
    /// A [`HandOver`], as postcard.
    pub record: Vec<u8>,
    /// The authority's signature over [`HAND_OVER_PURPOSE`] and the record.
    pub signature: Vec<u8>,
}

/// What a hand-over's signature is for; no signature for another purpose can pass as one.
pub const HAND_OVER_PURPOSE: &str = "holdfast 2026 incarnation hand-over v1";

/// What the control plane may ask of a connected agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentCall {
    /// Lines that an instance wrote.
    Logs {
        /// Which instance.
        instance: InstanceId,
        /// Lines after this sequence number; `None` for the last `limit`.
        after: Option<u64>,
        /// Lines at most.
        limit: u32,
        /// Wait up to this long for a first line, in milliseconds.
        wait_ms: u64,
    },
    /// Lines that an instance wrote, from a place on.
    ReadLogs {
        /// Which instance.
        instance: InstanceId,
        /// From where.
        start: LogStart,
        /// Bytes of lines at most; one line is always given.
        bytes: u32,
        /// Wait up to this long for a first line, in milliseconds.
        wait_ms: u64,
    },
    /// Run a program in an instance, and take the node's part of its session.
    Exec(Box<ExecCall>),
}

impl AgentCall {
    /// Which agents understand it: those that said at least this number when they began to follow. An agent that is
    /// asked what it does not know would have to leave its stream.
    pub const fn level(&self) -> u16 {
        match self {
            Self::Logs { .. } => 1,
            Self::ReadLogs { .. } => 2,
            Self::Exec(_) => 3,
        }
    }
}

/// An agent's answer to a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallAnswer {
    /// Lines, oldest first.
    Logs(Vec<LogLine>),
    /// It does not have what was asked for.
    NotFound,
    /// Lines from a place on.
    LogChunk(LogChunk),
    /// The node dials the member that passes the session on.
    ExecComes,
    /// It cannot do what was asked for now.
    Refused {
        /// A sentence for people, at most [`DETAIL_BYTES_MAX`].
        reason: String,
    },
}

/// One line that a workload wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct LogLine {
    /// Rises by one with each line of an instance.
    pub seq: u64,
    /// When the node got it, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Where it came from.
    pub stream: LogStream,
    /// The line, without its end, lossily decoded.
    pub text: String,
}

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// The platform's own remarks.
    System,
}

/// Whether a backend is told the client's address.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum ProxyProtocol {
    /// No.
    #[default]
    Off,
    /// By a PROXY v2 header.
    V2,
}

/// What an edge follows: a route with its backends.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeRoute {
    /// The route.
    pub id: RouteId,
    /// The name in the ClientHello; `None` takes any TCP connection to the port.
    pub hostname: Option<Hostname>,
    /// The edge's TCP port.
    pub listen_port: u16,
    /// Whether backends are told the client's address.
    pub proxy_protocol: ProxyProtocol,
    /// Where it leads, ordered by instance.
    pub backends: Vec<Backend>,
}

/// An instance that a route leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Which instance.
    pub instance: InstanceId,
    /// Its address.
    pub address: Ipv6Addr,
    /// Its port.
    pub port: u16,
    /// No new connections, if another backend can take them.
    pub draining: bool,
}

impl Followed for EdgeRoute {
    type Key = RouteId;

    fn key(&self) -> RouteId {
        self.id
    }

    fn key_bytes(key: &RouteId) -> [u8; 16] {
        key.to_key()
    }
}

/// What a node follows: an instance that it should run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "wire::Instance", into = "wire::Instance")]
pub struct NodeInstance {
    /// Which instance.
    pub id: InstanceId,
    /// Whose, for people.
    pub org: OrgName,
    /// Of which app, for people.
    pub app: AppName,
    /// Of which env, for people.
    pub env: EnvName,
    /// Which process.
    pub process: ProcessName,
    /// What it runs.
    pub image: Image,
    /// Program and arguments; `None` runs the image's own.
    pub command: Option<Vec<String>>,
    /// Working folder; `None` is the image's own.
    pub workdir: Option<String>,
    /// User; `None` is the image's own.
    pub user: Option<String>,
    /// Plain variables.
    pub vars: BTreeMap<String, String>,
    /// What it may use.
    pub resources: Resources,
    /// Ports that it serves.
    pub ports: Vec<Port>,
    /// How to tell that it serves.
    pub health: Option<Health>,
    /// What happens when it ends.
    pub restart: Restart,
    /// Its address.
    pub address: Ipv6Addr,
    /// What the node should do with it.
    pub desired: Desired,
    /// The volumes that it has, by id: the order of its disks.
    pub volumes: Vec<NodeVolume>,
}

/// What a node should do with an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Keep it running.
    Run,
    /// Let it finish its connections, then end it.
    Drain {
        /// Before TERM, in milliseconds.
        grace_ms: u64,
    },
}

impl Followed for NodeInstance {
    type Key = InstanceId;

    fn key(&self) -> InstanceId {
        self.id
    }

    fn key_bytes(key: &InstanceId) -> [u8; 16] {
        key.to_key()
    }
}

/// What a node saw of one instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// Which instance.
    pub instance: InstanceId,
    /// How it stands.
    pub state: InstanceState,
    /// Why.
    pub reason: Option<InstanceReason>,
    /// For people, at most [`DETAIL_BYTES_MAX`].
    pub detail: Option<String>,
    /// Restarts by the node so far.
    pub restarts: u32,
}

/// What a node is doing about an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ImagePhase {
    /// Others are at work first.
    Waiting,
    /// Its layers are being fetched.
    Pulling,
    /// Its layers are being unpacked.
    Unpacking,
    /// Its root file system is being made.
    Building,
}

/// How far a node is with the image that an instance needs before it can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImageProgress {
    /// What is being done.
    pub phase: ImagePhase,
    /// Bytes of its layers that are here, as they are in the registry.
    pub received_bytes: u64,
    /// Bytes of all its layers; 0 while that is not known.
    pub total_bytes: u64,
    /// The layer that is being unpacked, from 1; 0 before.
    pub layer: u32,
    /// How many layers it has; 0 while that is not known.
    pub layers: u32,
}

/// An instance that waits for its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pull {
    /// Which instance.
    pub instance: InstanceId,
    /// How far its image is.
    pub image: ImageProgress,
}

/// The disk on which a node keeps images, logs and machines' folders.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Disk {
    /// What it holds, in MiB.
    pub total_mib: u64,
    /// What is free for the agent, in MiB. Images that nothing needs make more.
    pub free_mib: u64,
}

/// What a node tells that is neither for the log nor for anybody's judgement of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNews {
    /// Its instances that wait for their images.
    pub pulls: Vec<Pull>,
    /// Its disk.
    pub disk: Option<Disk>,
}

/// An update that an agent holds back until it is confirmed (I7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Held {
    /// The update's revision.
    pub revision: Revision,
    /// Items that it would remove.
    pub removes: u64,
    /// Items that the agent has.
    pub of: u64,
}

/// What an agent reports every [`HEARTBEAT_MS`](crate::limits::HEARTBEAT_MS), and at once when it changes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The revision that it acts on.
    pub applied: Revision,
    /// The incarnation of that revision.
    pub incarnation: Incarnation,
    /// An update that it holds back.
    pub held: Option<Held>,
    /// What only this kind of agent reports.
    pub detail: ReportDetail,
}

/// What only one kind of agent reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReportDetail {
    /// From a node: every instance that it knows.
    Node {
        /// What it saw.
        observations: Vec<Observation>,
        /// What it has.
        capacity: Capacity,
        /// Its VMM probe's verdict, for people.
        vmm: String,
        /// Deleted volumes whose disks it has erased, until it is not asked to any more.
        #[serde(default)]
        erased: BTreeSet<VolumeId>,
        /// How far snapshots are that it was asked for. Of older agents there is none.
        #[serde(default, skip_serializing_if = "SnapshotNews::is_empty")]
        snapshots: SnapshotNews,
        /// Its instances that wait for their images, at most [`REPORT_PULLS_MAX`]. Of older agents there is none.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        pulls: Vec<Pull>,
        /// Its disk; `None` where it is not known, and of older agents.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk: Option<Disk>,
    },
    /// From an edge.
    Edge {
        /// Routes in its table.
        routes: u64,
        /// Open client connections.
        connections: u64,
    },
}
