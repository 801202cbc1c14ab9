//! A generation: the rows of the last checkpoint, and over them those that changed since, the newest on top.
//!
//! A checkpoint or a snapshot freezes what is on top and begins anew above it; once the checkpoint is on the disk a new
//! generation begins over it. A generation answers for every revision from its base on, whatever is added to it, so a
//! reader keeps one and its revision, and nothing moves under it (I3).

use crate::database::{RAFT_META, ReadTables, forgotten_digest};
use crate::error::StoreError;
use crate::head::Head;
use crate::merge::{Layered, all_laid_over, laid_over};
use crate::recent::{Change, Recent};
use crate::rows::{RowList, Rows, prefix_end, range};
use crate::tables::{LOG_TAG_FIRST, Value};
use crate::writer::Latest;
use holdfast_model::{Digest, LogIndex, Revision};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

/// Events that are taken out of memory at a time.
const EVENTS_PAGE: usize = 256;

/// An event's revision and bytes.
pub(crate) type StoredEvent = (Revision, Arc<[u8]>);

/// The state as the last checkpoint left it on the disk.
pub(crate) struct Base {
    pub(crate) tables: ReadTables,
    pub(crate) head: Head,
    pub(crate) meta: Option<Arc<[u8]>>,
}

impl Base {
    /// What the database holds now.
    pub(crate) fn open(db: &redb::Database) -> Result<Self, StoreError> {
        let tables = ReadTables::open(db)?;
        let (head, meta) = (tables.head()?, tables.meta(RAFT_META)?.map(Into::into));
        Ok(Self { tables, head, meta })
    }
}

/// Changes that nothing is added to any more.
#[derive(Clone)]
pub(crate) struct Frozen {
    pub(crate) recent: Arc<Recent>,
    /// The same rows as the writer finds them, and the log state's.
    pub(crate) latest: Arc<Latest>,
}

impl Frozen {
    /// Memory taken, about.
    pub(crate) fn bytes(&self) -> usize {
        self.recent.bytes() + self.latest.bytes()
    }
}

/// See the head of this file.
pub(crate) struct Generation {
    pub(crate) base: Arc<Base>,
    /// The newest first.
    pub(crate) frozen: Vec<Frozen>,
    pub(crate) active: Arc<Recent>,
}

impl Generation {
    /// A generation in which nothing changed since the checkpoint.
    pub(crate) fn new(base: Base) -> Self {
        let active = Arc::new(Recent::new(base.head.revision));
        Self { base: Arc::new(base), frozen: Vec::new(), active }
    }

    /// What is frozen of it, under changes of its own, of which there are none.
    pub(crate) fn below_active(&self) -> Self {
        let active = Arc::new(Recent::new(self.active.after()));
        Self { base: self.base.clone(), frozen: self.frozen.clone(), active }
    }

    /// What lies over the base, the newest first.
    fn layers(&self) -> impl DoubleEndedIterator<Item = &Arc<Recent>> {
        std::iter::once(&self.active).chain(self.frozen.iter().map(|frozen| &frozen.recent))
    }

    /// The value of a views' row at a revision.
    pub(crate) fn get(&self, key: &[u8], at: Revision) -> Result<Change, StoreError> {
        match self.layers().find_map(|layer| layer.get(key, at)) {
            Some(change) => Ok(change),
            None => self.base.tables.get(key),
        }
    }

    /// A page of the views' rows at a revision. Costs what it returns, not what changed.
    pub(crate) fn scan(
        &self,
        prefix: &[u8],
        after: Option<&[u8]>,
        limit: usize,
        at: Revision,
    ) -> Result<RowList, StoreError> {
        let end = prefix_end(prefix);
        let Some((from, to)) = range(prefix, after, end.as_deref()) else { return Ok(Vec::new()) };
        let over = Layered::new(self.layers().map(|layer| layer.range(from, to, at)));
        laid_over(&self.base.tables, over, prefix, after, limit)
    }

    /// The encoded event with this revision, if it is not later than `at`.
    pub(crate) fn event(&self, revision: Revision, at: Revision) -> Result<Option<Arc<[u8]>>, StoreError> {
        if revision > at {
            return Ok(None);
        }
        let before = Revision(revision.0.saturating_sub(1));
        match self.layers().find(|layer| revision > layer.after()) {
            Some(layer) => Ok(layer.events(before, at, 1).pop().map(|(_, bytes)| bytes)),
            None => Ok(self.base.tables.event(revision)?.map(Into::into)),
        }
    }

    /// The revision of the oldest event that is held, if there is one.
    pub(crate) fn first_event(&self, at: Revision) -> Result<Option<Revision>, StoreError> {
        if let Some(first) = self.base.tables.first_event()? {
            return Ok(Some(first));
        }
        let next = self.base.head.revision.next();
        Ok((next <= at).then_some(next))
    }

    /// Encoded events after a revision and not later than `at`, in order.
    pub(crate) fn events_after(
        &self,
        after: Revision,
        at: Revision,
    ) -> Result<impl Iterator<Item = Result<StoredEvent, StoreError>>, StoreError> {
        let base = self.base.tables.events_after(after)?;
        let base = base.map(|row| row.map(|(revision, bytes)| (revision, bytes.into())));
        let recent = self.layers().rev().flat_map(move |layer| {
            let mut next = after.max(layer.after());
            std::iter::from_fn(move || {
                let page = layer.events(next, at, EVENTS_PAGE);
                next = page.last()?.0;
                Some(page)
            })
        });
        Ok(base.chain(recent.flatten().map(Ok)))
    }

    /// Where the last command that is not later than `at` left the state. `None` when that is older than the base.
    pub(crate) fn head_at(&self, at: Revision) -> Option<Head> {
        if at < self.base.head.revision {
            return None;
        }
        Some(self.layers().find_map(|layer| layer.head_at(at)).unwrap_or(self.base.head))
    }

    /// The digest recorded after an entry, if a state that stands at `applied` still keeps it.
    pub(crate) fn recorded(
        &self,
        at: LogIndex,
        applied: Option<LogIndex>,
    ) -> Result<Option<Digest>, StoreError> {
        if applied.and_then(forgotten_digest).is_some_and(|forgotten| at <= forgotten) {
            return Ok(None);
        }
        match self.layers().find_map(|layer| layer.history().digests.get(&at).copied()) {
            Some(digest) => Ok(Some(digest)),
            None => self.base.tables.recorded(at),
        }
    }

    /// The last digest that was recorded.
    pub(crate) fn last_recorded(&self) -> Result<Option<(LogIndex, Digest)>, StoreError> {
        let last = |layer: &Arc<Recent>| layer.history().digests.last_key_value().map(|(at, d)| (*at, *d));
        match self.layers().find_map(last) {
            Some(found) => Ok(Some(found)),
            None => self.base.tables.last_recorded(),
        }
    }

    /// Every row of the views at a revision and then of the log state as it was last frozen, in the order of keys.
    pub(crate) fn all_rows(
        &self,
        at: Revision,
    ) -> Result<impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>>, StoreError> {
        // What is sealed stands among the log's rows as well.
        const VIEWS_END: Bound<&[u8]> = Bound::Excluded(&[LOG_TAG_FIRST]);
        let views = Layered::new(self.layers().map(|layer| layer.range(Bound::Unbounded, VIEWS_END, at)));
        let log = self.frozen.iter().map(|frozen| frozen.latest.log_rows());
        let log = Layered::new(log.map(|rows| rows.map(|(key, change)| (key.clone(), change.clone()))));
        let tables = &self.base.tables;
        Ok(all_laid_over(tables.view_rows()?, views).chain(all_laid_over(tables.log_rows()?, log)))
    }

    /// The digests that are recorded up to where this was last frozen.
    pub(crate) fn all_recorded(&self) -> Result<BTreeMap<LogIndex, Digest>, StoreError> {
        let mut digests = self.base.tables.all_recorded()?.collect::<Result<BTreeMap<_, _>, _>>()?;
        for frozen in self.frozen.iter().rev() {
            for (at, digest) in &frozen.recent.history().digests {
                digests.insert(*at, *digest);
                if let Some(old) = forgotten_digest(*at) {
                    digests.remove(&old);
                }
            }
        }
        Ok(digests)
    }

    /// Log entries that are not in the base, of a state that stands at `applied`.
    pub(crate) fn unsaved_entries(&self, applied: Option<LogIndex>) -> u64 {
        let next = |applied: Option<LogIndex>| applied.map_or(0, |at| at.0 + 1);
        next(applied).saturating_sub(next(self.base.head.applied))
    }

    /// Memory of what is not in the base and no longer changes.
    pub(crate) fn frozen_bytes(&self) -> usize {
        self.frozen.iter().map(Frozen::bytes).sum()
    }
}
