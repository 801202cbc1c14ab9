//! A row's key as memory keeps it: in place, because that is where searches compare it.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// The longest key that is kept in place, in bytes: ids, digests with their ends, and names as people give them.
const SHORT_BYTES_MAX: usize = 46;

/// A key. Equal, ordered and hashed as its bytes.
#[derive(Clone)]
pub(crate) enum Key {
    /// A copy costs less than counting who shares it, and to look at it costs no step to other memory.
    Short { len: u8, bytes: [u8; SHORT_BYTES_MAX] },
    /// Shared by whoever remembers the row.
    Long(Arc<[u8]>),
}

impl From<&[u8]> for Key {
    fn from(key: &[u8]) -> Self {
        let mut bytes = [0; SHORT_BYTES_MAX];
        match (u8::try_from(key.len()), bytes.get_mut(..key.len())) {
            (Ok(len), Some(place)) => {
                place.copy_from_slice(key);
                Self::Short { len, bytes }
            }
            _ => Self::Long(key.into()),
        }
    }
}

impl Deref for Key {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Short { len, bytes } => &bytes[..usize::from(*len)],
            Self::Long(key) => key,
        }
    }
}

impl Borrow<[u8]> for Key {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl PartialEq for Key {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Key {}

impl PartialOrd for Key {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Key {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::hash::BuildHasher;

    #[test]
    fn a_key_is_found_and_ordered_as_its_bytes_whatever_its_length() {
        let mut rng = StdRng::seed_from_u64(1);
        let hasher = foldhash::fast::FixedState::default();
        let mut draw = || -> Vec<u8> {
            let len = rng.random_range(0..300usize) % rng.random_range(1..100usize);
            (0..len).map(|_| rng.random_range(0..2u8)).collect()
        };
        let mut pairs: Vec<_> = (0..4000).map(|_| (draw(), draw())).collect();
        for len in [SHORT_BYTES_MAX, SHORT_BYTES_MAX + 1, 255, 256] {
            pairs.push((vec![0; len], vec![0; len + 1]));
            pairs.push((vec![0; len], vec![0; len]));
        }
        for (a, b) in pairs {
            let (x, y) = (Key::from(a.as_slice()), Key::from(b.as_slice()));
            assert_eq!(*x, *a);
            assert_eq!(x.cmp(&y), a.cmp(&b), "{a:?} and {b:?}");
            assert_eq!(x == y, a == b, "{a:?} and {b:?}");
            assert_eq!(hasher.hash_one(&x), hasher.hash_one(a.as_slice()), "{a:?}");
        }
    }
}
