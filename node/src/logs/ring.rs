//! One instance's log: two segment files, of which the older is dropped when the newer is full.
//!
//! Assumed of the disk: a write survives the end of this process; after a power loss the newest lines may be
//! missing or torn. Each line is one JSON object ([`Stored`]) that begins with its number, so that a reader can skip
//! lines without parsing them. Opening cuts off a torn last line and goes on with the numbers after the last whole
//! one. A line that cannot be read is skipped, never fatal (I14).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use holdfast_model::agent::{LogLine, LogStream};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

/// The size at which a segment is full, in bytes; it may be exceeded by one batch of lines.
pub const SEGMENT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Bytes of one answer at most, as stored: it must fit a request.
const ANSWER_BYTES_MAX: usize = 512 * 1024;

/// The longest stored line, in bytes: a longer one is not ours. A guest's line has at most 16 KiB, and JSON makes
/// six bytes of one at worst.
const STORED_BYTES_MAX: usize = 128 * 1024;

/// How each stored line begins.
const SEQ_KEY: &str = "{\"seq\":";

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
    /// The line.
    pub text: String,
}

/// A line on disk. The order of the fields is the order of the bytes.
#[derive(Serialize, Deserialize)]
struct Stored {
    seq: u64,
    time_ms: u64,
    stream: LogStream,
    guest_seq: u64,
    text: String,
}

/// One instance's log.
#[derive(Debug)]
pub struct Ring {
    folder: PathBuf,
    writer: Mutex<Writer>,
    /// The number of the last line.
    last: watch::Sender<u64>,
}

#[derive(Debug)]
struct Writer {
    file: File,
    bytes: u64,
    guest_seq: u64,
}

impl Ring {
    /// Opens the ring in this folder, or makes it.
    pub fn open(folder: PathBuf) -> Result<Self, LogError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(|source| LogError::access(&folder, "created", source))?;
        let newer = newer(&folder);
        let opened = open_segment(&newer).map_err(|source| LogError::access(&newer, "opened", source))?;
        let (file, bytes, last) = opened;
        let last = match last {
            Some(last) => Some(last),
            None => last_line(&older(&folder))?,
        };
        let (seq, guest_seq) = last.map_or((0, 0), |line| (line.seq, line.guest_seq));
        let writer = Mutex::new(Writer { file, bytes, guest_seq });
        Ok(Self { folder, writer, last: watch::Sender::new(seq) })
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

    /// A new life of the guest begins, which counts its lines from 1 again; the remark is stored as the platform's.
    pub fn begin_life(&self, time_ms: u64, remark: &str) -> Result<(), LogError> {
        self.append_to(
            &mut self.lock(),
            &[Line { time_ms, stream: LogStream::System, guest_seq: 0, text: remark.to_owned() }],
            true,
        )
    }

    /// Appends lines in one write and numbers them. They survive the end of this process when this returns.
    pub fn append(&self, lines: &[Line]) -> Result<(), LogError> {
        self.append_to(&mut self.lock(), lines, false)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append_to(&self, writer: &mut Writer, lines: &[Line], new_life: bool) -> Result<(), LogError> {
        let path = newer(&self.folder);
        let failed = |source| LogError::access(&path, "written", source);
        if writer.bytes >= SEGMENT_BYTES_MAX {
            fs::rename(&path, older(&self.folder)).map_err(failed)?;
            (writer.file, writer.bytes, _) = open_segment(&path).map_err(failed)?;
        }
        let mut seq = self.last_seq();
        let mut guest_seq = if new_life { 0 } else { writer.guest_seq };
        let mut wire = Vec::with_capacity(lines.iter().map(|line| line.text.len() + 96).sum());
        for line in lines {
            seq += 1;
            // The platform's remarks carry the guest's last number on, so that the last line always knows it.
            guest_seq = guest_seq.max(line.guest_seq);
            let stored = Stored {
                seq,
                time_ms: line.time_ms,
                stream: line.stream,
                guest_seq,
                text: line.text.clone(),
            };
            serde_json::to_writer(&mut wire, &stored).map_err(|error| failed(error.into()))?;
            wire.push(b'\n');
        }
        if let Err(source) = writer.file.write_all(&wire) {
            // Half a line would run into the next one.
            writer.file.set_len(writer.bytes).ok();
            return Err(failed(source));
        }
        writer.bytes += wire.len() as u64;
        writer.guest_seq = guest_seq;
        self.last.send_replace(seq);
        Ok(())
    }

    /// The first `limit` lines after number `after`, or the last `limit`; fewer where they are long.
    pub fn read(&self, after: Option<u64>, limit: usize) -> Result<Vec<LogLine>, LogError> {
        let last = self.last_seq();
        let after = after.unwrap_or_else(|| last.saturating_sub(limit as u64));
        // Opened under the lock, so that no rotation happens between the two.
        let segments = {
            let _writer = self.lock();
            [older(&self.folder), newer(&self.folder)].map(|path| (File::open(&path), path))
        };
        let mut lines = Vec::new();
        let mut bytes = 0;
        for (file, path) in segments {
            let file = match file {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(source) => return Err(LogError::access(&path, "opened", source)),
            };
            let mut reader = BufReader::with_capacity(64 * 1024, file);
            while lines.len() < limit && bytes < ANSWER_BYTES_MAX {
                let text = next_line(&mut reader).map_err(|s| LogError::access(&path, "read", s))?;
                let Some(text) = text else { break };
                if seq_of(&text).is_none_or(|seq| seq <= after || seq > last) {
                    continue;
                }
                let Ok(stored) = serde_json::from_slice::<Stored>(&text) else { continue };
                bytes += text.len();
                lines.push(LogLine {
                    seq: stored.seq,
                    time_ms: stored.time_ms,
                    stream: stored.stream,
                    text: stored.text,
                });
            }
        }
        Ok(lines)
    }
}

fn newer(folder: &Path) -> PathBuf {
    folder.join("newer.jsonl")
}

fn older(folder: &Path) -> PathBuf {
    folder.join("older.jsonl")
}

/// Opens a segment for appending and cuts off a torn last line; answers with its size and its last line.
fn open_segment(path: &Path) -> io::Result<(File, u64, Option<Stored>)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let (whole, last) = tail(&mut file)?;
    if whole < file.metadata()?.len() {
        file.set_len(whole)?;
    }
    Ok((file, whole, last))
}

fn last_line(path: &Path) -> Result<Option<Stored>, LogError> {
    let read = |path: &Path| -> io::Result<Option<Stored>> { Ok(tail(&mut File::open(path)?)?.1) };
    match read(path) {
        Ok(last) => Ok(last),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(LogError::access(path, "read", source)),
    }
}

/// How much of a segment is whole lines, and the last of them that can be read.
fn tail(file: &mut File) -> io::Result<(u64, Option<Stored>)> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(2 * STORED_BYTES_MAX as u64);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(2 * STORED_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let lines = bytes.get(..whole).unwrap_or_default();
    let last = lines.rsplit(|byte| *byte == b'\n').find_map(|line| serde_json::from_slice(line).ok());
    Ok((from + whole as u64, last))
}

/// The next line without its end; what is too long to be a line of ours comes in pieces that do not parse.
fn next_line(reader: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader.take(STORED_BYTES_MAX as u64).read_until(b'\n', &mut line)?;
    Ok((!line.is_empty()).then_some(line))
}

fn seq_of(line: &[u8]) -> Option<u64> {
    let digits = line.strip_prefix(SEQ_KEY.as_bytes())?;
    let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(digits.get(..end)?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn line(guest_seq: u64, text: impl Into<String>) -> Line {
        Line { time_ms: 1_700_000_000_000, stream: LogStream::Stderr, guest_seq, text: text.into() }
    }

    fn texts(lines: &[LogLine]) -> Vec<&str> {
        lines.iter().map(|line| line.text.as_str()).collect()
    }

    #[test]
    fn i05_lines_and_numbers_survive_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ring");
        let ring = Ring::open(path.clone()).unwrap();
        ring.begin_life(1, "started").unwrap();
        ring.append(&[line(1, "one"), line(2, "two")]).unwrap();
        drop(ring);
        let ring = Ring::open(path.clone()).unwrap();
        assert_eq!((ring.last_seq(), ring.guest_seq()), (3, 2));
        ring.append(&[line(0, "a remark"), line(5, "five")]).unwrap();
        assert_eq!(texts(&ring.read(Some(2), 10).unwrap()), ["two", "a remark", "five"]);
        assert_eq!(texts(&ring.read(None, 2).unwrap()), ["a remark", "five"]);
        ring.begin_life(2, "started again").unwrap();
        drop(ring);
        assert_eq!(Ring::open(path).unwrap().guest_seq(), 0);
    }

    #[test]
    fn it_stays_bounded_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let ring = Ring::open(folder.path().join("ring")).unwrap();
        let text = "x".repeat(16 * 1024);
        for guest_seq in 1..=1_500 {
            ring.append(&[line(guest_seq, text.clone())]).unwrap();
        }
        let bytes: u64 = fs::read_dir(folder.path().join("ring"))
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(bytes > SEGMENT_BYTES_MAX && bytes <= 2 * (SEGMENT_BYTES_MAX + 17 * 1024), "{bytes}");
        let page = ring.read(Some(0), 1_000).unwrap();
        assert!(page.len() < 1_000 && page.len() * text.len() >= ANSWER_BYTES_MAX - text.len());
        assert!(page[0].seq > 900, "the oldest lines are gone: {}", page[0].seq);
        assert_eq!(ring.read(None, 1).unwrap()[0].seq, 1_500);
        assert_eq!(ring.read(Some(1_500), 1).unwrap(), []);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn i14_damage_is_skipped_and_new_lines_go_on(
            texts in prop::collection::vec("\\PC{0,40}", 1..20),
            cut in 0..2_000u64,
            garbage in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("ring");
            let ring = Ring::open(path.clone()).unwrap();
            for text in &texts {
                ring.append(&[line(0, text.clone())]).unwrap();
            }
            drop(ring);
            let mut file = OpenOptions::new().append(true).open(newer(&path)).unwrap();
            let length = file.metadata().unwrap().len();
            file.set_len(length.saturating_sub(cut)).unwrap();
            file.write_all(&garbage).unwrap();
            drop(file);
            let ring = Ring::open(path).unwrap();
            let before = ring.last_seq();
            prop_assert!(before <= texts.len() as u64);
            ring.append(&[line(0, "after the damage")]).unwrap();
            let lines = ring.read(None, 1_000).unwrap();
            let last = lines.last().unwrap();
            prop_assert_eq!((last.seq, last.text.as_str()), (before + 1, "after the damage"));
            for kept in &lines[..lines.len() - 1] {
                prop_assert_eq!(&kept.text, &texts[usize::try_from(kept.seq).unwrap() - 1]);
            }
        }
    }
}
