//! File systems: the few that init itself needs, then the workload's root, a read-only image below a tmpfs.

use std::{
    fs, io,
    os::unix::fs::{PermissionsExt, chroot},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use holdfast_guest::config::VolumeMount;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};

use crate::InitError;

/// How long the kernel may take to find a disk.
const DISK_DEADLINE: Duration = Duration::from_secs(5);

/// Time between two looks for it.
const DISK_POLL: Duration = Duration::from_millis(5);

const ROOT_DISK: &str = "/dev/vda";
const LOWER: &str = "/holdfast/image";
const SCRATCH: &str = "/holdfast/scratch";
const NEW_ROOT: &str = "/holdfast/root";

/// Where no volume may appear, nor below; nor in the place of the root.
const RESERVED: [&str; 6] = ["/proc", "/sys", "/dev", "/run", "/tmp", "/holdfast"];

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

/// What init needs before it can say hello.
pub(crate) fn mount_essentials() -> Result<(), InitError> {
    attach("proc", "/proc", "proc", SAFE.union(MountFlags::NOEXEC), "")?;
    attach("sysfs", "/sys", "sysfs", SAFE.union(MountFlags::NOEXEC), "")?;
    attach("devtmpfs", "/dev", "devtmpfs", MountFlags::NOSUID, "mode=0755")
}

/// Mounts the root disk, lays a tmpfs over it, and makes that the root of this process and all that it starts.
/// With `disk` unset, the root stays the initramfs.
pub(crate) fn enter_root(disk: bool) -> Result<(), InitError> {
    let prefix = if disk { NEW_ROOT } else { "" };
    if disk {
        wait_for(ROOT_DISK)?;
        make(LOWER)?;
        let read_only = MountFlags::RDONLY | MountFlags::NODEV;
        mount(ROOT_DISK, LOWER, "erofs", read_only, None)
            .or_else(|_| mount(ROOT_DISK, LOWER, "ext4", read_only, None))
            .map_err(|errno| InitError::NoRoot(errno.into()))?;
        attach("tmpfs", SCRATCH, "tmpfs", MountFlags::NODEV, "mode=0755")?;
        make("/holdfast/scratch/upper")?;
        make("/holdfast/scratch/work")?;
        let layers =
            "lowerdir=/holdfast/image,upperdir=/holdfast/scratch/upper,workdir=/holdfast/scratch/work";
        attach("overlay", NEW_ROOT, "overlay", MountFlags::NODEV, layers)?;
        attach("proc", &format!("{prefix}/proc"), "proc", SAFE.union(MountFlags::NOEXEC), "")?;
        attach("sysfs", &format!("{prefix}/sys"), "sysfs", SAFE.union(MountFlags::NOEXEC), "")?;
        attach("devtmpfs", &format!("{prefix}/dev"), "devtmpfs", MountFlags::NOSUID, "mode=0755")?;
    }
    let devpts = SAFE.difference(MountFlags::NODEV).union(MountFlags::NOEXEC);
    attach("devpts", &format!("{prefix}/dev/pts"), "devpts", devpts, "mode=0620,ptmxmode=0666")?;
    attach("tmpfs", &format!("{prefix}/dev/shm"), "tmpfs", SAFE, "mode=1777")?;
    attach("tmpfs", &format!("{prefix}/run"), "tmpfs", SAFE, "mode=0755")?;
    attach("tmpfs", &format!("{prefix}/tmp"), "tmpfs", SAFE, "mode=1777")?;
    if disk {
        std::env::set_current_dir(NEW_ROOT).map_err(InitError::at("enter", NEW_ROOT))?;
        mount_move(NEW_ROOT, "/").map_err(|errno| InitError::at("move", NEW_ROOT)(errno.into()))?;
        chroot(".").map_err(InitError::at("make the root", NEW_ROOT))?;
        std::env::set_current_dir("/").map_err(InitError::at("enter", "/"))?;
        // An image may have been made with a root that only root may enter; a workload need not be root.
        fs::set_permissions("/", fs::Permissions::from_mode(0o755))
            .map_err(InitError::at("set the mode of", "/"))?;
    }
    Ok(())
}

/// Mounts volumes, the disks behind the root's, in their order.
pub(crate) fn mount_volumes(volumes: &[VolumeMount]) -> Result<(), InitError> {
    for (letter, volume) in (b'b'..=b'z').zip(volumes) {
        let device = format!("/dev/vd{}", char::from(letter));
        wait_for(&device)?;
        make(&volume.path)?;
        // An image may have a link in its place.
        let place = fs::canonicalize(&volume.path).map_err(InitError::at("find", &volume.path))?;
        if place == Path::new("/") || RESERVED.iter().any(|reserved| place.starts_with(reserved)) {
            let (path, place) = (volume.path.clone(), place.display().to_string());
            return Err(InitError::ReservedMount { path, place });
        }
        let flags = if volume.read_only { SAFE | MountFlags::RDONLY } else { SAFE };
        mount(&device, &place, "ext4", flags, None)
            .map_err(|errno| InitError::at("mount the volume at", &volume.path)(errno.into()))?;
    }
    Ok(())
}

/// Writes out what is on volumes and lets go of them, so that the next guest finds them clean. What fails is left to their
/// journals.
pub(crate) fn release_volumes() {
    rustix::fs::sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut words = line.split(' ');
        let (Some(device), Some(place), Some("ext4")) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        if device.starts_with("/dev/vd") && device != ROOT_DISK {
            unmount(unescaped(place), UnmountFlags::empty()).ok();
        }
    }
}

/// A path of `/proc/self/mounts`: spaces and the like are three octal digits behind a backslash there.
fn unescaped(text: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::with_capacity(text.len()), text.as_bytes());
    while let Some((first, behind)) = rest.split_first() {
        let digits = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = behind.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    bytes
}

fn attach(
    source: &str,
    target: &str,
    kind: &'static str,
    flags: MountFlags,
    options: &str,
) -> Result<(), InitError> {
    make(target)?;
    let failed = |errno: rustix::io::Errno| InitError::at("mount", target)(errno.into());
    let options = std::ffi::CString::new(options).map_err(|_| failed(rustix::io::Errno::INVAL))?;
    mount(source, target, kind, flags, options.as_c_str()).map_err(failed)
}

fn make(folder: &str) -> Result<(), InitError> {
    match fs::create_dir_all(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(InitError::at("create", folder)(error)),
    }
}

fn wait_for(device: &str) -> Result<(), InitError> {
    let started_at = Instant::now();
    while !Path::new(device).exists() {
        if started_at.elapsed() > DISK_DEADLINE {
            return Err(InitError::at("find the disk", device)(io::ErrorKind::TimedOut.into()));
        }
        thread::sleep(DISK_POLL);
    }
    Ok(())
}
