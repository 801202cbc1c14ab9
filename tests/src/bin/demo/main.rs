//! The main job from end to end, in a network of its own: deploy an app, lose the whole control plane, keep serving.
//!
//! `cargo xtask demo` builds everything and runs this. It ends with 0 only if everything that it promises held, and
//! ends everything that it started. `demo build-app` only builds the tenant's app, for which the network may be needed.

mod checks;
mod story;

use holdfast_tests::{netns, oci};
use std::process::ExitCode;

fn main() -> ExitCode {
    match run() {
        Ok(held) if held => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error}");
            let mut source = error.source();
            while let Some(cause) = source {
                eprintln!("  because: {cause}");
                source = cause.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Box<dyn std::error::Error>> {
    let only_build = std::env::args().nth(1).is_some_and(|argument| argument == "build-app");
    if only_build {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(oci::webapp::build_binary())?;
        return Ok(true);
    }
    // Before any thread exists: they all belong into the new network.
    netns::enter()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(story::tell())
}
