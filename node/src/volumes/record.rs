//! What a node knows of a volume's disk, in a file beside it: replaced whole, and durable before what follows from it.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

/// The file.
pub(super) const NAME: &str = "state.json";
/// It, while it is being written.
pub(super) const FRESH: &str = "state.json.new";
/// The form that this release writes.
pub(super) const FORM: u32 = 1;
/// The longest file that is read.
const BYTES_MAX: u64 = 4_096;

/// What is known of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// [`FORM`].
    pub(super) form: u32,
    /// The volume's size.
    pub(super) size_mib: u64,
    /// The latest attachment that was seen.
    pub(super) generation: u64,
    /// Whether it has a file system. From then on it is never formatted.
    pub(super) made: bool,
}

/// The record in a volume's folder; `None` if there is none.
pub(super) fn read(folder: BorrowedFd<'_>) -> io::Result<Option<Record>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(folder, NAME, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text)?;
    let record: Record = serde_json::from_slice(&text)?;
    if record.form != FORM {
        return Err(io::Error::other(format!(
            "it has form {}, which this release does not know",
            record.form
        )));
    }
    Ok(Some(record))
}

/// Replaces it. Durable when this returns.
pub(super) fn write(folder: BorrowedFd<'_>, record: &Record) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(folder, FRESH, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    rustix::fs::renameat(folder, FRESH, folder, NAME)?;
    Ok(rustix::fs::fsync(folder)?)
}
