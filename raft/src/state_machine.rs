//! The state machine as openraft drives it: committed entries are handed to the applier, snapshots are made and taken in.
//!
//! openraft counts an entry as applied once it was handed over; who must know what really is asks [`Progress`]. Nothing
//! here decides what a command means. All work on the disk happens on other threads.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use futures::{Stream, TryStreamExt};
use holdfast_model::Revision;
use holdfast_store::{SnapshotSource, Store, StoreError};
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine, Snapshot};
use openraft::{OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{mpsc, watch};

use crate::applier::{Applier, Batch, Worker};
use crate::checkpoints::Checkpoints;
use crate::disk_work;
use crate::divergence::Mismatch;
use crate::health::Health;
use crate::log_record::RecordError;
use crate::log_store::LogStore;
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::{BuildError, SnapshotFile, SnapshotFileError, SnapshotFolder};
use crate::types::{CommandError, LeaderId, LogId, MemberNode, SnapshotMeta, StoredMembership, TypeConfig};

/// Why entries could not be applied or a snapshot not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum StateMachineError {
    /// A command could not be decoded.
    #[error(
        "the command at log index {index} cannot be used; if the cluster was upgraded, upgrade this member as well"
    )]
    Command {
        /// Where it lies.
        index: u64,
        /// Why.
        source: CommandError,
    },
    /// The store failed.
    #[error("the state could not be read or written; check the disk, then restart the member")]
    Store(#[from] StoreError),
    /// The record beside the state cannot be used.
    #[error("the record of raft in the state cannot be used; let this member heal from its peers")]
    Record(#[from] RecordError),
    /// A snapshot file failed.
    #[error("a snapshot file could not be used")]
    Snapshot(#[from] SnapshotFileError),
    /// An installed snapshot is not the one that was announced.
    #[error(
        "the installed snapshot covers the log to another entry than was announced; let this member heal from its peers"
    )]
    WrongSnapshot,
    /// The applier stopped after an earlier error.
    #[error(
        "entries of the log cannot be applied after an error ({0}); check the disk, then restart the member"
    )]
    Stopped(String),
    /// The applier's thread could not be started.
    #[error("the thread that applies the log could not be started; check the limits of the process")]
    Thread(#[source] io::Error),
    /// The store answered another number of outcomes than there were entries.
    #[error("the store answered {found} outcomes for {expected} entries; this is a bug, report it")]
    Outcomes {
        /// Entries.
        expected: usize,
        /// Outcomes.
        found: usize,
    },
}

impl From<StateMachineError> for io::Error {
    fn from(error: StateMachineError) -> Self {
        io::Error::other(error)
    }
}

impl From<BuildError<StoreError>> for StateMachineError {
    fn from(error: BuildError<StoreError>) -> Self {
        match error {
            BuildError::File(error) => StateMachineError::Snapshot(error),
            BuildError::Body(error) => StateMachineError::Store(error),
        }
    }
}

/// What the rest of the member hears from its state machine.
#[derive(Clone)]
pub(crate) struct Progress {
    /// The index after the last applied entry.
    pub(crate) applied_next: watch::Sender<u64>,
    /// The revision of the state.
    pub(crate) revision: watch::Sender<Revision>,
    /// Members that were removed.
    pub(crate) former_members: watch::Sender<BTreeSet<u64>>,
    /// Digests in the log that are not this member's.
    pub(crate) mismatches: mpsc::Sender<Mismatch>,
}

/// The state machine of one member.
pub struct StateMachine {
    store: Arc<Store>,
    log: LogStore,
    folder: SnapshotFolder,
    /// Where the state stood when it was opened.
    opened: RaftMeta,
    checkpoints: Arc<Checkpoints>,
    applier: Applier,
}

impl StateMachine {
    /// Opens the state machine over a store: where it stands says the record in the store.
    pub(crate) fn open(
        store: Arc<Store>,
        log: LogStore,
        folder: SnapshotFolder,
        progress: Progress,
        health: Arc<Health>,
    ) -> Result<Self, StateMachineError> {
        let opened = read_meta(&store)?;
        let checkpoints = Checkpoints::new(log.clone(), opened.next_index());
        let worker = Worker {
            store: store.clone(),
            folder: folder.clone(),
            meta: opened.clone(),
            progress,
            checkpoints: checkpoints.clone(),
            health,
            failure: Arc::default(),
        };
        let applier = Applier::start(worker)?;
        Ok(StateMachine { store, log, folder, opened, checkpoints, applier })
    }

    /// When this state is made durable. Somebody must run it.
    pub(crate) fn checkpoints(&self) -> Arc<Checkpoints> {
        self.checkpoints.clone()
    }

    /// Up to where the state went when it was opened, and in which membership.
    pub(crate) fn opened(&self) -> &RaftMeta {
        &self.opened
    }
}

/// Raft's own record in a state.
pub(crate) fn read_meta(store: &Store) -> Result<RaftMeta, StateMachineError> {
    match store.raft_meta()? {
        Some(bytes) => Ok(RaftMeta::decode(&bytes)?),
        None => Ok(RaftMeta::default()),
    }
}

/// Puts a snapshot in the place of a state, and answers with Raft's record in it. A file that is not what its own digest and
/// header say is refused (I1); when the header alone is wrong, that shows only once the state was replaced.
pub(crate) fn install(store: &Store, file: &SnapshotFile) -> Result<RaftMeta, StateMachineError> {
    file.verify()?;
    store.install(&mut file.body()?)?;
    let installed = read_meta(store)?;
    if installed == file.meta { Ok(installed) } else { Err(StateMachineError::WrongSnapshot) }
}

/// Runs work on the disk off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StateMachineError> + Send + 'static,
) -> Result<T, io::Error> {
    Ok(disk_work::run(work).await??)
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let meta = self.applier.settle().await?;
        Ok((meta.last_applied, meta.membership))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut entries = entries;
        let mut batch = Batch::default();
        while let Some((entry, responder)) = entries.try_next().await? {
            batch.push(entry.log_id(), entry.payload, responder);
            if batch.is_full() {
                self.applier.apply(std::mem::take(&mut batch)).await?;
            }
        }
        if batch.is_empty() { Ok(()) } else { self.applier.apply(batch).await }
    }

    /// The snapshot covers everything that was handed over before, as openraft takes for granted.
    async fn get_snapshot_builder(&mut self) -> Builder {
        // After a failure the state is what it was before, which is no less consistent.
        drop(self.applier.settle().await);
        Builder {
            source: Some(self.store.snapshot()),
            store: self.store.clone(),
            log: self.log.clone(),
            folder: self.folder.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta,
        snapshot: SnapshotFile,
    ) -> Result<(), io::Error> {
        self.applier.install(meta.clone(), snapshot).await
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<LeaderId, u64, MemberNode, SnapshotFile>>, io::Error> {
        let folder = self.folder.clone();
        let newest = blocking(move || Ok(folder.newest()?)).await?;
        Ok(newest.map(|file| Snapshot { meta: file.meta.snapshot_meta(), snapshot: file }))
    }
}

/// Builds one snapshot from a state that no longer changes, while the state machine goes on.
pub struct Builder {
    source: Option<Result<SnapshotSource, StoreError>>,
    store: Arc<Store>,
    log: LogStore,
    folder: SnapshotFolder,
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotFile;

    /// Once this returns, openraft may purge the log up to the snapshot. So the snapshot file is durable by then, and so
    /// is the state machine's own state.
    async fn build_snapshot(
        &mut self,
    ) -> Result<Snapshot<LeaderId, u64, MemberNode, SnapshotFile>, io::Error> {
        let source =
            self.source.take().ok_or_else(|| io::Error::other("this builder built its snapshot already"))?;
        let (store, folder) = (self.store.clone(), self.folder.clone());
        let file = blocking(move || {
            let source = source?;
            // From the same moment as the state, whatever is being applied meanwhile.
            let meta = source
                .raft_meta()?
                .map_or_else(|| Ok(RaftMeta::default()), |bytes| RaftMeta::decode(&bytes))?;
            let file =
                folder.build(&meta, |out| source.write_to(out).map(drop)).map_err(StateMachineError::from)?;
            store.checkpoint()?;
            Ok(file)
        });
        let file = file.await?;
        self.log.allow_purge_below_at_least(file.meta.next_index());
        Ok(Snapshot { meta: file.meta.snapshot_meta(), snapshot: file })
    }
}
