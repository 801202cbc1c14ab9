//! All that one cache has on disk, blobs and roots, and how it is kept within its bound.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::blob_store::{BlobStore, StoredBlob};
use super::collect::{Candidate, Kind, choose};
use super::digest::Digest;
use super::error::ImageError;
use super::roots::{Roots, StoredRoot};

/// What one collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Roots removed.
    pub roots_removed: usize,
    /// Blobs and beginnings of blobs removed.
    pub blobs_removed: usize,
    /// Bytes that these had.
    pub freed_bytes: u64,
    /// Bytes that remain.
    pub kept_bytes: u64,
}

/// What this process has collected so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evictions {
    /// Roots.
    pub roots: u64,
    /// Blobs and beginnings of blobs.
    pub blobs: u64,
    /// Bytes of both.
    pub bytes: u64,
}

/// See the module.
pub(crate) struct Stock {
    pub(crate) blobs: BlobStore,
    pub(crate) roots: Roots,
    /// Two collections at once would each count what the other removes.
    collecting: Mutex<()>,
    roots_evicted: AtomicU64,
    blobs_evicted: AtomicU64,
    bytes_evicted: AtomicU64,
}

enum Stored {
    Blob(StoredBlob),
    Root(StoredRoot),
}

impl Stock {
    pub(crate) fn new(blobs: BlobStore, roots: Roots) -> Stock {
        Stock {
            blobs,
            roots,
            collecting: Mutex::new(()),
            roots_evicted: AtomicU64::new(0),
            blobs_evicted: AtomicU64::new(0),
            bytes_evicted: AtomicU64::new(0),
        }
    }

    pub(crate) fn used_bytes(&self) -> Result<u64, ImageError> {
        let blobs: u64 = self.blobs.list()?.iter().map(|blob| blob.bytes).sum();
        Ok(blobs + self.roots.list()?.iter().map(|root| root.bytes).sum::<u64>())
    }

    pub(crate) fn evictions(&self) -> Evictions {
        Evictions {
            roots: self.roots_evicted.load(Ordering::Relaxed),
            blobs: self.blobs_evicted.load(Ordering::Relaxed),
            bytes: self.bytes_evicted.load(Ordering::Relaxed),
        }
    }

    /// Removes what [`choose`] says, until there are at most so many bytes.
    pub(crate) fn gc(&self, in_use: &HashSet<Digest>, bytes_max: u64) -> Result<GcReport, ImageError> {
        let _one_at_a_time = self.collecting.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut stored, mut candidates) = (Vec::new(), Vec::new());
        for blob in self.blobs.list()? {
            let in_use = blob.digest.is_some_and(|digest| self.blobs.is_pinned(digest));
            let (bytes, used_at) = (blob.bytes, blob.used_at);
            candidates.push(Candidate { kind: Kind::Blob, bytes, used_at, in_use });
            stored.push(Stored::Blob(blob));
        }
        for root in self.roots.list()? {
            let in_use = in_use.contains(&root.digest) || self.roots.is_held(root.digest);
            if in_use {
                // So that one that ran for long is not taken for one that was forgotten.
                self.roots.touch(root.digest);
            }
            let (bytes, used_at) = (root.bytes, root.used_at);
            candidates.push(Candidate { kind: Kind::Root, bytes, used_at, in_use });
            stored.push(Stored::Root(root));
        }
        let kept_bytes = candidates.iter().map(|one| one.bytes).sum();
        let mut report = GcReport { kept_bytes, ..GcReport::default() };
        for at in choose(&candidates, bytes_max) {
            // Each is looked at again: somebody may have come to need it since the list was made.
            let (removed, count, evicted) = match &stored[at] {
                Stored::Blob(blob) => {
                    (self.blobs.evict(blob)?, &mut report.blobs_removed, &self.blobs_evicted)
                }
                Stored::Root(root) => {
                    (self.roots.remove(root.digest)?, &mut report.roots_removed, &self.roots_evicted)
                }
            };
            if removed {
                *count += 1;
                evicted.fetch_add(1, Ordering::Relaxed);
                self.bytes_evicted.fetch_add(candidates[at].bytes, Ordering::Relaxed);
                report.freed_bytes += candidates[at].bytes;
                report.kept_bytes -= candidates[at].bytes;
            }
        }
        Ok(report)
    }
}
