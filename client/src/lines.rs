//! A stream of one JSON value a line, as `holdfast events --follow` and `holdfast logs` read it.
//!
//! Blank lines are skipped, so that a server may send them to keep a quiet stream alive. A peer that is gone without a
//! word is found by the connection's pings.

use std::marker::PhantomData;

use bytes::{Buf, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde::de::DeserializeOwned;

use crate::error::{ClientError, TransportError};

/// Longest line, in bytes.
pub const LINE_BYTES_MAX: usize = 2 << 20;

/// The stream.
pub struct Lines<R> {
    body: Incoming,
    endpoint: String,
    buffer: BytesMut,
    /// Bytes of the buffer that are known to hold no line end.
    searched: usize,
    item: PhantomData<fn() -> R>,
}

impl<R: DeserializeOwned> Lines<R> {
    pub(crate) fn new(body: Incoming, endpoint: String) -> Lines<R> {
        Lines { body, endpoint, buffer: BytesMut::new(), searched: 0, item: PhantomData }
    }

    /// The next value; `None` when the server ended the stream after a whole line. Dropping the returned future loses
    /// nothing.
    ///
    /// # Errors
    /// [`ClientError::Stream`] when it broke, [`ClientError::Answer`] when a line is not what was asked for.
    pub async fn next(&mut self) -> Result<Option<R>, ClientError> {
        loop {
            if let Some(line) = self.take_line()? {
                let line = line.trim_ascii();
                if !line.is_empty() {
                    return serde_json::from_slice(line).map(Some).map_err(ClientError::Answer);
                }
                continue;
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Some(data) = frame.data_ref() {
                        self.buffer.extend_from_slice(data);
                    }
                }
                Some(Err(source)) => {
                    return Err(ClientError::Stream(TransportError::Http {
                        endpoint: self.endpoint.clone(),
                        source,
                    }));
                }
                // What is left without a line end was cut off, and is not to be believed.
                None => return Ok(None),
            }
        }
    }

    fn take_line(&mut self) -> Result<Option<BytesMut>, ClientError> {
        match self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
            Some(at) => {
                let line = self.buffer.split_to(self.searched + at);
                self.buffer.advance(1);
                self.searched = 0;
                Ok(Some(line))
            }
            None if self.buffer.len() > LINE_BYTES_MAX => {
                Err(ClientError::TooLarge { limit: LINE_BYTES_MAX })
            }
            None => {
                self.searched = self.buffer.len();
                Ok(None)
            }
        }
    }
}

impl<R> std::fmt::Debug for Lines<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lines").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}
