//! Files as block devices. A VMM's own files are cut off at a mebibyte, so that a guest cannot fill the host's disk with
//! what it prints; a block device has the size that it has.
//!
//! A device lets go of its file by itself when the last descriptor to it closes. Constants and layouts are those of the
//! kernel's `linux/loop.h`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// Where free devices are asked for.
const CONTROL: &str = "/dev/loop-control";
/// How often another free device is asked for, when somebody was quicker.
const TRIES_MAX: u32 = 32;

const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
/// Let go of the file with the last descriptor.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const NAME_BYTES: usize = 64;

/// `struct loop_info64`
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// The device that was made of the file at this path, if there is one.
pub(super) fn of(path: &Path) -> io::Result<Option<File>> {
    let path = path.canonicalize()?;
    for entry in std::fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        let Some(name) = name.to_str().filter(|name| name.starts_with("loop")) else { continue };
        // Those that have no file have no such entry.
        let Ok(backing) = std::fs::read(format!("/sys/block/{name}/loop/backing_file")) else { continue };
        if backing.trim_ascii_end() == path.as_os_str().as_encoded_bytes() {
            return File::open(format!("/dev/{name}")).map(Some);
        }
    }
    Ok(None)
}

/// Makes a free device of the file; answers with its number, and a descriptor that keeps it. The file stays open in the
/// kernel, with its lock, until that and every other descriptor to the device is closed.
pub(super) fn bind(file: &File, name: &str) -> io::Result<(u32, OwnedFd)> {
    let control = OpenOptions::new().read(true).write(true).open(CONTROL)?;
    let mut file_name = [0; NAME_BYTES];
    for (to, from) in file_name.iter_mut().zip(name.bytes().take(NAME_BYTES - 1)) {
        *to = from;
    }
    let config = Config {
        fd: file.as_raw_fd().cast_unsigned(),
        block_size: 0,
        info: Info {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR,
            file_name,
            crypt_name: [0; NAME_BYTES],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    for _ in 0..TRIES_MAX {
        // SAFETY: the request takes no argument.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        let number = u32::try_from(number).map_err(|_| io::Error::last_os_error())?;
        let device = OpenOptions::new().read(true).write(true).open(format!("/dev/loop{number}"))?;
        // SAFETY: the request reads a loop_config, which this is, by its layout, and lives through the call.
        if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) } == 0 {
            return Ok((number, device.into()));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EBUSY) {
            return Err(error);
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}
