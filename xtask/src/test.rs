//! `cargo xtask test`: everything that must hold before a change lands.

use crate::step::{self, Failure, step};
use crate::workspace::{self, cargo};
use crate::{fuzz, openapi, sim};
use std::process::Command;

/// How long each fuzz target runs here; longer runs are for `cargo xtask fuzz`.
const FUZZ_SECONDS: u32 = 10;

/// Seeds of the simulation that run here; more are for `cargo xtask sim`.
const SIM_SEEDS: &str = "1000";

/// Runs everything; `arguments` after `--` go to the tests.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let arguments = arguments.strip_prefix(&["--".to_owned()]).unwrap_or(arguments);
    step("check the format", || step::run(&mut cargo(&["fmt", "--all", "--check"])))?;
    workspace::build_assets()?;
    step("lint", || {
        let lint = ["clippy", "--workspace", "--all-targets", "--locked", "--", "--deny", "warnings"];
        step::run(&mut cargo(&lint))
    })?;
    step("build the docs", || {
        let docs =
            ["doc", "--workspace", "--no-deps", "--locked", "--document-private-items", "--keep-going"];
        step::run(
            cargo(&docs).env("RUSTDOCFLAGS", "--deny warnings --allow rustdoc::private-intra-doc-links"),
        )
    })?;
    workspace::build_programs()?;
    step("check docs/reference/openapi.json", || openapi::run(&["--check".to_owned()]))?;
    step("test", || step::run(&mut tests(arguments)))?;
    firecracker()?;
    step("simulate", || sim::run(&["--seeds".to_owned(), SIM_SEEDS.to_owned()]))?;
    step("find planted bugs", || step::run(&mut sim::planted_bugs()))?;
    step("fuzz", || fuzz::all(FUZZ_SECONDS, fuzz::SEED_DEFAULT))
}

/// The real Firecracker, where one is named. Where not, that is said: a suite that is silent about it looks complete.
fn firecracker() -> Result<(), Failure> {
    if std::env::var_os("HOLDFAST_FIRECRACKER").is_none() {
        println!(
            "xtask: NOT RUN: requests to a real Firecracker and its jailer, because HOLDFAST_FIRECRACKER names no program. \
             Their shapes were checked against its published API."
        );
        return Ok(());
    }
    step("ask a real Firecracker", || {
        let test = [
            "test",
            "--workspace",
            "--locked",
            "--test",
            "firecracker_api",
            "--",
            "--ignored",
            "--nocapture",
        ];
        step::run(cargo(&test).env("HOLDFAST_ASSETS", workspace::assets()))
    })
}

/// All tests but the simulator's, which has a profile of its own.
fn tests(arguments: &[String]) -> Command {
    let mut command =
        cargo(&["test", "--workspace", "--exclude", "holdfast-sim", "--locked", "--no-fail-fast"]);
    command.env("HOLDFAST_ASSETS", workspace::assets());
    command.env("HOLDFAST_BIN", workspace::target().join("debug/holdfast"));
    if !arguments.is_empty() {
        command.arg("--").args(arguments);
    }
    command
}
