//! The command line: one seed in this process, or many, each in a process of its own.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use crate::run;

const USAGE: &str = "\
Usage: holdfast-sim --seed N [--trace FILE] [--plant BUG]
       holdfast-sim --seeds N [--from N] [--plant BUG] [--until-failure]

  --seed N          runs the cluster of one seed
  --trace FILE      writes what happened, line by line
  --seeds N         runs so many seeds, one after the other
  --from N          the first of them; 1 when not given
  --until-failure   stops at the first seed that fails
  --plant BUG       runs with a bug planted on purpose; only in a build with the feature planted-bugs

The log of the members is printed at the level that HOLDFAST_SIM_LOG names.
";

/// How long one seed may take on the real clock before it counts as hung.
const SEED_DEADLINE: Duration = Duration::from_secs(300);
/// Between two looks at a running seed.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

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
        (None, Some(seeds)) => many(seeds, &options),
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
    let report = run::run(seed, options.trace.as_deref()).map_err(|error| error.to_string())?;
    println!("seed {seed}: {}", report.summary);
    println!("seed {seed}: trace of {} lines, {}", report.lines, report.digest);
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
    if holdfast_raft::planted::plant(bug) || holdfast_store::planted::plant(bug) {
        Ok(())
    } else {
        Err(format!("there is no bug «{bug}» to plant"))
    }
}

#[cfg(not(feature = "planted-bugs"))]
fn plant(bug: &str) -> Result<(), String> {
    Err(format!("this build has no bug «{bug}»; `cargo xtask sim --plant` makes one that has"))
}

fn many(seeds: u64, options: &Options) -> Result<bool, String> {
    let program = std::env::current_exe().map_err(|error| format!("this program has no path: {error}"))?;
    let began = Instant::now();
    let mut failed = Vec::new();
    let mut ran = 0;
    for seed in options.from..options.from.saturating_add(seeds) {
        let mut command = Command::new(&program);
        command.args(["--seed", &seed.to_string()]);
        if let Some(bug) = &options.plant {
            command.args(["--plant", bug]);
        }
        let output = finish(&mut command)?;
        ran += 1;
        if output.failed {
            failed.push(seed);
            print!("{}", output.text);
            println!("    again: {}", again(seed, options.plant.as_deref()));
            if options.until_failure {
                break;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f32();
    println!("{ran} seeds in {seconds:.1} s, {} failed{}", failed.len(), list(&failed));
    Ok(failed.is_empty())
}

fn again(seed: u64, plant: Option<&str>) -> String {
    match plant {
        Some(bug) => format!("cargo xtask sim --plant {bug} --seed {seed}"),
        None => format!("cargo xtask sim --seed {seed} --trace trace.txt"),
    }
}

fn list(failed: &[u64]) -> String {
    let numbers: Vec<String> = failed.iter().map(u64::to_string).collect();
    if numbers.is_empty() { String::new() } else { format!(": {}", numbers.join(", ")) }
}

struct Output {
    failed: bool,
    text: String,
}

/// Runs a seed to its end. It writes little, so nobody has to read meanwhile.
fn finish(command: &mut Command) -> Result<Output, String> {
    let cannot = |error: std::io::Error| format!("a seed could not be run: {error}");
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().map_err(cannot)?;
    let began = Instant::now();
    loop {
        if child.try_wait().map_err(cannot)?.is_some() {
            let output = child.wait_with_output().map_err(cannot)?;
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            if !output.status.success() && !text.contains("FAILED") {
                text.push_str(&format!("FAILED: it ended with {}\n", output.status));
            }
            return Ok(Output { failed: !output.status.success(), text });
        }
        if began.elapsed() > SEED_DEADLINE {
            child.kill().map_err(cannot)?;
            child.wait().map_err(cannot)?;
            return Ok(Output { failed: true, text: "FAILED: it hung\n".to_owned() });
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}
