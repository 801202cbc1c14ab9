//! Each bug that is planted on purpose is found within a bounded number of seeds. Built only with the feature
//! `planted-bugs`; docs/testing/simulation.md says what the bugs are and how many seeds each took.

// A test that cannot go on says so by a panic.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Runs up to so many seeds with a bug; one of them must fail, by a check whose words are among these.
fn is_found(bug: &str, seeds_max: u32, by: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_holdfast-sim"))
        .args(["--seeds", &seeds_max.to_string(), "--plant", bug, "--until-failure"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{bug} was not found in {seeds_max} seeds: {said}");
    let failures: Vec<&str> = said.lines().filter(|line| line.contains("FAILED: ")).collect();
    assert!(!failures.is_empty(), "{said}");
    for failure in failures {
        assert!(
            by.iter().any(|words| failure.contains(words)),
            "{bug} was found by something else: {failure}"
        );
    }
}

/// By members that disagree about the state.
const DIGESTS: &str = "I1: ";
/// By a task that panicked: openraft compares its log and votes with what it was promised.
const PANIC: &str = "I14: ";
/// By an acknowledged write that is gone.
const LOST: &str = "I2: ";
/// By a request that was told two things, or was carried out twice.
const TWICE: &str = "I4: ";
/// By a read of what was over.
const STALE: &str = "I3: ";
/// By a follower of the history: a gap, other events, or a history that is said to end too early.
const WATCH: &str = "watch: ";
/// By a member that stops although its disk is well.
const STOPPED: &str = "stopped although its disk is well";

/// By an edge whose table went back.
const BACK: &str = "I6: ";
/// By an edge whose table changed although nothing was said.
const UNTOLD: &str = "I5: ";
/// By an edge whose table the history does not have.
const NEVER: &str = "I8: ";

#[test]
fn i06_an_edge_that_obeys_an_older_revision_is_found() {
    is_found("edge-obeys-older-revision", 40, &[BACK, UNTOLD]);
}

#[test]
fn i06_a_table_before_it_is_durable_is_found() {
    is_found("publish-before-durable", 40, &[BACK]);
}

#[test]
fn i05_a_lost_stream_that_counts_as_empty_is_found() {
    is_found("lost-stream-is-empty", 40, &[UNTOLD, NEVER]);
}

#[test]
fn i02_an_acknowledgement_before_fsync_is_found() {
    is_found("ack-before-fsync", 40, &[PANIC, LOST, DIGESTS, WATCH, STOPPED]);
}

#[test]
fn i03_a_read_without_the_lease_check_is_found() {
    is_found("read-without-check", 40, &[STALE, WATCH]);
}

#[test]
fn i04_a_snapshot_without_outcomes_is_found() {
    is_found("drop-outcomes-on-snapshot", 40, &[DIGESTS, TWICE]);
}

#[test]
fn i01_entries_applied_out_of_order_are_found() {
    is_found("apply-out-of-order", 40, &[DIGESTS, TWICE, STALE, WATCH]);
}

#[test]
fn i02_a_forgotten_vote_is_found() {
    is_found("forget-vote", 40, &[PANIC, LOST, DIGESTS, WATCH, STOPPED]);
}
