//! The Raft log on disk: `log.redb`, with the vote, the committed log id and the identity of its member, and the journal
//! in which new entries lie until they are taken over ([`crate::log_journal`]).
//!
//! Keeps I2 (nothing is acknowledged before it is on stable storage) and its half of I1 (a record that does not carry its
//! checksum is never applied). It knows nothing of what the entries mean, and it never deletes an entry that the state
//! machine could not rebuild: see [`LogStore::allow_purge_below`].
//!
//! Assumptions about the disk: a completed fsync survives power loss; a write that was not synced may be lost, whole or
//! in part, in any order; a read may return other bytes than were written, which the checksums show.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, Range, RangeBounds};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;

use futures::Stream;
use holdfast_checked_file::{Checked, Checks, open_database};
use openraft::OptionalSend;
use openraft::entry::RaftEntry;
use openraft::storage::{IOFlushed, LogState, RaftLogReader, RaftLogStorage};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use tokio::sync::{mpsc, oneshot};

use crate::disk_work;
use crate::log_journal::JournalPlace;
use crate::log_opening::{self, Recovered};
use crate::log_record::{self, RecordError};
use crate::log_view::{LogView, weight_bytes};
use crate::log_writer::{self, Opened, WriteRequest, WriterState};
use crate::member_identity::MemberIdentity;
use crate::types::{Entry, LogId, TypeConfig, Vote};

pub(crate) const ENTRIES: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("entries");
pub(crate) const META: TableDefinition<'static, &'static str, &'static [u8]> = TableDefinition::new("meta");
pub(crate) const META_VOTE: &str = "vote";
pub(crate) const META_COMMITTED: &str = "committed";
pub(crate) const META_PURGED: &str = "purged";
pub(crate) const META_IDENTITY: &str = "identity";
pub(crate) const META_JOURNAL: &str = "journal";

/// redb's page cache for the log. Small: the tail of the log is kept decoded in memory.
pub(crate) const CACHE_BYTES: usize = 32 * 1024 * 1024;
/// Bytes of entries in one replication request, or one entry if that is larger.
const REPLICATION_BYTES_MAX: usize = 1024 * 1024;
/// Entries that are read at once for the state machine.
const APPLY_READ_ENTRIES: u64 = 1024;
/// Entries that are read at once from disk.
const DISK_READ_ENTRIES: u64 = 4096;

/// Why the log could not be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogStoreError {
    /// The file is not there.
    #[error(
        "there is no raft log at {path}: this folder lost it or never was a member's; do not start it as that member, remove the member and join again under a new id"
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// The file is there and should not be.
    #[error("there is a raft log at {path} already; choose an empty folder")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The file is there and holds nothing.
    #[error(
        "the raft log at {path} is empty: what it held was lost, and with it what this member promised; remove the member and join again under a new id"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The log does not say whose it is.
    #[error(
        "the raft log does not say which member it belongs to; remove the member and join again under a new id"
    )]
    NoIdentity,
    /// An entry that must be there is not.
    #[error(
        "log index {index} is missing between {first} and {last}; take this member out of service and let it heal from its peers"
    )]
    Hole {
        /// The missing index.
        index: u64,
        /// The first index that should be there.
        first: u64,
        /// The last index that should be there.
        last: u64,
    },
    /// The journal is gone.
    #[error(
        "the journal of the raft log is not there although the log was not closed in order, so entries that this member acknowledged may be lost; remove the member and let a new one join under a new id"
    )]
    JournalLost,
    /// The journal is not what was written.
    #[error(
        "the journal of the raft log does not hold at offset {offset} what was written, or belongs to a newer log; the disk returned other bytes, or an older file was put back: remove the member and let a new one join under a new id"
    )]
    JournalRotten {
        /// Where its frame begins.
        offset: u64,
    },
    /// The journal could not be used.
    #[error(
        "the journal of the raft log could not be opened, read or written; check the disk and its free space"
    )]
    Journal(#[source] io::Error),
    /// Entries came out of order.
    #[error("an entry with index {found} came where {expected} should have been; this is a bug, report it")]
    OutOfOrder {
        /// The index that came.
        found: u64,
        /// The index that should have come.
        expected: u64,
    },
    /// A purge beyond what the state machine could rebuild was asked for.
    #[error(
        "purging the log through {asked} was refused, because the state on disk does not cover index {covered_next}; this is a bug, report it"
    )]
    PurgeTooFar {
        /// The index asked for.
        asked: u64,
        /// The first index that is not covered.
        covered_next: u64,
    },
    /// A thread panicked in the middle of a change to what is known of the log.
    #[error("a thread panicked while it held the log's view; report it, and restart the member")]
    Panicked,
    /// The members to be recorded are no membership.
    #[error("the membership of one survivor was refused; this is a bug, report it")]
    Membership(#[source] openraft::errors::MembershipError<u64>),
    /// The writer stopped after an earlier error.
    #[error("the raft log stopped after an error ({0}); restart the member after checking its disk")]
    Stopped(String),
    /// A record was refused.
    #[error("the raft log holds a record that cannot be used")]
    Record(#[from] RecordError),
    /// The writer thread could not be started.
    #[error("the writer thread of the raft log could not be started; check the limits of the process")]
    Thread(#[source] io::Error),
    /// redb could not open the file.
    #[error("the raft log could not be opened; check that no other process has it and that the disk is well")]
    Open(#[from] redb::DatabaseError),
    /// redb could not start a transaction.
    #[error("the raft log could not start a transaction; check the disk")]
    Transaction(#[from] redb::TransactionError),
    /// redb could not open a table.
    #[error("a table of the raft log could not be opened; check the disk")]
    Table(#[from] redb::TableError),
    /// redb could not read or write.
    #[error("the raft log could not be read or written; check the disk")]
    Storage(#[from] redb::StorageError),
    /// redb could not commit.
    #[error("the raft log could not be made durable; check the disk and its free space")]
    Commit(#[from] redb::CommitError),
    /// redb refused the durability.
    #[error("the raft log could not ask for durability; this is a bug, report it")]
    Durability(#[from] redb::SetDurabilityError),
}

impl LogStoreError {
    /// Whether the file holds what was never written to it.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            LogStoreError::Hole { .. }
            | LogStoreError::NoIdentity
            | LogStoreError::Empty { .. }
            | LogStoreError::JournalLost
            | LogStoreError::JournalRotten { .. } => true,
            LogStoreError::Record(error) => !matches!(error, RecordError::Version { .. }),
            other => crate::healing::is_damage(other),
        }
    }
}

impl From<LogStoreError> for io::Error {
    fn from(error: LogStoreError) -> Self {
        io::Error::other(error)
    }
}

/// A handle to the log. Clones share one file and one writer thread.
#[derive(Clone)]
pub struct LogStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Arc<Database>,
    /// Of the blocks of the file.
    checks: Checks,
    /// The first entry that was read and is not what was written.
    damage: OnceLock<String>,
    /// Gone only while the log is being closed.
    queue: Option<mpsc::Sender<WriteRequest>>,
    writer: Option<JoinHandle<()>>,
    state: Arc<WriterState>,
    /// Entries below this index may be purged.
    purgeable_next: AtomicU64,
    identity: Option<MemberIdentity>,
}

impl LogStore {
    /// Creates the log of a new member. Fails when there is one.
    pub fn create(path: &Path, identity: &MemberIdentity) -> Result<Self, LogStoreError> {
        let file = Checked::create_new(path).map_err(|error| match io_kind(&error) {
            Some(io::ErrorKind::AlreadyExists) => LogStoreError::Exists { path: path.into() },
            _ => error.into(),
        })?;
        Self::start(file, JournalPlace::beside(path), Some(identity))
    }

    /// Opens the log of a known member. Fails when there is none, and makes nothing in its place.
    pub fn open(path: &Path) -> Result<Self, LogStoreError> {
        let store = Self::start(open_file(path)?, JournalPlace::beside(path), None)?;
        if store.inner.identity.is_none() {
            return Err(LogStoreError::NoIdentity);
        }
        Ok(store)
    }

    /// Opens or creates a log and its journal on any storages, such as ones that fail on purpose. The journal's keeps the
    /// length that it has. `identity` is written when given.
    pub fn open_with_backend(
        journal: impl StorageBackend,
        backend: impl StorageBackend,
        identity: Option<&MemberIdentity>,
    ) -> Result<Self, LogStoreError> {
        Self::start(Checked::over(backend), JournalPlace::Storage(Box::new(journal)), identity)
    }

    fn start(
        file: Checked,
        journal: JournalPlace,
        new_identity: Option<&MemberIdentity>,
    ) -> Result<Self, LogStoreError> {
        let checks = file.checks();
        let database = open_database(file, CACHE_BYTES)?;
        let journal = log_opening::take_over(&database, journal, new_identity)?;
        let recovered = Recovered::read(&database)?;
        let database = Arc::new(database);
        let state = Arc::new(WriterState {
            view: Arc::new(Mutex::new(recovered.view)),
            failure: std::sync::OnceLock::new(),
            commits: AtomicU64::new(0),
        });
        let opened = Opened {
            database: database.clone(),
            journal,
            identity: recovered.identity.clone(),
            purge_backlog: recovered.purge_backlog,
        };
        let (queue, writer) = log_writer::spawn(opened, state.clone()).map_err(LogStoreError::Thread)?;
        Ok(LogStore {
            inner: Arc::new(Inner {
                database,
                checks,
                damage: OnceLock::new(),
                queue: Some(queue),
                writer,
                state,
                purgeable_next: AtomicU64::new(u64::MAX),
                identity: recovered.identity,
            }),
        })
    }

    /// Which member this log belongs to.
    pub fn identity(&self) -> Option<&MemberIdentity> {
        self.inner.identity.as_ref()
    }

    /// The vote, and the last entry or the last that was purged.
    pub(crate) fn ends(&self) -> Result<(Option<Vote>, Option<LogId>), LogStoreError> {
        let view = self.view()?;
        Ok((view.vote, view.last))
    }

    /// The first index that was not purged.
    pub(crate) fn first_index(&self) -> Result<u64, LogStoreError> {
        Ok(self.view()?.first_index())
    }

    /// The checksums of the file's blocks.
    pub fn checks(&self) -> &Checks {
        &self.inner.checks
    }

    /// What was read of this log and cannot be what was written, once there was something.
    pub(crate) fn damage(&self) -> Option<&str> {
        self.inner.damage.get().map(String::as_str)
    }

    /// Makes the log go on from an entry that is known to be committed: keeps what follows it when the entry is here, and
    /// lets everything go otherwise, because entries that contradict a committed one were never committed themselves.
    pub(crate) async fn continue_from(&mut self, at: LogId) -> io::Result<()> {
        let (purged, last) = {
            let view = self.view()?;
            (view.purged, view.last)
        };
        let next_of = |id: &Option<LogId>| id.as_ref().map_or(0, |id| id.index() + 1);
        if next_of(&purged) > at.index() {
            return Ok(());
        }
        if next_of(&last) > at.index() {
            let found = self.read(at.index(), at.index() + 1).await?;
            if found.first().is_some_and(|entry| entry.log_id() == at) {
                return Ok(());
            }
            self.truncate_after(purged).await?;
        }
        self.purge(at).await?;
        self.flush().await
    }

    /// Whether nothing was ever voted or stored here.
    pub(crate) fn is_unused(&self) -> bool {
        self.view().is_ok_and(|view| view.vote.is_none() && view.last.is_none())
    }

    /// From now on refuses to purge an entry at or after `next_index`: the state machine holds those before it on stable
    /// storage. Without a call any purge is allowed, as in a log that has no state machine.
    pub fn allow_purge_below(&self, next_index: u64) {
        self.inner.purgeable_next.store(next_index, Ordering::Release);
    }

    /// As [`LogStore::allow_purge_below`], but never takes back what was allowed already.
    pub(crate) fn allow_purge_below_at_least(&self, next_index: u64) {
        self.inner.purgeable_next.fetch_max(next_index, Ordering::AcqRel);
    }

    /// The first error of the writer, once there was one. The member must not serve then.
    pub fn failure(&self) -> Option<&str> {
        self.inner.state.failure.get().map(String::as_str)
    }

    /// How many commits, each with one fsync, were made since the log was opened.
    pub fn commits(&self) -> u64 {
        self.inner.state.commits.load(Ordering::Relaxed)
    }

    /// Makes everything durable that was asked for so far, the committed log id included.
    pub async fn flush(&self) -> io::Result<()> {
        self.ask(|done| WriteRequest::Flush { done }).await
    }

    fn view(&self) -> Result<MutexGuard<'_, LogView>, LogStoreError> {
        self.inner.state.view.lock().map_err(|_| LogStoreError::Panicked)
    }

    fn stopped(&self) -> LogStoreError {
        LogStoreError::Stopped(self.failure().unwrap_or("the writer ended").to_owned())
    }

    async fn send(&self, request: WriteRequest) -> io::Result<()> {
        let Some(queue) = &self.inner.queue else { return Err(self.stopped().into()) };
        queue.send(request).await.map_err(|_| self.stopped().into())
    }

    async fn ask(
        &self,
        request: impl FnOnce(oneshot::Sender<io::Result<()>>) -> WriteRequest,
    ) -> io::Result<()> {
        let (done, answer) = oneshot::channel();
        self.send(request(done)).await?;
        answer.await.map_err(|_| io::Error::from(self.stopped()))?
    }

    /// Reads `range`, cut to what the log holds.
    async fn read(&self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        let located = self.view()?.locate(start, end);
        if located.on_disk.is_empty() {
            return Ok(located.in_memory);
        }
        let mut entries = Vec::new();
        let mut next = located.on_disk.start;
        while next < located.on_disk.end {
            let chunk = next..(next + DISK_READ_ENTRIES).min(located.on_disk.end);
            next = chunk.end;
            let store = self.clone();
            let read = disk_work::run(move || store.read_disk(chunk)).await?;
            entries.extend(read.inspect_err(|error| self.note_damage(error))?);
        }
        entries.extend(located.in_memory);
        Ok(entries)
    }

    fn note_damage(&self, error: &LogStoreError) {
        if error.is_damage() {
            self.inner.damage.get_or_init(|| crate::network::chain(error));
        }
    }

    fn read_disk(&self, range: Range<u64>) -> Result<Vec<Entry>, LogStoreError> {
        let transaction = self.inner.database.begin_read()?;
        let table = transaction.open_table(ENTRIES)?;
        let mut entries = Vec::with_capacity((range.end - range.start) as usize);
        let mut expected = range.start;
        for row in table.range(range.clone())? {
            let (key, value) = row?;
            let index = key.value();
            if index != expected && !(entries.is_empty() && self.is_before_first(expected, &table)?) {
                return Err(LogStoreError::Hole { index: expected, first: range.start, last: range.end - 1 });
            }
            entries.push(log_record::decode_entry(index, value.value())?);
            expected = index + 1;
        }
        if expected != range.end && !self.is_before_first(range.end - 1, &table)? {
            return Err(LogStoreError::Hole { index: expected, first: range.start, last: range.end - 1 });
        }
        Ok(entries)
    }

    /// Whether the log rightly does not hold `index`: purged meanwhile, or before the first entry it ever had.
    fn is_before_first(
        &self,
        index: u64,
        table: &impl ReadableTable<u64, &'static [u8]>,
    ) -> Result<bool, LogStoreError> {
        let Ok(view) = self.inner.state.view.lock() else { return Ok(false) };
        if index < view.first_index() {
            return Ok(true);
        }
        let never_purged = view.purged.is_none();
        drop(view);
        Ok(never_purged && table.first()?.is_none_or(|(first, _)| index < first.value()))
    }
}

impl Drop for Inner {
    /// Waits until everything that was asked for is stored and the file is closed, so that it can be opened again.
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the writer thread of the raft log panicked");
        }
    }
}

/// Opens the file of a log that must be there.
pub(crate) fn open_file(path: &Path) -> Result<Checked, LogStoreError> {
    let file = Checked::open_existing(path).map_err(|error| match io_kind(&error) {
        Some(io::ErrorKind::NotFound) => LogStoreError::Missing { path: path.into() },
        _ => error.into(),
    })?;
    // redb takes an empty file for one that it is to make a database of.
    match file.len() {
        Ok(0) => Err(LogStoreError::Empty { path: path.into() }),
        Ok(_) => Ok(file),
        Err(error) => Err(DatabaseError::from(error).into()),
    }
}

fn io_kind(error: &DatabaseError) -> Option<io::ErrorKind> {
    match error {
        DatabaseError::Storage(redb::StorageError::Io(error)) => Some(error.kind()),
        _ => None,
    }
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(before) => before.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(last) => last.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        self.read(start, end).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        Ok(self.view()?.vote)
    }

    /// As many entries as a replication request should carry, and at least one.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let mut entries = self.read(start, end).await?;
        let mut total = 0_usize;
        let fitting = entries.iter().take_while(|entry| {
            total += weight_bytes(entry);
            total <= REPLICATION_BYTES_MAX
        });
        let keep = fitting.count().max(1);
        entries.truncate(keep);
        Ok(entries)
    }

    /// Entries for the state machine, a bounded number in memory at a time.
    async fn entries_stream<RB>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = Result<Entry, io::Error>> + OptionalSend
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        let (start, end) = bounds(&range);
        let state = (self.clone(), start, end, Vec::new().into_iter());
        Box::pin(futures::stream::unfold(Some(state), |state| async move {
            let (store, mut next, end, mut ready) = state?;
            loop {
                if let Some(entry) = ready.next() {
                    return Some((Ok(entry), Some((store, next, end, ready))));
                }
                if next >= end {
                    return None;
                }
                let stop = next.saturating_add(APPLY_READ_ENTRIES).min(end);
                match store.read(next, stop).await {
                    Ok(entries) if entries.is_empty() => return None,
                    Ok(entries) => ready = entries.into_iter(),
                    Err(error) => return Some((Err(error), None)),
                }
                next = stop;
            }
        }))
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        let view = self.view()?;
        Ok(LogState { last_purged_log_id: view.purged, last_log_id: view.last })
    }

    async fn get_log_reader(&mut self) -> Self::LogReader {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.ask(|done| WriteRequest::Vote { vote: *vote, done }).await?;
        self.view()?.vote = Some(*vote);
        Ok(())
    }

    /// Costs no fsync: the writer adds it to the next batch. After a crash an older one is found, which is safe, because
    /// a committed log id only says how far the state machine may be re-applied without asking anybody.
    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        self.view()?.committed = committed;
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.view()?.committed)
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        if self.failure().is_some() {
            return Err(self.stopped().into());
        }
        let entries: Vec<Entry> = entries.into_iter().collect();
        self.view()?.append(&entries).map_err(|expected| LogStoreError::OutOfOrder {
            found: entries.first().map_or(0, RaftEntry::index),
            expected,
        })?;
        self.send(WriteRequest::Append { entries, done: callback }).await
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        let from = last_log_id.as_ref().map_or(0, |last| last.index() + 1);
        let last = match last_log_id {
            Some(last) => Some(last),
            None => self.view()?.purged,
        };
        self.view()?.truncate(from, last);
        self.ask(|done| WriteRequest::Truncate { from, done }).await?;
        // Again: a batch that was under way may have noted truncated entries as durable.
        self.view()?.truncate(from, last);
        Ok(())
    }

    /// Returns before the deletion is durable: a crash only brings back entries that are no longer needed.
    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let covered_next = self.inner.purgeable_next.load(Ordering::Acquire);
        if upto.index() >= covered_next {
            return Err(LogStoreError::PurgeTooFar { asked: upto.index(), covered_next }.into());
        }
        self.view()?.purge(&upto);
        self.send(WriteRequest::Purge { upto }).await
    }
}
