//! What happens because time passed: nodes that stayed silent are given up, roll-outs and replacements go on.

use super::{Decision, exec};
use crate::error::StoreError;
use crate::overlay::Draft;
use crate::rollout;
use crate::rows::Rows;
use crate::tables::{Table, key};
use crate::views::{HOSTS_MAX, Views};
use crate::{volume_snapshots, volumes};
use holdfast_model::limits::{RESCHEDULE_MS, SILENT_NODES_PERCENT_MAX};
use holdfast_model::resource::InstanceReason;
use holdfast_model::{EnvId, Output, Timestamp};
use std::collections::BTreeSet;

/// Envs that one tick looks at.
pub(crate) const TICK_ENVS_MAX: usize = 200;
/// Instances that one tick gives up with their nodes.
pub(crate) const TICK_LOST_MAX: usize = 1_000;
/// How long the control plane suspects itself when too many nodes are silent, in milliseconds (I7).
pub(crate) const SUSPICION_MS: u64 = 1_800_000;

pub(super) fn tick(draft: &mut Draft<'_>) -> Decision {
    give_up_silent_nodes(draft)?;
    advance_unsettled(draft)?;
    exec::end_overdue(draft)?;
    volume_snapshots::request_due(draft)?;
    Ok(Output::None)
}

/// Fails the instances of nodes that have been silent for too long, unless so many are that the fault is likely here.
fn give_up_silent_nodes(draft: &mut Draft<'_>) -> Result<(), StoreError> {
    let marks = draft.scan(&key(Table::SilentNode, &[]), None, HOSTS_MAX)?;
    if marks.is_empty() {
        return Ok(());
    }
    let now = draft.context().now;
    let nodes = draft.nodes()?;
    let used = nodes.iter().filter(|n| n.is_trusted());
    let (all, silent) =
        used.fold((0u64, 0u64), |(all, silent), n| (all + 1, silent + u64::from(n.silent_since.is_some())));
    let suspects_itself = silent * 100 > all * SILENT_NODES_PERCENT_MAX;
    let patience_ms = if suspects_itself { SUSPICION_MS } else { RESCHEDULE_MS };
    let given_up = |since: Timestamp| now.since(since) >= patience_ms;
    let mut lost = 0;
    let mut envs = BTreeSet::new();
    for node in nodes.iter().filter(|n| n.silent_since.is_some_and(given_up)) {
        for instance in draft.node_instances_live(node.id)? {
            if lost >= TICK_LOST_MAX {
                break;
            }
            // Nothing could take its place elsewhere, and it may well be running.
            if volumes::has_any(draft, &instance)? {
                continue;
            }
            rollout::fail_instance(draft, &instance, InstanceReason::NodeLost)?;
            envs.insert(instance.env);
            lost += 1;
        }
    }
    envs.into_iter().try_for_each(|env| rollout::advance(draft, env))
}

/// Moves on envs whose instances are not what they should be: a bounded number, beginning at another place each time,
/// so that none waits for ever behind others that cannot move.
pub(super) fn advance_unsettled(draft: &mut Draft<'_>) -> Result<(), StoreError> {
    let marks = draft.marks_from_anywhere(Table::Unsettled, TICK_ENVS_MAX)?;
    marks.into_iter().try_for_each(|id| rollout::advance(draft, EnvId::from_bits(id)))
}
