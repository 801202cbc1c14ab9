//! What happened: the one history that every view is a function of (I1, I13). Events never hold secret material.

use crate::command::AgentRef;
use crate::context::Correlation;
use crate::exec::{ExecEnd, ExecGrant, ExecUse};
use crate::resource::{
    App, Capacity, Cluster, Deployment, DeploymentFailure, DeploymentState, Edge, Enrolled, Enrolment, Env,
    Instance, InstanceReason, InstanceState, Member, Node, NodeState, Org, Release, Route, Token,
    Unschedulable,
};
use crate::sealed::{CredentialOwner, Recipient, RegistryCredential, RegistryHost, SealOwner, SecretVersion};
use crate::volume::Volume;
use crate::volume_snapshot::{SnapshotState, VolumeSnapshot};
use crate::{
    Actor, AppId, ClusterId, ClusterVersion, DeploymentId, Digest, EdgeId, EnrolmentId, EnvId, ExecGrantId,
    Incarnation, InstanceId, MemberId, NodeId, OrgId, ReleaseId, RequestId, Revision, RouteId, SecretKey,
    SnapshotId, Timestamp, TokenId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::IpAddr;

/// The resource that an event is about; events of one aggregate are numbered from 1 without a gap.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Aggregate {
    /// The cluster.
    Cluster(ClusterId),
    /// An org.
    Org(OrgId),
    /// An app.
    App(AppId),
    /// An env.
    Env(EnvId),
    /// A release.
    Release(ReleaseId),
    /// A deployment.
    Deployment(DeploymentId),
    /// An instance.
    Instance(InstanceId),
    /// A route.
    Route(RouteId),
    /// A node.
    Node(NodeId),
    /// An edge.
    Edge(EdgeId),
    /// A member.
    Member(MemberId),
    /// A token.
    Token(TokenId),
    /// An enrolment.
    Enrolment(EnrolmentId),
    /// An exec grant.
    ExecGrant(ExecGrantId),
    /// A volume.
    Volume(VolumeId),
    /// A volume snapshot.
    Snapshot(SnapshotId),
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Event {
    /// Its place in the history: gapless, from 1.
    pub revision: Revision,
    /// When, as the leader's context says.
    pub time: Timestamp,
    /// The form of `payload`.
    pub version: u16,
    /// What it is about.
    pub aggregate: Aggregate,
    /// Its place among the aggregate's events: gapless, from 1.
    pub aggregate_seq: u64,
    /// Who caused it.
    pub actor: Actor,
    /// From where; `None` for the control plane's own clockwork.
    #[schema(value_type = Option<String>)]
    pub source: Option<IpAddr>,
    /// Whose it is; `None` for the cluster's own.
    pub org: Option<OrgId>,
    /// The request that caused it.
    pub request_id: RequestId,
    /// The caller's idempotency key.
    pub idempotency_key: Option<String>,
    /// The deployment that it belongs to.
    pub correlation: Option<Correlation>,
    /// The first event of the same command, for those after it.
    pub causation: Option<Revision>,
    /// What happened.
    pub payload: EventPayload,
    /// Digest over the chain so far and this event: no event can be changed, removed or moved unnoticed.
    pub chain: Digest,
}

/// The form of payloads that this build writes.
pub const EVENT_VERSION: u16 = 1;

/// What happened. New kinds are added at the end: their number is part of the stored form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventPayload {
    /// The cluster began.
    ClusterInitialised(Cluster),
    /// An org was made.
    OrgCreated(Org),
    /// An app was made.
    AppCreated(App),
    /// An app and all that it held is gone.
    AppDeleted {
        /// Which.
        app: AppId,
    },
    /// An env was made.
    EnvCreated(Env),
    /// A token was made.
    TokenCreated(Token),
    /// A token ended.
    TokenRevoked {
        /// Which.
        token: TokenId,
    },
    /// An enrolment was made.
    EnrolmentCreated(Enrolment),
    /// An enrolment was used.
    EnrolmentUsed {
        /// Which.
        enrolment: EnrolmentId,
        /// By the key with this digest.
        key: Digest,
        /// What it became.
        enrolled: Enrolled,
    },
    /// A member joined.
    MemberEnrolled(Member),
    /// A node joined.
    NodeEnrolled(Node),
    /// An edge joined.
    EdgeEnrolled(Edge),
    /// A node's state changed.
    NodeStateChanged {
        /// Which.
        node: NodeId,
        /// To what.
        state: NodeState,
        /// Since when it is silent, if it is.
        silent_since: Option<Timestamp>,
    },
    /// What a node has changed.
    NodeDescribed {
        /// Which.
        node: NodeId,
        /// What it has.
        capacity: Capacity,
        /// Its VMM probe's verdict.
        vmm: String,
    },
    /// A release was made.
    ReleaseCreated(Box<Release>),
    /// A deployment began.
    DeploymentStarted(Deployment),
    /// A deployment's state changed.
    DeploymentStateChanged {
        /// Which.
        deployment: DeploymentId,
        /// To what.
        state: DeploymentState,
        /// Why, if it failed.
        failure: Option<DeploymentFailure>,
    },
    /// Placement of a deployment's instances became blocked, or free again.
    DeploymentBlocked {
        /// Which.
        deployment: DeploymentId,
        /// By what; `None` when it is free again.
        unschedulable: Option<Unschedulable>,
    },
    /// An instance was placed.
    InstancePlaced(Instance),
    /// An instance's state changed.
    InstanceStateChanged {
        /// Which.
        instance: InstanceId,
        /// To what.
        state: InstanceState,
        /// Why.
        reason: Option<InstanceReason>,
        /// For people.
        detail: Option<String>,
        /// Restarts by its node so far.
        restarts: u32,
    },
    /// A route was made.
    RouteCreated(Route),
    /// A route is gone.
    RouteDeleted {
        /// Which.
        route: RouteId,
    },
    /// Removals that an agent holds were confirmed.
    RemovalsConfirmed {
        /// Which agent.
        agent: AgentRef,
        /// Up to which revision.
        through: Revision,
    },
    /// A member is gone for good.
    MemberRemoved {
        /// Which.
        member: MemberId,
    },
    /// A member became a voter, or one that follows only.
    MemberVotesChanged {
        /// Which.
        member: MemberId,
        /// Whether it votes.
        votes: bool,
    },
    /// The history goes on in a new incarnation, from what one survivor had.
    IncarnationBegan {
        /// The new incarnation.
        incarnation: Incarnation,
        /// Who went on.
        survivor: MemberId,
        /// The last revision of the incarnation before, as the survivor had it.
        last: Revision,
    },
    /// The cluster uses the rules and stored forms of another version from here on.
    ClusterVersionRaised {
        /// The new version.
        to: ClusterVersion,
    },
    /// Somebody may run one program in an instance, once.
    ExecGranted(Box<ExecGrant>),
    /// A grant was used: its session begins.
    ExecStarted {
        /// Which grant.
        grant: ExecGrantId,
        /// Its use.
        used: ExecUse,
    },
    /// A grant is over, and its session, if it had one. What went through the session is recorded nowhere.
    ExecEnded {
        /// Which grant.
        grant: ExecGrantId,
        /// How.
        end: ExecEnd,
        /// The program's exit code, if it exited.
        code: Option<i32>,
        /// How long the session lasted, in milliseconds; 0 if there was none.
        lasted_ms: u64,
    },
    /// A volume was made. Its disk is made when an instance first mounts it.
    VolumeCreated(Volume),
    /// An instance was given a volume, and nobody else has it.
    VolumeAttached {
        /// Which.
        volume: VolumeId,
        /// To whom.
        instance: InstanceId,
        /// The volume's home from here on.
        node: NodeId,
        /// Which attachment of the volume this is: an older one is fenced off.
        generation: u64,
        /// Whether its disk may have to be made first.
        fresh: bool,
    },
    /// The node said that the instance which had a volume is gone: the next one may have it.
    VolumeDetached {
        /// Which.
        volume: VolumeId,
        /// Who had it.
        instance: InstanceId,
        /// Whether there must be something on its disk by now.
        used: bool,
    },
    /// A volume is gone; its home erases the disk.
    VolumeDeleted {
        /// Which.
        volume: VolumeId,
    },
    /// The disk of a deleted volume is gone, too.
    VolumeErased {
        /// Which.
        volume: VolumeId,
        /// From which node.
        node: NodeId,
    },
    /// An env's secrets have a new version. Says which keys it has and by which digests what is sealed is found.
    SecretsChanged(Box<SecretVersion>),
    /// Secrets were shown to somebody.
    SecretsRead {
        /// Of which env.
        env: EnvId,
        /// Which version.
        number: u32,
        /// Which of them.
        keys: BTreeSet<SecretKey>,
    },
    /// Members seal to another recipient from here on.
    ClusterRecipientChanged {
        /// To whom.
        recipient: Recipient,
    },
    /// A sealing key is sealed to the cluster's newest recipient now.
    EnvelopeResealed {
        /// Whose.
        owner: SealOwner,
        /// To whom.
        to: Recipient,
    },
    /// A registry credential was set.
    RegistryCredentialSet(RegistryCredential),
    /// A registry credential is gone.
    RegistryCredentialDeleted {
        /// Whose.
        owner: CredentialOwner,
        /// The registry.
        host: RegistryHost,
    },
    /// A snapshot of a volume was asked for.
    SnapshotRequested(Box<VolumeSnapshot>),
    /// A snapshot is further, or came to nothing.
    SnapshotAdvanced {
        /// Which.
        snapshot: SnapshotId,
        /// How far it is.
        state: SnapshotState,
    },
    /// A snapshot is gone, and with it the only key to it; its node erases what is stored.
    SnapshotDeleted {
        /// Which.
        snapshot: SnapshotId,
    },
    /// What was stored of a deleted snapshot is gone, too.
    SnapshotErased {
        /// Which.
        snapshot: SnapshotId,
        /// By which node.
        node: NodeId,
    },
    /// A volume is being made from a snapshot.
    VolumeRestoreBegan {
        /// The volume.
        volume: Box<Volume>,
        /// From which snapshot.
        snapshot: SnapshotId,
    },
    /// A volume that was made from a snapshot is whole.
    VolumeRestored {
        /// Which.
        volume: VolumeId,
    },
    /// A volume could not be made from its snapshot.
    VolumeRestoreFailed {
        /// Which.
        volume: VolumeId,
        /// Why, in the node's words.
        detail: String,
    },
}

impl EventPayload {
    /// The kind's stable name, as people and scripts see it.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::ClusterInitialised(_) => "cluster_initialised",
            Self::OrgCreated(_) => "org_created",
            Self::AppCreated(_) => "app_created",
            Self::AppDeleted { .. } => "app_deleted",
            Self::EnvCreated(_) => "env_created",
            Self::TokenCreated(_) => "token_created",
            Self::TokenRevoked { .. } => "token_revoked",
            Self::EnrolmentCreated(_) => "enrolment_created",
            Self::EnrolmentUsed { .. } => "enrolment_used",
            Self::MemberEnrolled(_) => "member_enrolled",
            Self::NodeEnrolled(_) => "node_enrolled",
            Self::EdgeEnrolled(_) => "edge_enrolled",
            Self::NodeStateChanged { .. } => "node_state_changed",
            Self::NodeDescribed { .. } => "node_described",
            Self::ReleaseCreated(_) => "release_created",
            Self::DeploymentStarted(_) => "deployment_started",
            Self::DeploymentStateChanged { .. } => "deployment_state_changed",
            Self::DeploymentBlocked { .. } => "deployment_blocked",
            Self::InstancePlaced(_) => "instance_placed",
            Self::InstanceStateChanged { .. } => "instance_state_changed",
            Self::RouteCreated(_) => "route_created",
            Self::RouteDeleted { .. } => "route_deleted",
            Self::RemovalsConfirmed { .. } => "removals_confirmed",
            Self::MemberRemoved { .. } => "member_removed",
            Self::MemberVotesChanged { .. } => "member_votes_changed",
            Self::IncarnationBegan { .. } => "incarnation_began",
            Self::ClusterVersionRaised { .. } => "cluster_version_raised",
            Self::ExecGranted(_) => "exec_granted",
            Self::ExecStarted { .. } => "exec_started",
            Self::ExecEnded { .. } => "exec_ended",
            Self::VolumeCreated(_) => "volume_created",
            Self::VolumeAttached { .. } => "volume_attached",
            Self::VolumeDetached { .. } => "volume_detached",
            Self::VolumeDeleted { .. } => "volume_deleted",
            Self::VolumeErased { .. } => "volume_erased",
            Self::SecretsChanged(_) => "secrets_changed",
            Self::SecretsRead { .. } => "secrets_read",
            Self::ClusterRecipientChanged { .. } => "cluster_recipient_changed",
            Self::EnvelopeResealed { .. } => "envelope_resealed",
            Self::RegistryCredentialSet(_) => "registry_credential_set",
            Self::RegistryCredentialDeleted { .. } => "registry_credential_deleted",
            Self::SnapshotRequested(_) => "snapshot_requested",
            Self::SnapshotAdvanced { .. } => "snapshot_advanced",
            Self::SnapshotDeleted { .. } => "snapshot_deleted",
            Self::SnapshotErased { .. } => "snapshot_erased",
            Self::VolumeRestoreBegan { .. } => "volume_restore_began",
            Self::VolumeRestored { .. } => "volume_restored",
            Self::VolumeRestoreFailed { .. } => "volume_restore_failed",
        }
    }
}
