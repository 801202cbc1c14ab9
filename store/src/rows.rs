//! Reading rows, wherever they are: the one thing that `decide` and the API need of a state.

use crate::error::StoreError;
use crate::tables::{Row, Table, Value, decode, key, with_encoded};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Bound;

/// Rows of one prefix: keys and values in key order.
pub type RowList = Vec<(Vec<u8>, Value)>;

/// Read access to rows.
pub trait Rows {
    /// The value at a key.
    ///
    /// # Errors
    /// When the database fails.
    fn get(&self, key: &[u8]) -> Result<Option<Value>, StoreError>;

    /// Shows the value at a key, if there is one, and tells whether there was. Costs no copy where rows lie in memory.
    ///
    /// # Errors
    /// When the database fails, and whatever `show` ends with.
    fn look(
        &self,
        key: &[u8],
        show: &mut dyn FnMut(&[u8]) -> Result<(), StoreError>,
    ) -> Result<bool, StoreError> {
        let found = self.get(key)?;
        found.map_or(Ok(false), |value| show(&value).map(|()| true))
    }

    /// At most `limit` rows whose key begins with `prefix`, in key order, after the key `after`.
    ///
    /// # Errors
    /// When the database fails.
    fn scan(&self, prefix: &[u8], after: Option<&[u8]>, limit: usize) -> Result<RowList, StoreError>;
}

/// Write access to rows.
pub(crate) trait RowsMut: Rows {
    /// Sets or removes the value at a key.
    fn put(&mut self, key: Vec<u8>, value: Option<Value>) -> Result<(), StoreError>;

    /// Sets the value at a key to a copy of `value`, for whoever does not keep values as shared memory.
    fn set(&mut self, key: Vec<u8>, value: &[u8]) -> Result<(), StoreError> {
        self.put(key, Some(value.into()))
    }
}

/// Where a range of keys begins and ends.
pub(crate) type KeyRange<'k> = (Bound<&'k [u8]>, Bound<&'k [u8]>);

/// From where to where a page lies: keys that begin with `prefix`, after `after`, and before `end`, which is the prefix's
/// [`prefix_end`]. `None` when nothing can lie there.
pub(crate) fn range<'k>(
    prefix: &'k [u8],
    after: Option<&'k [u8]>,
    end: Option<&'k [u8]>,
) -> Option<KeyRange<'k>> {
    let from = match after {
        Some(after) if after >= prefix => Bound::Excluded(after),
        _ => Bound::Included(prefix),
    };
    let to = end.map_or(Bound::Unbounded, Bound::Excluded);
    match (from, to) {
        (Bound::Excluded(from), Bound::Excluded(to)) if from >= to => None,
        bounds => Some(bounds),
    }
}

/// The first key after every key that begins with `prefix`; `None` when there is none.
pub(crate) fn prefix_end(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

/// The row of `table` whose key has these parts.
pub(crate) fn read<T: Row>(rows: &(impl Rows + ?Sized), parts: &[&[u8]]) -> Result<Option<T>, StoreError> {
    read_at(rows, T::TABLE, &key(T::TABLE, parts))
}

/// What the value at a key of `table` says.
pub(crate) fn read_at<T: DeserializeOwned>(
    rows: &(impl Rows + ?Sized),
    table: Table,
    key: &[u8],
) -> Result<Option<T>, StoreError> {
    let mut found = None;
    rows.look(key, &mut |bytes| {
        found = Some(decode(table, bytes)?);
        Ok(())
    })?;
    Ok(found)
}

/// The 16 bytes that an index row leads to.
pub(crate) fn read_id(rows: &(impl Rows + ?Sized), key: &[u8]) -> Result<Option<u128>, StoreError> {
    let Some(value) = rows.get(key)? else { return Ok(None) };
    id_bits(&value).map(Some)
}

/// The id that a value holds.
pub(crate) fn id_bits(value: &[u8]) -> Result<u128, StoreError> {
    let bytes: [u8; 16] =
        value.try_into().map_err(|_| StoreError::corrupt("an index row does not hold an id"))?;
    Ok(u128::from_be_bytes(bytes))
}

/// The id that a key ends in.
pub(crate) fn id_suffix(key: &[u8]) -> Result<u128, StoreError> {
    let start = key.len().checked_sub(16);
    start.map_or_else(|| Err(StoreError::corrupt("an index key is too short")), |s| id_bits(&key[s..]))
}

/// Writes a row at its own key.
pub(crate) fn write<T: Row>(rows: &mut (impl RowsMut + ?Sized), row: &T) -> Result<(), StoreError> {
    write_at(rows, T::TABLE, row.row_key(), row)
}

/// Writes what a row of `table` says, at a key.
pub(crate) fn write_at<T: Serialize>(
    rows: &mut (impl RowsMut + ?Sized),
    table: Table,
    key: Vec<u8>,
    row: &T,
) -> Result<(), StoreError> {
    with_encoded(table, row, |bytes| rows.set(key, bytes))
}

/// Removes a row.
pub(crate) fn remove(
    rows: &mut (impl RowsMut + ?Sized),
    table: Table,
    parts: &[&[u8]],
) -> Result<(), StoreError> {
    rows.put(key(table, parts), None)
}

/// Writes an index row that leads to an id.
pub(crate) fn write_id(
    rows: &mut (impl RowsMut + ?Sized),
    table: Table,
    parts: &[&[u8]],
    id: [u8; 16],
) -> Result<(), StoreError> {
    rows.set(key(table, parts), &id)
}

/// Writes an index row that says only that it is there.
pub(crate) fn write_mark(
    rows: &mut (impl RowsMut + ?Sized),
    table: Table,
    parts: &[&[u8]],
) -> Result<(), StoreError> {
    rows.set(key(table, parts), &[])
}
