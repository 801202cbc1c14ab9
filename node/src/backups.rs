//! Snapshots of volumes, taken and uploaded, and volumes restored from them, as members ask for it in their answers to
//! reports.
//!
//! A snapshot goes through two states that outlive this process: its file lies beside the disk (`snapshotted`), and all of
//! it is in the store of backups (`uploaded`). A restarted agent goes on where the file says. Whatever was told is told
//! again until members ask for it no more; what they ask for no more is dropped, and its file removed.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_backups::Store;
use holdfast_backups::volume::{self, SnapshotError};
use holdfast_identity::{SealError, SealTo};
use holdfast_model::limits::SNAPSHOTS_AT_ONCE_MAX;
use holdfast_model::volume_snapshot::{
    RestoreVolume, Restored, SnapshotNews, SnapshotState, SnapshotWork, TakeSnapshot,
};
use holdfast_model::{InstanceId, SnapshotId, VolumeId};
use rand::RngExt as _;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::logs::chain;
use crate::pause;
use crate::phase::bounded;
use crate::secrets::{NodeSecretsError, NodeSecretsStore};
use crate::volumes::{VolumeError, Volumes};

/// How often something is tried before it counts as failed.
const ATTEMPTS_MAX: u32 = 5;
/// The pause after the first attempt; it doubles with each.
const PAUSE_MIN: Duration = Duration::from_secs(2);
/// The longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How often snapshots that could not be erased are looked at again.
const FORGET_PERIOD: Duration = Duration::from_secs(60);

/// Why a snapshot or a restore came to nothing.
#[derive(Debug, thiserror::Error)]
enum BackupError {
    /// No store.
    #[error("This node has no store of backups; its operator names one with --backups.")]
    NoStore,
    /// The disk.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The store, or what lies in it.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The recipient.
    #[error("The member named no key to seal to.")]
    Recipient(#[from] SealError),
    /// The key.
    #[error(transparent)]
    Key(#[from] NodeSecretsError),
    /// A descriptor.
    #[error("The disk could not be opened a second time.")]
    File(#[from] std::io::Error),
}

impl BackupError {
    /// Whether it is of no use to try again.
    const fn is_final(&self) -> bool {
        match self {
            Self::NoStore | Self::Recipient(_) => true,
            Self::Volume(error) => {
                matches!(
                    error,
                    VolumeError::Missing { .. } | VolumeError::Damaged { .. } | VolumeError::Room { .. }
                )
            }
            Self::Snapshot(error) => error.is_final(),
            Self::Key(_) | Self::File(_) => false,
        }
    }
}

/// Takes, uploads and restores, for as long as it runs.
pub struct Backups {
    store: Option<Store>,
    volumes: Volumes,
    secrets: Arc<NodeSecretsStore>,
    /// The folder of all machines.
    machines: PathBuf,
    /// Who has the volume of a snapshot that is wanted, as it was last told: that may change while it is tried.
    attached: Mutex<BTreeMap<SnapshotId, InstanceId>>,
    news: watch::Sender<SnapshotNews>,
}

/// What is under way.
#[derive(Default)]
struct Tasks {
    taking: BTreeMap<SnapshotId, Task>,
    restoring: BTreeMap<VolumeId, Task>,
}

/// Ends with its handle.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Backups {
    /// Without a store everything that is asked for fails, with a text that says so.
    pub fn new(
        store: Option<Store>,
        volumes: Volumes,
        secrets: Arc<NodeSecretsStore>,
        machines: PathBuf,
    ) -> Self {
        let news = watch::Sender::new(SnapshotNews::default());
        Self { store, volumes, secrets, machines, attached: Mutex::default(), news }
    }

    /// What there is to tell.
    pub fn news(&self) -> watch::Receiver<SnapshotNews> {
        self.news.subscribe()
    }

    /// Does what members ask for. Nothing before they asked: until then a file of a snapshot may be wanted.
    pub async fn run(self, mut asked: watch::Receiver<Option<SnapshotWork>>) {
        let this = Arc::new(self);
        let slots = Arc::new(Semaphore::new(SNAPSHOTS_AT_ONCE_MAX));
        let mut tasks = Tasks::default();
        loop {
            let work = asked.borrow_and_update().clone();
            let mut left = false;
            if let Some(work) = &work {
                this.begin(&slots, &mut tasks, work);
                this.volumes.sweep_snapshots(work.take.iter().map(|take| take.of.snapshot).collect()).await;
                left = this.forget(&work.forget).await;
            }
            tokio::select! {
                changed = asked.changed() => if changed.is_err() { return std::future::pending().await },
                () = tokio::time::sleep(FORGET_PERIOD), if left => {}
            }
        }
    }

    /// Drops what is not asked for any more, and begins what is new.
    fn begin(self: &Arc<Self>, slots: &Arc<Semaphore>, tasks: &mut Tasks, work: &SnapshotWork) {
        let take: BTreeSet<_> = work.take.iter().map(|take| take.of.snapshot).collect();
        let restore: BTreeSet<_> = work.restore.iter().map(|restore| restore.volume).collect();
        let attached = work.take.iter().filter_map(|take| Some((take.of.snapshot, take.attached?)));
        *self.attached.lock().unwrap_or_else(PoisonError::into_inner) = attached.collect();
        tasks.taking.retain(|id, _| take.contains(id));
        tasks.restoring.retain(|id, _| restore.contains(id));
        self.news.send_if_modified(|news| {
            let before = news.len();
            news.taken.retain(|id, _| take.contains(id));
            news.restored.retain(|id, _| restore.contains(id));
            news.forgotten.retain(|id| work.forget.contains(id));
            news.len() != before
        });
        for one in &work.take {
            let (this, slots, one) = (Arc::clone(self), Arc::clone(slots), one.clone());
            let id = one.of.snapshot;
            tasks.taking.entry(id).or_insert_with(|| {
                Task(tokio::spawn(async move {
                    let Ok(_slot) = slots.acquire().await else { return };
                    this.take(&one).await;
                }))
            });
        }
        for one in &work.restore {
            let (this, slots, one) = (Arc::clone(self), Arc::clone(slots), one.clone());
            tasks.restoring.entry(one.volume).or_insert_with(|| {
                Task(tokio::spawn(async move {
                    let Ok(_slot) = slots.acquire().await else { return };
                    this.restore(&one).await;
                }))
            });
        }
    }

    async fn take(&self, work: &TakeSnapshot) {
        let (snapshot, volume) = (work.of.snapshot, work.of.volume);
        let done = repeat(snapshot, || self.try_take(work)).await;
        let state = match done {
            Ok(stored) => {
                tracing::info!(%snapshot, %volume, bytes = stored.bytes, "a volume snapshot is in the store");
                SnapshotState::Uploaded { manifest: stored.manifest, stored_bytes: stored.bytes }
            }
            Err(error) => {
                tracing::warn!(%snapshot, %volume, error = %chain(&error), "a volume snapshot came to nothing");
                SnapshotState::Failed { detail: bounded(chain(&error)) }
            }
        };
        self.news.send_modify(|news| drop(news.taken.insert(snapshot, state)));
    }

    async fn try_take(&self, work: &TakeSnapshot) -> Result<volume::Stored, BackupError> {
        let store = self.store.as_ref().ok_or(BackupError::NoStore)?;
        let recipient: SealTo = work.recipient.0.parse()?;
        let machine = self.machine_with(work.of.snapshot);
        let file = self.volumes.snapshot(work.of.volume, work.of.snapshot, machine).await?;
        self.news.send_if_modified(|news| {
            let known = news.taken.insert(work.of.snapshot, SnapshotState::Snapshotted);
            known != Some(SnapshotState::Snapshotted)
        });
        let attempt = rand::rng().random();
        Ok(volume::store(store, work.of, file, &recipient, attempt).await?)
    }

    async fn restore(&self, work: &RestoreVolume) {
        let (volume, snapshot) = (work.volume, work.from.snapshot);
        let restored = match repeat(snapshot, || self.try_restore(work)).await {
            Ok(()) => {
                tracing::info!(%snapshot, %volume, "a volume is restored");
                Restored::Whole
            }
            Err(error) => {
                tracing::warn!(%snapshot, %volume, error = %chain(&error), "a volume could not be restored");
                Restored::Failed { detail: bounded(chain(&error)) }
            }
        };
        self.news.send_modify(|news| drop(news.restored.insert(volume, restored)));
    }

    async fn try_restore(&self, work: &RestoreVolume) -> Result<(), BackupError> {
        let store = self.store.as_ref().ok_or(BackupError::NoStore)?;
        let Some(restoring) = self.volumes.begin_restore(work.volume, work.size_mib).await? else {
            return Ok(());
        };
        let key = self.secrets.snapshot_key(work.volume, work.from.snapshot).await?;
        volume::restore(store, work.from, work.manifest, &key, restoring.file()?).await?;
        Ok(restoring.finish().await?)
    }

    /// Erases what is stored of snapshots; says whether something is left to be tried again.
    async fn forget(&self, asked: &BTreeSet<SnapshotId>) -> bool {
        // Without a store nothing can be erased, however often it is tried.
        let Some(store) = &self.store else { return false };
        let mut left = false;
        for snapshot in asked {
            if self.news.borrow().forgotten.contains(snapshot) {
                continue;
            }
            match store.erase_all(&volume::folder(*snapshot)).await {
                Ok(()) => self.news.send_modify(|news| {
                    news.forgotten.insert(*snapshot);
                }),
                Err(error) => {
                    left = true;
                    tracing::warn!(%snapshot, error = %chain(&error), "a deleted snapshot is still in the store");
                }
            }
        }
        left
    }

    /// The folder of the machine that has the volume of a snapshot.
    fn machine_with(&self, snapshot: SnapshotId) -> Option<PathBuf> {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        attached.get(&snapshot).map(|instance| self.machines.join(instance.to_string()))
    }
}

/// Tries until it is done, it is of no use, or it was tried often enough.
async fn repeat<T, F: Future<Output = Result<T, BackupError>>>(
    snapshot: SnapshotId,
    mut work: impl FnMut() -> F,
) -> Result<T, BackupError> {
    let mut attempt = 1;
    loop {
        match work().await {
            Err(error) if attempt < ATTEMPTS_MAX && !error.is_final() => {
                let pause = pause::after(attempt, rand::rng().random(), PAUSE_MIN, PAUSE_MAX);
                tracing::info!(%snapshot, attempt, ?pause, error = %chain(&error), "trying again");
                tokio::time::sleep(pause).await;
                attempt += 1;
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests;
