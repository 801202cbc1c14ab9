//! Writes a snapshot: rows are given table by table, in key order, and leave in chunks.

use crate::{
    CHUNK_BYTES, CHUNK_BYTES_MAX, KEY_BYTES_MAX, KIND_END, KIND_ROWS, MAGIC, SnapshotError, Summary, VERSION,
    part_digest, part_header,
};
use std::io::Write;

/// Writes one snapshot. A snapshot that was not [finished](Self::finish) is refused by every reader.
pub struct SnapshotWriter<'w> {
    to: &'w mut dyn Write,
    /// Over everything written so far.
    whole: blake3::Hasher,
    bytes: u64,
    rows: u64,
    part: u64,
    table: u8,
    last_key: Option<Vec<u8>>,
    chunk: Vec<u8>,
}

impl<'w> SnapshotWriter<'w> {
    /// Begins a snapshot.
    ///
    /// # Errors
    /// When writing fails.
    pub fn new(to: &'w mut dyn Write) -> Result<Self, SnapshotError> {
        let mut writer = Self {
            to,
            whole: blake3::Hasher::new(),
            bytes: 0,
            rows: 0,
            part: 0,
            table: 0,
            last_key: None,
            chunk: Vec::with_capacity(CHUNK_BYTES),
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_be_bytes())?;
        Ok(writer)
    }

    /// Adds a row. Tables come in rising order, and so do the keys of one table.
    ///
    /// # Errors
    /// When writing fails, when a row is too long, and when rows are out of order.
    pub fn row(&mut self, table: u8, key: &[u8], value: &[u8]) -> Result<(), SnapshotError> {
        let follows = match &self.last_key {
            Some(last) => table > self.table || (table == self.table && key > last.as_slice()),
            None => true,
        };
        if !follows {
            return Err(SnapshotError::RowsOutOfOrder);
        }
        let length = 8 + key.len() + value.len();
        if key.len() > KEY_BYTES_MAX || length > CHUNK_BYTES_MAX {
            return Err(SnapshotError::TooLong { part: self.part, bytes: length as u64 });
        }
        let full = self.chunk.len() + length > CHUNK_BYTES;
        if !self.chunk.is_empty() && (full || table != self.table) {
            self.flush()?;
        }
        self.table = table;
        // Both fit: they are at most CHUNK_BYTES_MAX.
        self.chunk.extend_from_slice(&(key.len() as u32).to_be_bytes());
        self.chunk.extend_from_slice(&(value.len() as u32).to_be_bytes());
        self.chunk.extend_from_slice(key);
        self.chunk.extend_from_slice(value);
        self.last_key = Some(key.to_vec());
        self.rows += 1;
        Ok(())
    }

    /// Ends the snapshot and flushes it.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> Result<Summary, SnapshotError> {
        if !self.chunk.is_empty() {
            self.flush()?;
        }
        let header = part_header(KIND_END, self.part, 0, 8);
        self.put(&header)?;
        let rows = self.rows.to_be_bytes();
        self.put(&rows)?;
        let digest = *self.whole.finalize().as_bytes();
        self.put(&digest)?;
        self.to.flush().map_err(|source| SnapshotError::Write { source })?;
        Ok(Summary { rows: self.rows, bytes: self.bytes, digest })
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        let chunk = std::mem::take(&mut self.chunk);
        let header = part_header(KIND_ROWS, self.part, self.table, chunk.len() as u32);
        self.put(&header)?;
        self.put(&chunk)?;
        self.put(&part_digest(&header, &chunk))?;
        self.part += 1;
        self.chunk = chunk;
        self.chunk.clear();
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.whole.update(bytes);
        self.bytes += bytes.len() as u64;
        self.to.write_all(bytes).map_err(|source| SnapshotError::Write { source })
    }
}
