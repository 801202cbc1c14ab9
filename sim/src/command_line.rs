//! The command line: one seed in this process, or many, each in a process of its own.

use std::path::PathBuf;
use std::process::ExitCode;

use crate::many_seeds::ManySeeds;
use crate::{machine, run};

const USAGE: &str = "\
Usage: holdfast-sim --seed N [--trace FILE] [--plant BUG]
       holdfast-sim --seeds N [--from N] [--plant BUG] [--until-failure]

  --seed N          runs the cluster of one seed
  --trace FILE      writes what happened, line by line
  --seeds N         runs so many seeds, two at a time
  --from N          the first of them; 1 when not given
  --until-failure   stops at the first seed that fails
  --plant BUG       runs with a bug planted on purpose; only in a build with the feature planted-bugs

The log of the members is printed at the level that HOLDFAST_SIM_LOG names.
";

/// Between a seed's number and how often each kind of thing happened in it.
pub(crate) const HAPPENED: &str = ": happened: ";

#[derive(Default)]
struct Options {
    seed: Option<u64>,
    seeds: Option<u64>,
    from: u64,
    trace: Option<PathBuf>,
    plant: Option<String>,
    until_failure: bool,
}

pub(crate) fn main() -> ExitCode {
    let options = match parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(reason) => {
            eprint!("holdfast-sim: {reason}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let done = match (options.seed, options.seeds) {
        (Some(seed), None) => one(seed, &options),
        (None, Some(seeds)) => {
            let plant = options.plant.as_deref();
            ManySeeds { from: options.from, seeds, plant, until_failure: options.until_failure }.run()
        }
        _ => Err("name either a seed or how many seeds to run; see `holdfast-sim --help`".to_owned()),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(reason) => {
            eprintln!("holdfast-sim: {reason}");
            ExitCode::from(2)
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { from: 1, ..Options::default() };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--seed" => options.seed = Some(number(&value()?)?),
            "--seeds" => options.seeds = Some(number(&value()?)?),
            "--from" => options.from = number(&value()?)?,
            "--trace" => options.trace = Some(value()?.into()),
            "--plant" => options.plant = Some(value()?),
            "--until-failure" => options.until_failure = true,
            _ => return Err(format!("«{argument}» is not understood")),
        }
    }
    Ok(options)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("«{text}» is not a whole number"))
}

fn one(seed: u64, options: &Options) -> Result<bool, String> {
    if let Ok(filter) = std::env::var("HOLDFAST_SIM_LOG") {
        tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
    }
    if let Some(bug) = &options.plant {
        plant(bug)?;
    }
    machine::keep_memory();
    let report = run::run(seed, options.trace.as_deref()).map_err(|error| error.to_string())?;
    println!("seed {seed}: {}", report.summary);
    println!("seed {seed}: trace of {} lines, {}", report.lines, report.digest);
    println!("seed {seed}{HAPPENED}{}", report.happened);
    match report.verdict {
        Ok(()) => Ok(true),
        Err(failure) => {
            println!("seed {seed}: FAILED: {failure}");
            Ok(false)
        }
    }
}

#[cfg(feature = "planted-bugs")]
fn plant(bug: &str) -> Result<(), String> {
    let planted = holdfast_raft::planted::plant(bug)
        || holdfast_store::planted::plant(bug)
        || holdfast_client::planted::plant(bug);
    if planted { Ok(()) } else { Err(format!("there is no bug «{bug}» to plant")) }
}

#[cfg(not(feature = "planted-bugs"))]
fn plant(bug: &str) -> Result<(), String> {
    Err(format!("this build has no bug «{bug}»; `cargo xtask sim --plant` makes one that has"))
}
