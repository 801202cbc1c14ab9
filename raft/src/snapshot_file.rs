//! Snapshots as files in the folder `snapshots/` of a member.
//!
//! A file is `magic (8 bytes) · length of the record (4 bytes, little-endian) · record ([`RaftMeta`]) · what the store
//! wrote · BLAKE3 digest (32 bytes) of everything before it`. It is written under another name, fsynced and renamed, so
//! a file with the right name is whole. Only the newest is kept. Nothing here holds a snapshot in memory.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use holdfast_checked_file::sealed::sync_folder;

use crate::log_record::RecordError;
use crate::raft_meta::RaftMeta;

const MAGIC: &[u8; 8] = b"HFSNAP01";
const DIGEST_BYTES: u64 = blake3::OUT_LEN as u64;
/// Digits of a name that say where its snapshot ends.
const END_DIGITS: usize = 20;
/// The largest record that a header may announce: thousands of members.
const RECORD_BYTES_MAX: u32 = 4 * 1024 * 1024;
const BUFFER_BYTES: usize = 1024 * 1024;
const SUFFIX: &str = ".snapshot";
const PART_SUFFIX: &str = ".part";
const BUILDING: &str = "building.part";

/// Why a snapshot file could not be written or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotFileError {
    /// Reading or writing failed.
    #[error("the snapshot {path} could not be read or written; check the disk and its free space")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no snapshot.
    #[error("{path} is no snapshot of this product; remove it")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// The bytes are not those that were written or sent.
    #[error(
        "the snapshot {path} does not have the digest that it should have; it will be fetched or built again"
    )]
    Digest {
        /// The file.
        path: PathBuf,
    },
    /// The record in the header was refused.
    #[error("the header of the snapshot {path} cannot be used")]
    Record {
        /// The file.
        path: PathBuf,
        /// Why.
        source: RecordError,
    },
    /// A part came that does not follow the one before.
    #[error(
        "a part of a snapshot came at offset {found} where {expected} should have been; it will be sent again"
    )]
    Offset {
        /// Where it came.
        found: u64,
        /// Where it should have come.
        expected: u64,
    },
}

/// A whole snapshot file.
#[derive(Clone, Debug)]
pub struct SnapshotFile {
    /// Where it lies.
    pub(crate) path: PathBuf,
    /// Its size in bytes.
    pub(crate) bytes: u64,
    /// The digest of all its bytes but the digest itself, as its last bytes say.
    pub(crate) digest: [u8; 32],
    /// What it covers.
    pub(crate) meta: RaftMeta,
}

fn at<T>(path: &Path, result: io::Result<T>) -> Result<T, SnapshotFileError> {
    result.map_err(|source| SnapshotFileError::Io { path: path.to_owned(), source })
}

impl SnapshotFile {
    /// Reads header and digest of a file; the rest is checked by [`SnapshotFile::verify`].
    pub(crate) fn open(path: &Path) -> Result<Self, SnapshotFileError> {
        let mut file = at(path, File::open(path))?;
        let bytes = at(path, file.metadata())?.len();
        let meta = read_header(path, &mut file)?;
        let mut digest = [0_u8; 32];
        let tail =
            file.seek(SeekFrom::End(-(DIGEST_BYTES as i64))).and_then(|_| file.read_exact(&mut digest));
        at(path, tail)?;
        Ok(SnapshotFile { path: path.to_owned(), bytes, digest, meta })
    }

    /// Reads the whole file and compares its digest.
    pub(crate) fn verify(&self) -> Result<(), SnapshotFileError> {
        let file = at(&self.path, File::open(&self.path))?;
        let mut covered = BufReader::with_capacity(BUFFER_BYTES, file).take(self.bytes - DIGEST_BYTES);
        let mut hasher = blake3::Hasher::new();
        at(&self.path, io::copy(&mut covered, &mut hasher))?;
        if *hasher.finalize().as_bytes() == self.digest {
            Ok(())
        } else {
            Err(SnapshotFileError::Digest { path: self.path.clone() })
        }
    }

    /// What the store wrote, and nothing else.
    pub(crate) fn body(&self) -> Result<impl Read + use<>, SnapshotFileError> {
        let mut file = at(&self.path, File::open(&self.path))?;
        read_header(&self.path, &mut file)?;
        let start = at(&self.path, file.stream_position())?;
        Ok(BufReader::with_capacity(BUFFER_BYTES, file).take(self.bytes - DIGEST_BYTES - start))
    }
}

fn read_header(path: &Path, file: &mut File) -> Result<RaftMeta, SnapshotFileError> {
    let mut magic = [0_u8; 8];
    let mut length = [0_u8; 4];
    at(path, file.read_exact(&mut magic).and_then(|()| file.read_exact(&mut length)))?;
    let length = u32::from_le_bytes(length);
    if magic != *MAGIC || length > RECORD_BYTES_MAX {
        return Err(SnapshotFileError::NotASnapshot { path: path.to_owned() });
    }
    let mut record = vec![0_u8; length as usize];
    at(path, file.read_exact(&mut record))?;
    RaftMeta::decode(&record).map_err(|source| SnapshotFileError::Record { path: path.to_owned(), source })
}

/// The folder of a member's snapshots.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFolder {
    path: PathBuf,
}

impl SnapshotFolder {
    /// Opens the folder, makes it if needed, and removes what a crash left half-written. A snapshot that was half
    /// received stays: it can be resumed.
    pub(crate) fn open(path: &Path) -> Result<Self, SnapshotFileError> {
        at(path, fs::create_dir_all(path))?;
        let building = path.join(BUILDING);
        match fs::remove_file(&building) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return at(&building, Err(error)),
            _ => {}
        }
        Ok(SnapshotFolder { path: path.to_owned() })
    }

    /// The newest snapshot, if there is one.
    pub(crate) fn newest(&self) -> Result<Option<SnapshotFile>, SnapshotFileError> {
        match self.names(SUFFIX)?.pop() {
            Some(name) => SnapshotFile::open(&self.path.join(name)).map(Some),
            None => Ok(None),
        }
    }

    /// Writes a snapshot: `write_body` adds what the store holds.
    pub(crate) fn build<E>(
        &self,
        meta: &RaftMeta,
        write_body: impl FnOnce(&mut dyn Write) -> Result<(), E>,
    ) -> Result<SnapshotFile, BuildError<E>> {
        let staged = self.path.join(BUILDING);
        let io = |source| BuildError::File(SnapshotFileError::Io { path: staged.clone(), source });
        let record = meta
            .encode()
            .map_err(|source| BuildError::File(SnapshotFileError::Record { path: staged.clone(), source }))?;
        let file = File::create(&staged).map_err(io)?;
        let mut hashed = HashingWriter {
            inner: BufWriter::with_capacity(BUFFER_BYTES, file),
            hasher: blake3::Hasher::new(),
        };
        hashed.write_all(MAGIC).map_err(io)?;
        hashed.write_all(&(record.len() as u32).to_le_bytes()).map_err(io)?;
        hashed.write_all(&record).map_err(io)?;
        write_body(&mut hashed).map_err(BuildError::Body)?;
        let HashingWriter { mut inner, hasher } = hashed;
        inner.write_all(hasher.finalize().as_bytes()).map_err(io)?;
        inner.into_inner().map_err(|error| io(error.into_error()))?.sync_all().map_err(io)?;
        self.adopt(&staged).map_err(BuildError::File)
    }

    /// Gives a whole file its final name, durably, and removes older ones. A newer one stays: it may have been received while
    /// this one was being built, and the log may be purged up to its end already.
    fn adopt(&self, staged: &Path) -> Result<SnapshotFile, SnapshotFileError> {
        let file = SnapshotFile::open(staged)?;
        let end = file.meta.next_index();
        let name = format!("{end:0END_DIGITS$}-{}{SUFFIX}", &hex(&file.digest)[..16]);
        let path = self.path.join(&name);
        at(&path, fs::rename(staged, &path).and_then(|()| sync_folder(&self.path)))?;
        let ends = |name: &str| name.get(..END_DIGITS).map(str::to_owned);
        let others = self.names(SUFFIX)?.into_iter().filter(|other| *other != name);
        for older in others.filter(|other| ends(other) <= ends(&name)) {
            let older = self.path.join(older);
            at(&older, fs::remove_file(&older))?;
        }
        Ok(SnapshotFile { path, ..file })
    }

    /// Makes sure that a snapshot lies in this folder, and no older one.
    pub(crate) fn keep(&self, file: SnapshotFile) -> Result<SnapshotFile, SnapshotFileError> {
        if file.path.parent() == Some(self.path.as_path()) {
            return Ok(file);
        }
        let staged = self.path.join(BUILDING);
        at(&staged, fs::copy(&file.path, &staged).and_then(|_| File::open(&staged)?.sync_all()))?;
        self.adopt(&staged)
    }

    /// Starts or resumes receiving the snapshot with this digest.
    pub(crate) fn receive(&self, digest: [u8; 32], bytes: u64) -> Result<Receiving, SnapshotFileError> {
        let name = format!("{}{PART_SUFFIX}", hex(&digest));
        for other in self.names(PART_SUFFIX)?.into_iter().filter(|other| *other != name && other != BUILDING)
        {
            let other = self.path.join(other);
            at(&other, fs::remove_file(&other))?;
        }
        let path = self.path.join(name);
        let mut file = at(&path, OpenOptions::new().create(true).append(true).open(&path))?;
        let mut offset = at(&path, file.metadata())?.len();
        if offset > bytes {
            at(&path, file.set_len(0).and_then(|()| file.seek(SeekFrom::Start(0))))?;
            offset = 0;
        }
        Ok(Receiving { folder: self.clone(), path, file, offset, bytes, digest })
    }

    fn names(&self, suffix: &str) -> Result<Vec<String>, SnapshotFileError> {
        let mut names = Vec::new();
        for entry in at(&self.path, fs::read_dir(&self.path))? {
            let name = at(&self.path, entry)?.file_name();
            if let Some(name) = name.to_str().filter(|name| name.ends_with(suffix)) {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Why a snapshot could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError<E> {
    #[error("the snapshot file could not be written")]
    File(#[source] SnapshotFileError),
    #[error("the store could not write its snapshot")]
    Body(#[source] E),
}

/// A snapshot that is being received.
pub(crate) struct Receiving {
    folder: SnapshotFolder,
    path: PathBuf,
    file: File,
    offset: u64,
    bytes: u64,
    digest: [u8; 32],
}

impl Receiving {
    /// What comes next.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Which snapshot it is.
    pub(crate) fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// Takes the next part.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), SnapshotFileError> {
        if offset != self.offset || offset + data.len() as u64 > self.bytes {
            return Err(SnapshotFileError::Offset { found: offset, expected: self.offset });
        }
        at(&self.path, self.file.write_all(data))?;
        self.offset += data.len() as u64;
        Ok(())
    }

    /// Checks that all of it came and is what was announced, and adopts it. A wrong file is removed.
    pub(crate) fn finish(self) -> Result<SnapshotFile, SnapshotFileError> {
        if self.offset != self.bytes {
            return Err(SnapshotFileError::Offset { found: self.bytes, expected: self.offset });
        }
        at(&self.path, self.file.sync_all())?;
        let checked = SnapshotFile::open(&self.path).and_then(|file| {
            file.verify()?;
            if file.digest == self.digest {
                Ok(())
            } else {
                Err(SnapshotFileError::Digest { path: self.path.clone() })
            }
        });
        if let Err(error) = checked {
            at(&self.path, fs::remove_file(&self.path))?;
            return Err(error);
        }
        self.folder.adopt(&self.path)
    }
}

struct HashingWriter<W> {
    inner: W,
    hasher: blake3::Hasher,
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn hex(digest: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*digest).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(folder: &SnapshotFolder, body: &[u8]) -> SnapshotFile {
        folder.build(&RaftMeta::default(), |out| out.write_all(body)).unwrap()
    }

    fn body(file: &SnapshotFile) -> Vec<u8> {
        let mut bytes = Vec::new();
        file.body().unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_built_snapshot_is_found_again_and_replaces_the_older_one() {
        let dir = tempfile::tempdir().unwrap();
        let folder = SnapshotFolder::open(dir.path()).unwrap();
        assert!(folder.newest().unwrap().is_none());
        build(&folder, b"first");
        let second = build(&folder, b"second");
        let found = folder.newest().unwrap().unwrap();
        assert_eq!(found.digest, second.digest);
        found.verify().unwrap();
        assert_eq!(body(&found), b"second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn i02_a_snapshot_that_was_received_outlives_an_older_one_that_was_still_being_built() {
        let dir = tempfile::tempdir().unwrap();
        let folder = SnapshotFolder::open(dir.path()).unwrap();
        let at = |index| RaftMeta {
            last_applied: Some(crate::types::LogId::new(
                crate::types::LeaderId { term: 1, node_id: 1 },
                index,
            )),
            ..RaftMeta::default()
        };
        let received = folder.build(&at(311), |out| out.write_all(b"received")).unwrap();
        folder.build(&at(293), |out| out.write_all(b"built")).unwrap();
        assert_eq!(folder.newest().unwrap().unwrap().digest, received.digest);
        // The next one takes the place of both.
        folder.build(&at(400), |out| out.write_all(b"next")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_flipped_byte_of_a_snapshot_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = SnapshotFolder::open(dir.path()).unwrap();
        let file = build(&folder, b"some state");
        let good = fs::read(&file.path).unwrap();
        for position in 0..good.len() {
            let mut bad = good.clone();
            bad[position] ^= 0x40;
            fs::write(&file.path, &bad).unwrap();
            let verdict = SnapshotFile::open(&file.path).and_then(|file| file.verify());
            assert!(verdict.is_err(), "byte {position} was not noticed");
        }
    }

    #[test]
    fn receiving_resumes_after_a_crash_and_refuses_a_wrong_file() {
        let (source_dir, target_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = build(&SnapshotFolder::open(source_dir.path()).unwrap(), &[7_u8; 5000]);
        let bytes = fs::read(&file.path).unwrap();
        let folder = SnapshotFolder::open(target_dir.path()).unwrap();

        let mut receiving = folder.receive(file.digest, file.bytes).unwrap();
        receiving.write(0, &bytes[..1000]).unwrap();
        assert!(matches!(
            receiving.write(2000, &bytes[2000..]),
            Err(SnapshotFileError::Offset { expected: 1000, .. })
        ));
        drop(receiving);

        let folder = SnapshotFolder::open(target_dir.path()).unwrap();
        let mut receiving = folder.receive(file.digest, file.bytes).unwrap();
        assert_eq!(receiving.offset(), 1000);
        receiving.write(1000, &bytes[1000..]).unwrap();
        let received = receiving.finish().unwrap();
        assert_eq!(body(&received), vec![7_u8; 5000]);

        let mut wrong = bytes.clone();
        wrong[200] ^= 1;
        let mut receiving = folder.receive(file.digest, file.bytes).unwrap();
        receiving.write(0, &wrong).unwrap();
        assert!(matches!(receiving.finish(), Err(SnapshotFileError::Digest { .. })));
        assert_eq!(folder.newest().unwrap().unwrap().digest, file.digest);
    }
}
