//! What instances wrote, on this node's disk: one bounded ring per instance, and the answers to questions for it.
//!
//! How much a workload writes is the tenant's choice, so every ring is bounded in bytes and age, all of them together
//! are bounded ([`retention`]), and so is every answer. Rings survive the agent, and the instance for a stated time.

mod epoch;
mod read;
pub mod redact;
pub mod retention;
mod ring;
mod segment;
mod shelf;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use holdfast_model::InstanceId;
use holdfast_model::agent::{AgentCall, CallAnswer, LOG_LINES_MAX};
use tokio::sync::Semaphore;

use crate::machine::now_ms;
use redact::RedactError;
use retention::Retention;
use shelf::Shelf;

pub use ring::{Line, LogError, Ring, RingStats};

/// The longest wait for a first line.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// Questions that wait for a line at a time. Who asks beyond that is answered at once and asks again, so that questions
/// of other kinds find room.
pub const WAITING_MAX: usize = 32;

/// The rings of this node.
#[derive(Debug)]
pub struct Logs {
    shelf: Arc<Shelf>,
    waiting: Semaphore,
}

impl Logs {
    /// The rings in this folder, which is made if needed, with the default retention.
    pub fn open(folder: PathBuf) -> Result<Self, LogError> {
        Self::open_with(folder, Retention::default())
    }

    /// The rings in this folder, which is made if needed.
    pub fn open_with(folder: PathBuf, retention: Retention) -> Result<Self, LogError> {
        Ok(Self { shelf: Shelf::open(folder, retention)?, waiting: Semaphore::new(WAITING_MAX) })
    }

    /// The ring of an instance, which is made if needed. Blocks on the disk.
    pub fn ring(&self, instance: InstanceId) -> Result<Arc<Ring>, LogError> {
        self.shelf.ring(instance)
    }

    /// From now on these values are taken out of whatever the instance writes (I10), in place of those that were known
    /// before. To be called before the instance can know them, and again after a restart of the agent before its
    /// machine is adopted. On failure every line of the instance is stored without its text.
    ///
    /// # Errors
    /// When the ring cannot be opened, or the values are more than a bundle may hold.
    pub fn know_secrets<'v>(
        &self,
        instance: InstanceId,
        values: impl IntoIterator<Item = &'v [u8]>,
    ) -> Result<(), SecretsError> {
        Ok(self.ring(instance)?.know_secrets(values)?)
    }

    /// What each ring that is open has seen.
    pub fn stats(&self) -> BTreeMap<InstanceId, RingStats> {
        self.shelf.stats()
    }

    /// Bytes of all rings on disk, those of ended instances included.
    pub fn used_bytes(&self) -> u64 {
        self.shelf.used_bytes()
    }

    /// Answers a question of the control plane. Lines of an instance that this node never had are not found; so is
    /// everything that is no question for lines.
    pub async fn answer(&self, call: &AgentCall) -> CallAnswer {
        match *call {
            AgentCall::Logs { instance, after, limit, wait_ms } => {
                let limit = usize::try_from(limit).unwrap_or(LOG_LINES_MAX).clamp(1, LOG_LINES_MAX);
                let read = move |ring: &Ring| ring.read(after, limit).map(CallAnswer::Logs);
                self.lines(instance, |_| after, wait_ms, read).await
            }
            AgentCall::ReadLogs { instance, start, bytes, wait_ms } => {
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                let known = |ring: &Ring| start.after.map(|cursor| ring.epochs.known_to(cursor));
                let read = move |ring: &Ring| ring.chunk(&start, bytes).map(CallAnswer::LogChunk);
                self.lines(instance, known, wait_ms, read).await
            }
            AgentCall::Exec(_) => CallAnswer::NotFound,
        }
    }

    /// Waits for a line after what is `known`, then reads on a thread that may block.
    async fn lines(
        &self,
        instance: InstanceId,
        known: impl FnOnce(&Ring) -> Option<u64>,
        wait_ms: u64,
        read: impl FnOnce(&Ring) -> Result<CallAnswer, LogError> + Send + 'static,
    ) -> CallAnswer {
        if !self.shelf.has(instance) {
            return CallAnswer::NotFound;
        }
        let answered = async {
            let ring = self.ring(instance)?;
            let wait = Duration::from_millis(wait_ms).min(WAIT_MAX);
            self.wait(&ring, known(&ring).unwrap_or(0), wait).await;
            tokio::task::spawn_blocking(move || read(&ring)).await.unwrap_or(Ok(CallAnswer::NotFound))
        };
        answered.await.unwrap_or_else(|error: LogError| {
            tracing::warn!(%instance, error = %chain(&error), "the log of an instance could not be read");
            CallAnswer::NotFound
        })
    }

    /// Waits for a line after `known`. No line in that time is an answer like any other.
    async fn wait(&self, ring: &Ring, known: u64, wait: Duration) {
        if ring.last_seq() > known || wait.is_zero() {
            return;
        }
        let Ok(_permit) = self.waiting.try_acquire() else { return };
        let mut last = ring.subscribe();
        tokio::time::timeout(wait, last.wait_for(|seq| *seq > known)).await.ok();
    }

    /// From now on these instances are here, and all others have ended. Who comes later is to be told of before it has a
    /// ring: what a ring knows of secrets ends with its instance.
    pub fn keep(&self, instances: &BTreeSet<InstanceId>) {
        self.shelf.keep(instances);
    }

    /// Removes what is older than the retention says, and logs of instances that ended too long ago.
    pub fn sweep(&self) -> Result<(), LogError> {
        self.shelf.sweep(now_ms())
    }
}

/// Why secrets are not looked for.
#[derive(Debug, thiserror::Error)]
pub enum SecretsError {
    /// There is no ring.
    #[error(transparent)]
    Log(#[from] LogError),
    /// There are too many.
    #[error(transparent)]
    Values(#[from] RedactError),
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
