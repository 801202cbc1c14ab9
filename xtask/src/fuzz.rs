//! `cargo xtask fuzz`: libFuzzer over everything that reads bytes from outside, on the stable toolchain.
//!
//! `fuzz/` is a workspace of its own, because its code is instrumented: it shares no build with anything else.

use crate::step::{Failure, run as run_command, step};
use crate::workspace::{cargo, root};
use std::path::PathBuf;
use std::process::Command;

/// The seed of a run that names none: short runs in `cargo xtask test` repeat themselves exactly.
pub(crate) const SEED_DEFAULT: u64 = 7;
/// How long a run that names no time lasts.
const SECONDS_DEFAULT: u32 = 60;
/// The longest input, in bytes: more than any limit below 64 KiB that a parser has.
const INPUT_BYTES_MAX: u32 = 70_000;

/// LLVM's coverage counters and comparison traces, as libFuzzer wants them.
const RUSTFLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing -Cdebug-assertions=on -Coverflow-checks=on \
    -Copt-level=1 -Ccodegen-units=8 -Cdebuginfo=line-tables-only";

/// Runs one target or all of them.
pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut target = None;
    let mut seconds = SECONDS_DEFAULT;
    let mut seed = SEED_DEFAULT;
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "--seconds" => seconds = number(rest.next(), "--seconds")?,
            "--seed" => seed = number(rest.next(), "--seed")?,
            name if !name.starts_with('-') && target.is_none() => target = Some(name.to_owned()),
            other => return Err(Failure(format!("«{other}» is not understood; see `cargo xtask help`"))),
        }
    }
    let Some(target) = target else { return all(seconds, seed) };
    if !targets()?.contains(&target) {
        return Err(Failure(format!(
            "there is no fuzz target «{target}»; there are {}",
            targets()?.join(", ")
        )));
    }
    build()?;
    fuzz(&target, seconds, seed)
}

/// Runs every target in turn.
pub(crate) fn all(seconds: u32, seed: u64) -> Result<(), Failure> {
    build()?;
    for target in targets()? {
        step(&format!("fuzz {target} for {seconds} s, seed {seed}"), || fuzz(&target, seconds, seed))?;
    }
    Ok(())
}

fn number<T: std::str::FromStr>(text: Option<&String>, flag: &str) -> Result<T, Failure> {
    text.and_then(|t| t.parse().ok()).ok_or_else(|| Failure(format!("{flag} needs a whole number")))
}

fn folder() -> PathBuf {
    root().join("fuzz")
}

/// Every file in `fuzz/targets` is a target.
fn targets() -> Result<Vec<String>, Failure> {
    let folder = folder().join("targets");
    let entries = std::fs::read_dir(&folder)
        .map_err(|e| Failure(format!("cannot list the fuzz targets in {}: {e}", folder.display())))?;
    let paths = entries.filter_map(|entry| entry.ok().map(|e| e.path()));
    let rust = paths.filter(|p| p.extension().is_some_and(|x| x == "rs"));
    let mut names: Vec<_> = rust.filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    Ok(names)
}

fn build() -> Result<(), Failure> {
    step("build the fuzz targets", || {
        let mut command = cargo(&["build", "--quiet", "--locked", "--bins"]);
        // A target named outright keeps these flags away from build scripts and macros.
        command.args(["--target", HOST, "--target-dir"]).arg(folder().join("target"));
        run_command(command.current_dir(folder()).env("RUSTFLAGS", RUSTFLAGS))
    })
}

/// What this machine builds for.
const HOST: &str =
    if cfg!(target_arch = "aarch64") { "aarch64-unknown-linux-gnu" } else { "x86_64-unknown-linux-gnu" };

fn fuzz(target: &str, seconds: u32, seed: u64) -> Result<(), Failure> {
    let corpus = folder().join("target/corpus").join(target);
    let artifacts = folder().join("target/artifacts").join(target);
    for made in [&corpus, &artifacts] {
        std::fs::create_dir_all(made).map_err(|e| Failure(format!("cannot make {}: {e}", made.display())))?;
    }
    let mut command = Command::new(folder().join("target").join(HOST).join("debug").join(target));
    command.arg(&corpus);
    let seeds = folder().join("seeds").join(target);
    if seeds.is_dir() {
        command.arg(seeds);
    }
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-seed={seed}"));
    command.arg(format!("-max_len={INPUT_BYTES_MAX}")).args([
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-verbosity=0",
    ]);
    command.arg("-print_final_stats=1");
    run_command(&mut command)
}
