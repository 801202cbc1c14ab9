//! All rings of a node: which are open, which are of instances that have ended, and the bound on their sum.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use holdfast_model::InstanceId;

use super::retention::{ENDED_MAX, Retention};
use super::ring::{LogError, Ring, RingStats};
use super::segment;

/// Steps in which room is made at a time: each removes a segment or a whole log.
const RELIEF_STEPS_MAX: usize = 64;

#[derive(Debug)]
pub(super) struct Shelf {
    folder: PathBuf,
    retention: Retention,
    /// Bytes of all rings, open or not.
    used: Arc<AtomicU64>,
    /// For the rings, which ask it to make room.
    me: Weak<Self>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Those that are open: the instances that this agent runs, and those that were asked for.
    open: BTreeMap<InstanceId, Arc<Ring>>,
    /// The others.
    closed: BTreeMap<InstanceId, Closed>,
    /// The instances that are here; `None` while that is not known, and then nothing has ended (I5).
    here: Option<BTreeSet<InstanceId>>,
}

/// A log that nobody uses.
#[derive(Clone, Copy, Debug)]
struct Closed {
    bytes: u64,
    /// When its last line came.
    changed_ms: u64,
}

impl Shelf {
    pub(super) fn open(folder: PathBuf, retention: Retention) -> Result<Arc<Self>, LogError> {
        fs::create_dir_all(&folder).map_err(|source| LogError::access(&folder, "created", source))?;
        let mut closed = BTreeMap::new();
        for (id, path) in folders(&folder)? {
            let list = segment::list(&path).map_err(|source| LogError::access(&path, "listed", source))?;
            let bytes = list.iter().map(|segment| segment.bytes).sum();
            closed.insert(id, Closed { bytes, changed_ms: list.last().map_or(0, |last| last.last_ms) });
        }
        let used = closed.values().map(|closed| closed.bytes).sum();
        let inner = Mutex::new(Inner { closed, ..Inner::default() });
        let used = Arc::new(AtomicU64::new(used));
        Ok(Arc::new_cyclic(|me| Self { folder, retention, used, me: Weak::clone(me), inner }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has(&self, id: InstanceId) -> bool {
        let inner = self.lock();
        inner.open.contains_key(&id) || inner.closed.contains_key(&id)
    }

    pub(super) fn ring(&self, id: InstanceId) -> Result<Arc<Ring>, LogError> {
        let mut inner = self.lock();
        if let Some(ring) = inner.open.get(&id) {
            return Ok(Arc::clone(ring));
        }
        let folder = self.folder.join(id.to_string());
        let ring = Ring::open_with(folder, self.retention, Arc::clone(&self.used), Weak::clone(&self.me))?;
        let ring = Arc::new(ring);
        // A torn line may have been cut off.
        let counted = inner.closed.remove(&id).map_or(0, |closed| closed.bytes);
        self.used.fetch_add(ring.stats().bytes, Ordering::Relaxed);
        self.used.fetch_sub(counted, Ordering::Relaxed);
        inner.open.insert(id, Arc::clone(&ring));
        Ok(ring)
    }

    pub(super) fn stats(&self) -> BTreeMap<InstanceId, RingStats> {
        self.lock().open.iter().map(|(id, ring)| (*id, ring.stats())).collect()
    }

    pub(super) fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub(super) fn keep(&self, here: &BTreeSet<InstanceId>) {
        let mut inner = self.lock();
        if inner.here.as_ref() != Some(here) {
            inner.here = Some(here.clone());
        }
    }

    /// Removes until all rings together are within their bound. What ended goes first; of what is here the largest ring
    /// gives its oldest part, so that one that floods costs itself and not its neighbours.
    pub(super) fn relieve(&self) -> Result<(), LogError> {
        for _ in 0..RELIEF_STEPS_MAX {
            if self.used_bytes() <= self.retention.node_bytes {
                return Ok(());
            }
            let largest = {
                let mut inner = self.lock();
                inner.close_ended();
                if let Some(id) = inner.ended().first().map(|(_, id)| *id) {
                    self.remove(&mut inner, id)?;
                    continue;
                }
                let largest = inner.open.values().max_by_key(|ring| ring.stats().bytes);
                largest.map(Arc::clone)
            };
            let Some(ring) = largest else { return Ok(()) };
            ring.drop_oldest("the node keeps no more lines in all")?;
        }
        Ok(())
    }

    pub(super) fn sweep(&self, now_ms: u64) -> Result<(), LogError> {
        let open: Vec<Arc<Ring>> = {
            let mut inner = self.lock();
            inner.close_ended();
            let ended = inner.ended();
            let surplus = ended.len().saturating_sub(ENDED_MAX);
            for (nth, (changed_ms, id)) in ended.into_iter().enumerate() {
                if nth < surplus || changed_ms.saturating_add(self.retention.ended_ms) < now_ms {
                    self.remove(&mut inner, id)?;
                }
            }
            inner.open.values().map(Arc::clone).collect()
        };
        for ring in open {
            ring.drop_older(now_ms)?;
        }
        self.relieve()
    }

    fn remove(&self, inner: &mut Inner, id: InstanceId) -> Result<(), LogError> {
        let path = self.folder.join(id.to_string());
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(LogError::access(&path, "removed", error));
            }
            _ => {}
        }
        if let Some(closed) = inner.closed.remove(&id) {
            self.used.fetch_sub(closed.bytes, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Inner {
    /// Closes the rings of instances that have ended, unless somebody reads them.
    fn close_ended(&mut self) {
        let Some(here) = &self.here else { return };
        let closed = &mut self.closed;
        self.open.retain(|id, ring| {
            let used = here.contains(id) || Arc::strong_count(ring) > 1;
            if !used {
                let (bytes, changed_ms) = (ring.stats().bytes, ring.changed_ms());
                closed.insert(*id, Closed { bytes, changed_ms });
            }
            used
        });
    }

    /// Logs of instances that have ended, those that ended longest ago first.
    fn ended(&self) -> Vec<(u64, InstanceId)> {
        let Some(here) = &self.here else { return Vec::new() };
        let ended = self.closed.iter().filter(|(id, _)| !here.contains(id));
        let mut ended: Vec<_> = ended.map(|(id, closed)| (closed.changed_ms, *id)).collect();
        ended.sort_unstable();
        ended
    }
}

/// The instances that have a folder.
fn folders(folder: &Path) -> Result<Vec<(InstanceId, PathBuf)>, LogError> {
    let failed = |source: io::Error| LogError::access(folder, "listed", source);
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<InstanceId>().ok()) {
            found.push((id, entry.path()));
        }
    }
    Ok(found)
}
