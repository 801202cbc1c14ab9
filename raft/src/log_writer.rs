//! The one thread that writes `log.redb` and its journal.
//!
//! It takes whatever waits in its queue and makes all of it durable with a single fsync; only then does it tell anyone that
//! a vote or an entry is stored (I2). Where nothing but entries wait, they go into the journal. Anything else, and entries
//! for which the journal has no room, go into one transaction of `log.redb`, in the order in which they were asked for
//! and after everything that lies in the journal. While that is under way new requests gather, so the number of requests
//! per fsync grows with the load by itself.
//!
//! It never retries. After the first error nothing is known about what the disk holds, so it answers that error to
//! whoever waits and to everyone who comes later, until the process ends.

use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, JoinHandle};

use openraft::entry::RaftEntry;
use openraft::storage::IOFlushed;
use redb::{Database, Durability, ReadableTable, Table};
use tokio::sync::{mpsc, oneshot};

use crate::disk_work;
use crate::log_journal::Journal;
use crate::log_opening::write_rows;
use crate::log_record::{self, Place};
use crate::log_store::{ENTRIES, LogStoreError, META, META_COMMITTED, META_PURGED, META_VOTE};
use crate::log_view::LogView;
use crate::member_identity::MemberIdentity;
#[cfg(feature = "planted-bugs")]
use crate::planted;
use crate::types::{Entry, LogId, TypeConfig, Vote};

/// Requests that may wait for the writer. More than that and the caller waits: back-pressure, not memory.
pub(crate) const QUEUE_REQUESTS_MAX: usize = 1024;
/// Requests that go into one transaction.
const BATCH_REQUESTS_MAX: usize = 256;
/// Purged entries that are deleted per transaction, so that a long purge never delays an append by much.
const PURGE_ENTRIES_PER_BATCH: u64 = 2048;
/// Entries that may lie in the journal, however small: they are taken over at once, and kept in memory until then.
const JOURNAL_ENTRIES_MAX: usize = 8192;

/// What the writer is asked to do.
pub(crate) enum WriteRequest {
    /// Store entries that follow the last one.
    Append {
        /// The entries.
        entries: Vec<Entry>,
        /// Told when they are durable.
        done: IOFlushed<TypeConfig>,
    },
    /// Store the vote.
    Vote {
        /// The vote.
        vote: Vote,
        /// Told when it is durable.
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Delete every entry at and after an index.
    Truncate {
        /// The index.
        from: u64,
        /// Told when it is durable.
        done: oneshot::Sender<io::Result<()>>,
    },
    /// Delete every entry up to a log id, inclusive. Deletion may take several batches.
    Purge {
        /// The log id.
        upto: LogId,
    },
    /// Write whatever is pending, the committed log id included.
    Flush {
        /// Told when it is durable.
        done: oneshot::Sender<io::Result<()>>,
    },
}

/// What the writer thread and the log store share.
pub(crate) struct WriterState {
    /// The readers' view.
    pub(crate) view: Arc<Mutex<LogView>>,
    /// The first error, once there was one.
    pub(crate) failure: OnceLock<String>,
    /// How many commits reached stable storage.
    pub(crate) commits: std::sync::atomic::AtomicU64,
}

/// A log that was opened.
pub(crate) struct Opened {
    /// `log.redb`.
    pub(crate) database: Arc<Database>,
    /// Its journal, which holds nothing.
    pub(crate) journal: Journal,
    /// Whose it is.
    pub(crate) identity: Option<MemberIdentity>,
    /// Entries up to here are purged and may still lie in the file.
    pub(crate) purge_backlog: Option<u64>,
}

/// Starts the writer. It ends when every sender is gone and everything they sent is stored. In a simulation it is a task
/// and not a thread.
pub(crate) fn spawn(
    opened: Opened,
    state: Arc<WriterState>,
) -> io::Result<(mpsc::Sender<WriteRequest>, Option<JoinHandle<()>>)> {
    let (sender, receiver) = mpsc::channel(QUEUE_REQUESTS_MAX);
    let writer = Writer { opened, state, receiver, in_journal: Vec::new(), committed_written: None };
    if disk_work::simulated_pace().is_some() {
        tokio::spawn(writer.run_simulated());
        return Ok((sender, None));
    }
    let thread = thread::Builder::new().name("raft-log-writer".into()).spawn(move || writer.run())?;
    Ok((sender, Some(thread)))
}

struct Writer {
    opened: Opened,
    state: Arc<WriterState>,
    receiver: mpsc::Receiver<WriteRequest>,
    /// Index and record of the entries that are in the journal and not in `log.redb`.
    in_journal: Vec<(u64, Vec<u8>)>,
    /// The committed log id that lies in the file or its journal.
    committed_written: Option<LogId>,
}

/// Whom to tell how a batch went.
enum Waiter {
    Flushed(IOFlushed<TypeConfig>),
    Answer(oneshot::Sender<io::Result<()>>),
}

impl Waiter {
    fn tell(self, result: io::Result<()>) {
        match self {
            Waiter::Flushed(done) => done.io_completed(result),
            // The asker may have gone; the write stands all the same.
            Waiter::Answer(done) => drop(done.send(result)),
        }
    }
}

#[cfg(feature = "planted-bugs")]
fn acknowledged_early(request: WriteRequest) -> WriteRequest {
    match request {
        WriteRequest::Append { entries, done } => {
            done.io_completed(Ok(()));
            WriteRequest::Append { entries, done: IOFlushed::noop() }
        }
        other => other,
    }
}

impl Writer {
    fn run(mut self) {
        let mut requests = Vec::with_capacity(BATCH_REQUESTS_MAX);
        while self.gather(&mut requests) {
            self.write(&mut requests);
        }
        self.close();
    }

    /// The same without a thread: each commit takes as long as the simulated disk says.
    async fn run_simulated(mut self) {
        let mut requests = Vec::with_capacity(BATCH_REQUESTS_MAX);
        loop {
            let idle = self.opened.purge_backlog.is_none() || self.state.failure.get().is_some();
            if idle && self.receiver.recv_many(&mut requests, BATCH_REQUESTS_MAX).await == 0 {
                self.close();
                return;
            }
            #[cfg(feature = "planted-bugs")]
            if planted::is(planted::Bug::AckBeforeFsync) {
                requests = requests.into_iter().map(acknowledged_early).collect();
            }
            tokio::time::sleep(disk_work::simulated_pace().unwrap_or_default()).await;
            if !self.gather_waiting(&mut requests) {
                self.close();
                return;
            }
            self.write(&mut requests);
        }
    }

    /// Commits what was gathered, then tells whoever waits for it.
    fn write(&mut self, requests: &mut Vec<WriteRequest>) {
        let mut waiters = Vec::with_capacity(requests.len());
        let result = match self.state.failure.get() {
            Some(failure) => Err(failure.clone()),
            None => self.commit(requests).map_err(|error| self.fail(&error)),
        };
        for request in requests.drain(..) {
            waiters.extend(match request {
                WriteRequest::Append { done, .. } => Some(Waiter::Flushed(done)),
                WriteRequest::Vote { done, .. }
                | WriteRequest::Truncate { done, .. }
                | WriteRequest::Flush { done } => Some(Waiter::Answer(done)),
                WriteRequest::Purge { .. } => None,
            });
        }
        for waiter in waiters {
            waiter.tell(result.as_ref().map(|_| ()).map_err(|failure| io::Error::other(failure.clone())));
        }
    }

    /// Takes what waits; blocks when nothing does and no purge is unfinished. False when there will be no more.
    fn gather(&mut self, requests: &mut Vec<WriteRequest>) -> bool {
        if self.opened.purge_backlog.is_some() && self.state.failure.get().is_none() {
            return self.gather_waiting(requests);
        }
        self.receiver.blocking_recv_many(requests, BATCH_REQUESTS_MAX) > 0
    }

    /// Takes what waits now. False when there will be no more.
    fn gather_waiting(&mut self, requests: &mut Vec<WriteRequest>) -> bool {
        while requests.len() < BATCH_REQUESTS_MAX {
            match self.receiver.try_recv() {
                Ok(request) => requests.push(request),
                Err(mpsc::error::TryRecvError::Empty) => return true,
                Err(mpsc::error::TryRecvError::Disconnected) => return !requests.is_empty(),
            }
        }
        true
    }

    fn fail(&self, error: &LogStoreError) -> String {
        let text = describe(error);
        tracing::error!(error = %text, "the raft log cannot be written any more; this member stops");
        self.state.failure.get_or_init(|| text).clone()
    }

    /// Leaves nothing in the journal, so that a build that knows none can go on.
    fn close(&mut self) {
        if self.state.failure.get().is_none()
            && let Err(error) = self.commit_all(&[], false)
        {
            self.fail(&error);
        }
    }

    /// One fsync.
    fn commit(&mut self, requests: &[WriteRequest]) -> Result<(), LogStoreError> {
        if !self.commit_to_journal(requests)? {
            self.commit_all(requests, true)?;
        }
        self.state.commits.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    /// Puts entries into the journal. False, and nothing was done, where something else is to be written or no room is left.
    fn commit_to_journal(&mut self, requests: &[WriteRequest]) -> Result<bool, LogStoreError> {
        let only_entries = requests.iter().all(|request| matches!(request, WriteRequest::Append { .. }));
        if !only_entries
            || self.opened.purge_backlog.is_some()
            || self.in_journal.len() >= JOURNAL_ENTRIES_MAX
        {
            return Ok(false);
        }
        let mut records = Vec::new();
        for request in requests {
            if let WriteRequest::Append { entries, .. } = request {
                for entry in entries {
                    records.push((entry.index(), log_record::encode_entry(entry)?));
                }
            }
        }
        let Some(last) = records.last().map(|(index, _)| *index) else { return Ok(false) };
        let committed = self.committed(Some(last));
        let along = committed.filter(|committed| self.committed_written.as_ref() != Some(committed));
        let along = along.map(|committed| log_record::encode(Place::Meta(META_COMMITTED), &committed));
        if !self.opened.journal.append(&records, along.transpose()?.as_deref())? {
            return Ok(false);
        }
        self.in_journal.append(&mut records);
        self.committed_written = committed;
        if let Ok(mut view) = self.state.view.lock() {
            view.made_durable(last);
        }
        Ok(true)
    }

    /// One transaction of `log.redb`: what lies in the journal, then what is asked for, in order. `open` says whether the
    /// journal will be used again.
    fn commit_all(&mut self, requests: &[WriteRequest], open: bool) -> Result<(), LogStoreError> {
        let mut transaction = self.opened.database.begin_write()?;
        transaction.set_durability(Durability::Immediate)?;
        let mut last_written = self.in_journal.last().map(|(index, _)| *index);
        let row = self.opened.journal.next_row(open);
        let committed;
        {
            let mut entries = transaction.open_table(ENTRIES)?;
            let mut meta = transaction.open_table(META)?;
            for (index, record) in &self.in_journal {
                entries.insert(index, record.as_slice())?;
            }
            for request in requests {
                match request {
                    WriteRequest::Append { entries: new, .. } => {
                        for entry in new {
                            entries.insert(entry.index(), log_record::encode_entry(entry)?.as_slice())?;
                            last_written = Some(entry.index());
                        }
                    }
                    WriteRequest::Vote { vote, .. } => {
                        let record = log_record::encode(Place::Meta(META_VOTE), vote)?;
                        meta.insert(META_VOTE, record.as_slice())?;
                    }
                    WriteRequest::Truncate { from, .. } => {
                        entries.retain_in(*from.., |_, _| false)?;
                        last_written = match last_written {
                            Some(last) if last >= *from => from.checked_sub(1),
                            earlier => earlier,
                        };
                    }
                    WriteRequest::Purge { upto } => {
                        let record = log_record::encode(Place::Meta(META_PURGED), upto)?;
                        meta.insert(META_PURGED, record.as_slice())?;
                        let backlog = &mut self.opened.purge_backlog;
                        *backlog = Some(backlog.unwrap_or(0).max(upto.index()));
                    }
                    WriteRequest::Flush { .. } => {}
                }
            }
            self.purge_some(&mut entries)?;
            committed = self.committed(last_written);
            if let Some(committed) = &committed {
                let record = log_record::encode(Place::Meta(META_COMMITTED), committed)?;
                meta.insert(META_COMMITTED, record.as_slice())?;
            }
            write_rows(&mut meta, self.opened.identity.as_ref().filter(|_| !open), &row)?;
        }
        transaction.commit()?;
        self.opened.journal.begin(row);
        self.in_journal.clear();
        self.committed_written = committed;
        if let Some(last) = last_written
            && let Ok(mut view) = self.state.view.lock()
        {
            view.made_stored(last);
        }
        Ok(())
    }

    /// Deletes the next purged entries that are still in the file.
    fn purge_some(&mut self, entries: &mut Table<'_, u64, &'static [u8]>) -> Result<(), LogStoreError> {
        let Some(through) = self.opened.purge_backlog else { return Ok(()) };
        let first = entries.first()?.map(|(key, _)| key.value()).filter(|first| *first <= through);
        let Some(first) = first else {
            self.opened.purge_backlog = None;
            return Ok(());
        };
        let end = (first + PURGE_ENTRIES_PER_BATCH).min(through + 1);
        entries.retain_in(first..end, |_, _| false)?;
        if end > through {
            self.opened.purge_backlog = None;
        }
        Ok(())
    }

    /// The committed log id to write along, as far as this log holds the entries that it speaks of: an entry that a
    /// majority has and this member does not may not be called committed here, or a restart could not apply up to it.
    fn committed(&self, last_written: Option<u64>) -> Option<LogId> {
        let Ok(view) = self.state.view.lock() else { return self.committed_written };
        let durable_next = last_written.map_or(0, |last| last + 1).max(view.durable_next());
        view.committed.filter(|committed| committed.index() < durable_next).or(self.committed_written)
    }
}

/// The whole chain of an error in one line: it becomes a string here, because many askers get the same one.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
