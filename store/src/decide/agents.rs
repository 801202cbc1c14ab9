//! What nodes report, what the leader heard of them, and what operators do with them.

use super::admission::cluster_only;
use super::{Decision, Refusal, absent, refuse};
use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::rollout;
use crate::views::Views;
use crate::volumes;
use holdfast_model::agent::{DETAIL_BYTES_MAX, Observation, REPORT_OBSERVATIONS_MAX};
use holdfast_model::command::AgentRef;
use holdfast_model::resource::{Capacity, Instance, InstanceReason, InstanceState, Node, NodeState};
use holdfast_model::{Actor, Aggregate, Code, EnvId, EventPayload, NodeId, Output, Revision, Timestamp};
use std::collections::{BTreeMap, BTreeSet};

/// The node, if the caller may speak of it: a node speaks of itself only.
pub(super) fn node(draft: &Draft<'_>, id: NodeId) -> Result<Node, Refusal> {
    cluster_only(draft, "node")?;
    let may = match draft.context().actor {
        Actor::Node(own) => own == id,
        _ => true,
    };
    draft.node(id)?.filter(|_| may).ok_or_else(|| absent("node"))
}

/// The text, cut to what an event may hold.
fn bounded(text: &str) -> String {
    let mut end = text.len().min(DETAIL_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

pub(super) fn report_instances(draft: &mut Draft<'_>, id: NodeId, observations: &[Observation]) -> Decision {
    let node = node(draft, id)?;
    if observations.len() > REPORT_OBSERVATIONS_MAX {
        return Err(refuse(
            Code::InvalidRequest,
            format!("A report holds at most {REPORT_OBSERVATIONS_MAX} observations: send several."),
        ));
    }
    let mut envs = BTreeSet::new();
    for seen in observations {
        // A node says nothing about what is not its own, and what ended stays ended.
        let Some(instance) = draft.instance(seen.instance)? else { continue };
        if instance.node != node.id || !is_transition(&instance, seen) {
            continue;
        }
        let filing = Filing::org(Aggregate::Instance(instance.id), instance.org).of(instance.deployment);
        let payload = EventPayload::InstanceStateChanged {
            instance: instance.id,
            state: seen.state,
            // What a drained instance ended for was known before its node said so.
            reason: seen.reason.or(instance.reason.filter(|_| instance.state == InstanceState::Draining)),
            detail: seen.detail.as_deref().map(bounded),
            restarts: seen.restarts.max(instance.restarts),
        };
        draft.emit(filing, payload)?;
        if seen.state.is_final() {
            volumes::detach(draft, &instance)?;
        }
        envs.insert(instance.env);
    }
    advance_all(draft, envs)?;
    Ok(Output::None)
}

/// Whether what was seen changes an instance. Draining is the control plane's word: only its end is the node's.
fn is_transition(instance: &Instance, seen: &Observation) -> bool {
    use InstanceState::{Booting, Draining, Failed, Ready, Stopped};
    match (instance.state, seen.state) {
        (Stopped | Failed, _) | (_, Draining) | (Draining, Booting | Ready) => false,
        (Booting, Booting) | (Ready, Ready) => {
            seen.restarts > instance.restarts || seen.reason != instance.reason
        }
        (Booting | Ready | Draining, Stopped | Failed) | (Booting, Ready) | (Ready, Booting) => true,
    }
}

fn advance_all(draft: &mut Draft<'_>, envs: BTreeSet<EnvId>) -> Result<(), StoreError> {
    envs.into_iter().try_for_each(|env| rollout::advance(draft, env))
}

pub(super) fn report_node(draft: &mut Draft<'_>, id: NodeId, capacity: Capacity, vmm: &str) -> Decision {
    let node = node(draft, id)?;
    let vmm = bounded(vmm);
    if node.capacity != capacity || node.vmm.as_ref() != Some(&vmm) {
        let filing = Filing::cluster(Aggregate::Node(id));
        draft.emit(filing, EventPayload::NodeDescribed { node: id, capacity, vmm })?;
    }
    // Whoever waits for room need not wait for the next tick, which a new leader holds back for a while (I7).
    if capacity.memory_mib > node.capacity.memory_mib || capacity.cpu_milli > node.capacity.cpu_milli {
        super::tick::advance_unsettled(draft)?;
    }
    Ok(Output::None)
}

pub(super) fn report_silence(
    draft: &mut Draft<'_>,
    silent: &BTreeMap<NodeId, Timestamp>,
    back: &BTreeSet<NodeId>,
) -> Decision {
    let mut changed = BTreeSet::new();
    for (id, since) in silent {
        let Some(node) = draft.node(*id)?.filter(|n| n.silent_since.is_none()) else { continue };
        // A draining node stays draining: it must not come back as one that takes instances.
        let state = if node.state == NodeState::Active { NodeState::Unreachable } else { node.state };
        change_node(draft, *id, state, Some(*since))?;
        changed.insert(*id);
    }
    for id in back.iter().filter(|id| !silent.contains_key(id)) {
        let Some(node) = draft.node(*id)?.filter(|n| n.silent_since.is_some()) else { continue };
        let state = if node.state == NodeState::Unreachable { NodeState::Active } else { node.state };
        change_node(draft, *id, state, None)?;
        changed.insert(*id);
    }
    advance_bound(draft, &changed)?;
    Ok(Output::None)
}

/// Has the deployments say whether nodes that they are bound to by a volume can be reached.
fn advance_bound(draft: &mut Draft<'_>, nodes: &BTreeSet<NodeId>) -> Result<(), StoreError> {
    if !draft.has_volumes()? {
        return Ok(());
    }
    let mut envs = BTreeSet::new();
    for node in nodes {
        for instance in draft.node_instances_live(*node)? {
            if !envs.contains(&instance.env) && volumes::has_any(draft, &instance)? {
                envs.insert(instance.env);
            }
        }
    }
    advance_all(draft, envs)
}

fn change_node(
    draft: &mut Draft<'_>,
    id: NodeId,
    state: NodeState,
    silent_since: Option<Timestamp>,
) -> Result<(), StoreError> {
    let filing = Filing::cluster(Aggregate::Node(id));
    draft.emit(filing, EventPayload::NodeStateChanged { node: id, state, silent_since })
}

pub(super) fn drain(draft: &mut Draft<'_>, id: NodeId) -> Decision {
    let node = node(draft, id)?;
    match node.state {
        NodeState::Draining => return Ok(Output::None),
        NodeState::Active | NodeState::Unreachable | NodeState::Cordoned => {}
        NodeState::Quarantined | NodeState::Disabled => {
            return Err(refuse(
                Code::FailedPrecondition,
                "The node is out of use already: there is nothing to drain.",
            ));
        }
    }
    change_node(draft, id, NodeState::Draining, node.silent_since)?;
    let envs = draft.node_instances_live(id)?.into_iter().map(|i| i.env).collect();
    advance_all(draft, envs)?;
    Ok(Output::None)
}

pub(super) fn activate(draft: &mut Draft<'_>, id: NodeId) -> Decision {
    let node = node(draft, id)?;
    match node.state {
        NodeState::Active | NodeState::Unreachable => return Ok(Output::None),
        NodeState::Draining | NodeState::Cordoned => {}
        NodeState::Quarantined | NodeState::Disabled => {
            return Err(refuse(
                Code::FailedPrecondition,
                "The node is cut off: enrol it anew under another name.",
            ));
        }
    }
    let state = if node.silent_since.is_some() { NodeState::Unreachable } else { NodeState::Active };
    change_node(draft, id, state, node.silent_since)?;
    let envs = draft.node_instances_live(id)?.into_iter().map(|i| i.env).collect();
    advance_all(draft, envs)?;
    super::tick::advance_unsettled(draft)?;
    Ok(Output::None)
}

pub(super) fn cordon(draft: &mut Draft<'_>, id: NodeId) -> Decision {
    let node = node(draft, id)?;
    match node.state {
        NodeState::Cordoned => return Ok(Output::None),
        NodeState::Active | NodeState::Unreachable => {}
        NodeState::Draining => {
            return Err(refuse(
                Code::FailedPrecondition,
                "The node drains, and takes no instances already; activate it first to keep those that it has.",
            ));
        }
        NodeState::Quarantined | NodeState::Disabled => {
            return Err(refuse(Code::FailedPrecondition, "The node is out of use already."));
        }
    }
    change_node(draft, id, NodeState::Cordoned, node.silent_since)?;
    Ok(Output::None)
}

/// Nothing that a quarantined node says counts, so its instances have failed from here on, whatever they do: routes leave
/// them at once, and others take their place without waiting for them.
pub(super) fn quarantine(draft: &mut Draft<'_>, id: NodeId) -> Decision {
    let node = node(draft, id)?;
    if node.state == NodeState::Quarantined {
        return Ok(Output::None);
    }
    // Nobody waits to hear from it any more.
    change_node(draft, id, NodeState::Quarantined, None)?;
    let mut envs = BTreeSet::new();
    for instance in draft.node_instances_live(id)? {
        rollout::fail_instance(draft, &instance, InstanceReason::NodeQuarantined)?;
        envs.insert(instance.env);
    }
    advance_all(draft, envs)?;
    Ok(Output::None)
}

pub(super) fn confirm_removals(draft: &mut Draft<'_>, agent: AgentRef, through: Revision) -> Decision {
    cluster_only(draft, "agent")?;
    let (aggregate, confirmed) = match agent {
        AgentRef::Node(id) => {
            (Aggregate::Node(id), draft.node(id)?.ok_or_else(|| absent("node"))?.confirmed_through)
        }
        AgentRef::Edge(id) => {
            (Aggregate::Edge(id), draft.edge(id)?.ok_or_else(|| absent("edge"))?.confirmed_through)
        }
    };
    if through > draft.revision() {
        return Err(refuse(
            Code::InvalidRequest,
            format!("Revision {through} has not happened yet: confirm what the agent reports as held."),
        ));
    }
    if through > confirmed {
        draft.emit(Filing::cluster(aggregate), EventPayload::RemovalsConfirmed { agent, through })?;
    }
    Ok(Output::None)
}
