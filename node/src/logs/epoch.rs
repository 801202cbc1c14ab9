//! Which countings of lines a ring has had, so that a cursor of an earlier one is not taken for a place in this one.
//!
//! A line's number can only be given out twice when lines that had been given out are lost: with the disk, or when the
//! host loses power before it wrote them. Both are noticed when the ring is opened: the record is not there, or the host's
//! boot is another. Then another epoch begins behind the last line that is left. The record is durable before the epoch's
//! first line is written.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use holdfast_model::logs::LogCursor;
use serde::{Deserialize, Serialize};

/// Epochs that are remembered; a cursor of an older one begins with what there is.
const EPOCHS_MAX: usize = 16;

/// The largest record that is read, in bytes.
const RECORD_BYTES_MAX: u64 = 16 * 1024;

const FILE: &str = "epochs.json";

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Epochs {
    /// The boot of the host in which the last one began.
    boot_id: String,
    /// Oldest first, never empty.
    epochs: Vec<Epoch>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Epoch {
    id: u64,
    /// The last line before it.
    base: u64,
}

impl Epochs {
    /// The ring's record, brought up to this boot. `last` is the number of the last line that is left.
    pub(super) fn open(folder: &Path, boot_id: &str, last: u64) -> io::Result<Self> {
        let path = folder.join(FILE);
        // A record that cannot be read is one that is not there: no cursor may be taken for one of ours.
        let known = read(&path)?.filter(|record| !record.epochs.is_empty());
        let fresh = Epoch { id: rand::random::<u32>().into(), base: last };
        let record = match known {
            Some(record) if record.boot_id == boot_id => return Ok(record),
            Some(mut record) => {
                if record.epochs.len() >= EPOCHS_MAX {
                    record.epochs.remove(0);
                }
                record.epochs.push(fresh);
                Self { boot_id: boot_id.to_owned(), ..record }
            }
            // Lines without a record are of a build that kept none; nobody has a cursor behind them.
            None => Self { boot_id: boot_id.to_owned(), epochs: vec![fresh] },
        };
        record.write(&path)?;
        Ok(record)
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let text = serde_json::to_vec(self)?;
        let fresh = path.with_extension("json.new");
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&fresh, path)?;
        fs::File::open(path.parent().unwrap_or(path))?.sync_all()
    }

    /// The present one.
    pub(super) fn current(&self) -> u64 {
        self.epochs.last().map_or(0, |epoch| epoch.id)
    }

    /// The last line that whoever has this cursor was given and that still has that number.
    pub(super) fn known_to(&self, cursor: LogCursor) -> u64 {
        let Some(at) = self.epochs.iter().position(|epoch| epoch.id == cursor.epoch) else { return 0 };
        let later = self.epochs.get(at + 1..).unwrap_or_default();
        later.iter().fold(cursor.seq, |known, epoch| known.min(epoch.base))
    }
}

fn read(path: &Path) -> io::Result<Option<Epochs>> {
    let mut text = Vec::new();
    match fs::File::open(path) {
        Ok(file) => io::Read::read_to_end(&mut io::Read::take(file, RECORD_BYTES_MAX), &mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(serde_json::from_slice(&text).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_of_lines_that_were_lost_leads_to_the_last_one_that_was_not() {
        let folder = tempfile::tempdir().unwrap();
        let first = Epochs::open(folder.path(), "boot 1", 0).unwrap();
        assert_eq!(Epochs::open(folder.path(), "boot 1", 90).unwrap(), first, "a restart of the agent alone");
        let cursor = LogCursor { epoch: first.current(), seq: 120 };
        assert_eq!(first.known_to(cursor), 120);
        // The host lost power: 100 lines are left of 120.
        let second = Epochs::open(folder.path(), "boot 2", 100).unwrap();
        assert_ne!(second.current(), first.current());
        assert_eq!(second.known_to(cursor), 100);
        assert_eq!(second.known_to(LogCursor { seq: 40, ..cursor }), 40);
        let third = Epochs::open(folder.path(), "boot 3", 90).unwrap();
        assert_eq!(third.known_to(cursor), 90);
        assert_eq!(third.known_to(LogCursor { epoch: second.current(), seq: 130 }), 90);
        // Of a ring that is not there any more, or nonsense.
        assert_eq!(third.known_to(LogCursor { epoch: 1 << 40, seq: 7 }), 0);
        fs::write(folder.path().join(FILE), b"{").unwrap();
        assert_eq!(Epochs::open(folder.path(), "boot 3", 95).unwrap().known_to(cursor), 0);
        for boot in 4..40 {
            Epochs::open(folder.path(), &format!("boot {boot}"), 95).unwrap();
        }
        assert_eq!(Epochs::open(folder.path(), "boot 39", 0).unwrap().epochs.len(), EPOCHS_MAX);
    }
}
