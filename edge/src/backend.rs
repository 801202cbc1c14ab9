//! One backend as the edge itself sees it: whether it answers, and how many connections it carries.
//!
//! This outlives table switches: a backend that is in both tables keeps its count and its standing. The control plane
//! has no say in it, because in an outage it has no voice (I5).

use holdfast_model::InstanceId;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// Where a backend is, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BackendKey {
    /// Which instance.
    pub instance: InstanceId,
    /// Its address and port.
    pub address: SocketAddr,
}

/// A backend.
#[derive(Debug)]
pub struct Backend {
    key: BackendKey,
    out_of_rotation: AtomicBool,
    connections: AtomicUsize,
    /// Whether it accepted a connection since its last probe.
    answered: AtomicBool,
    /// When it is to be probed next, in milliseconds of the prober's clock; zero is at once.
    probe_due_ms: AtomicU64,
}

/// A connection, or an attempt at one, that counts as its backend's load until it is dropped.
#[derive(Debug)]
pub struct Load(Arc<Backend>);

impl Backend {
    /// A backend that nobody has tried yet: it is in rotation.
    pub fn new(key: BackendKey) -> Self {
        Self {
            key,
            out_of_rotation: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            answered: AtomicBool::new(false),
            probe_due_ms: AtomicU64::new(0),
        }
    }

    /// Which backend this is.
    pub fn key(&self) -> BackendKey {
        self.key
    }

    /// Whether it should get connections.
    pub fn in_rotation(&self) -> bool {
        !self.out_of_rotation.load(Ordering::Relaxed)
    }

    /// Notes that it does not answer; true when that is news.
    pub fn leave_rotation(&self) -> bool {
        !self.out_of_rotation.swap(true, Ordering::Relaxed)
    }

    /// Notes that it answers; true when that is news.
    pub fn return_to_rotation(&self) -> bool {
        self.answered.store(true, Ordering::Relaxed);
        !self.in_rotation() && self.out_of_rotation.swap(false, Ordering::Relaxed)
    }

    /// Connections and attempts under way.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    /// Whether it answered since this was last asked.
    pub fn take_answered(&self) -> bool {
        self.answered.swap(false, Ordering::Relaxed)
    }

    /// Whether a probe is due; if so the next one is put off to `next_ms`, so that one caller gets a true.
    pub fn take_due_probe(&self, now_ms: u64, next_ms: u64) -> bool {
        let due = self.probe_due_ms.load(Ordering::Relaxed);
        now_ms >= due
            && self.probe_due_ms.compare_exchange(due, next_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Sets the time of the next probe.
    pub fn probe_at(&self, due_ms: u64) {
        self.probe_due_ms.store(due_ms, Ordering::Relaxed);
    }
}

impl Load {
    /// Counts one more on `backend`.
    pub fn on(backend: &Arc<Backend>) -> Self {
        backend.connections.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(backend))
    }

    /// The backend.
    pub fn backend(&self) -> &Backend {
        &self.0
    }

    /// Stops counting, and gives the backend back.
    pub fn into_backend(self) -> Arc<Backend> {
        Arc::clone(&self.0)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::Relaxed);
    }
}
