//! The tables: which there are, what their keys look like, and how rows become bytes.
//!
//! All tables share one key space: a key begins with its table's tag, and values begin with the form of what follows
//! (see `docs/formats/state.md`). Tags below [`LOG_TAG_FIRST`] are views, a function of the events (I13); the others
//! are a function of the Raft log, such as the outcomes kept for I4. Tags and forms are never reused.

use crate::error::StoreError;
use holdfast_model::exec::ExecGrant;
use holdfast_model::resource::{
    App, Cluster, Deployment, Edge, Enrolment, Env, Instance, Member, Node, Org, Release, Route, Token,
};
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::VolumeSnapshot;
use holdfast_model::{Aggregate, Digest, EnvId, Hostname, OrgId, VolumeId};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::Cell;
use std::sync::Arc;

/// The bytes of a row's value.
pub type Value = Arc<[u8]>;
/// The first tag that is not a view.
pub(crate) const LOG_TAG_FIRST: u8 = 0xC0;

macro_rules! tables {
    ($($(#[$doc:meta])* $name:ident = $tag:literal, $text:literal;)*) => {
        /// A table.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Table { $($(#[$doc])* $name = $tag,)* }

        impl Table {
            /// Every table.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The table's name, for people.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// The table with this tag.
            pub const fn from_tag(tag: u8) -> Option<Self> {
                match tag { $($tag => Some(Self::$name),)* _ => None }
            }
        }
    };
}

tables! {
    /// The one row of the cluster.
    Cluster = 1, "cluster";
    /// org → org.
    Org = 2, "org";
    /// name → org id.
    OrgByName = 3, "org_by_name";
    /// app → app.
    App = 4, "app";
    /// org, name → app id.
    AppByName = 5, "app_by_name";
    /// env → env.
    Env = 6, "env";
    /// app, name → env id.
    EnvByName = 7, "env_by_name";
    /// release → release.
    Release = 8, "release";
    /// env, number → release id.
    ReleaseByEnv = 9, "release_by_env";
    /// deployment → deployment.
    Deployment = 10, "deployment";
    /// env, number → deployment id.
    DeploymentByEnv = 11, "deployment_by_env";
    /// instance → instance.
    Instance = 12, "instance";
    /// env, instance → nothing; only instances that are not final.
    InstanceByEnv = 13, "instance_by_env";
    /// node, instance → nothing; only instances that are not final.
    InstanceByNode = 14, "instance_by_node";
    /// env, revision at which it ended → instance id; the last few.
    InstanceEnded = 15, "instance_ended";
    /// route → route.
    Route = 16, "route";
    /// env, route → nothing.
    RouteByEnv = 17, "route_by_env";
    /// hostname → route id: at most one owner (I8).
    HostnameOwner = 18, "hostname_owner";
    /// port, hostname or nothing → route id.
    PortClaim = 19, "port_claim";
    /// node → node.
    Node = 20, "node";
    /// name → node id.
    NodeByName = 21, "node_by_name";
    /// node → what its instances take.
    NodeLoad = 22, "node_load";
    /// node, org → how many instances of the org.
    NodeOrgLoad = 23, "node_org_load";
    /// edge → edge.
    Edge = 24, "edge";
    /// name → edge id.
    EdgeByName = 25, "edge_by_name";
    /// member → member.
    Member = 26, "member";
    /// name → member id.
    MemberByName = 27, "member_by_name";
    /// token → token.
    Token = 28, "token";
    /// digest → token id.
    TokenByDigest = 29, "token_by_digest";
    /// org or zeros, token → nothing.
    TokenByOrg = 30, "token_by_org";
    /// enrolment → enrolment.
    Enrolment = 31, "enrolment";
    /// digest → enrolment id.
    EnrolmentByDigest = 32, "enrolment_by_digest";
    /// aggregate → events so far.
    AggregateSeq = 33, "aggregate_seq";
    /// random half of the env's id, env → nothing: its instances are not what its deployment wants, so `Tick` looks at it.
    Unsettled = 34, "unsettled";
    /// node → nothing: it is silent, so `Tick` looks at it.
    SilentNode = 35, "silent_node";
    /// member → nothing: it follows and does not vote.
    NonVoter = 36, "non_voter";
    /// incarnation → the last revision before it began; the first has none.
    Incarnation = 37, "incarnation";
    /// The one row of the recipient that members seal to.
    ClusterRecipient = 38, "cluster_recipient";
    /// env, number → a version of its secrets.
    SecretVersion = 39, "secret_version";
    /// env → the number of its secrets' newest version.
    SecretHead = 40, "secret_head";
    /// deployment → the number of the version of secrets that its instances run with.
    DeploymentSecrets = 41, "deployment_secrets";
    /// kind and id of an org or app, registry → that there is a credential.
    RegistryCredential = 42, "registry_credential";
    /// grant → exec grant; only those that are not over.
    ExecGrant = 48, "exec_grant";
    /// env, grant → nothing.
    ExecGrantByEnv = 49, "exec_grant_by_env";
    /// org → the hour of the clock, and grants in it.
    ExecHour = 50, "exec_hour";
    /// volume → volume.
    Volume = 56, "volume";
    /// env, name → volume id.
    VolumeByEnv = 57, "volume_by_env";
    /// org, volume → nothing.
    VolumeByOrg = 58, "volume_by_org";
    /// node, volume → nothing: it is deleted, and its disk is still there.
    VolumeToErase = 59, "volume_to_erase";
    /// snapshot → volume snapshot.
    VolumeSnapshot = 60, "volume_snapshot";
    /// org, snapshot → nothing.
    SnapshotByOrg = 61, "snapshot_by_org";
    /// volume, snapshot → nothing.
    SnapshotByVolume = 62, "snapshot_by_volume";
    /// node, snapshot → nothing: it is yet to be taken or uploaded.
    SnapshotWork = 63, "snapshot_work";
    /// node, snapshot → nothing: it is deleted, and what is stored of it is still there.
    SnapshotToErase = 64, "snapshot_to_erase";
    /// volume → what it is being made from.
    VolumeRestore = 65, "volume_restore";
    /// node, volume → nothing: it is yet to be restored.
    RestoreWork = 66, "restore_work";
    /// random half of the volume's id, volume → nothing: it is backed up daily, so `Tick` looks at it.
    VolumeBackedUp = 67, "volume_backed_up";
    /// Log state: (kind, scope) → the first outcome (I4).
    Outcome = 0xC0, "outcome";
    /// Log state: (end, key of an outcome) → nothing.
    OutcomeEnd = 0xC1, "outcome_end";
    /// Log state: the one row of log time, in milliseconds.
    LogTime = 0xC2, "log_time";
    /// Log state: kind and id of an env or org → its sealing key, sealed.
    Envelope = 0xC3, "envelope";
    /// Log state: env, digest → a sealed secret.
    SealedSecret = 0xC4, "sealed_secret";
    /// Log state: kind and id of an org or app, registry → a sealed credential.
    SealedCredential = 0xC5, "sealed_credential";
}

/// A key: the table's tag and the parts.
pub(crate) fn key(table: Table, parts: &[&[u8]]) -> Vec<u8> {
    let mut key = Vec::with_capacity(1 + parts.iter().map(|p| p.len()).sum::<usize>());
    key.push(table as u8);
    for part in parts {
        key.extend_from_slice(part);
    }
    key
}

/// Whether a key belongs to the views.
pub(crate) fn is_view(key: &[u8]) -> bool {
    key.first().is_some_and(|t| *t < LOG_TAG_FIRST)
}

/// Whether a key belongs to what is sealed: log state that readers see at a revision, as they see the views.
pub(crate) fn is_sealed(key: &[u8]) -> bool {
    const FIRST: u8 = Table::Envelope as u8;
    const LAST: u8 = Table::SealedCredential as u8;
    key.first().is_some_and(|tag| (FIRST..=LAST).contains(tag))
}

/// The form that this build writes.
pub(crate) const FORM: u8 = 1;

/// Room for what is encoded, so that most events never have to grow into a larger piece of memory.
const ROOM_BYTES: usize = 512;

/// Memory that a thread keeps for encoding rows, at most.
const ENCODED_KEPT_BYTES: usize = 16 << 10;

/// The form byte, with room for what follows it.
pub(crate) fn form() -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ROOM_BYTES);
    bytes.push(FORM);
    bytes
}

thread_local! {
    /// Where rows are encoded before they get memory of their own size: one allocation for each, not two.
    static ENCODED: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// The bytes of a row.
pub(crate) fn encode<T: Serialize>(table: Table, row: &T) -> Result<Value, StoreError> {
    with_encoded(table, row, |bytes| Ok(Value::from(bytes)))
}

/// What `then` makes of the bytes of a row, which lie where the next row will.
pub(crate) fn with_encoded<T: Serialize, R>(
    table: Table,
    row: &T,
    then: impl FnOnce(&[u8]) -> Result<R, StoreError>,
) -> Result<R, StoreError> {
    let mut room = ENCODED.take();
    room.clear();
    room.push(FORM);
    let bytes = postcard::to_extend(row, room)
        .map_err(|source| StoreError::Encode { table: table.name(), source })?;
    let made = then(&bytes);
    if bytes.capacity() <= ENCODED_KEPT_BYTES {
        ENCODED.set(bytes);
    }
    made
}

/// The row of these bytes.
pub(crate) fn decode<T: DeserializeOwned>(table: Table, bytes: &[u8]) -> Result<T, StoreError> {
    match bytes.split_first() {
        Some((&FORM, rest)) => {
            postcard::from_bytes(rest).map_err(|source| StoreError::Decode { table: table.name(), source })
        }
        Some((&version, _)) => Err(StoreError::UnknownForm { table: table.name(), version }),
        None => Err(StoreError::corrupt(format!("a row of «{}» is empty", table.name()))),
    }
}

/// A row that is found by its own id.
pub(crate) trait Row: Serialize + DeserializeOwned {
    /// Its table.
    const TABLE: Table;

    /// Its key.
    fn row_key(&self) -> Vec<u8>;
}

macro_rules! rows {
    ($($type:ident;)*) => {$(
        impl Row for $type {
            const TABLE: Table = Table::$type;

            fn row_key(&self) -> Vec<u8> {
                key(Table::$type, &[&self.id.to_key()])
            }
        }
    )*};
}

rows! { Org; App; Env; Release; Deployment; Instance; Route; Node; Edge; Token; Enrolment; ExecGrant; Volume; VolumeSnapshot; }

impl Row for Cluster {
    const TABLE: Table = Table::Cluster;

    fn row_key(&self) -> Vec<u8> {
        key(Table::Cluster, &[])
    }
}

impl Row for Member {
    const TABLE: Table = Table::Member;

    fn row_key(&self) -> Vec<u8> {
        key(Table::Member, &[&self.id.0.to_be_bytes()])
    }
}

/// The key of an aggregate's count of events.
pub(crate) fn aggregate_key(aggregate: &Aggregate) -> Vec<u8> {
    let (kind, id): (u8, [u8; 16]) = match aggregate {
        Aggregate::Cluster(id) => (1, id.to_key()),
        Aggregate::Org(id) => (2, id.to_key()),
        Aggregate::App(id) => (3, id.to_key()),
        Aggregate::Env(id) => (4, id.to_key()),
        Aggregate::Release(id) => (5, id.to_key()),
        Aggregate::Deployment(id) => (6, id.to_key()),
        Aggregate::Instance(id) => (7, id.to_key()),
        Aggregate::Route(id) => (8, id.to_key()),
        Aggregate::Node(id) => (9, id.to_key()),
        Aggregate::Edge(id) => (10, id.to_key()),
        Aggregate::Member(id) => (11, u128::from(id.0).to_be_bytes()),
        Aggregate::Token(id) => (12, id.to_key()),
        Aggregate::Enrolment(id) => (13, id.to_key()),
        Aggregate::ExecGrant(id) => (20, id.to_key()),
        Aggregate::Volume(id) => (24, id.to_key()),
        Aggregate::Snapshot(id) => (25, id.to_key()),
    };
    key(Table::AggregateSeq, &[&[kind], &id])
}

/// The key of a port's claim: a name's, or the whole port's.
pub(crate) fn port_claim_key(port: u16, hostname: Option<&Hostname>) -> Vec<u8> {
    let name = hostname.map_or(&b""[..], |h| h.as_str().as_bytes());
    key(Table::PortClaim, &[&port.to_be_bytes(), name])
}

/// The key of the mark that makes `Tick` look at an env.
pub(crate) fn unsettled_key(env: EnvId) -> Vec<u8> {
    tick_key(Table::Unsettled, env.to_key())
}

/// The key of the mark that makes `Tick` look at a volume.
pub(crate) fn backed_up_key(volume: VolumeId) -> Vec<u8> {
    tick_key(Table::VolumeBackedUp, volume.to_key())
}

/// Such marks stand in the order of the random half of their id: see `Draft::marks_from_anywhere`.
fn tick_key(table: Table, id: [u8; 16]) -> Vec<u8> {
    key(table, &[&id[8..], &id])
}

/// The first part of a token's key by org: operators' tokens stand under zeros.
pub(crate) fn token_owner(org: Option<OrgId>) -> [u8; 16] {
    org.map_or([0; 16], OrgId::to_key)
}

/// The sum of the digests of rows, lane by lane modulo 2^64: adding and removing a row commute, so it follows each
/// change at the price of two short hashes. It is there to catch faults, of disks, of memory and of our own code; who
/// can choose rows freely can forge a sum, so it is no protection against a malicious member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize)]
pub(crate) struct RowSum([u64; 4]);

/// The key of the rows' hash: digests for this purpose are unrelated to any other.
const ROW_HASH_KEY: &[u8; 32] = b"holdfast 2026 state row digest 1";

fn row_lanes(key: &[u8], value: &[u8], room: &mut Vec<u8>) -> [u64; 4] {
    room.clear();
    room.extend_from_slice(&(key.len() as u64).to_le_bytes());
    room.extend_from_slice(key);
    room.extend_from_slice(value);
    // In one piece: for rows as short as most are, setting up a hasher would cost as much as the hash.
    let hash = blake3::keyed_hash(ROW_HASH_KEY, room);
    let mut lanes = [0u64; 4];
    for (lane, bytes) in lanes.iter_mut().zip(hash.as_bytes().chunks_exact(8)) {
        *lane = bytes.iter().rev().fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
    }
    lanes
}

impl RowSum {
    /// Adds a row.
    pub(crate) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.add_with(key, value, &mut Vec::new());
    }

    /// Adds a row; what was in `room` is overwritten, so that many rows share one piece of memory.
    pub(crate) fn add_with(&mut self, key: &[u8], value: &[u8], room: &mut Vec<u8>) {
        self.join(Self(row_lanes(key, value, room)));
    }

    /// Adds the rows of another sum.
    pub(crate) fn join(&mut self, other: Self) {
        for (lane, more) in self.0.iter_mut().zip(other.0) {
            *lane = lane.wrapping_add(more);
        }
    }

    /// Takes a row away; what was in `room` is overwritten.
    pub(crate) fn remove_with(&mut self, key: &[u8], value: &[u8], room: &mut Vec<u8>) {
        for (lane, row) in self.0.iter_mut().zip(row_lanes(key, value, room)) {
            *lane = lane.wrapping_sub(row);
        }
    }

    /// The sum's bytes.
    pub(crate) fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (to, lane) in bytes.chunks_exact_mut(8).zip(self.0) {
            to.copy_from_slice(&lane.to_le_bytes());
        }
        bytes
    }
}

/// The digest of the views at a revision: what a replay must come to (I13).
pub(crate) fn views_digest(views: RowSum, chain: Digest, revision: u64) -> Digest {
    let mut bytes = [0; 72];
    bytes[..32].copy_from_slice(&views.to_bytes());
    bytes[32..64].copy_from_slice(&chain.0);
    bytes[64..].copy_from_slice(&revision.to_be_bytes());
    Digest::keyed("holdfast 2026 views digest v1", &bytes)
}
