//! A snapshot on its way in: items are gathered, within bounds, until the snapshot is whole. Nothing of it is visible
//! before.

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_model::Revision;
use holdfast_model::agent::{FRAME_ITEMS_MAX, Followed, Stamp};

use super::rules::{Candidate, Refusal};
use super::{ITEMS_MAX, SNAPSHOT_BYTES_MAX};

#[derive(Debug)]
pub(super) struct Staging<T: Followed> {
    stamp: Stamp,
    expected: u64,
    confirmed_through: Revision,
    items: BTreeMap<T::Key, Arc<T>>,
    bytes: usize,
}

impl<T: Followed> Staging<T> {
    pub(super) fn begin(
        stamp: Stamp,
        expected: u64,
        confirmed_through: Revision,
    ) -> Result<Staging<T>, Refusal> {
        if expected > ITEMS_MAX {
            return Err(Refusal::TooLarge);
        }
        Ok(Staging { stamp, expected, confirmed_through, items: BTreeMap::new(), bytes: 0 })
    }

    pub(super) fn add(&mut self, items: Vec<T>) -> Result<(), Refusal> {
        if items.len() > FRAME_ITEMS_MAX || (self.items.len() + items.len()) as u64 > self.expected {
            return Err(Refusal::Malformed { what: "a snapshot has more items than it announced" });
        }
        for item in items {
            let encoded = postcard::to_stdvec(&item)
                .map_err(|_| Refusal::Malformed { what: "an item cannot be encoded again" })?;
            self.bytes = self.bytes.saturating_add(encoded.len());
            if self.bytes > SNAPSHOT_BYTES_MAX {
                return Err(Refusal::TooLarge);
            }
            if self.items.insert(item.key(), Arc::new(item)).is_some() {
                return Err(Refusal::Malformed { what: "a snapshot has two items with one key" });
            }
        }
        Ok(())
    }

    pub(super) fn finish(self) -> Result<Candidate<T>, Refusal> {
        if self.items.len() as u64 != self.expected {
            return Err(Refusal::Malformed { what: "a snapshot ended before it was whole" });
        }
        Ok(Candidate {
            stamp: self.stamp,
            items: Arc::new(self.items),
            confirmed_through: self.confirmed_through,
        })
    }
}
