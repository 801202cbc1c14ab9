//! Frames on an ordered stream: a big-endian `u32` of a frame's length, and so many bytes of postcard.
//!
//! Each protocol on top of it has its own bound, and its own words for what is wrong. Bounded and total: a length beyond
//! the bound is refused before anything is kept for it, and no bytes panic (I14).

use serde::Serialize;
use serde::de::DeserializeOwned;

const LENGTH_BYTES: usize = 4;

/// Why a frame cannot be written, or a stream not be read on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FramingError {
    /// The frame is beyond the bound.
    #[error("a frame of {length} bytes is longer than one may be")]
    TooLong {
        /// Its length, or what was announced, in bytes.
        length: usize,
    },
    /// It could not be written, or the bytes are none.
    #[error("a frame could not be encoded or decoded")]
    Postcard(#[source] postcard::Error),
    /// It has bytes beyond its end.
    #[error("a frame is longer than its content")]
    Trailing,
}

/// A frame as it travels, with its length in front.
///
/// # Errors
/// [`FramingError`] when it is longer than `bytes_max`, or cannot be encoded.
pub fn encode<F: Serialize>(frame: &F, bytes_max: usize) -> Result<Vec<u8>, FramingError> {
    let mut bytes = postcard::to_extend(frame, vec![0; LENGTH_BYTES]).map_err(FramingError::Postcard)?;
    let length = bytes.len() - LENGTH_BYTES;
    let announced = u32::try_from(length).ok().filter(|_| length <= bytes_max);
    let announced = announced.ok_or(FramingError::TooLong { length })?;
    bytes[..LENGTH_BYTES].copy_from_slice(&announced.to_be_bytes());
    Ok(bytes)
}

/// Cuts a stream into frames. Holds one frame at most, and what came with its end.
#[derive(Default)]
pub struct Cutter {
    bytes: Vec<u8>,
    used: usize,
}

impl Cutter {
    /// Adds what came next.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.used);
        self.used = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame, of at most so many bytes; `None` until more comes.
    ///
    /// # Errors
    /// [`FramingError`]; nothing can be read after it.
    pub fn next_frame<F: DeserializeOwned>(&mut self, bytes_max: usize) -> Result<Option<F>, FramingError> {
        let rest = self.bytes.get(self.used..).unwrap_or_default();
        let Some((prefix, body)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > bytes_max {
            return Err(FramingError::TooLong { length });
        }
        let Some(body) = body.get(..length) else { return Ok(None) };
        let (frame, after) = postcard::take_from_bytes(body).map_err(FramingError::Postcard)?;
        if !after.is_empty() {
            return Err(FramingError::Trailing);
        }
        self.used += LENGTH_BYTES + length;
        Ok(Some(frame))
    }
}
