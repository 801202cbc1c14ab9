//! The store: one redb file, one writer at a time, any number of readers.

use crate::apply::{apply_entries, check_version};
use crate::database::{Doing, WriteTables, begin_synced};
use crate::error::StoreError;
use crate::generation::{Base, Generation};
use crate::head::Head;
use crate::replay::{self, Rebuilt, Replayed, Verified};
use crate::snapshot::{self, SnapshotSource, SnapshotSummary};
use crate::view::View;
use crate::writer::Writer;
use arc_swap::ArcSwap;
use holdfast_checked_file::{Checked, Checks, open_database};
use holdfast_model::{ClusterVersion, Digest, LogIndex, Outcome, Proposal, Revision, SupportedVersions};
use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory for pages of the database, in bytes.
const CACHE_BYTES: usize = 128 << 20;
/// Memory of changes that no checkpoint was begun for, in bytes. With more, [`Store::apply`] makes one and waits for it.
pub const ACTIVE_BYTES_MAX: usize = 128 << 20;
/// Moments that are kept apart for snapshots between two checkpoints.
const FROZEN_MAX: usize = 8;

/// The state machine's state. Calls block: run them off the async threads.
pub struct Store {
    /// What readers see. Before `db`: dropped first.
    published: ArcSwap<Published>,
    /// Generations before the last checkpoint, the oldest first: what [`Store::view_at`] looks back to.
    pub(crate) past: Mutex<VecDeque<Arc<Generation>>>,
    /// Held by whoever changes the state. It may be taken under `turn`, never the other way round.
    writer: Mutex<Writer>,
    /// Held by whoever writes to the database: one at a time.
    turn: Mutex<()>,
    /// Of the blocks of the file.
    checks: Checks,
    /// The newest cluster version that is followed.
    version_max: AtomicU32,
    /// [`ACTIVE_BYTES_MAX`], but for tests.
    pub(crate) active_bytes_max: usize,
    pub(crate) db: redb::Database,
}

/// A whole batch's end, as everybody but the writer sees it.
struct Published {
    view: View,
    meta: Option<Arc<[u8]>>,
    version: ClusterVersion,
    log_time_ms: u64,
    unsaved_bytes: usize,
}

impl Published {
    fn of(writer: &mut Writer) -> Self {
        let head = writer.publish();
        let view = View::new(writer.generation.clone(), head);
        Self {
            view,
            meta: writer.meta.clone(),
            version: writer.cluster_version(),
            log_time_ms: writer.log_time_ms(),
            unsaved_bytes: writer.active_bytes(),
        }
    }
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
        Self::begin(open_database(checked, CACHE_BYTES).map_err(open)?, checks)
    }

    /// Opens the state in a storage of the caller's.
    ///
    /// # Errors
    /// When the storage fails or holds something else.
    pub fn open_with_backend(backend: impl redb::StorageBackend) -> Result<Self, StoreError> {
        let checked = Checked::over(backend);
        let checks = checked.checks();
        Self::begin(open_database(checked, CACHE_BYTES).doing("opening the state")?, checks)
    }

    fn begin(db: redb::Database, checks: Checks) -> Result<Self, StoreError> {
        let txn = begin_synced(&db)?;
        drop(WriteTables::open(&txn)?);
        txn.commit().doing("making the tables")?;
        let mut writer = Writer::new(Base::open(&db)?)?;
        check_version(writer.cluster_version(), SupportedVersions::OURS)?;
        Ok(Self {
            checks,
            published: ArcSwap::from_pointee(Published::of(&mut writer)),
            past: Mutex::default(),
            writer: Mutex::new(writer),
            turn: Mutex::default(),
            version_max: AtomicU32::new(ClusterVersion::NEWEST.0),
            active_bytes_max: ACTIVE_BYTES_MAX,
            db,
        })
    }

    /// The cluster version: which rules and stored forms the next command meets. Costs no read.
    pub fn cluster_version(&self) -> ClusterVersion {
        self.published.load().version
    }

    /// How long the cluster has had a leader since it has log time, as the leaders measured it, in milliseconds.
    pub fn log_time_ms(&self) -> u64 {
        self.published.load().log_time_ms
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

    /// Applies log entries, in memory: after a crash the log replays what no checkpoint wrote down. Entry `i` has the
    /// index `first_index + i` and holds any number of proposals, none when it is Raft's own; the answers are their
    /// outcomes in the same order. `meta` is kept with them. Readers see all of them or none.
    ///
    /// Waits for a checkpoint when [`ACTIVE_BYTES_MAX`] is reached.
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
        self.make_room()?;
        self.change(|writer| {
            let outcomes = apply_entries(writer, first_index, entries, self.supported_versions())?;
            writer.meta = Some(meta.into());
            Ok(outcomes)
        })
    }

    /// Checkpoints while the next batch has no room.
    fn make_room(&self) -> Result<(), StoreError> {
        while self.writer()?.active_bytes() >= self.active_bytes_max {
            self.checkpoint()?;
        }
        Ok(())
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
    /// None; a state that is read may have some.
    pub fn raft_meta(&self) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.published.load().meta.as_deref().map(<[u8]>::to_vec))
    }

    /// Bytes of memory, about, of applied changes that no checkpoint was begun for. Many say that one is due.
    pub fn unsaved_bytes(&self) -> usize {
        self.published.load().unsaved_bytes
    }

    /// Log entries that no checkpoint has written down: what a restart replays at least.
    pub fn unsaved_entries(&self) -> u64 {
        let published = self.published.load();
        published.view.generation().unsaved_entries(published.view.applied())
    }

    /// A consistent moment, to be written out while applies go on. Its changes stay in memory as long as it lives.
    ///
    /// # Errors
    /// When the database fails, or the store is out of service.
    pub fn snapshot(&self) -> Result<SnapshotSource, StoreError> {
        if self.published.load().view.generation().frozen.len() >= FROZEN_MAX {
            self.checkpoint()?;
        }
        let mut writer = self.writer()?;
        writer.freeze();
        self.publish(&mut writer);
        // Apart from what changes, which it would otherwise have to step over.
        let generation = Arc::new(writer.generation.below_active());
        Ok(SnapshotSource::new(generation, *writer.head(), writer.meta.clone()))
    }

    /// Replaces the state by a snapshot, atomically and durably, once all of it was read and verified.
    ///
    /// # Errors
    /// When the snapshot is refused or the database fails; the state is then as it was.
    pub fn install(&self, from: &mut dyn io::Read) -> Result<SnapshotSummary, StoreError> {
        let _turn = self.turn()?;
        let mut writer = self.writer()?;
        let txn = begin_synced(&self.db)?;
        // Dropped without a commit when the snapshot is refused: nothing of it remains.
        let summary = snapshot::install(&txn, from, self.supported_versions())?;
        writer.in_service = false;
        txn.commit().doing("installing a snapshot")?;
        // In the snapshot's history no revision before it can be read.
        self.forget_past();
        *writer = Writer::new(Base::open(&self.db)?)?;
        self.publish(&mut writer);
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
        let published = self.published.load();
        published.view.generation().recorded(at, published.view.applied())
    }

    /// The last recorded digest: what a leader lets its peers compare (I1).
    ///
    /// # Errors
    /// When the database fails.
    pub fn recorded_digest(&self) -> Result<Option<(LogIndex, Digest)>, StoreError> {
        self.published.load().view.generation().last_recorded()
    }

    /// A consistent moment to read from. Keep it for one request, not for minutes: it holds memory, and pages of the file.
    ///
    /// # Errors
    /// None; a state that is read may have some.
    pub fn view(&self) -> Result<View, StoreError> {
        Ok(self.published.load().view.clone())
    }

    /// The state right after a revision: of a command with several events, the state before it until the last of
    /// them. [`View::revision`] tells which it is. Held are the revisions since the checkpoint before the last two, or
    /// fewer when many rows changed.
    ///
    /// # Errors
    /// When the revision is not there yet, or is older than what is held.
    pub fn view_at(&self, revision: Revision) -> Result<View, StoreError> {
        let view = self.published.load().view.clone();
        if revision > view.revision() {
            return Err(StoreError::NoSuchRevision { asked: revision, head: view.revision() });
        }
        if revision == view.revision() {
            return Ok(view);
        }
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let mut oldest = view.revision();
        for generation in std::iter::once(view.generation()).chain(past.iter().rev()) {
            if let Some(head) = generation.head_at(revision) {
                return Ok(View::new(generation.clone(), head));
            }
            oldest = generation.base.head.revision;
        }
        Err(StoreError::Compacted { asked: revision, oldest })
    }

    /// Reads every row and event again, and replays the events: the state is what its digests say (I1), its history is
    /// unbroken (I12), and its views follow from it (I13). Makes a checkpoint first; needs memory for one copy of the
    /// views.
    ///
    /// # Errors
    /// When the database fails, and when the state contradicts itself.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        let base = self.saved()?;
        Ok(replay::verify(&base.tables, base.head.revision)?.0)
    }

    /// As [`verify`](Self::verify), and tells the digest that the views had at `at`: members at different revisions
    /// compare themselves there.
    ///
    /// # Errors
    /// As [`verify`](Self::verify), and when the history does not reach `at`.
    pub fn verify_at(&self, at: Revision) -> Result<(Verified, Digest), StoreError> {
        replay::verify(&self.saved()?.tables, at)
    }

    /// Makes every view anew from the events (I13), and replaces those of the file unless all of them are right. Commits,
    /// durably, only when the result has the digest that the state had. Needs memory for one copy of the views.
    ///
    /// # Errors
    /// When the database fails, and when the events lead elsewhere: the state is then as it was.
    pub fn rebuild(&self) -> Result<Rebuilt, StoreError> {
        let _turn = self.turn()?;
        let mut writer = self.writer()?;
        writer.in_service = false;
        writer.freeze();
        // What is made anew is made from the disk.
        self.write_down(&mut writer)?;
        let txn = begin_synced(&self.db)?;
        // Dropped without a commit when the events lead elsewhere.
        let rebuilt = replay::rebuild(&writer.generation.base.tables, &txn, *writer.head())
            .inspect_err(|_| writer.in_service = true)?;
        txn.commit().doing("committing rebuilt views")?;
        // Made from the same events, but who asked for this does not trust what was.
        self.forget_past();
        writer.rebase(Base::open(&self.db)?, 0);
        self.publish(&mut writer);
        writer.in_service = true;
        Ok(rebuilt)
    }

    /// The digest that the views had at a revision, by a replay up to there. Makes a checkpoint first; needs memory for
    /// one copy of the views.
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
        replay::replay_to(&self.saved()?.tables, revision)
    }

    /// Everything that was applied before this call, on the disk.
    fn saved(&self) -> Result<Arc<Base>, StoreError> {
        self.checkpoint()?;
        Ok(self.published.load().view.generation().base.clone())
    }

    fn head(&self) -> Head {
        *self.published.load().view.head()
    }

    /// Makes what was changed visible. A reader that looked before this keeps what it has, as if it had read a little
    /// earlier.
    pub(crate) fn publish(&self, writer: &mut Writer) {
        self.published.store(Arc::new(Published::of(writer)));
    }

    fn forget_past(&self) {
        self.past.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The right to write to the database.
    pub(crate) fn turn(&self) -> Result<MutexGuard<'_, ()>, StoreError> {
        self.turn.lock().map_err(|_| StoreError::OutOfService)
    }

    /// The right to change the state, unless a failed change made it unknown.
    pub(crate) fn writer(&self) -> Result<MutexGuard<'_, Writer>, StoreError> {
        let guard = self.writer.lock().map_err(|_| StoreError::OutOfService)?;
        if guard.in_service { Ok(guard) } else { Err(StoreError::OutOfService) }
    }

    /// Lets nobody change the state any more.
    pub(crate) fn end_service(&self) {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).in_service = false;
    }

    /// Runs one change. After a failure no other is let in, and nothing of it is ever seen or written down.
    fn change<T>(&self, change: impl FnOnce(&mut Writer) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut writer = self.writer()?;
        writer.in_service = false;
        let answer = change(&mut writer)?;
        self.publish(&mut writer);
        writer.in_service = true;
        Ok(answer)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = self.head();
        write!(f, "Store {{ revision: {}, applied: {:?} }}", head.revision, head.applied)
    }
}
