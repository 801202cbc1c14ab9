//! The member as the rest of the server sees it: propose, read, watch, change the membership.
//!
//! Any member takes any request. What only the leader can do is sent to it, and sent again as long as that is safe:
//! always when nothing was done, and for a proposal also when nobody knows, because the state machine recognises a
//! request that it has already carried out (I4).

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use holdfast_model::{
    Actor, Command, Context, Digest, MemberId, Outcome, Proposal, RequestId, Revision, SupportedVersions,
    Timestamp,
};
use holdfast_store::{Replayed, Store, StoreError, Verified};
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use rand::RngExt;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::batches::Batches;
use crate::cluster_version;
use crate::config::ConsensusConfig;
use crate::disk_work;
use crate::divergence;
use crate::error::{ConsensusError, StartError};
use crate::health::{Fault, Health};
use crate::log_store::LogStore;
use crate::member_identity::MemberIdentity;
use crate::membership::{self, CHANGE_DEADLINE};
use crate::network::Channels;
use crate::reads::ReadRounds;
use crate::service::{self, AppHandler, MemberRaft, MemberService};
use crate::start;
use crate::transport::channel::CallError;
use crate::transport::link::Link;
use crate::transport::message::{AdminRequest, Purpose, Refusal, Request, Response};
use crate::transport::server::Service;
use crate::types::{LogId, MemberNode};

/// How often a request is tried.
pub(crate) const PROPOSE_ATTEMPTS_MAX: u32 = 64;
/// How long a linearizable read may take.
const READ_DEADLINE: Duration = Duration::from_secs(10);
/// How long one question for the read index may take.
const READ_INDEX_DEADLINE: Duration = Duration::from_secs(4);
/// How long a message to another member's API may take.
const APP_DEADLINE: Duration = Duration::from_secs(12);
/// The pause before the first repetition of a request; doubles up to [`RETRY_PAUSE_MAX`].
const RETRY_PAUSE_FIRST: Duration = Duration::from_millis(10);
/// The longest pause between repetitions.
const RETRY_PAUSE_MAX: Duration = Duration::from_millis(250);
/// Proposals of this member that may be under way.
pub(crate) const PROPOSALS_IN_FLIGHT_MAX: usize = 16_384;
/// How long an orderly end may take before what is left is left to the next start.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(10);

/// A running member.
#[derive(Clone)]
pub struct Consensus {
    pub(crate) inner: Arc<Inner>,
}

/// What the handles share.
pub(crate) struct Inner {
    pub(crate) id: u64,
    pub(crate) identity: MemberIdentity,
    pub(crate) raft: MemberRaft,
    pub(crate) store: Arc<Store>,
    pub(crate) log: LogStore,
    pub(crate) channels: Arc<Channels>,
    pub(crate) service: Arc<MemberService>,
    pub(crate) health: Arc<Health>,
    pub(crate) revision: watch::Receiver<Revision>,
    pub(crate) applied_next: watch::Receiver<u64>,
    pub(crate) leader: watch::Receiver<Option<MemberId>>,
    pub(crate) reads: Arc<ReadRounds>,
    pub(crate) proposals: Semaphore,
    /// Proposals that become entries of the log when this member leads.
    pub(crate) entries: Arc<Batches>,
    /// Proposals that go to the leader when this member does not.
    pub(crate) forwards: Arc<Batches>,
    /// One permit: a verification reads everything.
    pub(crate) verifying: Semaphore,
    pub(crate) stop: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) raft_addr: std::net::SocketAddr,
}

/// What a member stands on when it is not files and TLS.
pub struct Parts {
    /// The network.
    pub link: Arc<dyn Link>,
    /// What this member says its Raft listener is.
    pub raft_addr: std::net::SocketAddr,
    /// Its log.
    pub log: LogStore,
    /// Its state.
    pub store: Arc<Store>,
}

/// Which part a member has in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberState {
    /// It decides the order of the log.
    Leader,
    /// It follows the leader and votes.
    Follower,
    /// It stands for election.
    Candidate,
    /// It follows the leader and does not vote.
    Learner,
    /// It is stopping.
    ShuttingDown,
}

/// How a member stands.
#[derive(Clone, Debug)]
pub struct RaftStatus {
    /// This member.
    pub id: MemberId,
    /// The leader, as far as this member knows.
    pub leader: Option<MemberId>,
    /// The term.
    pub term: u64,
    /// This member's part.
    pub state: MemberState,
    /// Index of the last entry in this member's log.
    pub last_log: Option<u64>,
    /// Index of the last entry that this member applied.
    pub last_applied: Option<u64>,
    /// Index through which the newest snapshot goes.
    pub snapshot: Option<u64>,
    /// Index through which the log was purged.
    pub purged: Option<u64>,
    /// Those who vote, in every configuration that is in force.
    pub voters: Vec<(MemberId, MemberNode)>,
    /// Those who do not.
    pub learners: Vec<(MemberId, MemberNode)>,
    /// Whether this member may serve.
    pub healthy: bool,
    /// Why it may not.
    pub fault: Option<Fault>,
}

impl Consensus {
    /// Makes a data folder a member's, once: at `server init` and `server join`. Safe to repeat after a crash in between.
    pub fn prepare(data_dir: &Path, identity: &MemberIdentity) -> Result<(), StartError> {
        start::prepare(data_dir, identity)
    }

    /// Whose a data folder is. `None` when it was never prepared.
    pub fn identity_of(data_dir: &Path) -> Result<Option<MemberIdentity>, StartError> {
        Ok(crate::member_identity::read(data_dir)?)
    }

    /// Starts the member of a prepared data folder. It takes part in its group as soon as this returns; a new one waits
    /// for [`Consensus::bootstrap`] or for a leader to add it.
    pub async fn start(config: ConsensusConfig) -> Result<Self, StartError> {
        start::start(config).await
    }

    /// Starts a member on parts of the caller's, such as a simulation's. The log and the state must be this member's;
    /// `config.data_dir` holds its snapshots only.
    pub async fn start_on(config: ConsensusConfig, parts: Parts) -> Result<Self, StartError> {
        start::start_on_parts(config, parts).await
    }

    /// Opens the state of [`Parts`], which lies elsewhere than in the data folder. `open` is told whether the state that is
    /// there was given up, and makes an empty one then; the start fills it.
    pub fn open_state(
        data_dir: &Path,
        log: &LogStore,
        open: impl FnMut(bool) -> Result<Store, StoreError>,
    ) -> Result<Store, StartError> {
        start::open_state(data_dir, log, open)
    }

    /// Term and index of the last entry in a stopped member's log. Of several survivors, the one with the highest term,
    /// and then index, has most.
    pub fn log_end(data_dir: &Path) -> Result<Option<(u64, u64)>, StartError> {
        crate::recovery::log_end(data_dir)
    }

    /// Makes the member of a stopped member's folder the only one of its cluster, in the next incarnation, after the
    /// others were lost for good. `command` makes the proposal that says so in the history. What only the lost members
    /// had is lost; if they are not lost after all, there are two clusters. Blocks on disk; safe to repeat.
    pub fn recover(
        data_dir: &Path,
        node: MemberNode,
        command: impl FnOnce(&MemberIdentity) -> Proposal,
    ) -> Result<crate::recovery::Recovered, StartError> {
        crate::recovery::recover(data_dir, node, command)
    }

    /// Makes this member the first and only voter of a new cluster. Safe to repeat.
    pub async fn bootstrap(&self, node: MemberNode) -> Result<(), StartError> {
        let id = self.inner.id;
        let members = std::collections::BTreeMap::from([(id, node.clone())]);
        match self.inner.raft.initialize(members).await {
            Ok(()) => Ok(()),
            Err(openraft::errors::RaftError::Fatal(error)) => Err(StartError::Core(error.into())),
            Err(openraft::errors::RaftError::APIError(_)) => {
                let membership = membership::current(&self.inner.raft);
                let same = membership.nodes().count() == 1 && membership.get_node(&id) == Some(&node);
                if same { Ok(()) } else { Err(StartError::AlreadyBootstrapped) }
            }
        }
    }

    /// Has a proposal stored by a majority, applied, and answered. Any member may be asked.
    ///
    /// Repeats the proposal through leader changes, which is safe because its context names the request.
    pub async fn propose(&self, proposal: Proposal) -> Result<Outcome, ConsensusError> {
        self.inner.propose(&proposal).await
    }

    /// The same by this member alone, while it leads: what it concludes from what *it* heard must not reach the log
    /// through another leader, who has not listened as long (I7). Tried once.
    pub async fn propose_as_leader(&self, proposal: Proposal) -> Result<Outcome, ConsensusError> {
        self.inner.propose_as_leader(&proposal).await
    }

    /// Returns when this member's state has everything that was acknowledged, anywhere, before the call (I3).
    pub async fn linearize(&self) -> Result<(), ConsensusError> {
        let inner = self.inner.clone();
        inner.serving()?;
        let until = Instant::now() + READ_DEADLINE;
        let asking = inner.clone();
        let round = inner.reads.join(move || {
            let inner = asking.clone();
            async move { inner.read_index(until).await }
        });
        let read = timeout_at(until, round).await.map_err(|_| ConsensusError::NoLeader)??;
        let mut applied_next = inner.applied_next.clone();
        let waited = timeout_at(until, applied_next.wait_for(|next| *next > read.index())).await;
        match waited {
            Ok(Ok(_)) => inner.serving(),
            Ok(Err(_)) => Err(ConsensusError::ShuttingDown),
            Err(_elapsed) => Err(ConsensusError::NoLeader),
        }
    }

    /// The state.
    pub fn store(&self) -> &Arc<Store> {
        &self.inner.store
    }

    /// The revision of this member's state, as it rises.
    pub fn revisions(&self) -> watch::Receiver<Revision> {
        self.inner.revision.clone()
    }

    /// The leader, as it changes. `None` while this member knows of none.
    pub fn leader_changes(&self) -> watch::Receiver<Option<MemberId>> {
        self.inner.leader.clone()
    }

    /// Whether this member believes to lead. For choosing who does background work, never for reads or writes.
    pub fn is_leader(&self) -> bool {
        self.inner.leads()
    }

    /// The cluster versions that a member supports, by its own word of just now; `None` when it does not answer.
    pub async fn supported_by(&self, member: MemberId) -> Option<SupportedVersions> {
        cluster_version::supported_by(&self.inner, member).await
    }

    /// This member's cluster, id and incarnation.
    pub fn identity(&self) -> &MemberIdentity {
        &self.inner.identity
    }

    /// Where members are listened for: the port is known here even when 0 was asked for.
    pub fn raft_addr(&self) -> std::net::SocketAddr {
        self.inner.raft_addr
    }

    /// How this member stands.
    pub fn status(&self) -> RaftStatus {
        let metrics = self.inner.raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let with_node = |id: u64| (MemberId(id), membership.get_node(&id).cloned().unwrap_or_default());
        let fault = self.inner.health.fault().cloned();
        RaftStatus {
            id: MemberId(self.inner.id),
            leader: metrics.current_leader.map(MemberId),
            term: metrics.current_term,
            state: match metrics.state {
                ServerState::Leader => MemberState::Leader,
                ServerState::Follower => MemberState::Follower,
                ServerState::Candidate => MemberState::Candidate,
                ServerState::Learner => MemberState::Learner,
                ServerState::Shutdown => MemberState::ShuttingDown,
            },
            last_log: metrics.last_log_index,
            // Not openraft's own figure: it counts an entry as applied once it was handed over.
            last_applied: self.inner.applied_next.borrow().checked_sub(1),
            snapshot: metrics.snapshot.as_ref().map(|last| last.index()),
            purged: metrics.purged.as_ref().map(|last| last.index()),
            voters: membership::settled_voters(membership).into_iter().map(with_node).collect(),
            learners: membership.learner_ids().map(with_node).collect(),
            healthy: fault.is_none() && metrics.running_state.is_ok(),
            fault,
        }
    }

    /// Adds a member that receives the log and does not vote. Its id must never have been another member's.
    pub async fn add_learner(&self, id: MemberId, node: MemberNode) -> Result<(), ConsensusError> {
        self.inner.administer(AdminRequest::AddLearner { id: id.0, node }).await
    }

    /// Makes a learner a voter, once it has nearly the whole log.
    pub async fn promote(&self, id: MemberId) -> Result<(), ConsensusError> {
        self.inner.administer(AdminRequest::Promote { id: id.0 }).await
    }

    /// Makes a voter a learner.
    pub async fn demote(&self, id: MemberId) -> Result<(), ConsensusError> {
        self.inner.administer(AdminRequest::Demote { id: id.0 }).await
    }

    /// Removes a member for good.
    pub async fn remove(&self, id: MemberId) -> Result<(), ConsensusError> {
        self.inner.administer(AdminRequest::Remove { id: id.0 }).await
    }

    /// Hands the leadership to a voter.
    pub async fn transfer_leader(&self, to: MemberId) -> Result<(), ConsensusError> {
        self.inner.administer(AdminRequest::TransferLeader { to: to.0 }).await
    }

    /// Sends a message to the API of a member, this one included, and waits for its answer. The message may have been
    /// handled although this returns an error.
    pub async fn app_to(&self, member: MemberId, message: Vec<u8>) -> Result<Vec<u8>, ConsensusError> {
        self.inner.serving()?;
        match self.inner.ask(member.0, Purpose::App, Request::App(message.into()), APP_DEADLINE).await? {
            Response::App(answer) => Ok(answer.into()),
            _ => Err(ConsensusError::Unreachable(member)),
        }
    }

    /// The same to whoever leads.
    pub async fn app_to_leader(&self, message: Vec<u8>) -> Result<Vec<u8>, ConsensusError> {
        let leader = *self.inner.leader.borrow();
        self.app_to(leader.ok_or(ConsensusError::NoLeader)?, message).await
    }

    /// Who answers the messages of other members' APIs.
    pub fn set_app_handler(&self, handler: AppHandler) {
        self.inner.service.set_app_handler(handler);
    }

    /// Makes a snapshot now, beside those that are made by themselves.
    pub async fn snapshot(&self) -> Result<(), ConsensusError> {
        self.inner.raft.trigger().snapshot().await.map_err(|_| ConsensusError::ShuttingDown)
    }

    /// Compares the members' states now, beside the comparisons that happen by themselves. Only the leader can.
    pub async fn compare_states(&self) -> Result<(), ConsensusError> {
        self.inner.serving()?;
        divergence::propose_check(&self.inner).await.map_err(|_| ConsensusError::NoLeader)
    }

    /// Reads every row and event of this member's state again and replays the history, once it has reached `at`; tells
    /// also the digest of the views there, by which members are compared. A state that contradicts itself stops the
    /// member for good (I1). One verification runs at a time.
    pub async fn verify(&self, at: Revision) -> Result<(Verified, Digest), ConsensusError> {
        self.examine(at, move |store| store.verify_at(at)).await
    }

    /// Replays the events of this member's state up to `to`, once it has reached it, and tells what they lead to; changes
    /// nothing (I13). It or a verification runs at a time.
    pub async fn replay_to(&self, to: Revision) -> Result<Replayed, ConsensusError> {
        self.examine(to, move |store| store.replayed(to)).await
    }

    /// Does one long piece of reading of the state once it has reached a revision.
    async fn examine<T: Send + 'static>(
        &self,
        at: Revision,
        read: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ConsensusError> {
        self.inner.serving()?;
        let _one = self.inner.verifying.try_acquire().map_err(|_| ConsensusError::Busy)?;
        let mut revision = self.revisions();
        let reached = timeout_at(Instant::now() + READ_DEADLINE, revision.wait_for(|now| *now >= at));
        if !matches!(reached.await, Ok(Ok(_))) {
            return Err(ConsensusError::NoLeader);
        }
        let store = self.inner.store.clone();
        match crate::disk_work::run(move || read(&store)).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(error)) => {
                let fault = Fault::Damaged(crate::network::chain(&error));
                if matches!(error, StoreError::Corrupt { .. } | StoreError::Decode { .. }) {
                    self.inner.health.fail(fault.clone());
                }
                Err(ConsensusError::Stopped(fault))
            }
            Err(error) => Err(ConsensusError::Invalid(error.to_string())),
        }
    }

    /// How many fsyncs the log made since the start.
    pub fn log_commits(&self) -> u64 {
        self.inner.log.commits()
    }

    /// Resolves when this member may not serve any more, with the reason.
    pub async fn failed(&self) -> Fault {
        self.inner.health.failed().await;
        self.inner.health.fault().cloned().unwrap_or_else(|| Fault::Core("unknown".to_owned()))
    }

    /// Ends the member in order: nobody is answered any more, and what is stored is made durable. The files are closed when
    /// the last of those that hold the member let go of it; a process that ends before leaves them as a crash would.
    pub async fn shutdown(&self) {
        let inner = &self.inner;
        let until = Instant::now() + SHUTDOWN_DEADLINE;
        inner.stop.cancel();
        inner.tasks.close();
        // The checkpoint is worth having and not needed: the log replays what the state lacks.
        if inner.health.fault().is_none() {
            let store = inner.store.clone();
            let durable = timeout_at(until, async {
                inner.log.flush().await?;
                disk_work::run(move || store.checkpoint()).await
            });
            match durable.await {
                Ok(Ok(Ok(_))) => {}
                _ => tracing::warn!(
                    "the state was not made durable at the end; the next start replays the log"
                ),
            }
        }
        let stopped = timeout_at(until, async {
            if let Err(error) = inner.raft.shutdown().await {
                tracing::warn!(%error, "the consensus core ended badly");
            }
            inner.tasks.wait().await;
        });
        if stopped.await.is_err() {
            tracing::warn!("the member did not end in time; its process should");
        }
        inner.service.forget_app_handler();
    }
}

impl Inner {
    /// Whether this member believes to lead and may.
    pub(crate) fn leads(&self) -> bool {
        self.health.fault().is_none() && self.raft.is_leader()
    }

    /// A proposal of this member's own clockwork.
    pub(crate) fn clockwork_proposal(&self, command: Command) -> Proposal {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let context = Context {
            actor: Actor::System(MemberId(self.id)),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(rand::rng().random()),
            idempotency_key: None,
            now: Timestamp(since_epoch.map_or(0, |now| now.as_millis() as u64)),
            entropy: rand::rng().random(),
        };
        Proposal { context, command }
    }

    /// An error when this member may not serve.
    pub(crate) fn serving(&self) -> Result<(), ConsensusError> {
        if let Some(fault) = self.health.fault() {
            return Err(ConsensusError::Stopped(fault.clone()));
        }
        if self.stop.is_cancelled() {
            return Err(ConsensusError::ShuttingDown);
        }
        Ok(())
    }

    /// One read index, from the leader, whoever that is.
    async fn read_index(&self, until: Instant) -> Result<LogId, ConsensusError> {
        for attempt in 0..PROPOSE_ATTEMPTS_MAX {
            let asked = match self.leader_now() {
                None => Err(Refusal::NotLeader { leader: None }),
                Some(leader) if leader == self.id => service::read_index(&self.raft).await,
                Some(leader) => self
                    .call_leader(leader, Request::ReadIndex, READ_INDEX_DEADLINE)
                    .await
                    .and_then(|response| match response {
                        Response::ReadIndex(read) => Ok(read),
                        _ => Err(Refusal::Unavailable("the answer is to another question".to_owned())),
                    }),
            };
            if let Ok(read) = asked {
                return Ok(read);
            }
            self.serving()?;
            if !self.pause(attempt, until).await {
                break;
            }
        }
        Err(ConsensusError::NoLeader)
    }

    /// Has a change of the membership made by the leader.
    async fn administer(&self, request: AdminRequest) -> Result<(), ConsensusError> {
        self.serving()?;
        let until = Instant::now() + CHANGE_DEADLINE;
        for attempt in 0..PROPOSE_ATTEMPTS_MAX {
            let asked = match self.leader_now() {
                None => Err(Refusal::NotLeader { leader: None }),
                Some(leader) if leader == self.id => {
                    match self.service.clone().call(leader, Request::Admin(request.clone())).await {
                        Response::Refused(refusal) => Err(refusal),
                        _ => Ok(()),
                    }
                }
                Some(leader) => {
                    let admin = Request::Admin(request.clone());
                    self.call_leader(leader, admin, CHANGE_DEADLINE).await.map(drop)
                }
            };
            match asked {
                Ok(()) => return Ok(()),
                Err(Refusal::Invalid(reason)) => return Err(ConsensusError::Invalid(reason)),
                Err(Refusal::Unknown(_)) if Instant::now() >= until => return Err(ConsensusError::Unknown),
                Err(_) => {}
            }
            self.serving()?;
            if !self.pause(attempt, until).await {
                break;
            }
        }
        Err(ConsensusError::NoLeader)
    }

    pub(crate) fn leader_now(&self) -> Option<u64> {
        self.raft.metrics().borrow_watched().current_leader
    }

    /// Asks the leader, and stops waiting when another one is known: a leader that fell silent must not keep its
    /// requests for as long as a time-out lasts.
    pub(crate) async fn call_leader(
        &self,
        leader: u64,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, Refusal> {
        let mut known = self.leader.clone();
        tokio::select! {
            answer = self.call(leader, Purpose::Control, request, deadline) => answer,
            Ok(_) = known.wait_for(|now| now.is_some_and(|now| now.0 != leader)) => {
                Err(Refusal::Unknown("the leader changed".to_owned()))
            }
        }
    }

    /// Asks a member. The refusal says whether anything may have been done.
    async fn call(
        &self,
        member: u64,
        purpose: Purpose,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, Refusal> {
        let Some(node) = membership::node(&self.raft, member) else {
            return Err(Refusal::Unavailable(format!("the address of member {member} is not known")));
        };
        let channel = self.channels.to(member, &node.raft_addr, purpose);
        match channel.call(request, deadline).await {
            Ok(Response::Refused(Refusal::Removed)) => {
                self.health.fail(Fault::Removed);
                Err(Refusal::Removed)
            }
            Ok(Response::Refused(refusal)) => Err(refusal),
            Ok(response) => Ok(response),
            Err(error @ (CallError::Timeout { .. } | CallError::Broken { .. })) => {
                Err(Refusal::Unknown(error.to_string()))
            }
            Err(error @ CallError::Frame { .. }) => Err(Refusal::Invalid(crate::network::chain(&error))),
            Err(error) => Err(Refusal::Unavailable(crate::network::chain(&error))),
        }
    }

    /// Asks a member or this one itself, without repeating.
    async fn ask(
        &self,
        member: u64,
        purpose: Purpose,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, ConsensusError> {
        let answer = if member == self.id {
            match self.service.clone().call(self.id, request).await {
                Response::Refused(refusal) => Err(refusal),
                response => Ok(response),
            }
        } else {
            if membership::node(&self.raft, member).is_none() {
                return Err(ConsensusError::UnknownMember(MemberId(member)));
            }
            self.call(member, purpose, request, deadline).await
        };
        answer.map_err(|refusal| match refusal {
            Refusal::Invalid(reason) => ConsensusError::Invalid(reason),
            Refusal::NotLeader { .. } => ConsensusError::NoLeader,
            Refusal::Unavailable(_) | Refusal::Unknown(_) | Refusal::Removed => {
                ConsensusError::Unreachable(MemberId(member))
            }
        })
    }

    /// Waits before another attempt; ends early when the leader changes. False when there is no time for one.
    pub(crate) async fn pause(&self, attempt: u32, until: Instant) -> bool {
        let full = RETRY_PAUSE_FIRST.saturating_mul(1 << attempt.min(8)).min(RETRY_PAUSE_MAX);
        let pause = full.mul_f64(rand::rng().random_range(0.5..1.5));
        if Instant::now() + pause >= until {
            return false;
        }
        let mut leader = self.leader.clone();
        leader.mark_unchanged();
        tokio::select! {
            () = sleep(pause) => {}
            _ = leader.changed() => {}
            () = self.stop.cancelled() => return false,
        }
        true
    }
}
