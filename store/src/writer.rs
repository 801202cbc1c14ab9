//! The one who changes the state: what it needs to decide the next command, and what it has not published yet.
//!
//! A row is looked for in what changed since the last checkpoint, and then on the disk. Of the log state (I4) only the
//! writer ever asks, so those rows have no versions. Nothing that is put here is seen by a reader before
//! [`Writer::publish`]; after a failure nothing is ever published again.

use crate::decide::log_time;
use crate::error::StoreError;
use crate::generation::{Base, Frozen, Generation};
use crate::head::Head;
use crate::merge::{Layered, laid_over};
use crate::overlay::DraftParts;
use crate::packed::Key;
use crate::recent::{Change, History, Recent};
use crate::rows::{RowList, Rows, RowsMut, prefix_end, range};
use crate::tables::{Table, Value, is_sealed, is_view};
use crate::views::Views;
use foldhash::fast::RandomState;
use holdfast_model::{ClusterVersion, Digest, LogIndex, Revision};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Rows of the disk that are remembered, also that they are not there. When they are so many all are forgotten.
const SEEN_MAX: usize = 16_384;
/// Memory of a row beside its key and value, about.
const ROW_OVERHEAD_BYTES: usize = 64;

/// The newest change of each row since some moment, as the writer finds it. The hash maps are never iterated in the
/// order that they happen to have.
#[derive(Default)]
pub(crate) struct Latest {
    views: HashMap<Key, Change, RandomState>,
    /// Log state that is only looked up.
    points: HashMap<Key, Change, RandomState>,
    /// Log state that is looked for by its order.
    ends: BTreeMap<Key, Change>,
    bytes: usize,
}

/// Whether rows beside this key are looked for in their order.
fn is_ordered(key: &[u8]) -> bool {
    key.first() == Some(&(Table::OutcomeEnd as u8))
}

impl Latest {
    fn get(&self, key: &[u8]) -> Option<&Change> {
        if is_view(key) {
            self.views.get(key)
        } else if is_ordered(key) {
            self.ends.get(key)
        } else {
            self.points.get(key)
        }
    }

    fn put(&mut self, key: Key, value: Change) {
        self.bytes += ROW_OVERHEAD_BYTES;
        if is_view(&key) {
            // Its bytes are the recent rows' as well.
            self.views.insert(key, value);
            return;
        }
        self.bytes += key.len() + value.as_ref().map_or(0, |value| value.len());
        if is_ordered(&key) {
            self.ends.insert(key, value);
        } else {
            self.points.insert(key, value);
        }
    }

    fn is_empty(&self) -> bool {
        self.views.is_empty() && self.points.is_empty() && self.ends.is_empty()
    }

    /// Memory taken, about, beside what the recent rows take.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The log state's changes in the order of keys.
    pub(crate) fn log_rows(&self) -> impl Iterator<Item = (&Key, &Change)> {
        let mut rows: Vec<_> = self.points.iter().chain(&self.ends).collect();
        rows.sort_unstable_by_key(|(key, _)| *key);
        rows.into_iter()
    }
}

/// See the head of this file.
pub(crate) struct Writer {
    pub(crate) generation: Arc<Generation>,
    latest: Latest,
    /// What the base answered. Never iterated.
    seen: RefCell<HashMap<Key, Change, RandomState>>,
    head: Head,
    /// The cluster version after the last command.
    version: ClusterVersion,
    /// The log time after the last command, in milliseconds.
    log_time_ms: u64,
    pub(crate) meta: Option<Arc<[u8]>>,
    /// Changed and decided, and not published.
    pending: History,
    /// Memory in which rows are laid out to be hashed.
    room: Vec<u8>,
    /// No kept outcome ends before this; `None` while nobody looked.
    outcomes_end: Option<u64>,
    /// False after a failed change: what is in memory and on the disk is then unknown to us.
    pub(crate) in_service: bool,
}

impl Writer {
    /// Begins where a checkpoint ended.
    pub(crate) fn new(base: Base) -> Result<Self, StoreError> {
        let (head, meta) = (base.head, base.meta.clone());
        let (version, log_time_ms) = (base.tables.cluster_version()?, log_time::of(&base.tables)?);
        Ok(Self {
            generation: Arc::new(Generation::new(base)),
            latest: Latest::default(),
            seen: RefCell::default(),
            head,
            version,
            log_time_ms,
            meta,
            pending: History::default(),
            room: Vec::new(),
            outcomes_end: None,
            in_service: true,
        })
    }

    /// The cluster version, with what was decided last.
    pub(crate) fn cluster_version(&self) -> ClusterVersion {
        self.version
    }

    /// The log time, with what was decided last, in milliseconds.
    pub(crate) fn log_time_ms(&self) -> u64 {
        self.log_time_ms
    }

    /// What changed since the base, the newest first.
    fn layers(&self) -> impl Iterator<Item = &Latest> {
        std::iter::once(&self.latest).chain(self.generation.frozen.iter().map(|frozen| &*frozen.latest))
    }

    /// A time before which no kept outcome ends, if it is known.
    pub(crate) fn outcomes_end(&self) -> Option<u64> {
        self.outcomes_end
    }

    /// Notes what [`outcomes_end`](Self::outcomes_end) now is.
    pub(crate) fn set_outcomes_end(&mut self, end: Option<u64>) {
        self.outcomes_end = end;
    }

    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    pub(crate) fn head_mut(&mut self) -> &mut Head {
        &mut self.head
    }

    /// Takes over an accepted command's changes and events.
    pub(crate) fn merge(&mut self, parts: DraftParts) -> Result<(), StoreError> {
        for event in parts.events {
            self.head.revision = event.revision;
            self.head.chain = event.chain;
            self.pending.events.push(event.bytes.into());
        }
        for (key, value) in parts.changes {
            let tag = key.first().copied().and_then(Table::from_tag);
            self.put(key, value)?;
            match tag {
                Some(Table::Cluster) => self.version = Views::cluster_version(self)?,
                Some(Table::LogTime) => self.log_time_ms = log_time::of(self)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts a row in the place of `old`, which is what [`get`](Rows::get) answers.
    pub(crate) fn replace(&mut self, key: Vec<u8>, old: Change, value: Change) {
        if old == value {
            return;
        }
        let in_views = is_view(&key);
        let sum = if in_views { &mut self.head.views } else { &mut self.head.log };
        if let Some(old) = &old {
            sum.remove_with(&key, old, &mut self.room);
        }
        if let Some(new) = &value {
            sum.add_with(&key, new, &mut self.room);
        }
        let key = Key::from(key.as_slice());
        if in_views || is_sealed(&key) {
            self.generation.active.put(key.clone(), self.head.revision, value.clone());
        }
        self.latest.put(key, value);
    }

    /// A command is through, with its outcome.
    pub(crate) fn end_command(&mut self, began_at: Revision) {
        if self.head.revision > began_at {
            self.pending.heads.push(self.head);
        }
    }

    /// Records the digest of the state after an entry.
    pub(crate) fn record_digest(&mut self, at: LogIndex) {
        self.pending.digests.insert(at, self.head.state_digest());
    }

    /// The digest recorded after an entry, also in this batch.
    pub(crate) fn recorded(&self, at: LogIndex) -> Result<Option<Digest>, StoreError> {
        match self.pending.digests.get(&at) {
            Some(digest) => Ok(Some(*digest)),
            None => self.generation.recorded(at, self.head.applied),
        }
    }

    /// Lets readers of this head find what belongs to it.
    pub(crate) fn publish(&mut self) -> Head {
        self.generation.active.extend(&mut self.pending);
        self.head
    }

    /// Memory of what is not frozen, about.
    pub(crate) fn active_bytes(&self) -> usize {
        self.generation.active.bytes() + self.latest.bytes()
    }

    /// Ends what changes, so that from here on it can be written out; what comes next lies over it.
    pub(crate) fn freeze(&mut self) {
        let generation = &self.generation;
        let is_empty = self.latest.is_empty() && {
            let history = generation.active.history();
            history.events.is_empty() && history.digests.is_empty()
        };
        if is_empty {
            return;
        }
        let latest = Arc::new(std::mem::take(&mut self.latest));
        let frozen = Frozen { recent: generation.active.clone(), latest };
        self.generation = Arc::new(Generation {
            base: generation.base.clone(),
            frozen: std::iter::once(frozen).chain(generation.frozen.iter().cloned()).collect(),
            active: Arc::new(Recent::new(self.head.revision)),
        });
    }

    /// Puts a new base under what changed since it was frozen.
    pub(crate) fn rebase(&mut self, base: Base, written: usize) {
        let generation = &self.generation;
        let left = generation.frozen.len().saturating_sub(written);
        let frozen = generation.frozen[..left].to_vec();
        self.generation =
            Arc::new(Generation { base: Arc::new(base), frozen, active: generation.active.clone() });
        self.seen.borrow_mut().clear();
    }
}

impl Rows for Writer {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        if let Some(change) = self.layers().find_map(|latest| latest.get(key)) {
            return Ok(change.clone());
        }
        let mut seen = self.seen.borrow_mut();
        if let Some(change) = seen.get(key) {
            return Ok(change.clone());
        }
        let tables = &self.generation.base.tables;
        if tables.excludes(key) {
            return Ok(None);
        }
        let value = tables.get(key)?;
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        seen.insert(key.into(), value.clone());
        Ok(value)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        if is_view(prefix) || is_sealed(prefix) {
            return self.generation.scan(prefix, after, limit, Revision(u64::MAX));
        }
        if !is_ordered(prefix) {
            return Err(StoreError::corrupt("somebody looks for outcomes by their order"));
        }
        let end = prefix_end(prefix);
        let Some(bounds) = range(prefix, after, end.as_deref()) else { return Ok(Vec::new()) };
        let ranges = self.layers().map(|latest| latest.ends.range::<[u8], _>(bounds));
        let over = Layered::new(ranges.map(|rows| rows.map(|(key, value)| (key.clone(), value.clone()))));
        laid_over(&self.generation.base.tables, over, prefix, after, limit)
    }
}

impl RowsMut for Writer {
    fn put(&mut self, key: Vec<u8>, value: Option<Value>) -> Result<(), StoreError> {
        let old = self.get(&key)?;
        self.replace(key, old, value);
        Ok(())
    }
}
