//! The side that answers: accepts links, greets, and hands each question to a [`Service`].
//!
//! Questions of one connection are answered in any order, but the requests of a stream in the order in which they came.
//! Connections, questions in flight and frames waiting to be written are bounded; a peer that asks more waits.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::channel::{LocalPeer, write_frames};
use super::link::{Handshake, Link, PeerStream};
use super::message::{Frame, HELLO_MAGIC, Hello, HelloAnswer, Refusal, Request, Response, with_versions};
use super::{Incoming as FrameReader, Outgoing, PROTOCOL_VERSION, encode_frame, open};
use crate::member_identity::later_incarnation;
use crate::types::TypeConfig;

/// Connections at once: four purposes from each of a few dozen members.
const CONNECTIONS_MAX: usize = 256;
/// How long a new connection may take to prove itself.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Questions of one connection that may be under way.
const QUESTIONS_IN_FLIGHT_MAX: usize = 1024;
/// Frames of one connection that may wait to be written.
const OUTGOING_FRAMES_MAX: usize = 256;
/// Streams of one connection.
const STREAMS_MAX: usize = 16;
/// Requests of one stream that may wait.
const STREAM_REQUESTS_MAX: usize = 128;
/// A connection over which nothing came for this long is closed: its other end may have lost power. Members dial again.
const IDLE_MAX: Duration = Duration::from_secs(600);
/// The pause after a failed accept, such as when the process has no file descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What answers questions.
pub(crate) trait Service: Send + Sync + 'static {
    /// Answers one question of a member.
    fn call(self: Arc<Self>, peer: u64, request: Request) -> BoxFuture<'static, Response>;
    /// Answers an ordered stream of log entries, one answer per request, in their order.
    fn append_stream(
        self: Arc<Self>,
        peer: u64,
        requests: mpsc::Receiver<AppendEntriesRequest<TypeConfig>>,
    ) -> BoxStream<'static, Result<StreamAppendResult<TypeConfig>, Refusal>>;
}

/// Serves until `stop` is cancelled, then waits for the connections to end.
pub(crate) async fn serve(
    link: Arc<dyn Link>,
    local: LocalPeer,
    service: Arc<dyn Service>,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let tasks = TaskTracker::new();
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { break };
        let accepted = tokio::select! {
            accepted = link.accept() => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Ok(handshake) => {
                let connection =
                    Incoming { local: local.clone(), service: service.clone(), stop: stop.child_token() };
                tasks.spawn(async move {
                    connection.run(handshake).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a member's connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    tasks.close();
    tasks.wait().await;
}

/// One accepted connection.
struct Incoming {
    local: LocalPeer,
    service: Arc<dyn Service>,
    stop: CancellationToken,
}

impl Incoming {
    async fn run(self, handshake: Handshake) {
        let greeted = tokio::select! {
            greeted = timeout(HANDSHAKE_DEADLINE, self.greet(handshake)) => greeted,
            () = self.stop.cancelled() => return,
        };
        match greeted {
            Ok(Ok((peer, incoming, write))) => self.answer(peer, incoming, write).await,
            Ok(Err(reason)) => tracing::info!(%reason, "a connection to the raft port was refused"),
            Err(_elapsed) => tracing::info!("a connection to the raft port did not prove itself in time"),
        }
    }

    async fn greet(&self, handshake: Handshake) -> Result<(u64, FrameReader, Outgoing), String> {
        let PeerStream { peer, io } = handshake.await.map_err(|error| error.to_string())?;
        let (mut incoming, mut write) = open(io);
        let Some(Ok(bytes)) = incoming.next().await else {
            return Err("it closed before a greeting".to_owned());
        };
        let hello = postcard::from_bytes::<Hello>(&bytes);
        let verdict = match &hello {
            Ok(hello) => self.judge(hello, peer),
            Err(_) => Err("the greeting cannot be read".to_owned()),
        };
        let theirs = hello.as_ref().map_or("", |hello| &hello.cluster);
        let answer = match (&verdict, later_incarnation(theirs, &self.local.cluster)) {
            (Ok(()), _) => HelloAnswer::Welcome { version: PROTOCOL_VERSION },
            (Err(_), Some(incarnation)) => HelloAnswer::Superseded { incarnation },
            (Err(reason), None) => HelloAnswer::Refused { reason: reason.clone() },
        };
        let answer = with_versions(&answer, self.local.supported);
        let frame = encode_frame(&answer).map_err(|error| error.to_string())?;
        let sent = async {
            write.write_all(&frame).await?;
            write.flush().await
        };
        sent.await.map_err(|error| error.to_string())?;
        if verdict.is_ok() {
            self.local.heard_from.note(peer);
        }
        if verdict.is_err() {
            // The other side may be gone already; nothing more is said to it.
            let _ = write.shutdown().await;
        }
        verdict.map(|()| (peer, incoming, write))
    }

    fn judge(&self, hello: &Hello, peer: u64) -> Result<(), String> {
        let Hello { magic, version, cluster, from, to, purpose: _ } = hello;
        if *magic != HELLO_MAGIC {
            return Err("the greeting is not of this protocol".to_owned());
        }
        if *version != PROTOCOL_VERSION {
            return Err(format!("protocol {version} is spoken, {PROTOCOL_VERSION} is understood"));
        }
        if *cluster != self.local.cluster {
            return Err("the member is of another cluster, or of another incarnation of this one".to_owned());
        }
        if *from != peer {
            return Err(format!("the greeting names member {from}, the certificate member {peer}"));
        }
        if *to != self.local.member {
            return Err(format!("member {to} was dialled, this is member {}", self.local.member));
        }
        Ok(())
    }

    async fn answer(self, peer: u64, mut incoming: FrameReader, write: Outgoing) {
        let (outgoing, frames) = mpsc::channel(OUTGOING_FRAMES_MAX);
        let closed = self.stop.clone();
        let writing = tokio::spawn(write_frames(write, frames, closed.clone()));
        let mut desk = Desk {
            peer,
            service: self.service,
            outgoing,
            in_flight: Arc::new(Semaphore::new(QUESTIONS_IN_FLIGHT_MAX)),
            streams: HashMap::new(),
            streams_opened: None,
            closed: closed.clone(),
        };
        loop {
            let next = tokio::select! {
                next = timeout(IDLE_MAX, incoming.next()) => next,
                () = closed.cancelled() => break,
            };
            let Ok(Some(Ok(bytes))) = next else { break };
            let Ok(frame) = postcard::from_bytes(&bytes) else {
                tracing::warn!(peer, "a member sent bytes that are no question");
                break;
            };
            if !desk.take(frame).await {
                break;
            }
        }
        closed.cancel();
        drop(desk);
        if let Err(error) = writing.await {
            tracing::warn!(%error, "the writer of a connection ended badly");
        }
    }
}

/// Where the questions of one connection are taken in.
struct Desk {
    peer: u64,
    service: Arc<dyn Service>,
    outgoing: mpsc::Sender<Vec<u8>>,
    in_flight: Arc<Semaphore>,
    streams: HashMap<u64, mpsc::Sender<AppendEntriesRequest<TypeConfig>>>,
    /// Streams up to this id were opened: a late request of one that ended must not open it again.
    streams_opened: Option<u64>,
    closed: CancellationToken,
}

impl Desk {
    /// Takes one frame in. False when the connection must be closed.
    async fn take(&mut self, frame: Frame) -> bool {
        match frame {
            Frame::Ask { id, request } => self.ask(id, request).await,
            Frame::StreamItem { id, request } => self.stream_item(id, request).await,
            Frame::StreamEnd { id } => {
                self.streams.remove(&id);
                true
            }
            Frame::Answer { .. } | Frame::StreamResult { .. } => false,
        }
    }

    async fn ask(&mut self, id: u64, request: Request) -> bool {
        let Ok(permit) = self.in_flight.clone().acquire_owned().await else { return false };
        let answering = self.service.clone().call(self.peer, request);
        let (outgoing, closed) = (self.outgoing.clone(), self.closed.clone());
        tokio::spawn(async move {
            let response = tokio::select! {
                response = answering => response,
                () = closed.cancelled() => return,
            };
            let frame = encode_frame(&Frame::Answer { id, response }).or_else(|error| {
                let response = Response::Refused(Refusal::Invalid(error.to_string()));
                encode_frame(&Frame::Answer { id, response })
            });
            if let Ok(frame) = frame {
                // The connection may be gone; then nobody waits for the answer.
                drop(outgoing.send(frame).await);
            }
            drop(permit);
        });
        true
    }

    async fn stream_item(&mut self, id: u64, request: AppendEntriesRequest<TypeConfig>) -> bool {
        if self.streams_opened.is_none_or(|opened| id > opened) {
            self.streams_opened = Some(id);
            self.streams.retain(|_, stream| !stream.is_closed());
            if self.streams.len() >= STREAMS_MAX {
                return false;
            }
            let (sender, requests) = mpsc::channel(STREAM_REQUESTS_MAX);
            self.streams.insert(id, sender);
            let answers = self.service.clone().append_stream(self.peer, requests);
            tokio::spawn(answer_stream(id, answers, self.outgoing.clone(), self.closed.clone()));
        }
        if let Some(stream) = self.streams.get(&id) {
            // A stream that ended after an answer that stops it takes no more; the asker will see that answer.
            drop(stream.send(request).await);
        }
        true
    }
}

async fn answer_stream(
    id: u64,
    mut answers: BoxStream<'static, Result<StreamAppendResult<TypeConfig>, Refusal>>,
    outgoing: mpsc::Sender<Vec<u8>>,
    closed: CancellationToken,
) {
    loop {
        let result = tokio::select! {
            result = answers.next() => result,
            () = closed.cancelled() => return,
        };
        let Some(result) = result else { return };
        let Ok(frame) = encode_frame(&Frame::StreamResult { id, result }) else { return };
        if outgoing.send(frame).await.is_err() {
            return;
        }
    }
}
