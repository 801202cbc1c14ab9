//! Reading a ring from a place on. Every answer is bounded, whatever is on the disk.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;

use holdfast_model::agent::LogLine;
use holdfast_model::logs::{LogChunk, LogCursor, LogEntry, LogStart};

use super::ring::{LogError, Ring};
use super::segment::{self, Lines, Segment, Stored, seq_of};

/// Bytes of one answer at most: it must fit a request.
pub(super) const ANSWER_BYTES_MAX: usize = 512 * 1024;

/// What an entry counts for beside its text, in bytes.
const ENTRY_BYTES: usize = 128;

impl Ring {
    /// The first `limit` lines after number `after`, or the last `limit`; fewer where they are long.
    pub fn read(&self, after: Option<u64>, limit: usize) -> Result<Vec<LogLine>, LogError> {
        let last = self.last_seq();
        let after = after.unwrap_or_else(|| last.saturating_sub(limit as u64));
        let (mut lines, mut bytes) = (Vec::new(), 0);
        self.walk(&self.segments(), after, last, |stored| {
            let LogEntry { seq, time_ms, stream, text, .. } = stored.into_entry();
            bytes += text.len() + ENTRY_BYTES;
            lines.push(LogLine { seq, time_ms, stream, text });
            if lines.len() < limit && bytes < ANSWER_BYTES_MAX {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        Ok(lines)
    }

    /// What there is from a place on: about so many bytes, and one line at least.
    pub fn chunk(&self, start: &LogStart, bytes_max: usize) -> Result<LogChunk, LogError> {
        let bytes_max = bytes_max.min(ANSWER_BYTES_MAX);
        let last = self.last_seq();
        let segments = self.segments();
        let after = self.place(start, &segments, last)?;
        let (mut entries, mut bytes, mut expected) = (Vec::new(), 0, None);
        let ended = self.walk(&segments, after, last, |stored| {
            // What is missing is told in front of what follows it, in an answer of its own.
            if expected.is_some_and(|seq| seq != stored.seq) {
                return ControlFlow::Break(());
            }
            expected = Some(stored.seq + 1);
            let entry = stored.into_entry();
            bytes += entry.text.len() + entry.base64.as_ref().map_or(0, String::len) + ENTRY_BYTES;
            entries.push(entry);
            if bytes < bytes_max { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        let first = entries.first().map_or(last + 1, |entry: &LogEntry| entry.seq);
        let missed = if start.after.is_some() { first.saturating_sub(after + 1) } else { 0 };
        // At the end nothing is left to read, also where the last lines are damaged.
        let seq = if ended { last } else { entries.last().map_or(last, |entry| entry.seq) };
        let next = LogCursor { epoch: self.epochs.current(), seq };
        Ok(LogChunk { entries, next, missed, more: seq < last })
    }

    /// The line behind which reading begins.
    fn place(&self, start: &LogStart, segments: &[Segment], last: u64) -> Result<u64, LogError> {
        if let Some(cursor) = start.after {
            return Ok(self.epochs.known_to(cursor).min(last));
        }
        let held = segments.first().map_or(last, |segment| segment.first_seq.saturating_sub(1));
        let since = match segments.iter().position(|segment| segment.last_ms >= start.since_ms) {
            Some(at) if start.since_ms > 0 => {
                let mut first = last;
                self.walk(segments.get(at..).unwrap_or_default(), held, last, |stored| {
                    if stored.time_ms < start.since_ms {
                        return ControlFlow::Continue(());
                    }
                    first = stored.seq.saturating_sub(1);
                    ControlFlow::Break(())
                })?;
                first
            }
            None if start.since_ms > 0 => last,
            _ => held,
        };
        Ok(start.tail.map_or(since, |tail| since.max(last.saturating_sub(tail))))
    }

    /// Hands out the lines after one number up to another, until told to stop; answers whether it came to the end.
    fn walk(
        &self,
        segments: &[Segment],
        after: u64,
        last: u64,
        mut visit: impl FnMut(Stored) -> ControlFlow<()>,
    ) -> Result<bool, LogError> {
        for (nth, segment) in segments.iter().enumerate() {
            // What ends before the place need not be opened.
            if segments.get(nth + 1).is_some_and(|next| next.first_seq <= after + 1) {
                continue;
            }
            let path = segment::path(&self.folder, segment.first_seq);
            let failed = |source| LogError::access(&path, "read", source);
            let mut lines = match File::open(&path) {
                Ok(file) => Lines::new(file),
                // Removed since, to make room.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(failed(source)),
            };
            while let Some(text) = lines.next().map_err(failed)? {
                if seq_of(&text).is_none_or(|seq| seq <= after || seq > last) {
                    continue;
                }
                let Ok(stored) = serde_json::from_slice::<Stored>(&text) else { continue };
                if visit(stored).is_break() {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }
}
