//! Real clusters for tests and the demo: `holdfast dev` as a user starts it, and the power to kill -9 and restart any
//! one of its processes.
//!
//! Every wait has a hang guard, generous enough that no test depends on the machine's speed. Everything that was
//! started is ended when the cluster is dropped; after a failed test its folder stays and the logs' ends are shown.

use holdfast_client::{Client, ClientError, Endpoint};
use holdfast_identity::{CaCertificate, Token};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// For a cluster to come up, with building nothing.
pub const UP_MAX: Duration = Duration::from_secs(120);
/// For `holdfast dev` to end everything.
pub const END_MAX: Duration = Duration::from_secs(60);
/// For a killed process to be gone.
const GONE_MAX: Duration = Duration::from_secs(20);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Of each log, what is shown after a failure.
const LOG_LINES_SHOWN: usize = 40;

/// Why a cluster cannot be had, or does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file or program.
    #[error("{} could not be used", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The binary is not there.
    #[error("{} is not there; build it with `cargo build --package holdfast-cli`", path.display())]
    NotBuilt {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// `holdfast dev` ended.
    #[error("`holdfast dev` ended with {status}; {} says why", log.display())]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its output.
        log: PathBuf,
    },
    /// Something took too long.
    #[error("waited {} s for {what}", after.as_secs())]
    TimedOut {
        /// What for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// `dev.json` cannot be understood.
    #[error("dev.json cannot be understood")]
    Record(#[source] serde_json::Error),
    /// There is no such process.
    #[error("the cluster has no process {name}")]
    NoProcess {
        /// Its name.
        name: String,
    },
    /// The API.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A login that cannot be used.
    #[error("the cluster's login cannot be used: {0}")]
    Login(String),
}

/// `dev.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Record {
    /// For `--context`.
    pub context_file: PathBuf,
    /// The operator's token.
    pub token_file: PathBuf,
    /// The CA certificate.
    pub ca_file: PathBuf,
    /// Every member's API.
    pub servers: Vec<String>,
    /// The processes.
    pub processes: Vec<ProcessRecord>,
}

/// One process of `dev.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct ProcessRecord {
    /// As in `server-1`.
    pub name: String,
    /// `server`, `edge` or `node`.
    pub role: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Variables beside the inherited ones.
    pub env: BTreeMap<String, String>,
    /// The process as it runs now.
    pub pid: u32,
    /// Its own folder.
    pub data_dir: PathBuf,
    /// Its output.
    pub log_file: PathBuf,
}

/// What a cluster is to have.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// A node, and so microVMs.
    pub node: bool,
    /// An edge.
    pub edge: bool,
}

impl Options {
    /// Servers alone.
    pub const SERVERS: Options = Options { node: false, edge: false };
    /// Servers and an edge.
    pub const NO_NODE: Options = Options { node: false, edge: true };
    /// Everything.
    pub const WHOLE: Options = Options { node: true, edge: true };
}

/// A running cluster.
pub struct Cluster {
    dev: Child,
    record: Record,
    /// Processes that were killed and started again by us.
    restarted: BTreeMap<String, Child>,
    folder: Option<tempfile::TempDir>,
    dev_log: PathBuf,
    options: Options,
}

/// The binary under test: `$HOLDFAST_BIN`, else beside this program in cargo's target folder.
pub fn binary() -> Result<PathBuf, ClusterError> {
    let named = std::env::var_os("HOLDFAST_BIN").map(PathBuf::from);
    let beside = || {
        let program = std::env::current_exe().ok()?;
        let near = [program.parent()?.join("holdfast"), program.parent()?.parent()?.join("holdfast")];
        near.iter().find(|path| path.is_file()).cloned().or_else(|| near.into_iter().next())
    };
    let path = named.or_else(beside).unwrap_or_else(|| PathBuf::from("holdfast"));
    if path.is_file() { Ok(path) } else { Err(ClusterError::NotBuilt { path }) }
}

/// A folder with a short path: a node's folder is part of names that the kernel limits.
fn short_folder() -> Result<tempfile::TempDir, ClusterError> {
    let place = Path::new("/tmp");
    let made = tempfile::Builder::new().prefix("hf-").tempdir_in(place);
    made.map_err(|source| ClusterError::File { path: place.to_owned(), source })
}

impl Cluster {
    /// Makes a new cluster in a folder of its own and waits until it runs.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn start(options: Options) -> Result<Cluster, ClusterError> {
        Self::start_as(&binary()?, None, options)
    }

    /// The same with another program, and a variable for it and for every process that it starts.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn start_as(
        program: &Path,
        variable: Option<(&str, &str)>,
        options: Options,
    ) -> Result<Cluster, ClusterError> {
        let folder = short_folder()?;
        let dev_log = folder.path().join("dev.log");
        let data_dir = folder.path().join("c");
        let (dev, record) = start_dev(program, variable, &data_dir, &dev_log, options)?;
        Ok(Cluster { dev, record, restarted: BTreeMap::new(), folder: Some(folder), dev_log, options })
    }

    /// Ends `holdfast dev` as a user does and starts it again from the same folder.
    ///
    /// # Errors
    /// [`ClusterError`].
    pub fn stop_and_start(&mut self) -> Result<(), ClusterError> {
        self.end()?;
        let data_dir = self.data_dir().to_owned();
        (self.dev, self.record) = start_dev(&binary()?, None, &data_dir, &self.dev_log, self.options)?;
        Ok(())
    }

    /// The folder of the cluster.
    pub fn data_dir(&self) -> &Path {
        self.record.context_file.parent().unwrap_or(Path::new("/"))
    }

    /// Every file in the folder of the cluster.
    ///
    /// # Errors
    /// When a folder in it cannot be read.
    pub fn files(&self) -> Result<Vec<PathBuf>, ClusterError> {
        let (mut found, mut folders) = (Vec::new(), vec![self.data_dir().to_owned()]);
        while let Some(path) = folders.pop() {
            let entries = std::fs::read_dir(&path).map_err(|source| ClusterError::File { path, source })?;
            for entry in entries.flatten() {
                let path = entry.path();
                match entry.file_type() {
                    Ok(kind) if kind.is_dir() => folders.push(path),
                    Ok(kind) if kind.is_file() => found.push(path),
                    Ok(_) => {}
                    Err(source) => return Err(ClusterError::File { path, source }),
                }
            }
        }
        Ok(found)
    }

    /// What `dev.json` says, with the processes as they run now.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Names of the processes in a role.
    pub fn names(&self, role: &str) -> Vec<String> {
        self.record.processes.iter().filter(|p| p.role == role).map(|p| p.name.clone()).collect()
    }

    /// One process.
    ///
    /// # Errors
    /// When there is none with this name.
    pub fn process(&self, name: &str) -> Result<&ProcessRecord, ClusterError> {
        let found = self.record.processes.iter().find(|p| p.name == name);
        found.ok_or_else(|| ClusterError::NoProcess { name: name.to_owned() })
    }

    /// kill -9 to all of them, without waiting in between; returns when all are gone.
    ///
    /// # Errors
    /// When one has no such process, or does not go.
    pub fn kill(&mut self, names: &[String]) -> Result<(), ClusterError> {
        let mut killed = Vec::new();
        for name in names {
            killed.push((name.clone(), self.process(name)?.pid));
        }
        for (_, pid) in &killed {
            signal(*pid, Signal::KILL);
        }
        for (name, pid) in killed {
            if let Some(mut child) = self.restarted.remove(&name) {
                // Ours to reap.
                let _ = child.wait();
            } else {
                wait_for(&format!("{name} to be gone"), GONE_MAX, || gone(pid).then_some(()))?;
            }
        }
        Ok(())
    }

    /// Makes a process another program, or the same with a variable, from its next start on.
    ///
    /// # Errors
    /// When there is none with this name.
    pub fn run_as(
        &mut self,
        name: &str,
        program: &Path,
        variable: Option<(&str, &str)>,
    ) -> Result<(), ClusterError> {
        let found = self.record.processes.iter_mut().find(|p| p.name == name);
        let process = found.ok_or_else(|| ClusterError::NoProcess { name: name.to_owned() })?;
        process.argv[0] = program.to_string_lossy().into_owned();
        process.env.extend(variable.map(|(name, value)| (name.to_owned(), value.to_owned())));
        Ok(())
    }

    /// Starts a killed process again, exactly as `holdfast dev` did.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn restart(&mut self, name: &str) -> Result<(), ClusterError> {
        let process = self.process(name)?.clone();
        let path = &process.log_file;
        let log =
            OpenOptions::new().append(true).create(true).open(path).and_then(|l| Ok((l.try_clone()?, l)));
        let (out, errors) = log.map_err(|source| ClusterError::File { path: path.clone(), source })?;
        let program = PathBuf::from(&process.argv[0]);
        let mut command = Command::new(&program);
        command
            .args(&process.argv[1..])
            .envs(&process.env)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(errors);
        end_with_parent(&mut command, Signal::KILL);
        let child = command.spawn().map_err(|source| ClusterError::File { path: program, source })?;
        if let Some(record) = self.record.processes.iter_mut().find(|p| p.name == name) {
            record.pid = child.id();
        }
        self.restarted.insert(name.to_owned(), child);
        Ok(())
    }

    /// Runs `holdfast` as a user of this cluster does.
    ///
    /// # Errors
    /// When it cannot be started. How it ends is in the output.
    pub fn holdfast(&self, arguments: &[&str]) -> Result<Output, ClusterError> {
        self.holdfast_reading(arguments, Stdio::null())
    }

    /// The same, with something on its standard input.
    ///
    /// # Errors
    /// As [`Cluster::holdfast`].
    pub fn holdfast_reading(&self, arguments: &[&str], input: Stdio) -> Result<Output, ClusterError> {
        let program = binary()?;
        Command::new(&program)
            .args(arguments)
            .env("HOLDFAST_CONTEXT", &self.record.context_file)
            .env_remove("HOLDFAST_ORG")
            .env_remove("HOLDFAST_APP")
            .env_remove("HOLDFAST_ENV")
            .stdin(input)
            .output()
            .map_err(|source| ClusterError::File { path: program, source })
    }

    /// A client with the operator's token, of every member.
    ///
    /// # Errors
    /// When the login cannot be used.
    pub fn client(&self) -> Result<Client, ClusterError> {
        self.client_of(&self.record.servers.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A client with the operator's token, of these members alone.
    ///
    /// # Errors
    /// When the login cannot be used.
    pub fn client_of(&self, servers: &[&str]) -> Result<Client, ClusterError> {
        let read = |path: &Path| {
            let text = std::fs::read_to_string(path);
            text.map_err(|source| ClusterError::File { path: path.to_owned(), source })
        };
        let login = |e: &dyn std::error::Error| ClusterError::Login(e.to_string());
        let ca = CaCertificate::from_pem(&read(&self.record.ca_file)?).map_err(|e| login(&e))?;
        let token = Token::parse(read(&self.record.token_file)?.trim()).map_err(|e| login(&e))?;
        let endpoints: Result<Vec<Endpoint>, _> = servers.iter().map(|s| s.parse()).collect();
        Ok(Client::new(endpoints.map_err(|e| login(&e))?, &ca, Some(&token))?)
    }

    /// Ends every process; what the node ran is ended too.
    ///
    /// # Errors
    /// When `holdfast dev` does not end.
    pub fn end(&mut self) -> Result<(), ClusterError> {
        // Ours first: `holdfast dev` wipes the node's microVMs, which needs the agent gone.
        for child in self.restarted.values_mut() {
            signal(child.id(), Signal::TERM);
        }
        for (name, mut child) in std::mem::take(&mut self.restarted) {
            let ended = wait_for(&name, END_MAX, || child.try_wait().ok().flatten());
            if ended.is_err() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        if self.dev.try_wait().ok().flatten().is_some() {
            return Ok(());
        }
        signal(self.dev.id(), Signal::TERM);
        let dev = &mut self.dev;
        let ended = wait_for("`holdfast dev` to end", END_MAX, || dev.try_wait().ok().flatten());
        if ended.is_err() {
            let _ = dev.kill();
            let _ = dev.wait();
        }
        ended.map(drop)
    }

    /// The ends of all logs, for whoever looks at a failure.
    pub fn log_ends(&self) -> String {
        let mut text = log_end(&self.dev_log);
        for process in &self.record.processes {
            text.push_str(&log_end(&process.log_file));
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed {
            eprintln!("{}", self.log_ends());
        }
        if let Err(error) = self.end() {
            eprintln!("the cluster did not end well: {error}");
        }
        if let (true, Some(folder)) = (failed, self.folder.take()) {
            eprintln!("what is left is in {}", folder.keep().display());
        }
    }
}

fn start_dev(
    program: &Path,
    variable: Option<(&str, &str)>,
    data_dir: &Path,
    log: &Path,
    options: Options,
) -> Result<(Child, Record), ClusterError> {
    let open = || File::options().create(true).append(true).open(log);
    let (out, errors) = open()
        .and_then(|o| Ok((o, open()?)))
        .map_err(|source| ClusterError::File { path: log.to_owned(), source })?;
    let mut command = Command::new(program);
    command.envs(variable);
    command.arg("dev").arg("--data-dir").arg(data_dir).stdin(Stdio::null()).stdout(out).stderr(errors);
    command.env("NO_COLOR", "1").env_remove("HOLDFAST_CONTEXT");
    if !options.node {
        command.arg("--no-node");
    }
    if !options.edge {
        command.arg("--no-edge");
    }
    end_with_parent(&mut command, Signal::TERM);
    let mut dev =
        command.spawn().map_err(|source| ClusterError::File { path: program.to_owned(), source })?;
    let path = data_dir.join("dev.json");
    let came_up = wait_for("the cluster to come up", UP_MAX, || {
        if let Ok(Some(status)) = dev.try_wait() {
            return Some(Err(ClusterError::Ended { status, log: log.to_owned() }));
        }
        let text = std::fs::read(&path).ok()?;
        Some(serde_json::from_slice::<Record>(&text).map_err(ClusterError::Record))
    });
    match came_up.and_then(|record| record) {
        Ok(record) => Ok((dev, record)),
        Err(error) => {
            eprintln!("{}", log_end(log));
            let logs = std::fs::read_dir(data_dir.join("logs")).into_iter().flatten().flatten();
            logs.for_each(|entry| eprintln!("{}", log_end(&entry.path())));
            signal(dev.id(), Signal::TERM);
            let _ = wait_for("`holdfast dev` to end", END_MAX, || dev.try_wait().ok().flatten());
            let _ = dev.kill();
            let _ = dev.wait();
            Err(error)
        }
    }
}

/// Sends `signal` to the process when the thread that starts it ends without having ended it, as when a test is killed.
fn end_with_parent(command: &mut Command, signal: Signal) {
    // SAFETY: between fork and exec the closure makes one system call (prctl) and touches no memory of ours.
    unsafe {
        command.pre_exec(move || Ok(rustix::process::set_parent_process_death_signal(Some(signal))?));
    }
}

/// Looks until `look` finds something.
///
/// # Errors
/// [`ClusterError::TimedOut`].
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T, ClusterError> {
    let began = Instant::now();
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        if began.elapsed() >= limit {
            return Err(ClusterError::TimedOut { what: what.to_owned(), after: limit });
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Looks until `look` finds something, on an async thread.
///
/// # Errors
/// [`ClusterError::TimedOut`].
pub async fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> Result<T, ClusterError> {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return Ok(found);
        }
        if began.elapsed() >= limit {
            return Err(ClusterError::TimedOut { what: what.to_owned(), after: limit });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Sends a signal to a process that is ours, or says nothing if it is gone.
pub fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process has ended: not there, or waiting to be reaped.
pub fn gone(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    // The state follows the name, which is in parentheses and may hold anything; the number of threads is 17 fields on.
    let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let ended = matches!(fields.next(), Some("Z" | "X"));
    // Another thread may still wait for the disk, and until it ends the process keeps its ports.
    let threads = fields.nth(16).and_then(|threads| threads.parse().ok());
    ended && threads.is_none_or(|threads: u32| threads <= 1)
}

fn log_end(path: &Path) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let end = lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n");
    format!("--- {}\n{end}\n", path.display())
}
