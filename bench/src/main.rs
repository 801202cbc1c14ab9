//! `cargo xtask bench raft`: Holdfast's replicated log beside etcd's, by what their clients see.
//!
//! Three members of each on loopback, on the same disk, with TLS, in alternating runs, driven by the same generator.
//! Bounded in count and time; it ends by itself, and ends every process that it started and no other.

mod etcd;
mod failover;
mod holdfast;
mod line;
mod load;
mod machine;
mod report;
mod system;

use clap::Parser;
use holdfast_bench::error::BenchError;
use load::{Mix, Pace, Scenario};
use report::Results;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Loads before each measurement, unmeasured.
const WARM: Duration = Duration::from_secs(1);

/// Measures Holdfast beside etcd.
#[derive(Debug, Parser)]
struct Arguments {
    /// The `holdfast` program: a release build.
    #[arg(long, value_name = "FILE")]
    holdfast: PathBuf,
    /// The `etcd` program.
    #[arg(long, value_name = "FILE", default_value = "etcd")]
    etcd: PathBuf,
    /// Where data folders are made and removed again: it decides which disk is measured.
    #[arg(long, value_name = "FOLDER")]
    folder: PathBuf,
    /// Runs of each system, alternating.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=50))]
    rounds: u32,
    /// Seconds of each measurement.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Concurrent clients of closed loops.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64, 256, 1000])]
    clients: Vec<usize>,
    /// Rates of open loops, in requests a second.
    #[arg(long, value_delimiter = ',', default_values_t = [200, 1000])]
    rates: Vec<u64>,
    /// Kills of the leader in each run.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    kills: u32,
    /// Only loads whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
    /// Measure only one of the two, `holdfast` or `etcd`.
    #[arg(long, value_parser = ["holdfast", "etcd"])]
    system: Option<String>,
    /// What `--holdfast` was built from, if whoever starts this built it; a record says so, and says when it is unknown.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Append the table to this file.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(BenchError::file("the runtime")).and_then(|runtime| {
        runtime.block_on(async {
            tokio::select! {
                outcome = run(&arguments) => outcome,
                // Dropping the run ends its processes.
                _ = tokio::signal::ctrl_c() => Err(BenchError::Answer { what: "the run".into(), why: "interrupted".into() }),
            }
        })
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            eprintln!("bench: {text}");
            ExitCode::FAILURE
        }
    }
}

fn scenarios(arguments: &Arguments) -> Vec<Scenario> {
    let closed = |mix, clients: &[usize]| -> Vec<Scenario> {
        clients.iter().map(|c| Scenario { mix, pace: Pace::Closed((*c).clamp(1, 4096)) }).collect()
    };
    let mut all = closed(Mix::Write, &arguments.clients);
    all.extend(closed(Mix::Read, &arguments.clients));
    all.extend(closed(Mix::Mixed, &[64]));
    all.extend(arguments.rates.iter().map(|r| Scenario { mix: Mix::Write, pace: Pace::Open((*r).max(1)) }));
    all.retain(|scenario| scenario.name().contains(&arguments.only));
    all
}

async fn run(arguments: &Arguments) -> Result<(), BenchError> {
    std::fs::create_dir_all(&arguments.folder).map_err(BenchError::file(&arguments.folder))?;
    let sync = machine::disk_sync(&arguments.folder)?;
    let head = format!(
        "{}, {}; 4 KiB append + fdatasync {:.2} ms; {}; holdfast {}; load average at the start {}",
        machine::date(),
        machine::facts(),
        sync.as_secs_f64() * 1e3,
        machine::etcd_version(&arguments.etcd),
        arguments.revision.as_deref().unwrap_or("of a binary whose revision was not given"),
        machine::load(),
    );
    println!("{head}");
    let (mut ours, mut theirs) = (Results::default(), Results::default());
    for round in 0..arguments.rounds {
        let mut order = ["holdfast", "etcd"];
        if round % 2 == 1 {
            order.reverse();
        }
        for system in order.into_iter().filter(|s| arguments.system.as_deref().is_none_or(|only| only == *s))
        {
            let results = if system == "etcd" { &mut theirs } else { &mut ours };
            println!(
                "round {} of {}: {system}, load average {}",
                round + 1,
                arguments.rounds,
                machine::load()
            );
            one_run(arguments, system, results).await?;
        }
    }
    let table = report::table(&ours, &theirs);
    println!("\n{table}");
    if let Some(record) = &arguments.record {
        append(record, arguments, &head, &table)?;
    }
    Ok(())
}

/// One run of one system: a fresh cluster, every load, the kills, and its end.
async fn one_run(arguments: &Arguments, system: &str, results: &mut Results) -> Result<(), BenchError> {
    let folder = arguments.folder.join(system);
    remove(&folder)?;
    std::fs::create_dir_all(&folder).map_err(BenchError::file(&folder))?;
    let mut cluster = if system == "etcd" {
        etcd::start(&arguments.etcd, &folder).await?
    } else {
        holdfast::start(&arguments.holdfast, &folder).await?
    };
    let mut next = 0;
    for scenario in scenarios(arguments) {
        let time = Duration::from_secs(arguments.seconds);
        let measured = load::run(&cluster, scenario, WARM, time, &mut next, &folder).await?;
        println!(
            "  {system:8} {:34} {:8.0}/s  p50 {:8.2} ms  p99 {:8.2} ms  cpu {:6.0} µs/op  own {:4.0} µs/op  fsyncs/op {}  errors {}",
            scenario.name(),
            measured.rate,
            measured.p50_us / 1e3,
            measured.p99_us / 1e3,
            measured.cpu_us,
            measured.own_cpu_us,
            measured.syncs.map_or("?".into(), |s| format!("{s:.3}")),
            measured.errors,
        );
        results.add(scenario, measured);
    }
    results.ends.push((cluster.memory(), system::disk(&folder)));
    for _ in 0..arguments.kills {
        let failover = failover::kill_leader(&mut cluster, &mut next).await?;
        println!(
            "  {system:8} leader killed: {:5.0} ms to a write; member started: {:5.0} ms to serve",
            failover.outage.as_secs_f64() * 1e3,
            failover.restart.as_secs_f64() * 1e3
        );
        results.failovers.push(failover);
    }
    for process in &mut cluster.processes {
        process.stop();
    }
    remove(&folder)
}

fn remove(folder: &Path) -> Result<(), BenchError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(BenchError::file(folder)(error)),
        _ => Ok(()),
    }
}

/// The command as it was run, without this machine's paths. Every flag that changes what is measured is in it.
fn command(arguments: &Arguments) -> String {
    let list = |all: &[String]| all.join(",");
    let clients: Vec<_> = arguments.clients.iter().map(usize::to_string).collect();
    let rates: Vec<_> = arguments.rates.iter().map(u64::to_string).collect();
    let program = match arguments.revision {
        Some(_) => "cargo xtask bench raft",
        None => "bench-raft --holdfast BINARY --folder FOLDER",
    };
    let mut text = format!(
        "{program} --rounds {} --seconds {} --clients {} --rates {} --kills {}",
        arguments.rounds,
        arguments.seconds,
        list(&clients),
        list(&rates),
        arguments.kills
    );
    if !arguments.only.is_empty() {
        text.push_str(&format!(" --only \"{}\"", arguments.only));
    }
    if let Some(system) = &arguments.system {
        text.push_str(&format!(" --system {system}"));
    }
    text
}

fn append(record: &Path, arguments: &Arguments, head: &str, table: &str) -> Result<(), BenchError> {
    use std::io::Write;
    let command = command(arguments);
    let section =
        format!("\n## {head}\n\n`{command}`, load average at the end {}.\n\n{table}", machine::load());
    let file = std::fs::File::options().append(true).create(true).open(record);
    file.and_then(|mut f| f.write_all(section.as_bytes())).map_err(BenchError::file(record))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_names_the_command_that_ran_and_no_revision_that_is_not_known() {
        let parse = |more: &[&str]| {
            let given =
                ["bench-raft", "--holdfast", "/x/h", "--folder", "/x/f", "--clients", "1,64", "--rates", "5"];
            command(&Arguments::parse_from(given.iter().chain(more)))
        };
        let direct = parse(&["--only", "write"]);
        assert!(direct.starts_with("bench-raft --holdfast BINARY") && !direct.contains("/x"), "{direct}");
        assert!(
            direct.contains("--clients 1,64 --rates 5") && direct.contains("--only \"write\""),
            "{direct}"
        );
        assert!(parse(&["--revision", "abc"]).starts_with("cargo xtask bench raft --rounds 3"));
    }
}
