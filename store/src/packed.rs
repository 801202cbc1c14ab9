//! Bytes that mostly are few: kept where they are named, because that is where searches compare them, instead of in memory of
//! their own.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

/// A row's key as memory keeps it: ids, digests with their ends, and names as people give them are short.
pub(crate) type Key = Packed<46>;

/// Some bytes, equal to, ordered and hashed as a slice of them is. Up to `SHORT` of them, which is at most 255, take no
/// memory elsewhere; with a `SHORT` of 8n + 6 none of the rest is wasted.
#[derive(Clone)]
pub(crate) enum Packed<const SHORT: usize> {
    /// How many, and the bytes. A copy costs less than counting who shares them.
    Short(u8, [u8; SHORT]),
    /// More than are short, shared by their copies.
    Long(Arc<[u8]>),
}

impl<const SHORT: usize> From<&[u8]> for Packed<SHORT> {
    fn from(bytes: &[u8]) -> Self {
        match u8::try_from(bytes.len()) {
            Ok(length) if bytes.len() <= SHORT => {
                let mut short = [0; SHORT];
                short[..bytes.len()].copy_from_slice(bytes);
                Self::Short(length, short)
            }
            _ => Self::Long(bytes.into()),
        }
    }
}

impl<const SHORT: usize> Deref for Packed<SHORT> {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        match self {
            Self::Short(length, bytes) => &bytes[..usize::from(*length)],
            Self::Long(bytes) => bytes,
        }
    }
}

impl<const SHORT: usize> Borrow<[u8]> for Packed<SHORT> {
    fn borrow(&self) -> &[u8] {
        self
    }
}

impl<const SHORT: usize> PartialEq for Packed<SHORT> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl<const SHORT: usize> Eq for Packed<SHORT> {}

impl<const SHORT: usize> PartialOrd for Packed<SHORT> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<const SHORT: usize> Ord for Packed<SHORT> {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

impl<const SHORT: usize> Hash for Packed<SHORT> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl<const SHORT: usize> fmt::Debug for Packed<SHORT> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use std::hash::BuildHasher;

    #[test]
    fn packed_bytes_are_those_that_were_packed_however_many() {
        assert_eq!(size_of::<Packed<22>>(), 24);
        let hasher = std::hash::RandomState::new();
        for length in [0, 1, 21, 22, 23, 255, 256, 1_000] {
            let bytes: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let packed = Packed::<22>::from(bytes.as_slice());
            assert_eq!(*packed, bytes[..]);
            assert_eq!(matches!(packed, Packed::Short(..)), length <= 22);
            assert_eq!(hasher.hash_one(&packed), hasher.hash_one(bytes.as_slice()));
            let longer = Packed::<22>::from([&bytes[..], &[0]].concat().as_slice());
            assert!(packed < longer && packed != longer);
            assert!(longer < Packed::from([255; 30].as_slice()) || length > 255);
        }
    }

    #[test]
    fn a_key_is_found_and_ordered_as_its_bytes_whatever_its_length() {
        const SHORT: usize = 46;
        let mut rng = StdRng::seed_from_u64(1);
        let hasher = foldhash::fast::FixedState::default();
        let mut draw = || -> Vec<u8> {
            let len = rng.random_range(0..300usize) % rng.random_range(1..100usize);
            (0..len).map(|_| rng.random_range(0..2u8)).collect()
        };
        let mut pairs: Vec<_> = (0..4000).map(|_| (draw(), draw())).collect();
        for len in [SHORT, SHORT + 1, 255, 256] {
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
