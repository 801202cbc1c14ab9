//! The one loop of PID 1: from the hello to the reboot.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{FromRawFd, OwnedFd},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use holdfast_guest::{
    PROTOCOL_VERSION,
    config::{GuestConfig, Workload},
    config_parts::Assembly,
    frame::Decoder,
    lines::LineCutter,
    log_buffer::LogBuffer,
    message::{ExitStatus, GuestMessage, GuestState, HealthCheck, HostMessage, LogStream},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    process::{Pid, Signal, WaitOptions, WaitStatus},
};

use crate::{
    InitError,
    channel::{Channel, Transfer},
    checks::Checks,
    exec::Execs,
    explain, mounts, network,
    outbox::{Flush, Outbox},
    secrets,
    workload::{self, Credentials, Output},
};

/// Time between two looks whether an agent has come back to a serial port, which cannot be waited for.
const RECONNECT_POLL: Duration = Duration::from_millis(100);

/// How long output is still read after the workload has ended and everything else was killed.
const DRAIN_DEADLINE: Duration = Duration::from_secs(1);

/// How long a guest whose workload ended waits for a connected agent to dismiss it.
const DISMISS_DEADLINE: Duration = Duration::from_secs(10);

/// How long it waits for an agent to come and learn of the exit.
const ABSENT_DEADLINE: Duration = Duration::from_secs(600);

/// Bytes read from the agent or the workload at a time.
const READ_BYTES: usize = 16 * 1024;

/// Reads of each source before the others get their turn.
const READS_PER_TURN_MAX: usize = 4;

/// A stream of the workload's output.
#[derive(Debug)]
struct OutputPipe {
    stream: LogStream,
    pipe: OwnedFd,
    cutter: LineCutter,
}

/// Where the guest stands; the public half of it is a [`GuestState`].
#[derive(Debug)]
enum Phase {
    AwaitingConfig,
    Running {
        pid: Pid,
    },
    /// TERM was sent; KILL follows.
    Stopping {
        pid: Pid,
        kill_at: Instant,
    },
    /// The workload ended; its output is read to the end.
    Draining {
        status: ExitStatus,
        until: Instant,
    },
    /// All output is in the ring. `told_at` is when the agent of this session was sent the status.
    Exited {
        status: ExitStatus,
        since: Instant,
        told_at: Option<Instant>,
    },
    Failed {
        reason: String,
        since: Instant,
    },
    /// Out of the loop.
    Leaving,
}

/// PID 1's state.
pub(crate) struct Supervisor {
    channel: Channel,
    decoder: Decoder,
    outbox: Outbox,
    assembly: Assembly,
    logs: LogBuffer,
    phase: Phase,
    outputs: Vec<OutputPipe>,
    checks: Checks,
    execs: Execs,
    /// Readable when a child has ended.
    child_ended: OwnedFd,
    /// What health commands are run as.
    workload: Option<(Workload, Credentials)>,
    /// Where the workload is checked: its own address, which is where its traffic arrives.
    address: IpAddr,
}

impl Supervisor {
    pub(crate) fn new(channel: Channel) -> Result<Self, InitError> {
        Ok(Self {
            channel,
            decoder: Decoder::new(),
            outbox: Outbox::default(),
            assembly: Assembly::new(),
            logs: LogBuffer::new(),
            phase: Phase::AwaitingConfig,
            outputs: Vec::new(),
            checks: Checks::new().map_err(InitError::at("open a pipe for", "health checks"))?,
            execs: Execs::default(),
            child_ended: watch_children().map_err(InitError::at("watch", "child processes"))?,
            workload: None,
            address: Ipv6Addr::LOCALHOST.into(),
        })
    }

    /// Returns when the guest is to leave.
    pub(crate) fn run(mut self) -> Result<(), InitError> {
        while !matches!(self.phase, Phase::Leaving) {
            self.reap();
            self.read_outputs();
            self.read_channel();
            for answer in self.checks.take_answers(self.outbox.session()) {
                self.outbox.reply(answer);
            }
            self.keep_deadlines();
            self.write_channel();
            self.wait()?;
        }
        Ok(())
    }

    /// Sleeps until something happens. Everything is then looked at: all of it is cheap and nothing blocks.
    fn wait(&mut self) -> Result<(), InitError> {
        if matches!(self.phase, Phase::Leaving) {
            return Ok(());
        }
        let mut fds = vec![
            PollFd::new(&self.child_ended, PollFlags::IN),
            PollFd::from_borrowed_fd(self.checks.wake_fd(), PollFlags::IN),
        ];
        let wants_room = self.outbox.has_more(&self.logs);
        if let Some(channel) = self.channel.readable_fd() {
            let room = if wants_room { PollFlags::OUT } else { PollFlags::empty() };
            fds.push(PollFd::from_borrowed_fd(channel, PollFlags::IN | room));
        }
        if let Some(listener) = self.channel.listener_fd() {
            fds.push(PollFd::from_borrowed_fd(listener, PollFlags::IN));
        }
        fds.extend(self.outputs.iter().map(|output| PollFd::new(&output.pipe, PollFlags::IN)));
        self.execs.poll_fds(self.outbox.is_free(), &mut fds);
        let until = self.next_deadline();
        let timeout = until.map(|at| {
            // Rounded up: waking a moment early would only spin.
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(InitError::at("wait for", "events")(errno.into())),
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let connected = self.channel.readable_fd().is_some();
        let reconnect = (!connected).then(|| Instant::now() + RECONNECT_POLL);
        let phase = match &self.phase {
            Phase::Stopping { kill_at, .. } => Some(*kill_at),
            Phase::Draining { until, .. } => Some(*until),
            Phase::Exited { .. } | Phase::Failed { .. } => Some(self.leave_at()),
            Phase::AwaitingConfig | Phase::Running { .. } | Phase::Leaving => None,
        };
        [reconnect, phase, self.checks.next_deadline(), self.execs.next_deadline(self.outbox.is_free())]
            .into_iter()
            .flatten()
            .min()
    }

    /// When a guest that has nothing more to do leaves by itself.
    fn leave_at(&self) -> Instant {
        match &self.phase {
            Phase::Exited { told_at: Some(told_at), .. } => *told_at + DISMISS_DEADLINE,
            Phase::Failed { since, .. } if self.outbox.session().is_some() => *since + DISMISS_DEADLINE,
            Phase::Exited { since, .. } | Phase::Failed { since, .. } => *since + ABSENT_DEADLINE,
            _ => Instant::now() + ABSENT_DEADLINE,
        }
    }

    fn keep_deadlines(&mut self) {
        let now = Instant::now();
        self.checks.kill_late(now);
        self.execs.keep(now);
        let leave_at = self.leave_at();
        match &mut self.phase {
            Phase::Stopping { kill_at, .. } if now >= *kill_at => {
                let notice = b"The workload did not stop within its grace and is killed.".to_vec();
                self.logs.push(LogStream::Init, unix_ms(), notice, false);
                kill_everything();
                // Until the kernel has done it, which `reap` notices.
                *kill_at = now + DRAIN_DEADLINE;
            }
            Phase::Draining { status, until } if self.outputs.is_empty() || now >= *until => {
                let status = *status;
                for mut output in std::mem::take(&mut self.outputs) {
                    if let Some(line) = output.cutter.finish() {
                        self.logs.push(output.stream, unix_ms(), line.bytes, line.continues);
                    }
                }
                self.phase = Phase::Exited { status, since: now, told_at: None };
            }
            Phase::Exited { .. } | Phase::Failed { .. } if now >= leave_at => {
                self.phase = Phase::Leaving;
            }
            _ => {}
        }
    }

    fn reap(&mut self) {
        // First the descriptor, then the children: one that ends in between makes it readable again.
        let mut ended = [0; 512];
        while rustix::io::read(&self.child_ended, &mut ended).is_ok_and(|bytes| bytes > 0) {}
        // As many turns as there are children that ended: none can be added meanwhile.
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let status = exit_status(status);
            match self.phase {
                Phase::Running { pid: workload } | Phase::Stopping { pid: workload, .. }
                    if workload == pid =>
                {
                    kill_everything();
                    self.phase = Phase::Draining { status, until: Instant::now() + DRAIN_DEADLINE };
                }
                _ => {
                    self.checks.command_ended(pid, status);
                    self.execs.process_ended(pid, status);
                }
            }
        }
    }

    fn read_outputs(&mut self) {
        let mut buffer = [0; READ_BYTES];
        let logs = &mut self.logs;
        self.outputs.retain_mut(|output| {
            for _ in 0..READS_PER_TURN_MAX {
                match rustix::io::read(&output.pipe, &mut buffer) {
                    Ok(0) => {
                        if let Some(line) = output.cutter.finish() {
                            logs.push(output.stream, unix_ms(), line.bytes, line.continues);
                        }
                        return false;
                    }
                    Ok(bytes) => output.cutter.push(buffer.get(..bytes).unwrap_or_default(), |line| {
                        logs.push(output.stream, unix_ms(), line.bytes, line.continues);
                    }),
                    // Nothing more for now.
                    Err(_) => return true,
                }
            }
            true
        });
    }

    fn read_channel(&mut self) {
        if self.channel.accept() {
            self.end_session();
        }
        let mut buffer = [0; READ_BYTES];
        for _ in 0..READS_PER_TURN_MAX {
            match self.channel.read(&mut buffer) {
                Transfer::Bytes(bytes) => {
                    let mut input = buffer.get(..bytes).unwrap_or_default();
                    while let Some(frame) = self.decoder.next_frame::<HostMessage>(&mut input) {
                        match frame {
                            Ok(frame) => self.obey(frame.session, frame.message),
                            // Half a frame of an agent that died; its successor begins afresh.
                            Err(error) => eprintln!("holdfast-init: {}", explain(&error)),
                        }
                    }
                }
                Transfer::Later => return,
                Transfer::Gone => {
                    self.end_session();
                    return;
                }
            }
        }
    }

    fn end_session(&mut self) {
        self.outbox.close();
        self.execs.hang_up_all();
        self.decoder = Decoder::new();
        self.assembly = Assembly::new();
        if let Phase::Exited { told_at, .. } = &mut self.phase {
            *told_at = None;
        }
    }

    fn obey(&mut self, session: u64, message: HostMessage) {
        if let HostMessage::Sync { log_after } = message {
            if self.outbox.session() != Some(session) {
                self.outbox.open(session);
                self.execs.hang_up_all();
                self.assembly = Assembly::new();
                self.logs.rewind(log_after);
                if let Phase::Exited { told_at, .. } = &mut self.phase {
                    *told_at = None;
                }
            }
            let hello = GuestMessage::Hello {
                init_version: env!("CARGO_PKG_VERSION").to_owned(),
                uptime_ms: uptime_ms(),
                state: self.state(),
                log_first_seq: self.logs.first_seq(),
            };
            self.outbox.reply(hello);
            self.outbox.reply(GuestMessage::Speaks { version: PROTOCOL_VERSION });
            return;
        }
        if self.outbox.session() != Some(session) {
            return;
        }
        match message {
            HostMessage::Sync { .. } => {}
            HostMessage::ConfigPart { offset, total, bytes } => {
                if !matches!(self.phase, Phase::AwaitingConfig) {
                    return;
                }
                match self.assembly.push(offset, total, &bytes) {
                    Ok(None) => {}
                    Ok(Some(config)) => self.start(config),
                    Err(error) => self.fail(explain(&error)),
                }
            }
            HostMessage::HealthQuery { id, check, timeout_ms } => {
                self.check_health(session, id, check, Duration::from_millis(timeout_ms.into()));
            }
            HostMessage::Exec { id, ask } => {
                let running = matches!(self.phase, Phase::Running { .. });
                self.execs.obey(id, ask, self.workload.as_ref().filter(|_| running));
            }
            HostMessage::Stop { grace_ms } => self.stop(Duration::from_millis(grace_ms.into())),
            HostMessage::Dismiss => {
                if matches!(self.phase, Phase::Exited { .. } | Phase::Failed { .. }) {
                    self.phase = Phase::Leaving;
                }
            }
        }
    }

    fn state(&self) -> GuestState {
        match &self.phase {
            Phase::AwaitingConfig | Phase::Leaving => GuestState::AwaitingConfig,
            Phase::Running { .. } => GuestState::Running,
            Phase::Stopping { .. } | Phase::Draining { .. } => GuestState::Stopping,
            Phase::Exited { status, .. } => GuestState::Exited(*status),
            Phase::Failed { reason, .. } => GuestState::Failed { reason: reason.clone() },
        }
    }

    fn start(&mut self, config: GuestConfig) {
        if let Err(error) = self.apply_and_start(config) {
            self.fail(explain(&error));
        }
    }

    fn fail(&mut self, reason: String) {
        eprintln!("holdfast-init: {reason}");
        self.outbox.reply(GuestMessage::Failed { reason: reason.clone() });
        self.phase = Phase::Failed { reason, since: Instant::now() };
    }

    fn apply_and_start(&mut self, config: GuestConfig) -> Result<(), InitError> {
        set_clock(config.now_unix_ms)?;
        workload::limit()?;
        mounts::enter_root(config.root_disk)?;
        mounts::mount_volumes(&config.volumes)?;
        network::set_up(config.network.as_ref())?;
        network::set_names(&config.hostname, config.network.as_ref())?;
        let user = workload::find_user(&config.workload.user)?;
        if let Some(secrets) = &config.secrets {
            secrets::write(secrets, &user)?;
        }
        self.outbox.reply(GuestMessage::ConfigApplied);
        let mut child = workload::spawn(&config.workload, &config.workload.argv, user, Output::Piped)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(InitError::NoCommand)?;
        let pipes = [
            (LogStream::Stdout, child.stdout.take().map(OwnedFd::from)),
            (LogStream::Stderr, child.stderr.take().map(OwnedFd::from)),
        ];
        for (stream, pipe) in pipes {
            let Some(pipe) = pipe else { continue };
            rustix::io::ioctl_fionbio(&pipe, true)
                .map_err(|errno| InitError::at("prepare", "the workload's output")(errno.into()))?;
            self.outputs.push(OutputPipe { stream, pipe, cutter: LineCutter::new() });
        }
        if let Some(network) = &config.network {
            self.address = network.address.into();
        }
        self.workload = Some((config.workload, user));
        self.phase = Phase::Running { pid };
        self.outbox.reply(GuestMessage::Ready { uptime_ms: uptime_ms() });
        Ok(())
    }

    fn stop(&mut self, grace: Duration) {
        match self.phase {
            Phase::AwaitingConfig | Phase::Failed { .. } => self.phase = Phase::Leaving,
            Phase::Running { pid } => {
                // A workload that has just ended is noticed by `reap`.
                if let Err(errno) = rustix::process::kill_process(pid, Signal::TERM) {
                    eprintln!("holdfast-init: the workload could not be sent TERM ({errno})");
                }
                self.phase = Phase::Stopping { pid, kill_at: Instant::now() + grace };
            }
            // A shorter grace counts, a longer one does not.
            Phase::Stopping { pid, kill_at } => {
                self.phase = Phase::Stopping { pid, kill_at: kill_at.min(Instant::now() + grace) };
            }
            Phase::Draining { .. } | Phase::Exited { .. } | Phase::Leaving => {}
        }
    }

    fn check_health(&mut self, session: u64, id: u32, check: HealthCheck, timeout: Duration) {
        let unhealthy = |detail: &str| GuestMessage::Health { id, healthy: false, detail: detail.to_owned() };
        let Phase::Running { .. } = self.phase else {
            self.outbox.reply(unhealthy("The workload does not run."));
            return;
        };
        let started = match (&check, &self.workload) {
            (HealthCheck::Command { argv }, Some((workload, user))) => {
                match workload::spawn(workload, argv, *user, Output::Discarded) {
                    Ok(child) => self.checks.start_command(session, id, child.id(), timeout),
                    Err(error) => {
                        self.outbox.reply(unhealthy(&explain(&error)));
                        return;
                    }
                }
            }
            _ => self.checks.start_network(session, id, self.address, check, timeout),
        };
        if let Err(detail) = started {
            self.outbox.reply(unhealthy(&detail));
        }
    }

    fn write_channel(&mut self) {
        match self.outbox.flush(&mut self.channel, &mut self.logs, &mut self.execs) {
            Flush::Gone => self.end_session(),
            Flush::More => {}
            Flush::Done => {
                if let Phase::Exited { status, told_at: told_at @ None, .. } = &mut self.phase
                    && self.outbox.session().is_some()
                {
                    *told_at = Some(Instant::now());
                    self.outbox.reply(GuestMessage::Exited(*status));
                }
            }
        }
    }
}

fn set_clock(now_unix_ms: u64) -> Result<(), InitError> {
    let seconds = i64::try_from(now_unix_ms / 1000).unwrap_or(i64::MAX);
    let nanos = i64::try_from(now_unix_ms % 1000).unwrap_or_default() * 1_000_000;
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: nanos })
        .map_err(|errno| InitError::at("set", "the clock")(errno.into()))
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn uptime_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1000
        + u64::try_from(now.tv_nsec).unwrap_or_default() / 1_000_000
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(code),
        (None, signal) => ExitStatus::Signal(signal.unwrap_or_default()),
    }
}

/// KILL to every process but this one.
fn kill_everything() {
    // SAFETY: a plain system call without pointers; from PID 1, -1 spares the caller.
    unsafe { libc::kill(-1, libc::SIGKILL) };
}

/// A descriptor that becomes readable when a child ends. What is spawned has its signal mask emptied by `std`.
fn watch_children() -> io::Result<OwnedFd> {
    // SAFETY: `sigset_t` is plain numbers, set up by `sigemptyset`; all three calls read or write only it.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGCHLD);
        if libc::sigprocmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        match libc::signalfd(-1, &raw const signals, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd)),
        }
    }
}
