//! Frames out of a request's body and into an answer's, one at a time and with a bound on what waits (I14).

use crate::problem::Refusal;
use axum::body::{Body, BodyDataStream, Bytes};
use futures::StreamExt;
use holdfast_model::exec::{self, ExecFrames};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::marker::PhantomData;
use tokio::sync::mpsc;

/// Frames that wait for a slow reader.
const FRAMES_QUEUED_MAX: usize = 4;

/// Reads frames from a body.
pub(crate) struct FrameReader<F> {
    body: BodyDataStream,
    frames: ExecFrames,
    kind: PhantomData<fn() -> F>,
}

impl<F: DeserializeOwned> FrameReader<F> {
    pub(crate) fn new(body: Body) -> Self {
        Self { body: body.into_data_stream(), frames: ExecFrames::new(), kind: PhantomData }
    }

    /// The next frame; `None` when the stream ended or broke, or makes no sense any more. Dropping the returned future
    /// loses nothing.
    pub(crate) async fn next(&mut self) -> Option<F> {
        loop {
            match self.frames.next_frame() {
                Ok(Some(frame)) => return Some(frame),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "an exec stream was given up");
                    return None;
                }
            }
            let chunk = self.body.next().await?.ok()?;
            self.frames.extend(&chunk);
        }
    }
}

/// Writes frames into a body.
pub(crate) struct FrameWriter<F> {
    frames: mpsc::Sender<Bytes>,
    kind: PhantomData<fn(F)>,
}

impl<F: Serialize> FrameWriter<F> {
    /// A writer, and the body that it writes.
    pub(crate) fn new() -> (Self, Body) {
        let (frames, receiver) = mpsc::channel(FRAMES_QUEUED_MAX);
        let stream = futures::stream::unfold(receiver, |mut receiver: mpsc::Receiver<Bytes>| async move {
            let bytes = receiver.recv().await?;
            Some((Ok::<_, Infallible>(bytes), receiver))
        });
        (Self { frames, kind: PhantomData }, Body::from_stream(stream))
    }

    /// Writes a frame as soon as there is room; false when nobody reads any more.
    pub(crate) async fn send(&self, frame: &F) -> Result<bool, Refusal> {
        let bytes = exec::encode(frame).map_err(|e| Refusal::internal(&e))?;
        Ok(self.frames.send(bytes.into()).await.is_ok())
    }

    /// Resolves when nobody reads any more.
    pub(crate) async fn closed(&self) {
        self.frames.closed().await;
    }
}
