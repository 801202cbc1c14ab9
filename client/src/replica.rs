//! What an agent knows: its own desired state at a revision, on its own disk and in memory.
//!
//! A replica opens from disk before there is any network, takes frames from whatever stream the agent has, and
//! publishes an immutable view after each. Every change is on stable storage before it is published.
//!
//! It must never: go back within an incarnation or adopt another one that was not handed over (I6), take the loss of a
//! stream for a change (I5: nothing but a frame changes it), remove more than a set share of the items without a
//! confirmation (I7), publish half an update (I8), or panic at what it reads from disk or a stream (I14).
//!
//! Before the first snapshot the view is `None`, which means *unknown*, never *empty*: an agent that finds nothing on
//! its disk must leave what runs alone.

mod disk;
mod file;
mod rules;
mod staging;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_model::agent::{Followed, Frame, Held, Stamp};
use holdfast_model::{ClusterId, Incarnation, Revision};
use tokio::sync::watch;

pub use disk::DiskError;
use disk::{Disk, Loaded, Meta};
pub use file::ReplicaFile;
pub use rules::Refusal;
use rules::{Candidate, Changes, Unconfirmed};
use staging::Staging;

/// Most items that a replica holds.
pub const ITEMS_MAX: u64 = 200_000;
/// Most bytes of encoded items that one snapshot may bring.
pub const SNAPSHOT_BYTES_MAX: usize = 256 << 20;

/// The items of a view by key.
pub type Items<T> = Arc<BTreeMap<<T as Followed>::Key, Arc<T>>>;

/// An immutable state at a revision.
#[derive(Debug)]
pub struct View<T: Followed> {
    /// Where in which history it stands.
    pub stamp: Stamp,
    /// The items. The same `Arc` as before when only the stamp moved.
    pub items: Items<T>,
    /// An update that is held back until it is confirmed.
    pub held: Option<Held>,
}

impl<T: Followed> Clone for View<T> {
    fn clone(&self) -> View<T> {
        View { stamp: self.stamp, items: Arc::clone(&self.items), held: self.held }
    }
}

/// What is published: `None` until a first state is known.
pub type Published<T> = Option<Arc<View<T>>>;

/// What became of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// It is on disk and published.
    Applied,
    /// It is part of a snapshot that is not whole yet.
    Staged,
    /// It would remove too much: it waits, and the state is as before.
    Held(Held),
    /// It was refused and the state is as before; the stream that brought it is of no use any more.
    Refused(Refusal),
}

/// An agent's state, on disk and published. One writer; any number of subscribers.
#[derive(Debug)]
pub struct Replica<T: Followed> {
    cluster: ClusterId,
    disk: Disk<T>,
    handed_over: Option<Incarnation>,
    /// A snapshot on its way in.
    staging: Option<Staging<T>>,
    /// A state that is held back, kept up to date by the stream that brought it.
    pending: Option<Candidate<T>>,
    /// What that state takes away. Outlives the stream, not the process: after a restart a confirmation is asked for
    /// again.
    unconfirmed: Option<Unconfirmed<T>>,
    published: watch::Sender<Published<T>>,
    quarantined: Option<PathBuf>,
}

impl<T: Followed> Replica<T> {
    /// Opens or creates the replica at `path` for an agent of `cluster`, and publishes what is on disk.
    ///
    /// A damaged file is moved aside ([`Replica::quarantined`]) and the replica begins with nothing known. This blocks
    /// on disk.
    ///
    /// # Errors
    /// [`DiskError`] when the file is in use, of another cluster or a later format, or the disk fails.
    pub fn open(path: &Path, cluster: ClusterId) -> Result<Replica<T>, DiskError> {
        Self::open_file(file::on_disk(path), cluster)
    }

    /// Opens the replica in any file, such as one on a disk that fails on purpose.
    ///
    /// # Errors
    /// As [`Replica::open`].
    pub fn open_file(file: Box<dyn ReplicaFile>, cluster: ClusterId) -> Result<Replica<T>, DiskError> {
        let (disk, loaded, quarantined) = Disk::open(file, cluster)?;
        let Loaded { view, handed_over } = loaded;
        let published = watch::Sender::new(view.map(Arc::new));
        Ok(Replica {
            cluster,
            disk,
            handed_over,
            staging: None,
            pending: None,
            unconfirmed: None,
            published,
            quarantined,
        })
    }

    /// A receiver of every view from now on; it begins with the current one.
    pub fn subscribe(&self) -> watch::Receiver<Published<T>> {
        self.published.subscribe()
    }

    /// The current view.
    pub fn current(&self) -> Published<T> {
        self.published.borrow().clone()
    }

    /// The cluster that it follows.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Where a damaged file was moved when this replica was opened.
    pub fn quarantined(&self) -> Option<&Path> {
        self.quarantined.as_deref()
    }

    /// Permits the next snapshot to begin `incarnation`. The caller has authenticated the hand-over: an operator on
    /// this host, or a message that the cluster's authority signed. Blocks on disk.
    ///
    /// # Errors
    /// [`DiskError`] when the permission could not be put on disk; it then holds only in memory.
    pub fn hand_over(&mut self, incarnation: Incarnation) -> Result<(), DiskError> {
        self.handed_over = Some(incarnation);
        let current = self.current();
        self.reopen_if_needed()?;
        self.disk.commit_meta(&self.meta(current.as_deref()), true)
    }

    /// Forgets what a lost stream had not finished: half a snapshot, and the held state. What is known stays.
    /// A new stream begins at [`Replica::current`].
    pub fn begin_stream(&mut self) {
        self.staging = None;
        self.pending = None;
        #[cfg(feature = "planted-bugs")]
        if crate::planted::is(crate::planted::Bug::LostStreamIsEmpty)
            && let Some(view) = self.current()
        {
            let items = Items::<T>::default();
            self.published.send_replace(Some(Arc::new(View { items, ..(*view).clone() })));
        }
    }

    /// Takes one frame. Blocks on disk; when it returns, what it published is on stable storage.
    ///
    /// [`Frame::Call`] and [`Frame::HandOver`] are no state and are refused here.
    ///
    /// # Errors
    /// [`DiskError`] when the disk fails: nothing was published, and the next frame opens the file anew.
    pub fn apply(&mut self, frame: Frame<T>) -> Result<Applied, DiskError> {
        self.reopen_if_needed()?;
        let current = self.current();
        match self.next(current.as_deref(), frame) {
            Ok(Some(candidate)) => self.offer(current.as_deref(), candidate),
            Ok(None) => Ok(Applied::Staged),
            Err(refusal) => {
                self.begin_stream();
                Ok(Applied::Refused(refusal))
            }
        }
    }

    /// The state that a frame leads to, if it completes one. Touches memory only.
    fn next(&mut self, current: Option<&View<T>>, frame: Frame<T>) -> Result<Option<Candidate<T>>, Refusal> {
        match frame {
            Frame::SnapshotBegin { stamp, items, confirmed_through } => {
                if self.staging.is_some() {
                    return Err(Refusal::OutOfOrder);
                }
                rules::check_stamp(stamp, self.cluster, current.map(|view| view.stamp), self.handed_over)?;
                self.staging = Some(Staging::begin(stamp, items, confirmed_through)?);
                Ok(None)
            }
            Frame::SnapshotItems(items) => {
                self.staging.as_mut().ok_or(Refusal::OutOfOrder)?.add(items)?;
                Ok(None)
            }
            Frame::SnapshotEnd => self.staging.take().ok_or(Refusal::OutOfOrder)?.finish().map(Some),
            Frame::Delta { from, stamp, upserts, removes, confirmed_through } => {
                let base = self.base(current)?;
                base.with_delta(from, stamp, upserts, removes, confirmed_through).map(Some)
            }
            Frame::Heartbeat { stamp, confirmed_through } => {
                self.base(current)?.with_heartbeat(stamp, confirmed_through).map(Some)
            }
            Frame::Call { .. } | Frame::HandOver(_) => Err(Refusal::OutOfOrder),
        }
    }

    /// What a delta or heartbeat builds on: the held state if there is one, since the stream is ahead of us then.
    fn base(&self, current: Option<&View<T>>) -> Result<Candidate<T>, Refusal> {
        if self.staging.is_some() {
            return Err(Refusal::OutOfOrder);
        }
        match (&self.pending, current) {
            (Some(pending), _) => Ok(pending.clone()),
            (None, Some(view)) => Ok(Candidate::settled(view)),
            (None, None) => Err(Refusal::OutOfOrder),
        }
    }

    /// Takes a complete state: holds it back or puts it on disk and publishes it.
    fn offer(&mut self, current: Option<&View<T>>, candidate: Candidate<T>) -> Result<Applied, DiskError> {
        let changes = Changes::between(current.map(|view| &view.items), &candidate.items);
        let known = current.map_or(0, |view| view.items.len() as u64);
        let waiting = Unconfirmed::of(&candidate, &changes.removes, known, self.unconfirmed.as_ref());
        if let (Some(view), Some(waiting)) = (current, waiting) {
            let held = waiting.held();
            self.pending = Some(candidate);
            self.unconfirmed = Some(waiting);
            if view.held != Some(held) {
                let view = View { held: Some(held), ..view.clone() };
                self.disk.commit_meta(&self.meta(Some(&view)), true)?;
                self.published.send_replace(Some(Arc::new(view)));
            }
            return Ok(Applied::Held(held));
        }
        let moved = current
            .is_none_or(|view| view.stamp.incarnation != candidate.stamp.incarnation || view.held.is_some());
        let same_place = current.is_some_and(|view| view.stamp == candidate.stamp);
        self.handed_over = self.handed_over.filter(|permitted| *permitted > candidate.stamp.incarnation);
        let items = match current {
            Some(view) if changes.is_empty() => Arc::clone(&view.items),
            _ => candidate.items,
        };
        let view = View { stamp: candidate.stamp, items, held: None };
        #[cfg(feature = "planted-bugs")]
        if crate::planted::is(crate::planted::Bug::PublishBeforeDurable) {
            self.published.send_replace(Some(Arc::new(view.clone())));
        }
        if !changes.is_empty() {
            self.disk.commit(&self.meta(Some(&view)), &changes)?;
        } else if moved || !same_place {
            // A stamp that moves over unchanged items need not be durable at once: after a crash the agent offers the
            // older revision, at which it knew the same items.
            self.disk.commit_meta(&self.meta(Some(&view)), moved)?;
        }
        (self.pending, self.unconfirmed) = (None, None);
        if !changes.is_empty() || moved || !same_place {
            self.published.send_replace(Some(Arc::new(view)));
        }
        Ok(Applied::Applied)
    }

    fn meta(&self, view: Option<&View<T>>) -> Meta {
        Meta::new(self.cluster, view, self.handed_over)
    }

    /// After a disk error: opens the file anew and makes it say what was published.
    fn reopen_if_needed(&mut self) -> Result<(), DiskError> {
        if self.disk.is_open() {
            return Ok(());
        }
        let on_disk = self.disk.reopen(self.cluster)?.view;
        let current = self.current();
        let ahead = |on_disk: &View<T>, current: &View<T>| {
            on_disk.stamp.incarnation == current.stamp.incarnation
                && on_disk.stamp.revision > current.stamp.revision
        };
        match (on_disk, current) {
            // The commit whose failure was reported had reached the file after all. It is made to stay before it counts.
            (Some(on_disk), Some(current)) if ahead(&on_disk, &current) => self.adopt(on_disk)?,
            (Some(on_disk), None) => self.adopt(on_disk)?,
            (on_disk, Some(current)) => {
                let changes = Changes::between(on_disk.as_ref().map(|view| &view.items), &current.items);
                self.disk.commit(&self.meta(Some(&current)), &changes)?;
            }
            (None, None) => {}
        }
        Ok(())
    }

    fn adopt(&mut self, on_disk: View<T>) -> Result<(), DiskError> {
        self.disk.commit_meta(&self.meta(Some(&on_disk)), true)?;
        self.published.send_replace(Some(Arc::new(on_disk)));
        Ok(())
    }

    /// The revision at which this replica stands, for tests and logs.
    pub fn revision(&self) -> Option<Revision> {
        self.published.borrow().as_ref().map(|view| view.stamp.revision)
    }
}
