//! The state as a snapshot, and back: which tags its rows have in `holdfast_snapshots`' format.
//!
//! A snapshot is installed in one transaction that commits only when the last byte was read and every digest agrees:
//! those of the format, the sums of the rows, and the chain of the events.

use crate::apply::check_version;
use crate::database::{Doing, EVENTS, LOG_STATE, VIEWS};
use crate::database::{HEAD, RAFT_META, WriteTables};
use crate::error::StoreError;
use crate::event_bytes;
use crate::generation::Generation;
use crate::head::Head;
use crate::tables::{RowSum, is_view};
use crate::views::Views;
use holdfast_model::{Digest, LogIndex, Revision, SupportedVersions};
use holdfast_snapshots::{SnapshotReader, SnapshotWriter};
use std::io;
use std::sync::Arc;

/// The head and Raft's bytes; first, so that a reader knows what is to come.
const TAG_META: u8 = 1;
/// Rows of the views and of the log state.
const TAG_ROWS: u8 = 2;
/// Events by revision, big-endian.
const TAG_EVENTS: u8 = 3;
/// Digests recorded by log index, big-endian.
const TAG_DIGESTS: u8 = 4;

/// A consistent moment that can be written out, as often as one likes.
pub struct SnapshotSource {
    /// Frozen: nothing is added to it any more.
    generation: Arc<Generation>,
    head: Head,
    meta: Option<Arc<[u8]>>,
}

/// What a written or installed snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotSummary {
    /// The state's revision.
    pub revision: Revision,
    /// The last log entry in it.
    pub applied: Option<LogIndex>,
    /// The digest of the state.
    pub state: Digest,
    /// The digest of the snapshot's bytes.
    pub digest: Digest,
    /// The snapshot's length.
    pub bytes: u64,
}

impl SnapshotSource {
    pub(crate) fn new(generation: Arc<Generation>, head: Head, meta: Option<Arc<[u8]>>) -> Self {
        Self { generation, head, meta }
    }

    /// The state's revision.
    pub fn revision(&self) -> Revision {
        self.head.revision
    }

    /// The last log entry in it.
    pub fn applied(&self) -> Option<LogIndex> {
        self.head.applied
    }

    /// Raft's bytes at this very moment.
    ///
    /// # Errors
    /// None; a state that is read may have some.
    pub fn raft_meta(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.meta.as_deref().map(<[u8]>::to_vec))
    }

    /// Writes the snapshot. Two members with the same state, log index and Raft bytes write the same bytes.
    ///
    /// # Errors
    /// When the database or the writing fails.
    pub fn write_to(&self, to: &mut dyn io::Write) -> Result<SnapshotSummary, StoreError> {
        let mut writer = SnapshotWriter::new(to)?;
        let head =
            postcard::to_stdvec(&self.head).map_err(|source| StoreError::Encode { table: HEAD, source })?;
        writer.row(TAG_META, HEAD.as_bytes(), &head)?;
        if let Some(meta) = &self.meta {
            writer.row(TAG_META, RAFT_META.as_bytes(), meta)?;
        }
        for row in self.generation.all_rows(self.head.revision)? {
            let (key, value) = row?;
            writer.row(TAG_ROWS, &key, &value)?;
        }
        for row in self.generation.events_after(Revision(0), self.head.revision)? {
            let (revision, bytes) = row?;
            writer.row(TAG_EVENTS, &revision.0.to_be_bytes(), &bytes)?;
        }
        for (at, digest) in self.generation.all_recorded()? {
            writer.row(TAG_DIGESTS, &at.0.to_be_bytes(), &digest.0)?;
        }
        Ok(summary(&self.head, writer.finish()?))
    }
}

fn summary(head: &Head, written: holdfast_snapshots::Summary) -> SnapshotSummary {
    SnapshotSummary {
        revision: head.revision,
        applied: head.applied,
        state: head.state_digest(),
        digest: Digest(written.digest),
        bytes: written.bytes,
    }
}

/// What was read of a snapshot so far, to be compared with what its head says.
#[derive(Default)]
struct Tally {
    head: Option<Head>,
    views: RowSum,
    log: RowSum,
    revision: Revision,
    chain: Digest,
}

/// Replaces everything in a transaction by a snapshot. The caller commits, or drops the transaction on an error.
pub(crate) fn install(
    txn: &redb::WriteTransaction,
    from: &mut dyn io::Read,
    supported: SupportedVersions,
) -> Result<SnapshotSummary, StoreError> {
    let mut reader = SnapshotReader::new(from)?;
    const CLEARING: &str = "making room for a snapshot";
    for table in [VIEWS, LOG_STATE] {
        txn.delete_table(table).doing(CLEARING)?;
    }
    txn.delete_table(EVENTS).doing(CLEARING)?;
    txn.delete_table(crate::database::DIGESTS).doing(CLEARING)?;
    txn.delete_table(crate::database::META).doing(CLEARING)?;
    let mut tables = WriteTables::open(txn)?;
    let mut tally = Tally::default();
    while let Some(chunk) = reader.next_chunk()? {
        for (key, value) in chunk.rows() {
            install_row(&mut tables, &mut tally, chunk.table, key, value)?;
        }
    }
    let head = tally.check()?;
    tables.put_head(&head)?;
    check_version(tables.cluster_version()?, supported)?;
    let written = reader.summary().ok_or_else(|| StoreError::corrupt("a snapshot did not end"))?;
    Ok(summary(&head, written))
}

fn install_row(
    tables: &mut WriteTables<'_>,
    tally: &mut Tally,
    tag: u8,
    key: &[u8],
    value: &[u8],
) -> Result<(), StoreError> {
    match tag {
        TAG_META if key == HEAD.as_bytes() => {
            let head = postcard::from_bytes(value);
            tally.head = Some(head.map_err(|source| StoreError::Decode { table: HEAD, source })?);
            Ok(())
        }
        TAG_META if key == RAFT_META.as_bytes() => tables.put_meta(RAFT_META, value),
        TAG_ROWS => {
            let sum = if is_view(key) { &mut tally.views } else { &mut tally.log };
            sum.add(key, value);
            #[cfg(feature = "planted-bugs")]
            if crate::planted::drops_outcomes() && key.first() == Some(&(crate::tables::Table::Outcome as u8))
            {
                return Ok(());
            }
            tables.put(key, Some(value))
        }
        TAG_EVENTS => {
            let revision = Revision(number(key)?);
            if revision != tally.revision.next() || event_bytes::continued(tally.chain, value).is_none() {
                return Err(StoreError::corrupt(format!("event {revision} of a snapshot breaks the chain")));
            }
            tally.revision = revision;
            tally.chain = event_bytes::open(value)?.chain;
            tables.put_event(revision, value)
        }
        TAG_DIGESTS => {
            let digest = value.try_into().map_err(|_| StoreError::corrupt("a digest has another length"))?;
            tables.record_digest(LogIndex(number(key)?), Digest(digest))
        }
        _ => Err(StoreError::corrupt(format!(
            "a snapshot holds rows with tag {tag}, which this build does not know"
        ))),
    }
}

fn number(key: &[u8]) -> Result<u64, StoreError> {
    let bytes = key.try_into().map_err(|_| StoreError::corrupt("a numbered row has another key"))?;
    Ok(u64::from_be_bytes(bytes))
}

impl Tally {
    /// The head, if everything that was read is what it says.
    fn check(&self) -> Result<Head, StoreError> {
        let head = self.head.ok_or_else(|| StoreError::corrupt("a snapshot does not say what it holds"))?;
        let same = head.views == self.views
            && head.log == self.log
            && head.revision == self.revision
            && head.chain == self.chain;
        if same { Ok(head) } else { Err(StoreError::corrupt("a snapshot's rows are not those that it says")) }
    }
}

impl std::fmt::Debug for SnapshotSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SnapshotSource {{ revision: {} }}", self.head.revision)
    }
}
