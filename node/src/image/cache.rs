//! The node's images on disk: roots that are ready, and the blobs that they were made from.
//!
//! ```text
//! lock             held by the one process that uses the cache
//! blobs/ partial/  see blob_store
//! roots/<hex>/     root.erofs  image.json  passwd  group      by manifest digest, complete or absent
//! tmp/             work under way; emptied when the cache is opened
//! ```
//!
//! A root gets its name by one rename after everything in it was synced, so a crash leaves either all of it or
//! nothing. Concurrent calls for one digest do the work once. A root that somebody holds, or that the caller
//! says is in use, is never collected. I5: a root that is here needs no registry.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use futures::{StreamExt, TryStreamExt};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Limits;
use super::blob_store::{BlobStore, blocking, disk};
use super::digest::{Digest, Digester};
use super::error::{ImageError, LayerError, ManifestError, RootError};
use super::flatten::RootTree;
use super::keyed_lock::KeyedLock;
use super::manifest::{Document, ImageConfig, Layer, Manifest, RawConfig};
use super::reference::ImageRef;
use super::registry::RegistryClient;
use super::root_image::make_erofs;
use super::user::{Accounts, ImageUser};

/// Layers of one image fetched at once, at most.
const LAYERS_AT_ONCE_MAX: usize = 3;
/// Attempts to take the cache's lock, at most, and the pause between two.
const LOCK_ATTEMPTS_MAX: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(20);
/// `image.json`'s format.
const RECORD_VERSION: u32 = 1;
/// `image.json`, at most: a configuration and a little.
const RECORD_BYTES_MAX: u64 = 8 << 20;

const ROOT_FILE: &str = "root.erofs";
const RECORD_FILE: &str = "image.json";

/// How far [`ImageCache::ensure`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Layers are being fetched.
    Fetching {
        /// Bytes that are here.
        received_bytes: u64,
        /// Bytes that there will be.
        total_bytes: u64,
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

/// A root file system on this node's disk. It is not collected while this, or a clone of it, lives.
#[derive(Debug, Clone)]
pub struct RootImage {
    /// The image's manifest.
    pub digest: Digest,
    /// The EROFS file: complete, read-only.
    pub path: PathBuf,
    /// Its size in bytes, a multiple of 4096.
    pub bytes: u64,
    /// How the image wants to be run.
    pub config: ImageConfig,
    accounts: Arc<Accounts>,
    _lease: Arc<()>,
}

impl RootImage {
    /// Resolves another user than the image's own, `user[:group]` by name or number, in the image's account files.
    pub fn resolve_user(&self, user: &str) -> Result<ImageUser, RootError> {
        self.accounts.resolve(user)
    }
}

/// What [`ImageCache::gc`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GcReport {
    /// Roots removed.
    pub roots_removed: usize,
    /// Blobs and beginnings of blobs removed.
    pub blobs_removed: usize,
    /// Bytes that these had.
    pub freed_bytes: u64,
    /// Bytes that remain.
    pub kept_bytes: u64,
}

/// What is written beside a root.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    manifest: Digest,
    root_bytes: u64,
    config: ImageConfig,
}

/// The cache. One for each node; cheap to share.
pub struct ImageCache {
    folder: PathBuf,
    limits: Limits,
    client: RegistryClient,
    blobs: BlobStore,
    builds: KeyedLock<Digest>,
    /// Read by every pull, written by the collector: blobs only go while nobody counts on them.
    pulls: tokio::sync::RwLock<()>,
    leases: Mutex<HashMap<Digest, Weak<()>>>,
    _lock: File,
}

impl ImageCache {
    /// Opens or makes a cache in this folder, with the product's limits. Blocks on the disk, and for up to a
    /// second if another process has it.
    pub fn open(folder: &Path) -> Result<ImageCache, ImageError> {
        ImageCache::open_with(folder, Limits::default())
    }

    /// Opens or makes a cache with other limits. The folder is closed to other users: it holds set-id programs.
    pub fn open_with(folder: &Path, limits: Limits) -> Result<ImageCache, ImageError> {
        let make = |path: &Path| fs::create_dir_all(path).map_err(|source| disk(path, source));
        make(folder)?;
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
            .map_err(|source| disk(folder, source))?;
        let lock = lock_folder(folder)?;
        let work = folder.join("tmp");
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(&work, error)),
            _ => {}
        }
        make(&work)?;
        make(&folder.join("roots"))?;
        Ok(ImageCache {
            folder: folder.to_owned(),
            limits,
            client: RegistryClient::new(limits)?,
            blobs: BlobStore::open(folder)?,
            builds: KeyedLock::new(),
            pulls: tokio::sync::RwLock::new(()),
            leases: Mutex::new(HashMap::new()),
            _lock: lock,
        })
    }

    /// The client that this cache pulls with.
    pub fn client(&self) -> &RegistryClient {
        &self.client
    }

    /// The root of an image that is already here, without any network.
    pub fn get(&self, digest: Digest) -> Result<Option<RootImage>, ImageError> {
        self.ready(digest)
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
        let root = match self.ready(digest)? {
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
        let blobs: u64 = self.blobs.list()?.iter().map(|blob| blob.bytes).sum();
        Ok(blobs + self.list_roots()?.iter().map(|root| root.bytes).sum::<u64>())
    }

    /// Removes least recently used blobs, then roots, until the cache has at most so many bytes. What is in use,
    /// held as a [`RootImage`], or part of a pull under way stays, whatever the budget. Blocks on the disk.
    pub fn gc(&self, in_use: &HashSet<Digest>, budget_bytes: u64) -> Result<GcReport, ImageError> {
        // While this is held nobody gets a new lease, so a root judged free stays free until it is gone.
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.retain(|_, lease| lease.strong_count() > 0);
        let mut blobs = self.blobs.list()?;
        let mut roots = self.list_roots()?;
        let blob_bytes: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        let mut kept_bytes = blob_bytes + roots.iter().map(|root| root.bytes).sum::<u64>();
        let mut report = GcReport::default();
        // A pull under way may count on any blob, and none begins while this is held.
        let quiet = self.pulls.try_write();
        blobs.sort_by_key(|blob| blob.used_at);
        for blob in blobs.iter().filter(|_| quiet.is_ok()) {
            if kept_bytes <= budget_bytes {
                break;
            }
            fs::remove_file(&blob.path).map_err(|source| disk(&blob.path, source))?;
            kept_bytes -= blob.bytes;
            report.blobs_removed += 1;
            report.freed_bytes += blob.bytes;
        }
        roots.sort_by_key(|root| root.used_at);
        for root in roots.iter().filter(|root| !in_use.contains(&root.digest)) {
            if kept_bytes <= budget_bytes {
                break;
            }
            if leases.contains_key(&root.digest) {
                continue;
            }
            self.discard(&self.root_folder(root.digest))?;
            kept_bytes -= root.bytes;
            report.roots_removed += 1;
            report.freed_bytes += root.bytes;
        }
        report.kept_bytes = kept_bytes;
        Ok(report)
    }

    async fn pull_and_build(
        &self,
        image: &ImageRef,
        digest: Digest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<RootImage, ImageError> {
        let _pulling = self.pulls.read().await;
        let (manifest, config) = self.documents(image, digest).await?;
        self.fetch_layers(image, &manifest.layers, progress).await?;
        // Dropped with this future: it tells the thread that unpacks to stop.
        let cancelled = CancelOnDrop::default();
        let work = self.work_folder()?;
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
        let target = self.root_folder(digest);
        // The folder goes with the thread: if this future is dropped, it is removed after the rename, not during.
        let work = blocking("publishing a root", move || {
            publish(&finished, &target, digest, config, &accounts).map(|()| work)
        })
        .await??;
        // The unpacked tree is large; its removal need not be waited for.
        tokio::task::spawn_blocking(move || drop(work));
        self.ready(digest)?.ok_or_else(|| {
            disk(&self.root_folder(digest), io::Error::other("the root that was just built is not there"))
        })
    }

    /// Manifest and configuration, from the disk or the registry.
    async fn documents(&self, image: &ImageRef, digest: Digest) -> Result<(Manifest, RawConfig), ImageError> {
        let Limits { document_bytes_max, layers_max, compressed_bytes_max, .. } = self.limits;
        let bytes = match self.blobs.read_document(digest, document_bytes_max) {
            Some(bytes) => bytes,
            None => {
                let bytes = self.client.manifest(image, digest).await?;
                self.blobs.write_document(digest, &bytes)?;
                bytes.into()
            }
        };
        let Document::Image(raw) = Document::parse(digest, &bytes)? else {
            return Err(ManifestError::IsIndex { digest }.into());
        };
        let manifest = raw.check(digest, layers_max, compressed_bytes_max)?;
        let config_digest = manifest.config.digest;
        let config = match self.blobs.read_document(config_digest, document_bytes_max) {
            Some(bytes) => RawConfig::parse(config_digest, &bytes, manifest.layers.len())?,
            None => {
                let (bytes, config) = self.client.config(image, &manifest).await?;
                self.blobs.write_document(config_digest, &bytes)?;
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
            progress(Progress::Fetching { received_bytes, total_bytes });
        };
        let report = &report;
        let fetches: Vec<_> = wanted
            .into_iter()
            .map(|blob| async move {
                let received = |bytes| report(blob.0, bytes);
                self.blobs.fetch(&self.client, image, blob, self.limits.layer_time_max, &received).await
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
            let (path, compression, diff_id) = (self.blobs.path(layer.digest), layer.compression, *diff_id);
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
        if suspicious && !self.blobs.is_intact(layer) {
            return match self.blobs.remove(layer) {
                Ok(()) => ImageError::DamagedBlob { digest: layer },
                Err(error) => error,
            };
        }
        ImageError::Layer { layer, source }
    }

    /// The finished root, if there is one. A damaged one is removed, to be built again.
    fn ready(&self, digest: Digest) -> Result<Option<RootImage>, ImageError> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = self.root_folder(digest);
        if !folder.exists() {
            return Ok(None);
        }
        let (record, accounts) = match read_root(&folder, digest) {
            Ok(read) => read,
            Err(error) if leases.get(&digest).is_some_and(|lease| lease.strong_count() > 0) => {
                return Err(disk(&folder, error));
            }
            Err(error) => {
                tracing::warn!(%digest, %error, "a cached root is damaged; building it again");
                self.discard(&folder)?;
                return Ok(None);
            }
        };
        let lease = leases.get(&digest).and_then(Weak::upgrade).unwrap_or_default();
        leases.insert(digest, Arc::downgrade(&lease));
        Ok(Some(RootImage {
            digest,
            path: folder.join(ROOT_FILE),
            bytes: record.root_bytes,
            config: record.config,
            accounts: Arc::new(accounts),
            _lease: lease,
        }))
    }

    fn root_folder(&self, digest: Digest) -> PathBuf {
        self.folder.join("roots").join(digest.hex())
    }

    fn work_folder(&self) -> Result<tempfile::TempDir, ImageError> {
        let work = self.folder.join("tmp");
        tempfile::TempDir::new_in(&work).map_err(|source| disk(&work, source))
    }

    /// Removes a root: out of sight first, so that a crash half-way leaves no half of one.
    fn discard(&self, folder: &Path) -> Result<(), ImageError> {
        let work = self.work_folder()?;
        fs::rename(folder, work.path().join("discarded"))
            .and_then(|()| work.close())
            .map_err(|source| disk(folder, source))
    }

    fn list_roots(&self) -> Result<Vec<StoredRoot>, ImageError> {
        let folder = self.folder.join("roots");
        let mut roots = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|source| disk(&folder, source))? {
            let path = entry.map_err(|source| disk(&folder, source))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(digest) = name.and_then(Digest::from_hex) else { continue };
            let bytes = fs::metadata(path.join(ROOT_FILE)).map_or(0, |metadata| metadata.len());
            let used = fs::metadata(path.join(RECORD_FILE)).and_then(|metadata| metadata.modified());
            roots.push(StoredRoot { digest, bytes, used_at: used.unwrap_or(SystemTime::UNIX_EPOCH) });
        }
        Ok(roots)
    }
}

struct StoredRoot {
    digest: Digest,
    bytes: u64,
    used_at: SystemTime,
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

/// Completes a root's folder, syncs all of it and puts it in its place.
fn publish(
    finished: &Path,
    target: &Path,
    manifest: Digest,
    config: ImageConfig,
    accounts: &Accounts,
) -> Result<(), ImageError> {
    let work = || -> io::Result<()> {
        let root = File::open(finished.join(ROOT_FILE))?;
        let record = Record { version: RECORD_VERSION, manifest, root_bytes: root.metadata()?.len(), config };
        seal(&root)?;
        write_sealed(&finished.join("passwd"), &accounts.passwd)?;
        write_sealed(&finished.join("group"), &accounts.group)?;
        write_sealed(&finished.join(RECORD_FILE), &serde_json::to_vec(&record)?)?;
        File::open(finished)?.sync_all()?;
        match fs::rename(finished, target) {
            // A call that was given up finished after all. What it made has the same digest.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            outcome => outcome?,
        }
        let parent = target.parent().ok_or(io::ErrorKind::NotFound)?;
        File::open(parent)?.sync_all()
    };
    work().map_err(|source| disk(target, source))
}

fn write_sealed(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    seal(&file)
}

/// Read-only for ever, and on the disk.
fn seal(file: &File) -> io::Result<()> {
    file.set_permissions(fs::Permissions::from_mode(0o444))?;
    file.sync_all()
}

/// Reads what is beside a root, checks that it belongs to it, and notes that it was used now.
fn read_root(folder: &Path, digest: Digest) -> io::Result<(Record, Accounts)> {
    let record_file = File::open(folder.join(RECORD_FILE))?;
    let mut bytes = Vec::new();
    (&record_file).take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
    let record: Record = serde_json::from_slice(&bytes)?;
    let root_bytes = fs::metadata(folder.join(ROOT_FILE))?.len();
    if (record.version, record.manifest, record.root_bytes) != (RECORD_VERSION, digest, root_bytes) {
        return Err(io::Error::other("its record does not describe it"));
    }
    let accounts =
        Accounts { passwd: fs::read(folder.join("passwd"))?, group: fs::read(folder.join("group"))? };
    record_file.set_modified(SystemTime::now())?;
    Ok((record, accounts))
}
