//! What to do: a pure function from what is desired and what is observed to actions.
//!
//! It never touches an instance that is desired and runs (I7), whatever else of its specification differs: a
//! changed specification is a new instance. It takes the desired set as the last one that was stored on this
//! node; who calls it without having one would stop everything, so an agent without one does not call it (I5).

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use holdfast_model::InstanceId;
use holdfast_model::agent::{Desired, NodeInstance};
use holdfast_model::limits::DRAIN_GRACE_MS;
use holdfast_model::manifest::{Restart, RestartPolicy};

use crate::phase::{Cause, Observed, Outcome, Phase, RETRY_MS};

/// The longest pause before a restart, in milliseconds.
pub const BACKOFF_MS_MAX: u64 = 300_000;

/// The same with what keeps instances from returning at the same time.
const PAUSE_MS_MAX: u64 = BACKOFF_MS_MAX + BACKOFF_MS_MAX / 8;

/// A step towards what is desired. Each is idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make image and network ready.
    Prepare {
        /// Of which instance.
        id: InstanceId,
    },
    /// Start the VMM.
    Start {
        /// Of which instance.
        id: InstanceId,
    },
    /// Kill what may be left of the machine and wait.
    BackOff {
        /// Of which instance.
        id: InstanceId,
        /// When it is started again.
        until_ms: u64,
    },
    /// Let it finish its connections.
    Drain {
        /// Which instance.
        id: InstanceId,
        /// For how long.
        grace_ms: u64,
    },
    /// It is wanted after all.
    Resume {
        /// Which instance.
        id: InstanceId,
    },
    /// TERM, KILL, and remove everything.
    Terminate {
        /// Which instance.
        id: InstanceId,
        /// What it is after that.
        then: Outcome,
    },
    /// Nobody asks for it any more and nothing of it is left: drop its record.
    Forget {
        /// Which instance.
        id: InstanceId,
    },
}

impl Action {
    /// The instance that it is about.
    pub const fn id(&self) -> InstanceId {
        match self {
            Self::Prepare { id }
            | Self::Start { id }
            | Self::BackOff { id, .. }
            | Self::Drain { id, .. }
            | Self::Resume { id }
            | Self::Terminate { id, .. }
            | Self::Forget { id } => *id,
        }
    }
}

/// An action that takes time and is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// [`Action::Prepare`].
    Prepare,
    /// [`Action::Start`].
    Start,
    /// [`Action::BackOff`].
    BackOff,
    /// [`Action::Terminate`].
    Terminate,
}

/// What to do now, at most one action for each instance.
pub fn plan(
    desired: &BTreeMap<InstanceId, Arc<NodeInstance>>,
    observed: &BTreeMap<InstanceId, Observed>,
    now_ms: u64,
) -> Vec<Action> {
    let absent = Observed::default();
    let new = desired
        .iter()
        .filter(|(id, _)| !observed.contains_key(id))
        .filter_map(|(id, spec)| plan_one(*id, Some(spec.as_ref()), &absent, now_ms));
    let known = observed
        .iter()
        .filter_map(|(id, seen)| plan_one(*id, desired.get(id).map(Arc::as_ref), seen, now_ms));
    new.chain(known).collect()
}

/// The earliest time at which [`plan`] says something that it does not say now, if nothing happens until then.
pub fn next_wake_ms(
    desired: &BTreeMap<InstanceId, Arc<NodeInstance>>,
    observed: &BTreeMap<InstanceId, Observed>,
) -> Option<u64> {
    let wake = |(id, seen): (&InstanceId, &Observed)| match seen.phase {
        _ if seen.doing.is_some() => None,
        Phase::Backoff { until_ms } => Some(until_ms.max(seen.not_before_ms)),
        Phase::Draining { since_ms, grace_ms } => Some(
            since_ms.saturating_add(drain_grace_ms(desired.get(id).map(Arc::as_ref)).unwrap_or(grace_ms)),
        ),
        Phase::Terminating { .. } => Some(seen.not_before_ms),
        _ => None,
    };
    observed.iter().filter_map(wake).min()
}

fn plan_one(id: InstanceId, spec: Option<&NodeInstance>, seen: &Observed, now_ms: u64) -> Option<Action> {
    let wanted = spec.filter(|spec| spec.desired == Desired::Run);
    match (seen.doing, wanted) {
        (None, _) if is_ahead(seen.not_before_ms, now_ms, RETRY_MS) => None,
        (None, Some(spec)) => plan_wanted(id, spec, seen, now_ms),
        // What brings an instance up is given up at once where it is no longer wanted.
        (None | Some(Doing::Prepare | Doing::Start), None) => plan_unwanted(id, spec, seen, now_ms),
        (Some(_), _) => None,
    }
}

fn plan_wanted(id: InstanceId, spec: &NodeInstance, seen: &Observed, now_ms: u64) -> Option<Action> {
    match seen.phase {
        Phase::Absent | Phase::Preparing => Some(Action::Prepare { id }),
        Phase::Starting => Some(Action::Start { id }),
        // I7: what runs is left alone.
        Phase::Booting | Phase::Running | Phase::Ready => None,
        Phase::Draining { .. } => Some(Action::Resume { id }),
        Phase::Ended { cause } => Some(after_end(id, &spec.restart, seen, cause, now_ms)),
        Phase::Backoff { until_ms } => {
            (!is_ahead(until_ms, now_ms, PAUSE_MS_MAX)).then_some(Action::Prepare { id })
        }
        Phase::Terminating { then } => Some(Action::Terminate { id, then }),
        Phase::Stopped | Phase::Failed { .. } => None,
    }
}

fn plan_unwanted(
    id: InstanceId,
    spec: Option<&NodeInstance>,
    seen: &Observed,
    now_ms: u64,
) -> Option<Action> {
    let stop = Action::Terminate { id, then: Outcome::Stopped };
    match seen.phase {
        Phase::Ready => Some(Action::Drain { id, grace_ms: drain_grace_ms(spec).unwrap_or(DRAIN_GRACE_MS) }),
        Phase::Draining { since_ms, grace_ms } => {
            let grace_ms = drain_grace_ms(spec).unwrap_or(grace_ms);
            (!is_ahead(since_ms.saturating_add(grace_ms), now_ms, grace_ms)).then_some(stop)
        }
        Phase::Terminating { then } => Some(Action::Terminate { id, then }),
        Phase::Stopped | Phase::Failed { .. } => spec.is_none().then_some(Action::Forget { id }),
        // It serves nobody, so there is nothing to finish. What never was here is checked for leftovers once.
        Phase::Absent
        | Phase::Preparing
        | Phase::Starting
        | Phase::Booting
        | Phase::Running
        | Phase::Ended { .. }
        | Phase::Backoff { .. } => Some(stop),
    }
}

/// Restart it, or not.
fn after_end(id: InstanceId, restart: &Restart, seen: &Observed, cause: Cause, now_ms: u64) -> Action {
    let again = match (restart.policy, cause) {
        (_, cause) if cause.before_workload() => true,
        (RestartPolicy::Always, _) => true,
        (RestartPolicy::OnFailure, cause) => cause != Cause::Finished,
        (RestartPolicy::Never, _) => false,
    };
    if !again && cause == Cause::Finished {
        return Action::Terminate { id, then: Outcome::Stopped };
    }
    if !again || seen.failures > restart.max_retries {
        return Action::Terminate { id, then: Outcome::Failed { reason: cause.reason() } };
    }
    let pause_ms =
        if cause == Cause::HostRestarted { 0 } else { backoff_ms(id, restart.backoff_ms, seen.failures) };
    Action::BackOff { id, until_ms: now_ms.saturating_add(pause_ms) }
}

/// Whether a time that was set at most `most_ms` ahead is still to come. One that is further ahead was set before
/// the host's clock went back, and is not waited for.
pub(crate) fn is_ahead(at_ms: u64, now_ms: u64, most_ms: u64) -> bool {
    (1..=most_ms).contains(&at_ms.saturating_sub(now_ms))
}

/// The pause before a restart: doubled with each failure, bounded, and up to an eighth longer by a share that
/// differs between instances and between failures, so that many that ended together do not return together.
fn backoff_ms(id: InstanceId, first_ms: u64, failures: u32) -> u64 {
    let doubled = first_ms.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(BACKOFF_MS_MAX);
    // The low bits of an id are random.
    let share = (id.bits() as u64).rotate_left(failures.wrapping_mul(8)) % 1_024;
    doubled + doubled / 8 * share / 1_024
}

fn drain_grace_ms(spec: Option<&NodeInstance>) -> Option<u64> {
    match spec?.desired {
        Desired::Drain { grace_ms } => Some(grace_ms),
        Desired::Run => None,
    }
}
