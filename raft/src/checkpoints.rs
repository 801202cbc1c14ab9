//! When the state is made durable: beside the applying of entries, never in its way.
//!
//! Only what a checkpoint covers may be purged from the log (I2). A checkpoint is due when so much was applied that a
//! restart would replay for long, and after some time in any case.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use holdfast_store::Store;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::disk_work;
use crate::health::{Fault, Health};
use crate::log_store::LogStore;
use crate::network::chain;

/// A checkpoint is due when so many bytes of commands were applied since the last: what a restart replays at most …
const REPLAYED_BYTES_MAX: usize = 16 * 1024 * 1024;
/// … or when the state holds so many bytes that are not in its file …
const UNSAVED_BYTES_MAX: usize = 32 * 1024 * 1024;
/// … or, when there are fewer, after this time.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);

/// What has been made durable of one state, and how much has not.
pub(crate) struct Checkpoints {
    log: LogStore,
    applied_bytes: AtomicUsize,
    /// Entries below this index are covered.
    next: AtomicU64,
    due: Notify,
}

impl Checkpoints {
    /// Everything below `next` is durable.
    pub(crate) fn new(log: LogStore, next: u64) -> Arc<Self> {
        log.allow_purge_below(next);
        Arc::new(Checkpoints {
            log,
            applied_bytes: AtomicUsize::new(0),
            next: AtomicU64::new(next),
            due: Notify::new(),
        })
    }

    /// Notes what was applied, and that a checkpoint is due if it is much.
    pub(crate) fn applied(&self, bytes: usize, unsaved_bytes: usize) {
        let applied = self.applied_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if applied >= REPLAYED_BYTES_MAX || unsaved_bytes >= UNSAVED_BYTES_MAX {
            self.due.notify_one();
        }
    }

    /// Notes that everything below `next` is durable.
    pub(crate) fn made(&self, next: u64) {
        self.next.fetch_max(next, Ordering::Relaxed);
        self.log.allow_purge_below_at_least(next);
    }

    /// Makes checkpoints when they are due, until `stop` is cancelled. A member that cannot make one stops: what is on its
    /// disk is unknown.
    pub(crate) async fn run(
        self: Arc<Self>,
        store: Arc<Store>,
        health: Arc<Health>,
        stop: CancellationToken,
    ) {
        loop {
            tokio::select! {
                _ = timeout(CHECKPOINT_INTERVAL, self.due.notified()) => {}
                () = stop.cancelled() => return,
            }
            let next = store.applied().map_or(0, |applied| applied.0 + 1);
            if next <= self.next.load(Ordering::Relaxed) {
                continue;
            }
            self.applied_bytes.store(0, Ordering::Relaxed);
            let saving = store.clone();
            let error = match disk_work::run(move || saving.checkpoint()).await {
                Ok(Ok(durable)) => {
                    self.made(durable.map_or(0, |durable| durable.0 + 1));
                    continue;
                }
                Ok(Err(error)) => chain(&error),
                Err(error) => error.to_string(),
            };
            tracing::error!(%error, "the state could not be made durable; this member stops");
            health.fail(Fault::Core(error));
            return;
        }
    }
}
