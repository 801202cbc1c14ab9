//! Checkpoints: what changed in memory goes to the disk, in the order of keys, in one synced transaction, while applies
//! go on above it.
//!
//! What is written is frozen first, so that the rows, the place in the log and Raft's bytes are of one moment (I2). A
//! checkpoint that failed is never tried again: what is on the disk is unknown then, and the store ends its service.

use crate::database::{Doing, RAFT_META, WriteTables, begin_synced};
use crate::error::StoreError;
use crate::generation::{Base, Generation};
use crate::head::Head;
use crate::store::Store;
use crate::tables::is_view;
use crate::writer::Writer;
use holdfast_model::LogIndex;
use std::sync::{Arc, PoisonError};

/// Checkpoints before the last whose revisions can still be read.
const PAST_MAX: usize = 2;
/// Memory of what changed before the last checkpoint, in bytes: with more, fewer revisions can be read.
const PAST_BYTES_MAX: usize = 64 << 20;

impl Store {
    /// Puts everything that was applied before this call on stable storage; answers with the last entry that now is.
    /// Applies go on meanwhile. One checkpoint runs at a time.
    ///
    /// # Errors
    /// When the disk fails: the member must stop, because what is on the disk is unknown.
    pub fn checkpoint(&self) -> Result<Option<LogIndex>, StoreError> {
        let _turn = self.turn()?;
        let mut writer = self.writer()?;
        writer.freeze();
        self.publish(&mut writer);
        let (generation, head, meta) = (writer.generation.clone(), *writer.head(), writer.meta.clone());
        drop(writer);
        if generation.frozen.is_empty() && generation.base.head == head && generation.base.meta == meta {
            return Ok(head.applied);
        }
        let base = self.write(&generation, &head, meta.as_deref()).inspect_err(|_| self.end_service())?;
        // What goes out of use is dropped at the end, when nobody waits for a lock.
        let forgotten = self.remember(&generation);
        let mut writer = self.writer()?;
        writer.rebase(base, generation.frozen.len());
        self.publish(&mut writer);
        drop(writer);
        drop(forgotten);
        Ok(head.applied)
    }

    /// Writes down all that a writer has, which is frozen, while it waits.
    pub(crate) fn write_down(&self, writer: &mut Writer) -> Result<(), StoreError> {
        let base = self.write(&writer.generation, writer.head(), writer.meta.as_deref())?;
        let written = writer.generation.frozen.len();
        writer.rebase(base, written);
        Ok(())
    }

    /// Writes what is frozen in one transaction and answers with what the database then holds.
    fn write(&self, generation: &Generation, head: &Head, meta: Option<&[u8]>) -> Result<Base, StoreError> {
        let txn = begin_synced(&self.db)?;
        write_frozen(&mut WriteTables::open(&txn)?, generation, head, meta)?;
        txn.commit().doing("making a checkpoint")?;
        Base::open(&self.db)
    }

    /// Keeps a generation that was written down for those who ask for its revisions; answers with those that go.
    fn remember(&self, written: &Generation) -> Vec<Arc<Generation>> {
        let Some((newest, older)) = written.frozen.split_first() else { return Vec::new() };
        let kept =
            Generation { base: written.base.clone(), frozen: older.to_vec(), active: newest.recent.clone() };
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        past.push_back(Arc::new(kept));
        let mut forgotten = Vec::new();
        let bytes = |generation: &Arc<Generation>| generation.active.bytes() + generation.frozen_bytes();
        while past.len() > PAST_MAX || past.iter().map(bytes).sum::<usize>() > PAST_BYTES_MAX {
            forgotten.extend(past.pop_front());
        }
        forgotten
    }
}

/// Writes what is frozen into tables.
fn write_frozen(
    tables: &mut WriteTables<'_>,
    generation: &Generation,
    head: &Head,
    meta: Option<&[u8]>,
) -> Result<(), StoreError> {
    for frozen in generation.frozen.iter().rev() {
        // What is sealed stands among the log's rows as well.
        for (key, change) in frozen.recent.newest().filter(|(key, _)| is_view(key)) {
            tables.put(&key, change.as_deref())?;
        }
        for (key, change) in frozen.latest.log_rows() {
            tables.put(key, change.as_deref())?;
        }
        let history = frozen.recent.history();
        let mut revision = frozen.recent.after();
        for bytes in &history.events {
            revision = revision.next();
            tables.put_event(revision, bytes)?;
        }
        for (at, digest) in &history.digests {
            tables.record_digest(*at, *digest)?;
        }
    }
    if let Some(meta) = meta {
        tables.put_meta(RAFT_META, meta)?;
    }
    tables.put_head(head)
}
