//! Real processes: started with a log file of their own, and ended with a deadline.

use crate::dev::record::ProcessRecord;
use crate::failure::Failure;
use rustix::process::{Pid, Signal, kill_process};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::process::{Child, Command};
use tokio::time::timeout;

/// How long a process has to end after SIGTERM: an edge lets connections finish for 10 s.
const END_MAX: Duration = Duration::from_secs(15);

/// A process of the cluster.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) record: ProcessRecord,
    child: Child,
    ended: bool,
}

/// What a process is to be.
#[derive(Debug)]
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) role: &'static str,
    pub(crate) arguments: Vec<String>,
    pub(crate) data_dir: PathBuf,
    pub(crate) log_file: PathBuf,
    pub(crate) addresses: BTreeMap<String, String>,
}

impl Process {
    /// Starts it.
    pub(crate) fn start(program: &Path, spec: Spec) -> Result<Self, Failure> {
        let log = open_log(&spec.log_file)?;
        let mut command = command(program, &spec.arguments, log, &spec.log_file)?;
        let child = command.spawn().map_err(Failure::file("start", program))?;
        let argv = std::iter::once(program.display().to_string()).chain(spec.arguments).collect();
        let record = ProcessRecord {
            name: spec.name,
            role: spec.role.to_owned(),
            argv,
            env: BTreeMap::new(),
            pid: child.id().unwrap_or_default(),
            data_dir: spec.data_dir,
            log_file: spec.log_file,
            addresses: spec.addresses,
        };
        Ok(Self { record, child, ended: false })
    }

    /// The exit status, the first time that it is seen to have ended.
    pub(crate) fn newly_ended(&mut self) -> Option<ExitStatus> {
        if self.ended {
            return None;
        }
        let status = self.child.try_wait().ok().flatten()?;
        self.ended = true;
        Some(status)
    }

    /// Asks it to end.
    pub(crate) fn ask_to_end(&self) {
        let id = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(id) = id {
            // It may have ended by itself; then there is nobody to ask.
            let _ = kill_process(id, Signal::TERM);
        }
    }

    /// Waits for its end; kills it when that takes too long. Says whether it had to.
    pub(crate) async fn end(&mut self) -> bool {
        if timeout(END_MAX, self.child.wait()).await.is_ok() {
            return false;
        }
        let _ = self.child.kill().await;
        true
    }
}

/// Runs a program to its end, with the log for its remarks, and returns what it printed.
pub(crate) async fn run(program: &Path, arguments: &[String], log_file: &Path) -> Result<Vec<u8>, Failure> {
    let mut command = command(program, arguments, open_log(log_file)?, log_file)?;
    let output = command.stdout(Stdio::piped()).spawn().map_err(Failure::file("start", program))?;
    let output = output.wait_with_output().await.map_err(Failure::file("wait for", program))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let what = arguments.iter().take(2).cloned().collect::<Vec<_>>().join(" ");
    Err(Failure::Host(format!(
        "`holdfast {what}` ended with {}; {} says why.",
        output.status,
        log_file.display()
    )))
}

fn open_log(path: &Path) -> Result<File, Failure> {
    OpenOptions::new().create(true).append(true).open(path).map_err(Failure::file("open", path))
}

fn command(program: &Path, arguments: &[String], log: File, log_file: &Path) -> Result<Command, Failure> {
    let errors = log.try_clone().map_err(Failure::file("open", log_file))?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
    command.env_remove("HOLDFAST_CONTEXT").env("NO_COLOR", "1");
    // Ctrl-C in a terminal goes to a whole group: processes are ended by us, in order, and not by the terminal.
    command.process_group(0);
    // SAFETY: between fork and exec the closure makes one system call (prctl) and touches no memory of ours.
    unsafe {
        command.pre_exec(|| {
            // When `holdfast dev` itself is killed, nobody would be left to end the others.
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
    Ok(command)
}
