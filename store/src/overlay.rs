//! Changes that are nobody else's yet: those of one command.
//!
//! A [`Draft`] takes one command's events; each passes `evolve` at once, so the next rule sees what the last one did.
//! An accepted draft moves into its writer, a rejected one is dropped without a trace (I14).

use crate::error::StoreError;
use crate::event_bytes;
use crate::evolve::evolve;
use crate::head::Head;
use crate::merge::laid_over;
use crate::rows::{RowList, Rows, RowsMut, id_suffix, prefix_end, range};
use crate::tables::{Table, Value, key};
use holdfast_model::event::EVENT_VERSION;
use holdfast_model::{Aggregate, Context, DeploymentId, Event, EventPayload, OrgId, Revision};
use std::collections::{BTreeMap, BTreeSet};

type Changes = BTreeMap<Vec<u8>, Option<Value>>;

/// `limit` rows of `base` with `changes` laid over them.
fn merged(
    base: &dyn Rows,
    changes: &Changes,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<RowList, StoreError> {
    let end = prefix_end(prefix);
    let Some((from, to)) = range(prefix, after, end.as_deref()) else { return Ok(Vec::new()) };
    let over = changes.range::<[u8], _>((from, to)).map(|(key, value)| (key.as_slice(), value.clone()));
    laid_over(base, over, prefix, after, limit)
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
    pub(crate) revision: Revision,
    pub(crate) chain: holdfast_model::Digest,
    pub(crate) bytes: Vec<u8>,
}

/// What an accepted draft leaves.
pub(crate) struct DraftParts {
    pub(crate) changes: Changes,
    pub(crate) events: Vec<DraftEvent>,
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

    /// Ids that are marked for `Tick`: a bounded number, beginning at another place each time, so that none waits for ever
    /// behind others. Marks are ordered by the random half of their id, so a random start falls evenly among them.
    pub(crate) fn marks_from_anywhere(&self, table: Table, max: usize) -> Result<BTreeSet<u128>, StoreError> {
        let prefix = key(table, &[]);
        let start = key(table, &[&self.context.fresh_id(u32::MAX).to_be_bytes()[8..]]);
        let mut marks = self.scan(&prefix, Some(&start), max)?;
        if marks.len() < max {
            marks.extend(self.scan(&prefix, None, max - marks.len())?);
        }
        marks.iter().map(|(key, _)| id_suffix(key)).collect()
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
