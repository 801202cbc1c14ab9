//! What applies committed entries to the state: one thread, which takes whatever waits, in order, and answers whoever
//! waits for it.
//!
//! openraft hands entries over and goes on; meanwhile more gather, so the number of entries per change of the state grows
//! with the load by itself. A snapshot goes through the same queue, so it takes the place of exactly what was handed over
//! before it. The store does not fsync what is applied, because the log holds it durably and replays what a crash takes
//! back; see [`crate::checkpoints`] for what may be purged from the log (I2).
//!
//! It never retries. After the first error nothing is known about the state, so the member stops: later entries are
//! refused, and whoever waits hears that nobody knows.

use std::io;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use holdfast_model::{Command, LogIndex, Outcome, Proposal};
use holdfast_store::{Store, StoreError};
use openraft::EntryPayload;
use openraft::storage::ApplyResponder;
use tokio::sync::{mpsc, oneshot};

use crate::checkpoints::Checkpoints;
use crate::disk_work;
use crate::divergence::Mismatch;
use crate::health::{Fault, Health};
use crate::network::chain;
use crate::raft_meta::RaftMeta;
use crate::snapshot_file::{SnapshotFile, SnapshotFolder};
use crate::state_machine::{self, Progress, StateMachineError};
use crate::types::{LogId, Reply, SnapshotMeta, TypeConfig};

/// Batches that may wait. More than that and openraft waits: back-pressure, not memory.
const QUEUE_BATCHES_MAX: usize = 16;
/// Entries of one change of the state. Large enough that its fixed cost vanishes, small enough that answers do not wait
/// long.
pub(crate) const BATCH_ENTRIES_MAX: usize = 512;
/// Bytes of commands of one change.
pub(crate) const BATCH_BYTES_MAX: usize = 4 * 1024 * 1024;

type Payload = openraft::type_config::alias::PayloadOf<TypeConfig>;

/// Entries that are applied together, and who waits for each.
#[derive(Default)]
pub(crate) struct Batch {
    entries: Vec<(LogId, Payload)>,
    responders: Vec<Option<ApplyResponder<TypeConfig>>>,
    bytes: usize,
}

impl Batch {
    /// Adds the entry that follows.
    pub(crate) fn push(
        &mut self,
        log_id: LogId,
        payload: Payload,
        responder: Option<ApplyResponder<TypeConfig>>,
    ) {
        if let EntryPayload::Normal(command) = &payload {
            self.bytes += command.bytes().len();
        }
        self.entries.push((log_id, payload));
        self.responders.push(responder);
    }

    /// Whether nothing was added.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether no more should be added.
    pub(crate) fn is_full(&self) -> bool {
        self.entries.len() >= BATCH_ENTRIES_MAX || self.bytes >= BATCH_BYTES_MAX
    }

    fn append(&mut self, mut next: Batch) {
        self.entries.append(&mut next.entries);
        self.responders.append(&mut next.responders);
        self.bytes += next.bytes;
    }
}

/// What the applier is asked to do.
enum Request {
    Apply(Batch),
    Install { meta: SnapshotMeta, snapshot: SnapshotFile, done: oneshot::Sender<io::Result<()>> },
    Settle { done: oneshot::Sender<RaftMeta> },
}

/// The way to the applier. When it is dropped, what was handed over is applied first, and then the state is let go.
pub(crate) struct Applier {
    /// Gone only while it ends.
    queue: Option<mpsc::Sender<Request>>,
    failure: Arc<OnceLock<String>>,
    thread: Option<JoinHandle<()>>,
}

impl Applier {
    /// Starts it. In a simulation it is a task and not a thread.
    pub(crate) fn start(worker: Worker) -> Result<Self, StateMachineError> {
        let (queue, requests) = mpsc::channel(QUEUE_BATCHES_MAX);
        let failure = worker.failure.clone();
        worker.publish();
        let thread = if disk_work::simulated_pace().is_some() {
            tokio::spawn(worker.run_simulated(requests));
            None
        } else {
            let thread =
                thread::Builder::new().name("raft-applier".into()).spawn(move || worker.run(requests));
            Some(thread.map_err(StateMachineError::Thread)?)
        };
        Ok(Applier { queue: Some(queue), failure, thread })
    }

    /// Hands a batch over; waits when too many wait.
    pub(crate) async fn apply(&self, batch: Batch) -> io::Result<()> {
        self.send(Request::Apply(batch)).await
    }

    /// Replaces the state by a snapshot, after everything that was handed over, and waits until it is durable.
    pub(crate) async fn install(&self, meta: SnapshotMeta, snapshot: SnapshotFile) -> io::Result<()> {
        let (done, installed) = oneshot::channel();
        self.send(Request::Install { meta, snapshot, done }).await?;
        installed.await.map_err(|_| self.stopped())?
    }

    /// Waits until everything that was handed over is applied, and tells how the state then stands.
    pub(crate) async fn settle(&self) -> io::Result<RaftMeta> {
        let (done, settled) = oneshot::channel();
        self.send(Request::Settle { done }).await?;
        let meta = settled.await.map_err(|_| self.stopped())?;
        if self.failure.get().is_some() { Err(self.stopped()) } else { Ok(meta) }
    }

    async fn send(&self, request: Request) -> io::Result<()> {
        if self.failure.get().is_some() {
            return Err(self.stopped());
        }
        let Some(queue) = &self.queue else { return Err(self.stopped()) };
        queue.send(request).await.map_err(|_| self.stopped())
    }

    fn stopped(&self) -> io::Error {
        let failure = self.failure.get().map_or("it ended", String::as_str);
        io::Error::other(StateMachineError::Stopped(failure.to_owned()))
    }
}

impl Drop for Applier {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the applier of the raft log panicked");
        }
    }
}

/// Who applies.
pub(crate) struct Worker {
    pub(crate) store: Arc<Store>,
    pub(crate) folder: SnapshotFolder,
    /// Raft's own record in the state.
    pub(crate) meta: RaftMeta,
    pub(crate) progress: Progress,
    pub(crate) checkpoints: Arc<Checkpoints>,
    pub(crate) health: Arc<Health>,
    /// The first error, once there was one.
    pub(crate) failure: Arc<OnceLock<String>>,
}

impl Worker {
    fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut held = None;
        while let Some(request) = held.take().or_else(|| requests.blocking_recv()) {
            held = self.handle(request, &mut requests);
        }
    }

    /// The same without a thread: each piece of work takes as long as the simulated disk says.
    async fn run_simulated(mut self, mut requests: mpsc::Receiver<Request>) {
        let mut held = None;
        loop {
            let request = match held.take() {
                Some(request) => request,
                None => match requests.recv().await {
                    Some(request) => request,
                    None => return,
                },
            };
            tokio::time::sleep(disk_work::simulated_pace().unwrap_or_default()).await;
            held = self.handle(request, &mut requests);
        }
    }

    /// Does one piece of work, and returns a request that was taken and does not belong to it.
    fn handle(&mut self, request: Request, requests: &mut mpsc::Receiver<Request>) -> Option<Request> {
        match request {
            Request::Apply(mut batch) => {
                let mut held = None;
                while !batch.is_full() {
                    match requests.try_recv() {
                        Ok(Request::Apply(next)) => batch.append(next),
                        Ok(other) => {
                            held = Some(other);
                            break;
                        }
                        Err(_) => break,
                    }
                }
                // After a failure the batch is dropped, and its responders with it.
                if self.failure.get().is_none()
                    && let Err(error) = self.apply(batch)
                {
                    self.fail(&error);
                }
                held
            }
            Request::Install { meta, snapshot, done } => {
                let result = match self.failure.get() {
                    Some(failure) => Err(StateMachineError::Stopped(failure.clone())),
                    None => self.install(&meta, snapshot),
                };
                if let Some(fault) = result.as_ref().err().and_then(too_new) {
                    self.health.fail(fault);
                }
                // The state is as it was when a snapshot is refused, but openraft stops after that anyway.
                drop(done.send(result.map_err(io::Error::from)));
                None
            }
            Request::Settle { done } => {
                drop(done.send(self.meta.clone()));
                None
            }
        }
    }

    fn fail(&self, error: &StateMachineError) {
        let text = chain(error);
        tracing::error!(error = %text, "entries of the log cannot be applied any more; this member stops");
        let text = self.failure.get_or_init(|| text).clone();
        self.health.fail(too_new(error).unwrap_or(Fault::Core(text)));
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

    fn apply(&mut self, batch: Batch) -> Result<(), StateMachineError> {
        let mut meta = self.meta.clone();
        for (log_id, payload) in &batch.entries {
            if let EntryPayload::Membership(membership) = payload {
                meta.set_membership(*log_id, membership.clone());
            }
            meta.last_applied = Some(*log_id);
        }
        let done = change(&self.store, &batch.entries, &meta.encode()?)?;
        self.meta = meta;
        for mismatch in done.mismatches {
            // When the queue is full, the mismatches in it are being looked into already.
            let _ = self.progress.mismatches.try_send(mismatch);
        }
        self.publish();
        for (responder, outcomes) in batch.responders.into_iter().zip(done.outcomes) {
            if let Some(responder) = responder {
                responder.send(Reply(outcomes));
            }
        }
        self.checkpoints.applied(batch.bytes, self.store.unsaved_bytes());
        Ok(())
    }

    fn install(&mut self, expected: &SnapshotMeta, snapshot: SnapshotFile) -> Result<(), StateMachineError> {
        let snapshot = self.folder.keep(snapshot)?;
        if snapshot.meta.snapshot_meta() != *expected {
            return Err(StateMachineError::WrongSnapshot);
        }
        self.meta = state_machine::install(&self.store, &snapshot)?;
        self.checkpoints.made(self.meta.next_index());
        self.publish();
        Ok(())
    }
}

/// The fault of a build that is older than the cluster's version, if that is what the error says.
fn too_new(error: &StateMachineError) -> Option<Fault> {
    match *error {
        StateMachineError::Store(StoreError::UnsupportedVersion { version, supported }) => {
            Some(Fault::Unsupported { version, supported })
        }
        _ => None,
    }
}

/// What came of one change of the state.
#[derive(Default)]
struct Done {
    /// Of each entry's proposals; nothing for a comparison of digests.
    outcomes: Vec<Vec<Option<Outcome>>>,
    /// Digests in the batch that are not this member's.
    mismatches: Vec<Mismatch>,
}

/// Decodes the entries and has the store apply them.
fn change(store: &Store, entries: &[(LogId, Payload)], meta: &[u8]) -> Result<Done, StateMachineError> {
    let Some((first, _)) = entries.first() else { return Ok(Done::default()) };
    let mut proposals: Vec<Vec<Proposal>> = Vec::with_capacity(entries.len());
    // Where comparisons lie: number of the entry, place in it.
    let mut compared = Vec::new();
    let mut proposed_digests = Vec::new();
    for (number, (log_id, payload)) in entries.iter().enumerate() {
        let EntryPayload::Normal(command) = payload else {
            proposals.push(Vec::new());
            continue;
        };
        let index = log_id.index();
        let mut all = command.decode_all().map_err(|source| StateMachineError::Command { index, source })?;
        let mut place = 0;
        // Compared here and kept from the store, which would stop this member although it may be the one that is right:
        // see `divergence`.
        all.retain(|proposal| {
            let digest = match proposal.command {
                Command::VerifyDigest { at, digest } => Some((at, digest)),
                _ => None,
            };
            compared.extend(digest.map(|_| (number, place)));
            proposed_digests.extend(digest);
            place += 1;
            digest.is_none()
        });
        proposals.push(all);
    }
    #[cfg(feature = "planted-bugs")]
    let reversed = crate::planted::is(crate::planted::Bug::ApplyOutOfOrder)
        && proposals.iter().all(|entry| !entry.is_empty());
    #[cfg(feature = "planted-bugs")]
    if reversed {
        reverse(&mut proposals);
    }
    let applied = store.apply(LogIndex(first.index()), &proposals, meta)?;
    if applied.len() != proposals.len() {
        return Err(StateMachineError::Outcomes { expected: proposals.len(), found: applied.len() });
    }
    let some = |entry: Vec<Outcome>| entry.into_iter().map(Some).collect();
    let mut outcomes: Vec<Vec<Option<Outcome>>> = applied.into_iter().map(some).collect();
    #[cfg(feature = "planted-bugs")]
    if reversed {
        reverse(&mut outcomes);
    }
    for (number, place) in compared {
        if let Some(entry) = outcomes.get_mut(number)
            && place <= entry.len()
        {
            entry.insert(place, None);
        }
    }
    let mut mismatches = Vec::new();
    for (at, proposed) in proposed_digests {
        // A digest that this member does not have, or has forgotten, says nothing.
        if let Some(own) = store.digest_at(at)?.filter(|own| *own != proposed) {
            mismatches.push(Mismatch { index: at.0, proposed, own });
        }
    }
    Ok(Done { outcomes, mismatches })
}

/// Turns the order of everything in these entries round.
#[cfg(feature = "planted-bugs")]
fn reverse<T>(entries: &mut [Vec<T>]) {
    entries.reverse();
    for entry in entries {
        entry.reverse();
    }
}
