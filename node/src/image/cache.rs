//! The node's images on disk: roots that are ready, and the blobs that they were made from.
//!
//! ```text
//! lock             held by the one process that uses the cache
//! blobs/ partial/  see blob_store
//! roots/<hex>/     root.erofs  image.json  passwd  group      see roots
//! tmp/             work under way; emptied when the cache is opened
//! ```
//!
//! Concurrent calls for one digest do the work once. What a pull counts on, what somebody holds, and what the caller
//! says is in use is never collected, also when the disk is full. I5: a root that is here needs no registry.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::Limits;
use super::blob_store::{BlobStore, Pins, blocking, disk};
use super::digest::{Digest, Digester};
use super::error::{ImageError, LayerError, ManifestError};
use super::flatten::RootTree;
use super::keyed_lock::KeyedLock;
use super::manifest::{Document, ImageConfig, Layer, Manifest, RawConfig};
use super::reference::ImageRef;
use super::registry::RegistryClient;
use super::root_image::make_erofs;
use super::roots::{ROOT_FILE, RootImage, Roots, publish};
use super::stock::{Evictions, GcReport, Stock};
use super::user::Accounts;
use crate::step::{AfterStep, Step, unheard};

/// What images may take on a node's disk by default, in bytes, as far as nothing needs them.
pub const CACHE_BYTES_MAX: u64 = 20 << 30;
/// Layers of one image fetched at once, at most.
const LAYERS_AT_ONCE_MAX: usize = 3;
/// Attempts to take the cache's lock, at most, and the pause between two.
const LOCK_ATTEMPTS_MAX: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// How far [`ImageCache::ensure`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Layers are being fetched.
    Fetching {
        /// Bytes that are here.
        received_bytes: u64,
        /// Bytes that there will be.
        total_bytes: u64,
        /// How many layers there are.
        layers: usize,
    },
    /// Layers are being unpacked.
    Unpacking {
        /// The layer, from 1.
        layer: usize,
        /// How many there are.
        layers: usize,
    },
    /// The root file system is being made.
    Building,
    /// The root is there.
    Ready,
}

/// Tells which images are in use beside those that are held; `None` while that is not known.
pub type InUse = Arc<dyn Fn() -> Option<HashSet<Digest>> + Send + Sync>;

/// The cache. One for each node; cheap to share.
pub struct ImageCache {
    folder: PathBuf,
    limits: Limits,
    client: RegistryClient,
    stock: Arc<Stock>,
    builds: KeyedLock<Digest>,
    in_use: InUse,
    bytes_max: u64,
    after_step: AfterStep,
    _lock: File,
}

impl ImageCache {
    /// Opens or makes a cache in this folder, with the product's limits. Blocks on the disk, and for up to a
    /// second if another process has it.
    pub fn open(folder: &Path) -> Result<ImageCache, ImageError> {
        ImageCache::open_with(folder, Limits::default())
    }

    /// Opens or makes a cache with other limits.
    pub fn open_with(folder: &Path, limits: Limits) -> Result<ImageCache, ImageError> {
        ImageCache::open_heard(folder, limits, unheard())
    }

    /// The same, with something to call between any two steps that change the disk. The folder is closed to other users:
    /// it holds set-id programs.
    pub fn open_heard(
        folder: &Path,
        limits: Limits,
        after_step: AfterStep,
    ) -> Result<ImageCache, ImageError> {
        fs::create_dir_all(folder).map_err(|source| disk(folder, source))?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|source| disk(folder, source))?;
        let lock = lock_folder(folder)?;
        Ok(ImageCache {
            folder: folder.to_owned(),
            limits,
            client: RegistryClient::new(limits)?,
            stock: Arc::new(Stock::new(
                BlobStore::open(folder, Arc::clone(&after_step))?,
                Roots::open(folder, Arc::clone(&after_step))?,
            )),
            builds: KeyedLock::new(),
            in_use: Arc::new(|| None),
            bytes_max: CACHE_BYTES_MAX,
            after_step,
            _lock: lock,
        })
    }

    /// Asks this what is in use when a pull finds the disk full. A cache that is not told collects nothing then.
    #[must_use]
    pub fn with_in_use(self, in_use: InUse) -> ImageCache {
        ImageCache { in_use, ..self }
    }

    /// Bounds it otherwise than by [`CACHE_BYTES_MAX`].
    #[must_use]
    pub fn with_bytes_max(self, bytes_max: u64) -> ImageCache {
        ImageCache { bytes_max, ..self }
    }

    /// How many bytes it may have, as far as nothing needs them.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// The client that this cache pulls with.
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }

    /// The root of an image that is already here, without any network.
    pub fn get(&self, digest: Digest) -> Result<Option<RootImage>, ImageError> {
        self.stock.roots.ready(digest)
    }

    /// Makes sure that an image's root is here: fetches what is missing, builds, and returns it.
    ///
    /// The reference must have a digest, that of a single image. Takes [`Limits::image_time_max`] at most, after
    /// whoever is at work on the same digest. What was fetched stays, so a failed or dropped call is resumed by
    /// the next. `progress` is called often and must be quick.
    pub async fn ensure(
        &self,
        image: &ImageRef,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<RootImage, ImageError> {
        let digest = image.digest().ok_or_else(|| ImageError::NotPinned { reference: image.to_string() })?;
        let _only_one = self.builds.lock(digest).await;
        let root = match self.stock.roots.ready(digest)? {
            Some(root) => root,
            None => {
                let work = self.pull_and_build(image, digest, progress);
                let too_slow = || ImageError::TooSlow {
                    what: format!("preparing {image}"),
                    seconds: self.limits.image_time_max.as_secs(),
                };
                tokio::time::timeout(self.limits.image_time_max, work).await.map_err(|_| too_slow())??
            }
        };
        progress(Progress::Ready);
        Ok(root)
    }

    /// Bytes of everything in the cache. Blocks on the disk.
    pub fn used_bytes(&self) -> Result<u64, ImageError> {
        self.stock.used_bytes()
    }

    /// What was collected since the cache was opened.
    pub fn evictions(&self) -> Evictions {
        self.stock.evictions()
    }

    /// Removes least recently used blobs, then roots, until the cache has at most so many bytes. What is in use,
    /// held as a [`RootImage`], or part of a pull under way stays, whatever the bound. Blocks on the disk.
    pub fn gc(&self, in_use: &HashSet<Digest>, bytes_max: u64) -> Result<GcReport, ImageError> {
        self.stock.gc(in_use, bytes_max)
    }

    /// Pulls and builds; if the disk is full, removes what nothing needs and tries once more.
    async fn pull_and_build(
        &self,
        image: &ImageRef,
        digest: Digest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<RootImage, ImageError> {
        // Over both attempts: what the first one fetched is of use to the second.
        let mut pins = self.stock.blobs.pin();
        match self.try_pull_and_build(image, digest, &mut pins, progress).await {
            Err(error) if error.is_disk_full() => {
                tracing::warn!(%image, %error, "the disk is full; removing images that nothing needs");
            }
            outcome => return outcome,
        }
        if let Some(in_use) = (self.in_use)() {
            let stock = Arc::clone(&self.stock);
            let report = blocking("collecting images", move || stock.gc(&in_use, 0)).await??;
            tracing::info!(?report, "collected images for want of space");
        }
        match self.try_pull_and_build(image, digest, &mut pins, progress).await {
            Err(error) if error.is_disk_full() => {
                Err(ImageError::DiskFull { path: self.folder.clone(), source: Box::new(error) })
            }
            outcome => outcome,
        }
    }

    async fn try_pull_and_build(
        &self,
        image: &ImageRef,
        digest: Digest,
        pins: &mut Pins<'_>,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<RootImage, ImageError> {
        pins.add(digest);
        let (manifest, config) = self.documents(image, digest).await?;
        for blob in manifest.layers.iter().map(|layer| layer.digest).chain([manifest.config.digest]) {
            pins.add(blob);
        }
        self.fetch_layers(image, &manifest.layers, progress).await?;
        // Dropped with this future: it tells the thread that unpacks to stop.
        let cancelled = CancelOnDrop::default();
        let work = self.stock.roots.work_folder()?;
        let (work, tree) = {
            let (limits, flag) = (self.limits, Arc::clone(&cancelled.0));
            blocking("preparing a root", move || {
                let root = work.path().join("root");
                let tree = fs::create_dir(&root).and_then(|()| RootTree::new(&root, limits, flag));
                tree.map(|tree| (work, tree)).map_err(|source| disk(&root, source))
            })
            .await??
        };
        let (work, accounts) = self.unpack(work, tree, &manifest.layers, &config, progress).await?;
        (self.after_step)(Step::LayersUnpacked);
        let config = ImageConfig {
            user: accounts.resolve(&config.user)?,
            env: config.env,
            entrypoint: config.entrypoint,
            cmd: config.cmd,
            workdir: config.workdir,
        };
        progress(Progress::Building);
        let finished = work.path().join("finished");
        fs::create_dir(&finished).map_err(|source| disk(&finished, source))?;
        make_erofs(&work.path().join("root"), &finished.join(ROOT_FILE), digest).await?;
        (self.after_step)(Step::RootBuilt);
        let target = self.stock.roots.folder(digest);
        // The folder goes with the thread: if this future is dropped, it is removed after the rename, not during.
        let work = blocking("publishing a root", move || {
            publish(&finished, &target, digest, config, &accounts).map(|()| work)
        })
        .await??;
        (self.after_step)(Step::RootStored);
        // The unpacked tree is large; its removal need not be waited for.
        tokio::task::spawn_blocking(move || drop(work));
        self.stock.roots.ready(digest)?.ok_or_else(|| {
            disk(
                &self.stock.roots.folder(digest),
                io::Error::other("the root that was just built is not there"),
            )
        })
    }

    /// Manifest and configuration, from the disk or the registry.
    async fn documents(&self, image: &ImageRef, digest: Digest) -> Result<(Manifest, RawConfig), ImageError> {
        let Limits { document_bytes_max, layers_max, compressed_bytes_max, .. } = self.limits;
        let bytes = match self.stock.blobs.read_document(digest, document_bytes_max) {
            Some(bytes) => bytes,
            None => {
                let bytes = self.client.manifest(image, digest).await?;
                self.stock.blobs.write_document(digest, &bytes)?;
                bytes.into()
            }
        };
        let Document::Image(raw) = Document::parse(digest, &bytes)? else {
            return Err(ManifestError::IsIndex { digest }.into());
        };
        let manifest = raw.check(digest, layers_max, compressed_bytes_max)?;
        let config_digest = manifest.config.digest;
        let config = match self.stock.blobs.read_document(config_digest, document_bytes_max) {
            Some(bytes) => RawConfig::parse(config_digest, &bytes, manifest.layers.len())?,
            None => {
                let (bytes, config) = self.client.config(image, &manifest).await?;
                self.stock.blobs.write_document(config_digest, &bytes)?;
                config
            }
        };
        Ok((manifest, config))
    }

    async fn fetch_layers(
        &self,
        image: &ImageRef,
        layers: &[Layer],
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(), ImageError> {
        let wanted: HashSet<(Digest, u64)> = layers.iter().map(|layer| (layer.digest, layer.size)).collect();
        let total_bytes = wanted.iter().map(|(_, size)| size).sum();
        let received: HashMap<Digest, AtomicU64> =
            wanted.iter().map(|(digest, _)| (*digest, AtomicU64::new(0))).collect();
        let report = |digest: Digest, bytes: u64| {
            if let Some(counter) = received.get(&digest) {
                counter.store(bytes, Ordering::Relaxed);
            }
            let received_bytes = received.values().map(|counter| counter.load(Ordering::Relaxed)).sum();
            progress(Progress::Fetching { received_bytes, total_bytes, layers: layers.len() });
        };
        let report = &report;
        let fetches: Vec<_> = wanted
            .into_iter()
            .map(|blob| async move {
                let received = |bytes| report(blob.0, bytes);
                self.stock.blobs.fetch(&self.client, image, blob, self.limits.layer_time_max, &received).await
            })
            .collect();
        futures::stream::iter(fetches).buffer_unordered(LAYERS_AT_ONCE_MAX).try_collect::<()>().await
    }

    async fn unpack(
        &self,
        work: tempfile::TempDir,
        mut tree: RootTree,
        layers: &[Layer],
        config: &RawConfig,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<(tempfile::TempDir, Accounts), ImageError> {
        // Held by the thread that unpacks, so that the folder outlives it even if this future is dropped.
        let work = Arc::new(work);
        for (index, (layer, diff_id)) in layers.iter().zip(&config.diff_ids).enumerate() {
            progress(Progress::Unpacking { layer: index + 1, layers: layers.len() });
            let (path, compression, diff_id) =
                (self.stock.blobs.path(layer.digest), layer.compression, *diff_id);
            let held = Arc::clone(&work);
            let outcome;
            (tree, outcome) = blocking("unpacking a layer", move || {
                let _held = held;
                let outcome = File::open(&path).map_err(LayerError::Read).and_then(|file| {
                    let mut tar =
                        Digesting { inner: compression.reader(file), digester: Digester::default() };
                    tree.apply(&mut tar)?;
                    match tar.digester.finish() {
                        actual if actual == diff_id => Ok(()),
                        actual => Err(LayerError::DiffId { expected: diff_id, actual }),
                    }
                });
                (tree, outcome)
            })
            .await?;
            if let Err(source) = outcome {
                return Err(self.explain(layer.digest, source).await);
            }
        }
        let (accounts, finished) =
            blocking("finishing a root", move || (tree.accounts(), tree.finish())).await?;
        if let (Err(source), Some(last)) = (finished, layers.last()) {
            return Err(ImageError::Layer { layer: last.digest, source });
        }
        let work = Arc::try_unwrap(work).map_err(|_| ImageError::Thread { doing: "finishing a root" })?;
        Ok((work, accounts?))
    }

    /// Tells a bad layer from a good one that our own disk has damaged.
    async fn explain(&self, layer: Digest, source: LayerError) -> ImageError {
        let suspicious =
            matches!(source, LayerError::Read(_) | LayerError::Tar { .. } | LayerError::DiffId { .. });
        if suspicious && !self.stock.blobs.is_intact(layer) {
            return match self.stock.blobs.remove(layer) {
                Ok(()) => ImageError::DamagedBlob { digest: layer },
                Err(error) => error,
            };
        }
        ImageError::Layer { layer, source }
    }
}

#[derive(Default)]
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Digests what is read through it.
struct Digesting<R> {
    inner: R,
    digester: Digester,
}

impl<R: Read> Read for Digesting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.inner.read(buffer)?;
        self.digester.update(&buffer[..bytes]);
        Ok(bytes)
    }
}

/// Takes the folder's lock. One that was just given up may be held a moment longer by a child of its last
/// holder that has been forked and has not yet become its program, so a few attempts are made.
fn lock_folder(folder: &Path) -> Result<File, ImageError> {
    let path = folder.join("lock");
    let file = File::create(&path).map_err(|source| disk(&path, source))?;
    for attempt in 1.. {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => break,
            Err(Errno::WOULDBLOCK) if attempt < LOCK_ATTEMPTS_MAX => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => return Err(ImageError::InUse { path: folder.to_owned() }),
            Err(error) => return Err(disk(&path, error.into())),
        }
    }
    Ok(file)
}
