//! A consistent moment of the state, for everybody who only reads. Typed getters come with [`Views`](crate::Views).

use crate::error::StoreError;
use crate::event_bytes;
use crate::generation::Generation;
use crate::head::Head;
use crate::rows::{RowList, Rows};
use crate::tables::{Value, is_sealed, is_view};
use holdfast_model::{Digest, Event, LogIndex, OrgId, Revision};
use std::sync::Arc;

/// Events that one page looks at, when most belong to other orgs.
const EVENTS_SCANNED_MAX: usize = 10_000;

/// The views and events at one revision; later changes are not seen. Clones share the one moment. The log state is the
/// writer's alone, but for what is sealed: here it has no other rows.
#[derive(Clone)]
pub struct View {
    moment: Arc<Moment>,
}

struct Moment {
    generation: Arc<Generation>,
    head: Head,
}

/// Some events, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventPage {
    /// The events.
    pub events: Vec<Event>,
    /// The last revision that was looked at: where the next page begins, also when `events` is empty.
    pub scanned_to: Revision,
}

impl View {
    pub(crate) fn new(generation: Arc<Generation>, head: Head) -> Self {
        Self { moment: Arc::new(Moment { generation, head }) }
    }

    pub(crate) fn generation(&self) -> &Arc<Generation> {
        &self.moment.generation
    }

    pub(crate) fn head(&self) -> &Head {
        &self.moment.head
    }

    /// The last event's revision.
    pub fn revision(&self) -> Revision {
        self.moment.head.revision
    }

    /// The last applied log entry.
    pub fn applied(&self) -> Option<LogIndex> {
        self.moment.head.applied
    }

    /// The digest of the whole state.
    pub fn digest(&self) -> Digest {
        self.moment.head.state_digest()
    }

    /// The chain's last link: who has it can tell that no event before was changed (I12).
    pub fn chain(&self) -> Digest {
        self.moment.head.chain
    }

    /// The event with this revision.
    ///
    /// # Errors
    /// When the database fails.
    pub fn event(&self, revision: Revision) -> Result<Option<Event>, StoreError> {
        let bytes = self.moment.generation.event(revision, self.revision())?;
        bytes.map(|bytes| event_bytes::open(&bytes)).transpose()
    }

    /// The oldest event's revision that is still held; `None` when there are no events.
    ///
    /// # Errors
    /// When the database fails.
    pub fn first_held(&self) -> Result<Option<Revision>, StoreError> {
        self.moment.generation.first_event(self.revision())
    }

    /// At most `limit` events after a revision, of one org or of all. Looks at a bounded number, so a page may be
    /// short without being the last: the last one has `scanned_to` equal to [`revision`](Self::revision).
    ///
    /// # Errors
    /// When the database fails.
    pub fn events(&self, after: Revision, limit: usize, org: Option<OrgId>) -> Result<EventPage, StoreError> {
        let mut page = EventPage { events: Vec::new(), scanned_to: after };
        if limit == 0 {
            return Ok(page);
        }
        let rows = self.moment.generation.events_after(after, self.revision())?;
        for row in rows.take(EVENTS_SCANNED_MAX) {
            let (revision, bytes) = row?;
            let event = event_bytes::open(&bytes)?;
            page.scanned_to = revision;
            if org.is_none() || event.org == org {
                page.events.push(event);
                if page.events.len() >= limit {
                    break;
                }
            }
        }
        Ok(page)
    }
}

impl Rows for View {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        if is_view(key) || is_sealed(key) {
            self.moment.generation.get(key, self.revision())
        } else {
            Ok(None)
        }
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        if !is_view(prefix) && !is_sealed(prefix) {
            return Ok(RowList::new());
        }
        self.moment.generation.scan(prefix, after, limit, self.revision())
    }
}

impl std::fmt::Debug for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "View {{ revision: {} }}", self.revision())
    }
}
