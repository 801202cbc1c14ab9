//! `bench-state`: makes a state with a long history, and measures what a member does with one when it does not run.

use clap::{Parser, Subcommand};
use holdfast_bench::history::{Shape, Until, fill};
use holdfast_bench::process::cpu_of;
use holdfast_model::LogIndex;
use holdfast_store::Store;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// Makes and measures states.
#[derive(Debug, Parser)]
struct Arguments {
    /// The state's file; it is made when it is missing.
    #[arg(value_name = "FILE")]
    state: PathBuf,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Adds events to it.
    Fill {
        /// How many events it has afterwards, at least.
        #[arg(long, default_value_t = 1_000_000)]
        events: u64,
        /// Instances of each env; none for a history of apps alone.
        #[arg(long, default_value_t = 0)]
        instances: u32,
    },
    /// Times: open, replay in memory, rebuild, verify.
    Measure,
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn Error>> {
    match arguments.action {
        Action::Fill { events, instances } => {
            let shape = if instances == 0 { Shape::Apps } else { Shape::Tenants { instances } };
            let began = Instant::now();
            let store = Store::open(&arguments.state)?;
            let made = fill(
                &store,
                shape,
                Until::Events(events),
                &|_: LogIndex| Vec::new(),
                &AtomicBool::new(false),
            )?;
            println!("{made:?} in {:.2} s, digest {}", began.elapsed().as_secs_f64(), store.digest());
            Ok(())
        }
        Action::Measure => measure(&arguments.state),
    }
}

fn measure(path: &Path) -> Result<(), Box<dyn Error>> {
    let began = Instant::now();
    let store = Store::open(path)?;
    let events = store.revision().0;
    let mut cpu = cpu_of(std::process::id()).unwrap_or_default();
    let mut told = |what: &str, began: Instant| {
        let seconds = began.elapsed().as_secs_f64();
        let now = cpu_of(std::process::id()).unwrap_or_default();
        let spent = now.saturating_sub(cpu).as_secs_f64();
        cpu = now;
        println!("{what}: {seconds:.2} s, {:.0} events/s, CPU {spent:.2} s", events as f64 / seconds);
    };
    told("open", began);
    let began = Instant::now();
    let replayed = store.replayed(store.revision())?;
    told("replay in memory", began);
    println!("{:?} rows of {events} events", replayed.rows.values().sum::<u64>());
    let began = Instant::now();
    let rebuilt = store.rebuild()?;
    told("rebuild", began);
    if rebuilt.views != replayed.rebuilt.views || rebuilt.views != store.views_digest() {
        return Err("the digests differ".into());
    }
    let began = Instant::now();
    store.verify()?;
    told("verify", began);
    Ok(())
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-state: {error}");
            ExitCode::FAILURE
        }
    }
}
