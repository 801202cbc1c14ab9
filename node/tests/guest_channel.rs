//! The agent's end of the channel against guests that lie, flood, stutter and vanish.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{path::PathBuf, time::Duration};

use holdfast_guest::{
    frame::{self, Decoder, encode},
    lines::LINE_BYTES_MAX,
    message::{ExitStatus, GuestMessage, GuestState, HealthCheck, HostMessage, LogLine, LogStream},
};
use holdfast_node::vmm::channel::{ChannelAddress, ChannelError, GuestChannel, GuestEvent};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

/// A guard against hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// The guest's end, with nothing of ours but the frames.
struct Peer {
    stream: UnixStream,
    decoder: Decoder,
    /// The session that the agent opened.
    session: u64,
}

impl Peer {
    async fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().await.unwrap();
        let mut peer = Self { stream, decoder: Decoder::new(), session: 0 };
        let HostMessage::Sync { .. } = peer.hear().await else { panic!("a session begins with a sync") };
        peer
    }

    async fn hear(&mut self) -> HostMessage {
        // Byte by byte, so that nothing of a later frame is lost between calls.
        loop {
            let byte = [self.stream.read_u8().await.unwrap()];
            if let Some(frame) = self.decoder.next_frame::<HostMessage>(&mut &byte[..]) {
                let frame = frame.unwrap();
                self.session = frame.session;
                return frame.message;
            }
        }
    }

    async fn say(&mut self, message: GuestMessage) {
        self.stream.write_all(&encode(self.session, &message).unwrap()).await.unwrap();
    }

    async fn hello(&mut self) {
        self.say(GuestMessage::Hello {
            init_version: "0".to_owned(),
            uptime_ms: 1,
            state: GuestState::Running,
            log_first_seq: 1,
        })
        .await;
    }
}

fn line(seq: u64, bytes: &[u8]) -> GuestMessage {
    GuestMessage::Log(LogLine {
        seq,
        stream: LogStream::Stdout,
        at_unix_ms: 0,
        bytes: bytes.to_vec(),
        continues: false,
    })
}

struct Socket {
    _folder: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

fn socket() -> Socket {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    Socket { _folder: folder, path, listener }
}

async fn open(socket: &Socket, log_after: u64) -> (GuestChannel, Peer) {
    let address = ChannelAddress::Stream(socket.path.clone());
    let (channel, peer) = tokio::join!(GuestChannel::connect(&address, log_after, PATIENCE), async {
        let mut peer = Peer::accept(&socket.listener).await;
        peer.hello().await;
        peer
    });
    (channel.unwrap(), peer)
}

#[tokio::test]
async fn what_an_earlier_session_left_in_the_pipe_is_skipped() {
    let socket = socket();
    let address = ChannelAddress::Stream(socket.path.clone());
    let guest = async {
        let mut peer = Peer::accept(&socket.listener).await;
        let old = peer.session.wrapping_add(1);
        let stale = encode(old, &GuestMessage::Exited(ExitStatus::Code(0))).unwrap();
        // The tail of one frame, then whole ones, a forged hello among them.
        let forged = GuestMessage::Hello {
            init_version: String::new(),
            uptime_ms: 0,
            state: GuestState::Exited(ExitStatus::Code(0)),
            log_first_seq: 1,
        };
        peer.stream.write_all(&stale[stale.len() / 2..]).await.unwrap();
        peer.stream.write_all(&stale).await.unwrap();
        peer.stream.write_all(&encode(old, &forged).unwrap()).await.unwrap();
        peer.hello().await;
        peer.stream.write_all(&stale).await.unwrap();
        peer.say(line(1, b"true")).await;
        peer
    };
    let (channel, _peer) = tokio::join!(GuestChannel::connect(&address, 0, PATIENCE), guest);
    let mut channel = channel.unwrap();
    assert_eq!(channel.hello.state, GuestState::Running);
    let GuestEvent::Log(line) = channel.receiver.recv().await.unwrap() else { panic!("a line was expected") };
    assert_eq!(line.bytes, b"true");
}

#[tokio::test]
async fn the_greeting_is_repeated_until_it_is_answered() {
    let socket = socket();
    let address = ChannelAddress::Stream(socket.path.clone());
    let guest = async {
        let mut peer = Peer::accept(&socket.listener).await;
        let session = peer.session;
        let HostMessage::Sync { log_after: 4 } = peer.hear().await else { panic!("a second greeting") };
        assert_eq!(peer.session, session, "of the same session");
        peer.hello().await;
        peer
    };
    let (channel, _peer) = tokio::join!(GuestChannel::connect(&address, 4, PATIENCE), guest);
    channel.unwrap();
}

#[tokio::test]
async fn no_line_is_passed_on_twice_and_none_beyond_its_bound() {
    let socket = socket();
    let (mut channel, mut peer) = open(&socket, 2).await;
    for seq in [1, 2, 3, 3, 2, 7] {
        peer.say(line(seq, &vec![b'x'; LINE_BYTES_MAX + 500])).await;
    }
    for expected in [3, 7] {
        let GuestEvent::Log(line) = channel.receiver.recv().await.unwrap() else { panic!("a line") };
        assert_eq!((line.seq, line.bytes.len()), (expected, LINE_BYTES_MAX));
    }
}

#[tokio::test]
async fn i14_a_guest_that_talks_nonsense_is_given_up() {
    let socket = socket();
    let (mut channel, mut peer) = open(&socket, 0).await;
    // A little is forgiven.
    peer.stream.write_all(b"\0junk\0\xff\xff\xff\0").await.unwrap();
    peer.say(line(1, b"fine")).await;
    assert!(matches!(channel.receiver.recv().await, Ok(GuestEvent::Log(_))));
    let flood = tokio::spawn(async move {
        let junk = b"not a frame\0".repeat(4096);
        // Ends with an error when the agent hangs up.
        while peer.stream.write_all(&junk).await.is_ok() {}
    });
    let given_up = channel.receiver.recv().await;
    assert!(matches!(given_up, Err(ChannelError::Nonsense { .. })), "{given_up:?}");
    drop(channel);
    tokio::time::timeout(PATIENCE, flood).await.unwrap().unwrap();
}

#[tokio::test]
async fn i14_a_guest_that_babbles_is_given_up() {
    let socket = socket();
    let (mut channel, mut peer) = open(&socket, 0).await;
    let session = peer.session;
    let flood = tokio::spawn(async move {
        let answer = GuestMessage::Health { id: 7, healthy: true, detail: String::new() };
        let babble = encode(session, &answer).unwrap().repeat(1024);
        while peer.stream.write_all(&babble).await.is_ok() {}
    });
    let given_up = channel.receiver.recv().await;
    assert!(matches!(given_up, Err(ChannelError::Babble { .. })), "{given_up:?}");
    drop(channel);
    tokio::time::timeout(PATIENCE, flood).await.unwrap().unwrap();
}

#[tokio::test]
async fn i14_text_from_a_guest_is_bounded_and_printable() {
    let socket = socket();
    let (mut channel, mut peer) = open(&socket, 0).await;
    peer.say(GuestMessage::Failed { reason: "\u{1b}[2J\n".repeat(8000) }).await;
    let GuestEvent::Failed { reason } = channel.receiver.recv().await.unwrap() else { panic!("a failure") };
    assert!(reason.len() <= 4096);
    assert!(!reason.contains(char::is_control));
}

#[tokio::test]
async fn a_health_answer_goes_to_who_asked() {
    let socket = socket();
    let (channel, mut peer) = open(&socket, 0).await;
    let GuestChannel { sender, mut receiver, .. } = channel;
    let listening = tokio::spawn(async move { receiver.recv().await });
    let ask = |port| sender.health(HealthCheck::Tcp { port }, Duration::from_secs(30));
    let guest = async {
        let mut asked = Vec::new();
        for _ in 0..2 {
            let HostMessage::HealthQuery { id, check: HealthCheck::Tcp { port }, timeout_ms: 30_000 } =
                peer.hear().await
            else {
                panic!("a query")
            };
            asked.push((id, port));
        }
        // Answers to nothing, then the real ones in the other order.
        peer.say(GuestMessage::Health { id: 99, healthy: true, detail: String::new() }).await;
        for (id, port) in asked.into_iter().rev() {
            peer.say(GuestMessage::Health { id, healthy: port == 1, detail: port.to_string() }).await;
        }
        peer
    };
    let (first, second, peer) = tokio::join!(ask(1), ask(2), guest);
    assert!(first.unwrap().healthy);
    let second = second.unwrap();
    assert_eq!((second.healthy, second.detail.as_str()), (false, "2"));

    // A guest that never answers costs its time-out, and no more.
    let silent = sender.health(HealthCheck::Tcp { port: 3 }, Duration::from_millis(10)).await;
    assert!(matches!(silent, Err(ChannelError::NoAnswer { .. })), "{silent:?}");
    drop(peer);
    assert!(matches!(listening.await.unwrap(), Err(ChannelError::Broken { .. })));
}

#[tokio::test]
async fn a_missing_guest_costs_the_deadline_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let address = ChannelAddress::Stream(folder.path().join("absent"));
    let absent = GuestChannel::connect(&address, 0, Duration::from_millis(100)).await;
    assert!(matches!(absent, Err(ChannelError::NoHello { .. })), "{absent:?}");

    let socket = socket();
    let address = ChannelAddress::Stream(socket.path.clone());
    let mute = GuestChannel::connect(&address, 0, Duration::from_millis(100)).await;
    assert!(matches!(mute, Err(ChannelError::NoHello { .. })), "{mute:?}");
}

#[tokio::test]
async fn a_vsock_port_is_asked_for_until_the_guest_listens() {
    let socket = socket();
    let address = ChannelAddress::Vsock { path: socket.path.clone(), port: 1024 };
    let host = async {
        // Firecracker hangs up while nobody listens in the guest.
        let (early, _) = socket.listener.accept().await.unwrap();
        drop(early);
        let (mut stream, _) = socket.listener.accept().await.unwrap();
        let mut asked = [0; 13];
        stream.read_exact(&mut asked).await.unwrap();
        assert_eq!(&asked, b"CONNECT 1024\n");
        stream.write_all(b"OK 1073741824\n").await.unwrap();
        let mut peer = Peer { stream, decoder: Decoder::new(), session: 0 };
        let HostMessage::Sync { .. } = peer.hear().await else { panic!("a sync") };
        peer.hello().await;
        peer.stream.write_all(&[frame::DELIMITER]).await.unwrap();
        peer.say(GuestMessage::Ready { uptime_ms: 5 }).await;
        peer
    };
    let (channel, _peer) = tokio::join!(GuestChannel::connect(&address, 0, PATIENCE), host);
    assert_eq!(channel.unwrap().receiver.recv().await.unwrap(), GuestEvent::Ready { uptime_ms: 5 });
}
