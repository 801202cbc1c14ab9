//! What can be asked of the cluster. A command is decided in log order, by every member alike.

use crate::agent::{Observation, ProxyProtocol};
use crate::exec::{ExecClass, ExecEnd};
use crate::resource::{Capacity, EnrolmentKind, Image, RouteTarget, TokenKind};
use crate::sealed::{
    CredentialOwner, Envelope, Recipient, RegistryHost, SealOwner, SealedBytes, SealedSecret,
};
use crate::volume_snapshot::SnapshotNews;
use crate::{
    AgentName, AppId, AppName, ClusterId, ClusterVersion, Code, Digest, EdgeId, EnvId, EnvName, ExecGrantId,
    Incarnation, InstanceId, LogIndex, Manifest, MemberId, NodeId, OrgId, OrgName, PortName, ProcessName,
    Rejection, ReleaseId, Revision, RouteId, ScopeSet, SecretKey, SnapshotId, Timestamp, TokenId, VolumeId,
    VolumeName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// A command. New ones are added at the end: their number is part of the stored form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Makes the cluster at version 1; the first command of its history.
    InitCluster {
        /// Its id.
        cluster: ClusterId,
        /// Where it begins.
        incarnation: Incarnation,
        /// The first member.
        member: NewMember,
        /// The first operator's token.
        operator: NewToken,
    },
    /// Makes an org.
    CreateOrg {
        /// Its name.
        name: OrgName,
    },
    /// Makes an app.
    CreateApp {
        /// Whose.
        org: OrgId,
        /// Its name.
        name: AppName,
    },
    /// Makes an env.
    CreateEnv {
        /// Of which app.
        app: AppId,
        /// Its name.
        name: EnvName,
    },
    /// Makes a token.
    CreateToken(NewToken),
    /// Ends a token at once (I11).
    RevokeToken {
        /// Which.
        token: TokenId,
    },
    /// Makes a one-time permission to join.
    CreateEnrolment {
        /// As what.
        kind: EnrolmentKind,
        /// Digest of the secret.
        digest: Digest,
        /// How long it is valid, in milliseconds. Not an end time: a retry must be the same command (I4).
        ttl_ms: u64,
    },
    /// Joins with an enrolment's secret.
    Enrol {
        /// Digest of the secret.
        digest: Digest,
        /// Digest of the joiner's public key.
        key: Digest,
        /// As what.
        joiner: Joiner,
    },
    /// Makes a release.
    CreateRelease {
        /// Of which env.
        env: EnvId,
        /// The image, by digest.
        image: Image,
        /// The manifest, parsed.
        manifest: Manifest,
    },
    /// Rolls out a release.
    Deploy {
        /// Over which env.
        env: EnvId,
        /// What.
        release: ReleaseId,
        /// How many of each process; a process that is not named keeps its number, or takes its manifest's.
        counts: BTreeMap<ProcessName, u32>,
    },
    /// Changes the number of instances of processes.
    Scale {
        /// Of which env.
        env: EnvId,
        /// How many of each.
        counts: BTreeMap<ProcessName, u32>,
    },
    /// Makes a route. Hostnames are claimed here, in log order (I8).
    CreateRoute {
        /// Of which env.
        env: EnvId,
        /// What it is reached by.
        target: RouteTarget,
        /// The edge's port.
        listen_port: u16,
        /// Where it leads.
        process: ProcessName,
        /// The process's port.
        port: PortName,
        /// Whether the backend is told the client's address.
        proxy_protocol: ProxyProtocol,
    },
    /// Deletes a route.
    DeleteRoute {
        /// Which.
        route: RouteId,
        /// The version that the caller saw.
        expected_version: Option<u64>,
    },
    /// What a node saw change on its instances.
    ReportInstances {
        /// Which node.
        node: NodeId,
        /// What it saw.
        observations: Vec<Observation>,
    },
    /// What a node has; sent when it changes.
    ReportNode {
        /// Which node.
        node: NodeId,
        /// What it has.
        capacity: Capacity,
        /// Its VMM probe's verdict.
        vmm: String,
    },
    /// What the leader heard and did not hear of nodes, already judged by I7's rules.
    ReportSilence {
        /// Nodes that have been silent since then.
        silent: BTreeMap<NodeId, Timestamp>,
        /// Nodes that were unreachable and are back.
        back: BTreeSet<NodeId>,
    },
    /// Time passed: roll-outs move on, waits end.
    Tick,
    /// Confirms removals that an agent holds back (I7).
    ConfirmRemovals {
        /// Which agent.
        agent: AgentRef,
        /// Up to which revision.
        through: Revision,
    },
    /// Takes a node out of use by moving its instances away.
    DrainNode {
        /// Which.
        node: NodeId,
    },
    /// Takes a drained or cordoned node back into use.
    ActivateNode {
        /// Which.
        node: NodeId,
    },
    /// A member's digest of its state right after a log index; every other member compares its own (I1).
    /// Changes nothing and makes no event.
    VerifyDigest {
        /// After which entry.
        at: LogIndex,
        /// Of the state.
        digest: Digest,
    },
    /// Deletes an app with everything in it.
    DeleteApp {
        /// Which.
        app: AppId,
        /// The version that the caller saw.
        expected_version: Option<u64>,
    },
    /// Removes a member for good: its id is never given again.
    RemoveMember {
        /// Which.
        member: MemberId,
    },
    /// Makes a member a voter, or one that follows and serves agents only.
    SetMemberVotes {
        /// Which.
        member: MemberId,
        /// Whether it votes.
        votes: bool,
    },
    /// Goes on with one survivor after the others were lost for good: a new incarnation begins. Written into the
    /// survivor's own log by `holdfast server recover`, never proposed over a network.
    BeginIncarnation {
        /// The new incarnation: the one after the cluster's.
        incarnation: Incarnation,
        /// Who goes on; every other member is removed.
        survivor: MemberId,
    },
    /// Makes the cluster at a version after the first, which [`Command::InitCluster`] begins with.
    BeginCluster {
        /// At which version.
        version: ClusterVersion,
        /// Its id.
        cluster: ClusterId,
        /// Where it begins.
        incarnation: Incarnation,
        /// The first member.
        member: NewMember,
        /// The first operator's token.
        operator: NewToken,
    },
    /// Raises the cluster version by one. Every member must support it: one that does not stops here.
    RaiseClusterVersion {
        /// The version after the cluster's.
        to: ClusterVersion,
    },
    /// Log time passed, as the leader measured it by its monotonic clock. Makes no event.
    AdvanceLogTime {
        /// How much, in milliseconds.
        by_ms: u64,
    },
    /// Places nothing more on a node, and leaves what runs there.
    CordonNode {
        /// Which.
        node: NodeId,
    },
    /// Cuts a node off for good: nothing on it is trusted any more, and its instances are replaced elsewhere.
    QuarantineNode {
        /// Which.
        node: NodeId,
    },
    /// Lets whoever asks run one program in an instance, once.
    CreateExecGrant {
        /// In which instance.
        instance: InstanceId,
        /// For what.
        class: ExecClass,
        /// Whether the program gets a terminal.
        terminal: bool,
        /// Digest of the grant's secret.
        digest: Digest,
        /// How long it may wait to be used, in milliseconds. Not an end time: a retry must be the same command (I4).
        use_within_ms: u64,
        /// How long its session may last, in milliseconds.
        session_ms: u64,
    },
    /// Uses a grant up. Of two uses the first in the log counts, and the other is refused.
    UseExecGrant {
        /// Which.
        grant: ExecGrantId,
        /// Digest of its secret.
        digest: Digest,
        /// What is to be run.
        class: ExecClass,
        /// Whether on a terminal.
        terminal: bool,
        /// The member that passes the session on.
        member: MemberId,
    },
    /// Ends a grant and its session: as a member saw it end, or, from anybody else, by revoking it (I11).
    EndExecGrant {
        /// Which.
        grant: ExecGrantId,
        /// How.
        end: ExecEnd,
        /// The program's exit code, if it exited.
        code: Option<i32>,
        /// How long the session lasted, in milliseconds.
        lasted_ms: u64,
    },
    /// Deletes a volume that no instance has, with what is on it.
    DeleteVolume {
        /// Which.
        volume: VolumeId,
        /// The version that the caller saw.
        expected_version: Option<u64>,
    },
    /// A node has erased the disks of volumes that were deleted.
    ReportVolumesErased {
        /// Which node.
        node: NodeId,
        /// Which volumes.
        volumes: BTreeSet<VolumeId>,
    },
    /// Changes an env's secrets. What is sealed was sealed before this command was made (I10).
    SetSecrets {
        /// Of which env.
        env: EnvId,
        /// The recipient that the values are sealed to: the env's.
        recipient: Recipient,
        /// New and changed ones.
        set: BTreeMap<SecretKey, SealedSecret>,
        /// Those that go.
        unset: BTreeSet<SecretKey>,
        /// Whether every other one goes, too.
        replace: bool,
        /// Whether what runs is rolled to the new version.
        roll: bool,
        /// Of what was asked, keyed by what members know: sealing the same twice gives other bytes, and a repeat is the
        /// same command all the same (I4).
        content: Digest,
    },
    /// Makes an earlier version of an env's secrets the newest again.
    RollBackSecrets {
        /// Of which env.
        env: EnvId,
        /// To which version.
        to: u32,
        /// Whether what runs is rolled to it.
        roll: bool,
    },
    /// Records that somebody is about to be shown secrets (I12).
    ReadSecrets {
        /// Of which env.
        env: EnvId,
        /// Which version.
        number: u32,
        /// Which of them.
        keys: BTreeSet<SecretKey>,
    },
    /// Gives an env or org its sealing key, if it has none; of two at the same time the first counts.
    CreateEnvelope {
        /// Whose.
        owner: SealOwner,
        /// The key, sealed to the cluster.
        envelope: Envelope,
    },
    /// Puts a sealing key that was sealed anew in the place of the old one.
    ResealEnvelope {
        /// Whose.
        owner: SealOwner,
        /// The same key, sealed to the cluster's newest recipient.
        envelope: Envelope,
    },
    /// Says to whom the cluster's members seal from now on. Every member that serves has the key to it.
    SetClusterRecipient {
        /// The new one.
        recipient: Recipient,
        /// The one that it follows; `None` for the first.
        after: Option<Recipient>,
    },
    /// Keeps what a registry asks for from whoever pulls for an org or app.
    SetRegistryCredential {
        /// For whom.
        owner: CredentialOwner,
        /// The registry.
        host: RegistryHost,
        /// The recipient that it is sealed to: the org's.
        recipient: Recipient,
        /// User and password, sealed.
        sealed: SealedBytes,
        /// As in [`Command::SetSecrets`].
        content: Digest,
    },
    /// Forgets a registry credential.
    DeleteRegistryCredential {
        /// For whom.
        owner: CredentialOwner,
        /// The registry.
        host: RegistryHost,
    },
    /// Asks for a snapshot of a volume.
    CreateSnapshot {
        /// Of which volume.
        volume: VolumeId,
    },
    /// Deletes a snapshot. What only it held is lost.
    DeleteSnapshot {
        /// Which.
        snapshot: SnapshotId,
    },
    /// Makes a volume from a snapshot, in the snapshot's env.
    RestoreSnapshot {
        /// From which.
        snapshot: SnapshotId,
        /// What the new volume is called.
        name: VolumeName,
    },
    /// A node tells of its snapshots.
    ReportSnapshots {
        /// Which node.
        node: NodeId,
        /// What it tells.
        news: SnapshotNews,
    },
}

impl Command {
    /// The form by which repeats of this command are known (I4). Sealing the same twice gives other bytes: what is
    /// sealed is left out, and the digest of what was asked stands for it.
    pub fn repeated(&self) -> std::borrow::Cow<'_, Self> {
        use std::borrow::Cow;
        match self {
            Self::SetSecrets { env, set, unset, replace, roll, content, .. } => {
                let set = set.keys().map(|key| (key.clone(), SealedSecret::default())).collect();
                let (env, unset, content) = (*env, unset.clone(), *content);
                let recipient = Recipient::default();
                let (replace, roll) = (*replace, *roll);
                Cow::Owned(Self::SetSecrets { env, recipient, set, unset, replace, roll, content })
            }
            Self::SetRegistryCredential { owner, host, content, .. } => {
                let (owner, host, content) = (*owner, host.clone(), *content);
                let (recipient, sealed) = (Recipient::default(), SealedBytes::default());
                Cow::Owned(Self::SetRegistryCredential { owner, host, recipient, sealed, content })
            }
            other => Cow::Borrowed(other),
        }
    }
}

impl Command {
    /// The first version of the cluster at which people and agents may ask for it: members of an earlier one could not read
    /// it in the log. When the clockwork proposes what is its own, the clockwork judges.
    const fn since(&self) -> ClusterVersion {
        match self {
            Self::CordonNode { .. }
            | Self::QuarantineNode { .. }
            | Self::CreateExecGrant { .. }
            | Self::UseExecGrant { .. }
            | Self::EndExecGrant { .. }
            | Self::DeleteVolume { .. }
            | Self::ReportVolumesErased { .. }
            | Self::SetSecrets { .. }
            | Self::RollBackSecrets { .. }
            | Self::ReadSecrets { .. }
            | Self::CreateEnvelope { .. }
            | Self::ResealEnvelope { .. }
            | Self::SetClusterRecipient { .. }
            | Self::SetRegistryCredential { .. }
            | Self::DeleteRegistryCredential { .. } => ClusterVersion::THREE,
            Self::CreateSnapshot { .. }
            | Self::DeleteSnapshot { .. }
            | Self::RestoreSnapshot { .. }
            | Self::ReportSnapshots { .. } => ClusterVersion::FOUR,
            Self::InitCluster { .. }
            | Self::CreateOrg { .. }
            | Self::CreateApp { .. }
            | Self::CreateEnv { .. }
            | Self::CreateToken(_)
            | Self::RevokeToken { .. }
            | Self::CreateEnrolment { .. }
            | Self::Enrol { .. }
            | Self::CreateRelease { .. }
            | Self::Deploy { .. }
            | Self::Scale { .. }
            | Self::CreateRoute { .. }
            | Self::DeleteRoute { .. }
            | Self::ReportInstances { .. }
            | Self::ReportNode { .. }
            | Self::ReportSilence { .. }
            | Self::Tick
            | Self::ConfirmRemovals { .. }
            | Self::DrainNode { .. }
            | Self::ActivateNode { .. }
            | Self::VerifyDigest { .. }
            | Self::DeleteApp { .. }
            | Self::RemoveMember { .. }
            | Self::SetMemberVotes { .. }
            | Self::BeginIncarnation { .. }
            | Self::BeginCluster { .. }
            | Self::RaiseClusterVersion { .. }
            | Self::AdvanceLogTime { .. } => ClusterVersion::ONE,
        }
    }

    /// Whether a cluster at this version may be asked for it.
    ///
    /// # Errors
    /// A rejection that says what to do first.
    pub fn allowed_at(&self, version: ClusterVersion) -> Result<(), Rejection> {
        if version >= self.since() {
            return Ok(());
        }
        let message =
            format!("The cluster is still at version {version}: upgrade every member, and ask again.");
        Err(Rejection::new(Code::FailedPrecondition, message))
    }
}

/// What a new cluster begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewCluster {
    /// Its id.
    pub cluster: ClusterId,
    /// Where it begins.
    pub incarnation: Incarnation,
    /// The first member.
    pub member: NewMember,
    /// The first operator's token.
    pub operator: NewToken,
}

impl NewCluster {
    /// The command that makes the cluster at a version, in the form that builds of that version know.
    pub fn at(self, version: ClusterVersion) -> Command {
        let Self { cluster, incarnation, member, operator } = self;
        match version {
            ClusterVersion::ONE => Command::InitCluster { cluster, incarnation, member, operator },
            version => Command::BeginCluster { version, cluster, incarnation, member, operator },
        }
    }
}

/// A token to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewToken {
    /// For people.
    pub name: AgentName,
    /// Digest of the token.
    pub digest: Digest,
    /// Whom it stands for.
    pub kind: TokenKind,
    /// What it may do.
    pub scopes: ScopeSet,
    /// How long it is valid, in milliseconds. Not an end time: a retry must be the same command (I4).
    pub ttl_ms: u64,
}

/// A member to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct NewMember {
    /// Its name.
    pub name: AgentName,
    /// Where other members reach it, `host:port`.
    pub raft_addr: String,
    /// Where the API listens, `host:port`.
    pub api_addr: String,
}

/// Who joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Joiner {
    /// A member.
    Member(NewMember),
    /// A node.
    Node {
        /// Its name.
        name: AgentName,
        /// What it has.
        capacity: Capacity,
    },
    /// An edge.
    Edge {
        /// Its name.
        name: AgentName,
    },
}

impl Joiner {
    /// The kind of enrolment that it needs.
    pub const fn kind(&self) -> EnrolmentKind {
        match self {
            Self::Member(_) => EnrolmentKind::Member,
            Self::Node { .. } => EnrolmentKind::Node,
            Self::Edge { .. } => EnrolmentKind::Edge,
        }
    }
}

/// A node or an edge.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum AgentRef {
    /// A node.
    Node(NodeId),
    /// An edge.
    Edge(EdgeId),
}
