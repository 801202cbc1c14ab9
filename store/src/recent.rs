//! Recent rows: what changed since the last checkpoint, in memory, with every version that a reader may still look at.
//!
//! One writer adds, any number of readers read without a lock. A version is the revision after the command that made
//! it, so a reader at a revision sees whole commands only, and rows that are not published yet are later than anyone's
//! revision. Never holds log state: that has no readers, and is the writer's (`writer.rs`).

use crate::head::Head;
use crate::packed::Key;
use crate::tables::Value;
use crossbeam_skiplist::SkipMap;
use crossbeam_skiplist::map::Entry;
use holdfast_model::{Digest, LogIndex, Revision};
use std::borrow::Borrow;
use std::cmp::{Ordering, Reverse};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

/// Memory of a recent row beside its key and value, about.
const ROW_OVERHEAD_BYTES: usize = 160;
/// Memory of an event beside its bytes, with its share of the heads, about.
const EVENT_OVERHEAD_BYTES: usize = 176;
/// Versions of one row that a scan steps over before it searches for what it wants instead.
const STEPS_MAX: usize = 4;

/// A row's key and the revision that it changed at: in the order of keys, the newest version first.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct RowKey {
    key: Key,
    version: Reverse<Revision>,
}

/// A [`RowKey`], or what stands for one in a search, without a copy of the key.
trait Versioned {
    fn parts(&self) -> (&[u8], Reverse<Revision>);
}

impl Versioned for RowKey {
    fn parts(&self) -> (&[u8], Reverse<Revision>) {
        (&self.key, self.version)
    }
}

impl Versioned for (&[u8], Reverse<Revision>) {
    fn parts(&self) -> (&[u8], Reverse<Revision>) {
        *self
    }
}

impl<'k> Borrow<dyn Versioned + 'k> for RowKey {
    fn borrow(&self) -> &(dyn Versioned + 'k) {
        self
    }
}

impl PartialEq for dyn Versioned + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Eq for dyn Versioned + '_ {}

impl PartialOrd for dyn Versioned + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn Versioned + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.parts().cmp(&other.parts())
    }
}

/// A row's value, or that it was removed.
pub(crate) type Change = Option<Value>;

/// What was published beside the rows, in order.
#[derive(Default)]
pub(crate) struct History {
    /// Encoded events; the first has the revision after [`Recent::after`].
    pub(crate) events: Vec<Arc<[u8]>>,
    /// Where each command with events left the state.
    pub(crate) heads: Vec<Head>,
    /// Digests recorded by log index.
    pub(crate) digests: BTreeMap<LogIndex, Digest>,
}

/// The changes from one moment to another, or to now.
pub(crate) struct Recent {
    rows: SkipMap<RowKey, Change>,
    /// The last revision before.
    after: Revision,
    history: RwLock<History>,
    bytes: AtomicUsize,
}

impl Recent {
    pub(crate) fn new(after: Revision) -> Self {
        Self { rows: SkipMap::new(), after, history: RwLock::default(), bytes: AtomicUsize::new(0) }
    }

    /// The last revision before these changes.
    pub(crate) fn after(&self) -> Revision {
        self.after
    }

    /// Memory taken, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Relaxed)
    }

    /// Adds a version of a row. Nobody sees it before a revision at or after `version` is published.
    pub(crate) fn put(&self, key: Key, version: Revision, value: Change) {
        let size = ROW_OVERHEAD_BYTES + key.len() + value.as_ref().map_or(0, |value| value.len());
        self.bytes.fetch_add(size, Relaxed);
        self.rows.insert(RowKey { key, version: Reverse(version) }, value);
    }

    /// Adds what belongs to published commands.
    pub(crate) fn extend(&self, new: &mut History) {
        let size: usize = new.events.iter().map(|bytes| EVENT_OVERHEAD_BYTES + bytes.len()).sum();
        self.bytes.fetch_add(size, Relaxed);
        let mut history = self.history.write().unwrap_or_else(PoisonError::into_inner);
        history.events.append(&mut new.events);
        history.heads.append(&mut new.heads);
        // Not `append`, which builds the whole map anew.
        history.digests.extend(std::mem::take(&mut new.digests));
    }

    /// What was published. Hold it for moments: the writer waits for it.
    pub(crate) fn history(&self) -> RwLockReadGuard<'_, History> {
        self.history.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The newest version of a row that is not later than `at`.
    pub(crate) fn get(&self, key: &[u8], at: Revision) -> Option<Change> {
        let found = self.rows.lower_bound(Bound::Included(&(key, Reverse(at)) as &dyn Versioned))?;
        (*found.key().key == *key).then(|| found.value().clone())
    }

    /// The rows of a range of keys, each in its newest version that is not later than `at`.
    pub(crate) fn range<'r>(&'r self, from: Bound<&[u8]>, to: Bound<&'r [u8]>, at: Revision) -> Range<'r> {
        let entry = match from {
            Bound::Included(key) => {
                self.rows.lower_bound(Bound::Included(&(key, Reverse(at)) as &dyn Versioned))
            }
            Bound::Excluded(key) => self.after_key(key),
            Bound::Unbounded => self.rows.front(),
        };
        Range { recent: self, entry, to, at }
    }

    /// The newest version of every row, in the order of keys.
    pub(crate) fn newest(&self) -> Range<'_> {
        self.range(Bound::Unbounded, Bound::Unbounded, Revision(u64::MAX))
    }

    fn after_key(&self, key: &[u8]) -> Option<Entry<'_, RowKey, Change>> {
        self.rows.lower_bound(Bound::Excluded(&(key, Reverse(Revision(0))) as &dyn Versioned))
    }

    /// At most `limit` encoded events after a revision and not later than `to`.
    pub(crate) fn events(&self, after: Revision, to: Revision, limit: usize) -> Vec<(Revision, Arc<[u8]>)> {
        let skipped = after.0.saturating_sub(self.after.0);
        let first = self.after.0 + skipped + 1;
        let history = self.history();
        let found = history.events.iter().skip(usize::try_from(skipped).unwrap_or(usize::MAX));
        let numbered = (first..=to.0).zip(found).take(limit);
        numbered.map(|(revision, bytes)| (Revision(revision), bytes.clone())).collect()
    }

    /// Where the last command that is not later than `at` left the state, if it is one of these.
    pub(crate) fn head_at(&self, at: Revision) -> Option<Head> {
        let history = self.history();
        let count = history.heads.partition_point(|head| head.revision <= at);
        history.heads[..count].last().copied()
    }
}

/// Rows of a [`Recent`] in the order of their keys.
pub(crate) struct Range<'r> {
    recent: &'r Recent,
    entry: Option<Entry<'r, RowKey, Change>>,
    to: Bound<&'r [u8]>,
    at: Revision,
}

impl Range<'_> {
    /// From an entry of a row to the next row.
    fn skip(&mut self, key: &[u8]) {
        for _ in 0..STEPS_MAX {
            self.entry = self.entry.take().and_then(|entry| entry.next());
            if self.entry.as_ref().is_none_or(|entry| *entry.key().key != *key) {
                return;
            }
        }
        self.entry = self.recent.after_key(key);
    }

    /// From an entry that is later than what is looked at to one that is not, or to the next row.
    fn skip_later(&mut self, key: &[u8]) {
        for _ in 0..STEPS_MAX {
            self.entry = self.entry.take().and_then(|entry| entry.next());
            let is_later = |entry: &Entry<'_, RowKey, Change>| {
                *entry.key().key == *key && entry.key().version.0 > self.at
            };
            if !self.entry.as_ref().is_some_and(is_later) {
                return;
            }
        }
        let at = &(key, Reverse(self.at)) as &dyn Versioned;
        self.entry = self.recent.rows.lower_bound(Bound::Included(at));
    }
}

impl Iterator for Range<'_> {
    type Item = (Key, Change);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let entry = self.entry.as_ref()?;
            let key = entry.key().key.clone();
            let is_over = match self.to {
                Bound::Included(to) => *key > *to,
                Bound::Excluded(to) => *key >= *to,
                Bound::Unbounded => false,
            };
            if is_over {
                self.entry = None;
                return None;
            }
            if entry.key().version.0 <= self.at {
                let value = entry.value().clone();
                self.skip(&key);
                return Some((key, value));
            }
            self.skip_later(&key);
        }
    }
}
