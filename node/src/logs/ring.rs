//! One instance's log: a bounded row of segments, of which the oldest goes when a new one needs its room or is too old.
//!
//! Assumed of the disk: a write survives the end of this process; after a power loss the newest lines may be
//! missing or torn. Opening cuts off a torn last line and goes on with the numbers after the last whole one, in another
//! epoch if lines may have been lost that somebody was given ([`super::epoch`]). Known secrets are taken out before
//! anything is written (I10, [`super::redact`]).

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use holdfast_model::agent::LogStream;
use tokio::sync::watch;

use super::epoch::Epochs;
use super::redact::{Carry, REDACTED, RedactError, Redactor};
use super::retention::{Retention, SEGMENTS};
use super::segment::{self, Segment, Stored};
use super::shelf::Shelf;
use crate::host;
use crate::machine::now_ms;

/// Why a log could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// A file or folder could not be used.
    #[error("The log '{}' could not be {action}; check the disk and its free space.", .path.display())]
    Access {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl LogError {
    pub(super) fn access(path: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Access { path: path.to_owned(), action, source }
    }
}

/// A line to append.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// When the node got it, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// Where it came from.
    pub stream: LogStream,
    /// The guest's own number of it; 0 for the platform's remarks.
    pub guest_seq: u64,
    /// The line, as it was written.
    pub bytes: Vec<u8>,
    /// Whether it goes on in the next one of its stream.
    pub continues: bool,
    /// How many lines are missing here; then this is a remark about it.
    pub dropped: u64,
}

impl Line {
    /// A remark of the platform.
    pub fn remark(time_ms: u64, text: impl Into<Vec<u8>>) -> Self {
        let (stream, bytes) = (LogStream::System, text.into());
        Self { time_ms, stream, guest_seq: 0, bytes, continues: false, dropped: 0 }
    }

    /// The platform's remark that lines are missing.
    pub fn dropped(time_ms: u64, lines: u64, why: &str) -> Self {
        Self { dropped: lines, ..Self::remark(time_ms, format!("{lines} lines dropped: {why}")) }
    }
}

/// What is taken out of lines.
#[derive(Debug, Default)]
enum Known {
    /// Nothing.
    #[default]
    Nothing,
    /// These values.
    Values(Redactor),
    /// More than can be looked for: then every line.
    TooMuch,
}

/// What a ring has seen since this agent began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingStats {
    /// Bytes on disk now.
    pub bytes: u64,
    /// Lines that were stored.
    pub lines: u64,
    /// Lines that were lost before they could be stored.
    pub dropped: u64,
    /// Lines that were removed to keep within the bounds.
    pub evicted: u64,
}

/// One instance's log.
#[derive(Debug)]
pub struct Ring {
    pub(super) folder: PathBuf,
    retention: Retention,
    pub(super) epochs: Epochs,
    writer: Mutex<Writer>,
    /// The number of the last line.
    last: watch::Sender<u64>,
    /// Bytes of all rings of the node.
    used: Arc<AtomicU64>,
    /// Where room is made when all of them have too many.
    shelf: Weak<Shelf>,
    bytes: AtomicU64,
    lines: AtomicU64,
    dropped: AtomicU64,
    evicted: AtomicU64,
}

#[derive(Debug)]
struct Writer {
    /// Of the last segment; there is none before the first line.
    file: Option<File>,
    segments: VecDeque<Segment>,
    guest_seq: u64,
    known: Known,
    /// What each stream has said of a line that goes on.
    carries: [Carry; 3],
}

/// Lines on their way to the disk.
#[derive(Default)]
struct Batch {
    wire: Vec<u8>,
    lines: u64,
    guest_seq: u64,
    dropped: u64,
    first_ms: u64,
    last_ms: u64,
}

impl Ring {
    /// Opens the ring in this folder, or makes it, with the default retention and no other ring beside it.
    pub fn open(folder: PathBuf) -> Result<Self, LogError> {
        Self::open_with(folder, Retention::default(), Arc::default(), Weak::new())
    }

    /// Opens a ring or makes it. `used` holds the bytes of all rings, of which this one's are part already.
    pub(super) fn open_with(
        folder: PathBuf,
        retention: Retention,
        used: Arc<AtomicU64>,
        shelf: Weak<Shelf>,
    ) -> Result<Self, LogError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| LogError::access(&folder, "created", source))?;
        let failed = |source| LogError::access(&folder, "opened", source);
        let mut segments: VecDeque<Segment> = segment::list(&folder).map_err(failed)?.into();
        let (mut file, mut last) = (None, None);
        if let Some(newest) = segments.back_mut() {
            let opened = segment::open(&segment::path(&folder, newest.first_seq)).map_err(failed)?;
            newest.bytes = opened.1;
            file = Some(opened.0);
        }
        for segment in segments.iter().rev() {
            last = segment::last(&segment::path(&folder, segment.first_seq)).map_err(failed)?;
            if last.is_some() {
                break;
            }
        }
        let (seq, guest_seq) = last.map_or((0, 0), |line: Stored| (line.seq, line.guest_seq));
        // Numbers that a damaged segment may have used are not used again.
        let seq = segments.back().map_or(seq, |newest| seq.max(newest.first_seq.saturating_sub(1)));
        let boot_id = host::boot_id().map_err(failed)?;
        let epochs = Epochs::open(&folder, &boot_id, seq).map_err(failed)?;
        let bytes = segments.iter().map(|segment| segment.bytes).sum();
        let carries = Default::default();
        let writer = Writer { file, segments, guest_seq, known: Known::Nothing, carries };
        Ok(Self {
            folder,
            retention,
            epochs,
            writer: Mutex::new(writer),
            last: watch::Sender::new(seq),
            used,
            shelf,
            bytes: AtomicU64::new(bytes),
            lines: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
        })
    }

    /// The number of the last line, 0 before the first.
    pub fn last_seq(&self) -> u64 {
        *self.last.borrow()
    }

    /// Follows [`Ring::last_seq`].
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }

    /// The guest's number of the last line of its present life.
    pub fn guest_seq(&self) -> u64 {
        self.lock().guest_seq
    }

    /// What it has seen.
    pub fn stats(&self) -> RingStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        RingStats {
            bytes: read(&self.bytes),
            lines: read(&self.lines),
            dropped: read(&self.dropped),
            evicted: read(&self.evicted),
        }
    }

    pub(super) fn segments(&self) -> Vec<Segment> {
        self.lock().segments.iter().copied().collect()
    }

    /// When its last line came, in milliseconds since the Unix epoch; 0 without one.
    pub(super) fn changed_ms(&self) -> u64 {
        self.lock().segments.back().map_or(0, |segment| segment.last_ms)
    }

    /// From now on these values are taken out of every line, in place of those that were known before. On failure every
    /// line is stored without its text.
    ///
    /// # Errors
    /// When the values are more than a bundle may hold.
    pub fn know_secrets<'v>(&self, values: impl IntoIterator<Item = &'v [u8]>) -> Result<(), RedactError> {
        let (known, result) = match Redactor::new(values) {
            Ok(Some(redactor)) => (Known::Values(redactor), Ok(())),
            Ok(None) => (Known::Nothing, Ok(())),
            Err(error) => (Known::TooMuch, Err(error)),
        };
        self.lock().known = known;
        result
    }

    /// From now on every line is stored without its text: what secrets the instance has cannot be told.
    pub fn withhold(&self) {
        self.lock().known = Known::TooMuch;
    }

    /// A new life of the guest begins, which counts its lines from 1 again; the remark is stored as the platform's.
    pub fn begin_life(&self, time_ms: u64, remark: &str) -> Result<(), LogError> {
        self.append_to(&mut self.lock(), &[Line::remark(time_ms, remark)], true)?;
        self.relieve()
    }

    /// Appends lines and numbers them. They survive the end of this process when this returns. Of lines that do not
    /// reach the disk the guest's numbers are not taken, so that the next ones tell how many are missing.
    pub fn append(&self, lines: &[Line]) -> Result<(), LogError> {
        self.append_to(&mut self.lock(), lines, false)?;
        self.relieve()
    }

    /// Makes room where all rings together have too much; not to be called with the writer locked.
    fn relieve(&self) -> Result<(), LogError> {
        self.shelf.upgrade().map_or(Ok(()), |shelf| shelf.relieve())
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append_to(&self, writer: &mut Writer, lines: &[Line], new_life: bool) -> Result<(), LogError> {
        if new_life {
            writer.carries = Default::default();
        }
        let failed = |source| LogError::access(&self.folder, "written", source);
        let mut batch = Batch { guest_seq: if new_life { 0 } else { writer.guest_seq }, ..Batch::default() };
        for line in lines {
            let bytes = writer.redact(line);
            // The platform's remarks carry the guest's last number on, so that the last line always knows it.
            batch.guest_seq = batch.guest_seq.max(line.guest_seq);
            let seq = self.last_seq() + batch.lines + 1;
            let stored = Stored::new(seq, batch.guest_seq, line, bytes);
            stored.encode(&mut batch.wire).map_err(failed)?;
            batch.first_ms = if batch.lines == 0 { line.time_ms } else { batch.first_ms };
            batch.last_ms = line.time_ms;
            batch.lines += 1;
            batch.dropped += line.dropped;
            if batch.wire.len() as u64 >= self.room(writer) {
                self.flush(writer, &mut batch).map_err(failed)?;
            }
        }
        self.flush(writer, &mut batch).map_err(failed)
    }

    /// What the last segment may still grow by.
    fn room(&self, writer: &Writer) -> u64 {
        let used = writer.segments.back().map_or(0, |segment| segment.bytes);
        self.retention.segment_bytes().saturating_sub(used)
    }

    fn flush(&self, writer: &mut Writer, batch: &mut Batch) -> io::Result<()> {
        if batch.lines == 0 {
            return Ok(());
        }
        let stale = writer.segments.back().is_some_and(|segment| {
            batch.first_ms.saturating_sub(segment.begun_ms) >= self.retention.age_ms / SEGMENTS
        });
        if writer.file.is_none() || self.room(writer) == 0 || stale {
            self.begin_segment(writer, batch.first_ms)?;
        }
        let (Some(file), Some(segment)) = (&mut writer.file, writer.segments.back_mut()) else {
            return Ok(());
        };
        if let Err(error) = file.write_all(&batch.wire) {
            // Half a line would run into the next one.
            file.set_len(segment.bytes).ok();
            return Err(error);
        }
        let bytes = batch.wire.len() as u64;
        segment.bytes += bytes;
        segment.last_ms = batch.last_ms;
        writer.guest_seq = batch.guest_seq;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.used.fetch_add(bytes, Ordering::Relaxed);
        self.lines.fetch_add(batch.lines, Ordering::Relaxed);
        self.dropped.fetch_add(batch.dropped, Ordering::Relaxed);
        self.last.send_modify(|last| *last += batch.lines);
        *batch = Batch { guest_seq: batch.guest_seq, ..Batch::default() };
        Ok(())
    }

    fn begin_segment(&self, writer: &mut Writer, now_ms: u64) -> io::Result<()> {
        let first_seq = self.last_seq() + 1;
        let (file, bytes) = segment::open(&segment::path(&self.folder, first_seq))?;
        writer.file = Some(file);
        // A file of that name is one that was begun and never written to.
        writer.segments.retain(|segment| segment.first_seq != first_seq);
        writer.segments.push_back(Segment { first_seq, bytes, begun_ms: now_ms, last_ms: now_ms });
        let room = self.retention.instance_bytes.saturating_sub(self.retention.segment_bytes());
        while writer.segments.len() > 1 && self.bytes.load(Ordering::Relaxed) > room {
            self.drop_front(writer)?;
        }
        Ok(())
    }

    fn drop_front(&self, writer: &mut Writer) -> io::Result<()> {
        let Some(front) = writer.segments.front().copied() else { return Ok(()) };
        match fs::remove_file(segment::path(&self.folder, front.first_seq)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        writer.segments.pop_front();
        let next = writer.segments.front().map_or(self.last_seq() + 1, |segment| segment.first_seq);
        self.evicted.fetch_add(next.saturating_sub(front.first_seq), Ordering::Relaxed);
        self.bytes.fetch_sub(front.bytes, Ordering::Relaxed);
        self.used.fetch_sub(front.bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Removes the oldest segment. The last line's number must not be forgotten, so of the only segment a remark stays.
    pub(super) fn drop_oldest(&self, why: &str) -> Result<(), LogError> {
        let failed = |source| LogError::access(&self.folder, "shortened", source);
        let mut writer = self.lock();
        match writer.segments.len() {
            0 => return Ok(()),
            1 => {
                let first = writer.segments.front().map_or(0, |segment| segment.first_seq);
                let lines = (self.last_seq() + 1).saturating_sub(first);
                self.begin_segment(&mut writer, now_ms()).map_err(failed)?;
                let remark = Line::dropped(now_ms(), lines, why);
                self.append_to(&mut writer, &[remark], false)?;
                // They were stored, and are counted as evicted.
                self.dropped.fetch_sub(lines, Ordering::Relaxed);
            }
            _ => {}
        }
        self.drop_front(&mut writer).map_err(failed)
    }

    /// Removes what is older than the retention says.
    pub(super) fn drop_older(&self, now_ms: u64) -> Result<(), LogError> {
        let too_old = |segment: &Segment| segment.last_ms.saturating_add(self.retention.age_ms) < now_ms;
        loop {
            let segments = self.segments();
            let Some(oldest) = segments.first().filter(|segment| too_old(segment)) else { return Ok(()) };
            if segments.len() == 1 && oldest.first_seq == self.last_seq() && self.is_remark(oldest)? {
                return Ok(());
            }
            self.drop_oldest("they were older than is kept here")?;
        }
    }
}

impl Ring {
    /// Whether a segment ends with the remark that lines are missing.
    fn is_remark(&self, segment: &Segment) -> Result<bool, LogError> {
        let path = segment::path(&self.folder, segment.first_seq);
        let last = segment::last(&path).map_err(|source| LogError::access(&path, "read", source))?;
        Ok(last.is_some_and(|line| line.dropped > 0))
    }
}

impl Writer {
    fn redact(&mut self, line: &Line) -> Vec<u8> {
        let [out, err, system] = &mut self.carries;
        let carry = match line.stream {
            LogStream::Stdout => out,
            LogStream::Stderr => err,
            LogStream::System => system,
        };
        match &self.known {
            Known::Nothing => line.bytes.clone(),
            Known::Values(redactor) => redactor.redact(carry, &line.bytes, line.continues),
            Known::TooMuch => REDACTED.to_vec(),
        }
    }
}
