//! Frames: a message becomes `COBS(version, session, postcard) 0x00`.
//!
//! The zero byte occurs nowhere else, so a reader that starts in the middle of a frame (the peer was restarted and
//! the pipe still held half of its last frame) loses that one frame and is in step again. The decoder never holds
//! more than [`FRAME_BYTES_MAX`]; it answers every input with frames or errors, never with a panic (I14).

use serde::{Serialize, de::DeserializeOwned};

use crate::{PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST};

/// The most bytes that one frame takes on the wire, its delimiter included.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// The most bytes of a message that fits whatever its content: COBS adds one byte in 254.
pub const MESSAGE_BYTES_MAX: usize = FRAME_BYTES_MAX - FRAME_BYTES_MAX / 254 - HEADER_BYTES - 8;

/// Bytes before the message: the version and the session number.
const HEADER_BYTES: usize = 1 + 8;

/// Ends a frame; sent alone, it flushes whatever a former peer left unfinished.
pub const DELIMITER: u8 = 0;

/// Why a message could not be framed, or a frame not be read. The stream stays usable after each of these.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The message is larger than a frame may be.
    #[error(
        "A message of {bytes} bytes is too large for a frame, which holds {MESSAGE_BYTES_MAX} at most; send it in parts."
    )]
    TooLarge {
        /// Size of the encoded message.
        bytes: usize,
    },
    /// More than a frame's worth of bytes arrived without a delimiter; they were dropped.
    #[error("The peer sent more than {FRAME_BYTES_MAX} bytes without ending a frame; they were dropped.")]
    Overlong,
    /// The bytes between two delimiters are not a frame.
    #[error("The peer sent {bytes} bytes that are not a frame; they were dropped.")]
    Malformed {
        /// How many bytes lay between the delimiters.
        bytes: usize,
    },
    /// The frame is of a version that this build does not speak.
    #[error(
        "The peer speaks version {version} of the guest protocol and this build speaks {PROTOCOL_VERSION_OLDEST} to \
         {PROTOCOL_VERSION}; use a guest image and a node agent of the same release."
    )]
    Version {
        /// What the frame said.
        version: u8,
    },
    /// The message could not be encoded.
    #[error("A message could not be encoded for the guest protocol; this is a defect, please report it.")]
    Encode(#[source] postcard::Error),
}

/// A message, and the version of the protocol in which it came.
pub trait Versioned {
    /// The first version that has the message.
    fn since(&self) -> u8;
}

/// A decoded frame: the session that it belongs to, and its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame<M> {
    /// The session that the sender believed to be in.
    pub session: u64,
    /// What it says.
    pub message: M,
}

/// Encodes one message as a whole frame, delimiter included, at most [`FRAME_BYTES_MAX`] bytes.
pub fn encode<M: Serialize + Versioned>(session: u64, message: &M) -> Result<Vec<u8>, FrameError> {
    let mut plain = Vec::with_capacity(128);
    plain.push(message.since());
    plain.extend_from_slice(&session.to_le_bytes());
    let mut plain = postcard::to_extend(message, plain).map_err(FrameError::Encode)?;
    let bytes = plain.len() - HEADER_BYTES;
    if bytes > MESSAGE_BYTES_MAX {
        return Err(FrameError::TooLarge { bytes });
    }
    let mut wire = cobs::encode_vec(&plain);
    plain.fill(0);
    wire.push(DELIMITER);
    Ok(wire)
}

/// Turns a stream of bytes, however it is cut, into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// Bytes since the last delimiter, at most [`FRAME_BYTES_MAX`].
    pending: Vec<u8>,
    /// Set while the rest of an overlong frame is skipped.
    skipping: bool,
}

impl Decoder {
    /// A decoder at the start of a stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes from `input` up to the end of the next frame and removes them from it. `None` means that the
    /// input is used up and no frame is complete; call again with what arrives next.
    pub fn next_frame<M: DeserializeOwned + Versioned>(
        &mut self,
        input: &mut &[u8],
    ) -> Option<Result<Frame<M>, FrameError>> {
        while !input.is_empty() {
            let end = input.iter().position(|byte| *byte == DELIMITER);
            let taken = end.unwrap_or(input.len());
            let (chunk, rest) = input.split_at(taken);
            *input = rest.get(usize::from(end.is_some())..).unwrap_or_default();
            if !self.skipping {
                if self.pending.len() + chunk.len() < FRAME_BYTES_MAX {
                    self.pending.extend_from_slice(chunk);
                } else {
                    self.skipping = true;
                    self.pending.clear();
                }
            }
            // Without a delimiter, the input is used up and the frame goes on.
            end?;
            if std::mem::take(&mut self.skipping) {
                return Some(Err(FrameError::Overlong));
            }
            // Empty frames are what a peer sends to flush; they say nothing.
            if !self.pending.is_empty() {
                let frame = parse(&mut self.pending);
                self.pending.clear();
                return Some(frame);
            }
        }
        None
    }
}

fn parse<M: DeserializeOwned + Versioned>(wire: &mut [u8]) -> Result<Frame<M>, FrameError> {
    let bytes = wire.len();
    let malformed = FrameError::Malformed { bytes };
    let plain = cobs::decode_vec(wire).map_err(|_| FrameError::Malformed { bytes })?;
    let (version, rest) = plain.split_first().ok_or(FrameError::Malformed { bytes })?;
    if !(PROTOCOL_VERSION_OLDEST..=PROTOCOL_VERSION).contains(version) {
        return Err(FrameError::Version { version: *version });
    }
    let (session, body) = rest.split_first_chunk::<8>().ok_or(FrameError::Malformed { bytes })?;
    match postcard::take_from_bytes::<M>(body) {
        // Only in the version that it came in: a message has one form.
        Ok((message, [])) if message.since() == *version => {
            Ok(Frame { session: u64::from_le_bytes(*session), message })
        }
        Ok(_) | Err(_) => Err(malformed),
    }
}

/// Reads `bytes` as a stream of frames of both directions and forgets them: the entry point of the fuzz target.
/// Whatever it is given, it returns how many frames were well formed.
pub fn decode_untrusted(bytes: &[u8]) -> usize {
    fn count<M: DeserializeOwned + Versioned>(mut bytes: &[u8]) -> usize {
        let mut decoder = Decoder::new();
        let mut frames = 0;
        while let Some(frame) = decoder.next_frame::<M>(&mut bytes) {
            frames += usize::from(frame.is_ok());
        }
        frames
    }
    count::<crate::message::GuestMessage>(bytes) + count::<crate::message::HostMessage>(bytes)
}
