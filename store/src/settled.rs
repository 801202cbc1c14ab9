//! Whether an env's instances are what its deployment wants. Kept as a mark per env, so that a `Tick` looks only at
//! envs for which there is something to do or to wait for.

use crate::error::StoreError;
use crate::rows::Rows;
use crate::secret_views::SecretViews;
use crate::views::Views;
use holdfast_model::resource::{Deployment, DeploymentState, Instance, InstanceState, NodeState};
use holdfast_model::{DeploymentId, EnvId, NodeId, ProcessName};
use std::collections::BTreeMap;

/// Whether instances must move away from a node in this state.
pub(crate) const fn is_leaving(state: NodeState) -> bool {
    matches!(state, NodeState::Draining | NodeState::Quarantined | NodeState::Disabled)
}

/// Whether `Tick` should look at an env.
pub(crate) fn wants_attention(rows: &impl Rows, env: EnvId) -> Result<bool, StoreError> {
    let current = rows.env(env)?.and_then(|env| env.current);
    let Some(id) = current else { return Ok(false) };
    let Some(deployment) = rows.deployment(id)? else { return Ok(false) };
    match deployment.state {
        DeploymentState::Rolling => Ok(true),
        // A failed deployment that nothing took over from is still what its env follows, with growing pauses.
        DeploymentState::Complete | DeploymentState::Failed | DeploymentState::Superseded => {
            Ok(!is_settled(rows, &deployment)?)
        }
    }
}

/// Whether instances run with the secrets that a deployment is bound to.
pub(crate) struct SecretsOf {
    wanted: u32,
    known: BTreeMap<DeploymentId, u32>,
}

impl SecretsOf {
    pub(crate) fn new(rows: &impl Rows, deployment: DeploymentId) -> Result<Self, StoreError> {
        let wanted = rows.deployment_secrets(deployment)?;
        Ok(Self { wanted, known: BTreeMap::from([(deployment, wanted)]) })
    }

    /// The version; 0 for none.
    pub(crate) fn wanted(&self) -> u32 {
        self.wanted
    }

    pub(crate) fn are_of(&mut self, rows: &impl Rows, instance: &Instance) -> Result<bool, StoreError> {
        let number = match self.known.get(&instance.deployment) {
            Some(number) => *number,
            None => {
                let number = rows.deployment_secrets(instance.deployment)?;
                self.known.insert(instance.deployment, number);
                number
            }
        };
        Ok(number == self.wanted)
    }
}

/// Whether every wanted instance is ready on a node that keeps it, and nothing else runs but what is draining.
pub(crate) fn is_settled(rows: &impl Rows, deployment: &Deployment) -> Result<bool, StoreError> {
    let mut ready: BTreeMap<ProcessName, u32> = BTreeMap::new();
    let mut leaving: BTreeMap<NodeId, bool> = BTreeMap::new();
    let mut secrets = SecretsOf::new(rows, deployment.id)?;
    for instance in rows.live_instances(deployment.env)? {
        if instance.state == InstanceState::Draining {
            continue;
        }
        let same_release = instance.release == deployment.release;
        if instance.state != InstanceState::Ready || !same_release || !secrets.are_of(rows, &instance)? {
            return Ok(false);
        }
        if let std::collections::btree_map::Entry::Vacant(entry) = leaving.entry(instance.node) {
            entry.insert(rows.node(instance.node)?.is_none_or(|node| is_leaving(node.state)));
        }
        if leaving.get(&instance.node) == Some(&true) {
            return Ok(false);
        }
        *ready.entry(instance.process).or_default() += 1;
    }
    let wanted = deployment.counts.iter().filter(|(_, count)| **count > 0);
    Ok(wanted.eq(ready.iter()))
}
