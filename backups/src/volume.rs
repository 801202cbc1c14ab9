//! A volume's snapshot in a store: its disk cut into parts, each compressed and sealed by itself, and a manifest that
//! names them. The form is `docs/formats/volume-snapshot.md`.
//!
//! Each part says, inside its seal, of which org, volume and snapshot it is and which number it has; age binds nothing but
//! the key. The manifest has the digest of each part as it is stored, and the control plane keeps the digest of the
//! manifest. So no part can be changed, left out, put in another's place or taken from another snapshot unnoticed, by the
//! store or by anybody who knows the key's public half.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use holdfast_identity::{SealError, SealKey, SealTo};
use holdfast_model::volume_snapshot::SnapshotOf;
use holdfast_model::{Digest, SnapshotId};
use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};

use crate::{Store, StoreError};

/// What of the disk one part holds, in bytes.
pub const PART_BYTES: usize = 4 << 20;
/// Parts that one list names at most.
const LIST_PARTS_MAX: usize = 1 << 14;
/// Parts that are compressed, sealed and sent at a time; and fetched and opened.
const PARTS_AT_ONCE: usize = 2;
/// The longest object: a part that does not compress, with what compression and seal add.
const OBJECT_BYTES_MAX: usize = PART_BYTES + (1 << 18);
/// The form that this release writes.
const FORM: u8 = 1;
/// How hard parts are compressed: the disk and the network are to be the limit.
const COMPRESSION: i32 = 1;
/// The key of the digests of objects: they are unrelated to any other.
const DIGEST_CONTEXT: &str = "holdfast 2026 volume snapshot object v1";

/// Why a snapshot cannot be stored or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk.
    #[error("The disk could not be {action}.")]
    Disk {
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The seal.
    #[error("A part of the snapshot could not be sealed or opened.")]
    Seal(#[from] SealError),
    /// What was fetched is not what was stored.
    #[error("'{name}' in the store of backups is not what was stored: {problem}. Restore another snapshot.")]
    Changed {
        /// The object.
        name: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A thread died.
    #[error("A thread that worked on a snapshot ended unexpectedly; start the agent again.")]
    Thread,
}

impl SnapshotError {
    /// Whether it is of no use to try again.
    pub const fn is_final(&self) -> bool {
        match self {
            Self::Changed { .. } | Self::Seal(_) => true,
            Self::Store(error) => matches!(error, StoreError::Absent { .. } | StoreError::TooLong { .. }),
            Self::Disk { .. } | Self::Thread => false,
        }
    }
}

/// What is stored of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Of the sealed manifest.
    pub manifest: Digest,
    /// All objects together.
    pub bytes: u64,
}

/// Where the objects of a snapshot lie.
pub fn folder(snapshot: SnapshotId) -> String {
    format!("volumes/{snapshot}")
}

/// What an object is, inside its seal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Manifest,
    List,
    Part,
}

/// The first bytes of everything that is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    form: u8,
    of: SnapshotOf,
    kind: Kind,
    /// Which of its kind.
    number: u64,
    /// Bytes that follow when they are not compressed any more.
    bytes: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    /// The disk's length in bytes.
    disk_bytes: u64,
    part_bytes: u64,
    /// One folder for each time that it was tried.
    attempt: [u8; 8],
    /// The digests of the lists.
    lists: Vec<Digest>,
}

/// A part that is not all zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    part: u64,
    digest: Digest,
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::keyed(DIGEST_CONTEXT, bytes)
}

fn manifest_name(snapshot: SnapshotId, digest: &Digest) -> String {
    format!("{}/manifest-{}", folder(snapshot), HEXLOWER.encode(&digest.0))
}

fn object_name(of: SnapshotOf, attempt: [u8; 8], kind: Kind, number: u64) -> String {
    let word = if kind == Kind::List { "list" } else { "part" };
    format!("{}/{}/{word}-{number:010}", folder(of.snapshot), HEXLOWER.encode(&attempt))
}

/// Seals what says what it is.
fn seal(
    to: &SealTo,
    of: SnapshotOf,
    kind: Kind,
    number: u64,
    clear: &[u8],
) -> Result<Vec<u8>, SnapshotError> {
    let bytes = u32::try_from(clear.len()).map_err(|_| SealError::TooLarge)?;
    let head = Head { form: FORM, of, kind, number, bytes };
    let other = |source| SnapshotError::Disk { action: "compressed", source };
    let mut room = postcard::to_stdvec(&head).map_err(|e| other(io::Error::other(e)))?;
    room.extend_from_slice(&zstd::bulk::compress(clear, COMPRESSION).map_err(other)?);
    Ok(to.seal_part(&room)?)
}

/// Opens what must be this.
fn open(
    key: &SealKey,
    of: SnapshotOf,
    kind: Kind,
    number: u64,
    (name, sealed): (&str, &[u8]),
) -> Result<Vec<u8>, SnapshotError> {
    let changed = |problem| SnapshotError::Changed { name: name.to_owned(), problem };
    let clear = key.open_part(sealed)?;
    let (head, rest): (Head, _) =
        postcard::take_from_bytes(&clear).map_err(|_| changed("it does not say what it is"))?;
    if head.form != FORM {
        return Err(changed("its form is not known to this release"));
    }
    if (head.of, head.kind, head.number) != (of, kind, number) {
        return Err(changed("it says that it is something else"));
    }
    let bytes = head.bytes as usize;
    if bytes > PART_BYTES {
        return Err(changed("it is too long"));
    }
    let clear = zstd::bulk::decompress(rest, bytes).map_err(|_| changed("it cannot be decompressed"))?;
    if clear.len() == bytes { Ok(clear) } else { Err(changed("it has another length than it says")) }
}

/// Stores what is on a disk that nobody writes to. `attempt` is drawn anew for each call.
///
/// # Errors
/// When the disk cannot be read, or the store does not take it; what was stored so far stays, and is of no use.
pub async fn store(
    store: &Store,
    of: SnapshotOf,
    disk: Arc<File>,
    recipient: &SealTo,
    attempt: [u8; 8],
) -> Result<Stored, SnapshotError> {
    let failed = |action| move |source| SnapshotError::Disk { action, source };
    let disk_bytes = disk.metadata().map_err(failed("looked at"))?.len();
    let mut bytes = 0u64;
    let (mut lists, mut next) = (Vec::new(), 0u64);
    loop {
        let parts = {
            let disk = Arc::clone(&disk);
            blocking(move || data_parts(&disk, next, disk_bytes).map_err(failed("read"))).await?
        };
        let Some(last) = parts.last() else { break };
        next = last + 1;
        let sent =
            stream::iter(parts).map(|part| send(store, of, &disk, disk_bytes, recipient, attempt, part));
        let sent: Vec<Option<(Entry, u64)>> = sent.buffered(PARTS_AT_ONCE).try_collect().await?;
        let entries: Vec<Entry> = sent.iter().flatten().map(|(entry, _)| *entry).collect();
        bytes += sent.iter().flatten().map(|(_, bytes)| bytes).sum::<u64>();
        if entries.is_empty() {
            continue;
        }
        let number = lists.len() as u64;
        let clear = postcard::to_stdvec(&entries).map_err(|e| failed("listed")(io::Error::other(e)))?;
        let sealed = seal(recipient, of, Kind::List, number, &clear)?;
        bytes += sealed.len() as u64;
        lists.push(digest(&sealed));
        store.put(&object_name(of, attempt, Kind::List, number), sealed).await?;
    }
    let manifest = Manifest { disk_bytes, part_bytes: PART_BYTES as u64, attempt, lists };
    let clear = postcard::to_stdvec(&manifest).map_err(|e| failed("listed")(io::Error::other(e)))?;
    let sealed = seal(recipient, of, Kind::Manifest, 0, &clear)?;
    let manifest = digest(&sealed);
    bytes += sealed.len() as u64;
    // Last: who finds it finds all of the snapshot.
    store.put(&manifest_name(of.snapshot, &manifest), sealed).await?;
    Ok(Stored { manifest, bytes })
}

/// Parts from `from` on that have data, [`LIST_PARTS_MAX`] at most. Holes are passed over by asking the file system.
fn data_parts(disk: &File, from: u64, disk_bytes: u64) -> io::Result<Vec<u64>> {
    let mut parts = Vec::new();
    let mut at = from.saturating_mul(PART_BYTES as u64);
    while at < disk_bytes && parts.len() < LIST_PARTS_MAX {
        match rustix::fs::seek(disk, SeekFrom::Data(at)) {
            Ok(data) => {
                let part = data / PART_BYTES as u64;
                parts.push(part);
                at = (part + 1).saturating_mul(PART_BYTES as u64);
            }
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(parts)
}

/// Sends a part, unless there is nothing in it.
async fn send(
    store: &Store,
    of: SnapshotOf,
    disk: &Arc<File>,
    disk_bytes: u64,
    recipient: &SealTo,
    attempt: [u8; 8],
    part: u64,
) -> Result<Option<(Entry, u64)>, SnapshotError> {
    let (disk, recipient) = (Arc::clone(disk), recipient.clone());
    let sealed = blocking(move || {
        let at = part * PART_BYTES as u64;
        let length = usize::try_from((disk_bytes - at).min(PART_BYTES as u64)).unwrap_or(PART_BYTES);
        let mut clear = vec![0; length];
        disk.read_exact_at(&mut clear, at)
            .map_err(|source| SnapshotError::Disk { action: "read", source })?;
        if clear.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        seal(&recipient, of, Kind::Part, part, &clear).map(Some)
    });
    let Some(sealed) = sealed.await? else { return Ok(None) };
    let entry = Entry { part, digest: digest(&sealed) };
    let bytes = sealed.len() as u64;
    store.put(&object_name(of, attempt, Kind::Part, part), sealed).await?;
    Ok(Some((entry, bytes)))
}

/// Writes a snapshot to a disk that is all zeros and has the snapshot's length, and makes it durable. Every byte that is
/// written was compared with what the control plane knows.
///
/// # Errors
/// When something is not there, or is not what was stored: then the disk is of no use.
pub async fn restore(
    store: &Store,
    of: SnapshotOf,
    manifest: Digest,
    key: &SealKey,
    disk: Arc<File>,
) -> Result<(), SnapshotError> {
    let failed = |action| move |source| SnapshotError::Disk { action, source };
    let name = manifest_name(of.snapshot, &manifest);
    let clear = fetch(store, key, of, Kind::Manifest, 0, (name.clone(), manifest)).await?;
    let changed = |problem| SnapshotError::Changed { name: name.clone(), problem };
    let manifest: Manifest =
        postcard::from_bytes(&clear).map_err(|_| changed("it has another form than it says"))?;
    let disk_bytes = disk.metadata().map_err(failed("looked at"))?.len();
    if manifest.disk_bytes != disk_bytes || manifest.part_bytes != PART_BYTES as u64 {
        return Err(changed("it is of a disk of another size"));
    }
    let mut next = 0;
    for (number, digest) in (0u64..).zip(&manifest.lists) {
        let name = object_name(of, manifest.attempt, Kind::List, number);
        let clear = fetch(store, key, of, Kind::List, number, (name.clone(), *digest)).await?;
        let changed = |problem| SnapshotError::Changed { name: name.clone(), problem };
        let entries: Vec<Entry> =
            postcard::from_bytes(&clear).map_err(|_| changed("it has another form than it says"))?;
        for entry in &entries {
            // In order and each once, so that nothing is written twice.
            if entry.part < next || entry.part.saturating_mul(PART_BYTES as u64) >= disk_bytes {
                return Err(changed("it names a part that cannot be"));
            }
            next = entry.part + 1;
        }
        let written = stream::iter(entries).map(|entry| {
            let (name, disk) = (object_name(of, manifest.attempt, Kind::Part, entry.part), Arc::clone(&disk));
            async move {
                let clear =
                    fetch(store, key, of, Kind::Part, entry.part, (name.clone(), entry.digest)).await?;
                let at = entry.part * PART_BYTES as u64;
                let length = (disk_bytes - at).min(PART_BYTES as u64);
                if clear.len() as u64 != length {
                    return Err(SnapshotError::Changed { name, problem: "it has another length" });
                }
                blocking(move || disk.write_all_at(&clear, at).map_err(failed("written"))).await
            }
        });
        written.buffer_unordered(PARTS_AT_ONCE).try_collect::<Vec<()>>().await?;
    }
    blocking(move || disk.sync_all().map_err(failed("synced"))).await
}

async fn fetch(
    store: &Store,
    key: &SealKey,
    of: SnapshotOf,
    kind: Kind,
    number: u64,
    (name, expected): (String, Digest),
) -> Result<Vec<u8>, SnapshotError> {
    let sealed = store.get(&name, OBJECT_BYTES_MAX).await?;
    let key = key.clone();
    blocking(move || {
        if digest(&sealed) != expected {
            return Err(SnapshotError::Changed { name, problem: "its digest is another" });
        }
        open(&key, of, kind, number, (&name, &sealed))
    })
    .await
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SnapshotError> + Send + 'static,
) -> Result<T, SnapshotError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| SnapshotError::Thread)?
}

#[cfg(test)]
mod tests;
