//! A stream of frames in both directions in one HTTP/2 request: an exec session, as a person and as a node have it.
//!
//! What is under way is bounded: a few frames here, and HTTP/2's windows on the way. A stream is opened at one member
//! and never tried again: a grant is good for one session.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use holdfast_model::ExecGrantId;
use holdfast_model::exec::{self, EXEC_MEDIA_TYPE, EXEC_NODE_PATH, ExecFrames, ExecInput, ExecOutput};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::connection::Line;
use crate::endpoint::Endpoint;
use crate::error::{ClientError, TransportError};
use crate::http::Client;

/// How long a member may take to answer a person: it asks the node, which dials back.
pub const OPEN_MAX: Duration = Duration::from_secs(25);

/// How long a member may take to answer a node.
pub const NODE_OPEN_MAX: Duration = Duration::from_secs(10);

/// Frames that wait to be sent.
const FRAMES_QUEUED_MAX: usize = 4;

/// One end of a session: sends `S`, and hears `R`.
#[derive(Debug)]
pub struct ExecStream<S, R> {
    /// Sends.
    pub sender: ExecSender<S>,
    /// Hears.
    pub receiver: ExecReceiver<R>,
}

/// Sends frames. When it is dropped, the other side is told that no more follow.
#[derive(Debug)]
pub struct ExecSender<S> {
    endpoint: String,
    frames: mpsc::Sender<Bytes>,
    kind: PhantomData<fn(S)>,
}

/// Hears frames.
pub struct ExecReceiver<R> {
    endpoint: String,
    body: Incoming,
    frames: ExecFrames,
    kind: PhantomData<fn() -> R>,
}

impl<R> std::fmt::Debug for ExecReceiver<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecReceiver").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Client {
    /// Uses a grant up: opens its session, whose first frame is an [`ExecInput::Open`].
    ///
    /// # Errors
    /// [`ClientError`], as the member refused it.
    pub async fn exec(
        &self,
        grant: ExecGrantId,
        open: &ExecInput,
    ) -> Result<ExecStream<ExecInput, ExecOutput>, ClientError> {
        let path = format!("/v1/exec/{grant}/session");
        self.open_exec(self.preferred_line(), &path, Some(open), OPEN_MAX).await
    }

    /// Takes a node's part of a session, at the member that asked for it.
    ///
    /// # Errors
    /// [`ClientError`], as the member refused it.
    pub async fn exec_for(
        &self,
        member: Endpoint,
        grant: ExecGrantId,
    ) -> Result<ExecStream<ExecOutput, ExecInput>, ClientError> {
        let line = Line::new(member);
        self.open_exec(&line, &format!("{EXEC_NODE_PATH}/{grant}"), None, NODE_OPEN_MAX).await
    }

    async fn open_exec<S: Serialize, R: DeserializeOwned>(
        &self,
        line: &Line,
        path: &str,
        first: Option<&S>,
        within: Duration,
    ) -> Result<ExecStream<S, R>, ClientError> {
        let endpoint = line.endpoint().to_string();
        let (frames, queued) = mpsc::channel(FRAMES_QUEUED_MAX);
        let sender = ExecSender { endpoint: endpoint.clone(), frames, kind: PhantomData };
        if let Some(first) = first {
            sender.send(first).await?;
        }
        let frames = stream::unfold(queued, |mut queued| async move {
            let bytes: Bytes = queued.recv().await?;
            Some((Ok::<_, Infallible>(Frame::data(bytes)), queued))
        });
        let body = StreamBody::new(frames).boxed_unsync();
        let response = self.stream_at(line, path, EXEC_MEDIA_TYPE, body, within).await?;
        let (body, frames) = (response.into_body(), ExecFrames::new());
        Ok(ExecStream { sender, receiver: ExecReceiver { endpoint, body, frames, kind: PhantomData } })
    }
}

impl<S: Serialize> ExecSender<S> {
    /// Sends a frame, as soon as there is room for it.
    ///
    /// # Errors
    /// [`ClientError::Stream`] when nobody hears it any more.
    pub async fn send(&self, frame: &S) -> Result<(), ClientError> {
        let bytes = exec::encode(frame).map_err(ClientError::Exec)?;
        let gone = || TransportError::Closed { endpoint: self.endpoint.clone() };
        self.frames.send(bytes.into()).await.map_err(|_| ClientError::Stream(gone()))
    }

    /// Resolves when nobody hears it any more.
    pub async fn closed(&self) {
        self.frames.closed().await;
    }
}

impl<R: DeserializeOwned> ExecReceiver<R> {
    /// The next frame; `None` at the end of the stream. Dropping the returned future loses nothing.
    ///
    /// # Errors
    /// [`ClientError::Stream`] when the stream broke, [`ClientError::Exec`] when it makes no sense.
    pub async fn next(&mut self) -> Result<Option<R>, ClientError> {
        loop {
            if let Some(frame) = self.frames.next_frame().map_err(ClientError::Exec)? {
                return Ok(Some(frame));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.frames.extend(data);
                    }
                }
                Some(Err(source)) => {
                    let endpoint = self.endpoint.clone();
                    return Err(ClientError::Stream(TransportError::Http { endpoint, source }));
                }
                None => return Ok(None),
            }
        }
    }
}
