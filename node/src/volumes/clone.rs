//! What was on a disk at one moment, as a file beside it: a clone that shares blocks where the file system can, a copy where
//! it cannot.
//!
//! While a machine has the disk, its VMM is stopped for as long as that takes, for two seconds at most. Nothing is asked of
//! the guest, which is hostile: what is kept is what the disk would have after a loss of power, as its journal expects.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use holdfast_model::{SnapshotId, VolumeId};
use rustix::fs::{AtFlags, Mode, OFlags, SeekFrom};

use super::disk::lock_now;
use super::{VolumeError, loop_device};
use crate::host::disk_of;
use crate::vmm::{Adoption, Vm};

/// How long a machine is stopped, at most.
const QUIESCE_MAX: Duration = Duration::from_secs(2);
/// When a machine goes on although this agent died while it stood: in whole seconds, for `sleep`.
const WATCHDOG_S: u64 = 3;
/// What is copied before the clock is looked at, in bytes.
const COPY_BYTES: usize = 4 << 20;
/// How long to wait for all threads of a VMM to stand.
const STAND_MAX: Duration = Duration::from_millis(500);

/// The file of a snapshot that is whole, and of one that is not.
fn names(snapshot: SnapshotId) -> (String, String) {
    (format!("{snapshot}.img"), format!("{snapshot}.part"))
}

/// The snapshot's file in a volume's folder, made if it is not there. `machine` is the folder of the machine that has the
/// disk, as far as that is known.
pub(super) fn take(
    folder: &OwnedFd,
    volume: VolumeId,
    snapshot: SnapshotId,
    disk_path: &Path,
    machine: Option<&Path>,
) -> Result<File, VolumeError> {
    let failed = |action| move |source: io::Error| VolumeError::Disk { volume, action, source };
    let (whole, part) = names(snapshot);
    match open(folder, &whole, OFlags::empty()) {
        Ok(file) => return Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed("looked at")(error)),
    }
    let disk = open(folder, super::disk::NAME, OFlags::empty()).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => VolumeError::Missing { volume },
        _ => failed("opened")(error),
    })?;
    let clone = open(folder, &part, OFlags::CREATE | OFlags::TRUNC).map_err(failed("cloned"))?;
    let free = lock_now(&disk).map_err(failed("locked"))?;
    let cloned = if free {
        copy(volume, &disk, &clone, None)
    } else {
        stopped(volume, disk_path, machine, |deadline| copy(volume, &disk, &clone, Some(deadline)))
    };
    let kept = cloned.and_then(|()| {
        clone.sync_all().map_err(failed("cloned"))?;
        rustix::fs::renameat(folder, part.as_str(), folder, whole.as_str())
            .map_err(|e| failed("cloned")(e.into()))?;
        rustix::fs::fsync(folder).map_err(|e| failed("cloned")(e.into()))
    });
    if kept.is_err() {
        rustix::fs::unlinkat(folder, part.as_str(), AtFlags::empty()).ok();
    }
    kept.map(|()| clone)
}

fn open(folder: &OwnedFd, name: &str, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    Ok(File::from(rustix::fs::openat(folder, name, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Runs `work` while the machine that has the disk stands still and everything that it wrote is in the disk's file.
fn stopped(
    volume: VolumeId,
    disk_path: &Path,
    machine: Option<&Path>,
    work: impl FnOnce(Instant) -> Result<(), VolumeError>,
) -> Result<(), VolumeError> {
    let failed = |action| move |source: io::Error| VolumeError::Disk { volume, action, source };
    let elsewhere = || VolumeError::InUse { volume };
    let device = loop_device::of(disk_path).map_err(failed("looked for"))?.ok_or_else(elsewhere)?;
    let adopted = match machine.map(Vm::adopt) {
        Some(Ok(Adoption::Running(vm))) => vm,
        _ => return Err(elsewhere()),
    };
    // Most of what the kernel holds back is written while the machine still runs.
    device.sync_all().map_err(failed("synced"))?;
    let pause = Pause::begin(&adopted).map_err(failed("quiesced"))?;
    let worked = device.sync_all().map_err(failed("synced")).and_then(|()| work(pause.deadline));
    let stood = pause.end();
    worked?;
    if stood { Ok(()) } else { Err(VolumeError::Quiesce { volume, seconds: QUIESCE_MAX.as_secs() }) }
}

/// A machine that stands still, until this is dropped, or for [`WATCHDOG_S`] if this process dies.
struct Pause<'a> {
    vm: &'a Vm,
    watchdog: Child,
    deadline: Instant,
    over: bool,
}

impl<'a> Pause<'a> {
    fn begin(vm: &'a Vm) -> io::Result<Self> {
        let resume = format!("sleep {WATCHDOG_S}; kill -CONT {}", vm.pid());
        let watchdog = Command::new("/bin/sh")
            .args(["-c", &resume])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let deadline = Instant::now() + QUIESCE_MAX;
        let pause = Self { vm, watchdog, deadline, over: false };
        vm.signal(rustix::process::Signal::STOP)?;
        let began = Instant::now();
        while !pause.stands() {
            if began.elapsed() > STAND_MAX {
                return Err(io::Error::other("the VMM did not stand still in time"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(pause)
    }

    /// Whether each thread of the VMM is stopped (`man proc`, the third field of `stat`).
    fn stands(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.vm.pid())) else { return false };
        let mut any = false;
        for thread in threads {
            let stat = thread.and_then(|thread| std::fs::read_to_string(thread.path().join("stat")));
            any = true;
            let Ok(stat) = stat else { return false };
            let state = stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next());
            if state != Some('T') {
                return false;
            }
        }
        any
    }

    /// Lets the machine go on; says whether it stood all the time, and not for too long.
    fn end(mut self) -> bool {
        let stood = self.stands() && Instant::now() < self.deadline;
        self.resume();
        stood
    }

    fn resume(&mut self) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        if let Err(error) = self.vm.signal(rustix::process::Signal::CONT) {
            tracing::warn!(pid = self.vm.pid(), %error, "a machine that stood still could not go on");
        }
        // Only its shell ends; what sleeps for it signals nobody.
        self.watchdog.kill().ok();
        self.watchdog.wait().ok();
    }
}

impl Drop for Pause<'_> {
    fn drop(&mut self) {
        self.resume();
    }
}

/// Clones the disk, or copies it as far as the time allows.
fn copy(volume: VolumeId, disk: &File, clone: &File, deadline: Option<Instant>) -> Result<(), VolumeError> {
    let failed = |source: io::Error| VolumeError::Disk { volume, action: "cloned", source };
    match rustix::fs::ioctl_ficlone(clone, disk) {
        Ok(()) => return Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::XDEV | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(failed(error.into())),
    }
    let meta = disk.metadata().map_err(failed)?;
    let needed_mib = std::os::unix::fs::MetadataExt::blocks(&meta).div_ceil(2_048);
    let free_mib = disk_of(&rustix::fs::fstatvfs(clone).map_err(|e| failed(e.into()))?).free_mib;
    if free_mib < needed_mib {
        return Err(VolumeError::Room { volume, needed_mib, free_mib });
    }
    clone.set_len(meta.len()).map_err(failed)?;
    let mut at = 0;
    while at < meta.len() {
        let data = match rustix::fs::seek(disk, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        let hole = rustix::fs::seek(disk, SeekFrom::Hole(data)).map_err(|e| failed(e.into()))?;
        at = data;
        while at < hole {
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(VolumeError::Quiesce { volume, seconds: QUIESCE_MAX.as_secs() });
            }
            let length = usize::try_from(hole - at).unwrap_or(COPY_BYTES).min(COPY_BYTES);
            let (mut from, mut to) = (at, at);
            let copied = rustix::fs::copy_file_range(
                disk.as_fd(),
                Some(&mut from),
                clone.as_fd(),
                Some(&mut to),
                length,
            );
            match copied.map_err(|e| failed(e.into()))? {
                0 => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                copied => at += copied as u64,
            }
        }
    }
    Ok(())
}

/// Removes the files of a volume's snapshots but those of `keep`.
pub(super) fn sweep(folder: &OwnedFd, keep: impl Fn(SnapshotId) -> bool) -> io::Result<()> {
    let mut gone = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let id = name.strip_suffix(".img").or_else(|| name.strip_suffix(".part"));
        if let Some(Ok(id)) = id.map(str::parse::<SnapshotId>)
            && !keep(id)
        {
            gone.push(PathBuf::from(name));
        }
    }
    for name in gone {
        rustix::fs::unlinkat(folder, &name, AtFlags::empty())?;
    }
    Ok(())
}
