//! The rows of a replay, in memory and nowhere else: where events from the first on are evolved over (I13).
//!
//! A replay writes each row often and reads it in order at most once, so rows lie by table in whatever finds them
//! fastest, and their sum is made once at the end instead of at each change. Nothing here depends on the order of a
//! hash map: sums commute, scans and [`ReplayRows::for_each_in_order`] sort.

use crate::error::StoreError;
use crate::packed::Packed;
use crate::rows::{RowList, Rows, RowsMut, prefix_end, range};
use crate::tables::{LOG_TAG_FIRST, RowSum, Table, Value};
use std::collections::{BTreeMap, HashMap, btree_map};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a key that is a tag or a kind, and an id.
const ID_KEY_BYTES: usize = 17;
/// Threads that sum the rows of a long replay.
const SUM_THREADS: usize = 2;

/// A key of a [`TableRows::Ids`] table: its last bytes as numbers, whose order is theirs and quicker to find out.
type IdKey = (u8, u128);
/// A key of another table: a digest, or two ids, or an id and a name as most are, need no memory of their own.
type RowKey = Packed<38>;
/// The bytes of a row: marks, ids and counts need no memory of their own.
type Cell = Packed<22>;

/// The rows of one table.
enum TableRows {
    /// Keys of one length that end in an id. Ids begin with their time, so a history adds near the end of the tree, whose keys lie in its nodes.
    Ids(BTreeMap<IdKey, Cell>),
    /// Keys that hold names or digests: they come in no order.
    Names(HashMap<RowKey, Cell, foldhash::fast::RandomState>),
    /// Keys that `evolve` scans, and tables of few rows.
    Ranges(BTreeMap<RowKey, Cell>),
}

impl TableRows {
    fn of(tag: u8) -> Self {
        match Table::from_tag(tag) {
            Some(
                Table::Org
                | Table::App
                | Table::Env
                | Table::Release
                | Table::Deployment
                | Table::Instance
                | Table::Route
                | Table::Node
                | Table::NodeLoad
                | Table::Edge
                | Table::Token
                | Table::Enrolment
                | Table::AggregateSeq,
            ) => Self::Ids(BTreeMap::new()),
            Some(
                Table::OrgByName
                | Table::AppByName
                | Table::NodeByName
                | Table::EdgeByName
                | Table::HostnameOwner
                | Table::PortClaim
                | Table::TokenByDigest
                | Table::EnrolmentByDigest
                | Table::Unsettled,
            ) => Self::Names(HashMap::default()),
            _ => Self::Ranges(BTreeMap::new()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Ids(rows) => rows.len(),
            Self::Names(rows) => rows.len(),
            Self::Ranges(rows) => rows.len(),
        }
    }

    fn get(&self, key: &[u8]) -> Option<&Cell> {
        match self {
            Self::Ids(rows) => rows.get(&id_key(key)?),
            Self::Names(rows) => rows.get(key),
            Self::Ranges(rows) => rows.get(key),
        }
    }

    /// Shows every row, in no order that means anything. `key` is made in place.
    fn each<E>(&self, tag: u8, mut show: impl FnMut(&[u8], &[u8]) -> Result<(), E>) -> Result<(), E> {
        match self {
            Self::Ids(rows) => {
                let mut key = Vec::with_capacity(1 + ID_KEY_BYTES);
                for (id, value) in rows {
                    full_key(tag, id, &mut key);
                    show(&key, value)?;
                }
                Ok(())
            }
            Self::Names(rows) => rows.iter().try_for_each(|(key, value)| show(key, value)),
            Self::Ranges(rows) => rows.iter().try_for_each(|(key, value)| show(key, value)),
        }
    }
}

/// The key of a table of ids; `None` for a key of another length, which no such table has.
fn id_key(key: &[u8]) -> Option<IdKey> {
    // A tag and an id, or a tag, a kind and an id.
    if key.len() != ID_KEY_BYTES && !(key.len() == ID_KEY_BYTES + 1 && key[0] == Table::AggregateSeq as u8) {
        return None;
    }
    let (kind, id) = key.last_chunk::<ID_KEY_BYTES>()?.split_first()?;
    Some((*kind, u128::from_be_bytes(id.try_into().ok()?)))
}

/// The whole key that [`id_key`] was made of.
fn full_key(tag: u8, id: &IdKey, key: &mut Vec<u8>) {
    key.clear();
    if tag == Table::AggregateSeq as u8 {
        key.push(tag);
    }
    key.push(id.0);
    key.extend_from_slice(&id.1.to_be_bytes());
}

/// Every row of the views at some revision.
pub(crate) struct ReplayRows {
    /// By tag.
    tables: Vec<TableRows>,
}

impl ReplayRows {
    pub(crate) fn new() -> Self {
        Self { tables: (0..LOG_TAG_FIRST).map(TableRows::of).collect() }
    }

    fn table(&self, key: &[u8]) -> Option<&TableRows> {
        self.tables.get(usize::from(*key.first()?))
    }

    /// The row at a key.
    fn row(&self, key: &[u8]) -> Option<&Cell> {
        self.table(key)?.get(key)
    }

    /// How many rows there are.
    pub(crate) fn len(&self) -> usize {
        self.tables.iter().map(TableRows::len).sum()
    }

    /// How many rows each table has that has any.
    pub(crate) fn counts(&self) -> BTreeMap<&'static str, u64> {
        let named = (0_u8..).zip(&self.tables).filter(|(_, rows)| rows.len() > 0);
        named
            .map(|(tag, rows)| (Table::from_tag(tag).map_or("unknown", Table::name), rows.len() as u64))
            .collect()
    }

    /// The sum of all rows: what [`RowSum`] would be had it followed each change.
    pub(crate) fn sum(&self) -> RowSum {
        self.sum_of(&AtomicUsize::new(0))
    }

    /// As [`sum`](Self::sum), by several threads. Sums commute: the result is the same however they share the work.
    pub(crate) fn sum_by_threads(&self) -> RowSum {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..SUM_THREADS).map(|_| scope.spawn(|| self.sum_of(&next))).collect();
            let mut sum = self.sum_of(&next);
            for other in others {
                match other.join() {
                    Ok(part) => sum.join(part),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            sum
        })
    }

    /// The sum of the tables that nobody else took.
    fn sum_of(&self, next: &AtomicUsize) -> RowSum {
        // The largest first, so that no thread is left with one at the end.
        let mut order: Vec<usize> = (0..self.tables.len()).collect();
        order.sort_by_key(|tag| std::cmp::Reverse(self.tables[*tag].len()));
        let mut sum = RowSum::default();
        while let Some(tag) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
            let mut room = Vec::new();
            let shown = self.tables[*tag].each(*tag as u8, |key, value| {
                sum.add_with(key, value, &mut room);
                Ok::<(), std::convert::Infallible>(())
            });
            match shown {
                Ok(()) => {}
            }
        }
        sum
    }

    /// Shows every row in key order.
    pub(crate) fn for_each_in_order(
        &self,
        mut show: impl FnMut(&[u8], &[u8]) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        for (tag, table) in (0_u8..).zip(&self.tables) {
            match table {
                TableRows::Names(rows) => {
                    let mut sorted: Vec<_> = rows.iter().collect();
                    sorted.sort_unstable_by_key(|(key, _)| *key);
                    sorted.into_iter().try_for_each(|(key, value)| show(key, value))?;
                }
                in_order => in_order.each(tag, &mut show)?,
            }
        }
        Ok(())
    }
}

/// Compares rows that are shown in key order with those of a replay, without looking each up where both have an order.
pub(crate) struct Comparison<'r> {
    rows: &'r ReplayRows,
    /// The table that is being shown.
    tag: u8,
    left: Left<'r>,
    /// Rows that were the same.
    same: usize,
}

/// What of a table was not shown yet.
enum Left<'r> {
    Nothing,
    Ids(btree_map::Iter<'r, IdKey, Cell>),
    /// All of it, and the last key.
    Names(&'r HashMap<RowKey, Cell, foldhash::fast::RandomState>, Vec<u8>),
    Ranges(btree_map::Iter<'r, RowKey, Cell>),
}

impl<'r> Comparison<'r> {
    pub(crate) fn new(rows: &'r ReplayRows) -> Self {
        Self { rows, tag: 0, left: Left::Nothing, same: 0 }
    }

    /// Whether the next row is the same. Not to be asked again after a row that was not.
    pub(crate) fn is_same(&mut self, key: &[u8], value: &[u8]) -> bool {
        let Some(&tag) = key.first() else { return false };
        if tag > self.tag {
            // Rows of the table before that were not shown are missed in the end, by their number.
            self.tag = tag;
            self.left = match self.rows.tables.get(usize::from(tag)) {
                Some(TableRows::Ids(rows)) => Left::Ids(rows.iter()),
                Some(TableRows::Names(rows)) => Left::Names(rows, Vec::new()),
                Some(TableRows::Ranges(rows)) => Left::Ranges(rows.iter()),
                None => Left::Nothing,
            };
        }
        let is_same = tag == self.tag
            && match &mut self.left {
                Left::Nothing => false,
                Left::Ids(rows) => {
                    rows.next().is_some_and(|(id, row)| id_key(key) == Some(*id) && **row == *value)
                }
                Left::Ranges(rows) => rows.next().is_some_and(|(at, row)| **at == *key && **row == *value),
                // In order and each once: as many as there are, each right, are all of them.
                Left::Names(rows, before) => {
                    let is_next = *key > **before && rows.get(key).is_some_and(|row| **row == *value);
                    before.clear();
                    before.extend_from_slice(key);
                    is_next
                }
            };
        self.same += usize::from(is_same);
        is_same
    }

    /// Whether every row of the replay was shown.
    pub(crate) fn is_whole(&self) -> bool {
        self.same == self.rows.len()
    }
}

impl Rows for ReplayRows {
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError> {
        Ok(self.row(key).map(|value| Value::from(&**value)))
    }

    fn look(
        &self,
        key: &[u8],
        show: &mut dyn FnMut(&[u8]) -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        self.row(key).map_or(Ok(false), |value| show(value).map(|()| true))
    }

    /// Fast for tables that `evolve` scans; right for all.
    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError> {
        let end = prefix_end(prefix);
        let Some((from, to)) = range(prefix, after, end.as_deref()) else { return Ok(RowList::new()) };
        let mut found = RowList::new();
        let first = prefix.first().copied().unwrap_or(0);
        let last = prefix.first().copied().unwrap_or(u8::MAX);
        for (tag, table) in (0_u8..).zip(&self.tables).filter(|(tag, _)| (first..=last).contains(tag)) {
            let wanted = limit - found.len();
            if let TableRows::Ranges(rows) = table {
                let rows = rows.range::<[u8], _>((from, to)).take(wanted);
                found.extend(rows.map(|(key, value)| (key.to_vec(), Value::from(&**value))));
                continue;
            }
            let mut rows = RowList::new();
            table.each(tag, |key, value| {
                if std::ops::RangeBounds::<[u8]>::contains(&(from, to), key) {
                    rows.push((key.to_vec(), Value::from(value)));
                }
                Ok::<(), StoreError>(())
            })?;
            rows.sort_unstable_by(|a, b| a.0.cmp(&b.0));
            rows.truncate(wanted);
            found.append(&mut rows);
        }
        Ok(found)
    }
}

impl RowsMut for ReplayRows {
    fn put(&mut self, key: Vec<u8>, value: Option<Value>) -> Result<(), StoreError> {
        self.change(&key, value.as_deref())
    }

    fn set(&mut self, key: Vec<u8>, value: &[u8]) -> Result<(), StoreError> {
        self.change(&key, Some(value))
    }
}

impl ReplayRows {
    /// Sets or removes a row.
    fn change(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), StoreError> {
        let tag = key.first().copied().map(usize::from);
        let Some(table) = tag.and_then(|tag| self.tables.get_mut(tag)) else {
            return Err(StoreError::corrupt("an event changes a row that is no view's"));
        };
        match (table, value) {
            (TableRows::Ids(rows), value) => {
                let id = id_key(key)
                    .ok_or_else(|| StoreError::corrupt("an event changes a row whose key is no id's"))?;
                match value {
                    Some(value) => drop(rows.insert(id, value.into())),
                    None => drop(rows.remove(&id)),
                }
            }
            (TableRows::Names(rows), Some(value)) => drop(rows.insert(key.into(), value.into())),
            (TableRows::Names(rows), None) => drop(rows.remove(key)),
            (TableRows::Ranges(rows), Some(value)) => drop(rows.insert(key.into(), value.into())),
            (TableRows::Ranges(rows), None) => drop(rows.remove(key)),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    /// Keys of three tables, one of each kind.
    fn random_key(rng: &mut StdRng) -> Vec<u8> {
        let table = [Table::App, Table::AppByName, Table::EnvByName, Table::AggregateSeq]
            [rng.random_range(0..4usize)];
        let length = match table {
            Table::App => 16,
            Table::AggregateSeq => 17,
            _ => rng.random_range(1..20usize),
        };
        let mut key = vec![table as u8];
        key.extend((0..length).map(|place| if place < length - 1 { 1 } else { rng.random_range(0..9u8) }));
        key
    }

    #[test]
    fn rows_are_found_scanned_summed_and_shown_as_in_one_ordered_map() {
        for seed in 0..200u64 {
            let mut rng = StdRng::seed_from_u64(seed);
            let (mut rows, mut model) = (ReplayRows::new(), BTreeMap::new());
            for n in 0..rng.random_range(1..80u8) {
                let key = random_key(&mut rng);
                let value = (n % 4 != 0).then(|| Value::from([n].as_slice()));
                match &value {
                    Some(value) => drop(model.insert(key.clone(), value.clone())),
                    None => drop(model.remove(&key)),
                }
                rows.put(key, value).unwrap();
            }
            let mut sum = RowSum::default();
            model.iter().for_each(|(key, value)| sum.add(key, value));
            assert_eq!(
                (rows.sum(), rows.sum_by_threads(), rows.len()),
                (sum, sum, model.len()),
                "seed {seed}"
            );
            let mut shown = RowList::new();
            rows.for_each_in_order(|key, value| {
                shown.push((key.to_vec(), Value::from(value)));
                Ok(())
            })
            .unwrap();
            assert_eq!(shown, model.clone().into_iter().collect::<RowList>(), "seed {seed}");
            for _ in 0..20 {
                let mut prefix = random_key(&mut rng);
                prefix.truncate(rng.random_range(0..4));
                let after = rng.random_bool(0.5).then(|| random_key(&mut rng));
                let limit = rng.random_range(0..6usize);
                let expected = model
                    .iter()
                    .filter(|(k, _)| k.starts_with(&prefix) && after.as_ref().is_none_or(|a| *k > a))
                    .take(limit)
                    .map(|(k, v)| (k.clone(), v.clone()));
                let found = rows.scan(&prefix, after.as_deref(), limit).unwrap();
                assert_eq!(
                    found,
                    expected.collect::<RowList>(),
                    "seed {seed}, {prefix:?}, {after:?}, {limit}"
                );
            }
            let key = random_key(&mut rng);
            assert_eq!(rows.get(&key).unwrap(), model.get(&key).cloned(), "seed {seed}");
        }
    }

    #[test]
    fn i13_only_the_same_rows_each_once_and_in_order_are_the_same() {
        let is_same = |rows: &ReplayRows, shown: &RowList| {
            let mut comparison = Comparison::new(rows);
            shown.iter().all(|(key, value)| comparison.is_same(key, value)) && comparison.is_whole()
        };
        for seed in 0..200u64 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut rows = ReplayRows::new();
            for n in 0..rng.random_range(2..60u8) {
                rows.put(random_key(&mut rng), Some(Value::from([n].as_slice()))).unwrap();
            }
            let mut good = RowList::new();
            rows.for_each_in_order(|key, value| {
                good.push((key.to_vec(), Value::from(value)));
                Ok(())
            })
            .unwrap();
            assert!(is_same(&rows, &good), "seed {seed}");
            for at in 0..good.len() {
                let [mut gone, mut twice, mut other, mut added] = [(); 4].map(|()| good.clone());
                gone.remove(at);
                twice[at] = good[at.saturating_sub(1)].clone();
                other[at].1 = Value::from([255].as_slice());
                added.insert(at, (random_key(&mut rng), Value::from([255].as_slice())));
                let mut swapped = good.clone();
                swapped.swap(at, 0);
                for (what, wrong) in [gone, twice, other, added, swapped].iter().enumerate() {
                    assert_eq!(is_same(&rows, wrong), *wrong == good, "seed {seed}, at {at}, {what}");
                }
            }
            good.push((vec![Table::Outcome as u8], Value::from([].as_slice())));
            assert!(!is_same(&rows, &good), "seed {seed}");
        }
    }

    #[test]
    fn i13_a_row_of_an_earlier_table_is_not_taken_for_one_with_the_same_last_bytes() {
        let [first, second] = [1, 2].map(|id| [&[Table::AggregateSeq as u8, 4][..], &[id; 16]].concat());
        let mut rows = ReplayRows::new();
        rows.set(first.clone(), &[1]).unwrap();
        rows.set(second.clone(), &[1]).unwrap();
        for (next, same) in [(&second[..], true), (&second[1..], false)] {
            let mut comparison = Comparison::new(&rows);
            assert!(comparison.is_same(&first, &[1]));
            assert_eq!(comparison.is_same(next, &[1]), same);
        }
    }

    #[test]
    fn i13_a_row_of_the_log_state_is_no_view() {
        let mut rows = ReplayRows::new();
        let value = Some(Value::from([1].as_slice()));
        assert!(rows.put(vec![Table::Outcome as u8, 1], value.clone()).is_err());
        assert!(rows.put(Vec::new(), value.clone()).is_err());
        assert!(rows.put(vec![Table::App as u8, 1], value).is_err());
    }
}
