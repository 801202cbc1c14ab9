//! The agent's side of a launch: the plan is handed over, the process is made known, and only then told to run.
//!
//! Dropping a [`Launch`] at any point before [`Launch::go`] ends the process: its socket closes, and it is not executed.
//! The process is the agent's child; a task waits for its end, so that no remains of it stay.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use crate::error::LaunchError;
use crate::launcher::ARGUMENT;
use crate::plan::Plan;
pub use crate::report::Enforced;
use crate::report::{GO, REPORT_BYTES_MAX, Report};

/// How long a jail may take to be built: some milliseconds on an idle host.
const BUILD_DEADLINE: Duration = Duration::from_secs(20);

/// Reports that wait to be read; a launcher says three at most.
const REPORTS_MAX: usize = 8;

/// The agent's own binary, whatever has become of its file since.
pub const OWN_BINARY: &str = "/proc/self/exe";

/// A process in its jail, before it is what it is for.
#[derive(Debug)]
pub struct Launch {
    pid: u32,
    access: Enforced,
    write: OwnedWriteHalf,
    reports: mpsc::Receiver<Report>,
}

/// Builds a jail. `launcher` is a program that calls [`crate::launcher::enter_if_asked`] first; `stdout` and `stderr` become the
/// VMM's.
pub async fn launch(launcher: &Path, plan: &Plan, stdout: File, stderr: File) -> Result<Launch, LaunchError> {
    let document = plan.encode()?;
    let (socket, theirs) = pair()?;
    let child = Command::new(launcher)
        .arg(ARGUMENT)
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(stdout)
        .stderr(stderr)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| LaunchError::Spawn { program: launcher.to_owned(), source })?;
    let (read, mut write) = socket.into_split();
    let (told, mut reports) = mpsc::channel(REPORTS_MAX);
    tokio::spawn(attend(child, read, told));
    let build = async {
        let length = u32::try_from(document.len()).unwrap_or(u32::MAX).to_le_bytes();
        let sent = async {
            write.write_all(&length).await?;
            write.write_all(&document).await
        };
        // A launcher that fails before it has read everything says why.
        let sent = sent.await;
        let (mut process, mut ready) = (None, None);
        while process.is_none() || ready.is_none() {
            match reports.recv().await {
                Some(Report::Process { pid }) => process = Some(pid),
                Some(Report::Ready { access }) => ready = Some(access),
                Some(Report::Failed { step, why }) => return Err(LaunchError::Step { step, why }),
                None => {
                    return Err(match sent {
                        Err(source) => LaunchError::Talk { action: "sent its plan", source },
                        Ok(()) => LaunchError::Silent,
                    });
                }
            }
        }
        process.zip(ready).ok_or(LaunchError::Silent)
    };
    let (pid, access) = match tokio::time::timeout(BUILD_DEADLINE, build).await {
        Ok(built) => built?,
        Err(_) => return Err(LaunchError::Deadline { seconds: BUILD_DEADLINE.as_secs() }),
    };
    Ok(Launch { pid, access, write, reports })
}

impl Launch {
    /// The process, as the agent sees it. It is the agent's child and not waited for yet, so the id is not used again
    /// before this is dropped.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How much of the Landlock wall this kernel puts up.
    pub fn access(&self) -> Enforced {
        self.access
    }

    /// Has the program executed. On failure no process is left.
    pub async fn go(mut self) -> Result<(), LaunchError> {
        self.write
            .write_all(&[GO])
            .await
            .map_err(|source| LaunchError::Talk { action: "told to go on", source })?;
        match tokio::time::timeout(BUILD_DEADLINE, self.reports.recv()).await {
            // The socket was closed by the execution of the program.
            Ok(None) => Ok(()),
            Ok(Some(Report::Failed { step, why })) => Err(LaunchError::Step { step, why }),
            Ok(Some(_)) => Err(LaunchError::Nonsense),
            Err(_) => Err(LaunchError::Deadline { seconds: BUILD_DEADLINE.as_secs() }),
        }
    }
}

fn pair() -> Result<(UnixStream, OwnedFd), LaunchError> {
    let talk = |source| LaunchError::Talk { action: "reached", source };
    let (ours, theirs) = StdStream::pair().map_err(talk)?;
    ours.set_nonblocking(true).map_err(talk)?;
    Ok((UnixStream::from_std(ours).map_err(talk)?, theirs.into()))
}

/// Passes on what the launcher says, and waits for the ends of both its halves.
async fn attend(mut launcher: Child, read: OwnedReadHalf, told: mpsc::Sender<Report>) {
    let mut vmm = None;
    let mut lines = BufReader::new(read.take(REPORT_BYTES_MAX)).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        let Ok(report) = serde_json::from_str::<Report>(&line) else {
            tracing::error!(line, "a launcher said what makes no sense");
            break;
        };
        if let Report::Process { pid } = report {
            vmm = open(pid);
        }
        // Who started it may have lost interest; the processes must be waited for all the same.
        told.send(report).await.ok();
    }
    drop(told);
    launcher.wait().await.ok();
    if let Some((pid, handle)) = vmm {
        wait(pid, handle).await;
    }
}

fn open(pid: u32) -> Option<(u32, OwnedFd)> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
    let handle = rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK);
    handle
        .inspect_err(|error| tracing::error!(pid, %error, "a VMM cannot be waited for"))
        .ok()
        .map(|fd| (pid, fd))
}

async fn wait(pid: u32, handle: OwnedFd) {
    // SAFETY: the reactor's registration owns the descriptor and so ends before it is closed.
    let Ok(handle) = (unsafe { AsyncFd::register_with_interest(handle, Interest::READABLE) }) else { return };
    if handle.readable().await.is_err() {
        return;
    }
    let ended = rustix::process::waitid(
        WaitId::PidFd(std::os::fd::AsFd::as_fd(handle.get_ref())),
        WaitIdOptions::EXITED,
    );
    if let Ok(Some(status)) = ended
        && status.terminating_signal() == Some(libc::SIGSYS)
    {
        tracing::error!(
            pid,
            "a VMM was killed by its filter: it asked the kernel for what only an attacker asks for"
        );
    }
}
