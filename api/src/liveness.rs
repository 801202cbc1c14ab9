//! When a silent node counts as lost (I7). A pure function of what was heard and when: the caller brings the time.
//!
//! Two rules keep a returning control plane from doing harm. Nobody is judged before the judge itself has been
//! listening, as leader, for a whole window. And when more than a set share of nodes is silent at once, the fault is
//! taken to be ours: nothing is judged until fewer are silent.

use holdfast_model::limits::{SILENT_NODES_PERCENT_MAX, UNREACHABLE_MS};
use holdfast_model::{NodeId, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// A node as the judge needs to see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Which.
    pub node: NodeId,
    /// When it was last heard of by any member; `None` if not in this leader's time.
    pub heard_at: Option<Timestamp>,
    /// Whether the views hold it for silent already, whatever else it is: a draining node stays draining.
    pub unreachable: bool,
}

/// What the judge says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Nodes that are newly silent, and since when.
    pub silent: BTreeMap<NodeId, Timestamp>,
    /// Nodes that were unreachable and are heard again.
    pub back: BTreeSet<NodeId>,
    /// So many are silent that we suspect ourselves: no one is judged.
    pub suspects_itself: bool,
}

/// Judges every node, at `now`, by a leader that has been listening since `listening_since`.
pub fn judge(nodes: &[Watched], listening_since: Timestamp, now: Timestamp) -> Verdict {
    let mut verdict = Verdict::default();
    let listened_long_enough = now.since(listening_since) >= UNREACHABLE_MS;
    let mut silent_count = 0u64;
    for watched in nodes {
        let last = watched.heard_at.unwrap_or(listening_since).max(listening_since);
        let silent = now.since(last) >= UNREACHABLE_MS;
        if silent {
            silent_count += 1;
            if listened_long_enough && !watched.unreachable {
                verdict.silent.insert(watched.node, last);
            }
        } else if watched.unreachable && watched.heard_at.is_some_and(|at| now.since(at) < UNREACHABLE_MS) {
            verdict.back.insert(watched.node);
        }
    }
    // One node of one or two is not a share that says anything about us.
    let total = nodes.len() as u64;
    if total > 2 && silent_count * 100 > total * SILENT_NODES_PERCENT_MAX {
        verdict.suspects_itself = true;
        verdict.silent.clear();
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node(n: u128, heard: Option<u64>, unreachable: bool) -> Watched {
        Watched { node: NodeId::from_bits(n), heard_at: heard.map(Timestamp), unreachable }
    }

    const LEADER_AT: Timestamp = Timestamp(1_000_000);

    #[test]
    fn i07_a_new_leader_marks_no_node_lost_before_a_whole_window() {
        let nodes = [node(1, None, false), node(2, Some(900_000), false), node(3, Some(1_000_000), false)];
        let just_before = LEADER_AT.plus_ms(UNREACHABLE_MS - 1);
        assert_eq!(judge(&nodes, LEADER_AT, just_before), Verdict::default());
    }

    #[test]
    fn i07_one_silent_node_of_three_is_lost_after_the_window() {
        let now = LEADER_AT.plus_ms(UNREACHABLE_MS);
        let nodes = [node(1, None, false), node(2, Some(now.0), false), node(3, Some(now.0 - 1), false)];
        let verdict = judge(&nodes, LEADER_AT, now);
        assert_eq!(verdict.silent, BTreeMap::from([(NodeId::from_bits(1), LEADER_AT)]));
        assert!(!verdict.suspects_itself);
    }

    #[test]
    fn i07_when_most_nodes_are_silent_the_control_plane_suspects_itself() {
        let now = LEADER_AT.plus_ms(10 * UNREACHABLE_MS);
        let nodes = [node(1, None, false), node(2, None, false), node(3, Some(now.0), true)];
        let verdict = judge(&nodes, LEADER_AT, now);
        assert!(verdict.suspects_itself && verdict.silent.is_empty());
        assert_eq!(verdict.back, BTreeSet::from([NodeId::from_bits(3)]));
    }

    #[test]
    fn a_node_is_back_only_when_it_was_heard() {
        let nodes = [node(1, None, true)];
        assert!(judge(&nodes, LEADER_AT, LEADER_AT.plus_ms(1)).back.is_empty());
    }

    proptest! {
        #[test]
        fn i07_never_more_than_the_share_is_judged_lost(heard in proptest::collection::vec(0u64..200_000, 3..40)) {
            let now = LEADER_AT.plus_ms(100_000);
            let nodes: Vec<_> = heard.iter().enumerate()
                .map(|(n, h)| node(n as u128, Some(LEADER_AT.0 + h), false)).collect();
            let verdict = judge(&nodes, LEADER_AT, now);
            prop_assert!(verdict.silent.len() as u64 * 100 <= nodes.len() as u64 * SILENT_NODES_PERCENT_MAX);
        }
    }
}
