//! Cutting the follow stream into [frames](holdfast_model::framing): a length beyond the bound, bytes that are no frame, or
//! a frame with bytes left over end the stream (I14).

use holdfast_model::agent::{FRAME_BYTES_MAX, Followed, Frame};
use holdfast_model::framing::{self, Cutter, FramingError};

/// Why a stream cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The announced length is beyond the bound.
    #[error(
        "A frame of {length} bytes was announced and at most {FRAME_BYTES_MAX} are taken; the server may be of another version."
    )]
    TooLong {
        /// The announced length, in bytes.
        length: usize,
    },
    /// The bytes are no frame.
    #[error("A frame could not be decoded; the server may be of another version.")]
    Decode(#[source] postcard::Error),
    /// The frame has bytes beyond its end.
    #[error("A frame is longer than its content; the server may be of another version.")]
    Trailing,
}

impl From<FramingError> for FrameError {
    fn from(error: FramingError) -> Self {
        match error {
            FramingError::TooLong { length } => Self::TooLong { length },
            FramingError::Postcard(source) => Self::Decode(source),
            FramingError::Trailing => Self::Trailing,
        }
    }
}

/// Bytes that have come in and are not yet a frame. Holds at most one frame and the chunk that completed it.
#[derive(Default)]
pub struct FrameBuffer(Cutter);

impl FrameBuffer {
    /// An empty buffer.
    pub fn new() -> FrameBuffer {
        FrameBuffer::default()
    }

    /// Adds bytes in the order in which they came.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// The next whole frame; `None` until more bytes are added.
    ///
    /// # Errors
    /// [`FrameError`]; the stream is then of no use any more.
    pub fn next_frame<T: Followed>(&mut self) -> Result<Option<Frame<T>>, FrameError> {
        Ok(self.0.next_frame(FRAME_BYTES_MAX)?)
    }
}

/// Encodes a frame as it travels, with its length.
///
/// # Errors
/// [`FrameError::TooLong`] when it is beyond the bound: split it.
pub fn encode<T: Followed>(frame: &Frame<T>) -> Result<Vec<u8>, FrameError> {
    Ok(framing::encode(frame, FRAME_BYTES_MAX)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::agent::{EdgeRoute, Stamp};
    use holdfast_model::{ClusterId, Incarnation, Revision, RouteId};
    use proptest::prelude::*;

    fn frames() -> Vec<Frame<EdgeRoute>> {
        let stamp =
            Stamp { cluster: ClusterId::from_bits(1), incarnation: Incarnation(1), revision: Revision(300) };
        vec![
            Frame::SnapshotBegin { stamp, items: 0, confirmed_through: Revision(0) },
            Frame::SnapshotEnd,
            Frame::Delta {
                from: Revision(300),
                stamp,
                upserts: vec![],
                removes: (0..40).map(RouteId::from_bits).collect(),
                confirmed_through: Revision(3),
            },
            Frame::Heartbeat { stamp, confirmed_through: Revision(3) },
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_chunking(cuts in proptest::collection::vec(1..40usize, 1..60)) {
            let stream: Vec<u8> = frames().iter().flat_map(|frame| encode(frame).unwrap()).collect();
            let (mut buffer, mut got, mut at) = (FrameBuffer::new(), Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                let end = (at + cut).min(stream.len());
                buffer.extend(&stream[at..end]);
                at = end;
                while let Some(frame) = buffer.next_frame::<EdgeRoute>().unwrap() {
                    got.push(frame);
                }
                if at == stream.len() {
                    break;
                }
            }
            prop_assert_eq!(got, frames());
        }

        #[test]
        fn i14_any_bytes_end_in_a_frame_an_error_or_a_wait(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut buffer = FrameBuffer::new();
            buffer.extend(&bytes);
            while let Ok(Some(_)) = buffer.next_frame::<EdgeRoute>() {}
        }
    }

    #[test]
    fn i14_an_absurd_length_is_refused_before_anything_is_kept() {
        let mut buffer = FrameBuffer::new();
        buffer.extend(&u32::MAX.to_be_bytes());
        assert!(matches!(buffer.next_frame::<EdgeRoute>(), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn trailing_bytes_are_refused() {
        let mut bytes = encode(&frames()[1]).unwrap();
        bytes.push(0);
        bytes[3] += 1;
        let mut buffer = FrameBuffer::new();
        buffer.extend(&bytes);
        assert_eq!(buffer.next_frame::<EdgeRoute>(), Err(FrameError::Trailing));
    }
}
