//! Views from events: to check them, to make them anew, and to see what they were (I13).

use crate::database::{Doing, ReadTables, VIEWS, WriteTables};
use crate::error::StoreError;
use crate::event_bytes;
use crate::head::Head;
use crate::overlay::Batch;
use crate::rows::NoRows;
use crate::tables::{RowSum, Table, is_view};
use crate::views::Views;
use holdfast_model::{ClusterVersion, Digest, Revision};
use std::collections::BTreeMap;

/// Events that a rebuild applies between two writes: its memory is bounded by what they change.
const REBUILD_EVENTS: u64 = 10_000;

/// What a replay came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuilt {
    /// The last event that was applied.
    pub revision: Revision,
    /// The digest of the views after it.
    pub views: Digest,
}

/// What a verification looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The state's revision.
    pub revision: Revision,
    /// Rows that were read.
    pub rows: u64,
    /// Events that were read, chained and replayed.
    pub events: u64,
    /// The digest of the state.
    pub state: Digest,
}

/// What the views were at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replayed {
    /// Where the replay stopped, and the digest of the views there.
    pub rebuilt: Rebuilt,
    /// Rows by table, of tables that had any.
    pub rows: BTreeMap<&'static str, u64>,
}

/// Applies one stored event, after checking that it is the chain's next.
fn step(batch: &mut Batch<'_>, revision: Revision, bytes: &[u8]) -> Result<(), StoreError> {
    let head = batch.head();
    if revision != head.revision.next() || !event_bytes::continues(head.chain, bytes) {
        return Err(StoreError::corrupt(format!("event {revision} does not continue the history")));
    }
    let event = event_bytes::open(bytes)?;
    if event.revision != revision {
        return Err(StoreError::corrupt(format!("event {} is filed as {revision}", event.revision)));
    }
    batch.replay(&event)
}

/// Replays events up to a revision in memory. `seen` is shown the head after each.
fn replay(
    tables: &ReadTables,
    to: Revision,
    mut seen: impl FnMut(&Head),
) -> Result<Batch<'static>, StoreError> {
    let mut batch = Batch::new(&NoRows, Head::default(), ClusterVersion::ONE);
    seen(batch.head());
    for row in tables.events_after(Revision(0))? {
        let (revision, bytes) = row?;
        if revision > to {
            break;
        }
        step(&mut batch, revision, &bytes)?;
        seen(batch.head());
    }
    Ok(batch)
}

fn check_held(tables: &ReadTables, asked: Revision) -> Result<Head, StoreError> {
    let head = tables.head()?;
    match asked <= head.revision {
        true => Ok(head),
        false => Err(StoreError::NoSuchRevision { asked, head: head.revision }),
    }
}

pub(crate) fn replay_to(tables: &ReadTables, to: Revision) -> Result<Replayed, StoreError> {
    check_held(tables, to)?;
    let batch = replay(tables, to, |_| {})?;
    let head = *batch.head();
    let mut rows: BTreeMap<&'static str, u64> = BTreeMap::new();
    let (changes, ..) = batch.into_parts();
    for (key, _) in changes.iter().filter(|(_, value)| value.is_some()) {
        let table = key.first().copied().and_then(Table::from_tag).map_or("unknown", Table::name);
        *rows.entry(table).or_default() += 1;
    }
    Ok(Replayed { rebuilt: Rebuilt { revision: head.revision, views: head.views_digest() }, rows })
}

/// Verifies all, and tells the digest of the views at `at` beside it: both come out of one replay.
pub(crate) fn verify(tables: &ReadTables, at: Revision) -> Result<(Verified, Digest), StoreError> {
    let head = check_held(tables, at)?;
    let (mut views, mut log, mut rows) = (RowSum::default(), RowSum::default(), 0);
    for row in tables.all_rows()? {
        let (key, value) = row?;
        if is_view(&key) {
            views.add(&key, &value)
        } else {
            log.add(&key, &value)
        }
        rows += 1;
    }
    if views != head.views || log != head.log {
        return Err(StoreError::corrupt("the rows are not those that the digest was made of"));
    }
    let mut views_at = None;
    let replayed = replay(tables, head.revision, |passed| {
        if passed.revision == at {
            views_at = Some(passed.views_digest());
        }
    })?;
    if replayed.head().views_digest() != head.views_digest() {
        return Err(StoreError::corrupt("the events do not lead to the views"));
    }
    let views_at = views_at.ok_or_else(|| StoreError::corrupt("the history skips a revision"))?;
    let verified =
        Verified { revision: head.revision, rows, events: head.revision.0, state: head.state_digest() };
    Ok((verified, views_at))
}

/// Makes the views anew in a transaction. The caller commits, or drops the transaction on an error.
pub(crate) fn rebuild(txn: &redb::WriteTransaction, was: Head) -> Result<Rebuilt, StoreError> {
    txn.delete_table(VIEWS).doing("dropping the views")?;
    let mut tables = WriteTables::open(txn)?;
    let mut head = Head { log: was.log, applied: was.applied, ..Head::default() };
    while head.revision < was.revision {
        let mut batch = Batch::new(&tables, head, Views::cluster_version(&tables)?);
        for n in 1..=REBUILD_EVENTS {
            let revision = Revision(head.revision.0 + n);
            if revision > was.revision {
                break;
            }
            let bytes = tables.event(revision)?;
            let bytes = bytes.ok_or_else(|| StoreError::corrupt(format!("event {revision} is missing")))?;
            step(&mut batch, revision, &bytes)?;
        }
        let parts = batch.into_parts();
        head = tables.write(parts)?;
    }
    if head != was {
        return Err(StoreError::corrupt("the events do not lead to the views"));
    }
    Ok(Rebuilt { revision: head.revision, views: head.views_digest() })
}
