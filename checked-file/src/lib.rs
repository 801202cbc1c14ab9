//! A database file of which no block is believed that is not what was written.
//!
//! redb checks its pages only when it opens a file that was not closed in order. A bit that rots later, or while the file
//! lies closed, is handed out as data: a value changes, or a row is no longer found. [`Checked`] stands between redb and
//! the disk, knows the checksum of every block that it wrote or read, and turns a block that came back different into an
//! error before anybody has seen it. [`Checked::close`], which redb calls when a file is closed in order, leaves the
//! checksums in a file beside it, so that they outlive the process; the first write takes that file away again.
//!
//! After a crash there are no checksums. [`open_database`] then has every page verified that can be reached, and a block is
//! believed when it is read for the first time. [`Checks::scrub`] reads what nobody asks for.
//!
//! It never repairs, never retries, and decides nothing: who is told of a rotten block does (I1, I2). The checksums
//! catch faults, not forgeries: whoever can write the file can write its checksums.

mod blocks;
pub mod sealed;
mod sidecar;

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::backends::FileBackend;
use redb::{BackendError, Database, DatabaseError, StorageBackend, StorageError};

use crate::blocks::Blocks;

/// Bytes that have one checksum: redb's page.
pub const BLOCK_BYTES: u64 = 4096;
/// Blocks that a scrub reads at a time: 256 KiB.
pub const SCRUB_BLOCKS: u64 = 64;

/// A block that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the {BLOCK_BYTES} bytes at offset {offset} of the file are not those that were written; the disk or the memory is faulty: check both"
)]
pub struct Rot {
    /// Where the block begins.
    pub offset: u64,
}

type OnRot = Box<dyn Fn(&Rot) + Send + Sync>;

/// A storage of redb's with a checksum for each block.
pub struct Checked(Arc<Shared>);

/// The other end of a [`Checked`]: hears of rot, and scrubs.
#[derive(Clone)]
pub struct Checks(Arc<Shared>);

struct Shared {
    storage: Box<dyn StorageBackend>,
    /// Read by whoever reads the storage, written by whoever writes it: a block and its checksum change together.
    blocks: RwLock<Blocks>,
    /// Where the checksums are left on closing, if anywhere.
    sidecar: Option<PathBuf>,
    /// Whether the file beside still says what is in this one.
    sidecar_is_there: AtomicBool,
    closed: AtomicBool,
    /// The file again, whose cached pages are dropped when a sync fails.
    file: Option<File>,
    /// Whether a change failed: what is on the disk is not known then.
    failed: AtomicBool,
    rot: OnceLock<Rot>,
    on_rot: OnceLock<OnRot>,
}

impl Checked {
    /// Opens a file, made if it is not there, with the checksums that lie beside it.
    ///
    /// # Errors
    /// When the file cannot be opened, or the file beside it not be read.
    pub fn open(path: &Path) -> Result<Self, DatabaseError> {
        let mut options = std::fs::OpenOptions::new();
        Self::of_file(path, options.read(true).write(true).create(true).truncate(false).open(path)?)
    }

    /// As [`Checked::open`], and never makes the file.
    ///
    /// # Errors
    /// When the file is not there or cannot be opened, or the file beside it not be read.
    pub fn open_existing(path: &Path) -> Result<Self, DatabaseError> {
        Self::of_file(path, std::fs::OpenOptions::new().read(true).write(true).open(path)?)
    }

    /// Makes a file that must not be there yet.
    ///
    /// # Errors
    /// When the file is there or cannot be made.
    pub fn create_new(path: &Path) -> Result<Self, DatabaseError> {
        Self::of_file(path, std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)?)
    }

    fn of_file(path: &Path, file: File) -> Result<Self, DatabaseError> {
        let length = file.metadata()?.len();
        let sidecar = sidecar_of(path);
        let known = sidecar::read(&sidecar, length)?;
        let there = AtomicBool::new(sidecar.exists());
        let again = file.try_clone()?;
        let storage = Box::new(FileBackend::new(file)?);
        Ok(Self::new(storage, known.unwrap_or_default(), Some(sidecar), there, Some(again)))
    }

    /// Stands before any storage, whose checksums end with the process.
    pub fn over(storage: impl StorageBackend) -> Self {
        Self::new(Box::new(storage), Vec::new(), None, AtomicBool::new(false), None)
    }

    fn new(
        storage: Box<dyn StorageBackend>,
        known: Vec<u64>,
        sidecar: Option<PathBuf>,
        sidecar_is_there: AtomicBool,
        file: Option<File>,
    ) -> Self {
        Checked(Arc::new(Shared {
            storage,
            blocks: RwLock::new(Blocks::of(known)),
            sidecar,
            sidecar_is_there,
            closed: AtomicBool::new(false),
            file,
            failed: AtomicBool::new(false),
            rot: OnceLock::new(),
            on_rot: OnceLock::new(),
        }))
    }

    /// The other end.
    pub fn checks(&self) -> Checks {
        Checks(self.0.clone())
    }
}

thread_local! {
    static OPENING: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is opening a database, where a panic of redb's becomes an error.
pub fn is_opening() -> bool {
    OPENING.get()
}

/// Opens a database in a file of which nothing may be true. When its checksums are lost, as after a crash, every page that
/// can be reached is verified: redb does that by itself only where commits have one phase, takes the others for sound, and
/// panics on a page that makes no sense.
///
/// # Errors
/// When the storage fails, or the file is damaged.
pub fn open_database(storage: Checked, cache_bytes: usize) -> Result<Database, DatabaseError> {
    let knew_nothing = storage.checks().knows_nothing();
    let open = AssertUnwindSafe(|| {
        let mut builder = Database::builder();
        // While it opens, not after: opening a file that was not closed in order walks all of it anyway.
        builder.set_cache_size(cache_bytes).set_check_integrity_on_open(knew_nothing);
        builder.create_with_backend(storage)
    });
    OPENING.set(true);
    let opened = catch_unwind(open);
    OPENING.set(false);
    let nonsense = || StorageError::Corrupted("a page of the file makes no sense".to_owned());
    opened.unwrap_or_else(|_panic| Err(nonsense().into()))
}

/// Where the checksums of a file lie.
pub fn sidecar_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".sums");
    name.into()
}

/// Whether an error was caused by a rotten block, at any depth.
pub fn is_rot(error: &(dyn std::error::Error + 'static)) -> bool {
    std::iter::successors(Some(error), |error| error.source()).any(|cause| {
        let wrapped = cause.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        cause.is::<Rot>() || wrapped.is_some_and(|inner| inner.is::<Rot>())
    })
}

impl Checks {
    /// The first rotten block that was found, if one was.
    pub fn rot(&self) -> Option<&Rot> {
        self.0.rot.get()
    }

    /// Who is told of the first rotten block, at once when it was found already. Only the first call counts.
    pub fn on_rot(&self, tell: impl Fn(&Rot) + Send + Sync + 'static) {
        if self.0.on_rot.set(Box::new(tell)).is_ok()
            && let (Some(rot), Some(tell)) = (self.0.rot.get(), self.0.on_rot.get())
        {
            tell(rot);
        }
    }

    /// Whether no block's checksum is known: the file is new, or was not closed in order and was not read since.
    pub fn knows_nothing(&self) -> bool {
        self.0.known().sums().is_empty()
    }

    /// How many blocks the file has.
    ///
    /// # Errors
    /// When the storage fails.
    pub fn blocks(&self) -> io::Result<u64> {
        Ok(self.0.storage.len()?.div_ceil(BLOCK_BYTES))
    }

    /// Reads up to [`SCRUB_BLOCKS`] blocks from one on and compares them with what was written; answers with the block
    /// to go on with, or `None` at the end of the file or when it was closed. Blocks.
    ///
    /// # Errors
    /// When a block is rotten or the storage fails.
    pub fn scrub(&self, from: u64) -> io::Result<Option<u64>> {
        if self.0.closed.load(Ordering::Acquire) {
            return Ok(None);
        }
        let end = (from + SCRUB_BLOCKS).min(self.blocks()?);
        if from >= end {
            return Ok(None);
        }
        let mut bytes = vec![0_u8; (SCRUB_BLOCKS * BLOCK_BYTES) as usize];
        self.0.read_blocks(from, end, &mut bytes)?;
        Ok(Some(end))
    }
}

impl Shared {
    fn known(&self) -> RwLockReadGuard<'_, Blocks> {
        self.blocks.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn known_mut(&self) -> RwLockWriteGuard<'_, Blocks> {
        self.blocks.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a rotten block and tells of the first.
    fn rotten(&self, block: u64) -> io::Error {
        let rot = Rot { offset: block * BLOCK_BYTES };
        if self.rot.set(rot.clone()).is_ok()
            && let Some(tell) = self.on_rot.get()
        {
            tell(&rot);
        }
        io::Error::new(io::ErrorKind::InvalidData, rot)
    }

    /// Reads whole blocks and checks them; those that nothing is known of are known from then on. The last block of the
    /// storage may be shorter. Answers with how many bytes there were.
    fn read_blocks(&self, from: u64, end: u64, bytes: &mut [u8]) -> io::Result<usize> {
        let start = from * BLOCK_BYTES;
        let length;
        {
            let known = self.known();
            length = ((end * BLOCK_BYTES).min(self.storage.len()?).saturating_sub(start)) as usize;
            let Some(bytes) = bytes.get_mut(..length) else {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            };
            self.storage.read(start, bytes)?;
            match known.compare(from, bytes) {
                blocks::Compared::Same => return Ok(length),
                blocks::Compared::Differs(block) => return Err(self.rotten(block)),
                blocks::Compared::SomeUnknown => {}
            }
        }
        self.known_mut().learn(from, &bytes[..length]);
        Ok(length)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let (from, end) = (offset / BLOCK_BYTES, (offset + out.len() as u64).div_ceil(BLOCK_BYTES));
        if offset.is_multiple_of(BLOCK_BYTES) && (out.len() as u64).is_multiple_of(BLOCK_BYTES) {
            return match self.read_blocks(from, end, out)? == out.len() {
                true => Ok(()),
                false => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            };
        }
        let mut whole = vec![0_u8; ((end - from) * BLOCK_BYTES) as usize];
        let length = self.read_blocks(from, end, &mut whole)?;
        let at = (offset - from * BLOCK_BYTES) as usize;
        let part = whole[..length].get(at..at + out.len());
        out.copy_from_slice(part.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.outdate_sidecar()?;
        let end = offset + data.len() as u64;
        let partial = |at: u64| (!at.is_multiple_of(BLOCK_BYTES)).then_some(at / BLOCK_BYTES);
        let ends = [partial(offset), partial(end)];
        // What stays of a block that is written in part must not become right by being written beside.
        for block in ends.into_iter().flatten() {
            let mut whole = vec![0_u8; BLOCK_BYTES as usize];
            self.read_blocks(block, block + 1, &mut whole)?;
        }
        let mut known = self.known_mut();
        known.forget(offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        self.storage.write(offset, data)?;
        let first_whole = offset.div_ceil(BLOCK_BYTES);
        let skipped = (first_whole * BLOCK_BYTES - offset) as usize;
        let whole_bytes = (end / BLOCK_BYTES).saturating_sub(first_whole) * BLOCK_BYTES;
        if let Some(whole) = data.get(skipped..skipped + whole_bytes as usize) {
            known.learn(first_whole, whole);
        }
        for block in ends.into_iter().flatten() {
            let start = block * BLOCK_BYTES;
            let length = self.storage.len()?.saturating_sub(start).min(BLOCK_BYTES);
            let mut now = vec![0_u8; length as usize];
            self.storage.read(start, &mut now)?;
            known.learn(block, &now);
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.outdate_sidecar()?;
        let mut known = self.known_mut();
        let before = self.storage.len()?;
        // Only a last block that was not whole changes what it holds.
        let edge = before.min(length);
        if !edge.is_multiple_of(BLOCK_BYTES) {
            known.forget(edge / BLOCK_BYTES, edge / BLOCK_BYTES + 1);
        }
        self.storage.set_len(length)?;
        known.cut(length.div_ceil(BLOCK_BYTES));
        Ok(())
    }

    /// Takes the file beside away before what it says is no longer so.
    fn outdate_sidecar(&self) -> io::Result<()> {
        match &self.sidecar {
            Some(path) if self.sidecar_is_there.load(Ordering::Acquire) => {
                sidecar::remove(path)?;
                self.sidecar_is_there.store(false, Ordering::Release);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Remembers that a change failed.
    fn noted<T>(&self, changed: io::Result<T>) -> io::Result<T> {
        if changed.is_err() {
            self.failed.store(true, Ordering::Release);
        }
        changed
    }

    /// After a sync that failed, the kernel takes what it could not write for written and hands it out as long as it is in
    /// its cache, and no later sync writes it. It is dropped there, so that whoever opens the file next, to go on from
    /// what is durable, reads what the disk has.
    fn sync_data(&self) -> io::Result<()> {
        let synced = self.noted(self.storage.sync_data());
        if let (Err(_), Some(file)) = (&synced, &self.file) {
            // Nothing more can be done when this fails too; the member stops in any case.
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
        }
        synced
    }

    fn close(&self) -> io::Result<()> {
        self.closed.store(true, Ordering::Release);
        let known = self.known();
        // A file in which rot was found is left without: what was found must be found again. So is one of which nobody
        // knows whether the last changes are on the disk.
        let certain = self.rot.get().is_none() && !self.failed.load(Ordering::Acquire);
        if let Some(path) = self.sidecar.as_ref().filter(|_| certain)
            && !self.sidecar_is_there.load(Ordering::Acquire)
        {
            sidecar::write(path, self.storage.len()?, known.sums())?;
        }
        self.storage.close()
    }
}

impl fmt::Debug for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checked({:?})", self.0.storage)
    }
}

impl fmt::Debug for Checks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checks({:?})", self.0.storage)
    }
}

impl StorageBackend for Checked {
    fn len(&self) -> io::Result<u64> {
        self.0.storage.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read(offset, out)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        self.0.noted(self.0.set_len(length))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.noted(self.0.write(offset, data))
    }

    fn close(&self) -> io::Result<()> {
        self.0.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.storage.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.storage.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.storage.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.storage.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.storage.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.storage.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests;
