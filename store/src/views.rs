//! Typed getters and pages over rows: the same for `decide`, which reads a draft, and the API, which reads a [`View`].
//!
//! Nothing here authorises: a caller that acts for a tenant compares the org of what it gets (I9).
//!
//! [`View`]: crate::View

use crate::error::StoreError;
use crate::rows::{Rows, id_bits, id_suffix, read, read_at, read_id};
use crate::tables::{Row, Table, aggregate_key, decode, key, port_claim_key, token_owner, unsettled_key};
use holdfast_model::exec::ExecGrant;
use holdfast_model::resource::{
    App, Cluster, Deployment, Edge, Enrolment, Env, Instance, Member, Node, Org, Release, Route, Token,
};
use holdfast_model::volume::Volume;
use holdfast_model::{
    AgentName, Aggregate, AppId, AppName, ClusterVersion, DeploymentId, Digest, EdgeId, EnrolmentId, EnvId,
    EnvName, ExecGrantId, Hostname, Incarnation, InstanceId, MemberId, NodeId, OrgId, OrgName, ReleaseId,
    Revision, RouteId, TokenId, VolumeId, VolumeName,
};
use serde::{Deserialize, Serialize};

/// Instances that one env can have without being final, a bound on lists: 16 processes of 100, twice over while
/// rolling.
pub(crate) const ENV_INSTANCES_MAX: usize = 4_096;
/// Ended instances that an env keeps for people to look at.
pub const ENV_ENDED_KEPT: usize = 20;
/// Hosts of one kind that are listed at most.
pub(crate) const HOSTS_MAX: usize = 65_536;
/// Instances of one node that are listed at most.
pub(crate) const NODE_INSTANCES_MAX: usize = 65_536;

/// Volumes that are listed at most: more than an org may have, because a roll-back may make one beyond.
pub(crate) const VOLUMES_LISTED_MAX: usize = 1_000;
/// Exec grants that are looked at together at most: more than any one env has, and what one tick ends.
pub(crate) const EXEC_GRANTS_MAX: usize = 1_000;

/// How many exec grants an org was given in one hour of the clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecHour {
    /// Which hour, counted from 1970.
    pub hour: u64,
    /// How many.
    pub grants: u32,
}

/// What the instances of a node take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeLoad {
    /// Instances that are not final.
    pub instances: u64,
    /// Their memory, with the VMM's own, in MiB.
    pub memory_mib: u64,
    /// Their CPU, in thousandths.
    pub cpu_milli: u64,
}

/// What must be there because something else says so.
pub(crate) fn required<T>(found: Option<T>, what: &str) -> Result<T, StoreError> {
    found.ok_or_else(|| {
        StoreError::corrupt(format!("{what} is not there, though something else refers to it"))
    })
}

/// How many events an aggregate has.
pub(crate) fn aggregate_seq(rows: &(impl Rows + ?Sized), aggregate: &Aggregate) -> Result<u64, StoreError> {
    Ok(read_at(rows, Table::AggregateSeq, &aggregate_key(aggregate))?.unwrap_or(0))
}

/// Rows of `T` in the order of an index under `prefix`, whose values are ids.
fn by_index<T: Row>(
    rows: &(impl Rows + ?Sized),
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<Vec<T>, StoreError> {
    let found = rows.scan(prefix, after, limit)?;
    found.iter().map(|(_, value)| follow(rows, id_bits(value)?)).collect()
}

/// Rows of `T` in the order of an index under `prefix`, whose keys end in ids.
pub(crate) fn by_mark<T: Row>(
    rows: &(impl Rows + ?Sized),
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<Vec<T>, StoreError> {
    let found = rows.scan(prefix, after, limit)?;
    found.iter().map(|(key, _)| follow(rows, id_suffix(key)?)).collect()
}

/// Rows of a table, by id.
fn by_id<T: Row>(
    rows: &(impl Rows + ?Sized),
    after: Option<&[u8]>,
    limit: usize,
) -> Result<Vec<T>, StoreError> {
    let after = after.map(|id| key(T::TABLE, &[id]));
    let found = rows.scan(&key(T::TABLE, &[]), after.as_deref(), limit)?;
    found.iter().map(|(_, value)| decode(T::TABLE, value)).collect()
}

/// The row that an index promises.
fn follow<T: Row>(rows: &(impl Rows + ?Sized), id: u128) -> Result<T, StoreError> {
    read(rows, &[&id.to_be_bytes()])?.ok_or_else(|| {
        StoreError::corrupt(format!("an index leads to a row of «{}» that is not there", T::TABLE.name()))
    })
}

macro_rules! getters {
    ($($(#[$doc:meta])* fn $name:ident($id:ty) -> $row:ty;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// When the database fails.
        fn $name(&self, id: $id) -> Result<Option<$row>, StoreError> {
            read(self, &[&id.to_key()])
        }
    )*};
}

macro_rules! lookups {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $row:ty = $key:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// When the database fails.
        fn $name(&self, $($arg: $ty),*) -> Result<Option<$row>, StoreError> {
            read_id(self, &$key)?.map(|id| follow(self, id)).transpose()
        }
    )*};
}

/// Typed reads of a state.
pub trait Views: Rows {
    /// The cluster, once it is initialised.
    ///
    /// # Errors
    /// When the database fails.
    fn cluster(&self) -> Result<Option<Cluster>, StoreError> {
        read(self, &[])
    }

    /// The version of the rules and stored forms in use; before the cluster is initialised, the first.
    ///
    /// # Errors
    /// When the database fails.
    fn cluster_version(&self) -> Result<ClusterVersion, StoreError> {
        Ok(self.cluster()?.map_or(ClusterVersion::ONE, |cluster| cluster.version))
    }

    getters! {
        /// An org.
        fn org(OrgId) -> Org;
        /// An app.
        fn app(AppId) -> App;
        /// An env.
        fn env(EnvId) -> Env;
        /// A release.
        fn release(ReleaseId) -> Release;
        /// A deployment.
        fn deployment(DeploymentId) -> Deployment;
        /// An instance; ended ones are kept for a while.
        fn instance(InstanceId) -> Instance;
        /// A route.
        fn route(RouteId) -> Route;
        /// A node.
        fn node(NodeId) -> Node;
        /// An edge.
        fn edge(EdgeId) -> Edge;
        /// A token, also a revoked one.
        fn token(TokenId) -> Token;
        /// An enrolment, also a used one.
        fn enrolment(EnrolmentId) -> Enrolment;
        /// An exec grant that is not over.
        fn exec_grant(ExecGrantId) -> ExecGrant;
        /// A volume.
        fn volume(VolumeId) -> Volume;
    }

    lookups! {
        /// The org with this name.
        fn org_by_name(name: &OrgName) -> Org = key(Table::OrgByName, &[name.as_str().as_bytes()]);
        /// The org's app with this name.
        fn app_by_name(org: OrgId, name: &AppName) -> App =
            key(Table::AppByName, &[&org.to_key(), name.as_str().as_bytes()]);
        /// The app's env with this name.
        fn env_by_name(app: AppId, name: &EnvName) -> Env =
            key(Table::EnvByName, &[&app.to_key(), name.as_str().as_bytes()]);
        /// The env's release with this number.
        fn release_by_number(env: EnvId, number: u32) -> Release =
            key(Table::ReleaseByEnv, &[&env.to_key(), &number.to_be_bytes()]);
        /// The env's deployment with this number.
        fn deployment_by_number(env: EnvId, number: u32) -> Deployment =
            key(Table::DeploymentByEnv, &[&env.to_key(), &number.to_be_bytes()]);
        /// The route that owns a hostname.
        fn route_by_hostname(hostname: &Hostname) -> Route =
            key(Table::HostnameOwner, &[hostname.as_str().as_bytes()]);
        /// The route that claims a port for a hostname, or all of a port.
        fn route_by_port(port: u16, hostname: Option<&Hostname>) -> Route = port_claim_key(port, hostname);
        /// The node with this name.
        fn node_by_name(name: &AgentName) -> Node = key(Table::NodeByName, &[name.as_str().as_bytes()]);
        /// The edge with this name.
        fn edge_by_name(name: &AgentName) -> Edge = key(Table::EdgeByName, &[name.as_str().as_bytes()]);
        /// The env's volume with this name.
        fn volume_by_name(env: EnvId, name: &VolumeName) -> Volume =
            key(Table::VolumeByEnv, &[&env.to_key(), name.as_str().as_bytes()]);
        /// The token with this digest, also a revoked one.
        fn token_by_digest(digest: &Digest) -> Token = key(Table::TokenByDigest, &[&digest.0]);
        /// The enrolment with this digest, also a used one.
        fn enrolment_by_digest(digest: &Digest) -> Enrolment = key(Table::EnrolmentByDigest, &[&digest.0]);
    }

    /// A member, also a removed one.
    ///
    /// # Errors
    /// When the database fails.
    fn member(&self, id: MemberId) -> Result<Option<Member>, StoreError> {
        read(self, &[&id.0.to_be_bytes()])
    }

    /// The member with this name.
    ///
    /// # Errors
    /// When the database fails.
    fn member_by_name(&self, name: &AgentName) -> Result<Option<Member>, StoreError> {
        let found = self.get(&key(Table::MemberByName, &[name.as_str().as_bytes()]))?;
        let Some(bytes) = found else { return Ok(None) };
        read(self, &[&bytes])
    }

    /// A page of orgs, by name after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn orgs(&self, after: Option<&OrgName>, limit: usize) -> Result<Vec<Org>, StoreError> {
        let after = after.map(|name| key(Table::OrgByName, &[name.as_str().as_bytes()]));
        by_index(self, &key(Table::OrgByName, &[]), after.as_deref(), limit)
    }

    /// A page of an org's apps, by name after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn apps(&self, org: OrgId, after: Option<&AppName>, limit: usize) -> Result<Vec<App>, StoreError> {
        let prefix = key(Table::AppByName, &[&org.to_key()]);
        let after = after.map(|name| [&prefix, name.as_str().as_bytes()].concat());
        by_index(self, &prefix, after.as_deref(), limit)
    }

    /// A page of an app's envs, by name after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn envs(&self, app: AppId, after: Option<&EnvName>, limit: usize) -> Result<Vec<Env>, StoreError> {
        let prefix = key(Table::EnvByName, &[&app.to_key()]);
        let after = after.map(|name| [&prefix, name.as_str().as_bytes()].concat());
        by_index(self, &prefix, after.as_deref(), limit)
    }

    /// A page of an env's releases, by number after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn releases(&self, env: EnvId, after: Option<u32>, limit: usize) -> Result<Vec<Release>, StoreError> {
        let prefix = key(Table::ReleaseByEnv, &[&env.to_key()]);
        let after = after.map(|n| [prefix.as_slice(), &n.to_be_bytes()].concat());
        by_index(self, &prefix, after.as_deref(), limit)
    }

    /// A page of an env's deployments, by number after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn deployments(
        &self,
        env: EnvId,
        after: Option<u32>,
        limit: usize,
    ) -> Result<Vec<Deployment>, StoreError> {
        let prefix = key(Table::DeploymentByEnv, &[&env.to_key()]);
        let after = after.map(|n| [prefix.as_slice(), &n.to_be_bytes()].concat());
        by_index(self, &prefix, after.as_deref(), limit)
    }

    /// An env's instances that are not final, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn live_instances(&self, env: EnvId) -> Result<Vec<Instance>, StoreError> {
        by_mark(self, &key(Table::InstanceByEnv, &[&env.to_key()]), None, ENV_INSTANCES_MAX)
    }

    /// An env's last ended instances, in the order in which they ended.
    ///
    /// # Errors
    /// When the database fails.
    fn ended_instances(&self, env: EnvId) -> Result<Vec<Instance>, StoreError> {
        by_index(self, &key(Table::InstanceEnded, &[&env.to_key()]), None, ENV_ENDED_KEPT + 1)
    }

    /// An env's instances, by id: those that run and the last few that ended.
    ///
    /// # Errors
    /// When the database fails.
    fn instances(&self, env: EnvId) -> Result<Vec<Instance>, StoreError> {
        let mut all = self.live_instances(env)?;
        all.extend(self.ended_instances(env)?);
        all.sort_by_key(|i| i.id);
        Ok(all)
    }

    /// A node's instances that are not final, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn node_instances_live(&self, node: NodeId) -> Result<Vec<Instance>, StoreError> {
        by_mark(self, &key(Table::InstanceByNode, &[&node.to_key()]), None, NODE_INSTANCES_MAX)
    }

    /// What a node's instances take.
    ///
    /// # Errors
    /// When the database fails.
    fn node_load(&self, node: NodeId) -> Result<NodeLoad, StoreError> {
        let at = key(Table::NodeLoad, &[&node.to_key()]);
        Ok(read_at(self, Table::NodeLoad, &at)?.unwrap_or_default())
    }

    /// How many instances of an org a node has.
    ///
    /// # Errors
    /// When the database fails.
    fn node_org_load(&self, node: NodeId, org: OrgId) -> Result<u64, StoreError> {
        let at = key(Table::NodeOrgLoad, &[&node.to_key(), &org.to_key()]);
        Ok(read_at(self, Table::NodeOrgLoad, &at)?.unwrap_or(0))
    }

    /// An env's routes, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn routes(&self, env: EnvId, after: Option<RouteId>, limit: usize) -> Result<Vec<Route>, StoreError> {
        let prefix = key(Table::RouteByEnv, &[&env.to_key()]);
        let after = after.map(|id| [prefix.as_slice(), &id.to_key()].concat());
        by_mark(self, &prefix, after.as_deref(), limit)
    }

    /// A page of all routes, by id after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn all_routes(&self, after: Option<RouteId>, limit: usize) -> Result<Vec<Route>, StoreError> {
        by_id(self, after.map(RouteId::to_key).as_ref().map(<[u8; 16]>::as_slice), limit)
    }

    /// Every node, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn nodes(&self) -> Result<Vec<Node>, StoreError> {
        by_id(self, None, HOSTS_MAX)
    }

    /// Every edge, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn edges(&self) -> Result<Vec<Edge>, StoreError> {
        by_id(self, None, HOSTS_MAX)
    }

    /// Every member that ever was, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn members(&self) -> Result<Vec<Member>, StoreError> {
        by_id(self, None, HOSTS_MAX)
    }

    /// Whether a member is one that follows and does not vote.
    ///
    /// # Errors
    /// When the database fails.
    fn is_non_voter(&self, id: MemberId) -> Result<bool, StoreError> {
        Ok(self.get(&key(Table::NonVoter, &[&id.0.to_be_bytes()]))?.is_some())
    }

    /// Members that vote, or will once they have caught up, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn voting_members(&self) -> Result<Vec<MemberId>, StoreError> {
        let mut voting = Vec::new();
        for member in self.members()? {
            if !member.removed && !self.is_non_voter(member.id)? {
                voting.push(member.id);
            }
        }
        Ok(voting)
    }

    /// The last revision before an incarnation began; `None` for the first, and for those that never were.
    ///
    /// # Errors
    /// When the database fails.
    fn last_before(&self, incarnation: Incarnation) -> Result<Option<Revision>, StoreError> {
        read_at(self, Table::Incarnation, &key(Table::Incarnation, &[&incarnation.0.to_be_bytes()]))
    }

    /// A page of an org's tokens, or of the operators', by id after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn tokens(
        &self,
        org: Option<OrgId>,
        after: Option<TokenId>,
        limit: usize,
    ) -> Result<Vec<Token>, StoreError> {
        let prefix = key(Table::TokenByOrg, &[&token_owner(org)]);
        let after = after.map(|id| [prefix.as_slice(), &id.to_key()].concat());
        by_mark(self, &prefix, after.as_deref(), limit)
    }

    /// A page of enrolments, by id after `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn enrolments(&self, after: Option<EnrolmentId>, limit: usize) -> Result<Vec<Enrolment>, StoreError> {
        by_id(self, after.map(EnrolmentId::to_key).as_ref().map(<[u8; 16]>::as_slice), limit)
    }

    /// An env's exec grants that are not over, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn exec_grants_of(&self, env: EnvId) -> Result<Vec<ExecGrant>, StoreError> {
        by_mark(self, &key(Table::ExecGrantByEnv, &[&env.to_key()]), None, EXEC_GRANTS_MAX)
    }

    /// Exec grants that are not over, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn exec_grants(&self, limit: usize) -> Result<Vec<ExecGrant>, StoreError> {
        by_id(self, None, limit)
    }

    /// How many exec grants an org was last given in an hour of the clock.
    ///
    /// # Errors
    /// When the database fails.
    fn exec_hour(&self, org: OrgId) -> Result<ExecHour, StoreError> {
        let at = key(Table::ExecHour, &[&org.to_key()]);
        Ok(read_at(self, Table::ExecHour, &at)?.unwrap_or_default())
    }

    /// Whether there is any volume at all.
    ///
    /// # Errors
    /// When the database fails.
    fn has_volumes(&self) -> Result<bool, StoreError> {
        Ok(!self.scan(&key(Table::Volume, &[]), None, 1)?.is_empty())
    }

    /// An env's volumes, by name. An org has only so many.
    ///
    /// # Errors
    /// When the database fails.
    fn volumes(&self, env: EnvId) -> Result<Vec<Volume>, StoreError> {
        by_index(self, &key(Table::VolumeByEnv, &[&env.to_key()]), None, VOLUMES_LISTED_MAX)
    }

    /// An org's volumes, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn org_volumes(&self, org: OrgId) -> Result<Vec<Volume>, StoreError> {
        by_mark(self, &key(Table::VolumeByOrg, &[&org.to_key()]), None, VOLUMES_LISTED_MAX)
    }

    /// The volumes that an instance has, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn volumes_of(&self, instance: &Instance) -> Result<Vec<Volume>, StoreError> {
        let mut held = self.volumes(instance.env)?;
        held.retain(|volume| volume.is_of(instance.id));
        held.sort_by_key(|volume| volume.id);
        Ok(held)
    }

    /// Deleted volumes whose disks a node is to erase, by id.
    ///
    /// # Errors
    /// When the database fails.
    fn volumes_to_erase(&self, node: NodeId, limit: usize) -> Result<Vec<VolumeId>, StoreError> {
        let marks = self.scan(&key(Table::VolumeToErase, &[&node.to_key()]), None, limit)?;
        marks.iter().map(|(key, _)| id_suffix(key).map(VolumeId::from_bits)).collect()
    }

    /// Whether an env's instances are not yet what its deployment wants.
    ///
    /// # Errors
    /// When the database fails.
    fn is_unsettled(&self, env: EnvId) -> Result<bool, StoreError> {
        self.look(&unsettled_key(env), &mut |_| Ok(()))
    }
}

impl<R: Rows + ?Sized> Views for R {}
