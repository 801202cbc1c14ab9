//! `cargo xtask sim`: whole clusters in one thread from one seed; what it is and finds is in
//! `docs/testing/simulation.md`.

use crate::step::{Failure, run as run_command};
use crate::workspace::cargo;
use std::process::Command;

/// Crates that a run spends its time in: openraft's code is compiled into ours, and unoptimised it takes five times as
/// long. Everything else is as the tests build it, and so is built once.
const OPTIMISED: [&str; 9] =
    ["api", "client", "edge", "faulty-disk", "model", "raft", "sim", "snapshots", "store"];

/// Builds the simulator and hands it the arguments.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut command = optimised(&["run", "--quiet", "--locked", "--package", "holdfast-sim"]);
    if arguments.iter().any(|argument| argument == "--plant") {
        command.args(["--features", "planted-bugs"]);
    }
    run_command(command.arg("--").args(arguments))
}

/// The simulator's own tests, in a build with planted bugs: each must be found.
pub(crate) fn planted_bugs() -> Command {
    optimised(&[
        "test",
        "--locked",
        "--package",
        "holdfast-sim",
        "--features",
        "planted-bugs",
        "--no-fail-fast",
    ])
}

fn optimised(arguments: &[&str]) -> Command {
    let mut command = cargo(arguments);
    for name in OPTIMISED {
        command.arg("--config").arg(format!("profile.dev.package.holdfast-{name}.opt-level=1"));
    }
    command
}
