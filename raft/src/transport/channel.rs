//! The side that asks: one channel per member and purpose, with one connection that all its calls share.
//!
//! A call is answered, refused or fails within its deadline. A connection from which nothing was heard for a while is
//! given up even if TCP still hopes, because after a partition TCP's own patience outlasts ours by far.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{Stream, StreamExt};
use holdfast_model::SupportedVersions;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use rand::RngExt;
use tokio::io::AsyncWriteExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::link::{Link, LinkError};
use super::message::{
    Frame, HELLO_MAGIC, Hello, HelloAnswer, Purpose, Refusal, Request, Response, read_answer,
};
use super::{FrameError, Incoming, Outgoing, PROTOCOL_VERSION, encode_frame, open};
use crate::types::TypeConfig;

/// How long dialling may take, TLS and greeting included.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
/// Frames that may wait to be written on one connection.
const OUTGOING_FRAMES_MAX: usize = 256;
/// Calls that may be under way on one connection.
const CALLS_IN_FLIGHT_MAX: usize = 1024;
/// Requests of one stream that may be unanswered.
const STREAM_IN_FLIGHT_MAX: usize = 64;
/// A stream whose oldest request has no answer for this long is given up. Longer than the stalls of a busy disk.
const STREAM_ANSWER_DEADLINE: Duration = Duration::from_secs(5);
/// A connection on which a call timed out and nothing was heard for this long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// A connection that takes no bytes for this long is given up. Room for what may be queued on a slow network.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);
/// First wait after a failed dial; doubles per failure.
const BACKOFF_FIRST: Duration = Duration::from_millis(20);
/// The longest wait after failed dials.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("member {target} could not be reached")]
    Unreachable { target: u64, source: Arc<LinkError> },
    #[error("member {target} could not be reached a moment ago; waiting before the next attempt")]
    BackingOff { target: u64 },
    #[error("member {target} refused the connection: {reason}")]
    Greeting { target: u64, reason: String },
    #[error("the connection to member {target} broke")]
    Broken { target: u64 },
    #[error("member {target} did not answer in time")]
    Timeout { target: u64 },
    #[error("the request to member {target} could not be sent")]
    Frame {
        target: u64,
        #[source]
        source: FrameError,
    },
}

/// Who this member is, as it tells others.
#[derive(Clone, Debug)]
pub(crate) struct LocalPeer {
    pub(crate) cluster: String,
    pub(crate) member: u64,
    /// The newest incarnation that another member was found to be of, while this one is of an older one; or 0.
    pub(crate) newer_incarnation: Arc<AtomicU64>,
    /// The cluster versions that it supports.
    pub(crate) supported: SupportedVersions,
    /// When each member last dialled this one.
    pub(crate) heard_from: HeardFrom,
}

/// When each member last proved, by dialling this one, that it is there. Who could not reach it before need wait no longer.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeardFrom(Arc<Mutex<BTreeMap<u64, Instant>>>);

impl HeardFrom {
    /// A member dialled.
    pub(crate) fn note(&self, member: u64) {
        if let Ok(mut heard) = self.0.lock() {
            heard.insert(member, Instant::now());
        }
    }

    /// When a member last dialled.
    fn last(&self, member: u64) -> Option<Instant> {
        self.0.lock().ok()?.get(&member).copied()
    }

    /// Forgets members that are none any more.
    pub(crate) fn retain(&self, is_member: impl Fn(u64) -> bool) {
        if let Ok(mut heard) = self.0.lock() {
            heard.retain(|member, _| is_member(*member));
        }
    }
}

/// A way to one member for one purpose.
pub(crate) struct Channel {
    link: Arc<dyn Link>,
    local: LocalPeer,
    target: u64,
    address: String,
    purpose: Purpose,
    current: Mutex<Option<Arc<Connection>>>,
    dialling: tokio::sync::Mutex<Backoff>,
}

struct Backoff {
    failures: u32,
    /// When the last failed.
    failed_at: Instant,
    retry_at: Instant,
}

impl Backoff {
    fn from(now: Instant) -> Self {
        Backoff { failures: 0, failed_at: now, retry_at: now }
    }

    fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        (self.failed_at, self.retry_at) = (now, now + backoff_after(self.failures));
    }

    /// Whether it is too early to dial again. Not when the member dialled since: it was down and is there again, and would
    /// wait up to [`BACKOFF_MAX`] for its leader.
    fn must_wait(&self, now: Instant, heard_at: Option<Instant>) -> bool {
        now < self.retry_at && heard_at.is_none_or(|heard_at| heard_at < self.failed_at)
    }
}

impl Channel {
    pub(crate) fn new(
        link: Arc<dyn Link>,
        local: LocalPeer,
        target: u64,
        address: &str,
        purpose: Purpose,
    ) -> Arc<Self> {
        Arc::new(Channel {
            link,
            local,
            target,
            address: address.to_owned(),
            purpose,
            current: Mutex::new(None),
            dialling: tokio::sync::Mutex::new(Backoff::from(Instant::now())),
        })
    }

    /// The address that this channel dials.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Asks and waits for the answer, `deadline` at most.
    pub(crate) async fn call(
        self: &Arc<Self>,
        request: Request,
        deadline: Duration,
    ) -> Result<Response, CallError> {
        let target = self.target;
        let until = Instant::now() + deadline;
        let connection =
            timeout_at(until, self.connection()).await.map_err(|_| CallError::Timeout { target })??;
        let answer = timeout_at(until, connection.call(request)).await;
        match answer {
            Ok(answer) => answer,
            Err(_elapsed) => {
                connection.give_up_if_silent();
                Err(CallError::Timeout { target })
            }
        }
    }

    /// What the member supports, as the process says that answers now.
    pub(crate) async fn supported_versions(
        self: &Arc<Self>,
        deadline: Duration,
    ) -> Result<SupportedVersions, CallError> {
        let target = self.target;
        let until = Instant::now() + deadline;
        let connection =
            timeout_at(until, self.connection()).await.map_err(|_| CallError::Timeout { target })??;
        // Any question does; this one every build answers from what it has at hand.
        match timeout_at(until, connection.call(Request::Remembered)).await {
            Ok(answer) => answer.map(|_| connection.supported),
            Err(_elapsed) => {
                connection.give_up_if_silent();
                Err(CallError::Timeout { target })
            }
        }
    }

    /// Opens an ordered stream of log entries. The answers come in the order of the requests.
    pub(crate) async fn append_stream<S>(
        self: &Arc<Self>,
        requests: S,
        connect_deadline: Duration,
    ) -> Result<
        impl Stream<Item = Result<Result<StreamAppendResult<TypeConfig>, Refusal>, CallError>> + Send + use<S>,
        CallError,
    >
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let target = self.target;
        let connection = timeout(connect_deadline, self.connection())
            .await
            .map_err(|_| CallError::Timeout { target })??;
        Ok(connection.append_stream(requests))
    }

    /// The living connection, or a new one. Dialling goes on when the caller stops waiting, so that short deadlines
    /// cannot keep a slow handshake from ever finishing.
    async fn connection(self: &Arc<Self>) -> Result<Arc<Connection>, CallError> {
        if let Some(connection) = self.living() {
            return Ok(connection);
        }
        let channel = self.clone();
        match tokio::spawn(async move { channel.dial().await }).await {
            Ok(result) => result,
            Err(_aborted) => Err(CallError::Broken { target: self.target }),
        }
    }

    fn living(&self) -> Option<Arc<Connection>> {
        let current = self.current.lock().ok()?;
        current.as_ref().filter(|connection| !connection.closed.is_cancelled()).cloned()
    }

    async fn dial(&self) -> Result<Arc<Connection>, CallError> {
        let mut backoff = self.dialling.lock().await;
        if let Some(connection) = self.living() {
            return Ok(connection);
        }
        if backoff.must_wait(Instant::now(), self.local.heard_from.last(self.target)) {
            return Err(CallError::BackingOff { target: self.target });
        }
        let dialled = timeout(CONNECT_DEADLINE, self.greet()).await;
        match dialled.unwrap_or(Err(CallError::Timeout { target: self.target })) {
            Ok(connection) => {
                backoff.failures = 0;
                if let Ok(mut current) = self.current.lock() {
                    *current = Some(connection.clone());
                }
                Ok(connection)
            }
            Err(error) => {
                backoff.failed(Instant::now());
                tracing::debug!(target_member = self.target, purpose = ?self.purpose, %error, "dialling failed");
                Err(error)
            }
        }
    }

    async fn greet(&self) -> Result<Arc<Connection>, CallError> {
        let target = self.target;
        let stream = self
            .link
            .dial(target, &self.address)
            .await
            .map_err(|source| CallError::Unreachable { target, source: Arc::new(source) })?;
        let (mut incoming, mut write) = open(stream.io);
        let hello = Hello {
            magic: HELLO_MAGIC,
            version: PROTOCOL_VERSION,
            cluster: self.local.cluster.clone(),
            from: self.local.member,
            to: target,
            purpose: self.purpose,
        };
        let frame = encode_frame(&hello).map_err(|source| CallError::Frame { target, source })?;
        let sent = async {
            write.write_all(&frame).await?;
            write.flush().await
        };
        sent.await.map_err(|_| CallError::Broken { target })?;
        let Some(Ok(answer)) = incoming.next().await else { return Err(CallError::Broken { target }) };
        let (answer, supported) = read_answer(&answer).map_err(|_| CallError::Broken { target })?;
        match answer {
            HelloAnswer::Welcome { version: PROTOCOL_VERSION } => {}
            HelloAnswer::Welcome { version } => {
                return Err(CallError::Greeting {
                    target,
                    reason: format!("it answered with protocol {version}"),
                });
            }
            HelloAnswer::Refused { reason } => return Err(CallError::Greeting { target, reason }),
            HelloAnswer::Superseded { incarnation } => {
                self.local.newer_incarnation.fetch_max(incarnation, Ordering::Relaxed);
                let reason = format!("it is of incarnation {incarnation}");
                return Err(CallError::Greeting { target, reason });
            }
        }
        Ok(Connection::start(target, supported, incoming, write))
    }
}

/// The wait after so many failures in a row: it doubles up to a bound, and lies anywhere in its upper half, so that
/// members that lost the same peer do not come back all at once.
fn backoff_after(failures: u32) -> Duration {
    let full = BACKOFF_FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(BACKOFF_MAX);
    full.mul_f64(rand::rng().random_range(0.5..1.0))
}

/// Who waits for what on a connection.
#[derive(Default)]
struct Waiting {
    calls: HashMap<u64, oneshot::Sender<Response>>,
    streams: HashMap<u64, mpsc::Sender<Result<StreamAppendResult<TypeConfig>, Refusal>>>,
}

/// One established connection.
struct Connection {
    target: u64,
    /// The cluster versions that the process at the other end supports.
    supported: SupportedVersions,
    next_id: AtomicU64,
    outgoing: mpsc::Sender<Vec<u8>>,
    waiting: Mutex<Waiting>,
    in_flight: Arc<Semaphore>,
    started: Instant,
    /// Milliseconds after `started` at which a frame last came.
    heard_ms: AtomicU64,
    closed: CancellationToken,
}

impl Connection {
    fn start(target: u64, supported: SupportedVersions, incoming: Incoming, write: Outgoing) -> Arc<Self> {
        let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let connection = Arc::new(Connection {
            target,
            supported,
            next_id: AtomicU64::new(0),
            outgoing,
            waiting: Mutex::new(Waiting::default()),
            in_flight: Arc::new(Semaphore::new(CALLS_IN_FLIGHT_MAX)),
            started: Instant::now(),
            heard_ms: AtomicU64::new(0),
            closed: CancellationToken::new(),
        });
        let closed = connection.closed.clone();
        tokio::spawn(write_frames(write, frames, closed.clone()));
        tokio::spawn(read_answers(connection.clone(), incoming, closed));
        connection
    }

    async fn call(self: &Arc<Self>, request: Request) -> Result<Response, CallError> {
        let target = self.target;
        let _permit = self.permit().await?;
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let frame = encode_frame(&Frame::Ask { id, request })
            .map_err(|source| CallError::Frame { target, source })?;
        let (sender, answer) = oneshot::channel();
        if let Ok(mut waiting) = self.waiting.lock() {
            waiting.calls.insert(id, sender);
        }
        let _forget = ForgetCall { connection: self, id };
        if self.closed.is_cancelled() {
            return Err(CallError::Broken { target });
        }
        self.outgoing.send(frame).await.map_err(|_| CallError::Broken { target })?;
        answer.await.map_err(|_| CallError::Broken { target })
    }

    fn append_stream<S>(
        self: &Arc<Self>,
        requests: S,
    ) -> impl Stream<Item = Result<Result<StreamAppendResult<TypeConfig>, Refusal>, CallError>> + Send + use<S>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
    {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        // One place more than there can be answers, so that the reader never has to wait for this stream.
        let (results, receiver) = mpsc::channel(STREAM_IN_FLIGHT_MAX + 1);
        if let Ok(mut waiting) = self.waiting.lock() {
            waiting.streams.insert(id, results);
        }
        let state = StreamState {
            connection: self.clone(),
            id,
            receiver,
            requests: Some(requests),
            staged: None,
            unanswered: 0,
            answer_due: Instant::now(),
        };
        futures::stream::unfold(Some(state), |state| async move {
            let mut state = state?;
            match state.next().await {
                Some(Ok(result)) => Some((Ok(result), Some(state))),
                Some(Err(error)) => Some((Err(error), None)),
                None => None,
            }
        })
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        let broken = || CallError::Broken { target: self.target };
        self.in_flight.clone().acquire_owned().await.map_err(|_| broken())
    }

    fn heard(&self) {
        self.heard_ms.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
    }

    /// Closes the connection when nothing came over it for too long.
    fn give_up_if_silent(&self) {
        let heard_at = Duration::from_millis(self.heard_ms.load(Ordering::Relaxed));
        if self.started.elapsed().saturating_sub(heard_at) > SILENCE_MAX {
            self.closed.cancel();
        }
    }

    fn accept(&self, frame: Frame) -> bool {
        let Ok(mut waiting) = self.waiting.lock() else { return false };
        match frame {
            Frame::Answer { id, response } => {
                if let Some(asker) = waiting.calls.remove(&id) {
                    // The asker may have given up meanwhile.
                    drop(asker.send(response));
                }
                true
            }
            Frame::StreamResult { id, result } => match waiting.streams.get(&id) {
                // A peer that answers more than it was asked is broken.
                Some(stream) => !matches!(stream.try_send(result), Err(mpsc::error::TrySendError::Full(_))),
                None => true,
            },
            Frame::Ask { .. } | Frame::StreamItem { .. } | Frame::StreamEnd { .. } => false,
        }
    }
}

/// Takes a call off the list when its caller stops waiting, so that the list stays as short as what is in flight.
struct ForgetCall<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for ForgetCall<'_> {
    fn drop(&mut self) {
        if let Ok(mut waiting) = self.connection.waiting.lock() {
            waiting.calls.remove(&self.id);
        }
    }
}

/// The asking end of an ordered stream. It is driven by whoever waits for its answers and owns no task, so that no
/// request is taken from its source after it was dropped.
struct StreamState<S> {
    connection: Arc<Connection>,
    id: u64,
    receiver: mpsc::Receiver<Result<StreamAppendResult<TypeConfig>, Refusal>>,
    /// Where requests come from; `None` after its end.
    requests: Option<S>,
    /// A frame that waits for a place in the queue.
    staged: Option<Vec<u8>>,
    unanswered: usize,
    /// When the oldest unanswered request must have its answer.
    answer_due: Instant,
}

impl<S> StreamState<S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin,
{
    /// The next answer; `None` when every request has its answer and no more will come.
    async fn next(&mut self) -> Option<Result<Result<StreamAppendResult<TypeConfig>, Refusal>, CallError>> {
        let target = self.connection.target;
        loop {
            if self.requests.is_none() && self.staged.is_none() && self.unanswered == 0 {
                return None;
            }
            let may_take = self.staged.is_none() && self.unanswered < STREAM_IN_FLIGHT_MAX;
            tokio::select! {
                result = self.receiver.recv() => {
                    let Some(result) = result else { return Some(Err(CallError::Broken { target })) };
                    self.unanswered = self.unanswered.saturating_sub(1);
                    self.answer_due = Instant::now() + STREAM_ANSWER_DEADLINE;
                    return Some(Ok(result));
                }
                () = self.connection.closed.cancelled() => return Some(Err(CallError::Broken { target })),
                request = next_of(&mut self.requests), if may_take => match request {
                    Some(request) => match encode_frame(&Frame::StreamItem { id: self.id, request }) {
                        Ok(frame) => self.staged = Some(frame),
                        Err(source) => return Some(Err(CallError::Frame { target, source })),
                    },
                    None => self.requests = None,
                },
                place = self.connection.outgoing.reserve(), if self.staged.is_some() => {
                    let Ok(place) = place else { return Some(Err(CallError::Broken { target })) };
                    if let Some(frame) = self.staged.take() {
                        place.send(frame);
                    }
                    if self.unanswered == 0 {
                        self.answer_due = Instant::now() + STREAM_ANSWER_DEADLINE;
                    }
                    self.unanswered += 1;
                }
                () = tokio::time::sleep_until(self.answer_due), if self.unanswered > 0 => {
                    self.connection.give_up_if_silent();
                    return Some(Err(CallError::Timeout { target }));
                }
            }
        }
    }
}

impl<S> Drop for StreamState<S> {
    fn drop(&mut self) {
        if let Ok(mut waiting) = self.connection.waiting.lock() {
            waiting.streams.remove(&self.id);
        }
        if let Ok(frame) = encode_frame(&Frame::StreamEnd { id: self.id }) {
            // When the queue is full the connection is in trouble, and its end ends the stream as well.
            drop(self.connection.outgoing.try_send(frame));
        }
    }
}

async fn next_of<S: Stream + Unpin>(stream: &mut Option<S>) -> Option<S::Item> {
    match stream {
        Some(stream) => stream.next().await,
        None => std::future::pending().await,
    }
}

/// Writes what is queued, and flushes when nothing more waits.
pub(super) async fn write_frames(
    write: Outgoing,
    mut frames: mpsc::Receiver<Vec<u8>>,
    closed: CancellationToken,
) {
    let mut write = tokio::io::BufWriter::with_capacity(64 * 1024, write);
    let work = async {
        while let Some(first) = frames.recv().await {
            let batch = async {
                write.write_all(&first).await?;
                for _ in 0..OUTGOING_FRAMES_MAX {
                    let Ok(frame) = frames.try_recv() else { break };
                    write.write_all(&frame).await?;
                }
                write.flush().await
            };
            timeout(WRITE_DEADLINE, batch).await.map_err(std::io::Error::from)??;
        }
        write.shutdown().await
    };
    tokio::select! {
        result = work => {
            if let Err(error) = result {
                tracing::debug!(%error, "writing to a member failed");
            }
        }
        () = closed.cancelled() => {}
    }
    closed.cancel();
}

async fn read_answers(connection: Arc<Connection>, mut incoming: Incoming, closed: CancellationToken) {
    loop {
        let next = tokio::select! {
            next = incoming.next() => next,
            () = closed.cancelled() => break,
        };
        let Some(Ok(bytes)) = next else { break };
        connection.heard();
        let accepted = postcard::from_bytes(&bytes).is_ok_and(|frame| connection.accept(frame));
        if !accepted {
            tracing::warn!(member = connection.target, "a member answered with bytes that are no answer");
            break;
        }
    }
    closed.cancel();
    if let Ok(mut waiting) = connection.waiting.lock() {
        *waiting = Waiting::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_dials_is_dialled_again_at_once_and_only_once() {
        let (began, ms) = (Instant::now(), Duration::from_millis);
        let mut backoff = Backoff::from(began);
        assert!(!backoff.must_wait(began, None));
        backoff.failed(began + ms(1));
        assert!(backoff.must_wait(began + ms(2), None));
        assert!(backoff.must_wait(began + ms(2), Some(began)), "it dialled before it went away");
        assert!(!backoff.must_wait(began + ms(3), Some(began + ms(2))));
        backoff.failed(began + ms(3));
        assert!(backoff.must_wait(began + ms(4), Some(began + ms(2))), "dialled in a tight loop");
        assert!(!backoff.must_wait(began + ms(3) + BACKOFF_MAX, None));

        let heard_from = HeardFrom::default();
        heard_from.note(2);
        assert!(heard_from.last(2).is_some_and(|at| at >= began) && heard_from.last(3).is_none());
        heard_from.retain(|member| member == 3);
        assert_eq!(heard_from.last(2), None, "a member that is none any more is kept");
    }
}
