//! Where things are in the repository, and how its parts are built. One profile for everything: dev.

use crate::packages;
use crate::step::{Failure, run, step};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Where cargo builds to.
pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Where assets are put.
pub(crate) fn assets() -> PathBuf {
    target().join("assets")
}

/// A cargo command, in the repository's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).args(arguments);
    command
}

/// Builds what microVMs boot from.
pub(crate) fn build_assets() -> Result<(), Failure> {
    packages::ensure()?;
    crate::assets::build()
}

/// Builds the `holdfast` binary and the demo's program. Of the whole workspace, so that dependencies get the features
/// that they have in the tests, and are built once.
pub(crate) fn build_programs() -> Result<(), Failure> {
    step("build holdfast and the demo", || run(&mut cargo(&["build", "--locked", "--workspace", "--bins"])))?;
    // The demo and the tests run without a network: what their tenant's app needs is built before.
    step("build the demo's app", || run(Command::new(target().join("debug/demo")).arg("build-app")))
}
