//! The file in which checksums outlive a process: sealed as `HFSUMS01`, the length of the database file (8, little-endian),
//! then eight bytes a block.

use std::fs;
use std::io;
use std::path::Path;

use crate::sealed;

const MAGIC: &[u8; 8] = b"HFSUMS01";

/// The checksums, when they are whole and of a file of this length. Anything else counts as none: redb's own checks and
/// first readings are then what is believed.
pub(crate) fn read(path: &Path, length: u64) -> io::Result<Option<Vec<u64>>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(parse(&bytes, length))
}

fn parse(bytes: &[u8], length: u64) -> Option<Vec<u64>> {
    let sums = sealed::body(MAGIC, bytes)?.strip_prefix(&length.to_le_bytes())?;
    let (sums, rest) = sums.as_chunks::<8>();
    rest.is_empty().then(|| sums.iter().copied().map(u64::from_le_bytes).collect())
}

/// Leaves the checksums, durably.
pub(crate) fn write(path: &Path, length: u64, sums: &[u64]) -> io::Result<()> {
    let mut body = Vec::with_capacity(8 + sums.len() * 8);
    body.extend_from_slice(&length.to_le_bytes());
    sums.iter().for_each(|sum| body.extend_from_slice(&sum.to_le_bytes()));
    sealed::replace(path, MAGIC, &body)
}

/// Takes them away, durably.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sealed::sync_folder_of(path)
}
