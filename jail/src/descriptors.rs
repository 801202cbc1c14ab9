//! What a VMM is given instead of paths: files, listening sockets and its TAP, opened while the launcher still can.
//!
//! Because of them a VMM needs neither a writable folder, nor a device, nor a network.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::error::{Failure, InStep, Step};
use crate::plan::{Descriptor, FIRST_DESCRIPTOR};

/// Descriptors that are kept are moved out of the way of the numbers that the program expects.
pub(crate) const ASIDE: i32 = 200;

/// Asks for a device that reads and writes whole frames, with the header that offloads need.
const TAP_FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Opens everything, in order.
pub(crate) fn open(wanted: &[Descriptor]) -> Result<Vec<OwnedFd>, Failure> {
    wanted
        .iter()
        .map(|descriptor| match descriptor {
            Descriptor::Read(path) => OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
                .map(OwnedFd::from)
                .in_step(Step::Descriptors, format_args!("opening '{}' to read", path.display())),
            Descriptor::Append(path) => OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(path)
                .map(OwnedFd::from)
                .in_step(Step::Descriptors, format_args!("opening '{}' to append", path.display())),
            Descriptor::Listen(path) => {
                listen(path).in_step(Step::Descriptors, format_args!("listening at '{}'", path.display()))
            }
            Descriptor::Block(path) => block(path)
                .in_step(Step::Descriptors, format_args!("opening the block device '{}'", path.display())),
            Descriptor::Tap(name) => {
                tap(name).in_step(Step::Descriptors, format_args!("opening the TAP device '{name}'"))
            }
        })
        .collect()
}

fn block(path: &Path) -> io::Result<OwnedFd> {
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    // A file would be cut off at the size that a VMM's files may have, in the middle of its guest's data.
    if !device.metadata()?.file_type().is_block_device() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(device.into())
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    Ok(UnixListener::bind(path)?.into())
}

fn tap(name: &str) -> io::Result<OwnedFd> {
    let text = CString::new(name)?;
    // SAFETY: the string ends with a zero byte and lives through the call.
    if unsafe { libc::if_nametoindex(text.as_ptr()) } == 0 {
        // Root would make a device of that name, which nobody then removes.
        return Err(io::Error::last_os_error());
    }
    let tun =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: a zeroed ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if text.as_bytes().len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(text.as_bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = TAP_FLAGS as i16;
    // SAFETY: TUNSETIFF reads and writes an ifreq, and that is what it is given.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(tun.into())
}

/// Lets a TAP device be opened by a user who has no capability: for a VMM that opens it by its name.
pub(crate) fn hand_over_tap(name: &str, uid: u32) -> io::Result<()> {
    let tun = tap(name)?;
    // SAFETY: TUNSETOWNER takes a user id by value.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(uid)) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves a descriptor to a number from [`ASIDE`] on, closed on exec.
pub(crate) fn move_aside(descriptor: OwnedFd) -> Result<OwnedFd, Failure> {
    rustix::io::fcntl_dupfd_cloexec(&descriptor, ASIDE).in_step(Step::Descriptors, "moving a descriptor")
}

/// Gives the opened descriptors the numbers that the program expects, `/dev/null` as its input, and closes whatever
/// else there is when the program is executed. The descriptors to be kept until then must be [`move_aside`]d before.
pub(crate) fn arrange(opened: Vec<OwnedFd>) -> Result<(), Failure> {
    let opened: Vec<OwnedFd> = opened.into_iter().map(move_aside).collect::<Result<_, _>>()?;
    // SAFETY: marks descriptors to be closed on exec; nothing is closed here.
    let marked = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            FIRST_DESCRIPTOR as libc::c_uint,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if marked != 0 {
        return Err(io::Error::last_os_error())
            .in_step(Step::Descriptors, "marking descriptors to be closed on exec");
    }
    for (number, descriptor) in (FIRST_DESCRIPTOR..).zip(opened) {
        // SAFETY: the number is not owned by anything here: what lay there is not used any more.
        if unsafe { libc::dup2(descriptor.as_raw_fd(), number) } != number {
            return Err(io::Error::last_os_error()).in_step(Step::Descriptors, "numbering a descriptor");
        }
    }
    Ok(())
}

/// Replaces the standard input by an empty one. Must happen while `/dev/null` can be reached.
pub(crate) fn empty_input() -> Result<(), Failure> {
    let null = fs::File::open("/dev/null").in_step(Step::Descriptors, "opening '/dev/null'")?;
    // SAFETY: descriptor 0 is the launcher's socket, which was moved aside.
    if unsafe { libc::dup2(null.as_raw_fd(), 0) } != 0 {
        return Err(io::Error::last_os_error()).in_step(Step::Descriptors, "emptying the standard input");
    }
    Ok(())
}

/// The socket on which the launcher was given its plan: its standard input.
pub(crate) fn take_socket() -> Result<OwnedFd, Failure> {
    // SAFETY: the launcher's standard input is its socket by contract, and lives as long as the process.
    let socket = unsafe { BorrowedFd::borrow_raw(0) };
    rustix::io::fcntl_dupfd_cloexec(socket, ASIDE).in_step(Step::Descriptors, "taking the agent's socket")
}
