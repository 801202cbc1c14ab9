//! What a real guest writes, hostile and without measure, and what the node keeps of it.
//!
//! Needs what `cargo xtask assets` makes and installs, and root. Each test has namespaces of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "shared with the tests of single machines")]
mod guest_image;
mod namespace;
#[allow(dead_code, reason = "shared with the tests of outages")]
mod scene;

use std::fs;
use std::path::Path;

use data_encoding::BASE64;
use holdfast_model::agent::LogStream;
use holdfast_model::logs::{LogEntry, LogStart};
use holdfast_node::logs::Ring;
use scene::{SECRET, Scene, until, was_agent};

/// Lines of the flood: more than a guest holds for an agent that is gone.
const FLOOD_LINES: u64 = 60_000;

/// Everything that is stored, as it is stored.
fn on_disk(folder: &Path) -> String {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| String::from_utf8_lossy(&fs::read(file).unwrap()).into_owned()).collect()
}

fn everything(ring: &Ring) -> Vec<LogEntry> {
    let (mut entries, mut start) = (Vec::new(), LogStart::default());
    loop {
        let chunk = ring.chunk(&start, 1 << 20).unwrap();
        assert_eq!(chunk.missed, 0);
        entries.extend(chunk.entries);
        start = LogStart { after: Some(chunk.next), ..LogStart::default() };
        if !chunk.more {
            return entries;
        }
    }
}

#[test]
fn i05_i10_i14_whatever_a_guest_writes_is_kept_once_or_counted_and_secrets_are_not() {
    const TEST: &str = "i05_i10_i14_whatever_a_guest_writes_is_kept_once_or_counted_and_secrets_are_not";
    if was_agent() || !namespace::inside(TEST) {
        return;
    }
    let mut scene = Scene::new(TEST);
    let mut one = scene.instance(1);
    let script = format!(
        r#"i=0; while [ $i -lt 300 ]; do echo line $i; i=$((i+1)); done
           printf 'bin\377\033[2J\033]0;title\007\n'
           echo "the password is {SECRET}, remember"
           printf '%016380d{SECRET}tail\n' 0
           echo before the flood >&2
           seq 1 {FLOOD_LINES}
           echo end
           sleep 10000"#
    );
    one.command = Some(["sh", "-c", &script].map(str::to_owned).to_vec());
    one.health = None;
    scene.desire(std::slice::from_ref(&one));
    let folder = scene.data_dir().join("logs").join(one.id.to_string());
    let agent = scene.agent_that_knows_a_secret(one.id);
    until("the flood begins", || folder.is_dir() && on_disk(&folder).contains("before the flood"));
    agent.kill();
    let agent = scene.agent_that_knows_a_secret(one.id);
    until("the last line is there", || on_disk(&folder).contains(r#""text":"end""#));
    agent.stop();

    let text = on_disk(&folder);
    assert!(!text.contains(&SECRET[..12]) && !text.contains(&SECRET[SECRET.len() - 12..]), "I10");
    let entries = everything(&Ring::open(folder).unwrap());
    let stdout: Vec<&LogEntry> = entries.iter().filter(|e| e.stream == LogStream::Stdout).collect();
    for (n, entry) in stdout.iter().take(300).enumerate() {
        assert_eq!(entry.text, format!("line {n}"), "each once, in order");
    }
    let binary = b"bin\xff\x1b[2J\x1b]0;title\x07";
    assert_eq!(stdout[300].base64.as_deref(), Some(BASE64.encode(binary).as_str()));
    assert_eq!(stdout[301].text, "the password is [redacted], remember");
    // The line is longer than a piece, and the secret lies over the cut: not even a part of it is there.
    let (head, rest) = (stdout[302], stdout[303]);
    assert!(head.continues && !rest.continues, "{head:?}");
    assert_eq!(
        format!("{}{}", head.text, rest.text).trim_start_matches('0').replace("[redacted]", ""),
        "tail"
    );
    // Of the flood nothing is there twice, and what is not there was counted.
    let flood: Vec<u64> = stdout.iter().skip(304).filter_map(|entry| entry.text.parse().ok()).collect();
    assert!(flood.is_sorted_by(|a, b| a < b), "no line comes twice");
    let dropped: u64 = entries.iter().map(|entry| entry.dropped).sum();
    assert_eq!(flood.len() as u64 + dropped, FLOOD_LINES);
    let told =
        entries.iter().find(|entry| entry.dropped > 0).expect("a guest whose agent was gone lost nothing");
    assert!(told.text.starts_with(&format!("{} lines dropped", told.dropped)), "{told:?}");
    assert_eq!(stdout.last().unwrap().text, "end");
    assert_eq!(scene.wipe(), 1);
}
