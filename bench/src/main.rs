//! `cargo xtask bench raft`: Holdfast's replicated log beside etcd's, by what their clients see.
//!
//! Three members of each on loopback, on the same disk, with TLS, in alternating runs, driven by the same generator.
//! Bounded in count and time; it ends by itself, and ends every process that it started and no other.

mod etcd;
mod failover;
mod holdfast;
mod line;
mod load;
mod long;
mod machine;
mod report;
mod system;
mod watch;

use clap::Parser;
use holdfast_bench::error::BenchError;
use load::{Mix, Pace, Scenario};
use report::Results;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Loads before each measurement, unmeasured.
const WARM: Duration = Duration::from_secs(1);

/// What can be measured by itself.
const PARTS: [&str; 10] =
    ["disk", "writes", "reads", "mixed", "open", "watch", "failover", "restart", "rebuild", "memory"];

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
    /// Concurrent clients of closed loops in which one of five writes.
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256])]
    mixed_clients: Vec<usize>,
    /// Rates of open loops, in requests a second.
    #[arg(long, value_delimiter = ',', default_values_t = [500, 2000, 4000])]
    rates: Vec<u64>,
    /// Watchers.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=5000))]
    watchers: u64,
    /// Writes a second that are watched.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    watch_rate: u64,
    /// Kills of the leader in each run.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    kills: u32,
    /// Events of a long history; as many keys in etcd.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1000..=20_000_000))]
    events: u64,
    /// Instances of a large state.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(100..=5_000_000))]
    instances: u64,
    /// Only these parts; all of them without it.
    #[arg(long, value_delimiter = ',', value_parser = PARTS)]
    only: Vec<String>,
    /// Measure only one of the two, `holdfast` or `etcd`.
    #[arg(long, value_parser = ["holdfast", "etcd"])]
    system: Option<String>,
    /// What `--holdfast` was built from, if whoever starts this built it; a record says so, and says when it is unknown.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
    /// Write the table into this file, before the runs that it holds already.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

impl Arguments {
    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }

    fn measures(&self, system: &str) -> bool {
        self.system.as_deref().is_none_or(|only| only == system)
    }
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
    let closed = |part: &str, mix, clients: &[usize]| -> Vec<Scenario> {
        let clients = clients.iter().filter(|_| arguments.wants(part));
        clients.map(|c| Scenario { mix, pace: Pace::Closed((*c).clamp(1, 4096)) }).collect()
    };
    let mut all = closed("writes", Mix::Write, &arguments.clients);
    all.extend(closed("reads", Mix::Read, &arguments.clients));
    all.extend(closed("mixed", Mix::Mixed, &arguments.mixed_clients));
    let rates = arguments.rates.iter().filter(|_| arguments.wants("open"));
    all.extend(rates.map(|r| Scenario { mix: Mix::Write, pace: Pace::Open((*r).max(1)) }));
    all
}

async fn run(arguments: &Arguments) -> Result<(), BenchError> {
    std::fs::create_dir_all(&arguments.folder).map_err(BenchError::file(&arguments.folder))?;
    let head = format!(
        "{}, {}; {}; holdfast {}; load average at the start {}",
        machine::date(),
        machine::facts(),
        machine::etcd_version(&arguments.etcd),
        arguments.revision.as_deref().unwrap_or("of a binary whose revision was not given"),
        machine::load(),
    );
    println!("{head}");
    let (mut ours, mut theirs) = (Results::default(), Results::default());
    let mut appends = Vec::new();
    let live = ["writes", "reads", "mixed", "open", "watch", "failover"].iter().any(|p| arguments.wants(p));
    for round in 0..arguments.rounds {
        if arguments.wants("disk") {
            bare_appends(arguments, &mut appends)?;
        }
        let mut order = ["holdfast", "etcd"];
        if round % 2 == 1 {
            order.reverse();
        }
        for system in order.into_iter().filter(|s| live && arguments.measures(s)) {
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
    let parts = (arguments.wants("restart"), arguments.wants("memory"), arguments.wants("rebuild"));
    if parts != (false, false, false) {
        let long = long::Long {
            holdfast: arguments.holdfast.clone(),
            etcd: arguments.etcd.clone(),
            folder: arguments.folder.clone(),
            rounds: arguments.rounds,
            events: arguments.events,
            instances: arguments.instances,
            systems: (arguments.measures("holdfast"), arguments.measures("etcd")),
            parts,
        };
        long::run(&long, &mut ours, &mut theirs).await?;
    }
    let table = format!("{}{}", report::appends(&appends), report::table(&ours, &theirs));
    println!("\n{table}");
    if let Some(record) = &arguments.record {
        write_record(record, arguments, &head, &table)?;
    }
    Ok(())
}

/// Times each kind of bare append once more.
fn bare_appends(arguments: &Arguments, all: &mut Vec<(&'static str, Vec<f64>)>) -> Result<(), BenchError> {
    for (place, (bytes, preallocated, what)) in machine::BARE_APPENDS.into_iter().enumerate() {
        let took = machine::disk_sync(&arguments.folder, bytes, preallocated)?.as_secs_f64() * 1e3;
        println!("  bare append + fdatasync, {what}: {took:.2} ms");
        match all.get_mut(place) {
            Some((_, times)) => times.push(took),
            None => all.push((what, vec![took])),
        }
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
    if arguments.wants("watch") {
        let time = Duration::from_secs(arguments.seconds);
        let watchers = usize::try_from(arguments.watchers).unwrap_or(1);
        watch::run(&cluster, watchers, arguments.watch_rate, time, &mut next, results).await?;
        println!("  {system:8} {watchers} watchers served");
    }
    results.ends.push((cluster.memory(), system::disk(&folder)));
    for _ in 0..if arguments.wants("failover") { arguments.kills } else { 0 } {
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
    let mixed: Vec<_> = arguments.mixed_clients.iter().map(usize::to_string).collect();
    let mut text = format!("{program} --rounds {} --seconds {}", arguments.rounds, arguments.seconds);
    if !arguments.only.is_empty() {
        text.push_str(&format!(" --only {}", arguments.only.join(",")));
    }
    // A flag of a part that was not run changed nothing.
    let flags: [(&[&str], String); 7] = [
        (&["writes", "reads"], format!(" --clients {}", list(&clients))),
        (&["mixed"], format!(" --mixed-clients {}", list(&mixed))),
        (&["open"], format!(" --rates {}", list(&rates))),
        (&["watch"], format!(" --watchers {} --watch-rate {}", arguments.watchers, arguments.watch_rate)),
        (&["failover"], format!(" --kills {}", arguments.kills)),
        (&["restart", "rebuild", "memory"], format!(" --events {}", arguments.events)),
        (&["memory"], format!(" --instances {}", arguments.instances)),
    ];
    for (parts, flag) in flags {
        if parts.iter().any(|part| arguments.wants(part)) {
            text.push_str(&flag);
        }
    }
    if let Some(system) = &arguments.system {
        text.push_str(&format!(" --system {system}"));
    }
    text
}

/// Where sections of runs begin in a record.
const SECTION: &str = "\n## 2";

fn write_record(record: &Path, arguments: &Arguments, head: &str, table: &str) -> Result<(), BenchError> {
    let command = command(arguments);
    let section =
        format!("\n## {head}\n\n`{command}`, load average at the end {}.\n\n{table}", machine::load());
    let text = match std::fs::read_to_string(record) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(BenchError::file(record)(error)),
    };
    std::fs::write(record, newest_first(&text, &section)).map_err(BenchError::file(record))
}

/// The text with a section before those that it has.
fn newest_first(text: &str, section: &str) -> String {
    let (before, after) = text.split_at(text.find(SECTION).unwrap_or(text.len()));
    format!("{before}{section}{after}")
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
        let direct = parse(&["--only", "writes,open"]);
        assert!(direct.starts_with("bench-raft --holdfast BINARY") && !direct.contains("/x"), "{direct}");
        assert!(
            direct.contains("--only writes,open --clients 1,64 --rates 5") && !direct.contains("--kills"),
            "{direct}"
        );
        assert!(parse(&["--revision", "abc"]).starts_with("cargo xtask bench raft --rounds 3"));
    }

    #[test]
    fn a_run_is_written_before_those_that_came_earlier() {
        let page = "# Benchmarks\n\n## How\n\nSo.\n\n## 2026-01-01\n\nold\n";
        let written = newest_first(page, "\n## 2026-01-02\n\nnew\n");
        assert_eq!(
            written,
            "# Benchmarks\n\n## How\n\nSo.\n\n## 2026-01-02\n\nnew\n\n## 2026-01-01\n\nold\n"
        );
        assert_eq!(newest_first("", "\n## 2026\n"), "\n## 2026\n");
    }
}
