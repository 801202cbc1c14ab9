//! What goes wrong with a VMM, one variant per step that failed.

use std::{io, path::PathBuf};

use holdfast_jail::LaunchError;
use holdfast_jail::cgroup::CgroupError;
use holdfast_jail::ids::IdError;
use holdfast_jail::program::ProgramError;

use super::VmmKind;

/// A failure of a VMM, its process or its folder.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The specification is out of bounds.
    #[error("Instance '{instance_id}' cannot be started: {problem}.")]
    Spec {
        /// Which instance.
        instance_id: String,
        /// Which rule is broken.
        problem: &'static str,
    },
    /// The folder's path cannot be used.
    #[error("The folder '{}' cannot hold a microVM: {problem}.", .path.display())]
    FolderPath {
        /// The folder.
        path: PathBuf,
        /// Which rule is broken.
        problem: &'static str,
    },
    /// A file or folder of the machine could not be read or written.
    #[error("'{}' could not be {action}; check its permissions and the free space of its disk.", .path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A machine already runs from the folder.
    #[error("A microVM (process {pid}) already runs from '{}'; adopt it, or kill it before starting another.", .folder.display())]
    AlreadyRunning {
        /// The folder.
        folder: PathBuf,
        /// The process.
        pid: u32,
    },
    /// The record of a machine cannot be understood.
    #[error("The record '{}' is not one that this release wrote; remove the folder if its microVM is gone.", .path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The VMM could not be put behind its walls, or not be executed there.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// There is no user id for it.
    #[error(transparent)]
    Id(#[from] IdError),
    /// There is no cgroup for it.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It is not known what the program needs.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The program ended when it should have run.
    #[error("{kind} ended while instance '{instance_id}' was being started; it said: {said}")]
    EndedAtOnce {
        /// Which back-end.
        kind: VmmKind,
        /// Which instance.
        instance_id: String,
        /// The end of its error output.
        said: String,
    },
    /// The program's control socket did not answer in time.
    #[error("The control socket '{}' did not {expected} within {seconds} s; the VMM may hang, and is killed.", .path.display())]
    ControlDeadline {
        /// The socket.
        path: PathBuf,
        /// What it should have done.
        expected: &'static str,
        /// How long was waited.
        seconds: u64,
    },
    /// The program's control socket could not be used.
    #[error("The control socket '{}' could not be {action}.", .path.display())]
    Control {
        /// The socket.
        path: PathBuf,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The program refused a request.
    #[error("{kind} refused '{request}': {answer}")]
    Refused {
        /// Which back-end.
        kind: VmmKind,
        /// The request.
        request: String,
        /// Its answer, cut at 1 KiB.
        answer: String,
    },
    /// A system call on the process failed.
    #[error("The process {pid} could not be {action}.")]
    Process {
        /// The process.
        pid: u32,
        /// What was tried, as a past participle.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No back-end boots a guest.
    #[error("No VMM on this host boots a guest: {verdicts}. Install qemu-system-x86, or mend what is said.")]
    NoneBoots {
        /// What each one did.
        verdicts: String,
    },
}
