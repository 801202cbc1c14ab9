//! Limits of the process, soft and hard: what a VMM uses up is bounded even where there is no cgroup for it, and no
//! core dump ever holds a guest's memory (I10).

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Failure, InStep, Step};
use crate::plan::Limits;

/// Sets the limits, and has a write beyond a file's limit fail instead of killing the process: a guest must not be able
/// to end its machine by printing.
pub(crate) fn set(limits: &Limits) -> Result<(), Failure> {
    let wanted = [
        (Resource::Core, Some(0), "core dumps"),
        (Resource::Fsize, limits.file_bytes, "file sizes"),
        (Resource::Nofile, limits.descriptors, "descriptors"),
        (Resource::Nproc, limits.threads, "threads"),
        (Resource::Data, limits.data_bytes, "memory"),
        // What a VMM has no use for.
        (Resource::Memlock, Some(0), "locked memory"),
        (Resource::Msgqueue, Some(0), "message queues"),
        (Resource::Rtprio, Some(0), "real-time priorities"),
        (Resource::Nice, Some(0), "priorities"),
    ];
    for (resource, value, name) in wanted {
        let Some(value) = value else { continue };
        // Never raised, so that it also works for a root without the capability to do so.
        let value = getrlimit(resource).maximum.map_or(value, |maximum| maximum.min(value));
        setrlimit(resource, Rlimit { current: Some(value), maximum: Some(value) })
            .in_step(Step::Limits, format_args!("limiting {name}"))?;
    }
    // SAFETY: "ignore" installs no handler; the setting survives the execution of the program.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error()).in_step(Step::Limits, "ignoring SIGXFSZ");
    }
    Ok(())
}
