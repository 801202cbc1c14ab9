//! A group of members for tests: starts, stops, restarts and asks them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use holdfast_identity::{
    Authority, Credential, PrivateKey, Subject, mutual_client_config, mutual_server_config,
};
use holdfast_model::command::{NewCluster, NewMember, NewToken};
use holdfast_model::resource::TokenKind;
use holdfast_model::{
    Actor, ClusterVersion, Command, Context, Digest, Incarnation, MemberId, Proposal, RequestId, Revision,
    Scope, Timestamp, TokenId,
};
use holdfast_raft::{
    Compaction, Consensus, ConsensusConfig, MemberIdentity, MemberNode, RaftTls, StartError, Timing,
};
use holdfast_store::Views;

pub(crate) const CLUSTER: &str = "01jdcluster";

/// A test that waits longer than this hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Group {
    authority: Authority,
    folder: tempfile::TempDir,
    pub(crate) members: BTreeMap<u64, Consensus>,
    /// Of this group alone: a member that comes back finds its port free, whatever else runs here.
    host: [u8; 4],
    addresses: BTreeMap<u64, SocketAddr>,
    pub(crate) compaction: Compaction,
    /// The newest cluster version that members started from now on support.
    pub(crate) version_max: ClusterVersion,
    pub(crate) scrub_pass: Duration,
    pub(crate) timing: Timing,
    requests: std::sync::atomic::AtomicU64,
    operator: TokenId,
}

/// An address of this host that no other group has, and from which nobody connects to anything.
fn own_address() -> [u8; 4] {
    static GROUPS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = GROUPS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let process = std::process::id();
    [127, 1 + (process % 250) as u8, (process / 250 % 250) as u8, 1 + (number % 250) as u8]
}

impl Group {
    /// No members yet.
    pub(crate) fn new() -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(std::env::var("HOLDFAST_TEST_LOG").unwrap_or_else(|_| "error".into()))
            .with_test_writer()
            .try_init();
        Group {
            authority: Authority::create(CLUSTER, SystemTime::now()).unwrap(),
            folder: tempfile::tempdir().unwrap(),
            members: BTreeMap::new(),
            host: own_address(),
            addresses: BTreeMap::new(),
            compaction: Compaction::default(),
            version_max: ClusterVersion::NEWEST,
            scrub_pass: Duration::from_secs(86_400),
            timing: Timing::default(),
            requests: std::sync::atomic::AtomicU64::new(1),
            operator: TokenId::from_bits(0),
        }
    }

    pub(crate) fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Three voters.
    pub(crate) async fn of_three() -> Self {
        let mut group = Group::new();
        group.grow(3).await;
        group
    }

    /// Starts members until there are `size` voters.
    pub(crate) async fn grow(&mut self, size: u64) {
        for id in 1..=size {
            self.prepare(id);
            self.start(id).await;
            let node = self.node(id);
            if id == 1 {
                self.members[&1].bootstrap(node).await.unwrap();
                self.propose(1, self.init()).await;
                let view = self.members[&1].store().view().unwrap();
                self.operator = view.token_by_digest(&Digest::of(b"operator")).unwrap().unwrap().id;
            } else {
                self.members[&1].add_learner(MemberId(id), node).await.unwrap();
                self.members[&1].promote(MemberId(id)).await.unwrap();
            }
        }
    }

    pub(crate) fn tls(&self, id: u64) -> Arc<RaftTls> {
        let key = PrivateKey::generate().unwrap();
        let subject = Subject::Member { id: id.to_string(), host_names: vec![], addresses: vec![] };
        let issued = self
            .authority
            .issue(&key.signing_request().unwrap(), &subject, Duration::from_secs(3600), SystemTime::now())
            .unwrap();
        let credential = Credential::new(key, &issued.chain_pem).unwrap();
        let ca = self.authority.certificate();
        let (server, client) =
            (mutual_server_config(&credential, ca).unwrap(), mutual_client_config(&credential, ca).unwrap());
        Arc::new(RaftTls::new(CLUSTER, server, client))
    }

    pub(crate) fn path(&self, id: u64) -> std::path::PathBuf {
        self.folder.path().join(format!("member-{id}"))
    }

    pub(crate) fn prepare(&self, id: u64) {
        let identity = MemberIdentity { cluster: CLUSTER.into(), member: MemberId(id), incarnation: 1 };
        Consensus::prepare(&self.path(id), &identity).unwrap();
    }

    pub(crate) fn config(&self, id: u64) -> ConsensusConfig {
        let listen = self.addresses.get(&id).copied().unwrap_or(SocketAddr::from((self.host, 0)));
        let mut config = ConsensusConfig::new(MemberId(id), self.path(id), listen, self.tls(id));
        config.compaction = self.compaction.clone();
        config.cluster_version_max = self.version_max;
        config.scrub_pass = self.scrub_pass;
        config.timing = self.timing.clone();
        config
    }

    pub(crate) async fn start(&mut self, id: u64) {
        let end = tokio::time::Instant::now() + PATIENCE;
        let member = loop {
            match Consensus::start(self.config(id)).await {
                Ok(member) => break member,
                // The last task of the member that was stopped has its listener still.
                Err(StartError::Listen { .. }) if tokio::time::Instant::now() < end => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("member {id} does not start: {error:?}"),
            }
        };
        self.adopt(id, member);
    }

    /// Takes in a member that was started elsewhere.
    pub(crate) fn adopt(&mut self, id: u64, member: Consensus) {
        self.addresses.insert(id, member.raft_addr());
        self.members.insert(id, member);
    }

    pub(crate) fn node(&self, id: u64) -> MemberNode {
        MemberNode { raft_addr: self.addresses[&id].to_string(), api_addr: format!("127.0.0.1:{id}") }
    }

    pub(crate) async fn stop(&mut self, id: u64) {
        let member = self.members.remove(&id).unwrap();
        member.shutdown().await;
    }

    /// Waits until the files of a member that was stopped are closed: the last task of its core lets go of them a little
    /// later than the core ends, and writes beside them what it knows of them. Nobody may have a handle of it any more.
    pub(crate) async fn closed(&self, id: u64) {
        for name in ["log.redb", "state.redb"] {
            let Ok(file) = std::fs::File::open(self.path(id).join(name)) else { continue };
            self.until("a stopped member to close its files", || file.try_lock_shared().ok()).await;
        }
    }

    pub(crate) async fn stop_all(&mut self) {
        for id in self.members.keys().copied().collect::<Vec<_>>() {
            self.stop(id).await;
        }
    }

    /// Waits until the living members agree on a leader among them.
    pub(crate) async fn leader(&self) -> u64 {
        self.until("a leader", || {
            let leaders: Vec<_> = self.members.values().map(|member| member.status().leader).collect();
            let leader = leaders[0]?;
            (leaders.iter().all(|other| *other == Some(leader)) && self.members.contains_key(&leader.0))
                .then_some(leader.0)
        })
        .await
    }

    /// Somebody who does not lead.
    pub(crate) async fn follower(&self) -> u64 {
        let leader = self.leader().await;
        *self.members.keys().find(|id| **id != leader).unwrap()
    }

    pub(crate) async fn until<T>(&self, what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            if let Some(found) = found() {
                return found;
            }
            assert!(tokio::time::Instant::now() < end, "gave up waiting for {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn proposal(&self, command: Command) -> Proposal {
        let number = self.requests.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Proposal {
            context: Context {
                actor: Actor::Operator(self.operator),
                actor_org: None,
                source: None,
                request_id: RequestId::from_bits(u128::from(number)),
                idempotency_key: Some(format!("request-{number}")),
                now: Timestamp(1_700_000_000_000 + number),
                entropy: u128::from(number) << 64,
            },
            command,
        }
    }

    fn init(&self) -> Proposal {
        let operator = NewToken {
            name: "operator".parse().unwrap(),
            digest: Digest::of(b"operator"),
            kind: TokenKind::Operator,
            scopes: Scope::ALL.iter().copied().collect(),
            ttl_ms: 3_600_000,
        };
        let new = NewCluster {
            cluster: holdfast_model::ClusterId::from_bits(1),
            incarnation: Incarnation(1),
            member: NewMember {
                name: "member-1".parse().unwrap(),
                raft_addr: self.node(1).raft_addr,
                api_addr: self.node(1).api_addr,
            },
            operator,
        };
        self.proposal(new.at(self.version_max))
    }

    /// A write that is accepted the first time and any time it is repeated.
    pub(crate) fn write(&self, name: &str) -> Proposal {
        self.proposal(Command::CreateOrg { name: name.parse().unwrap() })
    }

    pub(crate) async fn propose(&self, at: u64, proposal: Proposal) -> Revision {
        self.members[&at].propose(proposal).await.unwrap().unwrap().revision
    }

    /// Any living member.
    pub(crate) fn someone(&self) -> u64 {
        *self.members.keys().next().unwrap()
    }

    /// Waits until all members have applied the same entries, and compares their states.
    pub(crate) async fn same_everywhere(&self) {
        self.until("the same state on every member", || {
            let mut states = self.members.values().map(|member| {
                let store = member.store();
                (store.applied(), store.digest())
            });
            let first = states.next()?;
            states.all(|other| other == first).then_some(())
        })
        .await;
        for (id, member) in &self.members {
            assert!(member.status().healthy, "member {id} does not serve");
            member.store().verify().unwrap();
        }
    }

    pub(crate) fn revision(&self, id: u64) -> Revision {
        self.members[&id].store().revision()
    }
}

/// An error with everything behind it.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
