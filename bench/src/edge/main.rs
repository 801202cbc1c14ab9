//! `bench-edge`: the edge beside HAProxy and nginx, one after the other, and the edge's own tables.
//!
//! The edge under test is [`holdfast_edge::process::run`], what `holdfast edge run` runs, in a process of its own with one
//! thread and without a control plane: it serves the copy of its routes that lies on its disk.

mod load;
mod peers;
mod report;
mod routes;

use clap::{Parser, Subcommand};
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

/// How a part of the benchmark ends.
pub(crate) type Outcome<T> = Result<T, Box<dyn Error>>;

/// Measures the edge.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Serves, as one of those that are compared.
    Serve {
        /// The edge's folder, with its copy of its routes.
        folder: PathBuf,
    },
    /// Compares the edge with HAProxy and nginx.
    Compare(report::Plan),
    /// A table of many routes: from the disk, one change, look-ups.
    Routes {
        /// The folder for its file; it is made and removed.
        #[arg(long)]
        folder: PathBuf,
        /// How many.
        #[arg(long, default_value_t = 1_000_000)]
        routes: u64,
        /// How often each is timed.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().action {
        Action::Serve { folder } => peers::serve(folder),
        Action::Compare(plan) => report::compare(&plan),
        Action::Routes { folder, routes, rounds } => routes::measure(&folder, routes, rounds),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-edge: {error}");
            ExitCode::FAILURE
        }
    }
}
