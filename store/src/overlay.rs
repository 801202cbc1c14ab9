//! Changes that are not yet in the database: of a batch, and above it of one command.
//!
//! A [`Draft`] takes one command's events; each passes `evolve` at once, so the next rule sees what the last one did.
//! An accepted draft moves into its [`Batch`], a rejected one is dropped without a trace (I14). The batch keeps the
//! sums of rows current and is written to the database once, in key order.

use crate::error::StoreError;
use crate::event_bytes;
use crate::evolve::evolve;
use crate::head::Head;
use crate::rows::{RowList, Rows, RowsMut, prefix_end};
use crate::tables::{Value, is_view};
use holdfast_model::event::EVENT_VERSION;
use holdfast_model::{Aggregate, Context, DeploymentId, Event, EventPayload, OrgId, Revision};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;

type Changes = BTreeMap<Vec<u8>, Option<Value>>;

/// `limit` rows of `base` with `changes` laid over them.
fn merged(
    base: &dyn Rows,
    changes: &Changes,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<RowList, StoreError> {
    let from = match after {
        Some(after) if after >= prefix => Bound::Excluded(after.to_vec()),
        _ => Bound::Included(prefix.to_vec()),
    };
    let to = prefix_end(prefix).map_or(Bound::Unbounded, Bound::Excluded);
    if let (Bound::Excluded(from), Bound::Excluded(to)) = (&from, &to)
        && from >= to
    {
        return Ok(Vec::new());
    }
    let over: Vec<_> = changes.range((from, to)).collect();
    let hidden = over.iter().filter(|(_, value)| value.is_none()).count();
    let under = base.scan(prefix, after, limit.saturating_add(hidden))?;
    if over.is_empty() {
        return Ok(under);
    }
    // `under` may end before `over` does; that is fine: it is only cut short when it alone fills the limit.
    let mut all: BTreeMap<Vec<u8>, Value> = under.into_iter().collect();
    for (key, value) in over {
        match value {
            Some(value) => drop(all.insert(key.clone(), value.clone())),
            None => drop(all.remove(key)),
        }
    }
    Ok(all.into_iter().take(limit).collect())
}

/// Everything that a batch of log entries changes, over the database's rows.
pub(crate) struct Batch<'a> {
    base: &'a dyn Rows,
    /// What the base answered: a hot row is read from the database once a batch. Never iterated.
    seen: RefCell<HashMap<Vec<u8>, Option<Value>>>,
    changes: Changes,
    /// Encoded events by revision.
    events: Vec<(Revision, Vec<u8>)>,
    head: Head,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(base: &'a dyn Rows, head: Head) -> Self {
        Self { base, seen: RefCell::default(), changes: Changes::new(), events: Vec::new(), head }
    }

    pub(crate) fn head(&self) -> &Head {
        &self.head
    }

    pub(crate) fn head_mut(&mut self) -> &mut Head {
        &mut self.head
    }

    /// Takes over an accepted command's changes and events.
    pub(crate) fn merge(&mut self, parts: DraftParts) -> Result<(), StoreError> {
        for (key, value) in parts.changes {
            self.put(key, value)?;
        }
        for event in parts.events {
            self.head.revision = event.revision;
            self.head.chain = event.chain;
            self.events.push((event.revision, event.bytes));
        }
        Ok(())
    }

    /// Applies an event that was decided before: a replay (I13). The chain is checked by the caller.
    pub(crate) fn replay(&mut self, event: &Event) -> Result<(), StoreError> {
        evolve(self, event)?;
        self.head.revision = event.revision;
        self.head.chain = event.chain;
        Ok(())
    }

    /// The changed rows in key order, the events, and the head after them.
    pub(crate) fn into_parts(self) -> (Changes, Vec<(Revision, Vec<u8>)>, Head) {
        (self.changes, self.events, self.head)
    }
}

impl Rows for Batch<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        if let Some(value) = self.changes.get(key) {
            return Ok(value.clone());
        }
        if let Some(value) = self.seen.borrow().get(key) {
            return Ok(value.clone());
        }
        let value = self.base.get(key)?;
        self.seen.borrow_mut().insert(key.to_vec(), value.clone());
        Ok(value)
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        merged(self.base, &self.changes, prefix, after, limit)
    }
}

impl RowsMut for Batch<'_> {
    fn put(&mut self, key: Vec<u8>, value: Option<Value>) -> Result<(), StoreError> {
        let old = self.get(&key)?;
        if old == value {
            return Ok(());
        }
        let sum = if is_view(&key) { &mut self.head.views } else { &mut self.head.log };
        if let Some(old) = &old {
            sum.remove(&key, old);
        }
        if let Some(new) = &value {
            sum.add(&key, new);
        }
        self.changes.insert(key, value);
        Ok(())
    }
}

/// One command's changes and events.
pub(crate) struct Draft<'a> {
    base: &'a dyn Rows,
    changes: Changes,
    events: Vec<DraftEvent>,
    context: &'a Context,
    head: Head,
    first: Option<Revision>,
    fresh: u32,
}

/// An event, as it will be stored.
pub(crate) struct DraftEvent {
    revision: Revision,
    chain: holdfast_model::Digest,
    bytes: Vec<u8>,
}

/// What an accepted draft leaves.
pub(crate) struct DraftParts {
    changes: Changes,
    events: Vec<DraftEvent>,
}

/// What an event is filed under.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filing {
    /// What it is about.
    pub(crate) aggregate: Aggregate,
    /// Whose it is.
    pub(crate) org: Option<OrgId>,
    /// The deployment that it belongs to.
    pub(crate) correlation: Option<DeploymentId>,
}

impl Filing {
    /// About the cluster's own things.
    pub(crate) const fn cluster(aggregate: Aggregate) -> Self {
        Self { aggregate, org: None, correlation: None }
    }

    /// About an org's things.
    pub(crate) const fn org(aggregate: Aggregate, org: OrgId) -> Self {
        Self { aggregate, org: Some(org), correlation: None }
    }

    /// About a deployment's doing.
    pub(crate) const fn of(self, deployment: DeploymentId) -> Self {
        Self { correlation: Some(deployment), ..self }
    }
}

impl<'a> Draft<'a> {
    pub(crate) fn new(base: &'a dyn Rows, head: Head, context: &'a Context) -> Self {
        Self { base, changes: Changes::new(), events: Vec::new(), context, head, first: None, fresh: 0 }
    }

    /// Who asks, and when.
    pub(crate) fn context(&self) -> &'a Context {
        self.context
    }

    /// The last revision, with this draft's events.
    pub(crate) fn revision(&self) -> Revision {
        self.head.revision
    }

    /// The bits of the next fresh id of this command.
    pub(crate) fn fresh_id(&mut self) -> u128 {
        let id = self.context.fresh_id(self.fresh);
        self.fresh += 1;
        id
    }

    /// Records that something happened, and makes it so.
    pub(crate) fn emit(&mut self, filing: Filing, payload: EventPayload) -> Result<(), StoreError> {
        let revision = self.head.revision.next();
        let mut event = Event {
            revision,
            time: self.context.now,
            version: EVENT_VERSION,
            aggregate: filing.aggregate,
            aggregate_seq: crate::views::aggregate_seq(self, &filing.aggregate)? + 1,
            actor: self.context.actor,
            org: filing.org,
            request_id: self.context.request_id,
            idempotency_key: self.context.idempotency_key.clone(),
            correlation: filing.correlation,
            causation: self.first,
            payload,
            chain: self.head.chain,
        };
        let bytes = event_bytes::seal(&mut event)?;
        evolve(self, &event)?;
        self.first.get_or_insert(revision);
        self.head.revision = revision;
        self.head.chain = event.chain;
        self.events.push(DraftEvent { revision, chain: event.chain, bytes });
        Ok(())
    }

    pub(crate) fn into_parts(self) -> DraftParts {
        DraftParts { changes: self.changes, events: self.events }
    }
}

impl Rows for Draft<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        match self.changes.get(key) {
            Some(value) => Ok(value.clone()),
            None => self.base.get(key),
        }
    }

    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        merged(self.base, &self.changes, prefix, after, limit)
    }
}

impl RowsMut for Draft<'_> {
    fn put(&mut self, key: Vec<u8>, value: Option<Value>) -> Result<(), StoreError> {
        self.changes.insert(key, value);
        Ok(())
    }
}
