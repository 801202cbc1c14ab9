//! What must hold of nodes: nothing that is wanted is ended, nothing runs twice, nothing is left.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_model::agent::Desired;
use holdfast_model::resource::InstanceState;
use holdfast_model::{EventPayload, InstanceId, Revision};
use holdfast_store::{Store, Views};

use crate::host::describe;
use crate::machine_room::{By, Happening, Stage};
use crate::node_host::NodeHost;
use crate::node_link;

/// Something that an agent did, and the newest revision by which it may be right.
struct Deed {
    node: usize,
    instance: InstanceId,
    at_ms: u64,
    revision: Revision,
}

/// What was seen so far.
#[derive(Default)]
pub(crate) struct NodeWatch {
    /// Ends of VMMs that were well.
    ends: Vec<Deed>,
    /// Starts, by what their agents had known for a while.
    starts: Vec<Deed>,
    begun: u64,
    /// By node, what its agent knew at which time.
    known: BTreeMap<usize, Vec<(u64, Revision)>>,
}

/// How long an agent may take from what it knows to what it does, in milliseconds: it stores what it begins first.
const ACTS_WITHIN_MS: u64 = 20;

impl NodeWatch {
    /// VMMs that were started.
    pub(crate) fn begun(&self) -> u64 {
        self.begun
    }

    /// Looks at what happened on a node. `newest` is the newest revision that any member has applied.
    pub(crate) fn see(
        &mut self,
        now_ms: u64,
        node: &NodeHost,
        newest: Revision,
        happenings: &[Happening],
    ) -> Result<(), String> {
        let known = self.known.entry(node.number).or_default();
        if let Some(view) = &node.known
            && known.last().is_none_or(|(_, revision)| *revision != view.stamp.revision)
        {
            let revision = view.stamp.revision;
            if let Some((_, before)) = known.last().filter(|(_, before)| *before > revision) {
                return Err(format!(
                    "I6: node {} knew revision {before} and knows {revision} now",
                    node.number
                ));
            }
            known.push((now_ms, revision));
        }
        for happening in happenings {
            match *happening {
                Happening::Starting(instance) => {
                    let for_a_while = known.iter().rev().find(|(at, _)| at + ACTS_WITHIN_MS <= now_ms);
                    let revision = for_a_while.map_or(Revision(0), |(_, revision)| *revision);
                    self.starts.push(Deed { node: node.number, instance, at_ms: now_ms, revision });
                }
                Happening::Began(..) => self.begun += 1,
                Happening::Ended(_, instance, By::Agent(stage)) if stage < Stage::Sick => {
                    self.ends.push(Deed { node: node.number, instance, at_ms: now_ms, revision: newest });
                }
                Happening::Ended(..) => {}
            }
        }
        Ok(())
    }

    /// At most one VMM of an instance runs, anywhere.
    pub(crate) fn see_all(nodes: &[NodeHost]) -> Result<(), String> {
        let mut running = BTreeSet::new();
        for node in nodes {
            for (pid, instance, _) in node.room().running() {
                if !running.insert(instance) {
                    return Err(format!(
                        "I7: instance {instance} runs twice, the second time on node {} as process {pid}",
                        node.number
                    ));
                }
            }
        }
        Ok(())
    }

    /// By the history: nothing was ended that was wanted, and nothing was started that was known not to be.
    pub(crate) fn judge(&self, store: &Store) -> Result<(), String> {
        let unwanted = unwanted(store)?;
        for Deed { node, instance, at_ms, revision } in &self.ends {
            if unwanted.get(instance).is_none_or(|since| since > revision) {
                return Err(format!(
                    "I5: at {at_ms} ms node {node} ended a machine of {instance} that was well and wanted at revision {revision}"
                ));
            }
        }
        for Deed { node, instance, at_ms, revision } in &self.starts {
            if unwanted.get(instance).is_some_and(|since| since <= revision) {
                return Err(format!(
                    "I6: at {at_ms} ms node {node} started {instance}, which it knew at revision {revision} was not wanted"
                ));
            }
        }
        Ok(())
    }
}

/// Since which revision each instance is not to run any more. None is wanted again.
fn unwanted(store: &Store) -> Result<BTreeMap<InstanceId, Revision>, String> {
    let view = store.view().map_err(|e| describe(&e))?;
    let mut unwanted = BTreeMap::new();
    let mut last = Revision(0);
    while last < view.revision() {
        let page = view.events(last, 500, None).map_err(|e| describe(&e))?;
        let Some(newest) = page.events.last().map(|event| event.revision) else { break };
        for event in page.events {
            if let EventPayload::InstanceStateChanged { instance, state, .. } = event.payload
                && matches!(state, InstanceState::Draining | InstanceState::Stopped | InstanceState::Failed)
            {
                unwanted.entry(instance).or_insert(event.revision);
            }
        }
        last = newest;
    }
    Ok(unwanted)
}

/// What keeps a node from being as a member's state says; `None` when it is: all that is wanted serves and is known to, and
/// nothing else is there.
pub(crate) fn unsettled(node: &NodeHost, store: &Store) -> Result<Option<String>, String> {
    let Some(wanted) = node_link::derive(store, node.node, &None)? else { return Ok(None) };
    if let Some(leaving) = wanted.items.values().find(|item| item.desired != Desired::Run) {
        return Ok(Some(format!("{} has not ended", leaving.id)));
    }
    let view = store.view().map_err(|e| describe(&e))?;
    for id in wanted.items.keys() {
        let known = view.instance(*id).map_err(|e| describe(&e))?;
        if known.is_none_or(|instance| instance.state != InstanceState::Ready) {
            return Ok(Some(format!("{id} is not known to be ready")));
        }
    }
    let ids: BTreeSet<InstanceId> = wanted.items.keys().copied().collect();
    let room = node.room();
    let serving = room.running().filter(|(_, _, stage)| *stage == Stage::Serving);
    let serving: BTreeSet<InstanceId> = serving.map(|(_, id, _)| id).collect();
    let settled = room.running().count() == ids.len()
        && serving == ids
        && room.taps == ids
        && room.folders == ids
        && node.is_up();
    Ok((!settled).then(|| {
        format!(
            "wanted {ids:?}, running {:?}, TAPs {:?}, folders {:?}",
            room.running().collect::<Vec<_>>(),
            room.taps,
            room.folders
        )
    }))
}
