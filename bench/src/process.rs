//! Processes that the benchmark starts, and what they cost: CPU time and memory from `/proc`, fsyncs from `perf`.
//!
//! It ends only what it started, and ends all of it: each child dies with this process as well.

use crate::error::BenchError;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long an ended process may take to be gone.
const END_MAX: Duration = Duration::from_secs(10);

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
        // SAFETY: between fork and exec this makes one system call and touches no memory of the parent's.
        unsafe {
            command.pre_exec(|| {
                let signal = Some(rustix::process::Signal::KILL);
                rustix::process::set_parent_process_death_signal(signal).map_err(Into::into)
            });
        }
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

    /// Asks it to end, and waits; ends it at once when that takes too long.
    pub fn stop(&mut self) {
        let asked = self.child.as_ref().and_then(|child| rustix::process::Pid::from_raw(child.id() as i32));
        if let Some(pid) = asked {
            // It may have ended by itself.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let until = Instant::now() + END_MAX;
        while Instant::now() < until {
            match self.child.as_mut().map(Child::try_wait) {
                Some(Ok(None)) => std::thread::sleep(Duration::from_millis(20)),
                _ => break,
            }
        }
        self.kill();
    }

    /// CPU time, user's and the system's, of all that ran under this name.
    pub fn cpu(&self) -> Duration {
        self.spent + self.pid().and_then(cpu_of).unwrap_or_default()
    }

    /// Resident memory in bytes.
    pub fn memory(&self) -> u64 {
        let Some(pid) = self.pid() else { return 0 };
        let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
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
pub fn run(what: &str, command: &mut Command, log: &Path) -> Result<Vec<u8>, BenchError> {
    let errors = File::options().create(true).append(true).open(log).map_err(BenchError::file(log))?;
    let output = command.stdin(Stdio::null()).stderr(errors).output();
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
        SyncCounter { perf: command.spawn().ok(), output }
    }

    /// Ends the count. `None` where `perf` is missing or may not count.
    pub fn stop(mut self) -> Option<u64> {
        let mut perf = self.perf.take()?;
        let pid = rustix::process::Pid::from_raw(perf.id() as i32)?;
        rustix::process::kill_process(pid, rustix::process::Signal::INT).ok()?;
        perf.wait().ok()?;
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
