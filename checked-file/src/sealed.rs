//! Small files that must be whole or absent: eight bytes that say what it is, BLAKE3 of the rest (32), the rest. Written
//! beside their place and renamed over it, so that a crash leaves the old one or the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// How many bytes such a file begins with to say what it is.
pub const MAGIC_BYTES: usize = 8;

/// Writes the file, durably and at once.
///
/// # Errors
/// When the disk fails; what was there is then as it was.
pub fn replace(path: &Path, magic: &[u8; MAGIC_BYTES], body: &[u8]) -> io::Result<()> {
    let mut staged = path.as_os_str().to_owned();
    staged.push(".new");
    let mut file = File::create(&staged)?;
    file.write_all(magic)?;
    file.write_all(blake3::hash(body).as_bytes())?;
    file.write_all(body)?;
    file.sync_all()?;
    fs::rename(&staged, path)?;
    sync_folder_of(path)
}

/// The rest of such a file's bytes; `None` when they are anything else.
pub fn body<'b>(magic: &[u8; MAGIC_BYTES], bytes: &'b [u8]) -> Option<&'b [u8]> {
    let (digest, body) = bytes.strip_prefix(magic)?.split_at_checked(blake3::OUT_LEN)?;
    (blake3::hash(body).as_bytes() == digest).then_some(body)
}

/// Makes renames, creations and removals in a folder durable.
///
/// # Errors
/// When the disk fails.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The same for the folder that a file lies in.
///
/// # Errors
/// When the disk fails.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => sync_folder(folder),
        _ => sync_folder(Path::new(".")),
    }
}
