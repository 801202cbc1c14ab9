//! The state machine as openraft drives it: batches of committed entries go to the store in one transaction each.
//!
//! The store does not fsync them, because the log holds them durably and replays what a crash takes back. A checkpoint
//! makes the state durable now and then, and only what a checkpoint covers may be purged from the log (I2). Nothing here
//! decides what a command means. All work on the disk happens on blocking threads.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{Stream, StreamExt, TryStreamExt};
use holdfast_model::{Command, LogIndex, Outcome, Proposal, Revision};
use holdfast_store::{SnapshotSource, Store, StoreError};
use openraft::entry::RaftEntry;
use openraft::storage::{ApplyResponder, EntryResponder, RaftStateMachine, Snapshot};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::{mpsc, watch};

use crate::disk_work;
use crate::divergence::Mismatch;
use crate::log_record::RecordError;
use crate::log_store::LogStore;
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::{BuildError, SnapshotFile, SnapshotFileError, SnapshotFolder};
use crate::types::{
    CommandError, LeaderId, LogId, MemberNode, Reply, SnapshotMeta, StoredMembership, TypeConfig,
};

/// Entries of one transaction. Large enough that its fixed cost vanishes, small enough that answers do not wait long.
const BATCH_ENTRIES_MAX: usize = 512;
/// Bytes of commands of one transaction.
const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;
/// A checkpoint is due after so many entries …
const CHECKPOINT_ENTRIES: u64 = 8192;
/// … or, when there are fewer, after this time.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);

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
    meta: RaftMeta,
    progress: Progress,
    checkpoint_next: u64,
    checkpointed_at: Instant,
}

impl StateMachine {
    /// Opens the state machine over a store: where it stands says the record in the store.
    pub(crate) fn open(
        store: Arc<Store>,
        log: LogStore,
        folder: SnapshotFolder,
        progress: Progress,
    ) -> Result<Self, StateMachineError> {
        let meta = read_meta(&store)?;
        log.allow_purge_below(meta.next_index());
        let machine = StateMachine {
            checkpoint_next: meta.next_index(),
            checkpointed_at: Instant::now(),
            store,
            log,
            folder,
            meta,
            progress,
        };
        machine.publish();
        Ok(machine)
    }

    /// Up to where the state goes, and in which membership.
    pub(crate) fn meta(&self) -> &RaftMeta {
        &self.meta
    }

    fn publish(&self) {
        self.progress.revision.send_replace(self.store.revision());
        self.progress.applied_next.send_replace(self.meta.next_index());
        self.progress.former_members.send_if_modified(|known| {
            let changed = *known != self.meta.former_members;
            if changed {
                known.clone_from(&self.meta.former_members);
            }
            changed
        });
    }

    /// Applies one batch, answers whoever waits for its entries, and checkpoints when it is time.
    async fn apply_batch(&mut self, batch: Batch) -> Result<(), io::Error> {
        let mut meta = self.meta.clone();
        for (log_id, payload) in &batch.entries {
            if let EntryPayload::Membership(membership) = payload {
                meta.set_membership(*log_id, membership.clone());
            }
            meta.last_applied = Some(*log_id);
        }
        let next = meta.next_index();
        let checkpoint = next - self.checkpoint_next >= CHECKPOINT_ENTRIES
            || self.checkpointed_at.elapsed() >= CHECKPOINT_INTERVAL;
        let encoded = meta.encode().map_err(StateMachineError::from)?;
        let work = Work { store: self.store.clone(), meta: encoded, entries: batch.entries, checkpoint };
        let done = blocking(move || work.run()).await?;
        self.meta = meta;
        if checkpoint {
            self.note_checkpoint(next);
        }
        for mismatch in done.mismatches {
            // When the queue is full, the mismatches in it are being looked into already.
            let _ = self.progress.mismatches.try_send(mismatch);
        }
        self.publish();
        for (responder, outcome) in batch.responders.into_iter().zip(done.outcomes) {
            if let Some(responder) = responder {
                responder.send(Reply(outcome.into_iter().next()));
            }
        }
        Ok(())
    }

    fn note_checkpoint(&mut self, next: u64) {
        self.checkpoint_next = next;
        self.checkpointed_at = Instant::now();
        self.log.allow_purge_below_at_least(next);
    }
}

pub(crate) fn read_meta(store: &Store) -> Result<RaftMeta, StateMachineError> {
    match store.raft_meta()? {
        Some(bytes) => Ok(RaftMeta::decode(&bytes)?),
        None => Ok(RaftMeta::default()),
    }
}

/// Runs work on the disk off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StateMachineError> + Send + 'static,
) -> Result<T, io::Error> {
    Ok(disk_work::run(work).await??)
}

type Payload = openraft::type_config::alias::PayloadOf<TypeConfig>;

/// Entries that are applied together, and who waits for each.
#[derive(Default)]
struct Batch {
    entries: Vec<(LogId, Payload)>,
    responders: Vec<Option<ApplyResponder<TypeConfig>>>,
}

impl Batch {
    /// Takes entries until the batch is full or the stream ends.
    async fn gather<S>(entries: &mut S) -> Result<Self, io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        let mut batch = Batch::default();
        let mut bytes = 0;
        while batch.entries.len() < BATCH_ENTRIES_MAX && bytes < BATCH_BYTES_MAX {
            let Some((entry, responder)) = entries.try_next().await? else { break };
            if let EntryPayload::Normal(command) = &entry.payload {
                bytes += command.bytes().len();
            }
            batch.entries.push((entry.log_id(), entry.payload));
            batch.responders.push(responder);
        }
        Ok(batch)
    }
}

/// One batch on its way through the store.
struct Work {
    store: Arc<Store>,
    meta: Vec<u8>,
    entries: Vec<(LogId, Payload)>,
    checkpoint: bool,
}

/// What came of it.
#[derive(Default)]
struct Done {
    /// Of each entry's proposals.
    outcomes: Vec<Vec<Outcome>>,
    /// Digests in the batch that are not this member's.
    mismatches: Vec<Mismatch>,
}

impl Work {
    fn run(self) -> Result<Done, StateMachineError> {
        let mut proposals: Vec<Vec<Proposal>> = Vec::with_capacity(self.entries.len());
        let mut proposed_digests = Vec::new();
        for (log_id, payload) in &self.entries {
            let EntryPayload::Normal(command) = payload else {
                proposals.push(Vec::new());
                continue;
            };
            let index = log_id.index();
            let proposal = command.decode().map_err(|source| StateMachineError::Command { index, source })?;
            // Compared here and kept from the store, which would stop this member although it may be the one that is
            // right: see `divergence`.
            if let Command::VerifyDigest { at, digest } = proposal.command {
                proposed_digests.push((at, digest));
                proposals.push(Vec::new());
            } else {
                proposals.push(vec![proposal]);
            }
        }
        #[cfg(feature = "planted-bugs")]
        let reversed = crate::planted::is(crate::planted::Bug::ApplyOutOfOrder)
            && proposals.iter().all(|entry| !entry.is_empty());
        #[cfg(feature = "planted-bugs")]
        if reversed {
            proposals.reverse();
        }
        let Some((first, _)) = self.entries.first() else { return Ok(Done::default()) };
        let outcomes = self.store.apply(LogIndex(first.index()), &proposals, &self.meta)?;
        #[cfg(feature = "planted-bugs")]
        let outcomes = if reversed { outcomes.into_iter().rev().collect() } else { outcomes };
        if outcomes.len() != proposals.len() {
            return Err(StateMachineError::Outcomes { expected: proposals.len(), found: outcomes.len() });
        }
        if self.checkpoint {
            self.store.checkpoint()?;
        }
        let mut mismatches = Vec::new();
        for (at, proposed) in proposed_digests {
            // A digest that this member does not have, or has forgotten, says nothing.
            if let Some(own) = self.store.digest_at(at)?.filter(|own| *own != proposed) {
                mismatches.push(Mismatch { index: at.0, proposed, own });
            }
        }
        Ok(Done { outcomes, mismatches })
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotData = SnapshotFile;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        Ok((self.meta.last_applied, self.meta.membership.clone()))
    }

    async fn apply<S>(&mut self, entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        // openraft's stream must not be asked again after its end, and the loop below does ask.
        let mut entries = entries.fuse();
        loop {
            let batch = Batch::gather(&mut entries).await?;
            if batch.entries.is_empty() {
                return Ok(());
            }
            self.apply_batch(batch).await?;
        }
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
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
        let (store, folder) = (self.store.clone(), self.folder.clone());
        let expected = meta.clone();
        let installed = blocking(move || {
            let snapshot = folder.keep(snapshot)?;
            store.install(&mut snapshot.body()?)?;
            let installed = read_meta(&store)?;
            if installed.snapshot_meta() == expected {
                Ok(installed)
            } else {
                Err(StateMachineError::WrongSnapshot)
            }
        });
        self.meta = installed.await?;
        self.note_checkpoint(self.meta.next_index());
        self.publish();
        Ok(())
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
