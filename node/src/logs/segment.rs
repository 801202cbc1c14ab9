//! A ring's files: lines as JSON, one a line, in segments that are named by the number of their first line.
//!
//! Each line begins with its number, so that a reader skips lines without parsing them. A line that cannot be read is
//! passed over, never fatal (I14).

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use data_encoding::BASE64;
use holdfast_model::agent::LogStream;
use holdfast_model::logs::LogEntry;
use serde::{Deserialize, Serialize};

use super::ring::Line;

/// The longest stored line, in bytes: a longer one is not ours. A guest's line has at most 16 KiB, and JSON makes
/// six bytes of one at worst.
const STORED_BYTES_MAX: usize = 128 * 1024;

/// How each stored line begins.
const SEQ_KEY: &str = "{\"seq\":";

const SUFFIX: &str = ".jsonl";

/// A line on disk. The order of the fields is the order of the bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) seq: u64,
    pub(super) time_ms: u64,
    stream: LogStream,
    pub(super) guest_seq: u64,
    text: String,
    /// The bytes, where they are no UTF-8; then there is no text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base64: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    continues: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(super) dropped: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl Stored {
    pub(super) fn new(seq: u64, guest_seq: u64, line: &Line, bytes: Vec<u8>) -> Self {
        let (text, base64) = match String::from_utf8(bytes) {
            Ok(text) => (text, None),
            Err(error) => (String::new(), Some(BASE64.encode(error.as_bytes()))),
        };
        Self {
            seq,
            time_ms: line.time_ms,
            stream: line.stream,
            guest_seq,
            text,
            base64,
            continues: line.continues,
            dropped: line.dropped,
        }
    }

    /// Appends it as it is on disk.
    pub(super) fn encode(&self, wire: &mut Vec<u8>) -> io::Result<()> {
        serde_json::to_writer(&mut *wire, self)?;
        wire.push(b'\n');
        Ok(())
    }

    pub(super) fn into_entry(self) -> LogEntry {
        let Self { seq, time_ms, stream, guest_seq: _, mut text, base64, continues, dropped } = self;
        if let Some(bytes) = base64.as_ref().and_then(|base64| BASE64.decode(base64.as_bytes()).ok()) {
            text = String::from_utf8_lossy(&bytes).into_owned();
        }
        LogEntry { seq, time_ms, stream, text, base64, continues, dropped }
    }
}

/// One file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The number of its first line.
    pub(super) first_seq: u64,
    pub(super) bytes: u64,
    /// When it was begun.
    pub(super) begun_ms: u64,
    /// When its last line came.
    pub(super) last_ms: u64,
}

/// A segment's file.
pub(super) fn path(folder: &Path, first_seq: u64) -> PathBuf {
    folder.join(format!("{first_seq:020}{SUFFIX}"))
}

/// The segments of a folder, oldest first. Files of a build that had but two of them are renamed.
pub(super) fn list(folder: &Path) -> io::Result<Vec<Segment>> {
    for old in ["older.jsonl", "newer.jsonl"] {
        let from = folder.join(old);
        let first = match File::open(&from) {
            Ok(file) => Lines::new(file).next()?.and_then(|line| seq_of(&line)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        match first {
            Some(first) => fs::rename(&from, path(folder, first))?,
            None => fs::remove_file(&from)?,
        }
    }
    let mut segments = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let first_seq = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)?.parse().ok());
        let Some(first_seq) = first_seq else { continue };
        let mut file = File::open(entry.path())?;
        let bytes = file.metadata()?.len();
        let first = Lines::new(file.try_clone()?).next()?;
        let begun_ms = first.and_then(|line| serde_json::from_slice::<Stored>(&line).ok());
        let last_ms = tail(&mut file)?.1.map(|stored| stored.time_ms);
        let begun_ms = begun_ms.map_or(0, |stored| stored.time_ms);
        segments.push(Segment { first_seq, bytes, begun_ms, last_ms: last_ms.unwrap_or(begun_ms) });
    }
    segments.sort_by_key(|segment| segment.first_seq);
    Ok(segments)
}

/// Opens a segment for appending, or makes it, and cuts off a torn last line; answers with its size.
pub(super) fn open(path: &Path) -> io::Result<(File, u64)> {
    let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
    let (whole, _) = tail(&mut file)?;
    if whole < file.metadata()?.len() {
        file.set_len(whole)?;
    }
    Ok((file, whole))
}

/// The last line of a segment that can be read.
pub(super) fn last(path: &Path) -> io::Result<Option<Stored>> {
    Ok(tail(&mut File::open(path)?)?.1)
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

/// The lines of a segment, undecoded.
pub(super) struct Lines {
    reader: BufReader<File>,
    line: Vec<u8>,
}

impl Lines {
    pub(super) fn new(file: File) -> Self {
        Self { reader: BufReader::with_capacity(64 * 1024, file), line: Vec::new() }
    }

    /// The next line; what is too long to be a line of ours comes in pieces that do not parse.
    pub(super) fn next(&mut self) -> io::Result<Option<Vec<u8>>> {
        self.line.clear();
        (&mut self.reader).take(STORED_BYTES_MAX as u64).read_until(b'\n', &mut self.line)?;
        Ok((!self.line.is_empty()).then(|| std::mem::take(&mut self.line)))
    }
}

/// The number that a stored line begins with.
pub(super) fn seq_of(line: &[u8]) -> Option<u64> {
    let digits = line.strip_prefix(SEQ_KEY.as_bytes())?;
    let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(digits.get(..end)?).ok()?.parse().ok()
}
