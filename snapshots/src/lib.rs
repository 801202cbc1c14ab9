//! The snapshot format: what a member sends to another and what a backup is made of.
//!
//! A snapshot is a header, chunks of rows tagged with their table, and a trailer; each part carries a BLAKE3 digest
//! and its number, so that truncation, reordering, corruption and foreign versions are refused. See
//! `docs/formats/snapshot.md` for the bytes. Both sides work in bounded memory: one chunk at a time.
//!
//! This crate knows nothing of what the rows mean. It never repairs: a snapshot is whole or refused (I1, I14). Its
//! digests catch faults; they do not tell who wrote a snapshot, which is the transport's to prove.

mod read;
mod write;

pub use read::SnapshotReader;
pub use write::SnapshotWriter;

use std::io;

/// What a snapshot begins with.
pub const MAGIC: [u8; 8] = *b"HFSNAP\r\n";
/// The version of the format that this build writes and reads.
pub const VERSION: u16 = 1;
/// A chunk is closed when it has this many bytes of rows; one longer row makes a longer chunk.
pub const CHUNK_BYTES: usize = 256 << 10;
/// The longest chunk, in bytes: longer ones are refused before they are read.
pub const CHUNK_BYTES_MAX: usize = 16 << 20;
/// The longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 4 << 10;

pub(crate) const HEADER_BYTES: usize = MAGIC.len() + 2;
/// Kind, number, table, length.
pub(crate) const PART_HEADER_BYTES: usize = 1 + 8 + 1 + 4;
pub(crate) const DIGEST_BYTES: usize = 32;
pub(crate) const KIND_ROWS: u8 = 1;
pub(crate) const KIND_END: u8 = 2;

/// What identifies a whole snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Rows in it.
    pub rows: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// BLAKE3 over everything before the trailer's digest.
    pub digest: [u8; DIGEST_BYTES],
}

/// Why a snapshot could not be written or was refused.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Writing failed.
    #[error("The snapshot could not be written: check the disk or the connection that it goes to.")]
    Write {
        /// The system's own error.
        #[source]
        source: io::Error,
    },
    /// Reading failed, or it ended early.
    #[error(
        "The snapshot could not be read at part {part}: it is cut short, or its disk or connection failed; fetch it again."
    )]
    Read {
        /// Which part was being read.
        part: u64,
        /// The system's own error.
        #[source]
        source: io::Error,
    },
    /// Not a snapshot.
    #[error(
        "This is not a Holdfast snapshot: it begins with other bytes; check which file or peer it came from."
    )]
    NotASnapshot,
    /// Another version.
    #[error(
        "The snapshot has format {found} and this build reads format {VERSION}: use a build that reads it."
    )]
    ForeignVersion {
        /// The version found.
        found: u16,
    },
    /// A part's digest is wrong.
    #[error("Part {part} of the snapshot is damaged: its digest does not match; fetch the snapshot again.")]
    Damaged {
        /// Which part.
        part: u64,
    },
    /// A part is not where it belongs.
    #[error("Part {part} of the snapshot is out of place ({what}): fetch the snapshot again.")]
    OutOfPlace {
        /// Which part.
        part: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// A row or chunk is longer than the format allows.
    #[error(
        "Part {part} of the snapshot holds {bytes} bytes, more than the format's {CHUNK_BYTES_MAX}: it is damaged, or its writer is defective."
    )]
    TooLong {
        /// Which part.
        part: u64,
        /// How long it says that it is.
        bytes: u64,
    },
    /// Rows were given in a wrong order.
    #[error("Rows were given to the snapshot out of order: this is a defect of Holdfast; please report it.")]
    RowsOutOfOrder,
}

/// The digest of one part: its header, its place and its bytes.
pub(crate) fn part_digest(header: &[u8], payload: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut hasher = blake3::Hasher::new_derive_key("holdfast 2026 snapshot part v1");
    hasher.update(header);
    hasher.update(payload);
    *hasher.finalize().as_bytes()
}

pub(crate) fn part_header(kind: u8, part: u64, table: u8, length: u32) -> [u8; PART_HEADER_BYTES] {
    let mut header = [0; PART_HEADER_BYTES];
    header[0] = kind;
    header[1..9].copy_from_slice(&part.to_be_bytes());
    header[9] = table;
    header[10..].copy_from_slice(&length.to_be_bytes());
    header
}

#[cfg(test)]
mod tests;
