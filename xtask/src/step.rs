//! One step of a run: says what it does, runs it, says how long that took.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write;
use std::process::Command;
use std::time::Instant;

/// Why a run ended early, as a sentence.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Runs `body` as a step called `name`.
pub(crate) fn step<T>(name: &str, body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    println!("xtask: {name} …");
    let _ = std::io::stdout().flush();
    let began = Instant::now();
    let outcome = body();
    let seconds = began.elapsed().as_secs_f32();
    match &outcome {
        Ok(_) => println!("xtask: {name}: done in {seconds:.1} s"),
        Err(_) => println!("xtask: {name}: failed after {seconds:.1} s"),
    }
    outcome
}

/// Runs a program to its end, with our own output, and asks that it ends well.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let shown = shown(command);
    let status = command.status().map_err(|e| Failure(format!("cannot start `{shown}`: {e}")))?;
    if status.success() { Ok(()) } else { Err(Failure(format!("`{shown}` ended with {status}"))) }
}

/// The command as a person would type it.
fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
