//! Reads a snapshot, chunk by chunk, and refuses whatever is not exactly what a writer wrote.

use crate::{
    CHUNK_BYTES_MAX, DIGEST_BYTES, HEADER_BYTES, KEY_BYTES_MAX, KIND_END, KIND_ROWS, MAGIC,
    PART_HEADER_BYTES, SnapshotError, Summary, VERSION, part_digest,
};
use std::io::Read;

/// Reads one snapshot. Rows that were handed out count for nothing until [`next_chunk`](Self::next_chunk) has
/// answered `None`: only then is the snapshot known to be whole.
pub struct SnapshotReader<'r> {
    from: &'r mut dyn Read,
    whole: blake3::Hasher,
    bytes: u64,
    rows: u64,
    part: u64,
    table: u8,
    last_key: Vec<u8>,
    summary: Option<Summary>,
}

/// Rows of one table.
#[derive(Debug)]
pub struct Chunk {
    /// The table's tag.
    pub table: u8,
    payload: Vec<u8>,
}

impl Chunk {
    /// The rows, in key order: keys and values. They were checked when the chunk was read.
    pub fn rows(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let mut rest = self.payload.as_slice();
        std::iter::from_fn(move || {
            let (key, value, after) = split_row(rest)?;
            rest = after;
            Some((key, value))
        })
    }
}

/// The first row of a payload, and what comes after it.
fn split_row(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (key_length, rest) = bytes.split_first_chunk::<4>()?;
    let (value_length, rest) = rest.split_first_chunk::<4>()?;
    let (key, rest) = rest.split_at_checked(u32::from_be_bytes(*key_length) as usize)?;
    let (value, rest) = rest.split_at_checked(u32::from_be_bytes(*value_length) as usize)?;
    Some((key, value, rest))
}

impl<'r> SnapshotReader<'r> {
    /// Reads the header.
    ///
    /// # Errors
    /// When reading fails, and when this is no snapshot, or one of another version.
    pub fn new(from: &'r mut dyn Read) -> Result<Self, SnapshotError> {
        let mut reader = Self {
            from,
            whole: blake3::Hasher::new(),
            bytes: 0,
            rows: 0,
            part: 0,
            table: 0,
            last_key: Vec::new(),
            summary: None,
        };
        let mut header = [0; HEADER_BYTES];
        reader.take(&mut header)?;
        let (magic, version) = header.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(SnapshotError::NotASnapshot);
        }
        let found = u16::from_be_bytes([version[0], version[1]]);
        if found != VERSION {
            return Err(SnapshotError::ForeignVersion { found });
        }
        Ok(reader)
    }

    /// The next rows; `None` when the snapshot is whole.
    ///
    /// # Errors
    /// When reading fails, and when the snapshot is refused.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk>, SnapshotError> {
        if self.summary.is_some() {
            return Ok(None);
        }
        let part = self.part;
        let mut header = [0; PART_HEADER_BYTES];
        self.take(&mut header)?;
        let number = header[1..9].iter().fold(0u64, |sum, byte| (sum << 8) | u64::from(*byte));
        let length = header[10..].iter().fold(0usize, |sum, byte| (sum << 8) | usize::from(*byte));
        if number != part {
            return Err(SnapshotError::OutOfPlace { part, what: "it has another number" });
        }
        if length > CHUNK_BYTES_MAX {
            return Err(SnapshotError::TooLong { part, bytes: length as u64 });
        }
        match header[0] {
            KIND_ROWS => self.read_rows(&header, length).map(Some),
            KIND_END => self.read_end(length).map(|()| None),
            _ => Err(SnapshotError::OutOfPlace { part, what: "it is of no known kind" }),
        }
    }

    /// What was read, once the snapshot is whole.
    pub fn summary(&self) -> Option<Summary> {
        self.summary
    }

    fn read_rows(&mut self, header: &[u8; PART_HEADER_BYTES], length: usize) -> Result<Chunk, SnapshotError> {
        let part = self.part;
        let mut payload = vec![0; length];
        self.take(&mut payload)?;
        let mut digest = [0; DIGEST_BYTES];
        self.take(&mut digest)?;
        if digest != part_digest(header, &payload) {
            return Err(SnapshotError::Damaged { part });
        }
        let chunk = Chunk { table: header[9], payload };
        self.check_rows(&chunk)?;
        self.part += 1;
        Ok(chunk)
    }

    /// Checks that the rows fill the chunk and follow those before.
    fn check_rows(&mut self, chunk: &Chunk) -> Result<(), SnapshotError> {
        let part = self.part;
        let mut rest = chunk.payload.as_slice();
        if rest.is_empty() {
            return Err(SnapshotError::OutOfPlace { part, what: "it holds no row" });
        }
        while !rest.is_empty() {
            let Some((key, _, after)) = split_row(rest) else {
                return Err(SnapshotError::OutOfPlace { part, what: "a row is cut short" });
            };
            let follows = self.rows == 0
                || chunk.table > self.table
                || (chunk.table == self.table && key > self.last_key.as_slice());
            if !follows || key.len() > KEY_BYTES_MAX {
                return Err(SnapshotError::OutOfPlace { part, what: "a row is out of order" });
            }
            self.table = chunk.table;
            key.clone_into(&mut self.last_key);
            self.rows += 1;
            rest = after;
        }
        Ok(())
    }

    fn read_end(&mut self, length: usize) -> Result<(), SnapshotError> {
        let part = self.part;
        if length != 8 {
            return Err(SnapshotError::OutOfPlace { part, what: "its end has another length" });
        }
        let mut rows = [0; 8];
        self.take(&mut rows)?;
        let expected = *self.whole.finalize().as_bytes();
        let mut digest = [0; DIGEST_BYTES];
        self.take(&mut digest)?;
        if digest != expected || u64::from_be_bytes(rows) != self.rows {
            return Err(SnapshotError::Damaged { part });
        }
        let mut extra = [0; 1];
        let more = self.from.read(&mut extra).map_err(|source| SnapshotError::Read { part, source })?;
        if more != 0 {
            return Err(SnapshotError::OutOfPlace { part, what: "something follows its end" });
        }
        self.summary = Some(Summary { rows: self.rows, bytes: self.bytes, digest });
        Ok(())
    }

    fn take(&mut self, bytes: &mut [u8]) -> Result<(), SnapshotError> {
        let part = self.part;
        self.from.read_exact(bytes).map_err(|source| SnapshotError::Read { part, source })?;
        self.whole.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}
