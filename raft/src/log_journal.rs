//! The journal of the log: where entries become durable first.
//!
//! A commit of redb's costs the same few hundred microseconds for one entry as for a hundred. So the writer puts entries into
//! this file, one frame and one sync for all that wait, and takes them over into `log.redb` when the file is full or when
//! anything else is to be written ([`crate::log_writer`]). The file has a fixed length and is written from its beginning
//! again after that; frames of an earlier time are told apart by their generation, which `log.redb` knows.
//!
//! Keeps I2: a frame counts only when it is whole, and a frame that should be whole and is not is never taken for the end.
//! It is read once, at the start, and knows nothing of what an entry means. Layout: `docs/formats/raft-log.md`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use redb::StorageBackend;
use redb::backends::FileBackend;
use serde::{Deserialize, Serialize};

use crate::log_store::LogStoreError;

/// Bytes of the file. What it holds is taken over at once, and whoever writes meanwhile waits: at 1 MiB some milliseconds.
pub(crate) const JOURNAL_BYTES: u64 = 1024 * 1024;
/// Frames begin at multiples of this.
const ALIGN_BYTES: usize = 64;
/// First bytes of a frame.
const MAGIC: [u8; 4] = *b"HFJ1";
const CHECKSUM_BYTES: usize = 16;
/// Bytes of the header's own checksum: what only looks like a frame costs no checksum of what would be its body.
const HEADER_CHECKSUM_BYTES: usize = 8;
/// Magic, length of the body, generation, checksum of these, checksum of all.
const HEADER_BYTES: usize = 4 + 4 + 8 + HEADER_CHECKSUM_BYTES + CHECKSUM_BYTES;
/// Bytes of a key.
const KEY_BYTES: usize = 32;

/// What `log.redb` says of its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JournalRow {
    /// Drawn for the file. Checksums need it, so that no tenant can put bytes into a command that pass for a frame.
    pub(crate) key: [u8; KEY_BYTES],
    /// Frames of this generation are not in `log.redb`; those of earlier ones are.
    pub(crate) generation: u64,
    /// False after the log was closed in order: then nothing lies in the journal.
    pub(crate) open: bool,
    /// Length of the file.
    pub(crate) bytes: u64,
}

/// Where a journal lies.
pub(crate) enum JournalPlace {
    /// In a file.
    File(PathBuf),
    /// On any storage, in the length that it has.
    Storage(Box<dyn StorageBackend>),
}

impl JournalPlace {
    /// Beside the log.
    pub(crate) fn beside(log: &Path) -> Self {
        JournalPlace::File(log.with_extension("journal"))
    }

    /// Opens it, and says how long it is. One that may hold entries must be there in its whole length; any other is made, and
    /// has all its blocks: a sync then has no length and no place to write.
    fn open(self, row: Option<&JournalRow>) -> Result<(Box<dyn StorageBackend>, u64), LogStoreError> {
        let in_use = row.is_some_and(|row| row.open);
        let (storage, wanted) = match self {
            JournalPlace::Storage(storage) => {
                let bytes = storage.len().map_err(LogStoreError::Journal)?;
                (storage, if bytes == 0 { JOURNAL_BYTES } else { bytes })
            }
            JournalPlace::File(path) => (open_file(&path, in_use)?, JOURNAL_BYTES),
        };
        let found = storage.len().map_err(LogStoreError::Journal)?;
        if let Some(row) = row.filter(|row| row.open) {
            return if found < row.bytes {
                Err(LogStoreError::JournalLost)
            } else {
                Ok((storage, row.bytes))
            };
        }
        if found < wanted {
            fill(&*storage, wanted).map_err(LogStoreError::Journal)?;
        }
        Ok((storage, wanted))
    }
}

fn open_file(path: &Path, in_use: bool) -> Result<Box<dyn StorageBackend>, LogStoreError> {
    let mut options = fs::OpenOptions::new();
    options.read(true).write(true).create(!in_use).truncate(false);
    let file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if in_use => LogStoreError::JournalLost,
        _ => LogStoreError::Journal(error),
    })?;
    if let Some(folder) = path.parent().filter(|_| !in_use) {
        let folder = fs::File::open(folder).map_err(LogStoreError::Journal)?;
        folder.sync_all().map_err(LogStoreError::Journal)?;
    }
    Ok(Box::new(FileBackend::new(file)?))
}

fn fill(storage: &dyn StorageBackend, bytes: u64) -> io::Result<()> {
    storage.set_len(bytes)?;
    storage.write(0, &vec![0; bytes as usize])?;
    storage.sync_data()
}

/// A frame, as it was written.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Index and record of each of its entries.
    pub(crate) entries: Vec<(u64, Vec<u8>)>,
    /// The record of the committed log id, if it went along.
    pub(crate) committed: Option<Vec<u8>>,
}

/// The journal.
pub(crate) struct Journal {
    storage: Box<dyn StorageBackend>,
    row: JournalRow,
    capacity: usize,
    /// Where the next frame begins.
    next: usize,
    buffer: Vec<u8>,
}

impl Journal {
    /// Opens the journal of a log, and reads what lies in it and not in the log.
    pub(crate) fn open(
        place: JournalPlace,
        row: Option<JournalRow>,
    ) -> Result<(Self, Vec<Frame>), LogStoreError> {
        let (storage, bytes) = place.open(row.as_ref())?;
        let row =
            row.unwrap_or_else(|| JournalRow { key: rand::random(), generation: 0, open: false, bytes });
        let row = JournalRow { bytes, ..row };
        let mut journal = Journal { storage, row, capacity: bytes as usize, next: 0, buffer: Vec::new() };
        let frames = journal.frames()?;
        journal.row.open = true;
        Ok((journal, frames))
    }

    /// The row that belongs to a `log.redb` that holds everything that lies here: stored in the same transaction.
    pub(crate) fn next_row(&self, open: bool) -> JournalRow {
        JournalRow { generation: self.row.generation + 1, open, ..self.row }
    }

    /// Begins anew, after that transaction.
    pub(crate) fn begin(&mut self, row: JournalRow) {
        self.row = row;
        self.next = 0;
    }

    /// Writes a frame and syncs it. False, and nothing was written, when there is no room for it.
    pub(crate) fn append(
        &mut self,
        entries: &[(u64, Vec<u8>)],
        committed: Option<&[u8]>,
    ) -> Result<bool, LogStoreError> {
        let Some((first, _)) = entries.first() else { return Ok(false) };
        let parts = || {
            [committed.unwrap_or_default()].into_iter().chain(entries.iter().map(|(_, record)| &record[..]))
        };
        let body: usize = 8 + parts().map(|part| 4 + part.len()).sum::<usize>();
        let end = (self.next + HEADER_BYTES + body).next_multiple_of(ALIGN_BYTES);
        if end > self.capacity {
            return Ok(false);
        }
        let Ok(length) = u32::try_from(body) else { return Ok(false) };
        self.buffer.clear();
        self.buffer.extend_from_slice(&MAGIC);
        self.buffer.extend_from_slice(&length.to_le_bytes());
        self.buffer.extend_from_slice(&self.row.generation.to_le_bytes());
        let checksum: [u8; HEADER_CHECKSUM_BYTES] =
            self.checksum(self.next, self.row.generation, &length.to_le_bytes());
        self.buffer.extend_from_slice(&checksum);
        self.buffer.extend_from_slice(&[0; CHECKSUM_BYTES]);
        self.buffer.extend_from_slice(&first.to_le_bytes());
        for part in parts() {
            self.buffer.extend_from_slice(&(part.len() as u32).to_le_bytes());
            self.buffer.extend_from_slice(part);
        }
        let checksum: [u8; CHECKSUM_BYTES] =
            self.checksum(self.next, self.row.generation, &self.buffer[HEADER_BYTES..]);
        self.buffer[HEADER_BYTES - CHECKSUM_BYTES..HEADER_BYTES].copy_from_slice(&checksum);
        self.storage.write(self.next as u64, &self.buffer).map_err(LogStoreError::Journal)?;
        self.storage.sync_data().map_err(LogStoreError::Journal)?;
        self.next = end;
        Ok(true)
    }

    fn checksum<const BYTES: usize>(&self, at: usize, generation: u64, bytes: &[u8]) -> [u8; BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.row.key);
        hasher.update(&(at as u64).to_le_bytes());
        hasher.update(&generation.to_le_bytes());
        hasher.update(bytes);
        let mut checksum = [0; BYTES];
        hasher.finalize_xof().fill(&mut checksum);
        checksum
    }

    /// Every frame of this generation, in order; of a log that was closed there is none. Each was synced before the next was
    /// begun, so only the last may be torn: a whole frame after one that is not shows that something rotted. So does one of
    /// a later generation, or any in a closed log's: then it is `log.redb` that went back.
    fn frames(&self) -> Result<Vec<Frame>, LogStoreError> {
        let mut bytes = vec![0; self.capacity];
        self.storage.read(0, &mut bytes).map_err(LogStoreError::Journal)?;
        let mut frames = Vec::new();
        let mut at = 0;
        while self.row.open
            && let Some((generation, body, end)) = self.whole_frame(&bytes, at)
            && generation == self.row.generation
        {
            frames.push(unpack(body).ok_or(LogStoreError::JournalRotten { offset: at as u64 })?);
            at = end;
        }
        let stray = (at..self.capacity).step_by(ALIGN_BYTES).find(|later| {
            self.whole_frame(&bytes, *later).is_some_and(|(generation, ..)| generation >= self.row.generation)
        });
        match stray {
            None => Ok(frames),
            Some(_) => Err(LogStoreError::JournalRotten { offset: at as u64 }),
        }
    }

    /// Generation, body and end of the frame that begins here, if one does and is whole.
    fn whole_frame<'a>(&self, bytes: &'a [u8], at: usize) -> Option<(u64, &'a [u8], usize)> {
        let (magic, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
        let (length, rest) = rest.split_first_chunk::<4>()?;
        let (generation, rest) = rest.split_first_chunk::<8>()?;
        let (header_checksum, rest) = rest.split_first_chunk::<HEADER_CHECKSUM_BYTES>()?;
        let (checksum, rest) = rest.split_first_chunk::<CHECKSUM_BYTES>()?;
        let generation = u64::from_le_bytes(*generation);
        if *magic != MAGIC || self.checksum(at, generation, length) != *header_checksum {
            return None;
        }
        let length = u32::from_le_bytes(*length) as usize;
        let body = rest.get(..length)?;
        let end = (at + HEADER_BYTES + length).next_multiple_of(ALIGN_BYTES);
        (self.checksum(at, generation, body) == *checksum).then_some((generation, body, end))
    }
}

/// First index, then each part after its length: the committed log id's record, which may be empty, and the entries'.
fn unpack(body: &[u8]) -> Option<Frame> {
    let (first, mut rest) = body.split_first_chunk::<8>()?;
    let mut parts = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let (part, after) = after.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        parts.push(part.to_vec());
        rest = after;
    }
    let mut parts = rest.is_empty().then_some(parts)?.into_iter();
    let committed = parts.next().filter(|record| !record.is_empty());
    Some(Frame { entries: (u64::from_le_bytes(*first)..).zip(parts).collect(), committed })
}

#[cfg(test)]
mod tests {
    use holdfast_faulty_disk::Disk;

    use super::*;

    fn open(disk: &Disk, row: Option<JournalRow>) -> Result<(Journal, Vec<Frame>), LogStoreError> {
        Journal::open(JournalPlace::Storage(Box::new(disk.clone())), row)
    }

    /// A journal in use with three frames of two entries, and what it was opened with.
    fn written(disk: &Disk) -> JournalRow {
        let (mut journal, found) = open(disk, None).unwrap();
        assert!(found.is_empty());
        let row = journal.next_row(true);
        journal.begin(row);
        for first in [7, 9, 11] {
            assert!(journal.append(&entries(first), (first > 7).then_some(b"committed")).unwrap());
        }
        row
    }

    fn entries(first: u64) -> Vec<(u64, Vec<u8>)> {
        (first..first + 2).map(|index| (index, format!("record {index}").into_bytes())).collect()
    }

    #[test]
    fn frames_come_back_in_order_with_what_went_along() {
        let disk = Disk::default();
        let row = written(&disk);
        let (_, found) = open(&Disk::of(disk.image().synced()), Some(row)).unwrap();
        let committed = [None, Some(b"committed".to_vec()), Some(b"committed".to_vec())];
        let expected = [7, 9, 11].into_iter().zip(committed);
        let expected = expected.map(|(first, committed)| Frame { entries: entries(first), committed });
        assert_eq!(found, expected.collect::<Vec<_>>());
        // After they were taken over, they are of an earlier time.
        let later = JournalRow { generation: row.generation + 1, ..row };
        assert_eq!(open(&disk, Some(later)).unwrap().1, []);
    }

    #[test]
    fn i02_a_frame_that_rotted_before_a_whole_one_is_not_taken_for_the_end() {
        let disk = Disk::default();
        let row = written(&disk);
        let frame = (HEADER_BYTES + 8 + 3 * 4 + 2 * 8).next_multiple_of(ALIGN_BYTES) as u64;
        for (at, torn) in [(0, false), (frame, false), (2 * frame, true)] {
            let copy = Disk::of(disk.current());
            copy.flip_bit(at + HEADER_BYTES as u64 + 2, 3);
            match open(&copy, Some(row)) {
                // The newest frame may as well be torn, and was then acknowledged to nobody.
                Ok((_, found)) => assert!(torn && found.len() == 2, "{at}: {found:?}"),
                Err(error) => {
                    assert!(!torn && matches!(error, LogStoreError::JournalRotten { offset } if offset == at))
                }
            }
        }
    }

    #[test]
    fn i02_a_log_that_is_older_than_its_journal_is_noticed() {
        let disk = Disk::default();
        let row = written(&disk);
        let older = JournalRow { generation: row.generation - 1, open: true, ..row };
        assert!(matches!(open(&disk, Some(older)), Err(LogStoreError::JournalRotten { offset: 0 })));
    }

    /// The commit by which a log was closed, found again: after it, nothing lay in the journal.
    #[test]
    fn i02_a_closed_log_that_is_older_than_its_journal_is_noticed() {
        let disk = Disk::default();
        let row = written(&disk);
        let before = disk.current();
        for generation in [row.generation - 1, row.generation] {
            let older = JournalRow { generation, open: false, ..row };
            assert!(matches!(open(&disk, Some(older)), Err(LogStoreError::JournalRotten { offset: 0 })));
        }
        assert_eq!(disk.current(), before, "what shows it is gone");
        // A log that was closed after them took them over.
        let closed = JournalRow { generation: row.generation + 1, open: false, ..row };
        assert_eq!(open(&disk, Some(closed)).unwrap().1, []);
    }

    #[test]
    fn i02_a_journal_that_is_gone_or_was_cut_is_not_made_anew() {
        let disk = Disk::default();
        let row = written(&disk);
        for bytes in [0, ALIGN_BYTES, JOURNAL_BYTES as usize - 1] {
            let cut = Disk::of(disk.current()[..bytes].to_vec());
            assert!(matches!(open(&cut, Some(row)), Err(LogStoreError::JournalLost)), "{bytes} bytes");
            assert_eq!(cut.bytes(), bytes as u64);
        }
    }

    /// A file in its place that is as long as the disk is not read into memory.
    #[test]
    fn of_a_journal_that_is_too_long_its_own_bytes_are_read() {
        let disk = Disk::default();
        let row = written(&disk);
        disk.set_len(2 * JOURNAL_BYTES).unwrap();
        let (journal, found) = open(&disk, Some(row)).unwrap();
        assert_eq!((journal.capacity as u64, found.len()), (JOURNAL_BYTES, 3));
    }

    /// The length is the journal's own: a build that makes longer ones opens it all the same.
    #[test]
    fn a_journal_in_use_keeps_its_length() {
        let disk = Disk::of(vec![0; 1024]);
        let (mut journal, _) = open(&disk, None).unwrap();
        let row = journal.next_row(true);
        journal.begin(row);
        assert!(journal.append(&entries(7), None).unwrap());
        assert_eq!(open(&disk, Some(row)).unwrap().1.len(), 1);
    }

    #[test]
    fn i14_bytes_of_a_tenant_that_look_like_a_frame_are_none() {
        let forged = Disk::default();
        let (mut journal, _) = open(&forged, None).unwrap();
        journal.begin(journal.next_row(true));
        journal.append(&entries(7), None).unwrap();
        // The same generation and place, and another key.
        let (mut own, _) = open(&Disk::default(), None).unwrap();
        let row = own.next_row(true);
        own.begin(row);
        let (_, found) = open(&forged, Some(row)).unwrap();
        assert_eq!(found, []);
    }

    #[test]
    fn a_full_journal_takes_nothing_more() {
        let disk = Disk::of(vec![0; 1024]);
        let (mut journal, _) = open(&disk, None).unwrap();
        let record = |bytes| vec![(1, vec![0; bytes])];
        assert!(!journal.append(&record(1024), None).unwrap());
        assert!(journal.append(&record(500), None).unwrap());
        assert!(!journal.append(&record(500), None).unwrap());
        let row = journal.next_row(true);
        journal.begin(row);
        assert!(journal.append(&record(500), None).unwrap());
    }
}
