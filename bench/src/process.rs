//! Processes that the benchmark starts, and what they cost: CPU time and memory from `/proc`, fsyncs from `perf`.
//!
//! It ends only what it started, and ends all of it: each child dies with this process as well.

use crate::error::BenchError;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process that was asked to end may take to be gone: a member makes a checkpoint before.
const END_MAX: Duration = Duration::from_secs(30);
/// How long a program that is run to its end may take.
const RUN_MAX: Duration = Duration::from_secs(90);
/// Between two looks at whether a process is gone.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// Whatever ends this process, however hard, ends the one that `command` starts.
fn end_with_this(command: &mut Command) {
    // SAFETY: between fork and exec this makes one system call and touches no memory of the parent's.
    unsafe {
        command.pre_exec(|| {
            let signal = Some(rustix::process::Signal::KILL);
            rustix::process::set_parent_process_death_signal(signal).map_err(Into::into)
        });
    }
}

/// How a member is started, and the process that runs now.
#[derive(Debug)]
pub struct Process {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    log: PathBuf,
    child: Option<Child>,
    /// CPU time of earlier processes of this member.
    spent: Duration,
}

impl Process {
    /// A process that is not started yet.
    pub fn new(name: &str, program: &Path, arguments: Vec<OsString>, log: PathBuf) -> Process {
        Process {
            name: name.to_owned(),
            program: program.to_owned(),
            arguments,
            log,
            child: None,
            spent: Duration::ZERO,
        }
    }

    /// Starts it, its output in its log.
    pub fn start(&mut self) -> Result<(), BenchError> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.map_err(BenchError::file(&self.log))?;
        let errors = log.try_clone().map_err(BenchError::file(&self.log))?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
        end_with_this(&mut command);
        let child =
            command.spawn().map_err(|source| BenchError::Start { program: self.name.clone(), source })?;
        self.child = Some(child);
        Ok(())
    }

    /// The process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends it at once, as a power cut would, and waits until it is gone.
    pub fn kill(&mut self) {
        self.spent = self.cpu();
        if let Some(mut child) = self.child.take() {
            // Neither can fail for a child that was not waited for yet.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Asks it to end, and waits until it did.
    ///
    /// # Errors
    /// When it had to be killed, and when it says that it did not end well.
    pub async fn stop(&mut self) -> Result<(), BenchError> {
        let asked = self.child.as_ref().and_then(|child| rustix::process::Pid::from_raw(child.id() as i32));
        if let Some(pid) = asked {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let until = Instant::now() + END_MAX;
        while Instant::now() < until && self.ended().is_none() && self.child.is_some() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let ended = self.ended();
        let ran = self.child.is_some();
        self.kill();
        let why = match ended {
            // Some end themselves by the signal, once they have done what they do before.
            Some(status) if status.success() || status.signal().is_some() => return Ok(()),
            Some(status) => status.to_string(),
            None if !ran => return Ok(()),
            None => format!("KILL, {} s after TERM", END_MAX.as_secs()),
        };
        Err(BenchError::Ended { what: self.name.clone(), status: why, log: self.log.clone() })
    }

    /// How it ended, if it ended by itself.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().ok()).flatten()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// As errors call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// CPU time, user's and the system's, of all that ran under this name.
    pub fn cpu(&self) -> Duration {
        self.spent + self.pid().and_then(cpu_of).unwrap_or_default()
    }

    /// Resident memory in bytes: all of it, and what is not of files.
    pub fn memory(&self) -> (u64, u64) {
        let Some(pid) = self.pid() else { return (0, 0) };
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let kib = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        (kib("VmRSS:") * 1024, kib("RssAnon:") * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// CPU time of a living process.
pub fn cpu_of(pid: u32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold anything; the rest counts from its end: state is field 3, utime 14, stime 15.
    let rest = text.rsplit_once(") ")?.1;
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticks = rustix::param::clock_ticks_per_second();
    Some(Duration::from_millis((user + system) * 1000 / ticks.max(1)))
}

/// Runs a program to its end and returns what it printed.
///
/// # Errors
/// When it cannot be started, ends badly or takes too long; it is gone then.
pub async fn run(what: &str, mut command: Command, log: &Path) -> Result<Vec<u8>, BenchError> {
    let errors = File::options().create(true).append(true).open(log).map_err(BenchError::file(log))?;
    command.stdin(Stdio::null()).stderr(errors);
    end_with_this(&mut command);
    let mut command = tokio::process::Command::from(command);
    let output = tokio::time::timeout(RUN_MAX, command.kill_on_drop(true).output()).await;
    let output = output.map_err(|_| BenchError::Late { seconds: RUN_MAX.as_secs() })?;
    let output = output.map_err(|source| BenchError::Start { program: what.to_owned(), source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let (what, status) = (what.to_owned(), output.status.to_string());
    Err(BenchError::Ended { what, status, log: log.to_owned() })
}

/// Counts the fsyncs of processes, where `perf` may see them.
pub struct SyncCounter {
    perf: Option<Child>,
    output: PathBuf,
}

impl SyncCounter {
    /// Begins to count.
    pub fn start(pids: &[u32], folder: &Path) -> SyncCounter {
        let output = folder.join("syncs.csv");
        let pids = pids.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = Command::new("perf");
        command.args([
            "stat",
            "-x",
            ",",
            "-e",
            "syscalls:sys_enter_fdatasync,syscalls:sys_enter_fsync",
            "-o",
        ]);
        command
            .arg(&output)
            .args(["-p", &pids])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        end_with_this(&mut command);
        SyncCounter { perf: command.spawn().ok(), output }
    }

    /// Ends the count. `None` where `perf` is missing or may not count.
    pub fn stop(mut self) -> Option<u64> {
        let mut perf = self.perf.take()?;
        let pid = rustix::process::Pid::from_raw(perf.id() as i32)?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT).ok()?;
        let until = Instant::now() + END_MAX;
        while perf.try_wait().ok()?.is_none() {
            if Instant::now() > until {
                let _ = perf.kill();
                let _ = perf.wait();
                return None;
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let text = std::fs::read_to_string(&self.output).ok()?;
        let counts: Vec<u64> = text.lines().filter_map(|line| line.split(',').next()?.parse().ok()).collect();
        (counts.len() == 2).then(|| counts.iter().sum())
    }
}

impl Drop for SyncCounter {
    fn drop(&mut self) {
        if let Some(mut perf) = self.perf.take() {
            let _ = perf.kill();
            let _ = perf.wait();
        }
    }
}
