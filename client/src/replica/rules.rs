//! The rules that decide what a frame may do to a replica. Pure: no disk, no clock.
//!
//! I6 is [`check_stamp`] and the checks of deltas and heartbeats; I7 is [`Unconfirmed::of`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use holdfast_model::agent::{FRAME_ITEMS_MAX, Followed, Held, Stamp};
use holdfast_model::limits::{REMOVED_ITEMS_FREE, REMOVED_ITEMS_PERCENT_MAX};
use holdfast_model::{ClusterId, Incarnation, Revision};

use super::{ITEMS_MAX, Items, View};

/// Why a frame was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The stream is of another cluster.
    #[error(
        "The stream is of cluster {offered}, and this agent belongs to {own}; check the endpoints that it was given."
    )]
    ForeignCluster {
        /// The agent's cluster.
        own: ClusterId,
        /// The stream's.
        offered: ClusterId,
    },
    /// The incarnation is older, or newer and not handed over.
    #[error(
        "The stream is of incarnation {offered} and this agent follows {known}; a restored cluster must first hand its agents over."
    )]
    Incarnation {
        /// The agent's incarnation.
        known: Incarnation,
        /// The stream's.
        offered: Incarnation,
    },
    /// The state is older than what the agent has.
    #[error(
        "The stream offers revision {offered}, which is behind revision {known} that this agent has; another member will be tried."
    )]
    Stale {
        /// The agent's revision.
        known: Revision,
        /// The stream's.
        offered: Revision,
    },
    /// A delta builds on a state that the agent does not have.
    #[error("A delta builds on revision {from} and this agent stands at {known}; the stream begins anew.")]
    Gap {
        /// Where the agent stands.
        known: Revision,
        /// What the delta builds on.
        from: Revision,
    },
    /// A frame that cannot come now.
    #[error("A frame came out of order; the stream begins anew.")]
    OutOfOrder,
    /// More items or bytes than a replica holds.
    #[error("The state is larger than this agent can hold ({ITEMS_MAX} items); it keeps what it has.")]
    TooLarge,
    /// A frame contradicts itself.
    #[error("A frame contradicts itself: {what}; the stream begins anew.")]
    Malformed {
        /// How.
        what: &'static str,
    },
}

/// Whether a snapshot with this stamp may be looked at.
pub(super) fn check_stamp(
    offered: Stamp,
    cluster: ClusterId,
    known: Option<Stamp>,
    handed_over: Option<Incarnation>,
) -> Result<(), Refusal> {
    if offered.cluster != cluster {
        return Err(Refusal::ForeignCluster { own: cluster, offered: offered.cluster });
    }
    let Some(known) = known else { return Ok(()) };
    if offered.incarnation == known.incarnation {
        #[cfg(feature = "planted-bugs")]
        if crate::planted::is(crate::planted::Bug::ObeyOlderRevision) {
            return Ok(());
        }
        if offered.revision < known.revision {
            return Err(Refusal::Stale { known: known.revision, offered: offered.revision });
        }
        return Ok(());
    }
    if offered.incarnation > known.incarnation && handed_over == Some(offered.incarnation) {
        return Ok(());
    }
    Err(Refusal::Incarnation { known: known.incarnation, offered: offered.incarnation })
}

/// A complete state that a stream has led to and that is not yet decided on.
#[derive(Debug)]
pub(super) struct Candidate<T: Followed> {
    pub(super) stamp: Stamp,
    pub(super) items: Items<T>,
    /// Removals up to here are confirmed.
    pub(super) confirmed_through: Revision,
}

impl<T: Followed> Clone for Candidate<T> {
    fn clone(&self) -> Candidate<T> {
        Candidate { items: Arc::clone(&self.items), ..*self }
    }
}

impl<T: Followed> Candidate<T> {
    /// What is known already: nothing is being removed.
    pub(super) fn settled(view: &View<T>) -> Candidate<T> {
        Candidate { stamp: view.stamp, items: Arc::clone(&view.items), confirmed_through: Revision(0) }
    }

    /// This state after a delta.
    pub(super) fn with_delta(
        self,
        from: Revision,
        stamp: Stamp,
        upserts: Vec<T>,
        removes: Vec<T::Key>,
        confirmed_through: Revision,
    ) -> Result<Candidate<T>, Refusal> {
        self.check_successor(stamp)?;
        if from != self.stamp.revision {
            return Err(match stamp.revision <= self.stamp.revision {
                true => Refusal::Stale { known: self.stamp.revision, offered: stamp.revision },
                false => Refusal::Gap { known: self.stamp.revision, from },
            });
        }
        if stamp.revision <= from {
            return Err(Refusal::Malformed { what: "a delta leads nowhere" });
        }
        if upserts.len().saturating_add(removes.len()) > FRAME_ITEMS_MAX {
            return Err(Refusal::TooLarge);
        }
        let mut items: BTreeMap<T::Key, Arc<T>> = (*self.items).clone();
        for key in &removes {
            items.remove(key);
        }
        for item in upserts {
            items.insert(item.key(), Arc::new(item));
        }
        if items.len() as u64 > ITEMS_MAX {
            return Err(Refusal::TooLarge);
        }
        let confirmed_through = confirmed_through.max(self.confirmed_through);
        Ok(Candidate { stamp, items: Arc::new(items), confirmed_through })
    }

    /// This state after a heartbeat.
    pub(super) fn with_heartbeat(
        self,
        stamp: Stamp,
        confirmed_through: Revision,
    ) -> Result<Candidate<T>, Refusal> {
        self.check_successor(stamp)?;
        if stamp.revision < self.stamp.revision {
            return Err(Refusal::Stale { known: self.stamp.revision, offered: stamp.revision });
        }
        Ok(Candidate { stamp, confirmed_through: confirmed_through.max(self.confirmed_through), ..self })
    }

    fn check_successor(&self, stamp: Stamp) -> Result<(), Refusal> {
        if stamp.cluster != self.stamp.cluster {
            return Err(Refusal::ForeignCluster { own: self.stamp.cluster, offered: stamp.cluster });
        }
        if stamp.incarnation != self.stamp.incarnation {
            let known = self.stamp.incarnation;
            return Err(Refusal::Incarnation { known, offered: stamp.incarnation });
        }
        Ok(())
    }
}

/// Items that the cluster says are gone and that wait for a confirmation (I7).
///
/// It is remembered over lost streams, so that a confirmation of what was held also counts for a later state from
/// another member, as long as that state takes away nothing more.
#[derive(Debug)]
pub(super) struct Unconfirmed<T: Followed> {
    /// The state that first took away all of `keys`.
    stamp: Stamp,
    keys: BTreeSet<T::Key>,
    /// Items that the agent has.
    of: u64,
}

impl<T: Followed> Unconfirmed<T> {
    /// What must wait of a state that takes away `removes` of `known` items, given what waits already.
    pub(super) fn of(
        candidate: &Candidate<T>,
        removes: &[T::Key],
        known: u64,
        waiting: Option<&Unconfirmed<T>>,
    ) -> Option<Unconfirmed<T>> {
        let count = removes.len() as u64;
        let few = count <= REMOVED_ITEMS_FREE
            || count.saturating_mul(100) <= known.saturating_mul(REMOVED_ITEMS_PERCENT_MAX);
        if few {
            return None;
        }
        let stamp = waiting
            .filter(|waiting| waiting.stamp.incarnation == candidate.stamp.incarnation)
            .filter(|waiting| removes.iter().all(|key| waiting.keys.contains(key)))
            .map_or(candidate.stamp, |waiting| waiting.stamp);
        let waits = candidate.confirmed_through < stamp.revision;
        waits.then(|| Unconfirmed { stamp, keys: removes.iter().copied().collect(), of: known })
    }

    /// As it is reported.
    pub(super) fn held(&self) -> Held {
        Held { revision: self.stamp.revision, removes: self.keys.len() as u64, of: self.of }
    }
}

/// What has to change on disk to get from one state to another.
#[derive(Debug)]
pub(super) struct Changes<T: Followed> {
    pub(super) upserts: Vec<Arc<T>>,
    pub(super) removes: Vec<T::Key>,
}

impl<T: Followed> Changes<T> {
    pub(super) fn between(old: Option<&Items<T>>, new: &Items<T>) -> Changes<T> {
        let Some(old) = old else {
            return Changes { upserts: new.values().cloned().collect(), removes: Vec::new() };
        };
        if Arc::ptr_eq(old, new) {
            return Changes { upserts: Vec::new(), removes: Vec::new() };
        }
        let changed = |(key, item): &(&T::Key, &Arc<T>)| {
            old.get(key).is_none_or(|before| !Arc::ptr_eq(before, item) && before != *item)
        };
        Changes {
            upserts: new.iter().filter(changed).map(|(_, item)| Arc::clone(item)).collect(),
            removes: old.keys().filter(|key| !new.contains_key(key)).copied().collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.upserts.is_empty() && self.removes.is_empty()
    }
}
