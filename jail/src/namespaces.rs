//! Namespaces: what the process sees of the host's mounts, processes, network, queues, names and cgroups is its own.
//!
//! A process that is the first in a process namespace must be a child, so the launcher makes one and ends. The child's
//! parent is the agent, not the launcher: the agent waits for it, and no process of ours stays beside each VMM.

use std::io;

use crate::error::{Failure, InStep, Step};
use crate::plan::Namespace;

fn flag(namespace: Namespace) -> libc::c_int {
    match namespace {
        Namespace::Mount => libc::CLONE_NEWNS,
        Namespace::Pid => libc::CLONE_NEWPID,
        Namespace::Network => libc::CLONE_NEWNET,
        Namespace::Ipc => libc::CLONE_NEWIPC,
        Namespace::Uts => libc::CLONE_NEWUTS,
        Namespace::Cgroup => libc::CLONE_NEWCGROUP,
    }
}

/// Which of the two processes this is.
pub(crate) enum Side {
    /// The launcher, and the child's process id as it and the agent see it.
    Parent(u32),
    /// The first process in the namespaces.
    Child,
}

/// Makes the child, in namespaces of its own. The process must have a single thread.
pub(crate) fn enter(namespaces: &[Namespace]) -> Result<Side, Failure> {
    let flags = namespaces.iter().fold(libc::CLONE_PARENT, |flags, one| flags | flag(*one));
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of everything, and there is one thread only.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags), 0, 0, 0, 0) };
    match pid {
        0 => Ok(Side::Child),
        pid => match u32::try_from(pid) {
            Ok(pid) => Ok(Side::Parent(pid)),
            Err(_) => Err(io::Error::last_os_error()).in_step(Step::Namespaces, "clone"),
        },
    }
}

/// The child's own session, and, where names are its own, one that tells nothing of the host.
pub(crate) fn settle(namespaces: &[Namespace]) -> Result<(), Failure> {
    rustix::process::setsid().in_step(Step::Namespaces, "making a session")?;
    if namespaces.contains(&Namespace::Uts) {
        rustix::system::sethostname(b"vmm").in_step(Step::Namespaces, "setting the host's name")?;
    }
    Ok(())
}
