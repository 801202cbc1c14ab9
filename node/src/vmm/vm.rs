//! A hold on one machine that runs: by the agent that started it, or by the next one, which adopted it.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use holdfast_jail::cgroup::Group;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::Signal,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    VmmError, VmmKind,
    channel::ChannelAddress,
    firecracker,
    process::{self, Record},
    qemu, qmp,
};

/// How long a killed process may take to end.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Time between two questions to a VMM whether its guest still runs.
const STATUS_PERIOD: Duration = Duration::from_secs(5);

/// How many unanswered questions in a row make a VMM one that hangs.
const STATUS_MISSES_MAX: u32 = 3;

/// A machine that runs, or ran when last looked at.
#[derive(Debug)]
pub struct Vm {
    folder: PathBuf,
    record: Record,
    /// A handle on the process, which no reuse of its id can redirect. Readable once the process has ended.
    process: OwnedFd,
}

/// What an agent finds in a machine's folder.
#[derive(Debug)]
pub enum Adoption {
    /// The machine runs.
    Running(Vm),
    /// There is none (any more).
    Gone,
}

/// Why a machine is no longer running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEnd {
    /// The VMM's process ended: the guest rebooted, which is how a guest leaves, or somebody killed it.
    Exited {
        /// The end of the VMM's error output.
        said: String,
    },
    /// The kernel killed it because its cgroup's memory was used up.
    OutOfMemory,
    /// The VMM stopped the guest by itself (a KVM internal error, for one). The process is still there: kill it.
    GuestStopped {
        /// The VMM's word for it.
        status: String,
    },
    /// The VMM does not answer its control socket. The process is still there: kill it.
    Unresponsive,
}

impl std::fmt::Display for VmEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            VmEnd::Exited { said } => write!(f, "the VMM ended; it said: {said}"),
            VmEnd::OutOfMemory => f.write_str("the VMM used up the memory of its cgroup and was killed"),
            VmEnd::GuestStopped { status } => write!(f, "the VMM stopped the guest with status '{status}'"),
            VmEnd::Unresponsive => f.write_str("the VMM no longer answers its control socket"),
        }
    }
}

impl Vm {
    /// Records a machine whose process was just started. `None` if the process has already ended.
    pub(crate) fn record(
        folder: &Path,
        instance_id: &str,
        kind: VmmKind,
        pid: u32,
        cgroup: Option<PathBuf>,
        root: Option<PathBuf>,
    ) -> Result<Option<Vm>, VmmError> {
        let Some(identity) = process::identify(pid) else { return Ok(None) };
        let Some(process) = process::open_process(&identity)? else { return Ok(None) };
        let record = Record { cgroup, root, ..Record::new(instance_id, kind, identity) };
        record.write(folder)?;
        Ok(Some(Vm { folder: folder.to_owned(), record, process }))
    }

    /// Takes over the machine that runs from a folder, if one does. Starts, stops and changes nothing.
    pub fn adopt(folder: &Path) -> Result<Adoption, VmmError> {
        let record = match Record::read(folder)? {
            Some(record) => record,
            None => match adopt_unrecorded(folder) {
                Some(record) => {
                    record.write(folder)?;
                    record
                }
                None => return Ok(Adoption::Gone),
            },
        };
        Ok(match process::open_process(&record.process)? {
            Some(process) => Adoption::Running(Vm { folder: folder.to_owned(), record, process }),
            None => Adoption::Gone,
        })
    }

    /// The root image that the folder's machine has or had, as far as there is one.
    pub fn root_in(folder: &Path) -> Result<Option<PathBuf>, VmmError> {
        Ok(Record::read(folder)?.and_then(|record| record.root))
    }

    /// The instance that the machine is for.
    pub fn instance_id(&self) -> &str {
        &self.record.instance_id
    }

    /// The back-end that runs it.
    pub fn kind(&self) -> VmmKind {
        self.record.kind
    }

    /// The VMM's process id, for a cgroup or a log; never signal it by hand.
    pub fn pid(&self) -> u32 {
        self.record.process.pid
    }

    /// The machine's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The guest's boot console, [`process::FILE_BYTES_MAX`] at most.
    pub fn console_path(&self) -> PathBuf {
        self.folder.join(process::CONSOLE_FILE)
    }

    /// The end of the boot console, for a message that explains why a guest did not come up.
    pub fn console_said(&self) -> String {
        process::said(self.console_path())
    }

    /// Where the guest's init is spoken to.
    pub fn channel(&self) -> ChannelAddress {
        match self.record.kind {
            VmmKind::Firecracker => firecracker::channel_address(&self.folder),
            VmmKind::QemuKvm | VmmKind::QemuTcg => qemu::channel_address(&self.folder),
        }
    }

    /// Whether the VMM's process runs. It may run with a guest that does not; see [`Vm::ended`].
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }

    /// Sends the VMM a signal, wherever its process id leads by now.
    pub(crate) fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        rustix::process::pidfd_send_signal(&self.process, signal)
    }

    /// Kills the VMM and waits until it is gone. A machine that is already gone is no error.
    pub async fn kill(&self) -> Result<(), VmmError> {
        let error = |action, source| VmmError::Process { pid: self.pid(), action, source };
        match self.signal(Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(errno) => return Err(error("killed", errno.into())),
        }
        match tokio::time::timeout(KILL_DEADLINE, self.exited()).await {
            Ok(result) => result,
            Err(elapsed) => Err(error("killed within 10 s", elapsed.into())),
        }
    }

    /// Waits until the machine no longer runs and says why. Also notices a VMM that lives on without its guest,
    /// or hangs: it is asked every 5 s.
    pub async fn ended(&self) -> Result<VmEnd, VmmError> {
        tokio::select! {
            gone = self.exited() => {
                gone?;
                if self.record.cgroup.clone().is_some_and(|folder| Group::at(folder).was_out_of_memory()) {
                    return Ok(VmEnd::OutOfMemory);
                }
                Ok(VmEnd::Exited { said: process::said(self.folder.join(process::STDERR_FILE)) })
            }
            end = self.watch_status() => Ok(end),
        }
    }

    async fn exited(&self) -> Result<(), VmmError> {
        let error = |source| VmmError::Process { pid: self.pid(), action: "waited for", source };
        // A handle of its own, because two tasks may wait at once and the reactor takes each descriptor once.
        let handle = self.process.try_clone().map_err(error)?;
        // SAFETY: the reactor's registration owns the descriptor and so ends before it is closed.
        let handle = unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }
            .map_err(|failed| error(failed.into()))?;
        let _readiness = handle.readable().await.map_err(error)?;
        Ok(())
    }

    async fn watch_status(&self) -> VmEnd {
        if self.record.kind == VmmKind::Firecracker {
            // Firecracker has no such state: on an internal error of KVM its process ends.
            return std::future::pending().await;
        }
        let mut misses = 0;
        loop {
            tokio::time::sleep(STATUS_PERIOD).await;
            match qmp::query_status(&qemu::qmp_path(&self.folder)).await {
                Ok(status) if qemu::is_running(&status) => misses = 0,
                Ok(status) => return VmEnd::GuestStopped { status },
                Err(error) => {
                    misses += 1;
                    tracing::warn!(instance = self.instance_id(), misses, "{error}");
                    if misses == STATUS_MISSES_MAX {
                        return VmEnd::Unresponsive;
                    }
                }
            }
        }
    }
}

/// A machine whose record is lost.
fn adopt_unrecorded(folder: &Path) -> Option<Record> {
    let identity = process::find_by_argument(folder)?;
    let kind = if qemu::qmp_path(folder).exists() { VmmKind::QemuTcg } else { VmmKind::Firecracker };
    let instance_id = folder.file_name()?.to_str()?;
    Some(Record::new(instance_id, kind, identity))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// What the kernel really writes there is tried in `jail/tests/cgroups.rs`.
    #[tokio::test]
    async fn a_machine_ended_for_want_of_memory_if_its_group_says_so() {
        for (kills, expected) in [("oom_kill 2", VmEnd::OutOfMemory), ("oom_kill 0", ended_by_itself())] {
            let folder = tempfile::tempdir().unwrap();
            let group = folder.path().join("group");
            std::fs::create_dir(&group).unwrap();
            std::fs::write(group.join("memory.events"), format!("low 0\nhigh 3\nmax 9\noom 1\n{kills}\n"))
                .unwrap();
            let mut process = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
            let kind = VmmKind::Firecracker;
            let vm =
                Vm::record(folder.path(), "inst_1", kind, process.id(), Some(group), None).unwrap().unwrap();
            process.kill().unwrap();
            assert_eq!(vm.ended().await.unwrap(), expected);
            process.wait().unwrap();
        }
    }

    fn ended_by_itself() -> VmEnd {
        VmEnd::Exited { said: "nothing".to_owned() }
    }
}
