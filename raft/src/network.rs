//! openraft's view of the transport: one network per member and purpose, each over a channel of its own.
//!
//! Nothing here decides anything. It turns a call into a frame, a missing answer into the error that makes openraft wait
//! or retry as it should, and a snapshot file into chunks, one in memory at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult,
    TransferLeaderRequest, TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::storage::Snapshot;
use openraft::{OptionalSend, StorageError};
use tokio::time::Instant;

use crate::disk_work;
use crate::lost_memory::Acknowledged;
use crate::snapshot_file::SnapshotFile;
use crate::transport::channel::{CallError, Channel, LocalPeer};
use crate::transport::link::Link;
use crate::transport::message::{Purpose, Request, Response, SnapshotOffer};
use crate::types::{MemberNode, TypeConfig, Vote};
use crate::unanswered::Unanswered;

/// Bytes of a snapshot in one message.
pub(crate) const SNAPSHOT_CHUNK_BYTES: usize = 256 * 1024;
/// How long one message of a snapshot may take.
const SNAPSHOT_CHUNK_DEADLINE: Duration = Duration::from_secs(15);
/// How long the other side may take to check and install a snapshot.
const SNAPSHOT_INSTALL_DEADLINE: Duration = Duration::from_secs(600);
/// How long a member may take to hear that its log went back.
const WENT_BACK_DEADLINE: Duration = Duration::from_secs(3);
/// How long connecting for a stream of entries may take before openraft is told.
const STREAM_CONNECT_DEADLINE: Duration = Duration::from_secs(3);

/// Every channel of this member, made when first needed.
pub(crate) struct Channels {
    /// What members acknowledged to this one.
    pub(crate) acknowledged: Acknowledged,
    link: Arc<dyn Link>,
    local: LocalPeer,
    open: Mutex<BTreeMap<(u64, Purpose), Arc<Channel>>>,
}

impl Channels {
    pub(crate) fn new(link: Arc<dyn Link>, local: LocalPeer) -> Arc<Self> {
        let (acknowledged, open) = (Acknowledged::default(), Mutex::new(BTreeMap::new()));
        Arc::new(Channels { acknowledged, link, local, open })
    }

    /// The newest incarnation that another member was found to be of, when this one is of an older one.
    pub(crate) fn newer_incarnation(&self) -> Option<u64> {
        let newer = self.local.newer_incarnation.load(std::sync::atomic::Ordering::Relaxed);
        (newer > 0).then_some(newer)
    }

    /// The channel to a member at an address. A member that moved gets a new one.
    pub(crate) fn to(&self, target: u64, address: &str, purpose: Purpose) -> Arc<Channel> {
        let make = || Channel::new(self.link.clone(), self.local.clone(), target, address, purpose);
        let Ok(mut open) = self.open.lock() else { return make() };
        let channel = open.entry((target, purpose)).or_insert_with(make);
        if channel.address() != address {
            *channel = make();
        }
        channel.clone()
    }

    /// Forgets members that are none any more.
    pub(crate) fn retain(&self, is_member: impl Fn(u64) -> bool) {
        if let Ok(mut open) = self.open.lock() {
            open.retain(|(target, _), _| is_member(*target));
        }
        self.local.heard_from.retain(is_member);
    }
}

/// Makes networks for openraft.
pub(crate) struct NetworkFactory {
    pub(crate) channels: Arc<Channels>,
}

impl NetworkFactory {
    fn network(&self, target: u64, node: &MemberNode, log_purpose: Purpose) -> Network {
        Network {
            channels: self.channels.clone(),
            local: self.channels.local.member,
            target,
            control: self.channels.to(target, &node.raft_addr, Purpose::Control),
            log: self.channels.to(target, &node.raft_addr, log_purpose),
            snapshot: self.channels.to(target, &node.raft_addr, Purpose::Snapshot),
        }
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = Network;

    async fn new_client(&mut self, target: u64, node: &MemberNode) -> Network {
        self.network(target, node, Purpose::Log)
    }

    async fn new_heartbeat_client(&mut self, target: u64, node: &MemberNode) -> Network {
        self.network(target, node, Purpose::Control)
    }
}

/// The network to one member.
pub(crate) struct Network {
    channels: Arc<Channels>,
    local: u64,
    target: u64,
    control: Arc<Channel>,
    log: Arc<Channel>,
    snapshot: Arc<Channel>,
}

impl Network {
    fn rpc_error(&self, action: RPCTypes, timeout: Duration, error: &CallError) -> RPCError<TypeConfig> {
        match error {
            CallError::Timeout { .. } => {
                RPCError::Timeout(Timeout { action, id: self.local, target: self.target, timeout })
            }
            CallError::Broken { .. } | CallError::Frame { .. } => {
                RPCError::Network(NetworkError::from_string(chain(error)))
            }
            CallError::Unreachable { .. } | CallError::BackingOff { .. } | CallError::Greeting { .. } => {
                RPCError::Unreachable(Unreachable::from_string(chain(error)))
            }
        }
    }

    async fn ask(
        &self,
        channel: &Arc<Channel>,
        action: RPCTypes,
        request: Request,
        option: &RPCOption,
    ) -> Result<Response, RPCError<TypeConfig>> {
        let deadline = option.soft_ttl();
        match channel.call(request, deadline).await {
            Ok(Response::Refused(refusal)) => Err(RPCError::Unreachable(Unreachable::from_string(refusal))),
            Ok(response) => Ok(response),
            Err(error) => Err(self.rpc_error(action, deadline, &error)),
        }
    }

    /// A follower said that it does not have the entry at `index`. An error when it had acknowledged it to this leader:
    /// openraft must not hear of that, for it takes a log that goes back for a defect of its own.
    fn check_conflict(&self, vote: &Vote, index: u64) -> Result<(), RPCError<TypeConfig>> {
        let Some(remembered) = self.channels.acknowledged.contradicted(self.target, vote, index) else {
            return Ok(());
        };
        let member = self.target;
        tracing::error!(
            member,
            index,
            next = remembered.next,
            "a member lost log entries that it had acknowledged"
        );
        let control = self.control.clone();
        tokio::spawn(async move {
            let told = control.call(Request::WentBack(remembered), WENT_BACK_DEADLINE).await;
            if let Err(error) = told {
                tracing::warn!(member, error = %chain(&error), "it could not be told to stop");
            }
        });
        Err(RPCError::Unreachable(Unreachable::from_string("its log went back; it must be replaced")))
    }

    pub(crate) async fn send_snapshot(
        &self,
        vote: Vote,
        file: SnapshotFile,
    ) -> Result<SnapshotResponse<TypeConfig>, SendError> {
        let digest = file.digest;
        let Some(source) = open_snapshot(&file).await.map_err(SendError::Read)? else {
            return Err(SendError::Replaced);
        };
        let offer = SnapshotOffer { meta: file.meta.snapshot_meta(), bytes: file.bytes, digest };
        let begin = self.snapshot.call(Request::SnapshotBegin(offer), SNAPSHOT_CHUNK_DEADLINE).await?;
        let Response::SnapshotFrom { mut offset } = begin else { return Err(SendError::refused(begin)) };
        while offset < file.bytes {
            let chunk = read_chunk(source.clone(), offset, file.bytes).await.map_err(SendError::Read)?;
            let length = chunk.len() as u64;
            let request = Request::SnapshotChunk { digest, offset, data: chunk };
            match self.snapshot.call(request, SNAPSHOT_CHUNK_DEADLINE).await? {
                Response::Done => offset += length,
                other => return Err(SendError::refused(other)),
            }
        }
        self.await_installation(digest, vote, SNAPSHOT_CHUNK_DEADLINE).await
    }

    /// Asks until the snapshot is installed. Each question has a deadline of its own: one that is lost, or whose answer is,
    /// is asked again.
    pub(crate) async fn await_installation(
        &self,
        digest: [u8; 32],
        vote: Vote,
        answer_deadline: Duration,
    ) -> Result<SnapshotResponse<TypeConfig>, SendError> {
        let until = Instant::now() + SNAPSHOT_INSTALL_DEADLINE;
        loop {
            let asked = self.snapshot.call(Request::SnapshotEnd { digest, vote }, answer_deadline);
            let pending = match asked.await {
                Ok(Response::SnapshotStored(stored)) => return Ok(stored),
                Ok(Response::SnapshotInstalling) => CallError::Timeout { target: self.target },
                Ok(other) => return Err(SendError::refused(other)),
                Err(lost @ CallError::Timeout { .. }) => lost,
                Err(error) => return Err(error.into()),
            };
            if Instant::now() >= until {
                return Err(pending.into());
            }
        }
    }
}

/// Why a snapshot did not arrive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("the snapshot could not be read")]
    Read(#[source] io::Error),
    #[error("a newer snapshot took its place; it will be sent instead")]
    Replaced,
    #[error("the snapshot was refused: {0}")]
    Refused(String),
}

impl SendError {
    fn refused(response: Response) -> Self {
        match response {
            Response::Refused(refusal) => SendError::Refused(refusal.to_string()),
            _ => SendError::Refused("the answer is not one to a snapshot".to_owned()),
        }
    }
}

/// Opens a snapshot once for all its chunks: a newer one may take its name away while it is being sent, which is no
/// failure of the disk. `None` when that happened already.
pub(crate) async fn open_snapshot(file: &SnapshotFile) -> io::Result<Option<Arc<File>>> {
    let path = file.path.clone();
    match disk_work::run(move || File::open(path)).await? {
        Ok(source) => Ok(Some(Arc::new(source))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads one chunk off the runtime's threads.
pub(crate) async fn read_chunk(source: Arc<File>, offset: u64, bytes: u64) -> io::Result<Bytes> {
    let read = disk_work::run(move || {
        let length = (bytes - offset).min(SNAPSHOT_CHUNK_BYTES as u64) as usize;
        let mut chunk = vec![0_u8; length];
        source.read_exact_at(&mut chunk, offset)?;
        Ok(Bytes::from(chunk))
    });
    read.await?
}

fn wrong_answer() -> RPCError<TypeConfig> {
    RPCError::Network(NetworkError::from_string("the answer is to another question"))
}

/// An error with everything that caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

type AnswerStream<'s> =
    futures::stream::BoxStream<'s, Result<StreamAppendResult<TypeConfig>, RPCError<TypeConfig>>>;

impl RaftNetworkV2<TypeConfig> for Network {
    type SnapshotData = SnapshotFile;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<TypeConfig>, RPCError<TypeConfig>> {
        let (vote, previous) = (rpc.vote, rpc.prev_log_id);
        let matched = rpc.entries.last().map(|entry| entry.log_id).or(previous);
        match self.ask(&self.log, RPCTypes::AppendEntries, Request::Append(rpc), &option).await? {
            Response::Append(response) => {
                let acknowledged = match &response {
                    AppendEntriesResponse::Success => matched,
                    AppendEntriesResponse::PartialSuccess(matched) => *matched,
                    AppendEntriesResponse::Conflict => {
                        self.check_conflict(&vote, previous.map_or(0, |previous| previous.index()))?;
                        None
                    }
                    AppendEntriesResponse::HigherVote(_) => None,
                };
                if let Some(matched) = acknowledged {
                    self.channels.acknowledged.note(self.target, &vote, &matched);
                }
                Ok(response)
            }
            _ => Err(wrong_answer()),
        }
    }

    /// Many requests under way on one ordered stream. openraft gives it the time of one heartbeat, which is meant for a
    /// single answer; the channel has its own deadlines for a stream, which outlast a stall of the disk.
    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> futures::future::BoxFuture<'s, Result<AnswerStream<'s>, RPCError<TypeConfig>>>
    where
        S: futures::Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        let this = &*self;
        let failed =
            move |error: CallError| this.rpc_error(RPCTypes::AppendEntries, STREAM_CONNECT_DEADLINE, &error);
        let answers = async move {
            let mut input = input;
            // openraft waits out its back-off before it yields a request. So a request is taken before the connection is
            // made: a member that cannot be reached would otherwise be dialled in a tight loop.
            let Some(first) = input.next().await else { return futures::stream::empty().boxed() };
            let vote = first.vote;
            let unanswered = Unanswered::default();
            let asking = unanswered.clone();
            let requests =
                futures::stream::iter([first]).chain(input).inspect(move |request| asking.asked(request));
            match this.log.append_stream(requests, STREAM_CONNECT_DEADLINE).await {
                Ok(answers) => answers
                    .filter(move |answer| {
                        let pass = match answer {
                            Ok(Ok(Ok(matched))) => unanswered.answered(matched),
                            // The stream ends with it.
                            _ => true,
                        };
                        std::future::ready(pass)
                    })
                    .map(move |answer| match answer {
                        Ok(Ok(result)) => {
                            match &result {
                                Ok(Some(matched)) => {
                                    this.channels.acknowledged.note(this.target, &vote, matched);
                                }
                                Err(StreamAppendError::Conflict(at)) => {
                                    this.check_conflict(&vote, at.index())?
                                }
                                _ => {}
                            }
                            Ok(result)
                        }
                        Ok(Err(refusal)) => Err(RPCError::Unreachable(Unreachable::from_string(refusal))),
                        Err(error) => Err(failed(error)),
                    })
                    .boxed(),
                Err(error) => futures::stream::iter([Err(failed(error))]).boxed(),
            }
        };
        Box::pin(async move { Ok(futures::stream::once(answers).flatten().boxed()) })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.ask(&self.control, RPCTypes::Vote, Request::Vote(rpc), &option).await? {
            Response::Vote(response) => Ok(response),
            _ => Err(wrong_answer()),
        }
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<VoteResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.ask(&self.control, RPCTypes::Vote, Request::PreVote(rpc), &option).await? {
            Response::Vote(response) => Ok(response),
            _ => Err(wrong_answer()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<crate::types::LeaderId, u64, MemberNode, SnapshotFile>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        let sent = tokio::select! {
            sent = self.send_snapshot(vote, snapshot.snapshot) => sent,
            closed = cancel => return Err(StreamingError::Closed(closed)),
        };
        sent.map_err(|error| match &error {
            SendError::Call(call) => {
                self.rpc_error(RPCTypes::InstallSnapshot, SNAPSHOT_CHUNK_DEADLINE, call).into()
            }
            SendError::Read(source) => {
                let error = StorageError::read_snapshot(
                    None,
                    <TypeConfig as openraft::type_config::TypeConfigExt>::err_from_error(source),
                );
                StreamingError::StorageError(error)
            }
            SendError::Replaced | SendError::Refused(_) => {
                StreamingError::Unreachable(Unreachable::from_string(chain(&error)))
            }
        })
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<TypeConfig>, RPCError<TypeConfig>> {
        match self.ask(&self.control, RPCTypes::Vote, Request::TransferLeader(req), &option).await? {
            Response::TransferLeader(response) => Ok(response),
            _ => Err(wrong_answer()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::future::BoxFuture;

    use super::*;
    use crate::transport::link::{Handshake, LinkError, PeerStream};

    /// A leader that could not send a snapshot to its end because it made a newer one meanwhile took that for a failing
    /// disk and stopped (found by `cargo xtask sim --seed 1038`).
    #[tokio::test]
    async fn a_snapshot_that_is_replaced_while_it_is_sent_can_be_read_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let folder = crate::snapshot_file::SnapshotFolder::open(dir.path()).unwrap();
        let build = |index: u64, body: &'static [u8]| {
            let last_applied =
                Some(crate::types::LogId::new(crate::types::LeaderId { term: 1, node_id: 1 }, index));
            let meta = crate::raft_meta::RaftMeta { last_applied, ..Default::default() };
            folder.build(&meta, |out| out.write_all(body)).unwrap()
        };
        let older = build(1, b"older");
        let source = open_snapshot(&older).await.unwrap().unwrap();
        let newer = build(2, b"newer");
        assert!(!older.path.exists(), "only the newest is kept");
        let all = read_chunk(source, 0, older.bytes).await.unwrap();
        assert!(all.windows(5).any(|window| window == b"older"));
        assert!(open_snapshot(&older).await.unwrap().is_none());
        assert!(open_snapshot(&newer).await.unwrap().is_some());
    }

    /// A network on which nobody is there.
    #[derive(Default)]
    struct Nobody {
        dialled: AtomicU64,
    }

    impl Link for Nobody {
        fn dial<'a>(&'a self, _: u64, address: &'a str) -> BoxFuture<'a, Result<PeerStream, LinkError>> {
            self.dialled.fetch_add(1, Ordering::Relaxed);
            let source = io::Error::from(io::ErrorKind::ConnectionRefused);
            Box::pin(async move { Err(LinkError::Connect { address: address.to_owned(), source }) })
        }

        fn accept(&self) -> BoxFuture<'_, Result<Handshake, LinkError>> {
            Box::pin(std::future::pending())
        }
    }

    /// openraft sleeps out its back-off before the source of a stream yields a request. A stream that failed without
    /// asking its source would be opened again at once, for ever.
    #[tokio::test]
    async fn a_stream_asks_for_a_request_before_it_dials() {
        let link = Arc::new(Nobody::default());
        let local = LocalPeer {
            cluster: "c".to_owned(),
            member: 1,
            newer_incarnation: Arc::default(),
            supported: holdfast_model::SupportedVersions::OURS,
            heard_from: Default::default(),
        };
        let mut factory = NetworkFactory { channels: Channels::new(link.clone(), local) };
        let mut network = factory.new_client(2, &MemberNode::default()).await;
        let option = || RPCOption::new(Duration::from_millis(50));

        let idle = futures::stream::pending::<AppendEntriesRequest<TypeConfig>>();
        let mut answers = network.stream_append(idle, option()).await.unwrap();
        assert!(futures::poll!(answers.next()).is_pending());
        drop(answers);
        assert_eq!(link.dialled.load(Ordering::Relaxed), 0, "it dialled with nothing to send");

        let request = AppendEntriesRequest {
            vote: Vote::new(1, 1),
            prev_log_id: None,
            entries: vec![],
            leader_commit: None,
        };
        let requests = futures::stream::iter([request]);
        let answers: Vec<_> = network.stream_append(requests, option()).await.unwrap().collect().await;
        assert!(matches!(answers[..], [Err(RPCError::Unreachable(_))]), "{answers:?}");
        assert_eq!(link.dialled.load(Ordering::Relaxed), 1);
    }
}
