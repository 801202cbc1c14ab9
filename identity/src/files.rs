//! Writing small secret files so that a crash leaves the old file or the new one, and reading them back with care.
//!
//! Assumptions of the disk: `rename` within a folder is atomic and durable once the folder has been synced. Used for
//! keys, credentials and login contexts only; anything that grows belongs in a database.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Largest file that [`read_secret`] accepts, in bytes: a few certificates and a key.
pub const SECRET_FILE_BYTES_MAX: u64 = 64 * 1024;

/// Why a secret file could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The folder could not be made.
    #[error("The folder {} could not be created; check that its parent exists and is writable.", path.display())]
    CreateFolder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The new content could not be put on disk; the old file, if any, is untouched.
    #[error("The file {} could not be written; the previous one is unchanged. Check space and permissions.", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file could not be read.
    #[error("The file {} could not be read; check that it exists and belongs to this user.", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others on the machine may read the file.
    #[error("The secret file {} has mode {mode:04o}, so others may read it; run `chmod 600` on it, or replace the secret if they may have.", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is too large to be what it should be.
    #[error("The file {} is larger than {SECRET_FILE_BYTES_MAX} bytes, so it is not a key or credential; check the path.", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

/// Replaces `path` by `content` with mode 0600: a new file beside it is written, synced and renamed over it.
///
/// The folder is created with mode 0700 when it is missing.
///
/// # Errors
/// [`FileError`]; whatever was at `path` before is then still there, whole.
pub fn write_secret(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|source| FileError::CreateFolder { path: folder.to_owned(), source })?;
    replace(folder, path, content).map_err(|source| FileError::Write { path: path.to_owned(), source })
}

fn replace(folder: &Path, path: &Path, content: &[u8]) -> io::Result<()> {
    let mut temporary_name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    temporary_name.push(format!(".{:016x}.tmp", rand::random::<u64>()));
    let temporary = folder.join(temporary_name);
    let written = write_new(&temporary, content).and_then(|()| fs::rename(&temporary, path));
    if let Err(error) = written {
        // The first error is the one to report; a left-over temporary file is harmless and 0600.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(folder)?.sync_all()
}

fn write_new(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Reads a secret file, refusing one that others may read.
///
/// # Errors
/// [`FileError`] when it is missing, exposed or too large.
pub fn read_secret(path: &Path) -> Result<Zeroizing<Vec<u8>>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(FileError::Exposed { path: path.to_owned(), mode });
    }
    if metadata.len() > SECRET_FILE_BYTES_MAX {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    // Room for the largest file at once: a buffer that grew would leave copies of the secret behind.
    let mut content = Zeroizing::new(Vec::with_capacity(SECRET_FILE_BYTES_MAX as usize));
    file.take(SECRET_FILE_BYTES_MAX).read_to_end(&mut content).map_err(failed)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaced_whole_with_mode_0600_and_nothing_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/sub/key.pem");
        write_secret(&path, b"one").unwrap();
        write_secret(&path, b"two").unwrap();
        assert_eq!(&read_secret(&path).unwrap()[..], b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn i10_exposed_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        write_secret(&path, b"one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(read_secret(&path), Err(FileError::Exposed { mode: 0o640, .. })));
    }

    #[test]
    fn oversized_and_missing_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        assert!(matches!(read_secret(&path), Err(FileError::Read { .. })));
        write_secret(&path, &vec![b'x'; SECRET_FILE_BYTES_MAX as usize + 1]).unwrap();
        assert!(matches!(read_secret(&path), Err(FileError::TooLarge { .. })));
    }
}
