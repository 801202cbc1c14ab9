//! What this member answers to other members.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use holdfast_model::Digest;
use holdfast_store::Store;
#[cfg(feature = "planted-bugs")]
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{Fatal, ForwardToLeader, LinearizableReadError, RaftError};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use openraft::{Raft, ReadPolicy};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::timeout;

use crate::batches::Batches;
use crate::divergence;
use crate::health::{Fault, Health};
use crate::log_store::LogStore;
use crate::lost_memory::{self, Remembered};
use crate::membership;
use crate::snapshot_file::SnapshotFolder;
use crate::snapshot_receiver::SnapshotReceiver;
use crate::snapshot_source::SnapshotGiver;
use crate::state_machine::StateMachine;
use crate::transport::message::{Refusal, Request, Response};
use crate::transport::server::Service;
use crate::types::{LogId, TypeConfig};

/// openraft with our state machine.
pub(crate) type MemberRaft = Raft<TypeConfig, StateMachine>;

/// How long the leader waits for a majority to confirm that it leads.
const READ_INDEX_DEADLINE: Duration = Duration::from_secs(3);
/// How long the application may take for a message.
const APP_DEADLINE: Duration = Duration::from_secs(10);
/// Messages of the layers above that may be answered at once; more are refused, for they may be sent again.
const APP_IN_FLIGHT_MAX: usize = 512;

/// Answers messages of the layers above: the sender, its bytes, the answer.
pub type AppHandler =
    Arc<dyn Fn(holdfast_model::MemberId, Vec<u8>) -> BoxFuture<'static, Vec<u8>> + Send + Sync>;

/// The answering side of this member.
pub(crate) struct MemberService {
    raft: OnceLock<MemberRaft>,
    health: Arc<Health>,
    log: LogStore,
    store: Arc<Store>,
    giver: SnapshotGiver,
    receiver: SnapshotReceiver,
    former_members: watch::Receiver<BTreeSet<u64>>,
    /// What becomes an entry of the log when this member leads.
    pub(crate) entries: Arc<Batches>,
    app: RwLock<Option<AppHandler>>,
    app_places: Semaphore,
    /// Where to say that another member found this one to be different.
    accused: mpsc::Sender<u64>,
}

impl MemberService {
    pub(crate) fn new(
        health: Arc<Health>,
        log: LogStore,
        store: Arc<Store>,
        folder: SnapshotFolder,
        former_members: watch::Receiver<BTreeSet<u64>>,
        accused: mpsc::Sender<u64>,
    ) -> Arc<Self> {
        Arc::new(MemberService {
            raft: OnceLock::new(),
            health,
            log,
            store,
            giver: SnapshotGiver::new(folder.clone()),
            receiver: SnapshotReceiver::new(folder),
            former_members,
            entries: Arc::default(),
            app: RwLock::new(None),
            app_places: Semaphore::new(APP_IN_FLIGHT_MAX),
            accused,
        })
    }

    /// From now on answers with this core.
    pub(crate) fn attach(&self, raft: MemberRaft) {
        drop(self.raft.set(raft));
    }

    /// From now on answers messages of the layers above with `handler`.
    pub(crate) fn set_app_handler(&self, handler: AppHandler) {
        if let Ok(mut app) = self.app.write() {
            *app = Some(handler);
        }
    }

    /// Lets go of that handler: it may hold whoever holds this member, and the member's files would never be closed.
    pub(crate) fn forget_app_handler(&self) {
        if let Ok(mut app) = self.app.write() {
            *app = None;
        }
    }

    fn core(&self) -> Result<&MemberRaft, Refusal> {
        if let Some(fault) = self.health.fault() {
            return Err(Refusal::Unavailable(fault.to_string()));
        }
        self.raft.get().ok_or_else(|| Refusal::Unavailable("it is starting".to_owned()))
    }

    async fn answer(&self, peer: u64, request: Request) -> Result<Response, Refusal> {
        // Before everything else: a removed member must neither disturb elections nor count for anything.
        if self.former_members.borrow().contains(&peer) {
            return Err(Refusal::Removed);
        }
        // A diverged member still tells its digests, so that the others can be sure.
        if let Request::DigestAt { index } = request {
            return Ok(Response::Digest(
                divergence::recorded_at(&self.store, index).await.map(|digest| digest.0),
            ));
        }
        let raft = self.core()?;
        let stopped = |error: RaftError<TypeConfig>| Refusal::Unavailable(error.to_string());
        match request {
            Request::Append(rpc) => Ok(Response::Append(raft.append_entries(rpc).await.map_err(stopped)?)),
            Request::Vote(rpc) => Ok(Response::Vote(raft.vote(rpc).await.map_err(stopped)?)),
            Request::PreVote(rpc) => Ok(Response::Vote(raft.pre_vote(rpc).await.map_err(stopped)?)),
            Request::TransferLeader(rpc) => {
                Ok(Response::TransferLeader(raft.handle_transfer_leader(rpc).await.map_err(unavailable)?))
            }
            Request::Forward(command) => Ok(Response::Outcome(self.propose_one(command).await?)),
            Request::ForwardAll(commands) => Ok(Response::Outcomes(self.propose_all(commands).await?)),
            Request::ReadIndex => Ok(Response::ReadIndex(read_index(raft).await?)),
            Request::Admin(change) => {
                let former = self.former_members.borrow().clone();
                membership::change(raft, &former, change).await.map(|()| Response::Done)
            }
            Request::App(message) => self.answer_app(peer, message).await,
            Request::SnapshotBegin(offer) => self.receiver.begin(offer).await,
            Request::SnapshotChunk { digest, offset, data } => {
                self.receiver.chunk(digest, offset, data).await
            }
            Request::SnapshotEnd { digest, vote } => self.receiver.end(raft, digest, vote).await,
            Request::Diverged { index, expected } => {
                let own = divergence::recorded_at(&self.store, index).await;
                if own.is_some_and(|own| own != Digest(expected)) {
                    // Being looked into already when the queue is full.
                    let _ = self.accused.try_send(index);
                }
                Ok(Response::Done)
            }
            Request::Remembered => Ok(Response::Remembered(lost_memory::of(raft, peer))),
            Request::WentBack(remembered) => {
                self.check_memory(remembered)?;
                Ok(Response::Done)
            }
            Request::SnapshotWanted { at_least } => match self.giver.offer(at_least).await? {
                Some(offer) => Ok(Response::SnapshotOffered(offer)),
                None => {
                    raft.trigger().snapshot().await.map_err(unavailable)?;
                    Err(Refusal::Unavailable("a new snapshot is being made".to_owned()))
                }
            },
            Request::SnapshotPart { digest, offset } => {
                Ok(Response::SnapshotData(self.giver.part(digest, offset).await?))
            }
            Request::DigestAt { .. } => Err(Refusal::Invalid("answered above".to_owned())),
        }
    }

    /// Another member says that this one lost what it acknowledged. Believed only when the log here says so too.
    fn check_memory(&self, remembered: Remembered) -> Result<(), Refusal> {
        let ends = self.log.ends().map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let (vote, next) = (ends.0, ends.1.map_or(0, |last| last.index() + 1));
        if lost_memory::went_back(vote.as_ref(), next, remembered) {
            let (acknowledged, has) = (remembered.next.saturating_sub(1), next.saturating_sub(1));
            self.health.fail(Fault::WentBack { acknowledged, has });
        }
        Ok(())
    }

    async fn answer_app(&self, peer: u64, message: Bytes) -> Result<Response, Refusal> {
        let busy = || Refusal::Unavailable("it has too many messages to answer".to_owned());
        let _place = self.app_places.try_acquire().map_err(|_| busy())?;
        let handler = self.app.read().ok().and_then(|app| app.clone());
        let handler = handler.ok_or_else(|| Refusal::Unavailable("its API is not running yet".to_owned()))?;
        let answer = timeout(APP_DEADLINE, handler(holdfast_model::MemberId(peer), message.into()));
        match answer.await {
            Ok(answer) => Ok(Response::App(answer.into())),
            Err(_elapsed) => Err(Refusal::Unknown("its API did not answer in time".to_owned())),
        }
    }
}

pub(crate) fn unavailable(error: Fatal<TypeConfig>) -> Refusal {
    Refusal::Unavailable(error.to_string())
}

pub(crate) fn not_leader(forward: &ForwardToLeader<TypeConfig>) -> Refusal {
    Refusal::NotLeader { leader: forward.leader_id }
}

/// Asks a majority whether this member still leads, and says up to where a linearizable read must have applied.
pub(crate) async fn read_index(raft: &MemberRaft) -> Result<LogId, Refusal> {
    #[cfg(feature = "planted-bugs")]
    if crate::planted::is(crate::planted::Bug::ReadWithoutCheck) {
        let last_applied = raft.metrics().borrow_watched().last_applied;
        if raft.is_leader()
            && let Some(applied) = last_applied
        {
            return Ok(applied);
        }
    }
    match timeout(READ_INDEX_DEADLINE, raft.get_read_log_id(ReadPolicy::ReadIndex)).await {
        Ok(Ok((read, _applied))) => Ok(*read.log_id()),
        Ok(Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward)))) => {
            Err(not_leader(&forward))
        }
        Ok(Err(error)) => Err(Refusal::Unavailable(error.to_string())),
        Err(_elapsed) => Err(Refusal::Unavailable("a majority did not answer in time".to_owned())),
    }
}

impl Service for MemberService {
    fn call(self: Arc<Self>, peer: u64, request: Request) -> BoxFuture<'static, Response> {
        Box::pin(async move { self.answer(peer, request).await.unwrap_or_else(Response::Refused) })
    }

    fn append_stream(
        self: Arc<Self>,
        peer: u64,
        requests: mpsc::Receiver<AppendEntriesRequest<TypeConfig>>,
    ) -> BoxStream<'static, Result<StreamAppendResult<TypeConfig>, Refusal>> {
        let raft = match self.core() {
            Ok(_) if self.former_members.borrow().contains(&peer) => {
                return futures::stream::iter([Err(Refusal::Removed)]).boxed();
            }
            Ok(raft) => raft.clone(),
            Err(refusal) => return futures::stream::iter([Err(refusal)]).boxed(),
        };
        let requests = futures::stream::unfold(requests, |mut requests| async move {
            requests.recv().await.map(|request| (request, requests))
        });
        raft.stream_append(requests).map(|answer| answer.map_err(unavailable)).boxed()
    }
}
