//! Small files of a data folder that must be whole or absent: sealed, and postcard in them.

use std::fs;
use std::io;
use std::path::Path;

use holdfast_checked_file::sealed::{self, MAGIC_BYTES};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Writes the file, durably and at once.
pub(crate) fn replace(path: &Path, magic: &[u8; MAGIC_BYTES], record: &impl Serialize) -> io::Result<()> {
    sealed::replace(path, magic, &postcard::to_stdvec(record).map_err(io::Error::other)?)
}

/// The record in such a file, if there is one. A file that is anything else is invalid data.
pub(crate) fn read<T: DeserializeOwned>(path: &Path, magic: &[u8; MAGIC_BYTES]) -> io::Result<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let record = sealed::body(magic, &bytes).and_then(|body| postcard::from_bytes(body).ok());
    record.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "it is damaged"))
}
