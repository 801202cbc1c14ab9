//! The greatest key of each part of a file's rows: what sorts after it is not there, and needs no search.
//!
//! Ids rise with time, so almost every row that a command makes is looked for in vain first, at the end of its table.
//! A "no" is always true; without one the file must be asked.

use crate::database::{Bytes, Doing, READING};
use crate::error::StoreError;
use crate::packed::Key;
use crate::tables::Table;
use redb::ReadableTable;
use std::ops::Bound;

/// Parts of the rows: the tags of tables, and after them the kinds of aggregates, because each kind's ids rise by
/// themselves.
const PARTS: usize = 512;

/// See the head of this file.
pub(crate) struct Greatest {
    /// `None` where the part is empty.
    keys: Vec<Option<Key>>,
}

/// The part that a key belongs to, and how many of its first bytes every key of that part shares.
fn part_of(key: &[u8]) -> Option<(usize, usize)> {
    match *key {
        [tag, kind, ..] if tag == Table::AggregateSeq as u8 => Some((PARTS / 2 + usize::from(kind), 2)),
        [tag, ..] => Some((usize::from(tag), 1)),
        [] => None,
    }
}

impl Greatest {
    /// Knows of no row.
    pub(crate) fn of_nothing() -> Self {
        Self { keys: vec![None; PARTS] }
    }

    /// Looks at the end of every part of a table. Costs a search for each part that has rows.
    pub(crate) fn add(&mut self, table: &impl ReadableTable<Bytes, Bytes>) -> Result<(), StoreError> {
        let mut to: Option<Vec<u8>> = None;
        loop {
            let to_bound = to.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
            let mut before = table.range::<&[u8]>((Bound::Unbounded, to_bound)).doing(READING)?;
            let Some(last) = before.next_back() else { return Ok(()) };
            let (last, _) = last.doing(READING)?;
            let Some((part, shared)) = part_of(last.value()) else { return Ok(()) };
            self.keys[part] = Some(Key::from(last.value()));
            to = Some(last.value()[..shared].to_vec());
        }
    }

    /// Whether no row can have this key.
    pub(crate) fn excludes(&self, key: &[u8]) -> bool {
        match part_of(key).and_then(|(part, _)| self.keys.get(part)) {
            Some(Some(greatest)) => *key > **greatest,
            Some(None) => true,
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::VIEWS;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use redb::ReadableDatabase;
    use std::collections::BTreeSet;

    #[test]
    fn no_row_that_is_there_is_excluded_and_every_key_after_its_part_is() {
        for seed in 0..50u64 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut draw = || {
                let tag = [0, 1, 32, Table::AggregateSeq as u8, 34, u8::MAX][rng.random_range(0..6usize)];
                let rest = (0..rng.random_range(0..4)).map(|_| rng.random_range(0..3u8));
                std::iter::once(tag).chain(rest).collect::<Vec<_>>()
            };
            let keys: BTreeSet<_> = (0..12).map(|_| draw()).collect();
            let db = redb::Database::builder().create_with_backend(redb::backends::InMemoryBackend::new());
            let db = db.unwrap();
            let txn = db.begin_write().unwrap();
            let mut table = txn.open_table(VIEWS).unwrap();
            for key in &keys {
                table.insert(key.as_slice(), [].as_slice()).unwrap();
            }
            drop(table);
            txn.commit().unwrap();
            let mut greatest = Greatest::of_nothing();
            greatest.add(&db.begin_read().unwrap().open_table(VIEWS).unwrap()).unwrap();
            for asked in keys.iter().cloned().chain((0..200).map(|_| draw())) {
                let part = part_of(&asked).map(|(part, _)| part);
                let mut same = keys.iter().filter(|key| part_of(key).map(|(part, _)| part) == part);
                let is_after = same.all(|key| *key < asked);
                assert_eq!(greatest.excludes(&asked), is_after, "seed {seed}, {asked:?} among {keys:?}");
            }
        }
    }
}
