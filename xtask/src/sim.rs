//! `cargo xtask sim`: whole clusters in one thread from one seed; what it is and finds is in
//! `docs/testing/simulation.md`.

use crate::step::{Failure, run as run_command};
use crate::workspace::cargo;
use std::process::Command;

/// Crates that a run spends its time in: openraft's code is compiled into ours, and unoptimised it takes five times as
/// long. Everything else is as the tests build it, and so is built once.
const OPTIMISED: [&str; 10] =
    ["api", "client", "edge", "faulty-disk", "model", "node", "raft", "sim", "snapshots", "store"];

/// How much they are optimised.
const LEVEL: u8 = 1;
/// The same when so many seeds run that a longer build pays: a seed then takes four fifths of the time.
const LEVEL_FOR_MANY_SEEDS: u8 = 3;
/// From how many seeds on it does.
const MANY_SEEDS: u64 = 5_000;

/// How many seeds are to run, if many are.
fn seeds(arguments: &[String]) -> Option<u64> {
    let at = arguments.iter().position(|argument| argument == "--seeds")?;
    arguments.get(at + 1)?.parse().ok()
}

/// Builds the simulator and hands it the arguments.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let many = seeds(arguments).is_some_and(|seeds| seeds >= MANY_SEEDS);
    let level = if many { LEVEL_FOR_MANY_SEEDS } else { LEVEL };
    let mut command = optimised(level, &["run", "--quiet", "--locked", "--package", "holdfast-sim"]);
    if arguments.iter().any(|argument| argument == "--plant") {
        command.args(["--features", "planted-bugs"]);
    }
    run_command(command.arg("--").args(arguments))
}

/// The simulator's own tests, in a build with planted bugs: each must be found.
pub(crate) fn planted_bugs() -> Command {
    let package = ["--package", "holdfast-sim", "--features", "planted-bugs"];
    optimised(LEVEL, &[&["test", "--locked", "--no-fail-fast"], &package[..]].concat())
}

fn optimised(level: u8, arguments: &[&str]) -> Command {
    let mut command = cargo(arguments);
    for name in OPTIMISED {
        command.arg("--config").arg(format!("profile.dev.package.holdfast-{name}.opt-level={level}"));
    }
    command
}
