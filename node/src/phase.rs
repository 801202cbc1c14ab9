//! How one instance stands on this node: the states, what may happen to it, and what follows from that.
//!
//! Pure: no I/O and no clock. [`Observed::begin`] is taken before an action is carried out and [`Observed::step`]
//! when something has happened; what is to be done next is decided in [`crate::reconcile`]. Keeps I7: no event
//! takes a machine that runs back to a state in which it would be started again.

use holdfast_model::InstanceId;
use holdfast_model::agent::{DETAIL_BYTES_MAX, Observation};
use holdfast_model::resource::{InstanceReason, InstanceState};
use serde::{Deserialize, Serialize};

use crate::reconcile::{Action, Doing};

/// Pause before an action that failed is tried again, in milliseconds.
pub const RETRY_MS: u64 = 1_000;

/// Where an instance stands on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nothing of it is here.
    Absent,
    /// Its root image and its TAP are being made ready.
    Preparing,
    /// Everything is ready for its VMM, which is being started.
    Starting,
    /// Its VMM runs; the guest has not started the workload yet.
    Booting,
    /// Its workload runs; its health check has not succeeded yet.
    Running,
    /// It serves.
    Ready,
    /// It finishes its connections.
    Draining {
        /// Since when.
        since_ms: u64,
        /// For how long.
        grace_ms: u64,
    },
    /// It ended and nothing was decided about it yet.
    Ended {
        /// Why it ended.
        cause: Cause,
    },
    /// It ended and is to be started again.
    Backoff {
        /// When.
        until_ms: u64,
    },
    /// Its workload is being stopped, and its leftovers removed.
    Terminating {
        /// What it is after that.
        then: Outcome,
    },
    /// It ended as asked and left nothing behind. Final.
    Stopped,
    /// It will not be tried again and left nothing behind. Final.
    Failed {
        /// Why.
        reason: InstanceReason,
    },
}

/// What an instance is once nothing of it is left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// It ended as asked.
    Stopped,
    /// It did not.
    Failed {
        /// Why.
        reason: InstanceReason,
    },
}

impl Outcome {
    /// The final phase.
    const fn phase(self) -> Phase {
        match self {
            Self::Stopped => Phase::Stopped,
            Self::Failed { reason } => Phase::Failed { reason },
        }
    }
}

/// Why an instance ended, or did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// The workload exited with 0.
    Finished,
    /// The workload exited otherwise, or its machine ended under it.
    Crashed,
    /// Its health check failed too often.
    Unhealthy,
    /// The guest had no memory left.
    OutOfMemory,
    /// Its image could not be fetched.
    ImagePull,
    /// Its root could not be built.
    RootBuild,
    /// Its TAP, address or route could not be set up.
    Network,
    /// Its VMM did not start, or its guest did not come up.
    VmmStart,
    /// The host was restarted: nobody's fault.
    HostRestarted,
    /// A volume could not be attached.
    VolumeAttach,
    /// Its secrets are not here, or did not get into the guest.
    Secrets,
}

impl Cause {
    /// How the control plane calls it.
    pub const fn reason(self) -> InstanceReason {
        match self {
            Self::Finished | Self::Crashed | Self::HostRestarted => InstanceReason::CrashLoopBackoff,
            Self::Unhealthy => InstanceReason::HealthcheckFailed,
            Self::OutOfMemory => InstanceReason::OomKilled,
            Self::ImagePull => InstanceReason::ImagePullFailed,
            Self::RootBuild => InstanceReason::RootfsBuildFailed,
            Self::Network => InstanceReason::NetworkSetupFailed,
            Self::VmmStart => InstanceReason::VmmStartFailed,
            Self::VolumeAttach => InstanceReason::VolumeAttachFailed,
            Self::Secrets => InstanceReason::SecretsInjectionFailed,
        }
    }

    /// Whether the workload had no chance to run: the restart policy is about workloads that ended.
    pub const fn before_workload(self) -> bool {
        matches!(
            self,
            Self::ImagePull
                | Self::RootBuild
                | Self::Network
                | Self::VmmStart
                | Self::VolumeAttach
                | Self::Secrets
        )
    }
}

/// What a node knows of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    /// Where it stands.
    pub phase: Phase,
    /// How often this node has started it again.
    pub restarts: u32,
    /// Ends in a row without a ready period between them.
    pub failures: u32,
    /// Whether it has been ready since it was last started.
    pub was_ready: bool,
    /// Why it last ended, until it is ready again.
    pub last_cause: Option<Cause>,
    /// The same for people, [`DETAIL_BYTES_MAX`] at most.
    pub detail: Option<String>,
    /// The action that is under way. Nothing is under way in an agent that has just started.
    #[serde(skip)]
    pub doing: Option<Doing>,
    /// No action before this time: the last one failed.
    #[serde(skip)]
    pub not_before_ms: u64,
}

impl Default for Observed {
    fn default() -> Self {
        Self {
            phase: Phase::Absent,
            restarts: 0,
            failures: 0,
            was_ready: false,
            last_cause: None,
            detail: None,
            doing: None,
            not_before_ms: 0,
        }
    }
}

/// Something that happened to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Image and network are ready.
    Prepared,
    /// The VMM runs.
    Started,
    /// The guest has started the workload.
    WorkloadRunning,
    /// The health check succeeded often enough, or there is none and the workload runs.
    Healthy,
    /// It ended, or an attempt to prepare or start it failed.
    Ended {
        /// Why.
        cause: Cause,
        /// For people.
        detail: String,
    },
    /// Nothing of its machine runs any more; its TAP is kept for the next start.
    Killed,
    /// Nothing of it is left.
    Removed,
    /// Stopping or removing it failed; it is tried again.
    ActionFailed {
        /// For people.
        detail: String,
    },
}

impl Observed {
    /// Whether a machine of it may be running.
    pub const fn may_run(&self) -> bool {
        matches!(
            self.phase,
            Phase::Starting
                | Phase::Booting
                | Phase::Running
                | Phase::Ready
                | Phase::Draining { .. }
                | Phase::Terminating { .. }
        )
    }

    /// What it is from the moment at which an action begins. Stored before the action is carried out.
    pub fn begin(&mut self, action: &Action, now_ms: u64) {
        match action {
            Action::Prepare { .. } => {
                if matches!(self.phase, Phase::Backoff { .. }) {
                    self.restarts = self.restarts.saturating_add(1);
                    self.was_ready = false;
                }
                self.phase = Phase::Preparing;
                self.doing = Some(Doing::Prepare);
            }
            Action::Start { .. } => {
                self.phase = Phase::Starting;
                self.doing = Some(Doing::Start);
            }
            Action::BackOff { until_ms, .. } => {
                self.phase = Phase::Backoff { until_ms: *until_ms };
                self.doing = Some(Doing::BackOff);
            }
            Action::Drain { grace_ms, .. } => {
                self.phase = Phase::Draining { since_ms: now_ms, grace_ms: *grace_ms };
            }
            Action::Resume { .. } => self.phase = Phase::Ready,
            Action::Terminate { then, .. } => {
                self.phase = Phase::Terminating { then: *then };
                self.doing = Some(Doing::Terminate);
            }
            // The caller drops it.
            Action::Forget { .. } => {}
        }
    }

    /// There is no room for it: nothing of it was begun, and nothing will be.
    pub fn refuse(&mut self, detail: String) {
        self.phase = Phase::Terminating { then: Outcome::Failed { reason: InstanceReason::NoCapacity } };
        self.detail = Some(bounded(detail));
    }

    /// What it is after something has happened. An event that does not fit the phase changes nothing.
    pub fn step(&mut self, event: Event, now_ms: u64) {
        match (event, self.phase) {
            (Event::Prepared, Phase::Preparing) => {
                self.phase = Phase::Starting;
                self.doing = None;
            }
            (Event::Started, Phase::Starting) => {
                self.phase = Phase::Booting;
                self.doing = None;
            }
            (Event::WorkloadRunning, Phase::Booting) => self.phase = Phase::Running,
            (Event::Healthy, Phase::Running) => {
                self.phase = Phase::Ready;
                self.was_ready = true;
                self.last_cause = None;
                self.detail = None;
            }
            (Event::Ended { cause, detail }, phase) => self.end(phase, cause, detail),
            (Event::Killed, Phase::Backoff { .. }) => self.doing = None,
            (Event::Removed, Phase::Terminating { then }) => {
                self.phase = then.phase();
                self.doing = None;
            }
            (Event::ActionFailed { detail }, Phase::Backoff { .. } | Phase::Terminating { .. }) => {
                self.doing = None;
                self.not_before_ms = now_ms.saturating_add(RETRY_MS);
                self.detail = Some(bounded(detail));
            }
            _ => {}
        }
    }

    fn end(&mut self, phase: Phase, cause: Cause, detail: String) {
        match phase {
            Phase::Preparing | Phase::Starting | Phase::Booting | Phase::Running | Phase::Ready => {
                if cause != Cause::HostRestarted {
                    self.failures = if self.was_ready { 1 } else { self.failures.saturating_add(1) };
                }
                self.was_ready = false;
                self.last_cause = Some(cause);
                self.detail = Some(bounded(detail));
                self.doing = None;
                self.phase = Phase::Ended { cause };
            }
            // It was to end anyway.
            Phase::Draining { .. } => {
                self.phase = Phase::Terminating { then: Outcome::Stopped };
                self.doing = None;
            }
            Phase::Absent
            | Phase::Ended { .. }
            | Phase::Backoff { .. }
            | Phase::Terminating { .. }
            | Phase::Stopped
            | Phase::Failed { .. } => {}
        }
    }

    /// What an agent that has just started makes of the phase that it finds on disk.
    ///
    /// `alive`: a machine of it runs. `host_restarted`: the host has booted since the phase was written.
    pub fn recover(&mut self, alive: bool, host_restarted: bool, now_ms: u64) {
        self.doing = None;
        self.not_before_ms = 0;
        match (self.phase, alive) {
            // The start got as far as the process.
            (Phase::Starting, true) => self.phase = Phase::Booting,
            // The start did not, and TAP and folder may be gone with a host's restart.
            (Phase::Starting, false) => self.phase = Phase::Preparing,
            (Phase::Booting | Phase::Running | Phase::Ready | Phase::Draining { .. }, false) => {
                let (cause, detail) = if host_restarted {
                    (Cause::HostRestarted, "The host was restarted.")
                } else {
                    (Cause::Crashed, "The microVM ended while no node agent was watching.")
                };
                self.step(Event::Ended { cause, detail: detail.to_owned() }, now_ms);
            }
            _ => {}
        }
    }

    /// What the control plane is told.
    pub fn observation(&self, instance: InstanceId) -> Observation {
        let (state, reason) = match self.phase {
            Phase::Absent
            | Phase::Preparing
            | Phase::Starting
            | Phase::Booting
            | Phase::Running
            | Phase::Ended { .. }
            | Phase::Backoff { .. } => (InstanceState::Booting, self.last_cause.map(Cause::reason)),
            Phase::Ready => (InstanceState::Ready, None),
            Phase::Draining { .. } => (InstanceState::Draining, None),
            // A failed one keeps its reason while it is cleared away; it is final once nothing is left.
            Phase::Terminating { then: Outcome::Failed { reason } } => (InstanceState::Booting, Some(reason)),
            Phase::Terminating { then: Outcome::Stopped } => (InstanceState::Draining, None),
            Phase::Stopped => (InstanceState::Stopped, None),
            Phase::Failed { reason } => (InstanceState::Failed, Some(reason)),
        };
        Observation { instance, state, reason, detail: self.detail.clone(), restarts: self.restarts }
    }
}

/// A detail cut at [`DETAIL_BYTES_MAX`], between two characters.
pub fn bounded(mut detail: String) -> String {
    detail.truncate(detail.floor_char_boundary(DETAIL_BYTES_MAX));
    detail
}
