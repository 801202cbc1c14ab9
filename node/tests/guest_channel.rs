//! The agent's end of the channel against guests that lie, flood, stutter and vanish.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::{path::PathBuf, time::Duration};

use holdfast_guest::{
    exec::{ExecAsk, ExecNews, ExecStream, WINDOW_BYTES},
    frame::{self, Decoder, encode},
    lines::LINE_BYTES_MAX,
    message::{ExitStatus, GuestMessage, GuestState, HealthCheck, HostMessage, LogLine, LogStream},
};
use holdfast_node::vmm::channel::{ChannelAddress, ChannelError, GuestChannel, GuestEvent};
use holdfast_node::vmm::exec::{Program, ProgramNews};
use proptest::prelude::*;
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

/// A program of a guest that is played, and its number.
async fn program(socket: &Socket) -> (Program, u32, Peer, tokio::task::JoinHandle<ChannelError>) {
    let (channel, mut peer) = open(socket, 0).await;
    let GuestChannel { sender, mut receiver, .. } = channel;
    peer.say(GuestMessage::Speaks { version: 2 }).await;
    peer.say(GuestMessage::ConfigApplied).await;
    // What was said before this is heard by then.
    receiver.recv().await.unwrap();
    let listening = tokio::spawn(async move {
        loop {
            if let Err(error) = receiver.recv().await {
                return error;
            }
        }
    });
    let program = sender.run(vec!["ls".into()], None).await.unwrap();
    let HostMessage::Exec { id, ask: ExecAsk::Start { argv, terminal: None } } = peer.hear().await else {
        panic!("a start")
    };
    assert_eq!(argv, ["ls"]);
    (program, id, peer, listening)
}

fn output(id: u32, bytes: usize) -> GuestMessage {
    let news = ExecNews::Output { stream: ExecStream::Stdout, bytes: vec![b'x'; bytes] };
    GuestMessage::Exec { id, news }
}

#[tokio::test]
async fn i05_a_guest_of_an_earlier_release_is_spoken_to_but_asked_for_no_program() {
    let socket = socket();
    let (channel, mut peer) = open(&socket, 0).await;
    let too_old = channel.sender.run(vec!["ls".into()], None).await;
    assert!(matches!(too_old, Err(ChannelError::TooOld)), "{too_old:?}");
    // It was told nothing that it does not know.
    channel.sender.stop(Duration::from_secs(1)).await.unwrap();
    assert!(matches!(peer.hear().await, HostMessage::Stop { grace_ms: 1_000 }));
}

#[tokio::test]
async fn a_program_is_granted_room_as_its_output_is_taken() {
    let socket = socket();
    let (mut program, id, mut peer, _listening) = program(&socket).await;
    let window = WINDOW_BYTES as usize;
    let guest = async {
        peer.say(GuestMessage::Exec { id, news: ExecNews::Started }).await;
        let mut granted = 0;
        for _ in 0..window / 8192 {
            peer.say(output(id, 8192)).await;
        }
        // Not before it is taken, and all of it in the end.
        while granted < window {
            let HostMessage::Exec { ask: ExecAsk::Room(room), .. } = peer.hear().await else {
                panic!("room")
            };
            granted += room as usize;
        }
        peer.say(output(id, 5)).await;
        peer.say(GuestMessage::Exec { id, news: ExecNews::Ended(ExitStatus::Code(3)) }).await;
        // Of a program that ended nothing more is believed.
        peer.say(output(id, 5)).await;
        peer
    };
    let agent = async {
        let mut taken = 0;
        loop {
            match program.news().await.unwrap() {
                ProgramNews::Output(ExecStream::Stdout, bytes) => taken += bytes.len(),
                ProgramNews::Started => {}
                end => return (taken, end),
            }
        }
    };
    let (_peer, (taken, end)) = tokio::join!(guest, agent);
    assert_eq!((taken, end), (window + 5, ProgramNews::Ended(ExitStatus::Code(3))));
}

#[tokio::test]
async fn i14_a_guest_that_overruns_a_window_loses_that_program_and_no_more() {
    let socket = socket();
    let (mut program, id, mut peer, listening) = program(&socket).await;
    for _ in 0..WINDOW_BYTES / 8192 {
        peer.say(output(id, 8192)).await;
    }
    peer.say(output(id, 1)).await;
    // What it had room for is taken all the same.
    let mut taken = 0;
    let end = loop {
        match program.news().await.unwrap() {
            ProgramNews::Output(_, bytes) => taken += bytes.len(),
            end => break end,
        }
    };
    assert_eq!((taken, end), (WINDOW_BYTES as usize, ProgramNews::Lost));
    assert!(!listening.is_finished(), "the channel goes on");
    // Nor does it get more room than a window.
    drop(program);
    drop(peer);
    assert!(matches!(listening.await.unwrap(), ChannelError::Broken { .. }));
}

#[tokio::test]
async fn a_program_whose_channel_breaks_is_lost() {
    let socket = socket();
    let (mut program, id, mut peer, _listening) = program(&socket).await;
    peer.say(output(id, 5)).await;
    drop(peer);
    assert!(matches!(program.news().await.unwrap(), ProgramNews::Output(_, bytes) if bytes.len() == 5));
    assert_eq!(program.news().await.unwrap(), ProgramNews::Lost);
}

#[tokio::test]
async fn i14_news_of_programs_that_nobody_asked_for_are_babble() {
    let socket = socket();
    let (program, id, mut peer, listening) = program(&socket).await;
    let session = peer.session;
    let flood = tokio::spawn(async move {
        let stray = encode(session, &output(id + 1, 1)).unwrap();
        let empty = encode(session, &output(id, 0)).unwrap();
        let babble = [stray, empty].concat().repeat(512);
        while peer.stream.write_all(&babble).await.is_ok() {}
    });
    let given_up = tokio::time::timeout(PATIENCE, listening).await.unwrap().unwrap();
    assert!(matches!(given_up, ChannelError::Babble { .. }), "{given_up:?}");
    // Who speaks to the guest hangs up, too.
    drop(program);
    tokio::time::timeout(PATIENCE, flood).await.unwrap().unwrap();
}

fn any_news() -> impl Strategy<Value = (bool, ExecNews)> {
    let stream = prop_oneof![Just(ExecStream::Stdout), Just(ExecStream::Stderr)];
    let news = prop_oneof![
        Just(ExecNews::Started),
        Just(ExecNews::Refused { reason: "no".into() }),
        (stream, 0usize..20_000)
            .prop_map(|(stream, bytes)| ExecNews::Output { stream, bytes: vec![1; bytes] }),
        any::<u32>().prop_map(ExecNews::Room),
        any::<i32>().prop_map(|code| ExecNews::Ended(ExitStatus::Code(code))),
    ];
    (any::<bool>(), news)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Whatever a guest says of a program, in whatever order, the agent holds a window at most and comes to an end.
    #[test]
    fn i14_any_order_of_news_is_survived(said in proptest::collection::vec(any_news(), 0..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let socket = socket();
            let (mut program, id, mut peer, listening) = program(&socket).await;
            for (own, news) in said {
                peer.say(GuestMessage::Exec { id: if own { id } else { id + 1 }, news }).await;
            }
            drop(peer);
            // All of it was heard before any of it is taken.
            listening.await.unwrap();
            let mut taken = 0;
            let heard = async {
                loop {
                    match program.news().await {
                        Ok(ProgramNews::Output(_, bytes)) => taken += bytes.len(),
                        Ok(ProgramNews::Started) => {}
                        // Room cannot be granted to a guest that is gone.
                        Ok(ProgramNews::Ended(_) | ProgramNews::Refused { .. } | ProgramNews::Lost) | Err(_) => break,
                    }
                }
            };
            tokio::time::timeout(PATIENCE, heard).await.unwrap();
            assert!(taken <= WINDOW_BYTES as usize);
        });
    }
}
