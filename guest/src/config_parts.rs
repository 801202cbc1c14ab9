//! A configuration in pieces: secrets alone may be larger than a frame.
//!
//! [`split`] is the agent's half, [`Assembly`] the guest's. Pieces arrive in order; anything else is refused.

use zeroize::Zeroizing;

use crate::{config::GuestConfig, frame::MESSAGE_BYTES_MAX, message::HostMessage};

/// The most bytes that an encoded configuration may have.
pub const CONFIG_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of configuration in one message, well under what a frame holds.
const PART_BYTES_MAX: usize = MESSAGE_BYTES_MAX / 2;

/// Why a configuration could not be sent or put together.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// It is too large.
    #[error(
        "The guest's configuration has {bytes} bytes and {CONFIG_BYTES_MAX} is the most; shorten variables or secrets."
    )]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// It could not be encoded or decoded.
    #[error("The guest's configuration is not of the form that this release expects.")]
    Form(#[source] postcard::Error),
    /// A piece is not the next one.
    #[error(
        "A piece of the configuration arrived at byte {offset} where byte {expected} was due; send it whole again."
    )]
    OutOfOrder {
        /// Where the piece says that it belongs.
        offset: usize,
        /// Where the next piece belongs.
        expected: usize,
    },
}

/// Cuts a configuration into messages, in the order in which they must be sent.
pub fn split(config: &GuestConfig) -> Result<Vec<HostMessage>, ConfigError> {
    let encoded = Zeroizing::new(postcard::to_stdvec(config).map_err(ConfigError::Form)?);
    let total = match u32::try_from(encoded.len()) {
        Ok(total) if encoded.len() <= CONFIG_BYTES_MAX => total,
        _ => return Err(ConfigError::TooLarge { bytes: encoded.len() }),
    };
    let mut offset = 0;
    let mut parts = Vec::with_capacity(encoded.len() / PART_BYTES_MAX + 1);
    for piece in encoded.chunks(PART_BYTES_MAX) {
        parts.push(HostMessage::ConfigPart { offset, total, bytes: piece.to_vec() });
        // Cannot wrap: the sum of the pieces is `total`.
        offset = offset.saturating_add(piece.len() as u32);
    }
    Ok(parts)
}

/// Puts a configuration together again.
#[derive(Default)]
pub struct Assembly {
    /// What has arrived, at most [`CONFIG_BYTES_MAX`].
    bytes: Vec<u8>,
}

impl Assembly {
    /// Nothing has arrived yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next piece; answers with the configuration when it is whole. A piece at offset 0 starts afresh.
    pub fn push(
        &mut self,
        offset: u32,
        total: u32,
        piece: &[u8],
    ) -> Result<Option<GuestConfig>, ConfigError> {
        let (offset, total) = (offset as usize, total as usize);
        if offset == 0 {
            self.bytes.clear();
        }
        if offset != self.bytes.len() {
            return Err(ConfigError::OutOfOrder { offset, expected: self.bytes.len() });
        }
        let end = offset.saturating_add(piece.len());
        if total > CONFIG_BYTES_MAX || end > total {
            self.bytes.clear();
            return Err(ConfigError::TooLarge { bytes: total.max(end) });
        }
        self.bytes.extend_from_slice(piece);
        if end < total {
            return Ok(None);
        }
        let config = postcard::from_bytes(&self.bytes).map_err(ConfigError::Form);
        self.bytes.fill(0);
        self.bytes.clear();
        config.map(Some)
    }
}
