//! `cargo xtask demo`: builds, then runs the demo's program (`tests/src/bin/demo.rs`), which makes its own network.

use crate::step::{self, Failure, step};
use crate::workspace;
use std::process::Command;

/// Builds and runs the demo.
pub(crate) fn run() -> Result<(), Failure> {
    workspace::build_assets()?;
    workspace::build_programs()?;
    step("demo", || {
        let program = workspace::target().join("debug/demo");
        step::run(
            Command::new(program).env("HOLDFAST_ASSETS", workspace::assets()).current_dir(workspace::root()),
        )
    })
}
