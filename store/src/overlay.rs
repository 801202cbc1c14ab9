//! Changes that are not yet in the database: of a batch, and above it of one command.
//!
//! A [`Draft`] takes one command's events; each passes `evolve` at once, so the next rule sees what the last one did.
//! An accepted draft moves into its [`Batch`], a rejected one is dropped without a trace (I14). The batch keeps the
//! sums of rows current and is written to the database once, in key order.

use crate::decide::log_time;
use crate::error::StoreError;
use crate::event_bytes;
use crate::evolve::evolve;
use crate::head::Head;
use crate::rows::{RowList, Rows, RowsMut, prefix_end, range};
use crate::tables::{Table, Value, is_view};
use crate::views::Views;
use holdfast_model::event::EVENT_VERSION;
use holdfast_model::{
    Aggregate, ClusterVersion, Context, DeploymentId, Event, EventPayload, OrgId, Revision,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

type Changes = BTreeMap<Vec<u8>, Option<Value>>;

/// `limit` rows of `base` with `changes` laid over them. Costs what it returns, not what the changes are: a batch may
/// have thousands.
fn merged(
    base: &dyn Rows,
    changes: &Changes,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<RowList, StoreError> {
    let end = prefix_end(prefix);
    let Some((from, to)) = range(prefix, after, end.as_deref()) else { return Ok(Vec::new()) };
    let mut over = changes.range::<[u8], _>((from, to)).peekable();
    if over.peek().is_none() {
        return base.scan(prefix, after, limit);
    }
    let mut rows = RowList::new();
    let mut cursor = after.map(<[u8]>::to_vec);
    while rows.len() < limit {
        let wanted = limit - rows.len();
        let under = base.scan(prefix, cursor.as_deref(), wanted)?;
        let is_last = under.len() < wanted;
        cursor = under.last().map(|(key, _)| key.clone()).or(cursor);
        for (key, value) in under {
            while let Some((new, value)) = over.next_if(|(new, _)| **new < key) {
                rows.extend(value.as_ref().map(|value| (new.clone(), value.clone())));
            }
            match over.next_if(|(new, _)| **new == key) {
                Some((_, changed)) => rows.extend(changed.clone().map(|value| (key, value))),
                None => rows.push((key, value)),
            }
        }
        if is_last {
            let rest = over.filter_map(|(key, value)| Some((key.clone(), value.clone()?)));
            rows.extend(rest.take(limit.saturating_sub(rows.len())));
            break;
        }
    }
    rows.truncate(limit);
    Ok(rows)
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
    /// The cluster version after the last command.
    version: ClusterVersion,
    /// The log time after the last command, in milliseconds.
    log_time_ms: u64,
    /// No kept outcome ends before this; `None` while nobody looked.
    outcomes_end: Option<u64>,
}

impl<'a> Batch<'a> {
    pub(crate) fn new(base: &'a dyn Rows, head: Head, version: ClusterVersion, log_time_ms: u64) -> Self {
        let (seen, changes, events) = (RefCell::default(), Changes::new(), Vec::new());
        Self { base, seen, changes, events, head, version, log_time_ms, outcomes_end: None }
    }

    /// The cluster version, with what the batch changed.
    pub(crate) fn cluster_version(&self) -> ClusterVersion {
        self.version
    }

    /// The log time, with what the batch changed, in milliseconds.
    pub(crate) fn log_time_ms(&self) -> u64 {
        self.log_time_ms
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
        for (key, value) in parts.changes {
            let tag = key.first().copied().and_then(Table::from_tag);
            self.put(key, value)?;
            match tag {
                Some(Table::Cluster) => self.version = Views::cluster_version(self)?,
                Some(Table::LogTime) => self.log_time_ms = log_time::of(self)?,
                _ => {}
            }
        }
        for event in parts.events {
            self.head.revision = event.revision;
            self.head.chain = event.chain;
            self.events.push((event.revision, event.bytes));
        }
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
            source: self.context.source,
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    struct Base(BTreeMap<Vec<u8>, Value>);

    impl Rows for Base {
        fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
            Ok(self.0.get(key).cloned())
        }

        fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
            let rows =
                self.0.iter().filter(|(k, _)| k.starts_with(prefix) && after.is_none_or(|a| &k[..] > a));
            Ok(rows.take(limit).map(|(k, v)| (k.clone(), v.clone())).collect())
        }
    }

    #[test]
    fn a_scan_sees_the_changes_as_if_they_were_written_whatever_its_limit() {
        for seed in 0..400u64 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut key = || vec![rng.random_range(0..3u8), rng.random_range(0..12u8)];
            let row = |k: Vec<u8>, n: u8| (k, Value::from([n].as_slice()));
            let base: BTreeMap<_, _> = (0..20).map(|_| row(key(), 0)).collect();
            let changes: Changes =
                (0..20u8).map(|n| row(key(), n)).map(|(k, v)| (k, (v[0] % 2 == 0).then_some(v))).collect();
            let mut written = base.clone();
            for (key, value) in &changes {
                match value {
                    Some(value) => drop(written.insert(key.clone(), value.clone())),
                    None => drop(written.remove(key)),
                }
            }
            let after = key();
            for (prefix, after, limit) in [
                (vec![1], None, 4),
                (vec![], None, 100),
                (vec![1], Some(&after), 3),
                (vec![2], Some(&after), 0),
            ] {
                let after = after.map(Vec::as_slice);
                let found = merged(&Base(base.clone()), &changes, &prefix, after, limit).unwrap();
                let expected = Base(written.clone()).scan(&prefix, after, limit).unwrap();
                assert_eq!(found, expected, "seed {seed}, prefix {prefix:?}, after {after:?}, limit {limit}");
            }
        }
    }
}
