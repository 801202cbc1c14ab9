//! A network of its own for a test or the demo: clusters get every port that they want, routes listen on 443, and what
//! a node makes (TAPs, addresses) is gone with the last process in it.

use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::io;
use std::process::Command;

/// Why there is no private network.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The kernel refused.
    #[error("a network namespace could not be made; this needs root")]
    Unshare(#[source] io::Error),
    /// Loopback stays down.
    #[error("loopback could not be brought up; install the package iproute2")]
    Loopback(#[source] io::Error),
    /// Loopback stays down.
    #[error("`ip link set lo up` failed")]
    LoopbackRefused,
}

/// Moves the calling thread, and every thread and process that it starts from now on, into a network namespace that
/// has nothing but loopback.
///
/// # Errors
/// [`NetnsError`] without the privilege; the thread is then where it was.
pub fn enter() -> Result<(), NetnsError> {
    // SAFETY: only the network namespace is left, and only by this thread: no descriptor or memory is affected.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(|e| NetnsError::Unshare(e.into()))?;
    let status =
        Command::new("ip").args(["link", "set", "lo", "up"]).status().map_err(NetnsError::Loopback)?;
    if status.success() { Ok(()) } else { Err(NetnsError::LoopbackRefused) }
}
