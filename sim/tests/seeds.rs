//! A handful of seeds, and that a seed means the same run every time. More seeds: `cargo xtask sim --seeds N`.

// A test that cannot go on says so by a panic.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

/// Seeds that run with every test run.
const SEEDS: u64 = 16;
/// The first of them: a round of seeds that no other test uses.
const FIRST: u64 = 516;

fn sim(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_holdfast-sim")).args(arguments).output().unwrap()
}

fn traced(seed: &str, to: &Path) -> String {
    let output = sim(&["--seed", seed, "--trace", to.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_same_seed_gives_the_same_trace_byte_for_byte_and_another_another() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let mut traces = Vec::new();
    for seed in ["5", "13"] {
        let said = traced(seed, &first);
        assert_eq!(said, traced(seed, &second));
        let trace = std::fs::read(&first).unwrap();
        assert!(trace.len() > 100_000, "a trace of {} bytes shows little", trace.len());
        assert!(trace == std::fs::read(&second).unwrap(), "seed {seed} gave two traces");
        traces.push(trace);
    }
    assert!(traces[0] != traces[1], "two seeds gave one trace");
}

#[test]
fn i01_to_i08_hold_in_a_handful_of_seeds_in_which_everything_goes_wrong_that_can() {
    let output = sim(&["--seeds", &SEEDS.to_string(), "--from", &FIRST.to_string()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains(&format!("{SEEDS} seeds in ")), "{said}");
    // A kind of fault that never happens shows nothing.
    let happened = said.lines().find_map(|line| line.strip_prefix("what happened: ")).unwrap();
    let never: Vec<&str> = happened.split(", ").filter(|kind| kind.starts_with("0 ")).collect();
    assert!(never.is_empty(), "in {SEEDS} seeds there were {never:?}");
    assert!(happened.split(", ").count() > 20, "{happened}");
}
