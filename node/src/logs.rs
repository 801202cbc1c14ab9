//! What instances wrote, on this node's disk: one bounded ring per instance, and the answers to questions for it.
//!
//! How much a workload writes is the tenant's choice, so every ring is bounded ([`ring`]), the rings of instances
//! that are gone are bounded in number, and so is every answer. Rings survive the agent and the instance.

mod ring;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_model::InstanceId;
use holdfast_model::agent::{AgentCall, CallAnswer, LOG_LINES_MAX};

pub use ring::{Line, LogError, Ring, SEGMENT_BYTES_MAX};

/// The longest wait for a first line.
pub const WAIT_MAX: Duration = Duration::from_secs(30);

/// Rings of instances that are gone which are kept, newest first.
pub const GONE_MAX: usize = 64;

/// The rings of this node.
#[derive(Debug)]
pub struct Logs {
    folder: PathBuf,
    /// Those that are open: the instances that this agent runs, and those that were asked for.
    open: Mutex<BTreeMap<InstanceId, Arc<Ring>>>,
}

impl Logs {
    /// The rings in this folder, which is made if needed.
    pub fn open(folder: PathBuf) -> Result<Self, LogError> {
        fs::create_dir_all(&folder).map_err(|source| LogError::access(&folder, "created", source))?;
        Ok(Self { folder, open: Mutex::default() })
    }

    /// The ring of an instance, which is made if needed. Blocks on the disk.
    pub fn ring(&self, instance: InstanceId) -> Result<Arc<Ring>, LogError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(ring) = open.get(&instance) {
            return Ok(Arc::clone(ring));
        }
        let ring = Arc::new(Ring::open(self.folder.join(instance.to_string()))?);
        open.insert(instance, Arc::clone(&ring));
        Ok(ring)
    }

    /// Answers a question of the control plane. Lines of an instance that this node never had are not found.
    pub async fn answer(&self, call: &AgentCall) -> CallAnswer {
        let AgentCall::Logs { instance, after, limit, wait_ms } = call;
        if !self.folder.join(instance.to_string()).is_dir() {
            return CallAnswer::NotFound;
        }
        let limit = usize::try_from(*limit).unwrap_or(LOG_LINES_MAX).clamp(1, LOG_LINES_MAX);
        let wait = Duration::from_millis(*wait_ms).min(WAIT_MAX);
        match self.lines(*instance, *after, limit, wait).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(%instance, error = %chain(&error), "the log of an instance could not be read");
                CallAnswer::NotFound
            }
        }
    }

    async fn lines(
        &self,
        instance: InstanceId,
        after: Option<u64>,
        limit: usize,
        wait: Duration,
    ) -> Result<CallAnswer, LogError> {
        let ring = self.ring(instance)?;
        let known = after.unwrap_or(0);
        if ring.last_seq() <= known && !wait.is_zero() {
            let mut last = ring.subscribe();
            // No line in that time is an answer like any other.
            tokio::time::timeout(wait, last.wait_for(|seq| *seq > known)).await.ok();
        }
        let read = tokio::task::spawn_blocking(move || ring.read(after, limit)).await;
        read.unwrap_or_else(|_| Ok(Vec::new())).map(CallAnswer::Logs)
    }

    /// Closes the rings of all but these instances, and removes the oldest of them beyond [`GONE_MAX`].
    pub fn retain(&self, instances: &BTreeSet<InstanceId>) -> Result<(), LogError> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| instances.contains(id));
        let failed = |source: io::Error| LogError::access(&self.folder, "listed", source);
        let mut gone = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let id = entry.file_name().to_str().and_then(|name| name.parse::<InstanceId>().ok());
            if id.is_some_and(|id| !instances.contains(&id)) {
                gone.push((id, entry.path()));
            }
        }
        // Ids rise with time: the newest come last.
        gone.sort();
        let surplus = gone.len().saturating_sub(GONE_MAX);
        for (_, path) in gone.into_iter().take(surplus) {
            fs::remove_dir_all(&path).map_err(|source| LogError::access(&path, "removed", source))?;
        }
        Ok(())
    }
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

#[cfg(test)]
mod tests {
    use holdfast_model::agent::LogStream;

    use super::*;

    fn line(text: &str) -> Line {
        Line { time_ms: 1, stream: LogStream::Stdout, guest_seq: 0, text: text.to_owned() }
    }

    fn call(instance: InstanceId, after: Option<u64>, wait_ms: u64) -> AgentCall {
        AgentCall::Logs { instance, after, limit: 100, wait_ms }
    }

    #[tokio::test]
    async fn a_waiting_question_is_answered_by_the_first_line() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Arc::new(Logs::open(folder.path().join("logs")).unwrap());
        let id = InstanceId::from_bits(1);
        assert_eq!(logs.answer(&call(id, None, 0)).await, CallAnswer::NotFound);
        let ring = logs.ring(id).unwrap();
        ring.append(&[line("first")]).unwrap();
        let waiting = tokio::spawn({
            let logs = Arc::clone(&logs);
            // The answer must come from the line, not from the end of this hour.
            async move { logs.lines(id, Some(1), 10, Duration::from_secs(3_600)).await }
        });
        tokio::task::yield_now().await;
        ring.append(&[line("second")]).unwrap();
        let CallAnswer::Logs(lines) = waiting.await.unwrap().unwrap() else { panic!("not found") };
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].seq, lines[0].text.as_str()), (2, "second"));
        assert_eq!(logs.answer(&call(id, Some(2), 0)).await, CallAnswer::Logs(Vec::new()));
    }

    #[test]
    fn rings_of_instances_that_are_gone_are_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let logs = Logs::open(folder.path().join("logs")).unwrap();
        let id = |n: usize| InstanceId::from_bits(n as u128);
        for n in 0..GONE_MAX + 10 {
            logs.ring(id(n)).unwrap().append(&[line("x")]).unwrap();
        }
        logs.retain(&BTreeSet::from([id(0)])).unwrap();
        let left = |n: usize| folder.path().join("logs").join(id(n).to_string()).exists();
        assert!(left(0), "an instance that is here keeps its ring");
        assert!(!left(1) && !left(9) && left(10) && left(GONE_MAX + 9));
    }
}
