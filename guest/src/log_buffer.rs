//! Output that waits for an agent: a ring of numbered lines with two bounds.
//!
//! Lines stay after they were sent, so that an agent that was restarted can ask again for those that it had not
//! stored. A workload is never made to wait for an agent: when the ring is full the oldest line goes, and if no
//! agent had been sent it, it counts as dropped.

use std::collections::VecDeque;

use crate::message::{LogLine, LogStream};

/// The most lines held.
pub const BUFFER_LINES_MAX: usize = 10_000;

/// The most bytes of text held: a guest may have as little as 64 MiB.
pub const BUFFER_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The ring.
#[derive(Debug)]
pub struct LogBuffer {
    lines: VecDeque<LogLine>,
    /// Sum of the lines' text, at most [`BUFFER_BYTES_MAX`].
    bytes: usize,
    /// The number that the next line gets.
    next_seq: u64,
    /// The number of the next line to send in this session.
    cursor: u64,
    /// Lines that no agent was ever sent.
    dropped: u64,
}

impl Default for LogBuffer {
    fn default() -> Self {
        Self { lines: VecDeque::new(), bytes: 0, next_seq: 1, cursor: 1, dropped: 0 }
    }
}

impl LogBuffer {
    /// An empty ring; the first line gets the number 1.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a line, which costs the oldest ones if there is no room.
    pub fn push(&mut self, stream: LogStream, at_unix_ms: u64, bytes: Vec<u8>, continues: bool) {
        self.bytes += bytes.len();
        self.lines.push_back(LogLine { seq: self.next_seq, stream, at_unix_ms, bytes, continues });
        self.next_seq += 1;
        while self.lines.len() > BUFFER_LINES_MAX || self.bytes > BUFFER_BYTES_MAX {
            let Some(gone) = self.lines.pop_front() else { break };
            self.bytes -= gone.bytes.len();
            if gone.seq >= self.cursor {
                self.dropped += 1;
                self.cursor = gone.seq + 1;
            }
        }
    }

    /// A new session begins: send what follows line `log_after`, as far as it is still here.
    pub fn rewind(&mut self, log_after: u64) {
        self.cursor = log_after.saturating_add(1).clamp(self.first_seq(), self.next_seq);
    }

    /// The next line to send; call [`LogBuffer::advance`] once it is on its way.
    pub fn peek(&self) -> Option<&LogLine> {
        let index = usize::try_from(self.cursor.checked_sub(self.first_seq())?).ok()?;
        self.lines.get(index)
    }

    /// The line that [`LogBuffer::peek`] showed is on its way.
    pub fn advance(&mut self) {
        self.cursor = self.cursor.saturating_add(1).min(self.next_seq);
    }

    /// The number of the oldest line that is held, or of the next one if none is.
    pub fn first_seq(&self) -> u64 {
        self.lines.front().map_or(self.next_seq, |line| line.seq)
    }

    /// How many lines went before any agent was sent them.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }
}
