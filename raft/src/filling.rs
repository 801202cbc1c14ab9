//! Filling a member that has a sound log and no state, before it takes part again.
//!
//! From its own snapshot and log when they reach, else with a peer's snapshot, fetched in parts and checked as a whole; a
//! transfer that broke goes on where it stopped. A snapshot holds only what was committed, and replaces nothing that this
//! member promised: its vote stays, and of its log only entries go that contradict a committed one (I2). A snapshot that
//! still has the digest for which this member was found wrong is refused (I1).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdfast_model::LogIndex;
use holdfast_store::Store;
use rand::RngExt;
use tokio::time::{Instant, sleep};

use crate::disk_work;
use crate::error::StartError;
use crate::healing::{self, Pending, WrongDigest};
use crate::health::Fault;
use crate::known_peers::KnownPeers;
use crate::log_store::{LogStore, LogStoreError};
use crate::network::{Channels, chain};
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::{SnapshotFile, SnapshotFileError, SnapshotFolder};
use crate::state_machine::{self, StateMachineError, read_meta};
use crate::transport::channel::{CallError, Channel};
use crate::transport::message::{Purpose, Request, Response};

/// How long a member tries to be filled before its start is given up. The next start goes on.
const FILL_DEADLINE: Duration = Duration::from_secs(600);
/// How long one part of a snapshot may take.
const PART_DEADLINE: Duration = Duration::from_secs(15);
/// About how long between two rounds of asking every peer.
const ROUND_PAUSE: Duration = Duration::from_millis(500);

/// What a member is filled from and into.
pub(crate) struct Filling<'a> {
    pub(crate) data_dir: &'a Path,
    pub(crate) pending: Pending,
    pub(crate) store: &'a Arc<Store>,
    pub(crate) log: LogStore,
    pub(crate) folder: &'a SnapshotFolder,
    pub(crate) channels: &'a Channels,
    pub(crate) peers: &'a KnownPeers,
}

/// Why one attempt came to nothing.
#[derive(Debug, thiserror::Error)]
enum FillError {
    #[error("the peer could not be asked")]
    Call(#[from] CallError),
    #[error("the peer has none to give now: {0}")]
    Refused(String),
    #[error("the snapshot could not be taken in")]
    File(#[from] SnapshotFileError),
    #[error("the snapshot could not be installed")]
    Install(#[from] StateMachineError),
    #[error("this member's log could not be read")]
    Log(#[from] LogStoreError),
    #[error("the snapshot has the very state for which this member was found wrong")]
    StillWrong,
    #[error("the work was not done")]
    Work(#[from] std::io::Error),
}

async fn on_disk<T: Send + 'static, E: Into<FillError> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, FillError> {
    disk_work::run(work).await?.map_err(Into::into)
}

impl Filling<'_> {
    /// Fills the member. Safe to repeat after a crash at any moment.
    pub(crate) async fn fill(mut self) -> Result<(), StartError> {
        let path = self.data_dir.to_owned();
        let core = |error: FillError| StartError::Fill { path: path.clone(), source: error.into() };
        // What an earlier attempt installed is whole.
        let has_state = self.store.applied().is_some() && !self.is_still_wrong().await.map_err(core)?;
        if !has_state && !self.fill_from_own().await.map_err(core)? {
            self.fill_from_peers().await?;
        }
        let meta = self.meta().await.map_err(core)?;
        if let Some(at) = meta.last_applied {
            self.log.continue_from(at).await.map_err(|error| core(error.into()))?;
        }
        tracing::warn!(next = meta.next_index(), "this member has a new state; the log does the rest");
        healing::done(self.data_dir)
    }

    async fn meta(&self) -> Result<RaftMeta, FillError> {
        let store = self.store.clone();
        on_disk(move || read_meta(&store)).await
    }

    async fn is_still_wrong(&self) -> Result<bool, FillError> {
        let (store, wrong) = (self.store.clone(), self.pending.wrong);
        on_disk(move || still_wrong(&store, wrong)).await
    }

    /// From this member's own snapshot and log. Not when it was found to be wrong: whatever made it so may be in them.
    async fn fill_from_own(&self) -> Result<bool, FillError> {
        if matches!(self.pending.fault, Fault::Diverged { .. }) {
            return Ok(false);
        }
        let first = self.log.first_index()?;
        let folder = self.folder.clone();
        if let Ok(Some(newest)) = on_disk(move || folder.newest()).await
            && newest.meta.next_index() >= first
        {
            match self.install(newest).await {
                Ok(()) => return Ok(true),
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "this member's own snapshot cannot be used")
                }
            }
        }
        // The log from its beginning is as good.
        Ok(first == 0 && self.store.applied().is_none())
    }

    async fn fill_from_peers(&self) -> Result<(), StartError> {
        let until = Instant::now() + FILL_DEADLINE;
        while !self.peers.is_empty() && Instant::now() < until {
            for (peer, address) in self.peers {
                match self.fill_from(&self.channels.to(*peer, address, Purpose::Snapshot)).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        tracing::warn!(peer, error = %chain(&error), "a peer could not fill this member yet")
                    }
                }
            }
            let pause = ROUND_PAUSE.mul_f64(rand::rng().random_range(0.5..1.5));
            sleep(pause).await;
        }
        Err(StartError::NotFilled { path: self.data_dir.to_owned(), fault: self.pending.fault.clone() })
    }

    async fn fill_from(&self, peer: &Arc<Channel>) -> Result<(), FillError> {
        let beyond_wrong = self.pending.wrong.map_or(0, |wrong| wrong.index + 1);
        let at_least = self.log.first_index()?.max(beyond_wrong).max(1);
        let offer = match peer.call(Request::SnapshotWanted { at_least }, PART_DEADLINE).await? {
            Response::SnapshotOffered(offer) => offer,
            other => return Err(refused(&other)),
        };
        let (digest, bytes) = (offer.digest, offer.bytes);
        let folder = self.folder.clone();
        let mut receiving = on_disk(move || folder.receive(digest, bytes)).await?;
        tracing::warn!(bytes, resumed_at = receiving.offset(), "fetching a snapshot from a peer");
        while receiving.offset() < bytes {
            let offset = receiving.offset();
            let data = match peer.call(Request::SnapshotPart { digest, offset }, PART_DEADLINE).await? {
                Response::SnapshotData(data) if !data.is_empty() => data,
                other => return Err(refused(&other)),
            };
            receiving = on_disk(move || receiving.write(offset, &data).map(|()| receiving)).await?;
        }
        let file = on_disk(move || receiving.finish()).await?;
        self.install(file).await
    }

    /// Takes a snapshot in. A wrong one changes nothing.
    async fn install(&self, file: SnapshotFile) -> Result<(), FillError> {
        let (store, wrong) = (self.store.clone(), self.pending.wrong);
        on_disk(move || {
            state_machine::install(&store, &file)?;
            if still_wrong(&store, wrong)? { Err(FillError::StillWrong) } else { Ok(()) }
        })
        .await
    }
}

fn still_wrong(store: &Store, wrong: Option<WrongDigest>) -> Result<bool, StateMachineError> {
    let Some(wrong) = wrong else { return Ok(false) };
    Ok(store.digest_at(LogIndex(wrong.index))? == Some(wrong.digest))
}

fn refused(response: &Response) -> FillError {
    FillError::Refused(match response {
        Response::Refused(refusal) => refusal.to_string(),
        _ => "the answer is to another question".to_owned(),
    })
}
