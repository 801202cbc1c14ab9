//! A root of its own: an empty file system in memory, on which the few files that the VMM needs are mounted read-only,
//! each where it is on the host, so that no path has two names.
//!
//! Everything is `nosuid`; everything but the devices is `nodev`; everything but the VMM and its libraries is `noexec`;
//! nothing but the one writable folder, where there is one, can be written to. `/proc` and `/sys` are not there.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Dev, FileType, Gid, Mode, Uid};
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

use crate::error::{Failure, InStep, Step};
use crate::plan::{Device, Identity, Root};

/// Directories and mount points live in it, and nothing else.
const ROOT_OPTIONS: &std::ffi::CStr = c"mode=0755,size=64k,nr_inodes=2048";

/// Holds device nodes only.
const DEVICES_OPTIONS: &std::ffi::CStr = c"mode=0755,size=4k,nr_inodes=16";

const CLOSED: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// Puts the root together and makes it this process's root. The mount namespace must be its own.
pub(crate) fn enter(root: &Root, owner: Option<Identity>) -> Result<(), Failure> {
    // Nothing that is mounted here may be seen on the host, nor what is mounted there later be seen here.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).in_step(Step::Root, "making mounts private")?;
    let base = &root.mount_point;
    rustix::mount::mount("jail", base, "tmpfs", CLOSED, ROOT_OPTIONS)
        .in_step(Step::Root, format_args!("mounting a file system on '{}'", base.display()))?;
    for file in &root.files {
        let target = place(base, &file.path)?;
        File::create(&target).in_step(Step::Root, format_args!("making '{}'", target.display()))?;
        let mut flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        flags.set(MountFlags::NOEXEC, !file.executable);
        bind(&file.path, &target, flags)?;
    }
    if let Some(folder) = &root.writable {
        let target = place(base, folder)?;
        fs::create_dir(&target).in_step(Step::Root, format_args!("making '{}'", target.display()))?;
        bind(folder, &target, CLOSED)?;
    }
    devices(base, &root.devices, owner)?;
    pivot(base)?;
    let closed = MountFlags::BIND | MountFlags::RDONLY | CLOSED;
    rustix::mount::mount_remount("/", closed, c"").in_step(Step::Root, "making the root read-only")
}

/// The path in the jail of something at this path on the host; its parents are made.
fn place(base: &Path, path: &Path) -> Result<PathBuf, Failure> {
    let target = base.join(path.strip_prefix("/").unwrap_or(path));
    let parent = target.parent().unwrap_or(base);
    fs::create_dir_all(parent).in_step(Step::Root, format_args!("making '{}'", parent.display()))?;
    Ok(target)
}

fn bind(source: &Path, target: &Path, flags: MountFlags) -> Result<(), Failure> {
    rustix::mount::mount_bind(source, target)
        .in_step(Step::Root, format_args!("mounting '{}'", source.display()))?;
    // A new bind mount takes over the flags of what it is made of: only the second call sets them.
    rustix::mount::mount_remount(target, MountFlags::BIND | flags, c"")
        .in_step(Step::Root, format_args!("closing the mount of '{}'", source.display()))
}

/// Devices lie in a file system of their own, the only one that may hold any.
fn devices(base: &Path, devices: &[Device], owner: Option<Identity>) -> Result<(), Failure> {
    if devices.is_empty() {
        return Ok(());
    }
    let folder = base.join("dev");
    fs::create_dir_all(&folder).in_step(Step::Root, "making '/dev'")?;
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    rustix::mount::mount("jail", &folder, "tmpfs", flags, DEVICES_OPTIONS)
        .in_step(Step::Root, "mounting a file system on '/dev'")?;
    for device in devices {
        let (name, kind) = (device.name(), kind_of(*device));
        let path = folder.join(&*name);
        let host = Path::new("/dev").join(&*name);
        let what = format_args!("making '{}'", host.display());
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).in_step(Step::Root, what)?;
        }
        let number: Dev = rustix::fs::stat(&host).in_step(Step::Root, what)?.st_rdev;
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, number).in_step(Step::Root, what)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).in_step(Step::Root, what)?;
        if let Some(Identity { uid, gid }) = owner {
            rustix::fs::chown(&path, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .in_step(Step::Root, what)?;
        }
    }
    rustix::mount::mount_remount(&folder, MountFlags::BIND | MountFlags::RDONLY | flags, c"")
        .in_step(Step::Root, "making '/dev' read-only")
}

const fn kind_of(device: Device) -> FileType {
    match device {
        Device::Kvm | Device::Tun | Device::Urandom => FileType::CharacterDevice,
        Device::Loop(_) => FileType::BlockDevice,
    }
}

/// Makes a mounted folder the root, and lets go of the old one: no path and no descriptor leads there any more.
fn pivot(base: &Path) -> Result<(), Failure> {
    rustix::process::chdir(base).in_step(Step::Root, "entering the new root")?;
    // The old root comes to lie on the new one, and is unmounted from there.
    rustix::process::pivot_root(".", ".").in_step(Step::Root, "pivot_root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).in_step(Step::Root, "unmounting the old root")?;
    rustix::process::chdir("/").in_step(Step::Root, "entering the new root")
}
