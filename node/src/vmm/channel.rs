//! The agent's end of the conversation with a guest's init.
//!
//! The guest is hostile: what it sends is bounded in frame size, line size and number of broken frames, and is
//! only ever data. It is read no faster than the agent asks for messages, so a guest that floods fills its own
//! buffer. Each connection is a session of its own; one that is opened after an agent's restart gets the guest's
//! present state and the log lines that the agent had not stored yet.

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::exec::{Inboxes, Program, Terminal};
pub use holdfast_guest::{
    config::{GuestConfig, NetworkConfig, Secrets, VolumeMount, Workload},
    message::{ExitStatus, GuestState, HealthCheck, LogLine, LogStream},
};
use holdfast_guest::{
    config_parts::{self, ConfigError},
    frame::{self, Decoder, FrameError},
    lines::LINE_BYTES_MAX,
    message::{GuestMessage, HostMessage, TEXT_BYTES_MAX},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::oneshot,
    time::Instant,
};

/// How long a guest may take to accept one message.
const SEND_DEADLINE: Duration = Duration::from_secs(10);

/// Time between two greetings that were not answered yet.
const SYNC_PERIOD: Duration = Duration::from_secs(1);

/// Time between two attempts to connect to a socket that is not there yet.
const CONNECT_POLL: Duration = Duration::from_millis(20);

/// The most broken frames in one session before the guest is given up.
const BROKEN_FRAMES_MAX: u32 = 64;

/// The most messages in a row that nobody asked for (answers to no question, lines seen before, frames of other
/// sessions) before the guest is given up. A pipe that an earlier session left full holds far fewer.
const IDLE_MESSAGES_MAX: u32 = 65_536;

/// The most health checks of one guest that wait for an answer.
const HEALTH_QUERIES_MAX: usize = 8;

/// What a guest may take over its own time-out to answer a health check.
const HEALTH_ANSWER_SLACK: Duration = Duration::from_secs(2);

/// Bytes read at a time.
const READ_BYTES: usize = 16 * 1024;

/// Where a guest's init is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelAddress {
    /// A socket that carries the channel and nothing else (QEMU's virtio-serial).
    Stream(PathBuf),
    /// A socket on which a port must be asked for first (Firecracker's vsock).
    Vsock {
        /// The socket.
        path: PathBuf,
        /// The port on which the guest listens.
        port: u32,
    },
}

impl ChannelAddress {
    fn path(&self) -> &PathBuf {
        match self {
            ChannelAddress::Stream(path) | ChannelAddress::Vsock { path, .. } => path,
        }
    }
}

/// Why a guest could not be spoken to.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The guest did not come up, or hangs.
    #[error(
        "The guest behind '{}' did not say hello within {seconds} s; it hangs or did not boot, see its boot console.",
        .path.display()
    )]
    NoHello {
        /// The channel's socket.
        path: PathBuf,
        /// How long was waited.
        seconds: u64,
    },
    /// The channel broke. Connect again if the machine is still alive.
    #[error("The channel to the guest behind '{}' broke; its microVM may have ended.", .path.display())]
    Broken {
        /// The channel's socket.
        path: PathBuf,
        /// How.
        #[source]
        source: io::Error,
    },
    /// The guest sends what no release of ours sends.
    #[error("The guest behind '{}' sent {BROKEN_FRAMES_MAX} frames that make no sense; stop it.", .path.display())]
    Nonsense {
        /// The channel's socket.
        path: PathBuf,
        /// The last one.
        #[source]
        source: FrameError,
    },
    /// The guest sends well-formed frames that mean nothing, without end.
    #[error("The guest behind '{}' sent {IDLE_MESSAGES_MAX} messages in a row that nobody asked for; stop it.", .path.display())]
    Babble {
        /// The channel's socket.
        path: PathBuf,
    },
    /// A message could not be encoded.
    #[error("A message for the guest could not be framed.")]
    Frame(#[source] FrameError),
    /// The configuration cannot be sent.
    #[error("The guest's configuration cannot be sent.")]
    Config(#[source] ConfigError),
    /// A guest that was asked something did not answer.
    #[error("The guest behind '{}' did not answer a health check within {millis} ms.", .path.display())]
    NoAnswer {
        /// The channel's socket.
        path: PathBuf,
        /// How long was waited.
        millis: u128,
    },
    /// The guest's init is of an earlier release.
    #[error(
        "The instance was started by an earlier release, whose guests cannot run other programs; deploy it again."
    )]
    TooOld,
    /// Too many health checks at once.
    #[error("{HEALTH_QUERIES_MAX} health checks of one guest are under way; wait for one to end.")]
    TooManyChecks,
}

/// What the guest said of itself when the session began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Version of its init.
    pub init_version: String,
    /// Milliseconds since its kernel started.
    pub uptime_ms: u64,
    /// Where it stands: after an agent's restart it is usually `Running` and needs no configuration.
    pub state: GuestState,
    /// The first line that the guest still had, so that the agent can tell how many it has missed.
    pub log_first_seq: u64,
}

/// What a guest reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestEvent {
    /// The configuration is in force.
    ConfigApplied,
    /// The configuration could not be applied, or the workload not be started; the guest leaves.
    Failed {
        /// A sentence, chosen by the guest.
        reason: String,
    },
    /// The workload's process exists.
    Ready {
        /// Milliseconds since the guest's kernel started.
        uptime_ms: u64,
    },
    /// A line of output; `seq` only rises, and a gap counts the lines that were lost.
    Log(LogLine),
    /// The workload ended and all its output has been delivered. Store both, then [`GuestSender::dismiss`].
    Exited(ExitStatus),
}

/// The answer to a health check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The verdict.
    pub healthy: bool,
    /// A sentence, chosen by the guest.
    pub detail: String,
}

type Waiting = Arc<Mutex<HashMap<u32, oneshot::Sender<Health>>>>;

/// An open session with a guest.
#[derive(Debug)]
pub struct GuestChannel {
    /// How the guest greeted.
    pub hello: Hello,
    /// Speaks to the guest; clones share the session.
    pub sender: GuestSender,
    /// Hears the guest.
    pub receiver: GuestReceiver,
}

/// Speaks to the guest.
#[derive(Debug, Clone)]
pub struct GuestSender {
    path: PathBuf,
    session: u64,
    write: Arc<tokio::sync::Mutex<OwnedWriteHalf>>,
    waiting: Waiting,
    next_query: Arc<AtomicU32>,
    inboxes: Arc<Inboxes>,
}

/// Hears the guest. Must be polled for health answers to arrive.
#[derive(Debug)]
pub struct GuestReceiver {
    path: PathBuf,
    session: u64,
    read: OwnedReadHalf,
    decoder: Decoder,
    /// Bytes that arrived and were not decoded yet, [`READ_BYTES`] at most.
    buffer: Vec<u8>,
    /// How many of them are.
    used: usize,
    broken_frames: u32,
    /// Messages since the last one that meant something.
    idle_messages: u32,
    /// The last log line that was passed on.
    log_seq: u64,
    waiting: Waiting,
    inboxes: Arc<Inboxes>,
}

impl Drop for GuestReceiver {
    fn drop(&mut self) {
        // Nobody hears the guest any more.
        self.inboxes.close();
    }
}

impl GuestChannel {
    /// Opens a session: connects as soon as the socket is there, and greets until the guest answers.
    /// `log_after` is the last line that was stored, 0 for none.
    pub async fn connect(
        address: &ChannelAddress,
        log_after: u64,
        deadline: Duration,
    ) -> Result<GuestChannel, ChannelError> {
        // Drawn at random, so that a workload cannot leave frames of a session to come in the pipe.
        let session = rand::random();
        let no_hello = || ChannelError::NoHello { path: address.path().clone(), seconds: deadline.as_secs() };
        let until = Instant::now() + deadline;
        loop {
            let attempt = async {
                let stream = dial(address).await?;
                greet(address, stream, session, log_after).await
            };
            match tokio::time::timeout_at(until, attempt).await {
                Ok(Ok(channel)) => return Ok(channel),
                // The VMM has not made the socket yet, or the guest does not listen yet.
                Ok(Err(ChannelError::Broken { .. })) => {}
                Ok(Err(other)) => return Err(other),
                Err(_) => return Err(no_hello()),
            }
            if tokio::time::timeout_at(until, tokio::time::sleep(CONNECT_POLL)).await.is_err() {
                return Err(no_hello());
            }
        }
    }
}

async fn dial(address: &ChannelAddress) -> Result<UnixStream, ChannelError> {
    let broken = |source| ChannelError::Broken { path: address.path().clone(), source };
    let mut stream = UnixStream::connect(address.path()).await.map_err(broken)?;
    if let ChannelAddress::Vsock { port, .. } = address {
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.map_err(broken)?;
        // Answered by "OK <port>\n", or by the end of the stream while nobody listens in the guest.
        let mut answer = Vec::with_capacity(16);
        while answer.last() != Some(&b'\n') && answer.len() < 32 {
            answer.push(stream.read_u8().await.map_err(broken)?);
        }
        if !answer.starts_with(b"OK ") {
            return Err(broken(io::ErrorKind::ConnectionRefused.into()));
        }
    }
    Ok(stream)
}

async fn greet(
    address: &ChannelAddress,
    stream: UnixStream,
    session: u64,
    log_after: u64,
) -> Result<GuestChannel, ChannelError> {
    let path = address.path().clone();
    let (read, write) = stream.into_split();
    let (waiting, inboxes) = (Waiting::default(), Arc::<Inboxes>::default());
    let sender = GuestSender {
        path: path.clone(),
        session,
        write: Arc::new(tokio::sync::Mutex::new(write)),
        waiting: Arc::clone(&waiting),
        next_query: Arc::default(),
        inboxes: Arc::clone(&inboxes),
    };
    let mut receiver = GuestReceiver {
        path,
        session,
        read,
        decoder: Decoder::new(),
        buffer: Vec::new(),
        used: 0,
        broken_frames: 0,
        idle_messages: 0,
        log_seq: log_after,
        waiting,
        inboxes,
    };
    loop {
        sender.send(&HostMessage::Sync { log_after }).await?;
        let answer = async {
            loop {
                if let GuestMessage::Hello { init_version, uptime_ms, state, log_first_seq } =
                    receiver.next_message().await?
                {
                    return Ok::<_, ChannelError>(Hello {
                        init_version: cut(init_version),
                        uptime_ms,
                        state: match state {
                            GuestState::Failed { reason } => GuestState::Failed { reason: cut(reason) },
                            state => state,
                        },
                        log_first_seq,
                    });
                }
            }
        };
        // A guest that boots opens its end late; what was sent before may be lost. Nothing is read and dropped
        // here but what came before the hello.
        if let Ok(hello) = tokio::time::timeout(SYNC_PERIOD, answer).await {
            return Ok(GuestChannel { hello: hello?, sender, receiver });
        }
    }
}

impl GuestSender {
    /// Sends the configuration; the guest answers with [`GuestEvent::ConfigApplied`] and [`GuestEvent::Ready`].
    pub async fn configure(&self, config: &GuestConfig) -> Result<(), ChannelError> {
        for part in config_parts::split(config).map_err(ChannelError::Config)? {
            self.send(&part).await?;
        }
        Ok(())
    }

    /// Runs a health check in the guest. The receiver must be polled meanwhile.
    pub async fn health(&self, check: HealthCheck, timeout: Duration) -> Result<Health, ChannelError> {
        let id = self.next_query.fetch_add(1, Ordering::Relaxed);
        let (answer_tx, answer_rx) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.retain(|_, answer| !answer.is_closed());
            if waiting.len() >= HEALTH_QUERIES_MAX {
                return Err(ChannelError::TooManyChecks);
            }
            waiting.insert(id, answer_tx);
        }
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        self.send(&HostMessage::HealthQuery { id, check, timeout_ms }).await?;
        let patience = timeout + HEALTH_ANSWER_SLACK;
        match tokio::time::timeout(patience, answer_rx).await {
            Ok(Ok(health)) => Ok(health),
            Ok(Err(_)) | Err(_) => {
                Err(ChannelError::NoAnswer { path: self.path.clone(), millis: patience.as_millis() })
            }
        }
    }

    /// Runs a program beside the workload: with no arguments the user's shell. The receiver must be polled meanwhile.
    pub async fn run(&self, argv: Vec<String>, terminal: Option<Terminal>) -> Result<Program, ChannelError> {
        Program::start(self.clone(), Arc::clone(&self.inboxes), argv, terminal).await
    }

    /// Asks the workload to stop: TERM, and KILL after the grace.
    pub async fn stop(&self, grace: Duration) -> Result<(), ChannelError> {
        let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
        self.send(&HostMessage::Stop { grace_ms }).await
    }

    /// Lets a guest go whose exit status and output are stored.
    pub async fn dismiss(&self) -> Result<(), ChannelError> {
        self.send(&HostMessage::Dismiss).await
    }

    pub(super) async fn send(&self, message: &HostMessage) -> Result<(), ChannelError> {
        // The delimiter in front ends whatever a send that was cut short has left.
        let mut wire = vec![frame::DELIMITER];
        wire.extend(frame::encode(self.session, message).map_err(ChannelError::Frame)?);
        let write = async {
            let mut stream = self.write.lock().await;
            stream.write_all(&wire).await
        };
        let broken = |source| ChannelError::Broken { path: self.path.clone(), source };
        tokio::time::timeout(SEND_DEADLINE, write).await.map_err(|late| broken(late.into()))?.map_err(broken)
    }
}

impl GuestReceiver {
    /// The next thing that the guest reports. Health answers go to who asked. Waits for ever if the guest is
    /// silent; safe to cancel.
    pub async fn recv(&mut self) -> Result<GuestEvent, ChannelError> {
        loop {
            let message = self.next_message().await?;
            if let Some(event) = self.event_of(message) {
                self.idle_messages = 0;
                return Ok(event);
            }
        }
    }

    /// What a message means to the agent; `None` if it was for who asked for it, or for nobody.
    fn event_of(&mut self, message: GuestMessage) -> Option<GuestEvent> {
        match message {
            GuestMessage::Hello { .. } => {}
            GuestMessage::Health { id, healthy, detail } => {
                let asked = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(answer) = asked {
                    self.idle_messages = 0;
                    // Who asked may have given up; then nobody wants it.
                    answer.send(Health { healthy, detail: cut(detail) }).ok();
                }
            }
            GuestMessage::ConfigApplied => return Some(GuestEvent::ConfigApplied),
            GuestMessage::Failed { reason } => return Some(GuestEvent::Failed { reason: cut(reason) }),
            GuestMessage::Ready { uptime_ms } => return Some(GuestEvent::Ready { uptime_ms }),
            GuestMessage::Log(mut line) => {
                if line.seq > self.log_seq {
                    self.log_seq = line.seq;
                    line.bytes.truncate(LINE_BYTES_MAX);
                    return Some(GuestEvent::Log(line));
                }
            }
            GuestMessage::Exited(status) => return Some(GuestEvent::Exited(status)),
            GuestMessage::Speaks { version } => self.inboxes.guest_speaks(version),
            GuestMessage::Exec { id, news } => {
                if self.inboxes.hear(id, news) {
                    self.idle_messages = 0;
                }
            }
        }
        None
    }

    async fn next_message(&mut self) -> Result<GuestMessage, ChannelError> {
        loop {
            let mut input = self.buffer.get(self.used..).unwrap_or_default();
            let frame = self.decoder.next_frame::<GuestMessage>(&mut input);
            self.used = self.buffer.len() - input.len();
            if matches!(frame, Some(Ok(_))) {
                self.idle_messages += 1;
                if self.idle_messages > IDLE_MESSAGES_MAX {
                    return Err(ChannelError::Babble { path: self.path.clone() });
                }
            }
            match frame {
                Some(Ok(frame)) if frame.session == self.session => return Ok(frame.message),
                // What an earlier session left in the pipe.
                Some(Ok(_)) => {}
                Some(Err(source)) => {
                    self.broken_frames += 1;
                    if self.broken_frames >= BROKEN_FRAMES_MAX {
                        return Err(ChannelError::Nonsense { path: self.path.clone(), source });
                    }
                }
                None => self.fill().await?,
            }
        }
    }

    async fn fill(&mut self) -> Result<(), ChannelError> {
        self.buffer.clear();
        self.used = 0;
        self.buffer.reserve(READ_BYTES);
        let broken = |source| ChannelError::Broken { path: self.path.clone(), source };
        match self.read.read_buf(&mut self.buffer).await.map_err(broken)? {
            0 => Err(broken(io::ErrorKind::UnexpectedEof.into())),
            _ => Ok(()),
        }
    }
}

/// Text from a guest goes into events and logs: bounded, and without control characters.
pub(super) fn cut(text: String) -> String {
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    let mut bounded = String::new();
    for character in clean {
        if bounded.len() + character.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        bounded.push(character);
    }
    bounded
}
