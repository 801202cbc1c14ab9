//! Which of the cache's things go when it has too many bytes: a pure choice, so that it can be tried on any cache.
//!
//! Blobs go before roots: a blob saves part of a later pull, a root is what an instance starts from without any
//! network (I5). Of each, those go first that were used longest ago. What is in use is never chosen.

use std::time::SystemTime;

/// What a thing in the cache is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// A blob, or the beginning of one.
    Blob,
    /// A root file system.
    Root,
}

/// A thing in the cache, as far as the choice depends on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Candidate {
    pub(crate) kind: Kind,
    pub(crate) bytes: u64,
    pub(crate) used_at: SystemTime,
    pub(crate) in_use: bool,
}

/// Places, in their order, of those that are to go so that at most `bytes_max` remain. If what is in use is more than
/// that, everything else goes.
pub(crate) fn choose(cached: &[Candidate], bytes_max: u64) -> Vec<usize> {
    let mut left: u64 = cached.iter().map(|one| one.bytes).sum();
    let mut order: Vec<usize> = (0..cached.len()).filter(|at| !cached[*at].in_use).collect();
    order.sort_by_key(|at| (cached[*at].kind, cached[*at].used_at));
    let mut chosen = Vec::new();
    for at in order {
        if left <= bytes_max {
            break;
        }
        left -= cached[at].bytes;
        chosen.push(at);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn candidates() -> impl Strategy<Value = Vec<Candidate>> {
        let one = (any::<bool>(), 0..1_000_u64, 0..20_u64, any::<bool>());
        let made = one.prop_map(|(root, bytes, used_s, in_use)| Candidate {
            kind: if root { Kind::Root } else { Kind::Blob },
            bytes,
            used_at: SystemTime::UNIX_EPOCH + Duration::from_secs(used_s),
            in_use,
        });
        proptest::collection::vec(made, 0..40)
    }

    proptest! {
        #[test]
        fn i05_the_choice_spares_what_is_in_use_and_takes_no_more_than_it_must(
            cached in candidates(),
            bytes_max in 0..20_000_u64,
        ) {
            let chosen = choose(&cached, bytes_max);
            let gone: BTreeSet<usize> = chosen.iter().copied().collect();
            prop_assert_eq!(gone.len(), chosen.len(), "each at most once");
            prop_assert!(gone.iter().all(|at| !cached[*at].in_use));
            let kept = || (0..cached.len()).filter(|at| !gone.contains(at));
            let bytes: u64 = kept().map(|at| cached[at].bytes).sum();
            prop_assert!(bytes <= bytes_max || kept().all(|at| cached[at].in_use), "within the bound if that can be");
            // Without the last one there would be too many still.
            if let Some(last) = chosen.last() {
                prop_assert!(bytes + cached[*last].bytes > bytes_max);
            }
            for (stays, goes) in kept().flat_map(|stays| gone.iter().map(move |goes| (stays, *goes))) {
                let (stays, goes) = (cached[stays], cached[goes]);
                prop_assert!(
                    stays.in_use || (goes.kind, goes.used_at) <= (stays.kind, stays.used_at),
                    "{goes:?} goes before {stays:?}"
                );
            }
        }
    }
}
