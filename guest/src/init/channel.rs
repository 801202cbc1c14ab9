//! The byte stream to the agent: a virtio-serial port, or a vsock connection that the host opens.
//!
//! Never blocks. The host's end may vanish and come back at any time.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use holdfast_guest::{SERIAL_PORT_NAME, VSOCK_PORT};
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
};

use crate::InitError;

/// How long the kernel may take to find the port.
const PORT_DEADLINE: Duration = Duration::from_secs(5);

/// Time between two looks for it.
const PORT_POLL: Duration = Duration::from_millis(5);

/// The stream, as it is offered by the VMM.
#[derive(Debug)]
pub(crate) enum Channel {
    /// One port, always there; tells by its end of file that no agent is connected.
    Serial {
        port: OwnedFd,
        /// Whether the last look found an agent at the other end.
        connected: bool,
    },
    /// A listener, and the connection of the agent that came last.
    Vsock { listener: OwnedFd, connection: Option<OwnedFd> },
}

/// What came of a read or a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// This many bytes.
    Bytes(usize),
    /// Nothing now; poll.
    Later,
    /// No agent is there (any more).
    Gone,
}

impl Channel {
    /// Finds and opens the channel.
    pub(crate) fn open() -> Result<Self, InitError> {
        let started_at = Instant::now();
        loop {
            if let Some(path) = find_port() {
                let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let port = rustix::fs::open(&path, flags, Mode::empty())
                    .map_err(|errno| InitError::at("open", path.display().to_string())(errno.into()))?;
                return Ok(Channel::Serial { port, connected: true });
            }
            // A guest without any virtio-serial device is one of Firecracker's.
            let has_serial =
                fs::read_dir("/sys/class/virtio-ports").is_ok_and(|mut all| all.next().is_some());
            if !has_serial && let Ok(listener) = listen() {
                return Ok(Channel::Vsock { listener, connection: None });
            }
            if started_at.elapsed() > PORT_DEADLINE {
                return Err(InitError::NoChannel);
            }
            thread::sleep(PORT_POLL);
        }
    }

    /// What to wait on for bytes from the agent; `None` while that would spin, and time must pass instead.
    pub(crate) fn readable_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Channel::Serial { port, connected } => connected.then(|| port.as_fd()),
            Channel::Vsock { listener, connection } => {
                Some(connection.as_ref().map_or_else(|| listener.as_fd(), |connection| connection.as_fd()))
            }
        }
    }

    /// What tells of a newer agent while an older connection is still open.
    pub(crate) fn listener_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Channel::Serial { .. } => None,
            Channel::Vsock { listener, connection } => connection.as_ref().map(|_| listener.as_fd()),
        }
    }

    /// Takes the connection of a newer agent, if there is one; the older connection is closed.
    pub(crate) fn accept(&mut self) -> bool {
        let Channel::Vsock { listener, connection } = self else { return false };
        // SAFETY: null pointers mean that the peer's address is not asked for.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            )
        };
        if fd < 0 {
            return false;
        }
        // SAFETY: the descriptor was just returned by the kernel and belongs to nobody else.
        *connection = Some(unsafe { OwnedFd::from_raw_fd(fd) });
        true
    }

    /// Reads what is there.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> Transfer {
        let outcome = match self.stream() {
            Some(stream) => rustix::io::read(stream, buffer),
            None => return Transfer::Gone,
        };
        self.settle(outcome)
    }

    /// Writes what fits.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Transfer {
        let outcome = match self.stream() {
            Some(stream) => rustix::io::write(stream, bytes),
            None => return Transfer::Gone,
        };
        self.settle(outcome)
    }

    fn stream(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Channel::Serial { port, .. } => Some(port.as_fd()),
            Channel::Vsock { connection, .. } => connection.as_ref().map(|connection| connection.as_fd()),
        }
    }

    fn settle(&mut self, outcome: Result<usize, Errno>) -> Transfer {
        let there = !matches!(outcome, Ok(0))
            && !matches!(outcome, Err(errno) if !matches!(errno, Errno::AGAIN | Errno::INTR));
        match self {
            Channel::Serial { connected, .. } => *connected = there,
            Channel::Vsock { connection, .. } if !there => *connection = None,
            Channel::Vsock { .. } => {}
        }
        match outcome {
            Ok(bytes) if there => Transfer::Bytes(bytes),
            Err(_) if there => Transfer::Later,
            _ => Transfer::Gone,
        }
    }
}

fn find_port() -> Option<PathBuf> {
    for port in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == SERIAL_PORT_NAME {
            return Some(PathBuf::from("/dev").join(port.file_name())).filter(|path| path.exists());
        }
    }
    None
}

fn listen() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call without pointers.
    let fd = unsafe {
        libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just returned by the kernel and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: `sockaddr_vm` is plain numbers; all-zero is a valid value of it.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = VSOCK_PORT;
    let length = std::mem::size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_vm` of the given length and outlives the call.
    if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a plain system call without pointers.
    if unsafe { libc::listen(socket.as_raw_fd(), 4) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}
