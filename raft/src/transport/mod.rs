//! How members talk: length-prefixed postcard frames over mutually authenticated links.
//!
//! [`link`] makes an authenticated byte stream between two members; everything above it only sees such streams, so a
//! simulated network can take its place. [`message`] is what is said. [`channel`] is the side that asks, [`server`] the
//! side that answers. A channel shares one connection among all its calls by request id, reconnects with a jittered
//! back-off, and gives every wait a deadline. Channels for votes and heartbeats, for the log, for applications and for
//! snapshots are apart, so that a large transfer never delays a heartbeat.
//!
//! Nothing here panics on what a peer sends (I14): a frame that is too long or does not decode closes the connection.

pub(crate) mod channel;
pub(crate) mod link;
pub(crate) mod message;
pub(crate) mod server;

pub use link::RaftTls;

use link::Duplex;
use tokio::io::{ReadHalf, WriteHalf};
use tokio_util::codec::{FramedRead, LengthDelimitedCodec};

/// The version of the protocol that this build speaks. The handshake refuses a peer that cannot speak it too.
pub(crate) const PROTOCOL_VERSION: u8 = 1;

/// The largest frame, either way: a few of the largest proposals, or one chunk of a snapshot.
pub(crate) const FRAME_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Where the frames of a connection come from. One reader serves the greeting and everything after it, because what it
/// read ahead belongs to both.
type Incoming = FramedRead<ReadHalf<Box<dyn Duplex>>, LengthDelimitedCodec>;
/// Where the bytes of a connection go to.
type Outgoing = WriteHalf<Box<dyn Duplex>>;

/// Cuts a stream into frames: a little-endian length of four bytes, then that many bytes.
fn open(io: Box<dyn Duplex>) -> (Incoming, Outgoing) {
    let codec = LengthDelimitedCodec::builder()
        .little_endian()
        .length_field_length(LENGTH_BYTES)
        .max_frame_length(FRAME_BYTES_MAX)
        .new_codec();
    let (read, write) = tokio::io::split(io);
    (FramedRead::new(read, codec), write)
}

/// Room for a frame, so that most never have to grow into a larger piece of memory.
const ROOM_BYTES: usize = 1024;
/// Bytes before the body of a frame.
const LENGTH_BYTES: usize = 4;

/// Why a frame could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("the message has {0} bytes and a frame holds {FRAME_BYTES_MAX}; send less at a time")]
    TooLarge(usize),
    #[error("the message could not be encoded; this is a bug, report it")]
    Encode(#[source] postcard::Error),
}

/// Encodes a frame with its length before it.
fn encode_frame<T: serde::Serialize>(value: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = Vec::with_capacity(ROOM_BYTES);
    bytes.resize(LENGTH_BYTES, 0);
    let mut bytes = postcard::to_extend(value, bytes).map_err(FrameError::Encode)?;
    let body = bytes.len() - LENGTH_BYTES;
    match u32::try_from(body) {
        Ok(length) if body <= FRAME_BYTES_MAX => {
            bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
            Ok(bytes)
        }
        _ => Err(FrameError::TooLarge(body)),
    }
}
