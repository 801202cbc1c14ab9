//! Small files of a data folder that must be whole or absent: magic, BLAKE3 digest, postcard. Written beside their place
//! and renamed over it, so that a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How many bytes such a file begins with to say what it is.
pub(crate) const MAGIC_BYTES: usize = 8;

/// Writes the file, durably and at once.
pub(crate) fn replace(
    folder: &Path,
    name: &str,
    magic: &[u8; MAGIC_BYTES],
    record: &impl Serialize,
) -> io::Result<()> {
    let body = postcard::to_stdvec(record).map_err(io::Error::other)?;
    let staged = folder.join(format!("{name}.new"));
    let mut file = File::create(&staged)?;
    file.write_all(magic)?;
    file.write_all(blake3::hash(&body).as_bytes())?;
    file.write_all(&body)?;
    file.sync_all()?;
    fs::rename(&staged, folder.join(name))?;
    sync_folder(folder)
}

/// The record in such a file's bytes; `None` when they are anything else.
pub(crate) fn parse<T: DeserializeOwned>(magic: &[u8; MAGIC_BYTES], bytes: &[u8]) -> Option<T> {
    let rest = bytes.strip_prefix(magic)?;
    let (digest, body) = rest.split_at_checked(blake3::OUT_LEN)?;
    if blake3::hash(body).as_bytes() != digest {
        return None;
    }
    postcard::from_bytes(body).ok()
}

/// Makes renames and creations in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
