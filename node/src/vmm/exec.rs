//! Programs beside a guest's workload, as the agent has them: an inbox for each, which the channel's receiver fills
//! and whoever the program is for empties.
//!
//! What an inbox holds is bounded by the window that the guest was granted; a guest that sends more is not believed
//! any further about that program (I14). What a program says is never looked at here (I10).

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use holdfast_guest::exec::{CHUNK_BYTES_MAX, ExecAsk, ExecNews, ExecSignal, Granting, Spending};
pub use holdfast_guest::exec::{ExecStream, Terminal, TerminalSize};
use holdfast_guest::message::{ExitStatus, HostMessage};
use tokio::sync::{Notify, watch};

use super::channel::{ChannelError, GuestSender, cut};

/// How long after its hello a guest may take to say what it speaks.
const SPEAKS_MAX: Duration = Duration::from_secs(5);

/// What comes out of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgramNews {
    /// It runs.
    Started,
    /// It could not be started.
    Refused {
        /// A sentence, chosen by the guest.
        reason: String,
    },
    /// Bytes of output.
    Output(ExecStream, Vec<u8>),
    /// It ended, and all its output came before.
    Ended(ExitStatus),
    /// The channel broke, or the guest did not keep to the rules: nothing more will be known of it.
    Lost,
}

/// The inboxes of one session with a guest.
#[derive(Debug, Default)]
pub(super) struct Inboxes {
    open: Mutex<HashMap<u32, Arc<Inbox>>>,
    next_id: AtomicU32,
    /// The newest version of the protocol that the guest speaks, once it has said so.
    speaks: watch::Sender<u8>,
}

#[derive(Debug, Default)]
struct Inbox {
    state: Mutex<InboxState>,
    /// There is something to take.
    heard: Notify,
    /// There may be room to send.
    room: Notify,
}

#[derive(Debug, Default)]
struct InboxState {
    started: bool,
    refused: Option<String>,
    stdout: VecDeque<u8>,
    stderr: VecDeque<u8>,
    ended: Option<ExitStatus>,
    lost: bool,
    granting: Granting,
    spending: Spending,
}

impl Inboxes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Inbox>>> {
        // Every change below leaves the map whole.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn guest_speaks(&self, version: u8) {
        self.speaks.send_replace(version);
    }

    /// The guest says something of a program; whether anybody waits for it.
    pub(super) fn hear(&self, id: u32, news: ExecNews) -> bool {
        let Some(inbox) = self.lock().get(&id).cloned() else { return false };
        let meant = inbox.hear(news);
        inbox.wake();
        meant
    }

    /// The channel broke.
    pub(super) fn close(&self) {
        for (_, inbox) in self.lock().drain() {
            inbox.lock().lost = true;
            inbox.wake();
        }
    }
}

impl Inbox {
    /// Wakes the one who hears and the one who writes; a permit is kept for one who is not waiting yet.
    fn wake(&self) {
        self.heard.notify_one();
        self.room.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hear(&self, news: ExecNews) -> bool {
        let mut state = self.lock();
        if state.ended.is_some() || state.refused.is_some() || state.lost {
            return false;
        }
        match news {
            ExecNews::Started => !std::mem::replace(&mut state.started, true),
            ExecNews::Refused { reason } => {
                state.refused = Some(cut(reason));
                true
            }
            ExecNews::Output { stream, bytes } => {
                if state.granting.arrived(bytes.len()).is_err() {
                    state.lost = true;
                    return true;
                }
                match stream {
                    ExecStream::Stdout => state.stdout.extend(&bytes),
                    ExecStream::Stderr => state.stderr.extend(&bytes),
                }
                !bytes.is_empty()
            }
            ExecNews::Room(bytes) => {
                state.lost |= state.spending.granted(bytes).is_err();
                bytes > 0
            }
            ExecNews::Ended(status) => {
                state.ended = Some(status);
                true
            }
        }
    }
}

impl InboxState {
    /// What is to be told next, and what room that makes.
    fn take(&mut self, told_start: &mut bool) -> Option<(ProgramNews, Option<u32>)> {
        if let Some(reason) = self.refused.take() {
            return Some((ProgramNews::Refused { reason }, None));
        }
        if self.started && !std::mem::replace(told_start, true) {
            return Some((ProgramNews::Started, None));
        }
        for (stream, queue) in
            [(ExecStream::Stdout, &mut self.stdout), (ExecStream::Stderr, &mut self.stderr)]
        {
            if !queue.is_empty() {
                let bytes: Vec<u8> = queue.drain(..queue.len().min(CHUNK_BYTES_MAX)).collect();
                let grant = self.granting.used(bytes.len());
                return Some((ProgramNews::Output(stream, bytes), grant));
            }
        }
        match self.ended {
            Some(status) => Some((ProgramNews::Ended(status), None)),
            None => self.lost.then_some((ProgramNews::Lost, None)),
        }
    }
}

/// A program of a guest's. Whoever drops it without [`Program::hang_up`] leaves it to the end of the channel.
#[derive(Debug)]
pub struct Program {
    id: u32,
    sender: GuestSender,
    inboxes: Arc<Inboxes>,
    inbox: Arc<Inbox>,
    told_start: bool,
}

impl Drop for Program {
    fn drop(&mut self) {
        self.inboxes.lock().remove(&self.id);
    }
}

impl Program {
    /// Asks a guest to start a program. Whether it did comes as news.
    pub(super) async fn start(
        sender: GuestSender,
        inboxes: Arc<Inboxes>,
        argv: Vec<String>,
        terminal: Option<Terminal>,
    ) -> Result<Self, ChannelError> {
        // It says so right behind its hello; who has just connected may not have heard it yet.
        let mut speaks = inboxes.speaks.subscribe();
        let known = tokio::time::timeout(SPEAKS_MAX, speaks.wait_for(|version| *version >= 2)).await;
        if !known.is_ok_and(|known| known.is_ok()) {
            return Err(ChannelError::TooOld);
        }
        let id = inboxes.next_id.fetch_add(1, Ordering::Relaxed);
        let inbox = Arc::new(Inbox::default());
        inboxes.lock().insert(id, Arc::clone(&inbox));
        let program = Self { id, sender, inboxes, inbox, told_start: false };
        program.ask(ExecAsk::Start { argv, terminal }).await?;
        Ok(program)
    }

    async fn ask(&self, ask: ExecAsk) -> Result<(), ChannelError> {
        self.sender.send(&HostMessage::Exec { id: self.id, ask }).await
    }

    /// What it says next. Ends with `Refused`, `Ended` or `Lost`. Output is lost if this is cancelled while it grants
    /// the guest room, so it is not to be cancelled but with the session.
    pub async fn news(&mut self) -> Result<ProgramNews, ChannelError> {
        loop {
            let taken = self.inbox.lock().take(&mut self.told_start);
            match taken {
                Some((news, Some(room))) => {
                    self.ask(ExecAsk::Room(room)).await?;
                    return Ok(news);
                }
                Some((news, None)) => return Ok(news),
                None => self.inbox.heard.notified().await,
            }
        }
    }

    /// Its end for input and control; used by another task than the one that hears it.
    pub fn writer(&self) -> ProgramWriter {
        ProgramWriter { id: self.id, sender: self.sender.clone(), inbox: Arc::clone(&self.inbox) }
    }

    /// Nobody is there any more: it is sent HUP and, while it does not go, TERM and KILL; or KILL at once.
    pub async fn hang_up(self, kill: bool) -> Result<(), ChannelError> {
        self.ask(ExecAsk::HangUp { kill }).await
    }
}

/// See [`Program::writer`].
#[derive(Debug)]
pub struct ProgramWriter {
    id: u32,
    sender: GuestSender,
    inbox: Arc<Inbox>,
}

impl ProgramWriter {
    async fn ask(&self, ask: ExecAsk) -> Result<(), ChannelError> {
        self.sender.send(&HostMessage::Exec { id: self.id, ask }).await
    }

    /// Sends input, waiting for room as long as it takes. Input of a program that has ended goes nowhere.
    pub async fn input(&self, mut bytes: &[u8]) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            let room = {
                let mut state = self.inbox.lock();
                if state.ended.is_some() || state.lost || state.refused.is_some() {
                    return Ok(());
                }
                let room = state.spending.room().min(CHUNK_BYTES_MAX).min(bytes.len());
                state.spending.spend(room);
                room
            };
            if room == 0 {
                self.inbox.room.notified().await;
                continue;
            }
            let (now, rest) = bytes.split_at(room);
            self.ask(ExecAsk::Input(now.to_vec())).await?;
            bytes = rest;
        }
        Ok(())
    }

    /// No more input follows.
    pub async fn end_input(&self) -> Result<(), ChannelError> {
        self.ask(ExecAsk::InputEnds).await
    }

    /// The terminal has another size.
    pub async fn resize(&self, size: TerminalSize) -> Result<(), ChannelError> {
        self.ask(ExecAsk::Resize(size)).await
    }

    /// Sends a signal.
    pub async fn signal(&self, signal: ExecSignal) -> Result<(), ChannelError> {
        self.ask(ExecAsk::Signal(signal)).await
    }
}
