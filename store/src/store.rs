//! The store: one redb file, one writer at a time, any number of readers.

use crate::apply::{apply_entries, check_version};
use crate::database::{Doing, RAFT_META, ReadTables, WriteTables, begin_synced, begin_unsynced};
use crate::decide::log_time;
use crate::error::StoreError;
use crate::head::Head;
use crate::overlay::Batch;
use crate::replay::{self, Rebuilt, Replayed, Verified};
use crate::snapshot::{self, SnapshotSource, SnapshotSummary};
use crate::view::View;
use crate::views::Views;
use holdfast_checked_file::{Checked, Checks};
use holdfast_model::{ClusterVersion, Digest, LogIndex, Outcome, Proposal, Revision, SupportedVersions};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

/// Memory for pages of the database, in bytes.
const CACHE_BYTES: usize = 128 << 20;

/// The state machine's state. Calls block: run them off the async threads.
pub struct Store {
    /// The last committed moment, opened once for everyone who reads it. Before `db`: dropped first.
    moment: Mutex<Option<View>>,
    db: redb::Database,
    /// Of the blocks of the file.
    checks: Checks,
    /// Held by whoever changes the state. False after a failed change: the state in the file is then unknown to us.
    writer: Mutex<bool>,
    /// Where the last committed change left the state.
    head: RwLock<Head>,
    /// The cluster version there.
    version: AtomicU32,
    /// The log time there, in milliseconds.
    log_time_ms: AtomicU64,
    /// The newest cluster version that is followed.
    version_max: AtomicU32,
}

impl Store {
    /// Opens the state in a file, or begins one.
    ///
    /// # Errors
    /// When the file cannot be opened or holds something else.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let open =
            |e: redb::DatabaseError| StoreError::Open { path: path.into(), source: Box::new(e.into()) };
        let checked = Checked::open(path).map_err(open)?;
        let checks = checked.checks();
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(checked);
        Self::begin(db.map_err(open)?, checks)
    }

    /// Opens the state in a storage of the caller's.
    ///
    /// # Errors
    /// When the storage fails or holds something else.
    pub fn open_with_backend(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let checked = Checked::over(backend);
        let checks = checked.checks();
        let db = redb::Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(checked);
        Self::begin(db.doing("opening the state")?, checks)
    }

    fn begin(db: redb::Database, checks: Checks) -> Result<Self, StoreError> {
        let txn = begin_synced(&db)?;
        drop(WriteTables::open(&txn)?);
        txn.commit().doing("making the tables")?;
        let tables = ReadTables::open(&db)?;
        let (head, version, log_time_ms) =
            (tables.head()?, tables.cluster_version()?, log_time::of(&tables)?);
        drop(tables);
        check_version(version, SupportedVersions::OURS)?;
        Ok(Self {
            checks,
            moment: Mutex::default(),
            db,
            writer: Mutex::new(true),
            head: RwLock::new(head),
            version: AtomicU32::new(version.0),
            log_time_ms: AtomicU64::new(log_time_ms),
            version_max: AtomicU32::new(ClusterVersion::NEWEST.0),
        })
    }

    /// The cluster version: which rules and stored forms the next command meets. Costs no read.
    pub fn cluster_version(&self) -> ClusterVersion {
        ClusterVersion(self.version.load(Ordering::Acquire))
    }

    /// How long the cluster has had a leader since it has log time, as the leaders measured it, in milliseconds.
    pub fn log_time_ms(&self) -> u64 {
        self.log_time_ms.load(Ordering::Acquire)
    }

    /// The cluster versions that this store follows.
    pub fn supported_versions(&self) -> SupportedVersions {
        SupportedVersions::OURS.up_to(ClusterVersion(self.version_max.load(Ordering::Acquire)))
    }

    /// Follows no cluster version after `newest`, as an earlier build would not. For tests.
    ///
    /// # Errors
    /// When the state is at a later version already.
    pub fn support_up_to(&self, newest: ClusterVersion) -> Result<(), StoreError> {
        self.version_max.store(newest.0, Ordering::Release);
        check_version(self.cluster_version(), self.supported_versions())
    }

    /// Applies log entries in one transaction that is not synced; the log replays it after a crash. Entry `i` has the
    /// index `first_index + i` and holds any number of proposals, none when it is Raft's own; the answers are their
    /// outcomes in the same order. `meta` is stored with them.
    ///
    /// # Errors
    /// When the state fails, when entries come out of order, and when this member has diverged (I1). Then nothing of
    /// the batch took effect, and the member must stop.
    pub fn apply(
        &self,
        first_index: LogIndex,
        entries: &[Vec<Proposal>],
        meta: &[u8],
    ) -> Result<Vec<Vec<Outcome>>, StoreError> {
        self.change(|| {
            let txn = begin_unsynced(&self.db)?;
            let mut tables = WriteTables::open(&txn)?;
            let mut batch = Batch::new(&tables, self.head(), self.cluster_version(), self.log_time_ms());
            let supported = self.supported_versions();
            let (outcomes, records) = apply_entries(&tables, &mut batch, first_index, entries, supported)?;
            let (version, log_time_ms) = (batch.cluster_version(), batch.log_time_ms());
            let parts = batch.into_parts();
            let head = tables.write(parts)?;
            for (at, digest) in records {
                tables.record_digest(at, digest)?;
            }
            tables.put_meta(RAFT_META, meta)?;
            drop(tables);
            txn.commit().doing("committing a batch")?;
            self.version.store(version.0, Ordering::Release);
            self.log_time_ms.store(log_time_ms, Ordering::Release);
            Ok((outcomes, head))
        })
    }

    /// The checksums of the file's blocks: who is told of a rotten one, and how to look for some (I1).
    pub fn checks(&self) -> &Checks {
        &self.checks
    }

    /// The last applied entry.
    pub fn applied(&self) -> Option<LogIndex> {
        self.head().applied
    }

    /// What the last batch or installed snapshot stored for Raft.
    ///
    /// # Errors
    /// When the database fails.
    pub fn raft_meta(&self) -> Result<Option<Vec<u8>>, StoreError> {
        ReadTables::open(&self.db)?.meta(RAFT_META)
    }

    /// Bytes of applied changes that are in memory only: what says whether a checkpoint is due.
    pub fn unsaved_bytes(&self) -> usize {
        0
    }

    /// Log entries that are in memory only: what a restart would replay at least.
    pub fn unsaved_entries(&self) -> u64 {
        0
    }

    /// Puts everything that was applied on stable storage; answers with the last entry that now is.
    ///
    /// # Errors
    /// When the disk fails: the member must stop, because what is on the disk is unknown.
    pub fn checkpoint(&self) -> Result<Option<LogIndex>, StoreError> {
        self.change(|| {
            let head = self.head();
            let txn = begin_synced(&self.db)?;
            // A write, so that the transaction is not empty.
            let mut tables = WriteTables::open(&txn)?;
            tables.put_head(&head)?;
            drop(tables);
            txn.commit().doing("making a checkpoint")?;
            Ok((head.applied, head))
        })
    }

    /// A consistent moment, to be written out while applies go on.
    ///
    /// # Errors
    /// When the database fails.
    pub fn snapshot(&self) -> Result<SnapshotSource, StoreError> {
        SnapshotSource::new(ReadTables::open(&self.db)?)
    }

    /// Replaces the state by a snapshot, atomically and durably, once all of it was read and verified.
    ///
    /// # Errors
    /// When the snapshot is refused or the database fails; the state is then as it was.
    pub fn install(&self, from: &mut dyn io::Read) -> Result<SnapshotSummary, StoreError> {
        let mut writer = self.writer()?;
        let txn = begin_synced(&self.db)?;
        // Dropped without a commit when the snapshot is refused: nothing of it remains.
        let (head, version, log_time_ms, summary) = snapshot::install(&txn, from, self.supported_versions())?;
        *writer = false;
        txn.commit().doing("installing a snapshot")?;
        self.version.store(version.0, Ordering::Release);
        self.log_time_ms.store(log_time_ms, Ordering::Release);
        self.publish(head);
        *writer = true;
        Ok(summary)
    }

    /// The last event's revision.
    pub fn revision(&self) -> Revision {
        self.head().revision
    }

    /// The digest of the whole state after the last applied entry.
    pub fn digest(&self) -> Digest {
        self.head().state_digest()
    }

    /// The digest of the views: what a replay of the events comes to (I13).
    pub fn views_digest(&self) -> Digest {
        self.head().views_digest()
    }

    /// The recorded digest after an entry, if it is still kept.
    ///
    /// # Errors
    /// When the database fails.
    pub fn digest_at(&self, at: LogIndex) -> Result<Option<Digest>, StoreError> {
        ReadTables::open(&self.db)?.recorded(at)
    }

    /// The last recorded digest: what a leader lets its peers compare (I1).
    ///
    /// # Errors
    /// When the database fails.
    pub fn recorded_digest(&self) -> Result<Option<(LogIndex, Digest)>, StoreError> {
        ReadTables::open(&self.db)?.last_recorded()
    }

    /// A consistent moment to read from. Keep it for one request, not for minutes: it holds back the reuse of pages.
    ///
    /// # Errors
    /// When the database fails.
    pub fn view(&self) -> Result<View, StoreError> {
        let mut moment = self.moment.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = &*moment {
            return Ok(view.clone());
        }
        let view = View::new(ReadTables::open(&self.db)?)?;
        *moment = Some(view.clone());
        Ok(view)
    }

    /// Reads every row and event again, and replays the events: the state is what its digests say (I1), its history is
    /// unbroken (I12), and its views follow from it (I13). Changes nothing; needs memory for one copy of the views.
    ///
    /// # Errors
    /// When the database fails, and when the state contradicts itself.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        let tables = ReadTables::open(&self.db)?;
        let last = tables.head()?.revision;
        Ok(replay::verify(&tables, last)?.0)
    }

    /// As [`verify`](Self::verify), and tells the digest that the views had at `at`: members at different revisions
    /// compare themselves there.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), and when the history does not reach `at`.
    pub fn verify_at(&self, at: Revision) -> Result<(Verified, Digest), StoreError> {
        replay::verify(&ReadTables::open(&self.db)?, at)
    }

    /// Makes every view anew from the events (I13), and replaces those of the file unless all of them are right. Commits,
    /// durably, only when the result has the digest that the state had. Needs memory for one copy of the views.
    ///
    /// # Errors
    /// When the database fails, and when the events lead elsewhere: the state is then as it was.
    pub fn rebuild(&self) -> Result<Rebuilt, StoreError> {
        let mut writer = self.writer()?;
        let txn = begin_synced(&self.db)?;
        let rebuilt = replay::rebuild(&ReadTables::open(&self.db)?, &txn, self.head())?;
        *writer = false;
        txn.commit().doing("committing rebuilt views")?;
        self.publish(self.head());
        *writer = true;
        Ok(rebuilt)
    }

    /// The digest that the views had at a revision, by a replay up to there. Changes nothing; needs memory for one
    /// copy of the views.
    ///
    /// # Errors
    /// When the database fails, and when the history does not reach that far.
    pub fn replay_to(&self, revision: Revision) -> Result<Rebuilt, StoreError> {
        Ok(self.replayed(revision)?.rebuilt)
    }

    /// As [`replay_to`](Self::replay_to), with how many rows each table had.
    ///
    /// # Errors
    /// As [`replay_to`](Self::replay_to).
    pub fn replayed(&self, revision: Revision) -> Result<Replayed, StoreError> {
        replay::replay_to(&ReadTables::open(&self.db)?, revision)
    }

    fn head(&self) -> Head {
        *self.head.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes what was committed visible: the head, and the moment that the next reader opens. A reader that opened the
    /// old moment before this keeps it, as if it had read a little earlier.
    fn publish(&self, head: Head) {
        *self.moment.lock().unwrap_or_else(PoisonError::into_inner) = None;
        *self.head.write().unwrap_or_else(PoisonError::into_inner) = head;
    }

    /// The right to change the state, unless a failed change made it unknown.
    fn writer(&self) -> Result<MutexGuard<'_, bool>, StoreError> {
        let guard = self.writer.lock().map_err(|_| StoreError::OutOfService)?;
        if *guard { Ok(guard) } else { Err(StoreError::OutOfService) }
    }

    /// Runs one change. After a failure no other is let in: a sync that failed once is never retried as if it had not.
    fn change<T>(&self, change: impl FnOnce() -> Result<(T, Head), StoreError>) -> Result<T, StoreError> {
        let mut writer = self.writer()?;
        *writer = false;
        let (answer, head) = change()?;
        self.publish(head);
        *writer = true;
        Ok(answer)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = self.head();
        write!(f, "Store {{ revision: {}, applied: {:?} }}", head.revision, head.applied)
    }
}
