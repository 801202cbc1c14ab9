//! Running a program beside a workload: grants for it, and what a node is asked to run.
//!
//! [`frames`] is what passes between a person, a member and a node while it runs.

mod frames;

pub use frames::{
    ExecFrameError, ExecFrames, ExecInput, ExecOutput, ExecSignal, ExecStatus, decode_untrusted, encode,
};

use crate::{Actor, AppId, Digest, EnvId, ExecGrantId, InstanceId, MemberId, NodeId, OrgId, Timestamp};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The longest encoded frame, in bytes.
pub const EXEC_FRAME_BYTES_MAX: usize = 64 << 10;
/// Bytes of input or output in one frame at most.
pub const EXEC_CHUNK_BYTES_MAX: usize = 16 << 10;
/// Arguments of a program at most.
pub const EXEC_ARGV_MAX: usize = 256;
/// Bytes of all arguments of a program at most.
pub const EXEC_ARGV_BYTES_MAX: usize = 32 << 10;
/// The longest name of a kind of terminal, in bytes.
pub const EXEC_TERMINAL_KIND_BYTES_MAX: usize = 64;
/// The longest reason in a frame, in bytes.
pub const EXEC_REASON_BYTES_MAX: usize = 512;
/// The media type of a session's streams.
pub const EXEC_MEDIA_TYPE: &str = "application/vnd.holdfast.exec";
/// Where a node takes its part of a session: `POST` of frames to this path, `/` and the grant's id; the answer is frames.
pub const EXEC_NODE_PATH: &str = "/v1/agent/exec";

/// What a grant lets somebody run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExecClass {
    /// The shell of the image's user, and nothing else by name.
    Shell,
    /// One program that is named when the grant is used.
    Program,
}

/// A permission to run one program in one instance, once. The row goes when the session ends; its events stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExecGrant {
    /// Its id.
    pub id: ExecGrantId,
    /// In which instance.
    pub instance: InstanceId,
    /// On which node that is.
    pub node: NodeId,
    /// Of which env.
    pub env: EnvId,
    /// Of which app.
    pub app: AppId,
    /// Whose.
    pub org: OrgId,
    /// Who may use it, and nobody else.
    pub principal: Actor,
    /// For what.
    pub class: ExecClass,
    /// Whether the program gets a terminal.
    pub terminal: bool,
    /// Digest of its secret.
    pub digest: Digest,
    /// When it ends, if it is not used before.
    pub use_before: Timestamp,
    /// How long its session may last, in milliseconds.
    pub session_ms: u64,
    /// Its use.
    pub used: Option<ExecUse>,
    /// When it was made.
    pub created_at: Timestamp,
}

/// A grant's one use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExecUse {
    /// When.
    pub at: Timestamp,
    /// When the session is cut off.
    pub ends_at: Timestamp,
    /// The member that passes the session's bytes on.
    pub member: MemberId,
}

/// How a grant or its session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExecEnd {
    /// The program exited.
    Exited,
    /// A signal ended the program.
    Killed,
    /// Its time was over.
    Timeout,
    /// The program was never reached, or the grant never used.
    ConnectTimeout,
    /// The person's end broke off.
    ClientDisconnect,
    /// The grant, the token, or the node's trust was taken away.
    Revoked,
    /// The node could not start it.
    Refused,
    /// The node's agent, the instance or the member went away.
    Lost,
}

impl ExecEnd {
    /// As the API spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Killed => "killed",
            Self::Timeout => "timeout",
            Self::ConnectTimeout => "connect_timeout",
            Self::ClientDisconnect => "client_disconnect",
            Self::Revoked => "revoked",
            Self::Refused => "refused",
            Self::Lost => "lost",
        }
    }
}

impl fmt::Display for ExecEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// A terminal's size, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// A terminal for a program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecTerminal {
    /// `TERM`, as in `xterm-256color`.
    pub kind: String,
    /// Its size.
    pub size: ExecSize,
}

/// What is to be run.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecProgram {
    /// Program and arguments; none is the user's shell. Never stored and never audited: arguments hold secrets.
    pub argv: Vec<String>,
    /// On a terminal; without one it has three pipes.
    pub terminal: Option<ExecTerminal>,
}

impl ExecProgram {
    /// Which grant it needs.
    pub fn class(&self) -> ExecClass {
        if self.argv.is_empty() { ExecClass::Shell } else { ExecClass::Program }
    }

    /// Whether it keeps the bounds on arguments and terminals (I14).
    pub fn is_within_bounds(&self) -> bool {
        let bytes: usize = self.argv.iter().map(String::len).sum();
        let kind = self.terminal.as_ref().map_or("", |terminal| terminal.kind.as_str());
        let printable = kind.bytes().all(|byte| byte.is_ascii_graphic());
        let first = self.argv.first().is_none_or(|program| !program.is_empty());
        let no_nul = self.argv.iter().all(|argument| !argument.contains('\0'));
        self.argv.len() <= EXEC_ARGV_MAX
            && bytes <= EXEC_ARGV_BYTES_MAX
            && kind.len() <= EXEC_TERMINAL_KIND_BYTES_MAX
            && printable
            && first
            && no_nul
    }
}

impl fmt::Debug for ExecProgram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ExecProgram({} arguments, redacted, terminal {:?})", self.argv.len(), self.terminal)
    }
}

/// What a member asks a node to run; the node then takes its part of the session at that member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecCall {
    /// The grant, which is used by now.
    pub grant: ExecGrantId,
    /// Where to run it.
    pub instance: InstanceId,
    /// The API address of the member that passes the session on, `host:port`.
    pub member: String,
    /// What to run.
    pub program: ExecProgram,
    /// When the node cuts it off by itself, from now, in milliseconds.
    pub ends_in_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i14_programs_have_bounds() {
        let program = |argv: &[&str], kind: &str| ExecProgram {
            argv: argv.iter().map(|a| (*a).to_owned()).collect(),
            terminal: Some(ExecTerminal { kind: kind.into(), size: ExecSize { rows: 1, columns: 1 } }),
        };
        assert!(program(&["ls", ""], "xterm").is_within_bounds());
        assert!(program(&[], "").is_within_bounds());
        let long = "x".repeat(EXEC_ARGV_BYTES_MAX + 1);
        for bad in [
            program(&[""], "xterm"),
            program(&["a\0b"], "xterm"),
            program(&[&long], "xterm"),
            program(&["a"; EXEC_ARGV_MAX + 1], "xterm"),
            program(&["a"], "x\nPATH=y"),
            program(&["a"], &"x".repeat(EXEC_TERMINAL_KIND_BYTES_MAX + 1)),
        ] {
            assert!(!bad.is_within_bounds(), "{bad:?}");
        }
    }
}
