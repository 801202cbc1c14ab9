//! Following the control plane: one stream to any member, applied to a [`Replica`], for as long as the agent lives.
//!
//! A stream that ends, falls silent, or offers what the replica refuses is left, and another endpoint is tried after a
//! jittered pause that grows while nothing is won. None of that touches what the agent knows (I5). While there is a
//! stream the control plane may ask the agent questions over it ([`CallHandler`]); the answers go to the member that
//! asked.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_model::agent::{
    ANSWER_PATH, AgentCall, CallAnswer, FOLLOW_PATH, FOLLOW_PROTOCOL, FRAMES_ACCEPTED, Followed, Frame,
    HandOver, SignedHandOver,
};
use holdfast_model::{Code, RequestId};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::backoff::Backoff;
use crate::error::{ClientError, TransportError};
use crate::frames::{FrameBuffer, FrameError};
use crate::hand_over::{self, HandOverError};
use crate::http::Client;
use crate::replica::{Applied, DiskError, Published, Refusal, Replica};

/// Silence after which a stream counts as dead. Members send a heartbeat every few seconds.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Calls that one stream has under way at most; more are not answered.
pub const CALLS_MAX: usize = 64;
/// Longest that a call may take before it is given up.
pub const CALL_MAX: Duration = Duration::from_secs(60);

const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Answers what the control plane asks.
pub trait CallHandler: Send + Sync + 'static {
    /// Answers one call. Cancelled when the stream ends or [`CALL_MAX`] has passed.
    fn answer(&self, call: AgentCall) -> impl Future<Output = CallAnswer> + Send;
}

/// A handler for agents that have nothing to tell.
#[derive(Debug, Clone, Copy)]
pub struct NoCalls;

impl CallHandler for NoCalls {
    async fn answer(&self, _call: AgentCall) -> CallAnswer {
        CallAnswer::NotFound
    }
}

/// Whether the agent has a stream. For status pages: nothing may be decided by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Link {
    /// No stream, and why the last one ended.
    Down {
        /// In words.
        reason: String,
    },
    /// A stream that has brought at least one frame.
    Up {
        /// The member's endpoint.
        endpoint: String,
    },
}

/// Why a stream was left.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamEnd {
    /// It could not be opened.
    #[error("The stream could not be opened.")]
    Open(#[source] ClientError),
    /// It broke.
    #[error("The stream broke.")]
    Broken(#[source] TransportError),
    /// The member ended it.
    #[error("The member ended the stream.")]
    Ended,
    /// Nothing came for too long.
    #[error("Nothing came for {} ms.", after.as_millis())]
    Silent {
        /// How long.
        after: Duration,
    },
    /// It brought what is no frame.
    #[error("The stream cannot be read.")]
    Frame(#[source] FrameError),
    /// The replica refused a frame.
    #[error("The replica refused a frame.")]
    Refused(#[source] Refusal),
    /// It brought a hand-over that cannot be believed.
    #[error("The stream brought a hand-over that was refused.")]
    HandOver(#[source] HandOverError),
    /// The replica's disk failed.
    #[error("The replica's disk failed; what is known stays in force.")]
    Disk(#[source] DiskError),
    /// A task of this process was torn down.
    #[error("The agent is shutting down.")]
    Stopping,
}

/// Follows into a replica until it is told to stop.
pub struct Follower<T: Followed, H: CallHandler> {
    client: Client,
    replica: Arc<Mutex<Replica<T>>>,
    /// One permit: whoever holds it works on the replica on a thread that may block.
    working: Arc<Semaphore>,
    handler: Arc<H>,
    link: watch::Sender<Link>,
    cut_off: watch::Sender<bool>,
    views: watch::Receiver<Published<T>>,
    silence_max: Duration,
}

impl<T: Followed, H: CallHandler> Follower<T, H> {
    /// A follower for `replica` over `client`, which carries the agent's credential.
    pub fn new(client: Client, replica: Replica<T>, handler: H) -> Follower<T, H> {
        let views = replica.subscribe();
        let link = watch::Sender::new(Link::Down { reason: "not connected yet".into() });
        Follower {
            client,
            replica: Arc::new(Mutex::new(replica)),
            working: Arc::new(Semaphore::new(1)),
            handler: Arc::new(handler),
            link,
            cut_off: watch::Sender::new(false),
            views,
            silence_max: SILENCE_MAX,
        }
    }

    /// The same follower with another bound on silence.
    #[must_use]
    pub fn with_silence_max(self, silence_max: Duration) -> Follower<T, H> {
        Follower { silence_max, ..self }
    }

    /// A receiver of the replica's views.
    pub fn views(&self) -> watch::Receiver<Published<T>> {
        self.views.clone()
    }

    /// A receiver of the state of the link.
    pub fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    /// Becomes true when a member says that an operator has cut this agent off; never false again.
    pub fn cut_off(&self) -> watch::Receiver<bool> {
        self.cut_off.subscribe()
    }

    /// The replica, for a hand-over by an operator. Lock it on a thread that may block.
    pub fn replica(&self) -> Arc<Mutex<Replica<T>>> {
        Arc::clone(&self.replica)
    }

    /// Follows until `stop` becomes true or its sender is gone. When it returns the replica's file is closed, unless
    /// [`Follower::replica`] was handed out.
    pub async fn run(self, stop: watch::Receiver<bool>) {
        self.follow(stop).await;
        // A frame that was being applied when the stop came is applied to the end.
        let _done = self.working.acquire().await;
    }

    async fn follow(&self, mut stop: watch::Receiver<bool>) {
        let stopped = async move {
            // An error means that the sender is gone, which is a reason to stop as well.
            let _ = stop.wait_for(|stop| *stop).await;
        };
        tokio::pin!(stopped);
        let mut backoff = Backoff::new(PAUSE_FIRST, PAUSE_MAX);
        let mut index = self.client.preferred();
        loop {
            let mut won = false;
            let end = tokio::select! {
                () = &mut stopped => return,
                end = self.stream(index, &mut won) => end,
            };
            if won {
                backoff.reset();
            }
            self.report_end(index, &end);
            index = (index + 1) % self.client.endpoints();
            tokio::select! {
                () = &mut stopped => return,
                () = tokio::time::sleep(backoff.next()) => {}
            }
        }
    }

    fn report_end(&self, index: usize, end: &StreamEnd) {
        let endpoint = self.client.endpoint(index);
        let reason = chain(end);
        match end {
            StreamEnd::Disk(_) => tracing::error!(%endpoint, %reason, "the follow stream was left"),
            StreamEnd::Refused(_) | StreamEnd::Frame(_) | StreamEnd::HandOver(_) => {
                tracing::warn!(%endpoint, %reason, "the follow stream was left");
            }
            _ => tracing::info!(%endpoint, %reason, "the follow stream was left"),
        }
        self.link.send_replace(Link::Down { reason });
    }

    /// One stream from its opening to its end; `won` becomes true with the first frame that the replica took.
    async fn stream(&self, index: usize, won: &mut bool) -> StreamEnd {
        let path = match self.begin().await {
            Ok(path) => path,
            Err(end) => return end,
        };
        let body = match self.client.open_at(index, &path, FRAMES_ACCEPTED).await {
            Ok(body) => body,
            Err(error) => {
                // Its word counts: it has shown the authority's certificate.
                if matches!(&error, ClientError::Api(refusal) if refusal.code == Code::Quarantined.as_str()) {
                    self.cut_off.send_replace(true);
                }
                return StreamEnd::Open(error);
            }
        };
        match self.frames(index, body, won).await {
            Ok(never) => match never {},
            Err(end) => end,
        }
    }

    /// Forgets the last stream's unfinished business and says from where to follow.
    async fn begin(&self) -> Result<String, StreamEnd> {
        let mut path = format!("{FOLLOW_PATH}?protocol={FOLLOW_PROTOCOL}");
        let at = self.on_replica(|replica| {
            replica.begin_stream();
            #[cfg(feature = "planted-bugs")]
            if crate::planted::is(crate::planted::Bug::ObeyOlderRevision) {
                // Not nothing: a member makes sure of the first state of an agent that has none.
                let begins = |mut stamp: holdfast_model::agent::Stamp| {
                    stamp.revision = holdfast_model::Revision(0);
                    stamp
                };
                return replica.current().map(|view| begins(view.stamp));
            }
            replica.current().map(|view| view.stamp)
        });
        if let Some(stamp) = at.await? {
            path.push_str(&format!("&incarnation={}&revision={}", stamp.incarnation, stamp.revision));
        }
        Ok(path)
    }

    async fn frames(
        &self,
        index: usize,
        mut body: Incoming,
        won: &mut bool,
    ) -> Result<std::convert::Infallible, StreamEnd> {
        let mut buffer = FrameBuffer::new();
        // Dropped, and so cancelled, with the stream.
        let mut calls = JoinSet::new();
        let permits = Arc::new(Semaphore::new(CALLS_MAX));
        loop {
            while let Some(frame) = buffer.next_frame().map_err(StreamEnd::Frame)? {
                match frame {
                    Frame::Call { id, call } => self.take_call(index, id, call, &permits, &mut calls),
                    Frame::HandOver(signed) => self.take_hand_over(signed).await?,
                    frame => self.take(index, frame, won).await?,
                }
            }
            while calls.try_join_next().is_some() {}
            let next = tokio::time::timeout(self.silence_max, body.frame())
                .await
                .map_err(|_| StreamEnd::Silent { after: self.silence_max })?;
            let chunk = next.ok_or(StreamEnd::Ended)?.map_err(|source| {
                let endpoint = self.client.endpoint(index).to_string();
                StreamEnd::Broken(TransportError::Http { endpoint, source })
            })?;
            if let Some(data) = chunk.data_ref() {
                buffer.extend(data);
            }
        }
    }

    async fn take(&self, index: usize, frame: Frame<T>, won: &mut bool) -> Result<(), StreamEnd> {
        match self.on_replica(|replica| replica.apply(frame)).await?.map_err(StreamEnd::Disk)? {
            Applied::Refused(refusal) => Err(StreamEnd::Refused(refusal)),
            Applied::Held(held) => {
                tracing::warn!(
                    revision = held.revision.0,
                    removes = held.removes,
                    of = held.of,
                    "an update that would remove most of what is known is held until it is confirmed"
                );
                self.is_up(index, won);
                Ok(())
            }
            Applied::Applied => {
                self.is_up(index, won);
                Ok(())
            }
            // Part of a snapshot may still be refused at its end: nothing is won yet, and the pause keeps growing.
            Applied::Staged => Ok(()),
        }
    }

    /// Permits the snapshot that follows to begin a new incarnation, if the cluster's authority says so (I6).
    async fn take_hand_over(&self, signed: SignedHandOver) -> Result<(), StreamEnd> {
        let ca = self.client.authority();
        let taken = self.on_replica(move |replica| {
            let at = replica.current().map(|view| view.stamp);
            let record = hand_over::check(&signed, ca.as_ref(), replica.cluster(), at);
            let record = record.map_err(StreamEnd::HandOver)?;
            replica.hand_over(record.to).map_err(StreamEnd::Disk)?;
            Ok(record)
        });
        let HandOver { from, to, last, .. } = taken.await??;
        tracing::warn!(%from, %to, %last, "the cluster hands this agent over to a new incarnation");
        Ok(())
    }

    fn is_up(&self, index: usize, won: &mut bool) {
        if !*won {
            *won = true;
            let endpoint = self.client.endpoint(index).to_string();
            tracing::info!(%endpoint, "following");
            self.link.send_replace(Link::Up { endpoint });
        }
    }

    fn take_call(
        &self,
        index: usize,
        id: RequestId,
        call: AgentCall,
        permits: &Arc<Semaphore>,
        calls: &mut JoinSet<()>,
    ) {
        let Ok(permit) = Arc::clone(permits).try_acquire_owned() else {
            tracing::warn!(%id, "a call was not answered because {CALLS_MAX} are under way");
            return;
        };
        let (client, handler) = (self.client.clone(), Arc::clone(&self.handler));
        calls.spawn(async move {
            let _permit = permit;
            let Ok(answer) = tokio::time::timeout(CALL_MAX, handler.answer(call)).await else {
                tracing::warn!(%id, "a call took too long and was given up");
                return;
            };
            if let Err(error) = client.post_at(index, &format!("{ANSWER_PATH}/{id}"), &answer).await {
                tracing::warn!(%id, error = %chain(&error), "an answer could not be delivered");
            }
        });
    }

    /// Runs `act` on the replica where it may block.
    async fn on_replica<R: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Replica<T>) -> R + Send + 'static,
    ) -> Result<R, StreamEnd> {
        let permit = Arc::clone(&self.working).acquire_owned().await.map_err(|_| StreamEnd::Stopping)?;
        let replica = Arc::clone(&self.replica);
        let work = move || {
            let outcome = act(&mut replica.lock().unwrap_or_else(PoisonError::into_inner));
            // In this order: whoever gets the permit next finds the replica let go of.
            drop(replica);
            drop(permit);
            outcome
        };
        holdfast_disk_work::run(work).await.map_err(|_| StreamEnd::Stopping)
    }
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push(' ');
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
