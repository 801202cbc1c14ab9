//! What an agent and a guest say to each other.
//!
//! `Sync → Hello` opens every session; on the first one the guest asks for its configuration and goes on through
//! `ConfigApplied` and `Ready`. On a later one (the agent was restarted) `Hello` carries the present state, and the
//! log lines after [`HostMessage::Sync::log_after`] follow again, so that an agent neither loses nor repeats a line
//! as far as the guest's buffer reaches.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exec::{ExecAsk, ExecNews};
use crate::frame::Versioned;

/// Longest command line, path or explanation in a message, in bytes.
pub const TEXT_BYTES_MAX: usize = 4096;

/// From the agent to the guest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostMessage {
    /// Opens the session that the frame names; may be repeated until the hello arrives.
    Sync {
        /// The last log sequence that the agent has stored; 0 asks for all that is buffered.
        log_after: u64,
    },
    /// A piece of the encoded [`crate::config::GuestConfig`]; see [`crate::config_parts`].
    ConfigPart {
        /// Where the piece belongs, in bytes.
        offset: u32,
        /// Size of the whole, in bytes.
        total: u32,
        /// The piece.
        bytes: Vec<u8>,
    },
    /// Asks for one run of a health check.
    HealthQuery {
        /// Echoed in the answer.
        id: u32,
        /// What to check.
        check: HealthCheck,
        /// The guest answers "unhealthy" after this long.
        timeout_ms: u32,
    },
    /// TERM now, KILL after the grace. A guest without a workload reboots at once.
    Stop {
        /// Time between the two, in milliseconds.
        grace_ms: u32,
    },
    /// The agent has the exit status and all log lines: the guest may go.
    Dismiss,
    /// About a program beside the workload. Since version 2; only to a guest that said that it speaks it.
    Exec {
        /// Which program: drawn by the agent, never used twice in a session.
        id: u32,
        /// What is asked.
        ask: ExecAsk,
    },
}

impl Versioned for HostMessage {
    fn since(&self) -> u8 {
        match self {
            HostMessage::Exec { .. } => 2,
            _ => 1,
        }
    }
}

impl fmt::Debug for HostMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostMessage::Sync { log_after } => write!(f, "Sync(log_after {log_after})"),
            HostMessage::ConfigPart { offset, total, bytes } => {
                write!(f, "ConfigPart({} bytes at {offset} of {total}, redacted)", bytes.len())
            }
            HostMessage::HealthQuery { id, check, timeout_ms } => {
                write!(f, "HealthQuery({id}, {check:?}, {timeout_ms} ms)")
            }
            HostMessage::Stop { grace_ms } => write!(f, "Stop({grace_ms} ms)"),
            HostMessage::Dismiss => f.write_str("Dismiss"),
            HostMessage::Exec { id, ask } => write!(f, "Exec({id}, {ask:?})"),
        }
    }
}

/// One way to tell whether a workload is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthCheck {
    /// The port accepts a connection on the instance's own address.
    Tcp {
        /// Port number.
        port: u16,
    },
    /// A GET is answered with a status from 200 to 399.
    Http {
        /// Port number.
        port: u16,
        /// Path of the request, beginning with `/`.
        path: String,
    },
    /// A program in the guest exits with 0; run as the workload's user.
    Command {
        /// Program and arguments.
        argv: Vec<String>,
    },
}

/// From the guest to the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestMessage {
    /// Answers `Sync`.
    Hello {
        /// Version of the guest's init.
        init_version: String,
        /// Milliseconds since the guest's kernel started.
        uptime_ms: u64,
        /// Where the guest stands.
        state: GuestState,
        /// The number of the first line that is still buffered, or of the next one if none is.
        log_first_seq: u64,
    },
    /// The configuration is in force; the workload starts next.
    ConfigApplied,
    /// The configuration could not be applied, or the workload not be started; the guest reboots.
    Failed {
        /// A sentence.
        reason: String,
    },
    /// The workload's process exists.
    Ready {
        /// Milliseconds since the guest's kernel started.
        uptime_ms: u64,
    },
    /// A line of output.
    Log(LogLine),
    /// Answers `HealthQuery`.
    Health {
        /// From the query.
        id: u32,
        /// The verdict.
        healthy: bool,
        /// A sentence, empty when healthy.
        detail: String,
    },
    /// The workload ended; every line of output has been sent before. The guest waits for `Dismiss`.
    Exited(ExitStatus),
    /// Follows each `Hello` of a guest that speaks more than version 1. Since version 2.
    Speaks {
        /// The newest version of the protocol that the guest speaks.
        version: u8,
    },
    /// About a program beside the workload. Since version 2.
    Exec {
        /// Which program.
        id: u32,
        /// What happened.
        news: ExecNews,
    },
}

impl Versioned for GuestMessage {
    fn since(&self) -> u8 {
        match self {
            GuestMessage::Speaks { .. } | GuestMessage::Exec { .. } => 2,
            _ => 1,
        }
    }
}

/// Where a guest stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestState {
    /// Waits for its configuration.
    AwaitingConfig,
    /// The workload runs.
    Running,
    /// The workload was told to stop.
    Stopping,
    /// The workload ended.
    Exited(ExitStatus),
    /// The configuration could not be applied, or the workload not be started.
    Failed {
        /// A sentence.
        reason: String,
    },
}

/// How a workload ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited by itself.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitStatus::Code(code) => write!(f, "exit code {code}"),
            ExitStatus::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Who wrote a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogStream {
    /// The workload's standard output.
    Stdout,
    /// The workload's standard error.
    Stderr,
    /// The guest's init.
    Init,
}

/// A line of output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Counts from 1 within the life of the guest; a gap means that many lines were dropped.
    pub seq: u64,
    /// Who wrote it.
    pub stream: LogStream,
    /// The guest's clock when the line ended, in milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Without its newline, at most [`crate::lines::LINE_BYTES_MAX`] bytes.
    pub bytes: Vec<u8>,
    /// Whether this is a piece of a longer line that goes on in the next one of the stream.
    pub continues: bool,
}
