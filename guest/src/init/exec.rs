//! Programs that run beside the workload because somebody asked for them, each on a terminal or three pipes.
//!
//! Part of the one loop: nothing here blocks, each program holds one window of input and no output at all, and the
//! number of programs is bounded. Output is read only when the channel takes it, so a program whose reader is slow
//! waits in its own pipe. When the agent goes, its programs are hung up: nobody would ever learn of them (I11).

mod hang_up;
mod program;

use std::time::Instant;

use holdfast_guest::{
    config::Workload,
    exec::{ARGV_BYTES_MAX, ARGV_MAX, ExecAsk, ExecNews, TERMINAL_KIND_BYTES_MAX, Terminal},
    message::{ExitStatus, GuestMessage},
};
use rustix::{event::PollFd, process::Pid};

use crate::{explain, workload::Credentials};
use hang_up::HangUp;
use program::Program;

/// The most programs at once, those that are being hung up included.
const PROGRAMS_MAX: usize = 8;

/// The most refusals that wait to be sent; an agent that reads none of them loses the rest.
const REFUSALS_MAX: usize = 16;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Execs {
    programs: Vec<Program>,
    leaving: Vec<HangUp>,
    refusals: Vec<(u32, String)>,
    /// Where the search for news goes on, so that no program starves another.
    turn: usize,
}

impl Execs {
    /// Does what the agent asks. `workload` is whose user, environment and folder a program gets, while it runs.
    pub(crate) fn obey(&mut self, id: u32, ask: ExecAsk, workload: Option<&(Workload, Credentials)>) {
        if let ExecAsk::Start { argv, terminal } = ask {
            if let Err(reason) = self.start(id, argv, terminal, workload)
                && self.refusals.len() < REFUSALS_MAX
            {
                self.refusals.push((id, reason));
            }
            return;
        }
        let Some(index) = self.programs.iter().position(|program| program.id() == id) else { return };
        let outcome = match (ask, self.programs.get_mut(index)) {
            (ExecAsk::HangUp { kill }, _) => {
                self.hang_up(index, kill);
                return;
            }
            (_, None) | (ExecAsk::Start { .. }, _) => return,
            (ExecAsk::Input(bytes), Some(program)) => program.take_input(&bytes),
            (ExecAsk::Room(bytes), Some(program)) => program.take_room(bytes),
            (ExecAsk::InputEnds, Some(program)) => {
                program.end_input();
                Ok(())
            }
            (ExecAsk::Resize(size), Some(program)) => {
                program.resize(size);
                Ok(())
            }
            (ExecAsk::Signal(signal), Some(program)) => {
                program.signal(signal);
                Ok(())
            }
        };
        if let Err(overrun) = outcome {
            eprintln!("holdfast-init: a program was ended: {overrun}");
            self.hang_up(index, true);
        }
    }

    fn start(
        &mut self,
        id: u32,
        argv: Vec<String>,
        terminal: Option<Terminal>,
        workload: Option<&(Workload, Credentials)>,
    ) -> Result<(), String> {
        let (workload, user) = workload.ok_or("The workload does not run.")?;
        let bytes = argv.iter().map(String::len).sum::<usize>();
        let kind = terminal.as_ref().map_or(0, |terminal| terminal.kind.len());
        if argv.len() > ARGV_MAX || bytes > ARGV_BYTES_MAX || kind > TERMINAL_KIND_BYTES_MAX {
            return Err(format!(
                "The command is too long: {ARGV_MAX} arguments and {ARGV_BYTES_MAX} bytes are the most."
            ));
        }
        if self.programs.len() + self.leaving.len() >= PROGRAMS_MAX {
            return Err(format!("{PROGRAMS_MAX} programs run beside the workload already; try again later."));
        }
        if self.programs.iter().any(|program| program.id() == id) {
            return Err("The number is in use already.".to_owned());
        }
        let program =
            Program::start(id, &argv, terminal.as_ref(), workload, *user).map_err(|error| explain(&error))?;
        self.programs.push(program);
        Ok(())
    }

    /// Nobody asks for these programs any more.
    pub(crate) fn hang_up_all(&mut self) {
        self.refusals.clear();
        for index in (0..self.programs.len()).rev() {
            self.hang_up(index, false);
        }
    }

    fn hang_up(&mut self, index: usize, kill: bool) {
        let program = self.programs.swap_remove(index);
        // With it goes its terminal, at which the kernel itself hangs up.
        self.leaving.extend(HangUp::begin(program.session(), kill));
    }

    /// A process ended that may have been a program.
    pub(crate) fn process_ended(&mut self, pid: Pid, status: ExitStatus) {
        if let Some(program) = self.programs.iter_mut().find(|program| program.session() == pid) {
            program.ended(status);
        }
    }

    /// Moves input on, and ends what was hung up and did not go.
    pub(crate) fn keep(&mut self, now: Instant) {
        self.programs.iter_mut().for_each(|program| program.keep(now));
        self.leaving.retain_mut(|leaving| leaving.keep(now));
    }

    /// When something is due by time; of programs that ended, only if the channel `takes` what there is to say.
    pub(crate) fn next_deadline(&self, takes: bool) -> Option<Instant> {
        let drains = self.programs.iter().filter(|_| takes).filter_map(Program::next_deadline);
        let ends = self.programs.iter().filter_map(Program::next_keeping);
        drains.chain(ends).chain(self.leaving.iter().map(HangUp::next_deadline)).min()
    }

    /// What to wait for: room for input, and output if the channel `takes` any.
    pub(crate) fn poll_fds<'fds>(&'fds self, takes: bool, fds: &mut Vec<PollFd<'fds>>) {
        for program in &self.programs {
            program.poll_fds(takes, fds);
        }
    }

    /// The next thing to tell the agent; reads output only now.
    pub(crate) fn next_news(&mut self, now: Instant) -> Option<GuestMessage> {
        if let Some((id, reason)) = self.refusals.pop() {
            return Some(GuestMessage::Exec { id, news: ExecNews::Refused { reason } });
        }
        for _ in 0..self.programs.len() {
            self.turn = (self.turn + 1) % self.programs.len().max(1);
            let Some(program) = self.programs.get_mut(self.turn) else { continue };
            if let Some(news) = program.next_news(now) {
                let id = program.id();
                if matches!(news, ExecNews::Ended(_)) {
                    self.programs.swap_remove(self.turn);
                }
                return Some(GuestMessage::Exec { id, news });
            }
        }
        None
    }
}
