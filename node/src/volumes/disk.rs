//! One volume's disk: locked, checked against its record, and made when it never was.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Stdio;
use std::time::Duration;

use holdfast_model::VolumeId;
use holdfast_model::volume::NodeVolume;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use tokio::process::Command;

use super::record::{self, FORM, Record};
use super::{Owner, VolumeError};
use crate::host::disk_of;

/// The file.
pub(super) const NAME: &str = "disk.img";
/// From e2fsprogs.
const TOOL: &str = "mkfs.ext4";
/// Where it is looked for; the agent's own PATH may lack the system folders.
const TOOL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long it may take. It writes little: inode tables are made when they are first used.
const TOOL_DEADLINE: Duration = Duration::from_secs(120);
/// What of its complaint goes into the error.
const SAID_BYTES_MAX: usize = 400;
/// How often a lock is tried again: a machine that was killed lets go of its devices a moment after it is gone.
const LOCK_TRIES_MAX: u32 = 40;
/// The pause between two of these tries.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// A disk that is locked by whoever holds its file, and by nobody else.
#[derive(Debug)]
pub(super) struct Disk {
    volume: VolumeId,
    folder: OwnedFd,
    file: File,
    record: Record,
}

impl Disk {
    /// Locks the disk in a volume's folder and fences off every attachment before this one. Blocks for two seconds at
    /// most where somebody has it.
    pub(super) fn take(folder: OwnedFd, volume: &NodeVolume) -> Result<Self, VolumeError> {
        let id = volume.id;
        let failed = |action| move |source: io::Error| VolumeError::Disk { volume: id, action, source };
        let file = open(folder.as_fd(), OFlags::CREATE).map_err(failed("opened"))?;
        if !lock(&file).map_err(failed("locked"))? {
            return Err(VolumeError::InUse { volume: id });
        }
        let meta = file.metadata().map_err(failed("looked at"))?;
        let damaged = |problem| VolumeError::Damaged { volume: id, problem };
        if !meta.is_file() {
            return Err(damaged("it is not a file"));
        }
        let known = record::read(folder.as_fd()).map_err(failed("read"))?;
        let record = match known {
            Some(known) if known.generation > volume.generation => {
                let (asked, seen) = (volume.generation, known.generation);
                return Err(VolumeError::Fenced { volume: id, asked, seen });
            }
            Some(known) => Record { generation: volume.generation, ..known },
            None if meta.len() > 0 => return Err(damaged("there is no record of it")),
            None => {
                Record { form: FORM, size_mib: volume.size_mib, generation: volume.generation, made: false }
            }
        };
        if record.made && meta.len() != record.size_mib << 20 {
            return Err(damaged("its length is not its size"));
        }
        if !record.made && !volume.fresh {
            return Err(VolumeError::Missing { volume: id });
        }
        if known != Some(record) {
            record::write(folder.as_fd(), &record).map_err(failed("recorded"))?;
        }
        Ok(Self { volume: id, folder, file, record })
    }

    pub(super) fn is_made(&self) -> bool {
        self.record.made
    }

    /// The file. Whoever holds a duplicate of it holds the lock.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its size and a file system. Repeated whole after a crash: no machine has had it yet.
    pub(super) async fn make(self, owner: Owner) -> Result<Self, VolumeError> {
        let volume = self.volume;
        self.empty()?;
        make_file_system(volume, &self.file, owner).await?;
        super::blocking(move || self.made()).await
    }

    /// Writes down that it is made: from here on it is never formatted, nor written from a snapshot.
    pub(super) fn made(mut self) -> Result<Self, VolumeError> {
        let volume = self.volume;
        let failed = move |action| move |source: io::Error| VolumeError::Disk { volume, action, source };
        self.file.sync_all().map_err(failed("written"))?;
        self.record.made = true;
        record::write(self.folder.as_fd(), &self.record).map_err(failed("recorded"))?;
        Ok(self)
    }

    /// Gives it its size, if there is room, and nothing but zeros: what an attempt that failed has left of a file system is not
    /// to be found by the next.
    fn empty(&self) -> Result<(), VolumeError> {
        let (volume, needed_mib) = (self.volume, self.record.size_mib);
        let failed = move |action| move |source: io::Error| VolumeError::Disk { volume, action, source };
        let said = rustix::fs::fstatvfs(&self.file).map_err(|e| failed("looked at")(e.into()))?;
        let free_mib = disk_of(&said).free_mib;
        if free_mib < needed_mib {
            return Err(VolumeError::Room { volume, needed_mib, free_mib });
        }
        self.file.set_len(0).map_err(failed("made"))?;
        self.file.set_len(needed_mib << 20).map_err(failed("made"))
    }
}

/// A disk that is written from a snapshot: locked, of its size, and all zeros. `None` if that was done before.
pub(super) fn begin_restore(
    folder: OwnedFd,
    volume: VolumeId,
    size_mib: u64,
) -> Result<Option<Disk>, VolumeError> {
    let fresh = NodeVolume {
        id: volume,
        generation: 0,
        size_mib,
        fresh: true,
        path: String::new(),
        read_only: false,
    };
    let disk = Disk::take(folder, &fresh)?;
    if disk.record.made {
        return Ok(None);
    }
    disk.empty()?;
    Ok(Some(disk))
}

/// Erases a disk that nobody has, and its record; says whether it did.
pub(super) fn erase(folder: &OwnedFd, volume: VolumeId) -> Result<bool, VolumeError> {
    let failed = |source: io::Error| VolumeError::Disk { volume, action: "erased", source };
    match open(folder.as_fd(), OFlags::empty()) {
        Ok(file) => {
            if !lock(&file).map_err(failed)? {
                return Ok(false);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    super::clone::sweep(folder, |_| false).map_err(failed)?;
    // The record goes last: a disk without one is never formatted.
    for name in [NAME, record::FRESH, record::NAME] {
        match rustix::fs::unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    Ok(true)
}

fn open(folder: BorrowedFd<'_>, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    Ok(File::from(rustix::fs::openat(folder, NAME, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Whether the lock was got. It belongs to the open file, not to this process, and goes where that goes.
fn lock(file: &File) -> io::Result<bool> {
    for _ in 0..LOCK_TRIES_MAX {
        if lock_now(file)? {
            return Ok(true);
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Ok(false)
}

/// The same, without a second try.
pub(super) fn lock_now(file: &File) -> io::Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn make_file_system(volume: VolumeId, file: &File, owner: Owner) -> Result<(), VolumeError> {
    let failed = |said: String| VolumeError::Tool { volume, said };
    let input = file.try_clone().map_err(|e| failed(e.to_string()))?;
    let run = Command::new(TOOL)
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-U"])
        .arg(uuid(volume))
        .arg("-E")
        .arg(format!("root_owner={}:{},lazy_itable_init=1", owner.uid, owner.gid))
        // No path that could lead elsewhere by now.
        .arg("/proc/self/fd/0")
        .env_clear()
        .env("PATH", TOOL_PATH)
        .env("LC_ALL", "C")
        .stdin(Stdio::from(input))
        .kill_on_drop(true)
        .output();
    match tokio::time::timeout(TOOL_DEADLINE, run).await {
        Ok(Ok(output)) if output.status.success() => Ok(()),
        Ok(Ok(output)) => {
            let end = output.stderr.len().saturating_sub(SAID_BYTES_MAX);
            let said = String::from_utf8_lossy(output.stderr.get(end..).unwrap_or_default());
            Err(failed(format!("{}; {}", output.status, said.trim())))
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => Err(VolumeError::ToolMissing),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("it took longer than {} s", TOOL_DEADLINE.as_secs()))),
    }
}

/// A file system's id is its volume's.
fn uuid(volume: VolumeId) -> String {
    let hex = data_encoding::HEXLOWER.encode(&volume.to_key());
    let part = |range: std::ops::Range<usize>| hex.get(range).unwrap_or_default();
    [part(0..8), part(8..12), part(12..16), part(16..20), part(20..32)].join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_systems_id_is_the_volumes() {
        let volume = VolumeId::from_bits(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
        assert_eq!(uuid(volume), "01234567-89ab-cdef-0123-456789abcdef");
    }
}
