//! What redb's one-phase and two-phase commits cost on this disk, with checked blocks and without: the figures behind the
//! choice in `docs/formats/raft-log.md` and `docs/formats/state.md`.
//!
//! `cargo run --release -p holdfast-checked-file --example commit_modes FOLDER`

// A measurement that cannot go on says so by a panic.
#![allow(clippy::unwrap_used)]

use std::fs::OpenOptions;
use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_checked_file::Checked;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redb::backends::FileBackend;
use redb::{Builder, Database, TableDefinition};

const ROWS: TableDefinition<'static, u64, &'static [u8]> = TableDefinition::new("rows");

fn open(path: &Path, checked: bool) -> Database {
    if checked {
        return Builder::new().create_with_backend(Checked::open(path).unwrap()).unwrap();
    }
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    Builder::new().create_with_backend(FileBackend::new(file).unwrap()).unwrap()
}

fn commit(database: &Database, two_phase: bool, keys: impl Iterator<Item = u64>, value: &[u8]) -> Duration {
    let mut transaction = database.begin_write().unwrap();
    transaction.set_two_phase_commit(two_phase);
    {
        let mut rows = transaction.open_table(ROWS).unwrap();
        for key in keys {
            rows.insert(key, value).unwrap();
        }
    }
    let begun = Instant::now();
    transaction.commit().unwrap();
    begun.elapsed()
}

fn print(what: &str, mut took: Vec<Duration>) {
    took.sort();
    let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
    println!("{what:<52} median {median:>10.2?}  worst {worst:>10.2?}");
}

fn main() {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let (value, seed) = ([7_u8; 400], 1);
    println!("seed {seed}");
    for checked in [false, true] {
        for two_phase in [false, true] {
            let mode = format!("{} phase, checked: {checked}", if two_phase { "two" } else { "one" });
            for (entries, commits) in [(1, 400), (64, 200)] {
                let path = Path::new(&folder).join("commit-modes-log.redb");
                let database = open(&path, checked);
                let took = (0..commits).map(|number| {
                    let keys = number * entries..(number + 1) * entries;
                    commit(&database, two_phase, keys, &value)
                });
                print(&format!("log, {entries} entries a commit, {mode}"), took.collect());
                drop(database);
                remove(&path);
            }
            let path = Path::new(&folder).join("commit-modes-state.redb");
            let database = open(&path, checked);
            for part in 0..20 {
                commit(&database, two_phase, part * 10_000..(part + 1) * 10_000, &value[..200]);
            }
            let mut rng = StdRng::seed_from_u64(seed);
            let took = (0..15).map(|_| {
                let keys: Vec<u64> = (0..5000).map(|_| rng.random_range(0..200_000)).collect();
                commit(&database, two_phase, keys.into_iter(), &value[..200])
            });
            print(&format!("checkpoint, 5000 of 200000 rows, {mode}"), took.collect());
            drop(database);
            remove(&path);
        }
    }
}

fn remove(path: &Path) {
    std::fs::remove_file(path).unwrap();
    drop(std::fs::remove_file(holdfast_checked_file::sidecar_of(path)));
}
