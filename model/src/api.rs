//! Bodies of the HTTP API under `/v1`, shared by server, client and the OpenAPI document.
//!
//! Resources travel as in [`resource`](crate::resource). Every answer carries the revision that it was read at.

use crate::agent::{Disk, Held, ImageProgress, ProxyProtocol};
use crate::command::Joiner;
use crate::exec::{ExecClass, ExecGrant};
use crate::resource::{
    Edge, Enrolled, EnrolmentKind, Image, Instance, Member, Node, RouteTarget, Token, TokenKind,
};
use crate::sealed::{Recipient, RegistryHost};
use crate::secrets::SecretValue;
use crate::volume_snapshot::SnapshotWork;
use crate::{
    AgentName, AppName, ClusterId, ClusterVersion, DeploymentId, Digest, EnrolmentId, EnvName, Incarnation,
    InstanceId, MemberId, OrgId, OrgName, PortName, ProcessName, ReleaseId, Revision, Role, Scope, ScopeSet,
    SecretKey, SupportedVersions, Timestamp, VolumeId, VolumeName,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use utoipa::ToSchema;
use zeroize::Zeroizing;

/// The media type of a problem (RFC 9457).
pub const PROBLEM_MEDIA_TYPE: &str = "application/problem+json";
/// The media type of one JSON value a line.
pub const NDJSON_MEDIA_TYPE: &str = "application/x-ndjson";
/// The header that makes a mutation safe to repeat (I4).
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";
/// The header that names the request.
pub const REQUEST_ID_HEADER: &str = "x-request-id";
/// The header that tells the revision that an answer was read at.
pub const REVISION_HEADER: &str = "x-holdfast-revision";

/// One resource, at a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Answer<T> {
    /// Read at, or made by.
    pub revision: Revision,
    /// The resource.
    pub item: T,
}

/// A page of resources, at a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// Read at.
    pub revision: Revision,
    /// The resources, in the order of their ids.
    pub items: Vec<T>,
    /// Pass as `cursor` for the next page; absent on the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What a mutation without a resource of its own answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// Made by, or current when nothing had to change.
    pub revision: Revision,
}

/// What an agent is answered to its report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reported {
    /// Made by, or current when nothing had to change.
    pub revision: Revision,
    /// Deleted volumes whose disks the node is to erase: these, and never one that is merely not known.
    #[serde(default)]
    pub erase: BTreeSet<VolumeId>,
    /// What the node has to do about snapshots.
    #[serde(default)]
    pub snapshots: SnapshotWork,
}

/// Makes a volume from a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshot {
    /// What the new volume is called; unique in the env.
    pub name: VolumeName,
}

/// A node asks for the key of a snapshot that it is to restore from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AskSnapshotKey {
    /// The volume that is being restored.
    pub volume: VolumeId,
    /// To whom the answer is sealed: a key that the node made.
    pub recipient: Recipient,
}

/// The key of a snapshot, sealed to the node that asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotKey {
    /// An age file, in base64.
    pub sealed: String,
}

/// A problem (RFC 9457) with our members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// A URI reference that names the kind: `urn:holdfast:problem:<code>`.
    pub r#type: String,
    /// The kind in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened and what to do.
    pub detail: String,
    /// The stable code.
    pub code: String,
    /// The request that it answers.
    pub request_id: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// More, by code.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub details: BTreeMap<String, String>,
}

/// Makes an org.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateOrg {
    /// Its name, unique in the cluster.
    pub name: OrgName,
}

/// Lets the caller run one program in an instance, once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateExecGrant {
    /// For what.
    pub class: ExecClass,
    /// Whether the program gets a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// How long the session may last, in seconds: an hour by default, a day at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_s: Option<u64>,
}

/// A grant and its secret, which is shown this once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedExecGrant {
    /// The grant.
    pub grant: ExecGrant,
    /// The secret that uses it.
    pub secret: String,
}

impl std::fmt::Debug for CreatedExecGrant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedExecGrant").field("grant", &self.grant).finish_non_exhaustive()
    }
}

/// Makes an app.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateApp {
    /// Its name, unique in the org.
    pub name: AppName,
}

/// Makes an env.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateEnv {
    /// Its name, unique in the app.
    pub name: EnvName,
}

/// Makes a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRelease {
    /// The image, by digest: tags are resolved before, once.
    pub image: Image,
    /// The text of `holdfast.toml`.
    pub manifest: String,
}

/// Rolls out a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateDeployment {
    /// What.
    pub release: ReleaseId,
    /// How many of each process; others keep their number, or take their manifest's.
    #[serde(default)]
    pub counts: BTreeMap<ProcessName, u32>,
}

/// Changes numbers of instances.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Scale {
    /// How many of each process.
    pub counts: BTreeMap<ProcessName, u32>,
}

/// Makes a route.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRoute {
    /// What it is reached by.
    pub target: RouteTarget,
    /// The edge's port.
    pub listen_port: u16,
    /// The process that it leads to.
    pub process: ProcessName,
    /// The process's port, by name.
    pub port: PortName,
    /// Whether the backend is told the client's address; the backend must expect it.
    #[serde(default)]
    pub proxy_protocol: ProxyProtocol,
}

/// Makes a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateToken {
    /// For people.
    pub name: AgentName,
    /// The org that it works in; absent makes an operator's.
    pub org: Option<OrgId>,
    /// A role's scopes.
    pub role: Option<Role>,
    /// Scopes beside the role's.
    #[serde(default)]
    #[schema(value_type = BTreeSet<Scope>)]
    pub scopes: ScopeSet,
    /// How long it is valid, in seconds.
    pub ttl_s: u64,
}

/// A token that was just made: the only time that it is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedToken {
    /// What is known of it.
    pub token: TokenView,
    /// The token itself.
    pub secret: String,
}

impl std::fmt::Debug for CreatedToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedToken").field("token", &self.token).field("secret", &"[redacted]").finish()
    }
}

/// A token as it may be seen: without the digest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenView {
    /// Its id.
    pub id: crate::TokenId,
    /// For people.
    pub name: AgentName,
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

impl From<Token> for TokenView {
    fn from(t: Token) -> Self {
        Self {
            id: t.id,
            name: t.name,
            kind: t.kind,
            scopes: t.scopes,
            expires_at: t.expires_at,
            revoked_at: t.revoked_at,
            created_at: t.created_at,
        }
    }
}

/// Makes a one-time permission to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateEnrolment {
    /// As what.
    pub kind: EnrolmentKind,
    /// How long it is valid, in seconds; an hour by default, a day at most.
    pub ttl_s: Option<u64>,
}

/// An enrolment that was just made: the only time that its secret is shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreatedEnrolment {
    /// Its id.
    pub id: EnrolmentId,
    /// As what it lets in.
    pub kind: EnrolmentKind,
    /// When it ends.
    pub expires_at: Timestamp,
    /// The secret itself.
    pub secret: String,
    /// SHA-256 of the cluster's CA certificate, in hexadecimal: the joiner checks whom it talks to.
    pub ca_pin: String,
}

impl std::fmt::Debug for CreatedEnrolment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CreatedEnrolment")
            .field("id", &self.id)
            .field("secret", &"[redacted]")
            .finish_non_exhaustive()
    }
}

/// Joins with an enrolment's secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Enrol {
    /// The secret.
    pub secret: String,
    /// A certificate signing request (PKCS #10, PEM) by the joiner's own key.
    pub csr_pem: String,
    /// Who joins.
    pub joiner: Joiner,
}

impl std::fmt::Debug for Enrol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Enrol")
            .field("secret", &"[redacted]")
            .field("joiner", &self.joiner)
            .finish_non_exhaustive()
    }
}

/// What a joiner gets.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EnrolAnswer {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Who the joiner is from now on.
    pub enrolled: Enrolled,
    /// Its certificate chain, PEM.
    pub certificate_pem: String,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
    /// Every member, to follow and to fail over to.
    pub members: Vec<Member>,
    /// The CA's key, PEM: for a joining member only, which signs in its turn.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_key_pem: Option<String>,
    /// The cluster's sealing keys: for a joining member only, as the CA's key is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub sealing_keys: Option<Zeroizing<String>>,
}

impl std::fmt::Debug for EnrolAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EnrolAnswer")
            .field("cluster", &self.cluster)
            .field("enrolled", &self.enrolled)
            .finish_non_exhaustive()
    }
}

/// Asks for a fresh certificate, over a connection that is authenticated with the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Renew {
    /// A certificate signing request (PKCS #10, PEM).
    pub csr_pem: String,
}

/// A fresh certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Renewed {
    /// The certificate chain, PEM.
    pub certificate_pem: String,
    /// The cluster's CA certificate, PEM.
    pub ca_pem: String,
}

/// Confirms removals that an agent holds back (I7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfirmRemovals {
    /// Up to this revision.
    pub through: Revision,
}

/// Who a token is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WhoAmI {
    /// The token.
    pub token: TokenView,
    /// The org's name, if it is bound to one.
    pub org: Option<OrgName>,
    /// The cluster.
    pub cluster: ClusterId,
}

/// How the cluster stands, as the asked member sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ClusterStatus {
    /// The cluster.
    pub cluster: ClusterId,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// Which rules and stored forms all members use.
    pub version: ClusterVersion,
    /// The member that answers.
    pub member: MemberId,
    /// The leader that it knows.
    pub leader: Option<MemberId>,
    /// Raft's term.
    pub term: u64,
    /// The last log index that it applied.
    pub applied: u64,
    /// Every member.
    pub members: Vec<MemberStatus>,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberStatus {
    /// Who it is.
    pub member: Member,
    /// Whether it votes, follows only, or is not yet part of Raft's membership.
    pub role: MemberRole,
    /// The cluster versions that it supports, by its own word of just now; absent when it does not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub supported: Option<SupportedVersions>,
}

/// A member's part in Raft.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MemberRole {
    /// Votes.
    Voter,
    /// Follows only.
    Learner,
    /// Enrolled, not yet in.
    Joining,
    /// Gone for good.
    Removed,
    /// Removed, and not yet out of Raft's membership.
    Leaving,
}

/// An instance, and what its node last told of its image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceStatus {
    /// The instance.
    #[serde(flatten)]
    pub instance: Instance,
    /// While it waits for its image: how far that is. In the members' memory only, so it may be absent for some seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_progress: Option<ImageProgress>,
}

/// A node and what was last heard of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// The node.
    pub node: Node,
    /// Instances placed on it.
    pub instances: u64,
    /// Memory promised, in MiB, with the VMMs' own.
    pub memory_mib_used: u64,
    /// CPU promised, in thousandths.
    pub cpu_milli_used: u64,
    /// What was last heard of it.
    pub contact: Option<Contact>,
    /// Its disk, as it last told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Disk>,
}

/// An edge and what was last heard of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EdgeStatus {
    /// The edge.
    pub edge: Edge,
    /// What was last heard of it.
    pub contact: Option<Contact>,
}

/// What a member last heard of an agent. Not replicated: it is as old as it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Contact {
    /// When, as that member read its clock.
    pub at: Timestamp,
    /// The member that heard it.
    pub member: MemberId,
    /// The revision that the agent acts on.
    pub applied: Revision,
    /// An update that it holds back.
    pub held: Option<Held>,
}

/// Asks a member to check its own state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyMember {
    /// Also tell the digest of the views at this revision.
    pub at: Revision,
}

/// What a member found when it read every row and event again and replayed the history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VerifiedMember {
    /// Which member.
    pub member: MemberId,
    /// The revision through which it checked.
    pub revision: Revision,
    /// Rows that it read.
    pub rows: u64,
    /// The digest of the views at the revision that was asked for.
    pub views: Digest,
}

/// Whether the members' states are sound and the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Verification {
    /// The revision at which the members were compared.
    pub at: Revision,
    /// True when every member answered, found nothing wrong, and has the same views.
    pub sound: bool,
    /// Every member's finding.
    pub members: Vec<MemberFinding>,
}

/// What is known of one member's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemberFinding {
    /// Which member.
    pub member: MemberId,
    /// What it found; absent when it found something wrong, or did not answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<VerifiedMember>,
    /// What is wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// Asks what the views were at a revision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RebuildViews {
    /// Up to which revision the events are replayed.
    pub to: Revision,
}

/// What the events lead to at a revision. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RebuiltViews {
    /// Where the replay stopped.
    pub revision: Revision,
    /// The digest of the views there.
    pub views: Digest,
    /// Rows by table, of tables that had any.
    pub rows: BTreeMap<String, u64>,
    /// What every member's own replay leads to at the same revision.
    pub members: Verification,
}

/// Hands the leadership over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TransferLeader {
    /// To which voter; to any that answers when nothing is said.
    #[serde(default)]
    pub to: Option<MemberId>,
}

/// Who leads after a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Leader {
    /// The member.
    pub member: MemberId,
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Consistency {
    /// It sees every write that was acknowledged before it began (I3).
    #[default]
    Linearizable,
    /// What this member has now.
    Stale,
}

/// The deployment that a deploy or scale made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartedDeployment {
    /// Its id.
    pub id: DeploymentId,
}

const fn yes() -> bool {
    true
}

/// Changes an env's secrets. Values are padded base64 and travel in this body only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetSecrets {
    /// New and changed ones.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, SecretValue>)]
    pub set: BTreeMap<SecretKey, SecretValue>,
    /// Those that go.
    #[serde(default)]
    #[schema(value_type = BTreeSet<SecretKey>)]
    pub unset: BTreeSet<SecretKey>,
    /// Whether every other one goes, too.
    #[serde(default)]
    pub replace: bool,
    /// Whether what runs is rolled to the new version.
    #[serde(default = "yes")]
    pub roll: bool,
}

/// Makes an earlier version of an env's secrets the newest again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RollBackSecrets {
    /// To which version.
    pub to: u32,
    /// Whether what runs is rolled to it.
    #[serde(default = "yes")]
    pub roll: bool,
}

/// Asks for secrets in clear. That it was asked becomes an event.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RevealSecrets {
    /// Which version; the newest by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u32>,
    /// Which of them; all by default.
    #[serde(default)]
    #[schema(value_type = BTreeSet<SecretKey>)]
    pub keys: BTreeSet<SecretKey>,
}

/// Secrets in clear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RevealedSecrets {
    /// Of which version.
    pub version: u32,
    /// The digest of the version's canonical file: SHA-256, in hexadecimal digits.
    pub digest: String,
    /// The secrets that were asked for.
    #[schema(value_type = BTreeMap<String, SecretValue>)]
    pub secrets: BTreeMap<SecretKey, SecretValue>,
}

/// Keeps what a registry asks for from whoever pulls.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetRegistryCredential {
    /// The registry.
    pub host: RegistryHost,
    /// The user.
    pub user: SecretValue,
    /// The password or token.
    pub password: SecretValue,
}

/// Asks a private registry, with the credential that is kept for it, which image a reference names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveImage {
    /// As in `registry.example/team/shop:v1`.
    pub reference: String,
}

/// How sealing stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SealingStatus {
    /// To whom members seal; absent until there is a first key.
    pub recipient: Option<Recipient>,
    /// Sealing keys of envs and orgs.
    pub envelopes: u64,
    /// Those that are still sealed to an earlier recipient.
    pub stale: u64,
}

/// The cluster's sealing keys, between members.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SealingKeys {
    /// As the file holds them.
    #[schema(value_type = String)]
    pub keys: Zeroizing<String>,
}

impl std::fmt::Debug for SealingKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealingKeys(redacted)")
    }
}

/// A node asks for what one of its instances needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AskSecrets {
    /// For which instance.
    pub instance: InstanceId,
    /// The node's own recipient.
    pub recipient: Recipient,
}

/// What an instance needs, sealed to its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeSecrets {
    /// The version of the env's secrets; 0 for none.
    pub version: u32,
    /// An age file in padded base64; absent when the instance needs nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
}
