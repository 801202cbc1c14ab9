//! The redb file: which tables it has, how changes are written into it, and reads from a consistent moment.
//!
//! What is assumed of the disk, and what each table holds byte by byte, is in `docs/formats/state.md`.

use crate::error::StoreError;
use crate::greatest::Greatest;
use crate::head::Head;
use crate::rows::{RowList, Rows, prefix_end, range};
use crate::tables::{Value, is_view};
use holdfast_model::{Digest, LogIndex, Revision};
use redb::{ReadableTable, TableDefinition};
use std::ops::Bound;

pub(crate) type Bytes = &'static [u8];

/// Rows of the views: a function of the events.
pub(crate) const VIEWS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("views");
/// Rows of the log state: a function of the Raft log.
pub(crate) const LOG_STATE: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("log_state");
/// Events by revision.
pub(crate) const EVENTS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("events");
/// Digests of the state by log index.
pub(crate) const DIGESTS: TableDefinition<'static, u64, Bytes> = TableDefinition::new("digests");
/// Single values: [`HEAD`], [`RAFT_META`].
pub(crate) const META: TableDefinition<'static, &'static str, Bytes> = TableDefinition::new("meta");
/// The key of the head in [`META`].
pub(crate) const HEAD: &str = "head";
/// The key of Raft's own bytes in [`META`].
pub(crate) const RAFT_META: &str = "raft";

/// How often a digest of the state is recorded, in log entries: at every index that this divides.
pub const DIGEST_EVERY: u64 = 16;
/// Digests that are kept.
pub const DIGESTS_KEPT: u64 = 256;

/// The record that goes when the digest after an entry is recorded.
pub(crate) fn forgotten_digest(at: LogIndex) -> Option<LogIndex> {
    at.0.checked_sub(DIGEST_EVERY * DIGESTS_KEPT).map(LogIndex)
}

/// Turns redb's many errors into one of ours.
pub(crate) trait Doing<T> {
    /// Names what was being done.
    fn doing(self, what: &'static str) -> Result<T, StoreError>;
}

impl<T, E: Into<redb::Error>> Doing<T> for Result<T, E> {
    fn doing(self, what: &'static str) -> Result<T, StoreError> {
        self.map_err(|e| StoreError::database(what)(e.into()))
    }
}

pub(crate) const READING: &str = "reading a row";
const WRITING: &str = "writing a row";

fn get(table: &impl ReadableTable<Bytes, Bytes>, key: &[u8]) -> Result<Option<Value>, StoreError> {
    Ok(table.get(key).doing(READING)?.map(|guard| guard.value().into()))
}

fn scan(
    table: &impl ReadableTable<Bytes, Bytes>,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<RowList, StoreError> {
    let end = prefix_end(prefix);
    let Some((from, to)) = range(prefix, after, end.as_deref()) else { return Ok(Vec::new()) };
    let mut rows = Vec::new();
    for row in table.range::<&[u8]>((from, to)).doing(READING)?.take(limit) {
        let (key, value) = row.doing(READING)?;
        rows.push((key.value().to_vec(), value.value().into()));
    }
    Ok(rows)
}

/// The rows of a write transaction, as they were before the batch.
pub(crate) struct WriteTables<'t> {
    views: redb::Table<'t, Bytes, Bytes>,
    log_state: redb::Table<'t, Bytes, Bytes>,
    events: redb::Table<'t, u64, Bytes>,
    digests: redb::Table<'t, u64, Bytes>,
    meta: redb::Table<'t, &'static str, Bytes>,
}

impl<'t> WriteTables<'t> {
    pub(crate) fn open(txn: &'t redb::WriteTransaction) -> Result<Self, StoreError> {
        const OPENING: &str = "opening a table";
        Ok(Self {
            views: txn.open_table(VIEWS).doing(OPENING)?,
            log_state: txn.open_table(LOG_STATE).doing(OPENING)?,
            events: txn.open_table(EVENTS).doing(OPENING)?,
            digests: txn.open_table(DIGESTS).doing(OPENING)?,
            meta: txn.open_table(META).doing(OPENING)?,
        })
    }

    pub(crate) fn put(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        let table = if is_view(key) { &mut self.views } else { &mut self.log_state };
        match value {
            Some(value) => drop(table.insert(key, value).doing(WRITING)?),
            None => drop(table.remove(key).doing(WRITING)?),
        }
        Ok(())
    }

    pub(crate) fn put_event(&mut self, revision: Revision, bytes: &[u8]) -> Result<(), StoreError> {
        self.events.insert(revision.0, bytes).doing("writing an event")?;
        Ok(())
    }

    pub(crate) fn put_head(&mut self, head: &Head) -> Result<(), StoreError> {
        let bytes = postcard::to_stdvec(head).map_err(|source| StoreError::Encode { table: HEAD, source })?;
        self.put_meta(HEAD, &bytes)
    }

    pub(crate) fn put_meta(&mut self, name: &'static str, bytes: &[u8]) -> Result<(), StoreError> {
        self.meta.insert(name, bytes).doing("writing the place of the state")?;
        Ok(())
    }

    /// Records the digest of the state after an entry; the oldest record goes.
    pub(crate) fn record_digest(&mut self, at: LogIndex, digest: Digest) -> Result<(), StoreError> {
        self.digests.insert(at.0, digest.0.as_slice()).doing("recording a digest")?;
        if let Some(old) = forgotten_digest(at) {
            self.digests.remove(old.0).doing("recording a digest")?;
        }
        Ok(())
    }
}

/// Writes the views into their table, which has no rows. `show` shows them in key order, each once: redb then builds page
/// after page and searches no row's place, at a third of the price.
pub(crate) fn fill_views(
    txn: &redb::WriteTransaction,
    show: impl FnOnce(&mut dyn FnMut(&[u8], &[u8]) -> Result<(), StoreError>) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut views = txn.open_table(VIEWS).doing(WRITING)?;
    let mut end = views.upper_bound_mut(Bound::<&[u8]>::Unbounded).doing(WRITING)?;
    show(&mut |key, value| end.insert_before(key, value).doing(WRITING))?;
    end.close().doing(WRITING)
}

impl Rows for WriteTables<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        get(if is_view(key) { &self.views } else { &self.log_state }, key)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        scan(if is_view(prefix) { &self.views } else { &self.log_state }, prefix, after, limit)
    }
}

/// The rows of a consistent moment.
pub(crate) struct ReadTables {
    /// Of the rows of the views and of the log state.
    greatest: Greatest,
    views: redb::ReadOnlyTable<Bytes, Bytes>,
    log_state: redb::ReadOnlyTable<Bytes, Bytes>,
    events: redb::ReadOnlyTable<u64, Bytes>,
    digests: redb::ReadOnlyTable<u64, Bytes>,
    meta: redb::ReadOnlyTable<&'static str, Bytes>,
}

impl ReadTables {
    pub(crate) fn open(db: &redb::Database) -> Result<Self, StoreError> {
        use redb::ReadableDatabase;
        const OPENING: &str = "opening a table to read";
        let txn = db.begin_read().doing("beginning to read")?;
        let views = txn.open_table(VIEWS).doing(OPENING)?;
        let log_state = txn.open_table(LOG_STATE).doing(OPENING)?;
        let mut greatest = Greatest::of_nothing();
        greatest.add(&views)?;
        greatest.add(&log_state)?;
        Ok(Self {
            greatest,
            views,
            log_state,
            events: txn.open_table(EVENTS).doing(OPENING)?,
            digests: txn.open_table(DIGESTS).doing(OPENING)?,
            meta: txn.open_table(META).doing(OPENING)?,
        })
    }

    /// Whether no row has this key, as far as can be told without a search.
    pub(crate) fn excludes(&self, key: &[u8]) -> bool {
        self.greatest.excludes(key)
    }

    pub(crate) fn head(&self) -> Result<Head, StoreError> {
        match self.meta(HEAD)? {
            Some(bytes) => {
                postcard::from_bytes(&bytes).map_err(|source| StoreError::Decode { table: HEAD, source })
            }
            None => Ok(Head::default()),
        }
    }

    pub(crate) fn meta(&self, name: &'static str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.meta.get(name).doing("reading the place of the state")?.map(|guard| guard.value().to_vec()))
    }

    pub(crate) fn recorded(&self, at: LogIndex) -> Result<Option<Digest>, StoreError> {
        let found = self.digests.get(at.0).doing("reading a digest")?;
        found.map(|guard| digest_of(guard.value())).transpose()
    }

    pub(crate) fn last_recorded(&self) -> Result<Option<(LogIndex, Digest)>, StoreError> {
        let last = self.digests.last().doing("reading a digest")?;
        last.map(|(at, digest)| Ok((LogIndex(at.value()), digest_of(digest.value())?))).transpose()
    }

    pub(crate) fn all_recorded(
        &self,
    ) -> Result<impl Iterator<Item = Result<(LogIndex, Digest), StoreError>>, StoreError> {
        let range = self.digests.iter().doing("reading digests")?;
        Ok(range.map(|row| {
            let (at, digest) = row.doing("reading digests")?;
            Ok((LogIndex(at.value()), digest_of(digest.value())?))
        }))
    }

    pub(crate) fn event(&self, revision: Revision) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.events.get(revision.0).doing("reading an event")?.map(|guard| guard.value().to_vec()))
    }

    /// The revision of the oldest event that is held.
    pub(crate) fn first_event(&self) -> Result<Option<Revision>, StoreError> {
        let first = self.events.first().doing("reading the first event")?;
        Ok(first.map(|(revision, _)| Revision(revision.value())))
    }

    /// Encoded events after a revision, in order.
    pub(crate) fn events_after(
        &self,
        after: Revision,
    ) -> Result<impl Iterator<Item = Result<(Revision, Vec<u8>), StoreError>>, StoreError> {
        let range = self.events.range(after.0.saturating_add(1)..).doing("reading events")?;
        Ok(range.map(|row| {
            let (revision, bytes) = row.doing("reading events")?;
            Ok((Revision(revision.value()), bytes.value().to_vec()))
        }))
    }

    /// As [`events_after`](Self::events_after), where they lie.
    pub(crate) fn stored_events(
        &self,
        after: Revision,
    ) -> Result<impl Iterator<Item = Result<(Revision, StoredEvent<'_>), StoreError>>, StoreError> {
        let range = self.events.range(after.0.saturating_add(1)..).doing("reading events")?;
        Ok(range.map(|row| {
            let (revision, bytes) = row.doing("reading events")?;
            Ok((Revision(revision.value()), StoredEvent(bytes)))
        }))
    }

    /// Every row of the views, in key order.
    pub(crate) fn view_rows(
        &self,
    ) -> Result<impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>>, StoreError> {
        all(&self.views)
    }

    /// Every row of the log state, in key order.
    pub(crate) fn log_rows(
        &self,
    ) -> Result<impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>>, StoreError> {
        all(&self.log_state)
    }

    /// Shows every row of the views and then of the log state, in key order, where it lies.
    pub(crate) fn for_each_row(&self, mut show: impl FnMut(&[u8], &[u8])) -> Result<(), StoreError> {
        for row in self.views.iter().doing(READING)?.chain(self.log_state.iter().doing(READING)?) {
            let (key, value) = row.doing(READING)?;
            show(key.value(), value.value());
        }
        Ok(())
    }
}

/// An encoded event in its page.
pub(crate) struct StoredEvent<'t>(redb::AccessGuard<'t, Bytes>);

impl AsRef<[u8]> for StoredEvent<'_> {
    fn as_ref(&self) -> &[u8] {
        self.0.value()
    }
}

fn all(
    table: &redb::ReadOnlyTable<Bytes, Bytes>,
) -> Result<impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>>, StoreError> {
    Ok(table.iter().doing(READING)?.map(|row| {
        let (key, value) = row.doing(READING)?;
        Ok((key.value().to_vec(), Value::from(value.value())))
    }))
}

impl Rows for ReadTables {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        if self.excludes(key) {
            return Ok(None);
        }
        get(if is_view(key) { &self.views } else { &self.log_state }, key)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        scan(if is_view(prefix) { &self.views } else { &self.log_state }, prefix, after, limit)
    }
}

fn digest_of(bytes: &[u8]) -> Result<Digest, StoreError> {
    bytes.try_into().map(Digest).map_err(|_| StoreError::corrupt("a recorded digest has another length"))
}

/// Begins a transaction whose commit is on stable storage when it returns.
pub(crate) fn begin_synced(db: &redb::Database) -> Result<redb::WriteTransaction, StoreError> {
    let mut txn = db.begin_write().doing("beginning to write")?;
    txn.set_durability(redb::Durability::Immediate).doing("beginning to write")?;
    // Rows are tenants' words: see `docs/formats/state.md`. Every durable commit of the file is of this kind.
    txn.set_two_phase_commit(true);
    Ok(txn)
}
