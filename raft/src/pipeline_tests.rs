//! What only shows from inside: the order of the applier's work, what it does after a failure, and that a command which
//! this build cannot read spoils nobody else's.

use std::sync::Arc;

use futures::future::BoxFuture;
use holdfast_identity::{
    Authority, Credential, PrivateKey, Subject, mutual_client_config, mutual_server_config,
};
use holdfast_model::command::{NewCluster, NewMember, NewToken};
use holdfast_model::resource::TokenKind;
use holdfast_model::{
    Actor, ClusterId, ClusterVersion, Command, Context, Digest, Incarnation, MemberId, Proposal, RequestId,
    Revision, Scope, Timestamp,
};
use holdfast_store::Store;
use openraft::EntryPayload;
use openraft::async_runtime::watch::WatchReceiver;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};

use crate::applier::{Applier, Batch, Worker};
use crate::checkpoints::Checkpoints;
use crate::consensus::{Consensus, Parts};
use crate::error::ConsensusError;
use crate::health::{Fault, Health};
use crate::log_store::LogStore;
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::SnapshotFolder;
use crate::state_machine::Progress;
use crate::transport::message::{Refusal, Request, Response};
use crate::transport::server::Service;
use crate::types::{LeaderId, LogCommand, LogId};
use crate::{ConsensusConfig, Handshake, Link, LinkError, MemberIdentity, MemberNode, PeerStream, RaftTls};

/// An applier over a state of its own, and what it tells.
struct Applying {
    applier: Applier,
    store: Arc<Store>,
    folder: SnapshotFolder,
    applied_next: watch::Receiver<u64>,
    health: Arc<Health>,
    _disk: tempfile::TempDir,
}

impl Applying {
    fn start() -> Self {
        let disk = tempfile::tempdir().unwrap();
        let identity = MemberIdentity { cluster: "pipeline".into(), member: MemberId(1), incarnation: 1 };
        let log = LogStore::create(&disk.path().join("log.redb"), &identity).unwrap();
        let store = Arc::new(Store::open(&disk.path().join("state.redb")).unwrap());
        let folder = SnapshotFolder::open(&disk.path().join("snapshots")).unwrap();
        let (applied_sender, applied_next) = watch::channel(0);
        let health = Arc::new(Health::default());
        let worker = Worker {
            store: store.clone(),
            folder: folder.clone(),
            meta: RaftMeta::default(),
            progress: Progress {
                applied_next: applied_sender,
                revision: watch::channel(Revision(0)).0,
                former_members: watch::channel(Default::default()).0,
                mismatches: mpsc::channel(1).0,
            },
            checkpoints: Checkpoints::new(log, 0),
            health: health.clone(),
            failure: Arc::default(),
        };
        Applying {
            applier: Applier::start(worker).unwrap(),
            store,
            folder,
            applied_next,
            health,
            _disk: disk,
        }
    }
}

fn log_id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

fn one(index: u64, payload: EntryPayload<LogCommand, u64, MemberNode>) -> Batch {
    let mut batch = Batch::default();
    batch.push(log_id(index), payload, None);
    batch
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i01_what_was_handed_over_is_applied_before_a_snapshot_takes_its_place() {
    let (source, target) = (Applying::start(), Applying::start());
    for index in 0..100 {
        source.applier.apply(one(index, EntryPayload::Blank)).await.unwrap();
    }
    let meta = source.applier.settle().await.unwrap();
    assert_eq!(meta.next_index(), 100, "settled before everything was applied");
    let state = source.store.snapshot().unwrap();
    let snapshot = target.folder.build(&meta, |out| state.write_to(out).map(drop)).unwrap();

    for index in 0..60 {
        target.applier.apply(one(index, EntryPayload::Blank)).await.unwrap();
    }
    target.applier.install(meta.snapshot_meta(), snapshot).await.unwrap();
    assert_eq!(*target.applied_next.borrow(), 100);
    target.applier.apply(one(100, EntryPayload::Blank)).await.unwrap();
    assert_eq!(target.applier.settle().await.unwrap().next_index(), 101);
    // An entry of before, applied after the snapshot, would have been out of order.
    assert_eq!(target.health.fault(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i01_after_a_failure_nothing_more_is_applied_and_the_member_stops() {
    let applying = Applying::start();
    applying.applier.apply(one(0, EntryPayload::Blank)).await.unwrap();
    applying.applier.settle().await.unwrap();
    let unreadable = LogCommand::from_wire(vec![0xff; 40].into()).unwrap();
    applying.applier.apply(one(1, EntryPayload::Normal(unreadable))).await.unwrap();
    applying.health.failed().await;
    assert!(matches!(applying.health.fault(), Some(Fault::Core(_))), "{:?}", applying.health.fault());
    assert!(applying.applier.apply(one(2, EntryPayload::Blank)).await.is_err());
    assert!(applying.applier.settle().await.is_err());
    assert_eq!(*applying.applied_next.borrow(), 1, "something was applied after the failure");
}

/// The command that begins a cluster at a version.
fn begin(version: ClusterVersion) -> LogCommand {
    let operator = NewToken {
        name: "operator".parse().unwrap(),
        digest: Digest::of(b"operator"),
        kind: TokenKind::Operator,
        scopes: Scope::ALL.iter().copied().collect(),
        ttl_ms: 3_600_000,
    };
    let member = NewMember {
        name: "member-1".parse().unwrap(),
        raft_addr: "10.0.0.1:7000".to_owned(),
        api_addr: "10.0.0.1:8443".to_owned(),
    };
    let new = NewCluster { cluster: ClusterId::from_bits(1), incarnation: Incarnation(1), member, operator };
    LogCommand::encode(&Proposal { command: new.at(version), ..proposal(1) }).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i01_a_member_that_meets_a_newer_version_says_so_and_not_that_its_disk_failed() {
    let (source, newer) = (Applying::start(), begin(ClusterVersion::TWO));
    source.applier.apply(one(0, EntryPayload::Normal(newer.clone()))).await.unwrap();
    let meta = source.applier.settle().await.unwrap();
    let state = source.store.snapshot().unwrap();
    for by_snapshot in [false, true] {
        let limited = Applying::start();
        limited.store.support_up_to(ClusterVersion::ONE).unwrap();
        if by_snapshot {
            let snapshot = limited.folder.build(&meta, |out| state.write_to(out).map(drop)).unwrap();
            limited.applier.install(meta.snapshot_meta(), snapshot).await.unwrap_err();
        } else {
            limited.applier.apply(one(0, EntryPayload::Normal(newer.clone()))).await.unwrap();
        }
        limited.health.failed().await;
        let fault = limited.health.fault().unwrap();
        assert!(
            matches!(fault, Fault::Unsupported { version: ClusterVersion::TWO, .. }),
            "by snapshot: {by_snapshot}: {fault:?}"
        );
        let told = fault.to_string();
        assert!(told.contains("version 2") && told.contains("supports 1,"), "{told}");
    }
}

/// A network on which nobody is there.
pub(crate) struct Nobody;

impl Link for Nobody {
    fn dial<'a>(&'a self, _: u64, _: &'a str) -> BoxFuture<'a, Result<PeerStream, LinkError>> {
        Box::pin(async { Err(LinkError::Certificate) })
    }

    fn accept(&self) -> BoxFuture<'_, Result<Handshake, LinkError>> {
        Box::pin(std::future::pending())
    }
}

pub(crate) fn tls() -> Arc<RaftTls> {
    let authority = Authority::create("pipeline", SystemTime::now()).unwrap();
    let key = PrivateKey::generate().unwrap();
    let subject = Subject::Member { id: "1".into(), host_names: vec![], addresses: vec![] };
    let request = key.signing_request().unwrap();
    let issued = authority.issue(&request, &subject, Duration::from_secs(3600), SystemTime::now()).unwrap();
    let credential = Credential::new(key, &issued.chain_pem).unwrap();
    let ca = authority.certificate();
    let server = mutual_server_config(&credential, ca).unwrap();
    Arc::new(RaftTls::new("pipeline", server, mutual_client_config(&credential, ca).unwrap()))
}

pub(crate) fn proposal(number: u64) -> Proposal {
    Proposal {
        context: Context {
            actor: Actor::System(MemberId(1)),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(u128::from(number)),
            idempotency_key: Some(format!("request-{number}")),
            now: Timestamp(1_700_000_000_000 + number),
            entropy: u128::from(number),
        },
        command: Command::CreateOrg { name: format!("org-{number}").parse().unwrap() },
    }
}

/// A member that is alone and leads.
async fn alone(disk: &tempfile::TempDir) -> Consensus {
    let identity = MemberIdentity { cluster: "pipeline".into(), member: MemberId(1), incarnation: 1 };
    let path = disk.path().join("member");
    Consensus::prepare(&path, &identity).unwrap();
    let raft_addr = ([127, 0, 0, 1], 0).into();
    let parts = Parts {
        link: Arc::new(Nobody),
        raft_addr,
        log: LogStore::open(&path.join("log.redb")).unwrap(),
        store: Arc::new(Store::open(&path.join("state.redb")).unwrap()),
    };
    let config = ConsensusConfig::new(MemberId(1), path, raft_addr, tls());
    let member = Consensus::start_on(config, parts).await.unwrap();
    member.bootstrap(MemberNode::default()).await.unwrap();
    let mut leader = member.leader_changes();
    leader.wait_for(Option::is_some).await.unwrap();
    member
}

/// As seed 19085 of the simulation had it: told to hand over to somebody who never stands, and nobody else may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_handed_over_to_nobody_takes_writes_after_it_stepped_down() {
    let disk = tempfile::tempdir().unwrap();
    let member = alone(&disk).await;
    let raft = &member.inner.raft;
    let vote = raft.metrics().borrow_watched().vote;
    raft.trigger().transfer_leader(99).await.unwrap();
    let refused = member.propose_as_leader(proposal(1)).await;
    assert_eq!(refused, Err(ConsensusError::NoLeader));
    assert_eq!(raft.metrics().borrow_watched().vote, vote, "nothing ends its term by itself");
    crate::membership::step_down(raft, &vote, 99).await.unwrap();
    member.propose(proposal(2)).await.unwrap().unwrap_err();
    member.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forwarded_command_that_cannot_be_read_spoils_no_other() {
    let disk = tempfile::tempdir().unwrap();
    let member = alone(&disk).await;
    let poison = LogCommand::from_wire(vec![0xff; 40].into()).unwrap();
    let hidden = LogCommand::batch(vec![poison.clone(), poison.clone()]);
    let good = |number| LogCommand::encode(&proposal(number)).unwrap();
    let commands = vec![good(1), poison.clone(), good(2), hidden, good(3)];
    let answer = member.inner.service.clone().call(2, Request::ForwardAll(commands)).await;
    let Response::Outcomes(told) = answer else { panic!("another answer") };
    let carried_out: Vec<bool> = told.iter().map(Result::is_ok).collect();
    assert_eq!(carried_out, [true, false, true, false, true]);
    assert!(matches!(told[1], Err(Refusal::Invalid(_))));
    // What the others were told is their own: the state refuses this caller, each time in the same words.
    assert_eq!(told[0], Ok(member.propose(proposal(1)).await.unwrap()));
    assert_eq!(told[4], Ok(member.propose(proposal(3)).await.unwrap()));

    let answer = member.inner.service.clone().call(2, Request::ForwardAll(vec![poison])).await;
    assert!(matches!(answer, Response::Outcomes(told) if matches!(told[..], [Err(Refusal::Invalid(_))])));
    let many = vec![good(4); crate::batches::BATCH_COMMANDS_MAX + 1];
    let answer = member.inner.service.clone().call(2, Request::ForwardAll(many)).await;
    assert!(matches!(answer, Response::Refused(Refusal::Invalid(_))));
    assert!(member.status().healthy);
    member.shutdown().await;
}
