//! Volumes' disks: one folder each, in a place apart from images, so that neither fills up the other's.
//!
//! ```text
//! <folder>/vol_…/disk.img    the disk: sparse, mode 0600      state.json    what is known of it (record)
//!                snap_….img  a snapshot of it that is not in the store of backups yet (clone)
//! ```
//!
//! A disk reaches a machine as a loop device. Its file is locked as long as that device exists, which is as long as a
//! VMM holds it; the kernel lets go of both when the last descriptor closes, whichever process dies first. So two
//! machines never have one disk, and no crash leaves a lock. An attachment that is older than one that was seen here is
//! refused: of two agents' worth of news the later counts.
//!
//! A disk is made once, where the control plane says that it may have to be, and a file that is there is never
//! formatted again, whatever is wrong with it.

mod clone;
mod disk;
mod error;
mod loop_device;
mod record;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_model::volume::NodeVolume;
use holdfast_model::{SnapshotId, VolumeId};
use rustix::fs::{AtFlags, Mode, OFlags};

pub use error::VolumeError;

use crate::vmm::VolumeDevice;
use disk::Disk;

/// Whose a new file system's root is: the user that the workload runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// The disks of one node.
#[derive(Clone, Debug)]
pub struct Volumes {
    path: PathBuf,
    /// Everything is opened beneath it.
    folder: Arc<OwnedFd>,
}

/// A disk as a block device, for as long as this is held or a machine holds it.
#[derive(Debug)]
pub struct Attached {
    device: VolumeDevice,
    _hold: OwnedFd,
}

impl Attached {
    /// The device.
    pub fn device(&self) -> VolumeDevice {
        self.device
    }
}

/// A disk that is being written from a snapshot.
#[derive(Debug)]
pub struct Restoring(Disk);

impl Restoring {
    /// The disk's file.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn file(&self) -> std::io::Result<Arc<File>> {
        self.0.file().try_clone().map(Arc::new)
    }

    /// Everything was written: from here on it is the volume's disk.
    ///
    /// # Errors
    /// When that cannot be made durable.
    pub async fn finish(self) -> Result<(), VolumeError> {
        blocking(move || self.0.made().map(drop)).await
    }
}

impl Volumes {
    /// The disks in this folder, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(path: &Path) -> Result<Self, VolumeError> {
        let failed =
            |source: rustix::io::Errno| VolumeError::Folder { path: path.to_owned(), source: source.into() };
        std::fs::create_dir_all(path)
            .map_err(|source| VolumeError::Folder { path: path.to_owned(), source })?;
        rustix::fs::chmod(path, Mode::RWXU).map_err(failed)?;
        let folder = rustix::fs::open(path, FOLDER, Mode::empty()).map_err(failed)?;
        Ok(Self { path: path.to_owned(), folder: Arc::new(folder) })
    }

    /// Locks a volume's disk, makes it first if it has to be, and gives it as a device.
    ///
    /// # Errors
    /// When somebody has it, when a later attachment was seen here, or when the disk is not what it should be.
    pub async fn attach(&self, volume: &NodeVolume, owner: Owner) -> Result<Attached, VolumeError> {
        let (this, wanted) = (self.clone(), volume.clone());
        let disk = blocking(move || this.take(&wanted)).await?;
        let disk = if disk.is_made() { disk } else { disk.make(owner).await? };
        let id = volume.id;
        blocking(move || {
            let (number, hold) = loop_device::bind(disk.file(), &id.to_string())
                .map_err(|source| VolumeError::Device { volume: id, source })?;
            Ok(Attached { device: VolumeDevice { number }, _hold: hold })
        })
        .await
    }

    /// What is on a volume's disk now, as a file of its own; taken once, however often this is asked for. `machine` is the
    /// folder of the machine that has the volume, as far as that is known; it stands still for two seconds at most.
    ///
    /// # Errors
    /// When the disk is not here, somebody else has it, or it cannot be cloned in time.
    pub async fn snapshot(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
        machine: Option<PathBuf>,
    ) -> Result<Arc<File>, VolumeError> {
        let this = self.clone();
        blocking(move || {
            let path = this.path.join(volume.to_string());
            let folder = this.existing(volume, "looked for")?.ok_or(VolumeError::Missing { volume })?;
            let disk = path.join(disk::NAME);
            clone::take(&folder, volume, snapshot, &disk, machine.as_deref()).map(Arc::new)
        })
        .await
    }

    /// Removes the files of snapshots that are not wanted any more.
    pub async fn sweep_snapshots(&self, keep: BTreeSet<SnapshotId>) {
        let this = self.clone();
        let swept = blocking(move || {
            let failed = |source| VolumeError::Folder { path: this.path.clone(), source };
            for entry in std::fs::read_dir(&this.path).map_err(failed)? {
                let name = entry.map_err(failed)?.file_name();
                let Some(Ok(volume)) = name.to_str().map(str::parse::<VolumeId>) else { continue };
                if let Some(folder) = this.existing(volume, "looked for")? {
                    clone::sweep(&folder, |id| keep.contains(&id)).map_err(failed)?;
                }
            }
            Ok(())
        });
        if let Err(error) = swept.await {
            tracing::warn!(error = %crate::logs::chain(&error), "files of snapshots could not be removed");
        }
    }

    /// A disk to be written from a snapshot, locked as long as this is held; `None` if that was done before.
    ///
    /// # Errors
    /// When there is no room, somebody has it, or it cannot be made.
    pub async fn begin_restore(
        &self,
        volume: VolumeId,
        size_mib: u64,
    ) -> Result<Option<Restoring>, VolumeError> {
        let this = self.clone();
        blocking(move || {
            let folder = this.made_folder(volume)?;
            Ok(disk::begin_restore(folder, volume, size_mib)?.map(Restoring))
        })
        .await
    }

    /// Erases the disks of deleted volumes; answers with those of which nothing is left. One that a machine still has
    /// stays, for another time.
    pub async fn erase(&self, volumes: BTreeSet<VolumeId>) -> BTreeSet<VolumeId> {
        let this = self.clone();
        let erased = blocking(move || {
            let erased = volumes.into_iter().filter(|volume| match this.erase_one(*volume) {
                Ok(erased) => erased,
                Err(error) => {
                    tracing::warn!(%volume, error = %crate::logs::chain(&error), "a deleted volume is still here");
                    false
                }
            });
            Ok(erased.collect())
        });
        erased.await.unwrap_or_default()
    }

    /// Fenced, checked and locked; not yet made if it never was.
    fn take(&self, volume: &NodeVolume) -> Result<Disk, VolumeError> {
        Disk::take(self.made_folder(volume.id)?, volume)
    }

    /// A volume's folder, if it has one here. `action` is for what, as a past participle.
    fn existing(&self, volume: VolumeId, action: &'static str) -> Result<Option<OwnedFd>, VolumeError> {
        match rustix::fs::openat(&self.folder, volume.to_string().as_str(), FOLDER, Mode::empty()) {
            Ok(folder) => Ok(Some(folder)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(source) => Err(VolumeError::Disk { volume, action, source: source.into() }),
        }
    }

    /// A volume's folder, made if it is not there.
    fn made_folder(&self, volume: VolumeId) -> Result<OwnedFd, VolumeError> {
        let name = volume.to_string();
        let failed =
            |source: rustix::io::Errno| VolumeError::Disk { volume, action: "opened", source: source.into() };
        match rustix::fs::mkdirat(&self.folder, name.as_str(), Mode::RWXU) {
            Ok(()) => rustix::fs::fsync(&self.folder).map_err(failed)?,
            Err(rustix::io::Errno::EXIST) => {}
            Err(source) => return Err(failed(source)),
        }
        rustix::fs::openat(&self.folder, name.as_str(), FOLDER, Mode::empty()).map_err(failed)
    }

    fn erase_one(&self, id: VolumeId) -> Result<bool, VolumeError> {
        let name = id.to_string();
        let failed = |source: rustix::io::Errno| VolumeError::Disk {
            volume: id,
            action: "erased",
            source: source.into(),
        };
        let Some(folder) = self.existing(id, "erased")? else { return Ok(true) };
        if !disk::erase(&folder, id)? {
            return Ok(false);
        }
        rustix::fs::unlinkat(&self.folder, name.as_str(), AtFlags::REMOVEDIR).map_err(failed)?;
        rustix::fs::fsync(self.folder.as_fd()).map_err(failed)?;
        tracing::info!(volume = %id, folder = %self.path.display(), "erased a deleted volume");
        Ok(true)
    }
}

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::RDONLY);

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| VolumeError::Thread)?
}

#[cfg(test)]
mod tests;
