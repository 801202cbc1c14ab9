//! Health checks under way: commands as processes, the others as threads; both bounded in number and time.

use std::{
    io,
    net::IpAddr,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::{Duration, Instant},
};

use holdfast_guest::message::{ExitStatus, GuestMessage, HealthCheck};
use rustix::process::{Pid, Signal};

use crate::health;

/// The most checks at once.
const CHECKS_MAX: usize = 8;

/// The longest that a check may take.
const TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// Stack of a checking thread: it holds one small buffer.
const STACK_BYTES: usize = 128 * 1024;

/// A command that runs.
#[derive(Debug)]
struct Command {
    session: u64,
    id: u32,
    pid: Pid,
    kill_at: Instant,
    killed: bool,
}

/// A check that ended.
#[derive(Debug)]
struct Answer {
    session: u64,
    id: u32,
    verdict: Result<(), String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Checks {
    commands: Vec<Command>,
    threads: usize,
    command_answers: Vec<Answer>,
    answers: Receiver<Answer>,
    answer: SyncSender<Answer>,
    /// A byte per answer of a thread, to wake the loop.
    wake: UnixStream,
    waker: UnixStream,
}

impl Checks {
    pub(crate) fn new() -> io::Result<Self> {
        let (wake, waker) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        waker.set_nonblocking(true)?;
        let (answer, answers) = sync_channel(CHECKS_MAX);
        Ok(Self {
            commands: Vec::new(),
            threads: 0,
            command_answers: Vec::new(),
            answers,
            answer,
            wake,
            waker,
        })
    }

    pub(crate) fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.commands.iter().filter(|command| !command.killed).map(|command| command.kill_at).min()
    }

    /// Starts a check over the network; an error is a sentence.
    pub(crate) fn start_network(
        &mut self,
        session: u64,
        id: u32,
        address: IpAddr,
        check: HealthCheck,
        timeout: Duration,
    ) -> Result<(), String> {
        self.check_room()?;
        let (answer, waker) = (self.answer.clone(), self.waker.try_clone());
        let timeout = timeout.clamp(Duration::from_millis(1), TIMEOUT_MAX);
        let run = move || {
            let verdict = health::check_network(address, &check, timeout);
            // Neither can fail while the loop lives: both have room for every check.
            if answer.send(Answer { session, id, verdict }).is_ok()
                && let Ok(waker) = waker
                && let Err(error) = io::Write::write_all(&mut &waker, b"!")
            {
                eprintln!("holdfast-init: a health check could not wake the guest's init ({error})");
            }
        };
        match thread::Builder::new().stack_size(STACK_BYTES).spawn(run) {
            Ok(_) => {
                self.threads += 1;
                Ok(())
            }
            Err(error) => Err(format!("The guest could not start a health check ({error}).")),
        }
    }

    /// Watches a command that was just started; an error is a sentence, and the command is killed.
    pub(crate) fn start_command(
        &mut self,
        session: u64,
        id: u32,
        pid: u32,
        timeout: Duration,
    ) -> Result<(), String> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or("The command has no process.")?;
        let kill_at = Instant::now() + timeout.min(TIMEOUT_MAX);
        let mut command = Command { session, id, pid, kill_at, killed: false };
        self.check_room().inspect_err(|_| command.kill())?;
        self.commands.push(command);
        Ok(())
    }

    fn check_room(&self) -> Result<(), String> {
        if self.commands.len() + self.threads < CHECKS_MAX {
            Ok(())
        } else {
            Err(format!("{CHECKS_MAX} health checks are under way already."))
        }
    }

    /// Kills commands that took too long.
    pub(crate) fn kill_late(&mut self, now: Instant) {
        for command in self.commands.iter_mut().filter(|command| !command.killed && now >= command.kill_at) {
            command.kill();
        }
    }

    /// A process ended that may have been a command.
    pub(crate) fn command_ended(&mut self, pid: Pid, status: ExitStatus) {
        let Some(index) = self.commands.iter().position(|command| command.pid == pid) else { return };
        let Command { session, id, killed, .. } = self.commands.swap_remove(index);
        let verdict = match status {
            _ if killed => Err("The command did not end in time and was killed.".to_owned()),
            ExitStatus::Code(0) => Ok(()),
            other => Err(format!("The command ended with {other}.")),
        };
        self.command_answers.push(Answer { session, id, verdict });
    }

    /// The checks that ended. Those of another session are dropped: nobody waits for them.
    pub(crate) fn take_answers(&mut self, session: Option<u64>) -> Vec<GuestMessage> {
        let mut woken = [0; CHECKS_MAX];
        while rustix::io::read(&self.wake, &mut woken).is_ok_and(|bytes| bytes > 0) {}
        let mut answers = std::mem::take(&mut self.command_answers);
        while let Ok(answer) = self.answers.try_recv() {
            self.threads = self.threads.saturating_sub(1);
            answers.push(answer);
        }
        let wanted = answers.into_iter().filter(|answer| Some(answer.session) == session);
        wanted
            .map(|Answer { id, verdict, .. }| GuestMessage::Health {
                id,
                healthy: verdict.is_ok(),
                detail: verdict.err().unwrap_or_default(),
            })
            .collect()
    }
}

impl Command {
    fn kill(&mut self) {
        self.killed = true;
        // It leads its own group. One that has just ended is no longer there to be killed.
        if let Err(errno) = rustix::process::kill_process_group(self.pid, Signal::KILL)
            && errno != rustix::io::Errno::SRCH
        {
            eprintln!("holdfast-init: a health command could not be killed ({errno})");
        }
    }
}
