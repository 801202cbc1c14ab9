//! Whether a node takes a new instance: what it has, less what those take that it has taken already.
//!
//! Placement counts too, but what it counts with may be old: an operator has given the node less since, or its disk has
//! filled up. Pure. Whoever was taken once stays taken: it is started again after a crash or a boot even where the node has
//! become too small meanwhile, because nothing that ran stops for a number (I5, I7).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use holdfast_model::InstanceId;
use holdfast_model::agent::{Desired, NodeInstance};
use holdfast_model::limits::{CPU_OVERCOMMIT_MILLI, VMM_OVERHEAD_MIB};
use holdfast_model::resource::Capacity;

use crate::phase::{Observed, Phase};

/// What is kept free on the disk of images, logs and machines' folders, in MiB: with less nothing new is taken.
pub const DISK_RESERVE_MIB: u64 = 512;

/// What there is for instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory and CPU, as advertised.
    pub capacity: Capacity,
    /// Free on the disk, in MiB; `None` where that is not known.
    pub disk_free_mib: Option<u64>,
}

/// What is missing for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortage {
    /// Memory, in MiB.
    Memory {
        /// With the VMM's own.
        needed: u64,
        /// What is left.
        free: u64,
    },
    /// CPU, in thousandths, overcommit included.
    Cpu {
        /// What it asks for.
        needed: u64,
        /// What is left.
        free: u64,
    },
    /// Disk, in MiB.
    Disk {
        /// What is left.
        free: u64,
    },
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory { needed, free } => {
                write!(
                    f,
                    "it needs {needed} MiB of memory with its VMM, and {free} MiB of the node's are left"
                )
            }
            Self::Cpu { needed, free } => {
                let times = CPU_OVERCOMMIT_MILLI / 1_000;
                write!(
                    f,
                    "it needs {needed} thousandths of a processor, and {free} are left, at {times} times what the node has"
                )
            }
            Self::Disk { free } => {
                write!(f, "{free} MiB are left on the node's disk, and {DISK_RESERVE_MIB} MiB are kept free")
            }
        }
    }
}

/// The new instances for which there is no room, and why. The older ones are taken first.
pub fn refused(
    desired: &BTreeMap<InstanceId, Arc<NodeInstance>>,
    observed: &BTreeMap<InstanceId, Observed>,
    room: Room,
) -> BTreeMap<InstanceId, Shortage> {
    let phase = |id| observed.get(id).map_or(Phase::Absent, |seen| seen.phase);
    let takes = |phase| !matches!(phase, Phase::Absent | Phase::Stopped | Phase::Failed { .. });
    let taken = desired.iter().filter(|(id, _)| takes(phase(*id))).map(|(_, spec)| need(spec));
    let (mut memory, mut cpu) = taken.fold((0_u64, 0_u64), |(memory, cpu), (more_memory, more_cpu)| {
        (memory.saturating_add(more_memory), cpu.saturating_add(more_cpu))
    });
    let cpu_promised = room.capacity.cpu_milli.saturating_mul(CPU_OVERCOMMIT_MILLI) / 1_000;
    let mut refused = BTreeMap::new();
    for (id, spec) in
        desired.iter().filter(|(id, spec)| spec.desired == Desired::Run && phase(*id) == Phase::Absent)
    {
        let (more_memory, more_cpu) = need(spec);
        let memory_free = room.capacity.memory_mib.saturating_sub(memory);
        let cpu_free = cpu_promised.saturating_sub(cpu);
        let shortage = if let Some(free) = room.disk_free_mib.filter(|free| *free < DISK_RESERVE_MIB) {
            Shortage::Disk { free }
        } else if more_memory > memory_free {
            Shortage::Memory { needed: more_memory, free: memory_free }
        } else if more_cpu > cpu_free {
            Shortage::Cpu { needed: more_cpu, free: cpu_free }
        } else {
            (memory, cpu) = (memory.saturating_add(more_memory), cpu.saturating_add(more_cpu));
            continue;
        };
        refused.insert(*id, shortage);
    }
    refused
}

/// Memory in MiB with the VMM's own, and CPU in thousandths.
pub(crate) fn need(spec: &NodeInstance) -> (u64, u64) {
    (spec.resources.memory_mib.saturating_add(VMM_OVERHEAD_MIB), spec.resources.cpu_milli)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::instance;

    fn desired(count: u128) -> BTreeMap<InstanceId, Arc<NodeInstance>> {
        let one = |n| {
            let mut spec = instance(n);
            spec.resources.memory_mib = 128;
            spec.resources.cpu_milli = 1_000;
            (spec.id, Arc::new(spec))
        };
        (1..=count).map(one).collect()
    }

    fn room(memory_mib: u64, cpu_milli: u64) -> Room {
        Room { capacity: Capacity { memory_mib, cpu_milli }, disk_free_mib: Some(DISK_RESERVE_MIB) }
    }

    fn at(phase: Phase) -> Observed {
        Observed { phase, ..Observed::default() }
    }

    #[test]
    fn the_oldest_are_taken_as_far_as_memory_and_overcommitted_cpu_reach() {
        let (wanted, nothing) = (desired(4), BTreeMap::new());
        let last = InstanceId::from_bits(4);
        assert!(refused(&wanted, &nothing, room(4 * 192, 1_000)).is_empty());
        let short = BTreeMap::from([(last, Shortage::Memory { needed: 192, free: 191 })]);
        assert_eq!(refused(&wanted, &nothing, room(4 * 192 - 1, 1_000)), short);
        let short = BTreeMap::from([(last, Shortage::Cpu { needed: 1_000, free: 996 })]);
        assert_eq!(refused(&wanted, &nothing, room(4 * 192, 999)), short);
        // What has ended takes nothing, and what drains still does.
        let mut observed = BTreeMap::from([(InstanceId::from_bits(1), at(Phase::Stopped))]);
        assert!(refused(&wanted, &observed, room(3 * 192, 1_000)).is_empty());
        let draining = Phase::Draining { since_ms: 1, grace_ms: 1 };
        observed.insert(InstanceId::from_bits(2), at(draining));
        assert_eq!(refused(&wanted, &observed, room(2 * 192, 1_000)).len(), 1);
    }

    #[test]
    fn i05_what_was_taken_once_is_not_refused_however_small_the_node_becomes() {
        let wanted = desired(2);
        let observed: BTreeMap<_, _> =
            wanted.keys().copied().zip([Phase::Backoff { until_ms: 1 }, Phase::Preparing].map(at)).collect();
        let none = Room { capacity: Capacity::default(), disk_free_mib: Some(0) };
        assert!(refused(&wanted, &observed, none).is_empty());
        assert_eq!(refused(&desired(3), &observed, none).len(), 1);
    }

    #[test]
    fn a_full_disk_takes_nothing_new_and_one_that_is_not_known_is_not_full() {
        let (wanted, nothing) = (desired(1), BTreeMap::new());
        let full = Room { disk_free_mib: Some(DISK_RESERVE_MIB - 1), ..room(1_000, 1_000) };
        let short = Shortage::Disk { free: DISK_RESERVE_MIB - 1 };
        assert_eq!(refused(&wanted, &nothing, full).values().collect::<Vec<_>>(), [&short]);
        assert!(short.to_string().contains("511 MiB are left"));
        let unknown = Room { disk_free_mib: None, ..full };
        assert!(refused(&wanted, &nothing, unknown).is_empty());
    }
}
