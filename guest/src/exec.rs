//! Programs that are run beside the workload, over the same channel: what the two sides say of them, and the
//! accounting that keeps either from making the other hold more than [`WINDOW_BYTES`].
//!
//! Each program has a number that the agent draws. Bytes flow in both directions under a window: who reads grants
//! *room*, who writes spends it, so a program whose output nobody takes waits in its own pipe and holds up nothing
//! else on the channel. `Debug` shows how much was said and never what (I10).

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::message::ExitStatus;

/// The most bytes that are under way in one direction of one program.
pub const WINDOW_BYTES: u32 = 128 * 1024;

/// The most bytes of input or output in one message.
pub const CHUNK_BYTES_MAX: usize = 16 * 1024;

/// The most arguments of a program.
pub const ARGV_MAX: usize = 256;

/// The most bytes of all arguments of a program.
pub const ARGV_BYTES_MAX: usize = 32 * 1024;

/// The longest name of a kind of terminal, as in `xterm-256color`.
pub const TERMINAL_KIND_BYTES_MAX: usize = 64;

/// What the agent asks of one program.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecAsk {
    /// Starts it, as the workload's user, in its environment and folder.
    Start {
        /// Program and arguments; none is the user's shell.
        argv: Vec<String>,
        /// On a terminal of its own; without one it has three pipes.
        terminal: Option<Terminal>,
    },
    /// Bytes for its standard input.
    Input(Vec<u8>),
    /// No more input follows.
    InputEnds,
    /// Its terminal has another size.
    Resize(TerminalSize),
    /// A signal to what runs in the foreground of its terminal, or to its process group.
    Signal(ExecSignal),
    /// The agent takes so many bytes of output more.
    Room(u32),
    /// Nobody is there any more. It is sent HUP, and TERM and KILL while it does not go; or KILL at once. It is not
    /// spoken of again.
    HangUp {
        /// KILL at once.
        kill: bool,
    },
}

/// What the guest says of one program.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecNews {
    /// It runs.
    Started,
    /// It could not be started; it is not spoken of again.
    Refused {
        /// A sentence.
        reason: String,
    },
    /// Bytes of its output. A terminal has only the one stream.
    Output {
        /// Which stream.
        stream: ExecStream,
        /// The bytes, at least one.
        bytes: Vec<u8>,
    },
    /// The guest takes so many bytes of input more.
    Room(u32),
    /// It ended, and all its output has been sent; it is not spoken of again.
    Ended(ExitStatus),
}

/// A stream of output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecStream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A terminal for a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// `TERM`, as in `xterm-256color`.
    pub kind: String,
    /// Its size.
    pub size: TerminalSize,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// The signals that may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecSignal {
    /// Interrupt.
    Int,
    /// Terminate.
    Term,
    /// Kill.
    Kill,
    /// Hang up.
    Hup,
}

impl fmt::Debug for ExecAsk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExecAsk::Start { argv, terminal } => {
                write!(f, "Start({} arguments, redacted, terminal {terminal:?})", argv.len())
            }
            ExecAsk::Input(bytes) => write!(f, "Input({} bytes, redacted)", bytes.len()),
            ExecAsk::InputEnds => f.write_str("InputEnds"),
            ExecAsk::Resize(size) => write!(f, "Resize({size:?})"),
            ExecAsk::Signal(signal) => write!(f, "Signal({signal:?})"),
            ExecAsk::Room(bytes) => write!(f, "Room({bytes})"),
            ExecAsk::HangUp { kill } => write!(f, "HangUp(kill {kill})"),
        }
    }
}

impl fmt::Debug for ExecNews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExecNews::Started => f.write_str("Started"),
            ExecNews::Refused { reason } => write!(f, "Refused({reason:?})"),
            ExecNews::Output { stream, bytes } => {
                write!(f, "Output({stream:?}, {} bytes, redacted)", bytes.len())
            }
            ExecNews::Room(bytes) => write!(f, "Room({bytes})"),
            ExecNews::Ended(status) => write!(f, "Ended({status})"),
        }
    }
}

/// The peer broke the rules of a window: it sent without room, or granted more than a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The peer did not keep within the window of {WINDOW_BYTES} bytes.")]
pub struct Overrun;

/// The writing end of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spending {
    room: u32,
}

impl Default for Spending {
    fn default() -> Self {
        Self { room: WINDOW_BYTES }
    }
}

impl Spending {
    /// How many bytes may be sent now.
    pub fn room(&self) -> usize {
        self.room as usize
    }

    /// So many bytes are sent, at most [`Spending::room`].
    pub fn spend(&mut self, bytes: usize) {
        self.room = self.room.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }

    /// The reader takes so many bytes more.
    pub fn granted(&mut self, bytes: u32) -> Result<(), Overrun> {
        self.room = self.room.checked_add(bytes).filter(|room| *room <= WINDOW_BYTES).ok_or(Overrun)?;
        Ok(())
    }
}

/// The reading end of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granting {
    /// What the writer may still send.
    open: u32,
    /// What was used up and is not granted anew yet.
    owed: u32,
}

impl Default for Granting {
    fn default() -> Self {
        Self { open: WINDOW_BYTES, owed: 0 }
    }
}

impl Granting {
    /// So many bytes arrived; they are held until they are used up.
    pub fn arrived(&mut self, bytes: usize) -> Result<(), Overrun> {
        let bytes = u32::try_from(bytes).map_err(|_| Overrun)?;
        self.open = self.open.checked_sub(bytes).ok_or(Overrun)?;
        Ok(())
    }

    /// So many of them are used up. Answers with what is to be granted, which is nothing until it is worth a message.
    pub fn used(&mut self, bytes: usize) -> Option<u32> {
        self.owed = self.owed.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.owed < WINDOW_BYTES / 4 {
            return None;
        }
        let grant = std::mem::take(&mut self.owed).min(WINDOW_BYTES - self.open);
        self.open += grant;
        Some(grant)
    }
}
