//! Which node takes an instance: a pure function of the nodes, in integers, the same on every member (I1).

use crate::views::NodeLoad;
use holdfast_model::limits::{CPU_OVERCOMMIT_MILLI, VMM_OVERHEAD_MIB};
use holdfast_model::resource::{Node, Unschedulable};
use std::cmp::Reverse;

/// A node, as placement sees it.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// The node.
    pub(crate) node: Node,
    /// What its instances take.
    pub(crate) load: NodeLoad,
    /// Instances of the same env and process on it.
    pub(crate) same_process: u64,
    /// Instances of the same org on it.
    pub(crate) same_org: u64,
    /// Instances of the same env that failed on it lately.
    pub(crate) failures: u64,
}

/// What an instance needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Need {
    /// Guest memory in MiB, without the VMM's own.
    pub(crate) memory_mib: u64,
    /// CPU in thousandths.
    pub(crate) cpu_milli: u64,
}

impl Candidate {
    fn has_memory(&self, need: Need) -> bool {
        let memory = self.load.memory_mib.saturating_add(need.memory_mib).saturating_add(VMM_OVERHEAD_MIB);
        memory <= self.node.capacity.memory_mib
    }

    fn takes(&self, need: Need) -> bool {
        let cpu = self.load.cpu_milli.saturating_add(need.cpu_milli);
        let promised = u128::from(self.node.capacity.cpu_milli) * u128::from(CPU_OVERCOMMIT_MILLI) / 1_000;
        self.has_memory(need) && u128::from(cpu) <= promised
    }

    /// Free memory in thousandths of what the node has.
    fn free_milli(&self) -> u128 {
        let has = u128::from(self.node.capacity.memory_mib);
        let free = has.saturating_sub(u128::from(self.load.memory_mib));
        (free * 1_000).checked_div(has).unwrap_or(0)
    }
}

/// The index of the node that takes the instance: the one with the fewest of the same process, then the fewest recent
/// failures, the fewest of the same org, the most free memory, and the least id.
pub(crate) fn choose(candidates: &[Candidate], need: Need) -> Result<usize, Unschedulable> {
    if !candidates.iter().any(|c| c.node.takes_instances()) {
        return Err(Unschedulable::NoNodesActive);
    }
    let fitting = candidates.iter().enumerate().filter(|(_, c)| c.node.takes_instances() && c.takes(need));
    fitting
        .min_by_key(|(_, c)| (c.same_process, c.failures, c.same_org, Reverse(c.free_milli()), c.node.id))
        .map(|(index, _)| index)
        .ok_or_else(|| {
            let has_memory = candidates.iter().any(|c| c.node.takes_instances() && c.has_memory(need));
            if has_memory { Unschedulable::NoCapacityCpu } else { Unschedulable::NoCapacityMemory }
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::node_prefix::ClusterPrefix;
    use holdfast_model::resource::Capacity;
    use holdfast_model::resource::NodeState;
    use holdfast_model::{NodeId, Revision, Timestamp};

    fn candidate(id: u128, memory_mib: u64, used_mib: u64) -> Candidate {
        Candidate {
            node: Node {
                id: NodeId::from_bits(id),
                name: "n".parse().unwrap(),
                state: NodeState::Active,
                capacity: Capacity { memory_mib, cpu_milli: 1_000 },
                prefix: ClusterPrefix::from_entropy(1).node(1),
                addresses_given: 0,
                vmm: None,
                confirmed_through: Revision(0),
                silent_since: None,
                version: 1,
                created_at: Timestamp(0),
            },
            load: NodeLoad { instances: 0, memory_mib: used_mib, cpu_milli: 0 },
            same_process: 0,
            same_org: 0,
            failures: 0,
        }
    }

    const NEED: Need = Need { memory_mib: 128, cpu_milli: 1_000 };

    #[test]
    fn memory_counts_with_the_vmms_own_and_cpu_with_its_overcommit() {
        assert_eq!(choose(&[candidate(1, 192, 0)], NEED), Ok(0));
        assert_eq!(choose(&[candidate(1, 191, 0)], NEED), Err(Unschedulable::NoCapacityMemory));
        let mut busy = candidate(1, 4_096, 0);
        busy.load.cpu_milli = 3_000;
        assert_eq!(choose(std::slice::from_ref(&busy), NEED), Ok(0));
        busy.load.cpu_milli = 3_001;
        assert_eq!(choose(&[busy.clone()], NEED), Err(Unschedulable::NoCapacityCpu));
        // What is missing where there is nothing of either is memory.
        busy.load.memory_mib = 4_096;
        assert_eq!(choose(&[busy], NEED), Err(Unschedulable::NoCapacityMemory));
    }

    #[test]
    fn only_active_nodes_that_are_heard_from_take_instances() {
        use NodeState::{Cordoned, Disabled, Draining, Quarantined, Unreachable};
        for state in [Draining, Quarantined, Disabled, Unreachable, Cordoned] {
            let mut node = candidate(1, 4_096, 0);
            node.node.state = state;
            assert_eq!(choose(&[node], NEED), Err(Unschedulable::NoNodesActive));
        }
        let mut silent = candidate(1, 4_096, 0);
        silent.node.silent_since = Some(Timestamp(1));
        assert_eq!(choose(&[silent], NEED), Err(Unschedulable::NoNodesActive));
        assert_eq!(choose(&[], NEED), Err(Unschedulable::NoNodesActive));
    }

    #[test]
    fn it_spreads_then_avoids_failures_then_orgs_then_full_nodes_and_breaks_ties_by_id() {
        let mut nodes = vec![candidate(2, 4_096, 0), candidate(1, 4_096, 0)];
        assert_eq!(choose(&nodes, NEED), Ok(1), "tie by id");
        nodes[1].load.memory_mib = 1_024;
        assert_eq!(choose(&nodes, NEED), Ok(0), "free share");
        nodes[0].same_org = 1;
        assert_eq!(choose(&nodes, NEED), Ok(1), "fewest of the org");
        nodes[1].failures = 1;
        assert_eq!(choose(&nodes, NEED), Ok(0), "recent failures");
        nodes[0].same_process = 1;
        assert_eq!(choose(&nodes, NEED), Ok(1), "spread");
    }
}
