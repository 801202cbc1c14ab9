//! One program: its process, and the ends of its terminal or pipes that init holds.

use std::{
    collections::VecDeque,
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use holdfast_guest::{
    config::Workload,
    exec::{
        CHUNK_BYTES_MAX, ExecNews, ExecSignal, ExecStream, Granting, Overrun, Spending, Terminal,
        TerminalSize,
    },
    message::ExitStatus,
};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{Gid, Mode, Uid},
    io::Errno,
    process::{Pid, Signal},
    pty::OpenptFlags,
    termios::Winsize,
};

use crate::{
    InitError,
    workload::{self, Credentials},
};

/// How long output is awaited after the program has ended, while something else still holds its terminal or pipes.
const DRAIN: Duration = Duration::from_millis(250);

/// Ends a line of input on a terminal, and at the beginning of a line the input (^D).
const END_OF_INPUT: u8 = 4;

/// How long after a terminal was told the end of its input it is told again, the first time; then twice as long, and
/// so on.
///
/// A pipe that is closed stays closed, but a terminal forgets: the character counts for one read, and one that arrives
/// between a program's end and its shell's next line, while the shell changes the terminal's mode, counts for none.
const END_AGAIN: Duration = Duration::from_millis(500);

/// The longest of these pauses.
const END_AGAIN_MAX: Duration = Duration::from_secs(30);

/// The group that terminals belong to.
const TTY_GROUP: u32 = 5;

/// See the module.
#[derive(Debug)]
pub(super) struct Program {
    id: u32,
    pid: Pid,
    /// The terminal, if there is one: init's end of it.
    terminal: Option<OwnedFd>,
    /// Where input goes, until it ends or nobody reads it.
    input: Option<OwnedFd>,
    /// Input that was not taken yet, at most one window.
    pending: VecDeque<u8>,
    input_ends: bool,
    /// When a terminal is told of the end of its input again, and after which pause.
    end_again: Option<(Instant, Duration)>,
    /// What the last byte of input was.
    last_input: Option<u8>,
    granting: Granting,
    /// Room that the agent is to be told of.
    grant: u32,
    /// Where output comes from, until it ends.
    outputs: Vec<(ExecStream, OwnedFd)>,
    spending: Spending,
    told_start: bool,
    /// How it ended, and until when output is awaited.
    ended: Option<(ExitStatus, Instant)>,
}

/// Init's ends of what a program is connected to.
struct Ends {
    terminal: Option<OwnedFd>,
    input: OwnedFd,
    outputs: Vec<(ExecStream, OwnedFd)>,
}

impl Program {
    pub(super) fn start(
        id: u32,
        argv: &[String],
        terminal: Option<&Terminal>,
        workload: &Workload,
        user: Credentials,
    ) -> Result<Self, InitError> {
        let shell;
        let argv = if argv.is_empty() {
            shell = [workload::shell_of(user)];
            shell.as_slice()
        } else {
            argv
        };
        let mut command = workload::command(workload, argv, user)?;
        let ends = match terminal {
            Some(terminal) => on_terminal(&mut command, terminal, user),
            None => on_pipes(&mut command),
        }
        .map_err(InitError::at("open", "a terminal or pipes"))?;
        let program = argv.first().cloned().unwrap_or_default();
        let child = command.spawn().map_err(|source| InitError::Exec { program, source })?;
        // The program's own ends go with the command.
        drop(command);
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(InitError::NoCommand)?;
        Ok(Self {
            id,
            pid,
            terminal: ends.terminal,
            input: Some(ends.input),
            pending: VecDeque::new(),
            input_ends: false,
            end_again: None,
            last_input: None,
            granting: Granting::default(),
            grant: 0,
            outputs: ends.outputs,
            spending: Spending::default(),
            told_start: false,
            ended: None,
        })
    }

    pub(super) const fn id(&self) -> u32 {
        self.id
    }

    /// It leads a session of its own, which is numbered as its process is.
    pub(super) const fn session(&self) -> Pid {
        self.pid
    }

    pub(super) fn take_input(&mut self, bytes: &[u8]) -> Result<(), Overrun> {
        self.granting.arrived(bytes.len())?;
        if self.input.is_some() && !self.input_ends {
            self.last_input = bytes.last().copied().or(self.last_input);
            self.pending.extend(bytes);
            self.write_input();
        } else {
            self.used(bytes.len());
        }
        Ok(())
    }

    pub(super) fn take_room(&mut self, bytes: u32) -> Result<(), Overrun> {
        self.spending.granted(bytes)
    }

    /// A pipe is closed once it has taken everything. A terminal is not: there, a character says it.
    pub(super) fn end_input(&mut self) {
        if std::mem::replace(&mut self.input_ends, true) || self.input.is_none() {
            return;
        }
        if self.terminal.is_some() {
            // In the middle of a line the first one only ends the line.
            if !matches!(self.last_input, None | Some(b'\n' | b'\r')) {
                self.pending.push_back(END_OF_INPUT);
            }
            self.pending.push_back(END_OF_INPUT);
            self.end_again = Some((Instant::now() + END_AGAIN, END_AGAIN));
        }
        self.write_input();
    }

    /// Moves input on, and its end.
    pub(super) fn keep(&mut self, now: Instant) {
        if let Some((at, pause)) = self.end_again
            && now >= at
        {
            let pause = (pause * 2).min(END_AGAIN_MAX);
            self.end_again = self.input.is_some().then_some((now + pause, pause));
            if self.input.is_some() && self.pending.is_empty() {
                self.pending.push_back(END_OF_INPUT);
            }
        }
        self.write_input();
    }

    fn write_input(&mut self) {
        while let (Some(input), false) = (&self.input, self.pending.is_empty()) {
            match rustix::io::write(input, self.pending.as_slices().0) {
                Ok(bytes) => {
                    self.pending.drain(..bytes);
                    self.used(bytes);
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                // Nobody reads it any more: the rest goes nowhere, as into any closed pipe.
                Err(_) => {
                    self.input = None;
                    let dropped = self.pending.len();
                    self.pending.clear();
                    self.used(dropped);
                }
            }
        }
        if self.input_ends && self.terminal.is_none() {
            self.input = None;
        }
    }

    fn used(&mut self, bytes: usize) {
        if let Some(grant) = self.granting.used(bytes) {
            self.grant = self.grant.saturating_add(grant);
        }
    }

    pub(super) fn resize(&mut self, size: TerminalSize) {
        if let Some(terminal) = &self.terminal
            && let Err(errno) = rustix::termios::tcsetwinsize(terminal, winsize(size))
        {
            eprintln!("holdfast-init: a terminal could not be resized ({errno})");
        }
    }

    pub(super) fn signal(&mut self, signal: ExecSignal) {
        let signal = match signal {
            ExecSignal::Int => Signal::INT,
            ExecSignal::Term => Signal::TERM,
            ExecSignal::Kill => Signal::KILL,
            ExecSignal::Hup => Signal::HUP,
        };
        if self.ended.is_some() {
            return;
        }
        let foreground =
            self.terminal.as_ref().and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok());
        // One that has just ended is no longer there to be signalled.
        if let Err(errno) = rustix::process::kill_process_group(foreground.unwrap_or(self.pid), signal)
            && errno != Errno::SRCH
        {
            eprintln!("holdfast-init: a program could not be signalled ({errno})");
        }
    }

    pub(super) fn ended(&mut self, status: ExitStatus) {
        self.input = None;
        self.end_again = None;
        let unread = self.pending.len();
        self.pending.clear();
        self.used(unread);
        self.ended = Some((status, Instant::now() + DRAIN));
    }

    /// When [`Program::keep`] has something to do.
    pub(super) fn next_keeping(&self) -> Option<Instant> {
        self.end_again.map(|(at, _)| at)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        // Without room the agent's word is awaited, and no time.
        self.ended.filter(|_| self.spending.room() > 0).map(|(_, until)| until)
    }

    pub(super) fn poll_fds<'fds>(&'fds self, takes: bool, fds: &mut Vec<PollFd<'fds>>) {
        if let (Some(input), false) = (&self.input, self.pending.is_empty()) {
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        if takes && self.spending.room() > 0 {
            fds.extend(self.outputs.iter().map(|(_, output)| PollFd::new(output, PollFlags::IN)));
        }
    }

    pub(super) fn next_news(&mut self, now: Instant) -> Option<ExecNews> {
        if !std::mem::replace(&mut self.told_start, true) {
            return Some(ExecNews::Started);
        }
        if self.grant > 0 {
            return Some(ExecNews::Room(std::mem::take(&mut self.grant)));
        }
        if let Some(output) = self.read_output() {
            return Some(output);
        }
        match self.ended {
            Some((status, _)) if self.outputs.is_empty() => Some(ExecNews::Ended(status)),
            Some((status, until)) if self.spending.room() > 0 && now >= until => {
                Some(ExecNews::Ended(status))
            }
            _ => None,
        }
    }

    fn read_output(&mut self) -> Option<ExecNews> {
        let mut buffer = vec![0; self.spending.room().min(CHUNK_BYTES_MAX)];
        if buffer.is_empty() {
            return None;
        }
        let mut index = 0;
        while let Some((stream, output)) = self.outputs.get(index) {
            let stream = *stream;
            match rustix::io::read(output, &mut buffer) {
                Ok(bytes) if bytes > 0 => {
                    buffer.truncate(bytes);
                    self.spending.spend(bytes);
                    // The other stream's turn is next.
                    self.outputs.rotate_left(1);
                    return Some(ExecNews::Output { stream, bytes: buffer });
                }
                Err(Errno::AGAIN | Errno::INTR) => index += 1,
                // The end; of a terminal, that nobody has it open any more.
                Ok(_) | Err(_) => {
                    self.outputs.remove(index);
                }
            }
        }
        None
    }
}

fn winsize(size: TerminalSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

fn on_pipes(command: &mut Command) -> io::Result<Ends> {
    let (input_read, input) = pipe()?;
    let (stdout, stdout_write) = pipe()?;
    let (stderr, stderr_write) = pipe()?;
    for end in [&input, &stdout, &stderr] {
        rustix::io::ioctl_fionbio(end, true)?;
    }
    command.stdin(input_read).stdout(stdout_write).stderr(stderr_write);
    let outputs = vec![(ExecStream::Stdout, stdout), (ExecStream::Stderr, stderr)];
    Ok(Ends { terminal: None, input, outputs })
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

fn on_terminal(command: &mut Command, terminal: &Terminal, user: Credentials) -> io::Result<Ends> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    // Through the terminals' own file system: `/dev/ptmx` may belong to another instance of it.
    let master = rustix::fs::open(
        "/dev/pts/ptmx",
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC,
        Mode::empty(),
    )
    .or_else(|_| rustix::pty::openpt(flags))?;
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    rustix::fs::fchown(&slave, Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(TTY_GROUP)))?;
    rustix::termios::tcsetwinsize(&master, winsize(terminal.size))?;
    rustix::io::ioctl_fionbio(&master, true)?;
    command.env("TERM", &terminal.kind);
    command.stdin(Stdio::from(slave.try_clone()?)).stdout(Stdio::from(slave.try_clone()?)).stderr(slave);
    // SAFETY: the closure makes one system call between fork and exec; it neither allocates nor takes a lock. It comes
    // after the one that makes the session.
    unsafe {
        command
            .pre_exec(|| rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).map_err(io::Error::from));
    }
    let (input, output) = (master.try_clone()?, master.try_clone()?);
    Ok(Ends { terminal: Some(master), input, outputs: vec![(ExecStream::Stdout, output)] })
}
