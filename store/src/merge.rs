//! Changes laid over rows, in the order of keys: a removed row hides the one below it, a newer layer the older ones.

use crate::error::StoreError;
use crate::packed::Key;
use crate::recent::Change;
use crate::rows::{RowList, Rows};
use crate::tables::Value;
use std::borrow::Borrow;
use std::iter::Peekable;

/// Several layers' changes as one list in the order of keys; of a row that changed in several the newest layer's.
pub(crate) struct Layered<I: Iterator> {
    /// The newest first.
    layers: Vec<Peekable<I>>,
}

impl<I: Iterator<Item = (Key, Change)>> Layered<I> {
    pub(crate) fn new(layers: impl Iterator<Item = I>) -> Self {
        Self { layers: layers.map(Iterator::peekable).collect() }
    }
}

impl<I: Iterator<Item = (Key, Change)>> Iterator for Layered<I> {
    type Item = (Key, Change);

    fn next(&mut self) -> Option<Self::Item> {
        let least =
            self.layers.iter_mut().filter_map(|layer| layer.peek().map(|(key, _)| key)).min()?.clone();
        let mut found = None;
        for layer in &mut self.layers {
            let same = layer.next_if(|(key, _)| *key == least);
            found = found.or(same);
        }
        found
    }
}

/// `limit` rows of `base` with changes, which come in the order of keys, laid over them. Costs what it returns, not what
/// the changes are.
pub(crate) fn laid_over<K: Borrow<[u8]>>(
    base: &dyn Rows,
    over: impl Iterator<Item = (K, Change)>,
    prefix: &[u8],
    after: Option<&[u8]>,
    limit: usize,
) -> Result<RowList, StoreError> {
    let mut over = over.peekable();
    if over.peek().is_none() {
        return base.scan(prefix, after, limit);
    }
    let owned = |key: K, value: Value| (key.borrow().to_vec(), value);
    let mut rows = RowList::new();
    let mut cursor = after.map(<[u8]>::to_vec);
    while rows.len() < limit {
        let wanted = limit - rows.len();
        let under = base.scan(prefix, cursor.as_deref(), wanted)?;
        let is_last = under.len() < wanted;
        cursor = under.last().map(|(key, _)| key.clone()).or(cursor);
        for (key, value) in under {
            while rows.len() < limit {
                let Some((new, value)) = over.next_if(|(new, _)| *new.borrow() < *key) else { break };
                rows.extend(value.map(|value| owned(new, value)));
            }
            if rows.len() >= limit {
                break;
            }
            match over.next_if(|(new, _)| *new.borrow() == *key) {
                Some((_, changed)) => rows.extend(changed.map(|value| (key, value))),
                None => rows.push((key, value)),
            }
        }
        if is_last {
            let rest = over.by_ref().filter_map(|(key, value)| Some(owned(key, value?)));
            rows.extend(rest.take(limit.saturating_sub(rows.len())));
            break;
        }
    }
    rows.truncate(limit);
    Ok(rows)
}

/// Every row of `base` with changes laid over them; both come in the order of keys.
pub(crate) fn all_laid_over(
    base: impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>>,
    over: impl Iterator<Item = (Key, Change)>,
) -> impl Iterator<Item = Result<(Vec<u8>, Value), StoreError>> {
    let (mut base, mut over) = (base.peekable(), over.peekable());
    std::iter::from_fn(move || {
        loop {
            let Some((key, _)) = over.peek() else { return base.next() };
            match base.peek() {
                Some(Err(_)) => return base.next(),
                Some(Ok((under, _))) if **under < **key => return base.next(),
                Some(Ok((under, _))) if **under == **key => drop(base.next()),
                _ => {}
            }
            if let (key, Some(value)) = over.next()? {
                return Some(Ok((key.to_vec(), value)));
            }
        }
    })
}
