//! Views from events: to check them, to make them anew, and to see what they were (I13).

use crate::database::{Doing, ReadTables, VIEWS, fill_views};
use crate::error::StoreError;
use crate::evolve::evolve;
use crate::head::Head;
use crate::replay_events::{self, Place, THREADS_FROM_EVENTS};
use crate::replay_rows::{Comparison, ReplayRows};
use crate::tables::{RowSum, is_view};
use holdfast_model::{Digest, Revision};
use redb::{ReadableTable, ReadableTableMetadata};
use std::collections::BTreeMap;

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

/// A replay in memory: the rows that the events so far lead to.
struct Replay {
    rows: ReplayRows,
    at: Place,
}

impl Replay {
    fn new() -> Self {
        Self { rows: ReplayRows::new(), at: Place::default() }
    }

    /// Goes on up to a revision.
    fn go_on(&mut self, tables: &ReadTables, to: Revision) -> Result<(), StoreError> {
        let (from, rows) = (self.at, &mut self.rows);
        let threads = to.0.saturating_sub(from.revision.0) >= THREADS_FROM_EVENTS;
        let stored = || tables.stored_events(from.revision);
        self.at = replay_events::each(from, to, threads, stored, |event| evolve(rows, event))?;
        if self.at.revision < to {
            return Err(StoreError::corrupt(format!("event {} is missing", self.at.revision.next())));
        }
        Ok(())
    }

    /// Whether threads are worth it.
    fn is_long(&self) -> bool {
        self.at.revision.0 >= THREADS_FROM_EVENTS
    }

    /// The head of a state with these views.
    fn head(&self) -> Head {
        let views = if self.is_long() { self.rows.sum_by_threads() } else { self.rows.sum() };
        self.head_with(views)
    }

    /// The digest of the views, which must be that of `head`.
    fn leads_to(&self, head: Head) -> Result<Digest, StoreError> {
        let views = self.head().views_digest();
        if views != head.views_digest() {
            return Err(StoreError::corrupt("the events do not lead to the views"));
        }
        Ok(views)
    }

    fn head_with(&self, views: RowSum) -> Head {
        Head { revision: self.at.revision, chain: self.at.chain, views, ..Head::default() }
    }
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
    let mut replay = Replay::new();
    replay.go_on(tables, to)?;
    let rebuilt = Rebuilt { revision: to, views: replay.head().views_digest() };
    Ok(Replayed { rebuilt, rows: replay.rows.counts() })
}

/// Verifies all, and tells the digest of the views at `at` beside it: both come out of one replay.
pub(crate) fn verify(tables: &ReadTables, at: Revision) -> Result<(Verified, Digest), StoreError> {
    let head = check_held(tables, at)?;
    // What is wrong with the rows is told first, whichever is found first.
    let (rows, views_at) = if head.revision.0 >= THREADS_FROM_EVENTS {
        std::thread::scope(|scope| {
            let rows = scope.spawn(|| check_rows(tables, head));
            let views_at = check_events(tables, head, at);
            match rows.join() {
                Ok(rows) => Ok::<_, StoreError>((rows?, views_at?)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })?
    } else {
        (check_rows(tables, head)?, check_events(tables, head, at)?)
    };
    let verified =
        Verified { revision: head.revision, rows, events: head.revision.0, state: head.state_digest() };
    Ok((verified, views_at))
}

/// Reads every row, and tells how many there are.
fn check_rows(tables: &ReadTables, head: Head) -> Result<u64, StoreError> {
    let (mut views, mut log, mut rows) = (RowSum::default(), RowSum::default(), 0);
    let mut room = Vec::new();
    tables.for_each_row(|key, value| {
        let sum = if is_view(key) { &mut views } else { &mut log };
        sum.add_with(key, value, &mut room);
        rows += 1;
    })?;
    if views != head.views || log != head.log {
        return Err(StoreError::corrupt("the rows are not those that the digest was made of"));
    }
    Ok(rows)
}

/// Replays every event, and tells the digest of the views at `at`.
fn check_events(tables: &ReadTables, head: Head, at: Revision) -> Result<Digest, StoreError> {
    let mut replay = Replay::new();
    replay.go_on(tables, at)?;
    if at == head.revision {
        return replay.leads_to(head);
    }
    let views_at = replay.head().views_digest();
    replay.go_on(tables, head.revision)?;
    replay.leads_to(head).map(|_| views_at)
}

/// Makes the views anew from the committed events of `tables`, and replaces those in the file if they differ at all.
/// The caller commits, or drops the transaction on an error. Needs memory for one copy of the views.
///
/// Views that are right already are left where they are: writing millions of rows again costs more than all the rest.
/// Once one row is wrong nothing in the table is trusted, and all of it is dropped and written in key order.
pub(crate) fn rebuild(
    tables: &ReadTables,
    txn: &redb::WriteTransaction,
    was: Head,
) -> Result<Rebuilt, StoreError> {
    let mut replay = Replay::new();
    replay.go_on(tables, was.revision)?;
    let (views, is_right) = if replay.is_long() {
        std::thread::scope(|scope| {
            let sum = scope.spawn(|| replay.rows.sum());
            let is_right = is_written(txn, &replay.rows);
            match sum.join() {
                Ok(sum) => (sum, is_right),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    } else {
        (replay.rows.sum(), is_written(txn, &replay.rows))
    };
    let head = Head { log: was.log, applied: was.applied, ..replay.head_with(views) };
    if head != was {
        return Err(StoreError::corrupt("the events do not lead to the views"));
    }
    if !is_right {
        txn.delete_table(VIEWS).doing("dropping the views")?;
        fill_views(txn, |put| replay.rows.for_each_in_order(put))?;
    }
    Ok(Rebuilt { revision: head.revision, views: head.views_digest() })
}

/// Whether the file has exactly these views. What cannot be read is wrong, too.
fn is_written(txn: &redb::WriteTransaction, rows: &ReplayRows) -> bool {
    let compare = || -> Result<bool, redb::Error> {
        let table = txn.open_table(VIEWS)?;
        if table.len()? != rows.len() as u64 {
            return Ok(false);
        }
        let mut comparison = Comparison::new(rows);
        for row in table.iter()? {
            let (key, value) = row?;
            if !comparison.is_same(key.value(), value.value()) {
                return Ok(false);
            }
        }
        Ok(comparison.is_whole())
    };
    compare().unwrap_or(false)
}
