//! `kill -9` in the middle of writing: what was published is on disk, whole, and the revision does not go back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use holdfast_client::replica::{Applied, Replica};
use holdfast_model::agent::EdgeRoute;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use support::*;

const FILE: &str = "HOLDFAST_TEST_REPLICA";
const TEST: &str = "i06_killed_at_any_moment_nothing_published_is_lost";
const ROUNDS: usize = 12;

#[test]
fn i06_killed_at_any_moment_nothing_published_is_lost() {
    if let Some(file) = std::env::var_os(FILE) {
        return write_for_ever(Path::new(&file));
    }
    let seed: u64 =
        std::env::var("HOLDFAST_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("HOLDFAST_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("edge.redb");
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", TEST, "--nocapture"])
            .env(FILE, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap()).lines();
        let published =
            |line: std::io::Result<String>| line.ok()?.strip_prefix("published ")?.parse::<u64>().ok();
        // At least one state, so that every round gets somewhere; then a random moment.
        let mut last = output.by_ref().find_map(published).expect("the child publishes");
        std::thread::sleep(Duration::from_micros(random.random_range(0..30_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        last = output.filter_map(published).last().unwrap_or(last);

        let replica = Replica::<EdgeRoute>::open(&path, CLUSTER).unwrap();
        assert!(replica.quarantined().is_none(), "round {round}");
        let (revision, items) = marks(&replica.current()).unwrap();
        assert!(revision >= last, "round {round}: {last} was published and {revision} is on disk");
        // Each state holds its own revision in every item: no state is half of two.
        assert_eq!(items.len(), 50);
        assert!(items.values().all(|mark| u64::from(*mark) == revision % 60_000), "round {round}");
    }
}

/// Publishes state after state, telling of each only once it is published.
fn write_for_ever(path: &Path) {
    let mut replica = Replica::<EdgeRoute>::open(path, CLUSTER).unwrap();
    let at = |revision: u64| (0..50).map(|id| route(id, (revision % 60_000) as u16)).collect::<Vec<_>>();
    let mut revision = replica.revision().map_or(0, |revision| revision.0);
    if revision == 0 {
        revision = 1;
        assert_eq!(feed(&mut replica, snapshot(stamp(1), at(1), 0)), Applied::Applied);
    }
    loop {
        let next = delta(revision, revision + 1, at(revision + 1), vec![]);
        assert_eq!(replica.apply(next).unwrap(), Applied::Applied);
        revision += 1;
        let mut out = std::io::stdout().lock();
        writeln!(out, "published {revision}").unwrap();
        out.flush().unwrap();
    }
}
