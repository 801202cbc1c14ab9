//! What goes wrong when a VMM is put behind its walls: which step, with what, and why.

use std::fmt;
use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::plan::PlanError;

/// A step of the launcher, in the order in which they are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Reading the plan.
    Plan,
    /// Entering the cgroup.
    Cgroup,
    /// Opening what the program is given.
    Descriptors,
    /// Making the namespaces, and the process that is the first one in them.
    Namespaces,
    /// Putting the root together and entering it.
    Root,
    /// Setting limits.
    Limits,
    /// Giving up root and its capabilities.
    Identity,
    /// Putting up Landlock's wall.
    Access,
    /// Putting up seccomp's wall.
    Filter,
    /// Executing the program.
    Execute,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Plan => "reading its plan",
            Step::Cgroup => "entering the cgroup",
            Step::Descriptors => "opening what the VMM is given",
            Step::Namespaces => "making the namespaces",
            Step::Root => "making the root",
            Step::Limits => "setting the limits",
            Step::Identity => "giving up root",
            Step::Access => "putting up the Landlock wall",
            Step::Filter => "putting up the seccomp wall",
            Step::Execute => "executing the VMM",
        })
    }
}

/// A step that failed, in the launcher.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) step: Step,
    /// A sentence without its end: what could not be done.
    pub(crate) why: String,
}

impl Failure {
    pub(crate) fn new(step: Step, why: impl Into<String>) -> Self {
        Self { step, why: why.into() }
    }
}

/// Names the step and the thing in a failure.
pub(crate) trait InStep<T> {
    fn in_step(self, step: Step, what: impl fmt::Display) -> Result<T, Failure>;
}

impl<T, E: fmt::Display> InStep<T> for Result<T, E> {
    fn in_step(self, step: Step, what: impl fmt::Display) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(step, format!("{what} failed: {error}")))
    }
}

/// Why a program does not run in its jail; the agent's side.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The plan.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The launcher did not start.
    #[error("The launcher '{}' could not be started.", .program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The conversation with the launcher broke.
    #[error("The launcher of a jail could not be {action}.")]
    Talk {
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A step failed.
    #[error("The jail could not be built: while {step}, {why}.")]
    Step {
        /// Which step.
        step: Step,
        /// What failed.
        why: String,
    },
    /// The launcher ended without a word.
    #[error("The launcher of a jail ended without saying why; see the VMM's error output.")]
    Silent,
    /// The launcher says what no launcher of this release says.
    #[error("The launcher of a jail said what makes no sense; launcher and agent must be the same release.")]
    Nonsense,
    /// The launcher takes too long.
    #[error("The jail was not built within {seconds} s; the host may be overloaded.")]
    Deadline {
        /// How long was waited.
        seconds: u64,
    },
}
