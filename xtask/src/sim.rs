//! `cargo xtask sim`: whole clusters in one thread from one seed; what it is and finds is in
//! `docs/testing/simulation.md`.

use crate::step::{Failure, run as run_command};
use crate::workspace::cargo;

/// Builds the simulator and hands it the arguments.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut command = cargo(&["run", "--quiet", "--locked", "--profile", "sim", "--package", "holdfast-sim"]);
    if arguments.iter().any(|argument| argument == "--plant") {
        command.args(["--features", "planted-bugs"]);
    }
    run_command(command.arg("--").args(arguments))
}
