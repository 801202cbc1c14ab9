//! `cargo xtask bench raft`: Holdfast's replicated log beside etcd's, by what their clients see.
//!
//! Three members of each on loopback, on the same disk, with TLS, in alternating runs, driven by the same generator.
//! Bounded in count and time; it ends by itself, and ends every process that it started and no other. A part that fails is
//! said to have failed; the others keep their figures.

mod etcd;
mod failover;
mod holdfast;
mod line;
mod load;
mod long;
mod machine;
mod record;
mod report;
mod rounds;
mod system;
mod watch;

use clap::Parser;
use holdfast_bench::error::BenchError;
use report::Found;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What can be measured by itself.
const PARTS: [&str; 10] =
    ["disk", "writes", "reads", "mixed", "open", "watch", "failover", "restart", "rebuild", "memory"];

/// Where clusters lie below the folder that is given; whatever ends the run, they are gone afterwards.
const FOLDERS: [&str; 5] = ["holdfast", "etcd", "holdfast-long", "etcd-long", "holdfast-many"];

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
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=600))]
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
    /// Kills of Holdfast's leader in each round.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    kills: u32,
    /// Kills of etcd's leader in each round.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    etcd_kills: u32,
    /// Events of a long history; as many keys in etcd.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1000..=20_000_000))]
    events: u64,
    /// Instances of a large state.
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(100..=5_000_000))]
    instances: u64,
    /// After so many minutes it ends with what it has.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    minutes_max: u64,
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

    fn kills_of(&self, system: &str) -> u32 {
        if system == "etcd" { self.etcd_kills } else { self.kills }
    }

    fn measures(&self, system: &str) -> bool {
        self.system.as_deref().is_none_or(|only| only == system)
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // Whoever started this reads its table: without a reader it ends, and in order.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let outcome = runtime.map_err(BenchError::file("the runtime")).and_then(|runtime| {
        let outcome = runtime.block_on(run(&arguments));
        // A thread that still fills a state in ends with this process.
        runtime.shutdown_background();
        outcome
    });
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {}", error.told());
            ExitCode::FAILURE
        }
    }
}

/// Runs all that is asked for and reports it; answers whether nothing failed.
async fn run(arguments: &Arguments) -> Result<bool, BenchError> {
    std::fs::create_dir_all(&arguments.folder).map_err(BenchError::file(&arguments.folder))?;
    let head = record::Head::now(arguments);
    println!("{head}");
    let mut found = Found::default();
    let most = Duration::from_secs(60 * arguments.minutes_max);
    // Dropping the measurement ends its processes.
    let interrupted = tokio::select! {
        outcome = tokio::time::timeout(most, measure(arguments, &mut found)) => {
            if outcome.is_err() {
                found.failed.note(format!("the rest: it was not done after {} minutes", arguments.minutes_max));
            }
            false
        }
        outcome = signalled() => outcome.map(|()| true)?,
    };
    for name in FOLDERS {
        found.failed.done(rounds::remove(&arguments.folder.join(name)));
    }
    let section = record::section(&head, arguments, &found);
    println!("{section}");
    match &arguments.record {
        _ if interrupted => Err(BenchError::Interrupted),
        Some(file) => record::write(file, &section).map(|()| found.failed.all.is_empty()),
        None => Ok(found.failed.all.is_empty()),
    }
}

/// Until someone asks for an end.
async fn signalled() -> Result<(), BenchError> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen = |kind| signal(kind).map_err(BenchError::file("a signal"));
    let mut kinds =
        (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?);
    tokio::select! {
        _ = kinds.0.recv() => {}
        _ = kinds.1.recv() => {}
        _ = kinds.2.recv() => {}
    }
    Ok(())
}

async fn measure(arguments: &Arguments, found: &mut Found) {
    let live = ["writes", "reads", "mixed", "open", "watch", "failover"].iter().any(|p| arguments.wants(p));
    for round in 0..arguments.rounds {
        if arguments.wants("disk") {
            let outcome = bare_appends(arguments, found);
            found.failed.done(outcome);
        }
        let mut order = ["holdfast", "etcd"];
        if round % 2 == 1 {
            order.reverse();
        }
        for system in order.into_iter().filter(|s| live && arguments.measures(s)) {
            let (rounds, load) = (arguments.rounds, machine::load());
            println!("round {} of {rounds}: {system}, load average {load}", round + 1);
            let results = if system == "etcd" { &mut found.theirs } else { &mut found.ours };
            rounds::run(arguments, system, results, &mut found.failed).await;
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
        long::run(&long, found).await;
    }
}

/// Times each kind of bare append once more.
fn bare_appends(arguments: &Arguments, found: &mut Found) -> Result<(), BenchError> {
    for (place, (bytes, preallocated, what)) in machine::BARE_APPENDS.into_iter().enumerate() {
        let took = machine::disk_sync(&arguments.folder, bytes, preallocated)?.as_secs_f64() * 1e3;
        println!("  bare append + fdatasync, {what}: {took:.2} ms");
        match found.appends.get_mut(place) {
            Some((_, times)) => times.push(took),
            None => found.appends.push((what, vec![took])),
        }
    }
    Ok(())
}
