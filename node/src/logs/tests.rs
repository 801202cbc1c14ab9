use std::fs::{self, OpenOptions};
use std::io::Write;

use holdfast_model::agent::LogStream;
use holdfast_model::logs::{LogChunk, LogCursor, LogEntry, LogStart};
use proptest::prelude::*;

use super::read::ANSWER_BYTES_MAX;
use super::retention::{ENDED_MAX, INSTANCE_BYTES_MIN, Retention, SEGMENTS};
use super::*;

const EVERYTHING: LogStart = LogStart { after: None, since_ms: 0, tail: None };

fn line(guest_seq: u64, text: impl Into<Vec<u8>>) -> Line {
    Line {
        time_ms: now_ms(),
        stream: LogStream::Stderr,
        guest_seq,
        bytes: text.into(),
        continues: false,
        dropped: 0,
    }
}

fn small() -> Retention {
    Retention { instance_bytes: INSTANCE_BYTES_MIN, node_bytes: 5 << 20, ..Retention::default() }
}

fn id(n: usize) -> InstanceId {
    InstanceId::from_bits(n as u128)
}

fn texts(entries: &[LogEntry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.text.as_str()).collect()
}

fn after(cursor: LogCursor) -> LogStart {
    LogStart { after: Some(cursor), ..EVERYTHING }
}

/// Everything from a place on, in small answers.
fn all(ring: &Ring, mut start: LogStart) -> (Vec<LogEntry>, u64, LogCursor) {
    let (mut entries, mut missed) = (Vec::new(), 0);
    loop {
        let chunk = ring.chunk(&start, 4_096).unwrap();
        entries.extend(chunk.entries);
        missed += chunk.missed;
        start = after(chunk.next);
        if !chunk.more {
            return (entries, missed, chunk.next);
        }
    }
}

/// Bytes of segments on the disk.
fn on_disk(folder: &std::path::Path) -> u64 {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let meta = entry.metadata().unwrap();
        if meta.is_dir() {
            bytes += on_disk(&entry.path());
        } else if entry.path().extension().is_some_and(|suffix| suffix == "jsonl") {
            bytes += meta.len();
        }
    }
    bytes
}

#[test]
fn i05_lines_and_numbers_survive_a_restart_and_a_cursor_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ring");
    let ring = Ring::open(path.clone()).unwrap();
    ring.begin_life(1, "started").unwrap();
    ring.append(&[line(1, "one"), line(2, "two")]).unwrap();
    let (entries, missed, cursor) = all(&ring, EVERYTHING);
    assert_eq!((texts(&entries), missed), (vec!["started", "one", "two"], 0));
    drop(ring);
    let ring = Ring::open(path.clone()).unwrap();
    assert_eq!((ring.last_seq(), ring.guest_seq()), (3, 2));
    ring.append(&[Line::remark(1, "a remark"), line(5, "five")]).unwrap();
    let (entries, missed, end) = all(&ring, after(cursor));
    assert_eq!((texts(&entries), missed), (vec!["a remark", "five"], 0), "neither lost nor repeated");
    assert_eq!(
        ring.chunk(&after(end), 4_096).unwrap(),
        LogChunk { entries: vec![], next: end, missed: 0, more: false }
    );
    assert_eq!(ring.read(None, 1).unwrap()[0].text, "five");
    ring.begin_life(2, "started again").unwrap();
    drop(ring);
    assert_eq!(Ring::open(path).unwrap().guest_seq(), 0);
}

#[test]
fn a_reader_begins_where_it_asked_to() {
    let folder = tempfile::tempdir().unwrap();
    let ring = Ring::open(folder.path().join("ring")).unwrap();
    for n in 1..=10_u64 {
        ring.append(&[Line { time_ms: n * 100, ..line(n, format!("{n}")) }]).unwrap();
    }
    let read = |start| texts(&ring.chunk(&start, 1 << 20).unwrap().entries).join(" ");
    assert_eq!(read(LogStart { tail: Some(3), ..EVERYTHING }), "8 9 10");
    assert_eq!(read(LogStart { since_ms: 650, ..EVERYTHING }), "7 8 9 10");
    assert_eq!(read(LogStart { since_ms: 650, tail: Some(2), ..EVERYTHING }), "9 10");
    assert_eq!(read(LogStart { since_ms: 950, tail: Some(9), ..EVERYTHING }), "10");
    assert_eq!(read(LogStart { since_ms: 1_001, ..EVERYTHING }), "");
    assert_eq!(read(LogStart { tail: Some(0), ..EVERYTHING }), "");
    // A cursor that was never given out leads nowhere beyond the end.
    let epoch = ring.chunk(&EVERYTHING, 1).unwrap().next.epoch;
    let chunk = ring.chunk(&after(LogCursor { epoch, seq: 99 }), 1).unwrap();
    assert_eq!((chunk.next.seq, chunk.entries.len(), chunk.missed), (10, 0, 0));
}

#[test]
fn a_ring_stays_bounded_keeps_the_newest_and_says_what_it_lost() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ring");
    let logs = Logs::open_with(path.clone(), small()).unwrap();
    let ring = logs.ring(id(1)).unwrap();
    let cursor = ring.chunk(&EVERYTHING, 1).unwrap().next;
    let text = "x".repeat(16 * 1024);
    for guest_seq in 1..=1_500 {
        ring.append(&[line(guest_seq, text.clone())]).unwrap();
        assert!(ring.stats().bytes <= INSTANCE_BYTES_MIN + 17 * 1024, "{:?}", ring.stats());
    }
    let bytes = on_disk(&path);
    assert_eq!((ring.stats().bytes, logs.used_bytes()), (bytes, bytes));
    assert!(bytes > INSTANCE_BYTES_MIN * (SEGMENTS - 2) / SEGMENTS, "{bytes}");
    let first = ring.chunk(&after(cursor), ANSWER_BYTES_MAX).unwrap();
    assert!(first.entries.len() * text.len() <= ANSWER_BYTES_MAX && first.more);
    let (entries, missed, end) = all(&ring, after(cursor));
    assert_eq!((end.seq, missed + entries.len() as u64), (1_500, 1_500), "every line is there or told of");
    assert_eq!(ring.stats().evicted, missed);
    assert!(entries.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
    // Newlines, quotes and control characters take the most room.
    let worst = "\u{1}".repeat(16 * 1024);
    for guest_seq in 1_501..=1_600 {
        ring.append(&vec![line(guest_seq, worst.clone()); 3]).unwrap();
        assert!(ring.stats().bytes <= INSTANCE_BYTES_MIN + 100 * 1024, "{:?}", ring.stats());
    }
}

#[test]
fn all_rings_together_are_bounded_and_who_floods_pays() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Logs::open_with(folder.path().join("logs"), small()).unwrap();
    let text = vec![b'x'; 16 * 1024];
    let fill = |n: usize, lines: usize| {
        let ring = logs.ring(id(n)).unwrap();
        for _ in 0..lines {
            ring.append(&[line(0, text.clone())]).unwrap();
            assert!(logs.used_bytes() <= small().node_bytes, "{}", logs.used_bytes());
        }
    };
    // Two that ended, one that is quiet, and floods.
    fill(1, 100);
    fill(2, 20);
    logs.keep(&BTreeSet::from([id(3), id(4), id(5), id(6)]));
    logs.sweep().unwrap();
    fill(3, 1);
    for n in [4, 5, 6] {
        fill(n, 300);
    }
    let left = |n: usize| folder.path().join("logs").join(id(n).to_string()).exists();
    assert!(!left(1), "what ended goes first");
    assert_eq!(logs.ring(id(3)).unwrap().read(None, 10).unwrap().len(), 1, "the quiet one lost nothing");
    assert_eq!(logs.used_bytes(), on_disk(folder.path()));
    // What is read anew from the disk is the same.
    drop(logs);
    let logs = Logs::open_with(folder.path().join("logs"), small()).unwrap();
    assert_eq!(logs.used_bytes(), on_disk(folder.path()));
}

#[test]
fn a_ring_that_must_give_everything_keeps_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ring");
    let ring = Ring::open(path.clone()).unwrap();
    ring.append(&[line(1, "one"), line(2, "two")]).unwrap();
    let cursor = ring.chunk(&EVERYTHING, 1 << 20).unwrap().next;
    ring.append(&[line(3, "three")]).unwrap();
    ring.drop_oldest("for this test").unwrap();
    drop(ring);
    let ring = Ring::open(path).unwrap();
    assert_eq!((ring.last_seq(), ring.guest_seq()), (4, 3));
    let (entries, missed, _) = all(&ring, after(cursor));
    assert_eq!((texts(&entries), missed), (vec!["3 lines dropped: for this test"], 1));
}

#[test]
fn lines_and_logs_of_the_ended_go_with_age() {
    let folder = tempfile::tempdir().unwrap();
    let retention = Retention { age_ms: 14_400_000, ended_ms: 3_600_000, ..Retention::default() };
    let logs = Logs::open_with(folder.path().join("logs"), retention).unwrap();
    let now = now_ms();
    let ring = logs.ring(id(1)).unwrap();
    for age_ms in [18_000_000, 16_200_000, 3_600_000, 0] {
        ring.append(&[Line { time_ms: now - age_ms, ..line(0, format!("{age_ms}")) }]).unwrap();
    }
    logs.sweep().unwrap();
    assert_eq!(texts(&all(&ring, EVERYTHING).0), ["3600000", "0"]);
    let left = |n: usize| folder.path().join("logs").join(id(n).to_string()).exists();
    for (n, age_ms) in [(2, 3_700_000), (3, 3_500_000)] {
        logs.ring(id(n)).unwrap().append(&[Line { time_ms: now - age_ms, ..line(0, "x") }]).unwrap();
    }
    logs.sweep().unwrap();
    assert!(left(2) && left(3), "while it is unknown what is here, nothing has ended");
    logs.keep(&BTreeSet::from([id(1)]));
    logs.sweep().unwrap();
    assert!(left(1) && !left(2) && left(3));
    // The last line goes too, and its number stays.
    ring.drop_older(now + 15_000_000).unwrap();
    assert_eq!((ring.last_seq(), texts(&all(&ring, EVERYTHING).0).len()), (5, 1));
    ring.drop_older(now + 30_000_000).unwrap();
    assert_eq!(ring.last_seq(), 5, "a remark is not replaced by a remark");
}

#[test]
fn i10_what_a_ring_knows_of_secrets_stays_while_its_instance_is_here() {
    let folder = tempfile::tempdir().unwrap();
    let retention = Retention { ended_ms: 1_000, ..Retention::default() };
    let logs = Logs::open_with(folder.path().join("logs"), retention).unwrap();
    logs.keep(&BTreeSet::from([id(1)]));
    logs.sweep().unwrap();
    // One more comes. Nobody holds its ring yet when all are looked through.
    logs.keep(&BTreeSet::from([id(1), id(2)]));
    logs.know_secrets(id(2), [b"hunter22".as_slice()]).unwrap();
    logs.sweep().unwrap();
    let old = Line { time_ms: now_ms() - 10_000, ..line(1, "pw=hunter22") };
    logs.ring(id(2)).unwrap().append(&[old]).unwrap();
    logs.sweep().unwrap();
    assert_eq!(texts(&all(&logs.ring(id(2)).unwrap(), EVERYTHING).0), ["pw=[redacted]"]);
    // And one that ends while the agent goes on is one that ended.
    logs.keep(&BTreeSet::from([id(1)]));
    logs.sweep().unwrap();
    assert!(!folder.path().join("logs").join(id(2).to_string()).exists());
}

#[test]
fn logs_of_the_ended_are_bounded_in_number() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Logs::open(folder.path().join("logs")).unwrap();
    let now = now_ms();
    for n in 0..ENDED_MAX + 10 {
        let at = Line { time_ms: now - 10_000_000 + n as u64, ..line(0, "x") };
        logs.ring(id(n)).unwrap().append(&[at]).unwrap();
    }
    logs.keep(&BTreeSet::from([id(0)]));
    logs.sweep().unwrap();
    let left = |n: usize| folder.path().join("logs").join(id(n).to_string()).exists();
    assert!(left(0), "an instance that is here keeps its ring");
    assert!(!left(1) && !left(9) && left(10) && left(ENDED_MAX + 9));
}

#[test]
fn i14_bytes_that_are_no_text_come_back_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let ring = Ring::open(folder.path().join("ring")).unwrap();
    let binary = [0xff, 0, b'\n', 0x1b, b'[', b'2', b'J'];
    ring.append(&[line(1, binary), line(2, "\u{1b}[31mred")]).unwrap();
    let (entries, ..) = all(&ring, EVERYTHING);
    assert_eq!(entries[0].base64.as_deref(), Some("/wAKG1sySg=="));
    assert_eq!((entries[0].text.as_str(), &entries[1].base64), ("\u{fffd}\0\n\u{1b}[2J", &None));
    assert_eq!(entries[1].text, "\u{1b}[31mred");
}

#[test]
fn i10_a_known_secret_reaches_no_byte_of_the_disk_however_it_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Logs::open(folder.path().to_owned()).unwrap();
    let secret = "correct horse battery staple of some length";
    logs.know_secrets(id(1), [secret.as_bytes()]).unwrap();
    let ring = logs.ring(id(1)).unwrap();
    for cut in 1..secret.len() {
        let (head, tail) = secret.split_at(cut);
        let piece = |text: &str, continues| Line { continues, ..line(0, format!("{cut} {text}")) };
        // The other stream speaks in between.
        let other = Line { stream: LogStream::Stdout, ..line(0, "other") };
        let tail = Line { bytes: tail.into(), ..piece("", false) };
        ring.append(&[piece(head, true), other, tail]).unwrap();
    }
    ring.append(&[line(0, secret), Line::remark(1, format!("ended: {secret}"))]).unwrap();
    drop(ring);
    let mut stored = String::new();
    for entry in fs::read_dir(folder.path().join(id(1).to_string())).unwrap() {
        stored.push_str(&fs::read_to_string(entry.unwrap().path()).unwrap());
    }
    for part in ["correc", "horse", "staple", "length"] {
        assert!(!stored.contains(part), "{part} is on the disk");
    }
    // Of another instance nothing is taken out.
    logs.ring(id(2)).unwrap().append(&[line(0, secret)]).unwrap();
    assert_eq!(logs.ring(id(2)).unwrap().read(None, 1).unwrap()[0].text, secret);
    // More than can be looked for: then nothing is stored in clear.
    let much = vec![b'x'; 2 << 20];
    assert!(logs.know_secrets(id(2), [much.as_slice()]).is_err());
    logs.ring(id(2)).unwrap().append(&[line(0, secret)]).unwrap();
    assert_eq!(logs.ring(id(2)).unwrap().read(None, 1).unwrap()[0].text, "[redacted]");
}

#[test]
fn files_of_an_earlier_build_are_taken_over() {
    let folder = tempfile::tempdir().unwrap();
    let stored = |seq: u64| {
        format!(r#"{{"seq":{seq},"time_ms":1,"stream":"stdout","guest_seq":{seq},"text":"line {seq}"}}"#)
            + "\n"
    };
    fs::write(folder.path().join("older.jsonl"), stored(1) + &stored(2)).unwrap();
    fs::write(folder.path().join("newer.jsonl"), stored(3)).unwrap();
    let ring = Ring::open(folder.path().to_owned()).unwrap();
    assert_eq!((ring.last_seq(), ring.guest_seq()), (3, 3));
    assert_eq!(texts(&all(&ring, EVERYTHING).0), ["line 1", "line 2", "line 3"]);
}

fn call(instance: InstanceId, cursor: Option<LogCursor>, wait_ms: u64) -> AgentCall {
    AgentCall::ReadLogs { instance, start: LogStart { after: cursor, ..EVERYTHING }, bytes: 4_096, wait_ms }
}

async fn answered(logs: &Logs, call: AgentCall) -> LogChunk {
    match logs.answer(&call).await {
        CallAnswer::LogChunk(chunk) => chunk,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_waiting_question_is_answered_by_the_first_line() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Arc::new(Logs::open(folder.path().join("logs")).unwrap());
    assert_eq!(logs.answer(&call(id(1), None, 0)).await, CallAnswer::NotFound);
    let ring = logs.ring(id(1)).unwrap();
    ring.append(&[line(0, "first")]).unwrap();
    let first = answered(&logs, call(id(1), None, 0)).await;
    let waiting = tokio::spawn({
        let logs = Arc::clone(&logs);
        async move {
            let ring = logs.ring(id(1)).unwrap();
            // The answer must come from the line, not from the end of this hour.
            logs.wait(&ring, 1, Duration::from_secs(3_600)).await;
            answered(&logs, call(id(1), Some(first.next), 0)).await
        }
    });
    tokio::task::yield_now().await;
    ring.append(&[line(0, "second")]).unwrap();
    assert_eq!(texts(&waiting.await.unwrap().entries), ["second"]);
    // A member of an earlier build asks otherwise.
    let old = AgentCall::Logs { instance: id(1), after: Some(1), limit: 9, wait_ms: 0 };
    let CallAnswer::Logs(lines) = logs.answer(&old).await else { panic!("not lines") };
    assert_eq!(lines[0].text, "second");
}

#[tokio::test]
async fn questions_that_wait_are_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let logs = Logs::open(folder.path().join("logs")).unwrap();
    let ring = logs.ring(id(1)).unwrap();
    let taken = logs.waiting.try_acquire_many(u32::try_from(WAITING_MAX).unwrap()).unwrap();
    // Would hang if it waited.
    logs.wait(&ring, 0, Duration::from_secs(3_600)).await;
    drop(taken);
    let more = tokio::time::timeout(Duration::from_millis(50), logs.wait(&ring, 0, WAIT_MAX)).await;
    assert!(more.is_err(), "it waits again");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn i14_damage_is_passed_over_and_new_lines_go_on(
        texts in prop::collection::vec("\\PC{0,40}", 1..20),
        cut in 0..2_000u64,
        garbage in prop::collection::vec(any::<u8>(), 0..60),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ring");
        let ring = Ring::open(path.clone()).unwrap();
        for text in &texts {
            ring.append(&[line(0, text.as_str())]).unwrap();
        }
        drop(ring);
        let segment = segment::path(&path, 1);
        let mut file = OpenOptions::new().append(true).open(segment).unwrap();
        let length = file.metadata().unwrap().len();
        file.set_len(length.saturating_sub(cut)).unwrap();
        file.write_all(&garbage).unwrap();
        drop(file);
        let ring = Ring::open(path).unwrap();
        let before = ring.last_seq();
        prop_assert!(before <= texts.len() as u64);
        ring.append(&[line(0, "after the damage")]).unwrap();
        let lines = ring.read(None, 1_000).unwrap();
        let last = lines.last().unwrap();
        prop_assert_eq!((last.seq, last.text.as_str()), (before + 1, "after the damage"));
        for kept in &lines[..lines.len() - 1] {
            prop_assert_eq!(&kept.text, &texts[usize::try_from(kept.seq).unwrap() - 1]);
        }
        let (entries, _, end) = all(&ring, EVERYTHING);
        prop_assert_eq!((end.seq, entries.len()), (before + 1, lines.len()));
    }
}
