//! How an env gets from the instances that it has to those that its deployment wants.
//!
//! [`advance`] looks at what is there and does the next steps; it holds no state of its own, so it may be called at
//! any time and as often as one likes. While every instance is healthy, a process never has fewer ready instances
//! than wanted: a new one is ready before an old one drains (surge 1, unavailable 0).

use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::placement::{Candidate, Need, choose};
use crate::secret_views::SecretViews;
use crate::settled::{SecretsOf, is_leaving, is_settled};
use crate::views::{Views, required};
use crate::volumes;
use holdfast_model::limits::{INSTANCE_START_MS_MAX, REPLACEMENTS_MAX, ROLLOUT_MS_MAX, ROLLOUT_SURGE};
use holdfast_model::resource::{
    Deployment, DeploymentCause, DeploymentFailure, DeploymentState, Env, Instance, InstanceReason,
    InstanceState, Release, Unschedulable,
};
use holdfast_model::{Aggregate, DeploymentId, EnvId, EventPayload, InstanceId, NodeId, ProcessName};
use std::collections::{BTreeMap, BTreeSet};

/// Times that one call may look again because a deployment took over from another.
const PASSES_MAX: usize = 4;
/// How long a failure makes replacements wait and placement look elsewhere, in milliseconds.
pub const FAILURE_REMEMBERED_MS: u64 = 600_000;
/// The pause before a replacement after one recent failure, in milliseconds; doubled with each further one.
pub const REPLACE_PAUSE_MS: u64 = 1_000;
/// The longest pause before a replacement, in milliseconds.
pub const REPLACE_PAUSE_MS_MAX: u64 = 300_000;

/// Does what there is to do for an env now.
pub(crate) fn advance(draft: &mut Draft<'_>, env: EnvId) -> Result<(), StoreError> {
    for _ in 0..PASSES_MAX {
        if !pass(draft, env)? {
            break;
        }
    }
    Ok(())
}

/// Begins a deployment; the one that rolls is superseded.
pub(crate) fn start(
    draft: &mut Draft<'_>,
    env: EnvId,
    release: &Release,
    cause: DeploymentCause,
    counts: BTreeMap<ProcessName, u32>,
) -> Result<DeploymentId, StoreError> {
    let env: Env = required(draft.env(env)?, "an env")?;
    if let Some(current) = env.current {
        let current = required(draft.deployment(current)?, "a deployment")?;
        if current.state == DeploymentState::Rolling {
            change_state(draft, &current, DeploymentState::Superseded, None)?;
        }
    }
    volumes::create_missing(draft, &env, release)?;
    let id = DeploymentId::from_bits(draft.fresh_id());
    let deployment = Deployment {
        id,
        env: env.id,
        app: env.app,
        org: env.org,
        number: env.deployments + 1,
        release: release.id,
        cause,
        counts,
        state: DeploymentState::Rolling,
        failure: None,
        unschedulable: None,
        replacements: BTreeMap::new(),
        created_at: draft.context().now,
        finished_at: None,
    };
    let filing = Filing::org(Aggregate::Deployment(id), env.org).of(id);
    draft.emit(filing, EventPayload::DeploymentStarted(deployment))?;
    Ok(id)
}

/// Records that an instance ended by no report of its node's.
pub(crate) fn fail_instance(
    draft: &mut Draft<'_>,
    instance: &Instance,
    reason: InstanceReason,
) -> Result<(), StoreError> {
    change_instance(draft, instance, InstanceState::Failed, reason)
}

fn change_state(
    draft: &mut Draft<'_>,
    deployment: &Deployment,
    state: DeploymentState,
    failure: Option<DeploymentFailure>,
) -> Result<(), StoreError> {
    let filing = Filing::org(Aggregate::Deployment(deployment.id), deployment.org).of(deployment.id);
    let payload = EventPayload::DeploymentStateChanged { deployment: deployment.id, state, failure };
    draft.emit(filing, payload)
}

fn change_instance(
    draft: &mut Draft<'_>,
    instance: &Instance,
    state: InstanceState,
    reason: InstanceReason,
) -> Result<(), StoreError> {
    let filing = Filing::org(Aggregate::Instance(instance.id), instance.org).of(instance.deployment);
    let payload = EventPayload::InstanceStateChanged {
        instance: instance.id,
        state,
        reason: Some(reason),
        detail: None,
        restarts: instance.restarts,
    };
    draft.emit(filing, payload)
}

/// One look at an env. True when it must be looked at again at once.
fn pass(draft: &mut Draft<'_>, env: EnvId) -> Result<bool, StoreError> {
    let Some(env) = draft.env(env)? else { return Ok(false) };
    let Some(current) = env.current else { return Ok(false) };
    expire_starts(draft, &env)?;
    let deployment = required(draft.deployment(current)?, "a deployment")?;
    if deployment.state == DeploymentState::Rolling
        && let Some(failure) = failure_of(draft, &deployment)
    {
        fail(draft, &env, &deployment, failure)?;
        return Ok(true);
    }
    let release = required(draft.release(deployment.release)?, "a release")?;
    let blocked = Roll::new(draft, &deployment, &release)?.run(draft)?;
    if blocked != deployment.unschedulable {
        let filing = Filing::org(Aggregate::Deployment(deployment.id), env.org).of(deployment.id);
        let payload = EventPayload::DeploymentBlocked { deployment: deployment.id, unschedulable: blocked };
        draft.emit(filing, payload)?;
    }
    if deployment.state == DeploymentState::Rolling && is_settled(draft, &deployment)? {
        change_state(draft, &deployment, DeploymentState::Complete, None)?;
    }
    Ok(false)
}

/// Fails instances that were never ready and have had their time, on nodes that could have told us otherwise.
fn expire_starts(draft: &mut Draft<'_>, env: &Env) -> Result<(), StoreError> {
    let now = draft.context().now;
    for instance in draft.live_instances(env.id)? {
        let waiting = instance.state == InstanceState::Booting && !instance.was_ready;
        if !waiting || now.since(instance.created_at) <= INSTANCE_START_MS_MAX {
            continue;
        }
        if is_silent(draft, &instance)? {
            continue;
        }
        if volumes::has_any(draft, &instance)? {
            // Nothing else may have its volume before its node has said that it is gone.
            change_instance(draft, &instance, InstanceState::Draining, InstanceReason::StartTimedOut)?;
        } else {
            fail_instance(draft, &instance, InstanceReason::StartTimedOut)?;
        }
    }
    Ok(())
}

/// Whether nobody hears from the node of an instance.
fn is_silent(draft: &Draft<'_>, instance: &Instance) -> Result<bool, StoreError> {
    Ok(required(draft.node(instance.node)?, "a node")?.silent_since.is_some())
}

fn failure_of(draft: &Draft<'_>, deployment: &Deployment) -> Option<DeploymentFailure> {
    if deployment.replacements.values().any(|count| *count > REPLACEMENTS_MAX) {
        return Some(DeploymentFailure::TooManyReplacements);
    }
    let age = draft.context().now.since(deployment.created_at);
    (age > ROLLOUT_MS_MAX).then_some(DeploymentFailure::TimedOut)
}

/// Ends a deployment that did not get there, and goes back to the last one that did. A failed rollback stays.
fn fail(
    draft: &mut Draft<'_>,
    env: &Env,
    deployment: &Deployment,
    failure: DeploymentFailure,
) -> Result<(), StoreError> {
    change_state(draft, deployment, DeploymentState::Failed, Some(failure))?;
    if deployment.cause == DeploymentCause::Rollback {
        return Ok(());
    }
    let Some(good) = env.last_good else { return Ok(()) };
    let good = required(draft.deployment(good)?, "a deployment")?;
    let same_secrets = draft.deployment_secrets(good.id)? == draft.deployment_secrets(deployment.id)?;
    if good.release == deployment.release && good.counts == deployment.counts && same_secrets {
        return Ok(());
    }
    let release = required(draft.release(good.release)?, "a release")?;
    start(draft, env.id, &release, DeploymentCause::Rollback, good.counts)?;
    Ok(())
}

/// An env's instances of one process that are neither final nor draining.
#[derive(Default)]
struct Fleet {
    /// Of the wanted release and secrets, on nodes that keep them; oldest first.
    new: Vec<Instance>,
    /// The others; oldest first.
    old: Vec<Instance>,
}

impl Fleet {
    fn ready(&self) -> usize {
        self.new.iter().chain(&self.old).filter(|i| i.state == InstanceState::Ready).count()
    }
}

/// What one look at an env works with.
struct Roll<'a> {
    deployment: &'a Deployment,
    release: &'a Release,
    /// The version of secrets that its instances run with; 0 for none.
    secrets: u32,
    fleets: BTreeMap<ProcessName, Fleet>,
    /// Nodes of the fleets' instances that must be left.
    leaving: BTreeSet<NodeId>,
    /// Instances of the env that failed lately, by no fault of their node.
    failed: Vec<Instance>,
}

impl<'a> Roll<'a> {
    fn new(draft: &Draft<'_>, deployment: &'a Deployment, release: &'a Release) -> Result<Self, StoreError> {
        let mut live = draft.live_instances(deployment.env)?;
        live.retain(|i| i.state != InstanceState::Draining);
        live.sort_by_key(|i| (i.created_at, i.id));
        let mut leaving = BTreeSet::new();
        for node in live.iter().map(|i| i.node).collect::<BTreeSet<_>>() {
            if draft.node(node)?.is_none_or(|node| is_leaving(node.state)) {
                leaving.insert(node);
            }
        }
        let mut secrets = SecretsOf::new(draft, deployment.id)?;
        let names = deployment.counts.keys().cloned();
        let mut fleets: BTreeMap<ProcessName, Fleet> = names.map(|n| (n, Fleet::default())).collect();
        for instance in live {
            let fleet = fleets.entry(instance.process.clone()).or_default();
            let same = instance.release == release.id && secrets.are_of(draft, &instance)?;
            let keeps = same && !leaving.contains(&instance.node);
            if keeps { fleet.new.push(instance) } else { fleet.old.push(instance) }
        }
        let now = draft.context().now;
        let mut failed = draft.ended_instances(deployment.env)?;
        failed.retain(|i| {
            now.since(i.changed_at) < FAILURE_REMEMBERED_MS
                && !i.reason.is_some_and(|why| why == InstanceReason::Replaced || why.is_of_its_node())
        });
        Ok(Self { deployment, release, secrets: secrets.wanted(), fleets, leaving, failed })
    }

    /// Does the next steps of every process; answers with what keeps an instance from being placed.
    fn run(mut self, draft: &mut Draft<'_>) -> Result<Option<Unschedulable>, StoreError> {
        let mut blocked = None;
        for (process, mut fleet) in std::mem::take(&mut self.fleets) {
            let desired = self.deployment.counts.get(&process).copied().unwrap_or(0) as usize;
            self.drain_useless(draft, &mut fleet, desired)?;
            if self.mounts(&process) {
                self.drain_old(draft, &mut fleet)?;
            } else {
                self.drain_replaced(draft, &mut fleet, desired)?;
            }
            blocked = self.place_missing(draft, &process, &mut fleet, desired)?.or(blocked);
            blocked = self.cut_off_from(draft, &process, &fleet)?.or(blocked);
        }
        Ok(blocked)
    }

    /// Old instances that do not serve, and new ones beyond the wanted number: those that do not serve, then the oldest.
    fn drain_useless(
        &self,
        draft: &mut Draft<'_>,
        fleet: &mut Fleet,
        desired: usize,
    ) -> Result<(), StoreError> {
        let (ready, useless): (Vec<_>, Vec<_>) =
            std::mem::take(&mut fleet.old).into_iter().partition(|i| i.state == InstanceState::Ready);
        fleet.old = ready;
        for instance in useless {
            self.drain(draft, &instance)?;
        }
        while fleet.new.len() > desired {
            let idle = fleet.new.iter().position(|i| i.state != InstanceState::Ready);
            let instance = fleet.new.remove(idle.unwrap_or(0));
            self.drain(draft, &instance)?;
        }
        Ok(())
    }

    /// Old instances that a ready new one stands in for, oldest first.
    fn drain_replaced(
        &self,
        draft: &mut Draft<'_>,
        fleet: &mut Fleet,
        desired: usize,
    ) -> Result<(), StoreError> {
        while !fleet.old.is_empty() && fleet.ready() > desired {
            let instance = fleet.old.remove(0);
            self.drain(draft, &instance)?;
        }
        Ok(())
    }

    /// Whether a process of the wanted release has volumes.
    fn mounts(&self, process: &ProcessName) -> bool {
        self.release.manifest.processes.get(process).is_some_and(|process| !process.mounts.is_empty())
    }

    /// Old instances of a process with volumes: only one can have them, so the old one stops before the new one starts. One
    /// whose node is silent goes on: no other could start there before that node is back.
    fn drain_old(&self, draft: &mut Draft<'_>, fleet: &mut Fleet) -> Result<(), StoreError> {
        for instance in std::mem::take(&mut fleet.old) {
            if is_silent(draft, &instance)? && !self.leaving.contains(&instance.node) {
                fleet.old.push(instance);
            } else {
                self.drain(draft, &instance)?;
            }
        }
        Ok(())
    }

    /// What to say of a process whose volumes are on a node that nobody hears from: it waits for that node.
    fn cut_off_from(
        &self,
        draft: &Draft<'_>,
        process: &ProcessName,
        fleet: &Fleet,
    ) -> Result<Option<Unschedulable>, StoreError> {
        if !self.mounts(process) {
            return Ok(None);
        }
        for instance in &fleet.new {
            if is_silent(draft, instance)? {
                return Ok(Some(Unschedulable::VolumeLocality));
            }
        }
        Ok(None)
    }

    fn drain(&self, draft: &mut Draft<'_>, instance: &Instance) -> Result<(), StoreError> {
        let leaves = self.leaving.contains(&instance.node);
        let reason = if leaves { InstanceReason::NodeDraining } else { InstanceReason::Replaced };
        change_instance(draft, instance, InstanceState::Draining, reason)
    }

    fn place_missing(
        &self,
        draft: &mut Draft<'_>,
        process: &ProcessName,
        fleet: &mut Fleet,
        desired: usize,
    ) -> Result<Option<Unschedulable>, StoreError> {
        let most = desired + ROLLOUT_SURGE as usize;
        while fleet.new.len() < desired && fleet.new.len() + fleet.old.len() < most {
            if self.must_pause(draft, process) {
                return Ok(self.deployment.unschedulable);
            }
            match self.place(draft, process)? {
                Ok(instance) => fleet.new.push(instance),
                Err(unschedulable) => return Ok(Some(unschedulable)),
            }
        }
        Ok(None)
    }

    /// Whether a replacement has to wait: after a roll-out, longer with each recent failure of the same kind.
    fn must_pause(&self, draft: &Draft<'_>, process: &ProcessName) -> bool {
        if self.deployment.state == DeploymentState::Rolling {
            return false;
        }
        let same = self.failed.iter().filter(|i| i.process == *process && i.release == self.release.id);
        let (count, last) = same.fold((0u32, None), |(n, last), i| (n + 1, last.max(Some(i.changed_at))));
        let Some(last) = last else { return false };
        let doublings = (count - 1).min(16);
        let pause = REPLACE_PAUSE_MS.saturating_mul(1 << doublings).min(REPLACE_PAUSE_MS_MAX);
        draft.context().now.since(last) < pause
    }

    fn place(
        &self,
        draft: &mut Draft<'_>,
        name: &ProcessName,
    ) -> Result<Result<Instance, Unschedulable>, StoreError> {
        let process = required(self.release.manifest.processes.get(name), "a process of a release")?;
        if !process.secrets_required.is_empty() {
            let version = draft.secret_version(self.deployment.env, self.secrets)?;
            let has = |name: &String| {
                version.as_ref().is_some_and(|v| v.secrets.keys().any(|k| k.as_str() == name))
            };
            if !process.secrets_required.iter().all(has) {
                return Ok(Err(Unschedulable::SecretsMissing));
            }
        }
        let held = match volumes::wanted(draft, self.deployment.env, process)? {
            Ok(held) => held,
            Err(unschedulable) => return Ok(Err(unschedulable)),
        };
        let need = Need { memory_mib: process.resources.memory_mib, cpu_milli: process.resources.cpu_milli };
        let mut candidates = self.candidates(draft, name)?;
        candidates.retain(|candidate| held.home.is_none_or(|home| home == candidate.node.id));
        let node = match choose(&candidates, need) {
            Ok(index) => &candidates[index].node,
            Err(_) if held.home.is_some() => return Ok(Err(Unschedulable::VolumeLocality)),
            // Members of an earlier version know one kind of room only.
            Err(Unschedulable::NoCapacityCpu) if !draft.cluster_version()?.has_cordon() => {
                return Ok(Err(Unschedulable::NoCapacityMemory));
            }
            Err(unschedulable) => return Ok(Err(unschedulable)),
        };
        let Some(number) = node.addresses_given.checked_add(1) else {
            return Ok(Err(Unschedulable::IpamExhausted));
        };
        let now = draft.context().now;
        let instance = Instance {
            id: InstanceId::from_bits(draft.fresh_id()),
            env: self.deployment.env,
            app: self.deployment.app,
            org: self.deployment.org,
            deployment: self.deployment.id,
            release: self.release.id,
            process: name.clone(),
            node: node.id,
            address: node.prefix.address(number),
            memory_mib: need.memory_mib,
            cpu_milli: need.cpu_milli,
            state: InstanceState::Booting,
            reason: None,
            detail: None,
            restarts: 0,
            was_ready: false,
            created_at: now,
            changed_at: now,
        };
        let filing = Filing::org(Aggregate::Instance(instance.id), instance.org).of(instance.deployment);
        draft.emit(filing, EventPayload::InstancePlaced(instance.clone()))?;
        volumes::attach(draft, &instance, &held.volumes)?;
        Ok(Ok(instance))
    }

    fn candidates(&self, draft: &Draft<'_>, name: &ProcessName) -> Result<Vec<Candidate>, StoreError> {
        let live = draft.live_instances(self.deployment.env)?;
        let mut same: BTreeMap<NodeId, u64> = BTreeMap::new();
        for instance in live.iter().filter(|i| i.process == *name && i.state != InstanceState::Draining) {
            *same.entry(instance.node).or_default() += 1;
        }
        let mut candidates = Vec::new();
        for node in draft.nodes()? {
            candidates.push(Candidate {
                load: draft.node_load(node.id)?,
                same_process: same.get(&node.id).copied().unwrap_or(0),
                same_org: draft.node_org_load(node.id, self.deployment.org)?,
                failures: self.failed.iter().filter(|i| i.node == node.id).count() as u64,
                node,
            });
        }
        Ok(candidates)
    }
}
