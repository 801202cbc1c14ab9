//! What the launcher tells the agent: lines of JSON on the socket from which it read its plan.
//!
//! The end of the stream after [`Report::Ready`] and the agent's word means that the program runs: the descriptor
//! closes itself when it is executed.

use serde::{Deserialize, Serialize};

use crate::error::Step;

/// The most bytes that a launcher says.
pub(crate) const REPORT_BYTES_MAX: u64 = 16 * 1024;

/// What the agent answers to [`Report::Ready`], once it has written down whose process it is.
pub(crate) const GO: u8 = b'g';

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Report {
    /// The process that will be the VMM, as the agent sees it.
    Process { pid: u32 },
    /// Everything but the filter is in place; the process waits for the agent's word.
    Ready { access: Enforced },
    /// A step failed; nothing runs.
    Failed { step: Step, why: String },
}

/// How much of what Landlock was asked for this kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Enforced {
    /// Not asked for.
    NotAsked,
    /// All of it.
    Fully,
    /// The kernel is older than this release and leaves some of it out.
    Partly,
    /// The kernel has no Landlock.
    Not,
}
