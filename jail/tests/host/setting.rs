//! The guest as a host: file systems, swap, and its end.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, PermissionsExt, chroot};
use std::path::Path;

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::Signal;

/// Where the root is put together.
const NEW_ROOT: &str = "/new";

const SWAP_DISK: &str = "/dev/vda";
const PAGE_BYTES: u64 = 4_096;

/// Puts the root on a file system of its own (no process can leave the one that the kernel unpacks its archive into), and
/// mounts what a host has.
pub(crate) fn make() {
    let none = MountFlags::empty();
    fs::create_dir(NEW_ROOT).unwrap();
    mount("root", NEW_ROOT, "tmpfs", none, None).unwrap();
    copy(Path::new("/"), Path::new(NEW_ROOT));
    rustix::process::chdir(NEW_ROOT).unwrap();
    mount_move(".", "/").unwrap();
    chroot(".").unwrap();
    rustix::process::chdir("/").unwrap();
    for (kind, path) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        fs::create_dir_all(path).unwrap();
        mount(kind, path, kind, none, None).unwrap();
    }
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2", none, None).unwrap();
    fs::create_dir("/jail").unwrap();
    swap_on();
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path == Path::new(NEW_ROOT) || path == Path::new("/dev") {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            fs::create_dir(&target).unwrap();
            copy(&path, &target);
        } else {
            let mut content = Vec::new();
            File::open(&path).unwrap().read_to_end(&mut content).unwrap();
            fs::write(&target, content).unwrap();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
}

/// Makes the guest's disk its swap, in the form that the kernel knows: a first page with a version, the last page's
/// number and a mark.
fn swap_on() {
    let disk = OpenOptions::new().write(true).open(SWAP_DISK).unwrap();
    let sectors: u64 = fs::read_to_string("/sys/class/block/vda/size").unwrap().trim().parse().unwrap();
    let last = u32::try_from(sectors * 512 / PAGE_BYTES - 1).unwrap();
    let mut page = [0; PAGE_BYTES as usize];
    page[1_024..1_028].copy_from_slice(&1_u32.to_le_bytes());
    page[1_028..1_032].copy_from_slice(&last.to_le_bytes());
    page[4_086..].copy_from_slice(b"SWAPSPACE2");
    disk.write_all_at(&page, 0).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    // SAFETY: the path ends with a zero byte.
    assert_eq!(unsafe { libc::swapon(c"/dev/vda".as_ptr(), 0) }, 0, "{}", std::io::Error::last_os_error());
}

/// Kills whatever the attacker has left.
pub(crate) fn end_all_others() {
    // SAFETY: a plain system call; from the first process of a system to all others.
    unsafe { libc::kill(-1, Signal::KILL.as_raw()) };
    // Orphans are the first process's children: without a word from it they would stay in the table.
    // SAFETY: waits for children; the runtime's own are gone.
    while unsafe { libc::waitpid(-1, std::ptr::null_mut(), 0) } > 0 {}
}

/// A guest leaves by a reset, which ends its VMM.
pub(crate) fn leave() -> ! {
    rustix::system::reboot(rustix::system::RebootCommand::Restart).unwrap();
    loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
