//! What waits to be written to the agent: the frame under way, then replies, then in turn lines of the workload's output
//! and news of programs beside it, then the exit.
//!
//! Replies are bounded; lines of output stay in their own ring, and programs' output in their pipes, from which a frame
//! is made only when the channel takes it, so a slow agent costs no memory here.

use std::{collections::VecDeque, time::Instant};

use holdfast_guest::{frame, log_buffer::LogBuffer, message::GuestMessage};

use crate::{
    channel::{Channel, Transfer},
    exec::Execs,
};

/// The most replies that wait. An agent that asks faster than it reads loses answers, and times out.
const REPLIES_MAX: usize = 64;

/// The most frames written before the loop looks at anything else again.
const FRAMES_PER_TURN_MAX: usize = 64;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// The session that the agent opened; without one there is nobody to write to.
    session: Option<u64>,
    /// The frame under way.
    frame: Vec<u8>,
    /// How much of it has been written.
    written: usize,
    replies: VecDeque<GuestMessage>,
    /// Whose turn it is: a line, or news of a program.
    line_next: bool,
    /// The last turn ended before everything was looked at.
    hurried: bool,
}

/// What came of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    /// Everything is written.
    Done,
    /// More is waiting.
    More,
    /// The agent is gone.
    Gone,
}

impl Outbox {
    pub(crate) fn session(&self) -> Option<u64> {
        self.session
    }

    /// Opens a session, which ends the former one with all that was meant for it. The frame under way is finished,
    /// so that the stream stays in step.
    pub(crate) fn open(&mut self, session: u64) {
        self.session = Some(session);
        self.replies.clear();
    }

    /// The agent is gone.
    pub(crate) fn close(&mut self) {
        *self = Self::default();
    }

    pub(crate) fn reply(&mut self, message: GuestMessage) {
        if self.session.is_some() && self.replies.len() < REPLIES_MAX {
            self.replies.push_back(message);
        }
    }

    /// Whether the channel should be watched for room.
    pub(crate) fn has_more(&self, logs: &LogBuffer) -> bool {
        self.session.is_some()
            && (self.written < self.frame.len()
                || self.hurried
                || !self.replies.is_empty()
                || logs.peek().is_some())
    }

    /// Whether the channel took everything that was begun: only then is more output of programs read.
    pub(crate) fn is_free(&self) -> bool {
        self.session.is_some() && self.written == self.frame.len()
    }

    /// Writes what the channel takes.
    pub(crate) fn flush(&mut self, channel: &mut Channel, logs: &mut LogBuffer, execs: &mut Execs) -> Flush {
        let mut frames = 0;
        self.hurried = false;
        loop {
            if self.written == self.frame.len() {
                if frames == FRAMES_PER_TURN_MAX {
                    self.hurried = true;
                    return Flush::More;
                }
                frames += 1;
                if !self.next_frame(logs, execs) {
                    return Flush::Done;
                }
            }
            match channel.write(self.frame.get(self.written..).unwrap_or_default()) {
                Transfer::Bytes(bytes) => self.written += bytes,
                Transfer::Later => return Flush::More,
                Transfer::Gone => return Flush::Gone,
            }
        }
    }

    /// Makes the next frame; false when nothing waits.
    fn next_frame(&mut self, logs: &mut LogBuffer, execs: &mut Execs) -> bool {
        self.frame.clear();
        self.written = 0;
        let Some(session) = self.session else { return false };
        let Some(message) = self.next_message(logs, execs) else { return false };
        match frame::encode(session, &message) {
            Ok(wire) => {
                // The delimiter in front ends whatever a connection that broke has left.
                self.frame.push(frame::DELIMITER);
                self.frame.extend(wire);
            }
            // Every message of ours is far below the bound; what is not is lost rather than fatal.
            Err(error) => eprintln!("holdfast-init: {}", crate::explain(&error)),
        }
        true
    }

    fn next_message(&mut self, logs: &mut LogBuffer, execs: &mut Execs) -> Option<GuestMessage> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        self.line_next = !self.line_next;
        let news = |execs: &mut Execs| execs.next_news(Instant::now());
        let mut line = || {
            let line = GuestMessage::Log(logs.peek()?.clone());
            logs.advance();
            Some(line)
        };
        if self.line_next { line().or_else(|| news(execs)) } else { news(execs).or_else(line) }
    }
}
