//! The resources, as the views hold them. `version` rises with every change; `expected_version` refers to it.

use crate::agent::ProxyProtocol;
use crate::node_prefix::{ClusterPrefix, NodePrefix};
use crate::{
    AgentName, AppId, AppName, ClusterId, ClusterVersion, DeploymentId, Digest, EdgeId, EnrolmentId, EnvId,
    EnvName, Hostname, Incarnation, InstanceId, Manifest, MemberId, NodeId, OrgId, OrgName, PortName,
    ProcessName, ReleaseId, Revision, RouteId, Scope, ScopeSet, Timestamp, TokenId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

/// The cluster itself: one row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Cluster {
    /// Its id.
    pub id: ClusterId,
    /// Rises when the history is restored from a backup.
    pub incarnation: Incarnation,
    /// The ULA /48 from which nodes get their /64.
    pub prefix: ClusterPrefix,
    /// How many nodes were ever enrolled: the next node's subnet.
    pub nodes_enrolled: u16,
    /// The highest member id ever given.
    pub members_enrolled: u64,
    /// Which rules and stored forms all members use.
    pub version: ClusterVersion,
    /// When it was made.
    pub created_at: Timestamp,
}

/// An organisation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Org {
    /// Its id.
    pub id: OrgId,
    /// Unique in the cluster.
    pub name: OrgName,
    /// See the module.
    pub version: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// An application.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct App {
    /// Its id.
    pub id: AppId,
    /// Whose.
    pub org: OrgId,
    /// Unique in the org.
    pub name: AppName,
    /// See the module.
    pub version: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// An environment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Env {
    /// Its id.
    pub id: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// Unique in the app.
    pub name: EnvName,
    /// Numbers of releases given so far.
    pub releases: u32,
    /// Numbers of deployments given so far.
    pub deployments: u32,
    /// The deployment that its instances follow now.
    pub current: Option<DeploymentId>,
    /// The last deployment that completed: where a failed one goes back to.
    pub last_good: Option<DeploymentId>,
    /// See the module.
    pub version: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// An image by digest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Image {
    /// Registry and repository, as in `registry.example:5000/team/app`.
    pub repository: String,
    /// The manifest's digest.
    pub digest: ImageDigest,
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.repository, self.digest)
    }
}

/// An OCI content digest: `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct ImageDigest([u8; 32]);

impl ImageDigest {
    /// The digest with these SHA-256 bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The SHA-256 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for ImageDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not an image digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an image digest: expected «sha256:» and 64 hexadecimal digits in lower case")]
pub struct ImageDigestError;

impl FromStr for ImageDigest {
    type Err = ImageDigestError;

    fn from_str(text: &str) -> Result<Self, ImageDigestError> {
        let hex = text.strip_prefix("sha256:").ok_or(ImageDigestError)?;
        let bytes = data_encoding::HEXLOWER.decode(hex.as_bytes()).map_err(|_| ImageDigestError)?;
        bytes.try_into().map(Self).map_err(|_| ImageDigestError)
    }
}

impl From<ImageDigest> for String {
    fn from(digest: ImageDigest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for ImageDigest {
    type Error = ImageDigestError;

    fn try_from(text: String) -> Result<Self, ImageDigestError> {
        text.parse()
    }
}

/// A release: what runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Release {
    /// Its id.
    pub id: ReleaseId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// From 1 within the env, for people.
    pub number: u32,
    /// The image, by digest.
    pub image: Image,
    /// The manifest, normalised.
    pub manifest: Manifest,
    /// Its digest.
    pub manifest_hash: Digest,
    /// When it was made.
    pub created_at: Timestamp,
}

/// How a deployment stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentState {
    /// Instances are being replaced.
    Rolling,
    /// Every wanted instance was ready and no old one is left.
    Complete,
    /// It did not get there; see `failure`.
    Failed,
    /// A later deployment took over before it was done.
    Superseded,
}

/// Why a deployment exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentCause {
    /// Somebody deployed a release.
    Deploy,
    /// Somebody changed the numbers.
    Scale,
    /// The one before failed.
    Rollback,
    /// Somebody changed the env's secrets.
    Secrets,
}

/// Why a deployment failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentFailure {
    /// More instances had to be replaced than [`limits::REPLACEMENTS_MAX`](crate::limits::REPLACEMENTS_MAX).
    TooManyReplacements,
    /// It took longer than [`limits::ROLLOUT_MS_MAX`](crate::limits::ROLLOUT_MS_MAX).
    TimedOut,
}

/// A roll-out of a release over an env.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Deployment {
    /// Its id.
    pub id: DeploymentId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// From 1 within the env, for people.
    pub number: u32,
    /// What it rolls out.
    pub release: ReleaseId,
    /// Why it exists.
    pub cause: DeploymentCause,
    /// How many instances of each process.
    pub counts: BTreeMap<ProcessName, u32>,
    /// How it stands.
    pub state: DeploymentState,
    /// Why it failed.
    pub failure: Option<DeploymentFailure>,
    /// What keeps instances from being placed now.
    pub unschedulable: Option<Unschedulable>,
    /// Instances of each process that failed while it rolled.
    pub replacements: BTreeMap<ProcessName, u32>,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it left `rolling`.
    pub finished_at: Option<Timestamp>,
}

/// Why an instance cannot be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Unschedulable {
    /// No node has the memory.
    NoCapacityMemory,
    /// No node is active and heard from.
    NoNodesActive,
    /// The volume's home node cannot take it.
    VolumeLocality,
    /// The volume is attached elsewhere.
    VolumeInUse,
    /// The node's addresses are used up.
    IpamExhausted,
    /// A required secret does not exist.
    SecretsMissing,
    /// The org's quota is used up.
    QuotaExceeded,
    /// Nodes have the memory, and no node that has it has enough CPU, overcommit included.
    NoCapacityCpu,
    /// The volume is being restored, or could not be.
    VolumeRestoring,
}

/// How an instance stands. `Stopped` and `Failed` are final.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum InstanceState {
    /// Placed, being fetched, started or restarted; not serving.
    Booting,
    /// Serving.
    Ready,
    /// Finishing its connections; no new ones.
    Draining,
    /// Ended as asked.
    Stopped,
    /// Ended otherwise.
    Failed,
}

impl InstanceState {
    /// Whether it never changes again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }
}

/// Why an instance is where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InstanceReason {
    /// The image could not be fetched.
    ImagePullFailed,
    /// The image could not be made a root disk.
    RootfsBuildFailed,
    /// The VMM did not start, or hung.
    VmmStartFailed,
    /// TAP, address or route could not be set up.
    NetworkSetupFailed,
    /// A volume could not be attached.
    VolumeAttachFailed,
    /// A required secret is missing.
    SecretsMissing,
    /// Secrets did not reach the guest.
    SecretsInjectionFailed,
    /// Health checks failed.
    HealthcheckFailed,
    /// The guest or the workload ran out of memory.
    OomKilled,
    /// It ended again and again.
    CrashLoopBackoff,
    /// An operator ended it.
    TerminatedByOperator,
    /// Its node drains.
    NodeDraining,
    /// Its node was silent for too long.
    NodeLost,
    /// It was not ready in time.
    StartTimedOut,
    /// A newer deployment or a smaller number took its place.
    Replaced,
    /// Its node was quarantined.
    NodeQuarantined,
    /// Its node had no room for it after all.
    NoCapacity,
}

impl InstanceReason {
    /// Whether it says something of its node, and nothing of what ran.
    pub const fn is_of_its_node(self) -> bool {
        matches!(self, Self::NodeLost | Self::NodeDraining | Self::NodeQuarantined)
    }
}

/// One microVM's worth of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// The deployment that placed it.
    pub deployment: DeploymentId,
    /// What it runs.
    pub release: ReleaseId,
    /// Which process of the release.
    pub process: ProcessName,
    /// Where.
    pub node: NodeId,
    /// Its address in the overlay.
    #[schema(value_type = String, format = Ipv6)]
    pub address: Ipv6Addr,
    /// Memory that it was placed with, in MiB.
    pub memory_mib: u64,
    /// CPU that it was placed with, in thousandths.
    pub cpu_milli: u64,
    /// How it stands.
    pub state: InstanceState,
    /// Why.
    pub reason: Option<InstanceReason>,
    /// A sentence for people, from the node: bounded, never secret.
    pub detail: Option<String>,
    /// Restarts by its node.
    pub restarts: u32,
    /// Whether it was ever ready.
    pub was_ready: bool,
    /// When it was placed.
    pub created_at: Timestamp,
    /// When its state last changed.
    pub changed_at: Timestamp,
}

/// What a route is reached by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RouteTarget {
    /// TLS with this server name; never terminated.
    TlsPassthrough {
        /// The name in the ClientHello.
        hostname: Hostname,
    },
    /// Any TCP connection to the port.
    Tcp,
}

/// A hostname or port that leads to a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Route {
    /// Its id.
    pub id: RouteId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// What it is reached by.
    pub target: RouteTarget,
    /// The edge's TCP port.
    pub listen_port: u16,
    /// The process that it leads to.
    pub process: ProcessName,
    /// The process's port.
    pub port: PortName,
    /// Whether the backend is told the client's address.
    pub proxy_protocol: ProxyProtocol,
    /// See the module.
    pub version: u64,
    /// When it was made.
    pub created_at: Timestamp,
}

/// How a node stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NodeState {
    /// Takes instances.
    Active,
    /// Takes no new ones, and its own move away.
    Draining,
    /// Cut off; nothing on it is trusted.
    Quarantined,
    /// Not in use.
    Disabled,
    /// Silent for longer than [`limits::UNREACHABLE_MS`](crate::limits::UNREACHABLE_MS).
    Unreachable,
    /// Takes no new ones, and keeps its own.
    Cordoned,
}

/// What a node has for instances.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Capacity {
    /// Memory in MiB.
    pub memory_mib: u64,
    /// CPU in thousandths.
    pub cpu_milli: u64,
}

/// A host that runs instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Node {
    /// Its id.
    pub id: NodeId,
    /// Unique among nodes.
    pub name: AgentName,
    /// How it stands.
    pub state: NodeState,
    /// What it has.
    pub capacity: Capacity,
    /// Its /64.
    pub prefix: NodePrefix,
    /// Addresses given so far; never goes back, so none is used twice.
    pub addresses_given: u64,
    /// The VMM that its probe settled on, and why, for people.
    pub vmm: Option<String>,
    /// Removals up to this revision are confirmed (I7).
    pub confirmed_through: Revision,
    /// Since when it has been silent, while unreachable.
    pub silent_since: Option<Timestamp>,
    /// See the module.
    pub version: u64,
    /// When it joined.
    pub created_at: Timestamp,
}

impl Node {
    /// Whether what it says counts: it was not cut off.
    pub const fn is_trusted(&self) -> bool {
        !matches!(self.state, NodeState::Quarantined | NodeState::Disabled)
    }

    /// Whether new instances may be placed on it, as far as it is the node that decides.
    pub const fn takes_instances(&self) -> bool {
        matches!(self.state, NodeState::Active) && self.silent_since.is_none()
    }
}

/// A host that routes public traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Edge {
    /// Its id.
    pub id: EdgeId,
    /// Unique among edges.
    pub name: AgentName,
    /// Whether it may connect.
    pub disabled: bool,
    /// Removals up to this revision are confirmed (I7).
    pub confirmed_through: Revision,
    /// See the module.
    pub version: u64,
    /// When it joined.
    pub created_at: Timestamp,
}

/// A control-plane member, as the state knows it; Raft's membership follows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Member {
    /// Its id, never reused.
    pub id: MemberId,
    /// Unique among members.
    pub name: AgentName,
    /// Where other members reach it, `host:port`.
    pub raft_addr: String,
    /// Where the API listens, `host:port`.
    pub api_addr: String,
    /// Whether it was removed for good.
    pub removed: bool,
    /// When it joined.
    pub created_at: Timestamp,
}

/// Whom a token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TokenKind {
    /// Runs the cluster; bound to no org.
    Operator,
    /// Works within one org.
    Org(OrgId),
}

/// A bearer token; the token itself is stored nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// For people.
    pub name: AgentName,
    /// Digest of the token.
    pub digest: Digest,
    /// Whom it stands for.
    pub kind: TokenKind,
    /// What it may do.
    #[schema(value_type = BTreeSet<Scope>)]
    pub scopes: ScopeSet,
    /// When it ends.
    pub expires_at: Timestamp,
    /// When it was revoked.
    pub revoked_at: Option<Timestamp>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What an enrolment lets somebody join as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnrolmentKind {
    /// A control-plane member.
    Member,
    /// A node agent.
    Node,
    /// An edge agent.
    Edge,
    /// A control-plane member that follows and serves agents, and does not vote.
    Learner,
}

/// A one-time permission to join; the secret itself is stored nowhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Enrolment {
    /// Its id.
    pub id: EnrolmentId,
    /// What it lets in.
    pub kind: EnrolmentKind,
    /// Digest of the secret.
    pub digest: Digest,
    /// When it ends.
    pub expires_at: Timestamp,
    /// When it was used, and by the key with which digest: a repeat by the same key gets the same answer.
    pub used: Option<(Timestamp, Digest)>,
    /// What came of it.
    pub enrolled: Option<Enrolled>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// What an enrolment became.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Enrolled {
    /// A member.
    Member(MemberId),
    /// A node.
    Node(NodeId),
    /// An edge.
    Edge(EdgeId),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn image_digests_have_one_spelling() {
        let text = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(text.parse::<ImageDigest>().unwrap().to_string(), text);
        for bad in ["", "sha256:", "sha512:ab", &text.to_uppercase(), &text[..70]] {
            assert!(bad.parse::<ImageDigest>().is_err(), "{bad}");
        }
    }
}
