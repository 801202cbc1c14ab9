//! `cargo xtask sim`: whole clusters in one thread from one seed; what it is and finds is in
//! `docs/testing/simulation.md`.

use crate::step::{Failure, run as run_command};
use crate::workspace::cargo;

/// Crates that a run spends its time in: openraft's code is compiled into ours, and unoptimised it takes five times as
/// long.
const OPTIMISED: [&str; 6] = ["faulty-disk", "model", "raft", "sim", "snapshots", "store"];

/// Builds the simulator and hands it the arguments.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut command = cargo(&["run", "--quiet", "--locked", "--package", "holdfast-sim"]);
    for name in OPTIMISED {
        command.arg("--config").arg(format!("profile.dev.package.holdfast-{name}.opt-level=1"));
    }
    if arguments.iter().any(|argument| argument == "--plant") {
        command.args(["--features", "planted-bugs"]);
    }
    run_command(command.arg("--").args(arguments))
}
