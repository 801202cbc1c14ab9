//! Blobs on disk, each under its digest, each verified before it gets that name.
//!
//! ```text
//! blobs/<hex>     verified, read-only
//! partial/<hex>   a beginning of a blob; kept over interruptions, digested anew before it is continued
//! ```
//!
//! A download that breaks off, or whose process ends, goes on from what is on disk. A registry that ignores the request for
//! the rest, or answers it with anything else, is asked for the whole instead. Attempts are bounded, and so is their time.
//!
//! A blob is digested while it streams to disk. A name in `blobs/` means: these bytes had this digest when they
//! were synced. Readers check again (documents here, layers by their uncompressed digest).

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::OwnedMutexGuard;

use super::digest::{Digest, Digester};
use super::error::{ImageError, RegistryError};
use super::keyed_lock::KeyedLock;
use super::reference::ImageRef;
use super::registry::RegistryClient;
use super::retry::Backoff;
use crate::step::{AfterStep, Step};

/// Bytes gathered before they are digested and written.
const WRITE_BYTES: usize = 1 << 20;
const READ_BUFFER_BYTES: usize = 256 * 1024;

/// Verified blobs and the beginnings of others.
pub(crate) struct BlobStore {
    blobs: PathBuf,
    partial: PathBuf,
    locks: KeyedLock<Digest>,
    after_step: AfterStep,
    /// How many pulls under way count on a blob. Its size is bounded by their layers.
    pins: Mutex<HashMap<Digest, usize>>,
}

/// A blob on disk, for the collector.
pub(crate) struct StoredBlob {
    path: PathBuf,
    /// None for a file that is no blob's.
    pub(crate) digest: Option<Digest>,
    pub(crate) bytes: u64,
    pub(crate) used_at: SystemTime,
}

/// Blobs that a pull counts on: they are not collected while this lives.
pub(crate) struct Pins<'a> {
    store: &'a BlobStore,
    digests: Vec<Digest>,
}

impl Pins<'_> {
    /// Counts on this one too.
    pub(crate) fn add(&mut self, digest: Digest) {
        let mut pins = self.store.pins.lock().unwrap_or_else(PoisonError::into_inner);
        *pins.entry(digest).or_default() += 1;
        self.digests.push(digest);
    }
}

impl Drop for Pins<'_> {
    fn drop(&mut self) {
        let mut pins = self.store.pins.lock().unwrap_or_else(PoisonError::into_inner);
        for digest in &self.digests {
            if let Some(count) = pins.get_mut(digest) {
                *count -= 1;
                if *count == 0 {
                    pins.remove(digest);
                }
            }
        }
    }
}

impl BlobStore {
    pub(crate) fn open(folder: &Path, after_step: AfterStep) -> Result<BlobStore, ImageError> {
        let store = BlobStore {
            blobs: folder.join("blobs"),
            partial: folder.join("partial"),
            locks: KeyedLock::new(),
            after_step,
            pins: Mutex::new(HashMap::new()),
        };
        for folder in [&store.blobs, &store.partial] {
            fs::create_dir_all(folder).map_err(|source| disk(folder, source))?;
        }
        Ok(store)
    }

    pub(crate) fn path(&self, digest: Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// A document that is here and still has its digest.
    pub(crate) fn read_document(&self, digest: Digest, bytes_max: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(self.path(digest)).ok()?.take(bytes_max + 1).read_to_end(&mut bytes).ok()?;
        (Digest::of(&bytes) == digest).then_some(bytes)
    }

    /// Keeps a document whose digest was checked.
    pub(crate) fn write_document(&self, digest: Digest, bytes: &[u8]) -> Result<(), ImageError> {
        let partial = self.partial.join(digest.hex());
        let written = File::create(&partial).and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.map_err(|source| disk(&partial, source))?;
        self.publish(&partial, digest)
    }

    /// Whether the blob's file still has its digest. Reads all of it.
    pub(crate) fn is_intact(&self, digest: Digest) -> bool {
        let Ok(mut file) = File::open(self.path(digest)) else { return false };
        digest_file(&mut file, u64::MAX).is_ok_and(|(digester, _)| digester.finish() == digest)
    }

    pub(crate) fn remove(&self, digest: Digest) -> Result<(), ImageError> {
        let path = self.path(digest);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(disk(&path, error)),
            _ => Ok(()),
        }
    }

    /// All files, for the collector.
    pub(crate) fn list(&self) -> Result<Vec<StoredBlob>, ImageError> {
        let mut blobs = Vec::new();
        for folder in [&self.blobs, &self.partial] {
            for entry in fs::read_dir(folder).map_err(|source| disk(folder, source))? {
                let entry = entry.map_err(|source| disk(folder, source))?;
                let path = entry.path();
                let metadata = match entry.metadata() {
                    // A pull gave it its name, or removed it, a moment ago.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    metadata => metadata.map_err(|source| disk(&path, source))?,
                };
                let used_at = metadata.modified().map_err(|source| disk(&path, source))?;
                let digest = entry.file_name().to_str().and_then(Digest::from_hex);
                blobs.push(StoredBlob { path, digest, bytes: metadata.len(), used_at });
            }
        }
        Ok(blobs)
    }

    /// Begins to count on blobs.
    pub(crate) fn pin(&self) -> Pins<'_> {
        Pins { store: self, digests: Vec::new() }
    }

    /// Whether a pull under way counts on it.
    pub(crate) fn is_pinned(&self, digest: Digest) -> bool {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&digest)
    }

    /// Removes a blob, or the beginning of one, that no pull counts on; answers whether it did.
    pub(crate) fn evict(&self, blob: &StoredBlob) -> Result<bool, ImageError> {
        // While this is held no pull begins to count on it.
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        if blob.digest.is_some_and(|digest| pins.contains_key(&digest)) {
            return Ok(false);
        }
        match fs::remove_file(&blob.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(disk(&blob.path, source)),
            Ok(()) => {
                (self.after_step)(Step::BlobCollected);
                Ok(true)
            }
        }
    }

    /// Makes sure that a blob is here, fetching what is missing of it. `received` is told how much there is.
    pub(crate) async fn fetch(
        &self,
        client: &RegistryClient,
        image: &ImageRef,
        (digest, size): (Digest, u64),
        time_max: Duration,
        received: &(dyn Fn(u64) + Send + Sync),
    ) -> Result<(), ImageError> {
        let lock = self.locks.lock(digest).await;
        let path = self.path(digest);
        if fs::metadata(&path).is_ok_and(|metadata| metadata.is_file() && metadata.len() == size) {
            // At worst it is taken for one that was used longer ago.
            File::open(&path).and_then(|file| file.set_modified(SystemTime::now())).ok();
            received(size);
            return Ok(());
        }
        let _slot = client.blob_slot().await;
        let work = async {
            let partial = Partial::open(self.partial.join(digest.hex()), digest, size, lock).await?;
            let partial = download(client, image, partial, received, &self.after_step).await?;
            self.publish(&partial.path, digest)
        };
        tokio::time::timeout(time_max, work).await.map_err(|_| ImageError::TooSlow {
            what: format!("fetching layer {digest}"),
            seconds: time_max.as_secs(),
        })?
    }

    /// Gives a verified, synced file its name.
    fn publish(&self, partial: &Path, digest: Digest) -> Result<(), ImageError> {
        let path = self.path(digest);
        fs::set_permissions(partial, fs::Permissions::from_mode(0o400))
            .and_then(|()| fs::rename(partial, &path))
            .and_then(|()| File::open(&self.blobs)?.sync_all())
            .map_err(|source| disk(&path, source))?;
        (self.after_step)(Step::BlobStored);
        Ok(())
    }
}

/// The beginning of a blob. It owns the blob's lock, so that a write that outlives its cancelled caller also
/// outlives any chance to begin anew beside it.
struct Partial {
    path: PathBuf,
    file: File,
    digester: Digester,
    digest: Digest,
    size: u64,
    written: u64,
    /// Whether it is put together from more than one answer, perhaps of an earlier process that was interrupted.
    is_pieced: bool,
    /// Whether the registry is asked for the rest of what is here. No more once its answer to that was wrong.
    asks_for_rest: bool,
    _lock: OwnedMutexGuard<()>,
}

impl Partial {
    async fn open(
        path: PathBuf,
        digest: Digest,
        size: u64,
        lock: OwnedMutexGuard<()>,
    ) -> Result<Partial, ImageError> {
        blocking("opening a partial blob", move || {
            let opened = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| {
                    let (digester, written) = digest_file(&mut file, size)?;
                    file.set_len(written)?;
                    Ok((file, digester, written))
                });
            let (file, digester, written) = opened.map_err(|source| disk(&path, source))?;
            let (is_pieced, asks_for_rest) = (written > 0, true);
            Ok(Partial { path, file, digester, digest, size, written, is_pieced, asks_for_rest, _lock: lock })
        })
        .await?
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.digester.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        use std::io::Seek;

        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.digester, self.written, self.is_pieced) = (Digester::default(), 0, false);
        Ok(())
    }
}

/// Fetches until the blob is whole and has its digest. What was received is kept if it fails for a transient
/// reason, and removed if it can never become the blob.
async fn download(
    client: &RegistryClient,
    image: &ImageRef,
    mut partial: Partial,
    received: &(dyn Fn(u64) + Send + Sync),
    after_step: &AfterStep,
) -> Result<Partial, ImageError> {
    let mut backoff = Backoff::default();
    // The most that was ever here: only what goes beyond it is progress, or a registry that cannot resume would be
    // asked for ever.
    let mut reached = partial.written;
    loop {
        let outcome;
        (partial, outcome) = attempt(client, image, partial, received, after_step).await?;
        match outcome {
            Ok(()) => {
                let actual = partial.digester.clone().finish();
                if actual == partial.digest {
                    partial = on_disk(partial, |partial| partial.file.sync_all()).await?;
                    return Ok(partial);
                }
                let was_pieced = partial.is_pieced;
                partial = on_disk(partial, Partial::restart).await?;
                if !was_pieced {
                    let (host, expected) = (image.host().to_owned(), partial.digest);
                    return Err(RegistryError::WrongDigest { host, expected, actual }.into());
                }
                // The pieces may be at fault; what comes in one answer cannot be.
                partial.asks_for_rest = false;
                tracing::warn!(digest = %partial.digest, "a blob's pieces do not fit; fetching all of it anew");
            }
            Err(error) if error.is_transient() => {
                if partial.written > reached {
                    reached = partial.written;
                    backoff.reset();
                }
                backoff.pause(error).await?;
            }
            // At most once: the rest is not asked for again.
            Err(error @ RegistryError::Range { .. }) if partial.asks_for_rest => {
                tracing::warn!(digest = %partial.digest, %error, "fetching all of a blob anew");
                partial = on_disk(partial, Partial::restart).await?;
                partial.asks_for_rest = false;
            }
            Err(error) => {
                on_disk(partial, Partial::restart).await?;
                return Err(error.into());
            }
        }
    }
}

/// One request's worth.
async fn attempt(
    client: &RegistryClient,
    image: &ImageRef,
    mut partial: Partial,
    received: &(dyn Fn(u64) + Send + Sync),
    after_step: &AfterStep,
) -> Result<(Partial, Result<(), RegistryError>), ImageError> {
    let (digest, size) = (partial.digest, partial.size);
    if partial.written > 0 && partial.written < size && !partial.asks_for_rest {
        partial = on_disk(partial, Partial::restart).await?;
    }
    received(partial.written);
    if partial.written == size {
        return Ok((partial, Ok(())));
    }
    let mut stream = match client.blob(image, digest, partial.written).await {
        Ok(stream) => stream,
        Err(error) => return Ok((partial, Err(error))),
    };
    let is_rest = stream.starts_at() > 0;
    if is_rest {
        partial.is_pieced = true;
    } else if partial.written > 0 {
        partial = on_disk(partial, Partial::restart).await?;
        received(0);
    }
    let wrong_size = |actual| match is_rest {
        // It may be the rest of something else.
        true => RegistryError::Range { host: image.host().to_owned(), what: format!("blob {digest}") },
        false => RegistryError::WrongSize { host: image.host().to_owned(), digest, expected: size, actual },
    };
    if let Some(length) = stream.length()
        && partial.written.saturating_add(length) != size
    {
        let actual = partial.written.saturating_add(length);
        return Ok((partial, Err(wrong_size(actual))));
    }
    let mut gathered = Vec::with_capacity(WRITE_BYTES);
    loop {
        let piece = stream.next().await;
        if let Ok(Some(bytes)) = &piece {
            let sum = partial.written + gathered.len() as u64 + bytes.len() as u64;
            if sum > size {
                return Ok((partial, Err(wrong_size(sum))));
            }
            gathered.extend_from_slice(bytes);
        }
        let ended = !matches!(piece, Ok(Some(_)));
        if gathered.len() >= WRITE_BYTES || (ended && !gathered.is_empty()) {
            let full = std::mem::replace(&mut gathered, Vec::with_capacity(WRITE_BYTES));
            partial = on_disk(partial, move |partial| partial.append(&full)).await?;
            after_step(Step::BlobWritten);
            received(partial.written);
        }
        match piece {
            Ok(Some(_)) => {}
            Ok(None) if partial.written == size => return Ok((partial, Ok(()))),
            Ok(None) => {
                let (host, what) = (image.host().to_owned(), format!("blob {digest}"));
                return Ok((partial, Err(RegistryError::Interrupted { host, what })));
            }
            Err(error) => return Ok((partial, Err(error))),
        }
    }
}

/// Does one blocking thing with a partial blob.
async fn on_disk(
    mut partial: Partial,
    act: impl FnOnce(&mut Partial) -> io::Result<()> + Send + 'static,
) -> Result<Partial, ImageError> {
    blocking("writing a blob", move || match act(&mut partial) {
        Ok(()) => Ok(partial),
        Err(source) => Err(RegistryError::Disk { path: partial.path, source }.into()),
    })
    .await?
}

/// Runs something that blocks on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    doing: &'static str,
    act: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(act).await.map_err(|_| ImageError::Thread { doing })
}

pub(crate) fn disk(path: &Path, source: io::Error) -> ImageError {
    ImageError::Disk { path: path.to_owned(), source }
}

/// Digests a file from where it stands, up to so many bytes.
fn digest_file(file: &mut File, bytes_max: u64) -> io::Result<(Digester, u64)> {
    let mut digester = Digester::default();
    let mut buffer = vec![0; READ_BUFFER_BYTES];
    let mut left = bytes_max;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        match file.read(&mut buffer[..wanted])? {
            0 => break,
            bytes => {
                digester.update(&buffer[..bytes]);
                left -= bytes as u64;
            }
        }
    }
    Ok((digester, bytes_max - left))
}
