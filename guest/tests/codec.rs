//! The wire protocol against every kind of message, every way of cutting a stream, and arbitrary bytes.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::net::Ipv6Addr;

use holdfast_guest::{
    config::{GuestConfig, NetworkConfig, Secrets, VolumeMount, Workload},
    config_parts::{self, Assembly, CONFIG_BYTES_MAX, ConfigError},
    exec::{
        CHUNK_BYTES_MAX, ExecAsk, ExecNews, ExecSignal, ExecStream, Granting, Overrun, Spending, Terminal,
        TerminalSize, WINDOW_BYTES,
    },
    frame::{
        self, Decoder, FRAME_BYTES_MAX, Frame, FrameError, MESSAGE_BYTES_MAX, Versioned, decode_untrusted,
        encode,
    },
    lines::{LINE_BYTES_MAX, Line, LineCutter},
    log_buffer::{BUFFER_BYTES_MAX, BUFFER_LINES_MAX, LogBuffer},
    message::{ExitStatus, GuestMessage, GuestState, HealthCheck, HostMessage, LogLine, LogStream},
};
use proptest::{collection::vec, prelude::*};

fn host_messages() -> impl Strategy<Value = HostMessage> {
    let check = prop_oneof![
        any::<u16>().prop_map(|port| HealthCheck::Tcp { port }),
        (any::<u16>(), ".{0,64}").prop_map(|(port, path)| HealthCheck::Http { port, path }),
        vec(".{0,32}", 0..4).prop_map(|argv| HealthCheck::Command { argv }),
    ];
    prop_oneof![
        any::<u64>().prop_map(|log_after| HostMessage::Sync { log_after }),
        (any::<u32>(), any::<u32>(), vec(any::<u8>(), 0..2048))
            .prop_map(|(offset, total, bytes)| HostMessage::ConfigPart { offset, total, bytes }),
        (any::<u32>(), check, any::<u32>()).prop_map(|(id, check, timeout_ms)| HostMessage::HealthQuery {
            id,
            check,
            timeout_ms
        }),
        any::<u32>().prop_map(|grace_ms| HostMessage::Stop { grace_ms }),
        (any::<u32>(), asks()).prop_map(|(id, ask)| HostMessage::Exec { id, ask }),
        Just(HostMessage::Dismiss),
    ]
}

fn guest_messages() -> impl Strategy<Value = GuestMessage> {
    let status =
        || prop_oneof![any::<i32>().prop_map(ExitStatus::Code), any::<i32>().prop_map(ExitStatus::Signal)];
    let state = prop_oneof![
        Just(GuestState::AwaitingConfig),
        Just(GuestState::Running),
        Just(GuestState::Stopping),
        status().prop_map(GuestState::Exited),
        ".{0,64}".prop_map(|reason| GuestState::Failed { reason }),
    ];
    let stream = prop_oneof![Just(LogStream::Stdout), Just(LogStream::Stderr), Just(LogStream::Init)];
    let line = (any::<u64>(), stream, any::<u64>(), vec(any::<u8>(), 0..LINE_BYTES_MAX), any::<bool>());
    prop_oneof![
        (".{0,16}", any::<u64>(), state, any::<u64>()).prop_map(
            |(init_version, uptime_ms, state, log_first_seq)| GuestMessage::Hello {
                init_version,
                uptime_ms,
                state,
                log_first_seq
            }
        ),
        Just(GuestMessage::ConfigApplied),
        ".{0,64}".prop_map(|reason| GuestMessage::Failed { reason }),
        any::<u64>().prop_map(|uptime_ms| GuestMessage::Ready { uptime_ms }),
        line.prop_map(|(seq, stream, at_unix_ms, bytes, continues)| {
            GuestMessage::Log(LogLine { seq, stream, at_unix_ms, bytes, continues })
        }),
        (any::<u32>(), any::<bool>(), ".{0,64}").prop_map(|(id, healthy, detail)| GuestMessage::Health {
            id,
            healthy,
            detail
        }),
        status().prop_map(GuestMessage::Exited),
        any::<u8>().prop_map(|version| GuestMessage::Speaks { version }),
        (any::<u32>(), news()).prop_map(|(id, news)| GuestMessage::Exec { id, news }),
    ]
}

fn asks() -> impl Strategy<Value = ExecAsk> {
    let size = || (any::<u16>(), any::<u16>()).prop_map(|(rows, columns)| TerminalSize { rows, columns });
    let terminal = (".{0,16}", size()).prop_map(|(kind, size)| Terminal { kind, size });
    prop_oneof![
        (vec(".{0,32}", 0..4), proptest::option::of(terminal))
            .prop_map(|(argv, terminal)| ExecAsk::Start { argv, terminal }),
        vec(any::<u8>(), 0..CHUNK_BYTES_MAX).prop_map(ExecAsk::Input),
        Just(ExecAsk::InputEnds),
        size().prop_map(ExecAsk::Resize),
        Just(ExecAsk::Signal(ExecSignal::Kill)),
        any::<u32>().prop_map(ExecAsk::Room),
        any::<bool>().prop_map(|kill| ExecAsk::HangUp { kill }),
    ]
}

fn news() -> impl Strategy<Value = ExecNews> {
    let stream = prop_oneof![Just(ExecStream::Stdout), Just(ExecStream::Stderr)];
    prop_oneof![
        Just(ExecNews::Started),
        ".{0,64}".prop_map(|reason| ExecNews::Refused { reason }),
        (stream, vec(any::<u8>(), 0..CHUNK_BYTES_MAX))
            .prop_map(|(stream, bytes)| ExecNews::Output { stream, bytes }),
        any::<u32>().prop_map(ExecNews::Room),
        any::<i32>().prop_map(|code| ExecNews::Ended(ExitStatus::Code(code))),
    ]
}

/// Decodes a stream that arrives in pieces of the given sizes, over and over.
fn decode_in_pieces<M: serde::de::DeserializeOwned + Versioned>(
    stream: &[u8],
    sizes: &[usize],
) -> Vec<Result<Frame<M>, FrameError>> {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    let mut rest = stream;
    let mut sizes = sizes.iter().cycle();
    while !rest.is_empty() {
        let (piece, after) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
        let mut piece = piece;
        while let Some(frame) = decoder.next_frame(&mut piece) {
            frames.push(frame);
        }
        rest = after;
    }
    frames
}

proptest! {
    #[test]
    fn what_is_sent_arrives_however_the_stream_is_cut(
        session in any::<u64>(),
        messages in vec(guest_messages(), 1..8),
        sizes in vec(1usize..5000, 1..6),
    ) {
        let mut stream = Vec::new();
        for message in &messages {
            let wire = encode(session, message).unwrap();
            prop_assert!(wire.len() <= FRAME_BYTES_MAX);
            stream.extend(wire);
        }
        let arrived: Vec<_> =
            decode_in_pieces(&stream, &sizes).into_iter().map(|frame| frame.unwrap()).collect();
        let sent: Vec<_> = messages.into_iter().map(|message| Frame { session, message }).collect();
        prop_assert_eq!(arrived, sent);
    }

    #[test]
    fn a_new_session_is_in_step_after_whatever_a_dead_one_left(
        left in host_messages(),
        kept in 0.0f64..1.0,
        message in host_messages(),
        session in any::<u64>(),
    ) {
        let dead = encode(session.wrapping_add(1), &left).unwrap();
        // Any part of the last frame, its delimiter not included.
        let cut = ((dead.len() - 1) as f64 * kept) as usize;
        let mut stream = dead[..cut].to_vec();
        stream.push(frame::DELIMITER);
        stream.extend(encode(session, &message).unwrap());
        let frames = decode_in_pieces::<HostMessage>(&stream, &[7]);
        prop_assert!(frames.len() <= 2);
        prop_assert_eq!(frames.last().unwrap().as_ref().unwrap(), &Frame { session, message });
    }

    #[test]
    fn i14_arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..4096)) {
        decode_untrusted(&bytes);
    }

    #[test]
    fn i14_damaged_frames_never_panic_and_the_next_one_is_read(
        message in guest_messages(),
        at in any::<prop::sample::Index>(),
        damage in 1u8..=255,
    ) {
        let mut wire = encode(9, &message).unwrap();
        let index = at.index(wire.len());
        wire[index] ^= damage;
        decode_untrusted(&wire);
        wire.push(frame::DELIMITER);
        wire.extend(encode(9, &GuestMessage::ConfigApplied).unwrap());
        let frames = decode_in_pieces::<GuestMessage>(&wire, &[1000]);
        let last = frames.last().unwrap().as_ref().unwrap();
        prop_assert_eq!(&last.message, &GuestMessage::ConfigApplied);
    }

    #[test]
    fn a_configuration_survives_being_split(secret_bytes in 0usize..300_000, words in vec(".{0,200}", 0..20)) {
        let config = config(secret_bytes, words);
        let parts = config_parts::split(&config).unwrap();
        let mut assembly = Assembly::new();
        let mut whole = None;
        for part in &parts {
            prop_assert!(encode(1, part).is_ok());
            prop_assert!(whole.is_none());
            let HostMessage::ConfigPart { offset, total, bytes } = part else { panic!("{part:?}") };
            whole = assembly.push(*offset, *total, bytes).unwrap();
        }
        prop_assert_eq!(whole, Some(config));
    }

    #[test]
    fn i14_pieces_of_a_configuration_that_do_not_fit_are_refused(
        pieces in vec((any::<u32>(), any::<u32>(), vec(any::<u8>(), 0..64)), 0..16),
    ) {
        let mut assembly = Assembly::new();
        for (offset, total, bytes) in pieces {
            if let Ok(Some(config)) = assembly.push(offset, total, &bytes) {
                // Random bytes may be a configuration; then they are one in every respect.
                prop_assert!(config_parts::split(&config).is_ok());
            }
        }
    }

    #[test]
    fn i14_a_window_is_never_overrun_and_never_stalls(steps in vec((0u32..60_000, 0u32..60_000), 0..200)) {
        let (mut spending, mut granting) = (Spending::default(), Granting::default());
        // Sent and not used up yet.
        let mut held = 0u32;
        for (send, using) in steps {
            let sent = send.min(spending.room() as u32);
            spending.spend(sent as usize);
            prop_assert_eq!(granting.arrived(sent as usize), Ok(()));
            held += sent;
            prop_assert!(held <= WINDOW_BYTES);
            let used = using.min(held);
            held -= used;
            if let Some(grant) = granting.used(used as usize) {
                prop_assert_eq!(spending.granted(grant), Ok(()));
            }
            prop_assert!(held > 0 || spending.room() > WINDOW_BYTES as usize / 2, "a window that stalls");
            prop_assert!(spending.room() as u32 + held <= WINDOW_BYTES);
        }
    }

    #[test]
    fn lines_are_cut_at_newlines_and_at_the_bound_only(
        lines in vec(vec(1u8..=255, 0..40_000).prop_map(|line| {
            line.into_iter().filter(|byte| *byte != b'\n').collect::<Vec<u8>>()
        }), 0..5),
        sizes in vec(1usize..20_000, 1..5),
    ) {
        let stream: Vec<u8> = lines.iter().flat_map(|line| line.iter().copied().chain([b'\n'])).collect();
        let mut cutter = LineCutter::new();
        let mut cut: Vec<Line> = Vec::new();
        let mut rest = stream.as_slice();
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            cutter.push(piece, |line| cut.push(line));
            rest = after;
        }
        prop_assert_eq!(cutter.finish(), None);
        let mut joined: Vec<Vec<u8>> = Vec::new();
        let mut open = false;
        for line in cut {
            prop_assert!(line.bytes.len() <= LINE_BYTES_MAX);
            if open { joined.last_mut().unwrap().extend(line.bytes) } else { joined.push(line.bytes) }
            open = line.continues;
        }
        prop_assert!(!open);
        prop_assert_eq!(joined, lines);
    }

    #[test]
    fn the_log_buffer_keeps_its_bounds_and_counts_what_it_drops(
        steps in vec(prop_oneof![
            (0usize..60_000).prop_map(Step::Push),
            Just(Step::Send),
            any::<u64>().prop_map(Step::Rewind),
            (0u64..400).prop_map(Step::Rewind),
        ], 0..400),
    ) {
        let mut buffer = LogBuffer::new();
        let (mut pushed, mut first_sent, mut last) = (0u64, std::collections::BTreeSet::new(), 0u64);
        for step in steps {
            match step {
                Step::Push(bytes) => {
                    pushed += 1;
                    buffer.push(LogStream::Stdout, 0, vec![b'x'; bytes], false);
                }
                Step::Send => {
                    if let Some(line) = buffer.peek() {
                        prop_assert!(line.seq > last, "lines go out in order");
                        last = line.seq;
                        first_sent.insert(line.seq);
                        buffer.advance();
                    }
                }
                Step::Rewind(log_after) => {
                    buffer.rewind(log_after);
                    last = buffer.peek().map_or(pushed, |line| line.seq - 1);
                    prop_assert!(last >= log_after.min(pushed), "nothing that is stored is sent again");
                }
            }
            prop_assert!(buffer.first_seq() <= pushed + 1);
        }
        prop_assert!(buffer.dropped() <= pushed);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push(usize),
    Send,
    Rewind(u64),
}

fn config(secret_bytes: usize, words: Vec<String>) -> GuestConfig {
    GuestConfig {
        instance_id: "inst_x".to_owned(),
        hostname: "x".to_owned(),
        now_unix_ms: 1,
        network: Some(NetworkConfig {
            address: Ipv6Addr::LOCALHOST,
            gateway: Ipv6Addr::UNSPECIFIED,
            mtu: 1420,
            nameservers: vec![],
        }),
        root_disk: true,
        workload: Workload {
            argv: words.clone(),
            env: words.into_iter().map(|word| (word.clone(), word)).collect(),
            workdir: String::new(),
            user: String::new(),
        },
        secrets: Some(Secrets { platform_env: vec![b's'; secret_bytes], keys: vec![] }),
        volumes: vec![VolumeMount { path: "/data".to_owned(), read_only: true }],
    }
}

#[test]
fn a_message_that_is_too_large_is_refused_and_one_that_fits_goes_through() {
    let log = |bytes: Vec<u8>| {
        GuestMessage::Log(LogLine {
            seq: 1,
            stream: LogStream::Stdout,
            at_unix_ms: 1,
            bytes,
            continues: false,
        })
    };
    let refused = encode(1, &log(vec![0xff; FRAME_BYTES_MAX])).unwrap_err();
    assert!(matches!(refused, FrameError::TooLarge { .. }), "{refused}");
    for filler in [0x00, 0xff] {
        let wire = encode(1, &log(vec![filler; MESSAGE_BYTES_MAX - 16])).unwrap();
        assert!(wire.len() <= FRAME_BYTES_MAX, "{}", wire.len());
        assert_eq!(decode_untrusted(&wire), 1);
    }
}

#[test]
fn i14_a_flood_without_delimiters_is_dropped_and_named() {
    let mut stream = vec![0x55; 10 * FRAME_BYTES_MAX];
    stream.push(frame::DELIMITER);
    stream.extend(encode(3, &GuestMessage::ConfigApplied).unwrap());
    let frames = decode_in_pieces::<GuestMessage>(&stream, &[1 << 14]);
    assert_eq!(frames.len(), 2);
    assert_eq!(frames[0], Err(FrameError::Overlong));
    assert_eq!(frames[1], Ok(Frame { session: 3, message: GuestMessage::ConfigApplied }));
}

#[test]
fn another_version_of_the_protocol_is_named() {
    let mut plain = vec![99];
    plain.extend(7u64.to_le_bytes());
    let mut wire = cobs::encode_vec(&plain);
    wire.push(frame::DELIMITER);
    let frames = decode_in_pieces::<HostMessage>(&wire, &[64]);
    assert_eq!(frames, [Err(FrameError::Version { version: 99 })]);
}

#[test]
fn the_wire_format_of_version_1_does_not_change() {
    let sync = encode(0x0102, &HostMessage::Sync { log_after: 5 }).unwrap();
    // Version 1, the session in little endian, the first message with its only field; then the delimiter.
    let plain = [1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 5];
    assert_eq!(cobs::decode_vec(&sync[..sync.len() - 1]).unwrap(), plain);
    assert_eq!(sync, [4, 1, 2, 1, 1, 1, 1, 1, 1, 1, 2, 5, 0]);
}

#[test]
fn the_wire_format_of_version_2_does_not_change() {
    let plain = |wire: Vec<u8>| cobs::decode_vec(&wire[..wire.len() - 1]).unwrap();
    let size = TerminalSize { rows: 24, columns: 80 };
    let terminal = Some(Terminal { kind: "vt".into(), size });
    let start = ExecAsk::Start { argv: vec!["ls".into()], terminal };
    let host = |ask| plain(encode(1, &HostMessage::Exec { id: 7, ask }).unwrap());
    // Version 2, the session, the sixth message, the program, what is asked.
    let head = [2, 1, 0, 0, 0, 0, 0, 0, 0, 5, 7];
    let begins = |tail: &[u8]| [&head, tail].concat();
    assert_eq!(host(start), begins(&[0, 1, 2, b'l', b's', 1, 2, b'v', b't', 24, 80]));
    assert_eq!(host(ExecAsk::Input(vec![9])), begins(&[1, 1, 9]));
    assert_eq!(host(ExecAsk::InputEnds), begins(&[2]));
    assert_eq!(host(ExecAsk::Resize(size)), begins(&[3, 24, 80]));
    assert_eq!(host(ExecAsk::Signal(ExecSignal::Hup)), begins(&[4, 3]));
    assert_eq!(host(ExecAsk::Room(5)), begins(&[5, 5]));
    assert_eq!(host(ExecAsk::HangUp { kill: true }), begins(&[6, 1]));
    let guest = |news| plain(encode(1, &GuestMessage::Exec { id: 7, news }).unwrap());
    let head = [2, 1, 0, 0, 0, 0, 0, 0, 0, 8, 7];
    let begins = |tail: &[u8]| [&head, tail].concat();
    assert_eq!(guest(ExecNews::Started), begins(&[0]));
    assert_eq!(guest(ExecNews::Refused { reason: "x".into() }), begins(&[1, 1, b'x']));
    let output = ExecNews::Output { stream: ExecStream::Stderr, bytes: vec![4] };
    assert_eq!(guest(output), begins(&[2, 1, 1, 4]));
    assert_eq!(guest(ExecNews::Room(5)), begins(&[3, 5]));
    assert_eq!(guest(ExecNews::Ended(ExitStatus::Code(1))), begins(&[4, 0, 2]));
    assert_eq!(
        plain(encode(1, &GuestMessage::Speaks { version: 2 }).unwrap()),
        [2, 1, 0, 0, 0, 0, 0, 0, 0, 7, 2]
    );
}

#[test]
fn i14_a_message_is_read_in_the_version_that_it_came_with_and_no_other() {
    // What version 1 had stays in frames of version 1, so that peers of an earlier release read it.
    let old = encode(1, &GuestMessage::Ready { uptime_ms: 1 }).unwrap();
    let new = encode(1, &GuestMessage::Speaks { version: 2 }).unwrap();
    for (wire, version) in [(old, 1), (new, 2)] {
        let mut plain = cobs::decode_vec(&wire[..wire.len() - 1]).unwrap();
        assert_eq!(plain[0], version);
        plain[0] = 3 - version;
        let mut wire = cobs::encode_vec(&plain);
        wire.push(frame::DELIMITER);
        let frames = decode_in_pieces::<GuestMessage>(&wire, &[64]);
        assert!(matches!(frames[..], [Err(FrameError::Malformed { .. })]), "{frames:?}");
    }
}

#[test]
fn i14_a_peer_that_breaks_the_rules_of_a_window_is_told_apart() {
    let mut granting = Granting::default();
    assert_eq!(granting.arrived(WINDOW_BYTES as usize), Ok(()));
    assert_eq!(granting.arrived(1), Err(Overrun));
    assert_eq!(granting.arrived(usize::MAX), Err(Overrun));
    let mut spending = Spending::default();
    assert_eq!(spending.granted(1), Err(Overrun));
    spending.spend(5);
    assert_eq!(spending.granted(u32::MAX), Err(Overrun));
    assert_eq!(spending.granted(5), Ok(()));
}

#[test]
fn i10_what_goes_through_a_program_is_not_shown() {
    let argv = vec!["s3cret".to_owned()];
    let shown = format!(
        "{:?} {:?} {:?}",
        HostMessage::Exec { id: 1, ask: ExecAsk::Start { argv, terminal: None } },
        HostMessage::Exec { id: 1, ask: ExecAsk::Input(b"s3cret".to_vec()) },
        GuestMessage::Exec {
            id: 1,
            news: ExecNews::Output { stream: ExecStream::Stdout, bytes: b"s3cret".to_vec() }
        },
    );
    assert!(!shown.contains("s3cret") && !shown.contains("115, 51"), "{shown}");
}

#[test]
fn a_configuration_beyond_the_bound_is_refused_before_it_is_sent() {
    let refused = config_parts::split(&config(CONFIG_BYTES_MAX, vec![])).unwrap_err();
    assert!(matches!(refused, ConfigError::TooLarge { .. }), "{refused}");
}

#[test]
fn i10_secrets_are_redacted_when_shown() {
    let config = config(3, vec![]);
    assert!(format!("{config:?}").contains("Secrets(0 keys, 3 bytes, redacted)"), "{config:?}");
    assert!(!format!("{config:?}").contains("115, 115, 115"));
    let part = &config_parts::split(&config).unwrap()[0];
    assert!(format!("{part:?}").contains("redacted"), "{part:?}");
}

#[test]
fn a_full_log_buffer_drops_the_oldest_lines_and_says_how_many() {
    let mut buffer = LogBuffer::new();
    for _ in 0..BUFFER_LINES_MAX + 5 {
        buffer.push(LogStream::Stdout, 0, b"x".to_vec(), false);
    }
    assert_eq!((buffer.first_seq(), buffer.dropped()), (6, 5));
    assert_eq!(buffer.peek().unwrap().seq, 6);
    // What was sent before it goes is not lost.
    buffer.advance();
    buffer.push(LogStream::Stdout, 0, b"x".to_vec(), false);
    assert_eq!((buffer.first_seq(), buffer.dropped()), (7, 5));
    // The other bound.
    for _ in 0..BUFFER_BYTES_MAX / LINE_BYTES_MAX + 1 {
        buffer.push(LogStream::Stderr, 0, vec![b'x'; LINE_BYTES_MAX], false);
    }
    assert!(buffer.first_seq() as usize > BUFFER_LINES_MAX);
}
