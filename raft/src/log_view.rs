//! What the log looks like to its readers right now, in memory: the vote, the bounds and the entries at its end.
//!
//! openraft may read an entry as soon as `append` returned, long before the writer thread made it durable, so the tail
//! is kept here until it is in `log.redb`: the journal before it is never read while the log is open. The view never evicts
//! an entry that is not there, and never grows past its bounds otherwise. It does no I/O.

use std::collections::VecDeque;

use openraft::EntryPayload;
use openraft::entry::RaftEntry;

use crate::types::{Entry, LogId, Vote};

/// Durable entries kept for replication and apply, so that neither reads the disk in the steady state.
pub(crate) const TAIL_ENTRIES_MAX: usize = 16_384;
/// Bytes of durable entries kept for the same reason.
pub(crate) const TAIL_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What an entry weighs beside its command: its header, its key and the tail's own bookkeeping.
const ENTRY_OVERHEAD_BYTES: usize = 96;
/// What a membership is taken to weigh: five voters, some learners, two addresses each.
const MEMBERSHIP_BYTES: usize = 4096;

/// How many bytes an entry is taken to need, on the wire and in memory.
pub(crate) fn weight_bytes(entry: &Entry) -> usize {
    ENTRY_OVERHEAD_BYTES
        + match &entry.payload {
            EntryPayload::Blank => 0,
            EntryPayload::Normal(command) => command.bytes().len(),
            EntryPayload::Membership(_) => MEMBERSHIP_BYTES,
        }
}

/// The readers' view of the log.
#[derive(Default)]
pub(crate) struct LogView {
    /// The last vote that is durable.
    pub(crate) vote: Option<Vote>,
    /// The last committed log id that openraft told. Written with the next batch, not by itself.
    pub(crate) committed: Option<LogId>,
    /// The last entry that was purged.
    pub(crate) purged: Option<LogId>,
    /// The last entry of the log, or `purged` when it is empty.
    pub(crate) last: Option<LogId>,
    /// The entries at the end of the log, contiguous, up to `last`.
    tail: VecDeque<Entry>,
    /// Entries below this index are on stable storage. A truncation lowers it.
    durable_next: u64,
    /// Entries below this index are in `log.redb`, those from here on in its journal or nowhere yet.
    stored_next: u64,
    tail_bytes: usize,
}

/// Where the entries of a range are to be found.
pub(crate) struct Located {
    /// The part that must be read from disk, `start..end`.
    pub(crate) on_disk: std::ops::Range<u64>,
    /// The part that follows it, from memory.
    pub(crate) in_memory: Vec<Entry>,
}

impl LogView {
    /// A view of what was found on disk.
    pub(crate) fn recovered(
        vote: Option<Vote>,
        committed: Option<LogId>,
        purged: Option<LogId>,
        last: Option<LogId>,
    ) -> Self {
        let durable_next = last.as_ref().map_or(0, |last| last.index() + 1);
        let stored_next = durable_next;
        LogView { vote, committed, purged, last, durable_next, stored_next, ..LogView::default() }
    }

    /// The index that the next entry must have.
    pub(crate) fn next_index(&self) -> u64 {
        self.last.as_ref().map_or(0, |last| last.index() + 1)
    }

    /// The first index that the log still holds.
    pub(crate) fn first_index(&self) -> u64 {
        self.purged.as_ref().map_or(0, |purged| purged.index() + 1)
    }

    fn tail_first(&self) -> u64 {
        self.tail.front().map_or_else(|| self.next_index(), |front| front.index())
    }

    /// Adds entries that are about to be written. Each must follow the one before; the first of a log that never held
    /// any may have any index. The error is the index that was expected.
    pub(crate) fn append(&mut self, entries: &[Entry]) -> Result<(), u64> {
        for entry in entries {
            let expected = self.next_index();
            if entry.index() != expected && self.last.is_some() {
                return Err(expected);
            }
            self.last = Some(entry.log_id());
            self.tail_bytes += weight_bytes(entry);
            self.tail.push_back(entry.clone());
        }
        Ok(())
    }

    /// Notes that everything up to `index` is durable, be it in the journal.
    pub(crate) fn made_durable(&mut self, index: u64) {
        self.durable_next = self.durable_next.max(index + 1);
    }

    /// Notes that everything up to `index` is in `log.redb`, and evicts what is more than the tail may hold.
    pub(crate) fn made_stored(&mut self, index: u64) {
        self.made_durable(index);
        self.stored_next = self.stored_next.max(index + 1);
        while (self.tail.len() > TAIL_ENTRIES_MAX || self.tail_bytes > TAIL_BYTES_MAX)
            && self.tail.front().is_some_and(|front| front.index() < self.stored_next)
        {
            self.evict_front();
        }
    }

    /// Forgets every entry at and after `from`. `last` is what the last entry then is;
    /// nothing changes when the log ends before that.
    pub(crate) fn truncate(&mut self, from: u64, last: Option<LogId>) {
        while self.tail.back().is_some_and(|back| back.index() >= from) {
            if let Some(back) = self.tail.pop_back() {
                self.tail_bytes -= weight_bytes(&back);
            }
        }
        self.durable_next = self.durable_next.min(from);
        self.stored_next = self.stored_next.min(from);
        if from < self.next_index() {
            self.last = last;
        }
    }

    /// Forgets every entry up to `upto`, inclusive.
    pub(crate) fn purge(&mut self, upto: &LogId) {
        while self.tail.front().is_some_and(|front| front.index() <= upto.index()) {
            self.evict_front();
        }
        if self.purged.as_ref().is_none_or(|purged| purged.index() < upto.index()) {
            self.purged = Some(*upto);
        }
        if self.last.as_ref().is_none_or(|last| last.index() < upto.index()) {
            self.last = Some(*upto);
            self.durable_next = self.durable_next.max(upto.index() + 1);
            self.stored_next = self.stored_next.max(upto.index() + 1);
        }
    }

    /// Splits a range, cut to what the log holds, into its part on disk and its part in memory.
    pub(crate) fn locate(&self, start: u64, end: u64) -> Located {
        let start = start.max(self.first_index());
        let end = end.min(self.next_index());
        if start >= end {
            return Located { on_disk: 0..0, in_memory: Vec::new() };
        }
        let boundary = self.tail_first().clamp(start, end);
        let offset = (boundary - self.tail_first().min(boundary)) as usize;
        let count = (end - boundary) as usize;
        let in_memory = self.tail.iter().skip(offset).take(count).cloned().collect();
        Located { on_disk: start..boundary, in_memory }
    }

    /// Entries below this index are on stable storage.
    pub(crate) fn durable_next(&self) -> u64 {
        self.durable_next
    }

    fn evict_front(&mut self) {
        if let Some(front) = self.tail.pop_front() {
            self.tail_bytes -= weight_bytes(&front);
        }
    }
}
