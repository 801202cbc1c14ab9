//! Giving snapshots to members that ask for one: those that have a log and no state (`filling`).
//!
//! The newest snapshot is offered, and read from the one file that was opened when it was, so that a newer one may take its
//! place meanwhile. One file is open at a time, one part of it in memory for each question. Nothing here is trusted by the
//! one who asks: it checks the digest of the whole.

use std::fs::File;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Mutex;

use crate::network::{open_snapshot, read_chunk};
use crate::snapshot_file::SnapshotFolder;
use crate::transport::message::{Refusal, SnapshotOffer};

/// The snapshot that was offered last.
pub(crate) struct SnapshotGiver {
    folder: SnapshotFolder,
    offered: Mutex<Option<Offered>>,
}

#[derive(Clone)]
struct Offered {
    digest: [u8; 32],
    bytes: u64,
    file: Arc<File>,
}

fn unavailable(error: impl std::fmt::Display) -> Refusal {
    Refusal::Unavailable(error.to_string())
}

impl SnapshotGiver {
    pub(crate) fn new(folder: SnapshotFolder) -> Self {
        SnapshotGiver { folder, offered: Mutex::new(None) }
    }

    /// Offers the newest snapshot, if it has so many entries.
    pub(crate) async fn offer(&self, at_least: u64) -> Result<Option<SnapshotOffer>, Refusal> {
        let folder = self.folder.clone();
        let newest = crate::disk_work::run(move || folder.newest()).await.map_err(unavailable)?;
        let Some(newest) = newest.map_err(unavailable)?.filter(|newest| newest.meta.next_index() >= at_least)
        else {
            return Ok(None);
        };
        let Some(file) = open_snapshot(&newest).await.map_err(unavailable)? else { return Ok(None) };
        let (digest, bytes) = (newest.digest, newest.bytes);
        *self.offered.lock().await = Some(Offered { digest, bytes, file });
        Ok(Some(SnapshotOffer { meta: newest.meta.snapshot_meta(), bytes, digest }))
    }

    /// The part of the offered snapshot that begins at `offset`.
    pub(crate) async fn part(&self, digest: [u8; 32], offset: u64) -> Result<Bytes, Refusal> {
        let offered = self.offered.lock().await.clone().filter(|offered| offered.digest == digest);
        let Some(Offered { bytes, file, .. }) = offered else {
            return Err(unavailable("another snapshot was offered meanwhile; begin again"));
        };
        if offset >= bytes {
            return Err(Refusal::Invalid(format!("the snapshot has {bytes} bytes")));
        }
        read_chunk(file, offset, bytes).await.map_err(unavailable)
    }
}
