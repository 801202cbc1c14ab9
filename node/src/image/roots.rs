//! Root file systems that are ready: `roots/<hex>/` by manifest digest, complete or absent.
//!
//! A root gets its name by one rename after everything in it was synced, and loses it by one rename into the folder of
//! work under way, so a crash leaves all of it or nothing to be believed. One that somebody holds is never removed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::blob_store::disk;
use super::digest::Digest;
use super::error::{ImageError, RootError};
use super::manifest::ImageConfig;
use super::user::{Accounts, ImageUser};
use crate::step::{AfterStep, Step};

/// `image.json`'s format.
const RECORD_VERSION: u32 = 1;
/// `image.json`, at most: a configuration and a little.
const RECORD_BYTES_MAX: u64 = 8 << 20;

pub(crate) const ROOT_FILE: &str = "root.erofs";
const RECORD_FILE: &str = "image.json";

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
    /// The image whose root has this path.
    pub fn digest_at(path: &Path) -> Option<Digest> {
        Digest::from_hex(path.parent()?.file_name()?.to_str()?)
    }

    /// Resolves another user than the image's own, `user[:group]` by name or number, in the image's account files.
    pub fn resolve_user(&self, user: &str) -> Result<ImageUser, RootError> {
        self.accounts.resolve(user)
    }
}

/// What is written beside a root.
#[derive(Serialize, Deserialize)]
struct Record {
    version: u32,
    manifest: Digest,
    root_bytes: u64,
    config: ImageConfig,
}

/// A root on disk, for the collector.
pub(crate) struct StoredRoot {
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
    pub(crate) used_at: SystemTime,
}

/// The roots of one cache.
pub(crate) struct Roots {
    folder: PathBuf,
    /// Where what is being made or removed is; emptied when the cache is opened.
    work: PathBuf,
    after_step: AfterStep,
    /// How many were taken out of sight: each gets a name of its own.
    hidden: AtomicU64,
    leases: Mutex<HashMap<Digest, Weak<()>>>,
}

impl Roots {
    /// Makes the folders; whatever an earlier process left half done is removed.
    pub(crate) fn open(cache: &Path, after_step: AfterStep) -> Result<Roots, ImageError> {
        let (folder, work) = (cache.join("roots"), cache.join("tmp"));
        match fs::remove_dir_all(&work) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(disk(&work, error)),
            _ => {}
        }
        for folder in [&folder, &work] {
            fs::create_dir_all(folder).map_err(|source| disk(folder, source))?;
        }
        Ok(Roots { folder, work, after_step, hidden: AtomicU64::new(0), leases: Mutex::new(HashMap::new()) })
    }

    /// The folder of a root that is there, or would be.
    pub(crate) fn folder(&self, digest: Digest) -> PathBuf {
        self.folder.join(digest.hex())
    }

    /// A folder for work under way.
    pub(crate) fn work_folder(&self) -> Result<tempfile::TempDir, ImageError> {
        tempfile::TempDir::new_in(&self.work).map_err(|source| disk(&self.work, source))
    }

    /// The finished root, if there is one. A damaged one is removed, to be built again.
    pub(crate) fn ready(&self, digest: Digest) -> Result<Option<RootImage>, ImageError> {
        let mut leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        let folder = self.folder(digest);
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
                let hidden = self.hide(digest)?;
                fs::remove_dir_all(&hidden).map_err(|source| disk(&hidden, source))?;
                return Ok(None);
            }
        };
        leases.retain(|_, lease| lease.strong_count() > 0);
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

    /// Whether somebody holds it.
    pub(crate) fn is_held(&self, digest: Digest) -> bool {
        let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
        leases.get(&digest).is_some_and(|lease| lease.strong_count() > 0)
    }

    /// Notes that it was in use just now.
    pub(crate) fn touch(&self, digest: Digest) {
        let record = File::open(self.folder(digest).join(RECORD_FILE));
        // At worst it is taken for one that was used longer ago.
        record.and_then(|file| file.set_modified(SystemTime::now())).ok();
    }

    /// Removes a root that nobody holds; answers whether it did.
    pub(crate) fn remove(&self, digest: Digest) -> Result<bool, ImageError> {
        let hidden = {
            // While this is held nobody gets a new lease, so a root judged free is free until it has lost its name.
            let leases = self.leases.lock().unwrap_or_else(PoisonError::into_inner);
            if leases.get(&digest).is_some_and(|lease| lease.strong_count() > 0) {
                return Ok(false);
            }
            self.hide(digest)?
        };
        // A large file takes long, and nobody need wait for it to get another root.
        fs::remove_dir_all(&hidden).map_err(|source| disk(&hidden, source))?;
        (self.after_step)(Step::RootCollected);
        Ok(true)
    }

    /// Takes a root out of sight, whole, so that a crash half-way through its removal leaves no half of one. Makes no
    /// folder: the disk may be full.
    fn hide(&self, digest: Digest) -> Result<PathBuf, ImageError> {
        let number = self.hidden.fetch_add(1, Ordering::Relaxed);
        let (folder, hidden) = (self.folder(digest), self.work.join(format!("removed-{number}")));
        fs::rename(&folder, &hidden).map_err(|source| disk(&folder, source))?;
        (self.after_step)(Step::RootHidden);
        Ok(hidden)
    }

    pub(crate) fn list(&self) -> Result<Vec<StoredRoot>, ImageError> {
        let mut roots = Vec::new();
        for entry in fs::read_dir(&self.folder).map_err(|source| disk(&self.folder, source))? {
            let path = entry.map_err(|source| disk(&self.folder, source))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(digest) = name.and_then(Digest::from_hex) else { continue };
            let bytes = fs::metadata(path.join(ROOT_FILE)).map_or(0, |metadata| metadata.len());
            let used = fs::metadata(path.join(RECORD_FILE)).and_then(|metadata| metadata.modified());
            roots.push(StoredRoot { digest, bytes, used_at: used.unwrap_or(SystemTime::UNIX_EPOCH) });
        }
        Ok(roots)
    }
}

/// Completes a root's folder, syncs all of it and puts it in its place.
pub(crate) fn publish(
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
    // A root is not damaged because a disk that is full or read-only keeps no times.
    record_file.set_modified(SystemTime::now()).ok();
    Ok((record, accounts))
}
