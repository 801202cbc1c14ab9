//! The file in which checksums outlive a process: `HFSUMS01`, BLAKE3 of the rest (32), length of the database file
//! (8, little-endian), then eight bytes a block. Written beside its place and renamed, so it is whole or absent.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

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
    let (digest, body) = bytes.strip_prefix(MAGIC)?.split_at_checked(blake3::OUT_LEN)?;
    if blake3::hash(body).as_bytes() != digest {
        return None;
    }
    let sums = body.strip_prefix(&length.to_le_bytes())?;
    let (sums, rest) = sums.as_chunks::<8>();
    rest.is_empty().then(|| sums.iter().copied().map(u64::from_le_bytes).collect())
}

/// Leaves the checksums, durably.
pub(crate) fn write(path: &Path, length: u64, sums: &[u64]) -> io::Result<()> {
    let mut body = Vec::with_capacity(8 + sums.len() * 8);
    body.extend_from_slice(&length.to_le_bytes());
    sums.iter().for_each(|sum| body.extend_from_slice(&sum.to_le_bytes()));
    let staged = path.with_extension("sums.new");
    let mut file = File::create(&staged)?;
    file.write_all(MAGIC)?;
    file.write_all(blake3::hash(&body).as_bytes())?;
    file.write_all(&body)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    sync_folder_of(path)
}

/// Takes them away, durably.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    sync_folder_of(path)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => File::open(folder)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}
