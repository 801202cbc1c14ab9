//! Long histories: how soon a member serves again, what it holds in memory and on disk, how fast views are made anew.
//!
//! Holdfast's state is made offline by its own state machine in a stopped cluster's folders, the same for all three
//! members, and Raft's record in it is moved to the last entry. etcd's is put through its API in its largest transactions.
//! Both then run as always.

use crate::load::{Mix, Pace, Scenario};
use crate::report::{Found, Results};
use crate::system::{Cluster, Kind, MEMBERS, READY_MAX, disk};
use crate::{etcd, holdfast, load};
use holdfast_bench::error::BenchError;
use holdfast_bench::history::{Shape, Until, fill};
use holdfast_bench::process::run as run_program;
use holdfast_model::LogIndex;
use holdfast_store::{Store, Views};
use std::cell::Cell;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Instances of each env of a long history.
const ENV_INSTANCES: u32 = 4;
/// Instances of each env where a million of them are wanted.
const MANY_INSTANCES: u32 = 16;
/// Writes before each restart: the log then ends in what no checkpoint may hold yet.
const BEFORE: Scenario = Scenario { mix: Mix::Write, pace: Pace::Closed(64) };
/// For how long.
const BEFORE_TIME: Duration = Duration::from_millis(500);
/// A restart after an end in order, so with a current checkpoint.
pub const RESTART_TERM: &str = "one member, ended by TERM, s";
/// Rest between two restarts.
const REST: Duration = Duration::from_secs(2);
/// Clients of a scan.
const SCANNERS: usize = 32;
/// How long filling a state in may take.
const FILL_MAX: Duration = Duration::from_secs(240);
/// How long one round of restarts may take, one of rebuilds, or a reading of sizes.
const ROUND_MAX: Duration = Duration::from_secs(150);
/// The version of the records of `log.redb` and of Raft's record in the state that this knows to move.
const RECORD_VERSION: u8 = 1;
const CHECKSUM_BYTES: usize = 16;
const RAFT_RECORD: &str = "raft state";

fn failed(what: &str) -> impl Fn(&(dyn Error + 'static)) -> BenchError {
    let what = what.to_owned();
    move |error| {
        let mut why = error.to_string();
        let mut cause = error.source();
        while let Some(deeper) = cause {
            why.push_str(&format!(": {deeper}"));
            cause = deeper.source();
        }
        BenchError::Answer { what: what.clone(), why }
    }
}

/// The checksum of Raft's record (docs/formats/log.md).
fn checksum(body: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[RECORD_VERSION]).update(b"meta");
    hasher.update(&(RAFT_RECORD.len() as u64).to_le_bytes()).update(RAFT_RECORD.as_bytes()).update(body);
    let mut checksum = [0; CHECKSUM_BYTES];
    checksum.copy_from_slice(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    checksum
}

/// Raft's record with another last applied index; `None` when it is not one that this knows.
fn moved(record: &[u8], to: u64) -> Option<Vec<u8>> {
    let (head, body) = record.split_at_checked(1 + CHECKSUM_BYTES)?;
    if head[0] != RECORD_VERSION || checksum(body) != head[1..] {
        return None;
    }
    let (last, rest) = postcard::take_from_bytes::<Option<(u64, u64, u64)>>(body).ok()?;
    let (term, leader, _) = last?;
    let body = [postcard::to_stdvec(&Some((term, leader, to))).ok()?, rest.to_vec()].concat();
    Some([&[RECORD_VERSION], checksum(&body).as_slice(), &body].concat())
}

/// Fills the folders of a stopped cluster; answers with the events in the state and the envs in it.
fn fill_stopped(
    folder: &Path,
    shape: Shape,
    until: Until,
    stop: &AtomicBool,
) -> Result<(u64, Vec<String>), BenchError> {
    let state = |i: usize| folder.join(format!("m{}", i + 1)).join("state.redb");
    let wrong = failed("the state of a stopped member");
    let mut furthest = (0, None);
    for i in 0..MEMBERS {
        let applied = Store::open(&state(i)).map_err(|e| wrong(&e))?.applied();
        if furthest.1.is_none() || applied > furthest.1 {
            furthest = (i, applied);
        }
    }
    let path = state(furthest.0);
    let store = Store::open(&path).map_err(|e| wrong(&e))?;
    let record = store.raft_meta().map_err(|e| wrong(&e))?.unwrap_or_default();
    if moved(&record, 1).is_none() {
        let why = "Raft's record in it is not one that this benchmark knows".to_owned();
        return Err(BenchError::Answer { what: path.display().to_string(), why });
    }
    let meta = |at: LogIndex| moved(&record, at.0).unwrap_or_default();
    let filled = fill(&store, shape, until, &meta, stop).map_err(|e| failed("filling a state")(&e))?;
    let mut envs = Vec::new();
    let view = store.view().map_err(|e| wrong(&e))?;
    let mut after = None;
    loop {
        let orgs = view.orgs(after.as_ref(), 1_000).map_err(|e| wrong(&e))?;
        let Some(last) = orgs.last() else { break };
        after = Some(last.name.clone());
        for org in &orgs {
            for app in view.apps(org.id, None, usize::MAX).map_err(|e| wrong(&e))? {
                let found = view.envs(app.id, None, usize::MAX).map_err(|e| wrong(&e))?;
                envs.extend(found.into_iter().map(|env| env.id.to_string()));
            }
        }
    }
    drop((view, store));
    for i in (0..MEMBERS).filter(|i| *i != furthest.0) {
        // The checksums of the blocks that lie beside it are another file's now.
        forget_checksums(&state(i))?;
        std::fs::copy(&path, state(i)).map_err(BenchError::file(state(i)))?;
    }
    Ok((filled.events, envs))
}

/// Removes the checksums beside a file that is about to be changed by another than its member.
fn forget_checksums(file: &Path) -> Result<(), BenchError> {
    let beside = holdfast_checked_file::sidecar_of(file);
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(BenchError::file(beside)(error)),
        _ => Ok(()),
    }
}

/// Work that blocks, in a thread of its own, so that a signal and a deadline are heard meanwhile. It is told when nobody waits
/// for it any more.
async fn aside<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> Result<T, BenchError> + Send + 'static,
) -> Result<T, BenchError> {
    struct Stop(Arc<AtomicBool>);
    impl Drop for Stop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = Stop(Arc::default());
    let told = Arc::clone(&stop.0);
    let done = tokio::task::spawn_blocking(move || work(&told)).await;
    done.map_err(|e| failed("work in a thread")(&e))?
}

/// A running Holdfast cluster with a long history: with its events and its envs.
async fn filled(
    program: &Path,
    folder: &Path,
    shape: Shape,
    until: Until,
) -> Result<(Cluster, u64, Vec<String>), BenchError> {
    let mut cluster = holdfast::start(program, folder).await?;
    cluster.stop().await?;
    let began = Instant::now();
    let within = folder.to_owned();
    let (events, envs) = aside(move |stop| fill_stopped(&within, shape, until, stop)).await?;
    println!("  holdfast {events} events filled in in {:.0} s", began.elapsed().as_secs_f64());
    start_all(&mut cluster).await?;
    Ok((cluster, events, envs))
}

async fn start_all(cluster: &mut Cluster) -> Result<(), BenchError> {
    for process in &mut cluster.processes {
        process.start()?;
    }
    for i in 0..MEMBERS {
        cluster.serves(i).await?;
    }
    Ok(())
}

/// Waits until any member answers a linearizable read.
async fn any_serves(cluster: &Cluster) -> Result<(), BenchError> {
    let until = Instant::now() + READY_MAX;
    while Instant::now() < until {
        for i in 0..MEMBERS {
            if cluster.once(i, Kind::Read).await.is_ok() {
                return Ok(());
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Err(BenchError::Slow { what: format!("{} to serve again", cluster.name), seconds: READY_MAX.as_secs() })
}

/// One restart of each kind.
async fn restarts(
    cluster: &mut Cluster,
    folder: &Path,
    next: &mut u64,
    what: &str,
    results: &mut Results,
) -> Result<(), BenchError> {
    for kind in [RESTART_TERM, "one member, killed, s", "all members, killed, s"] {
        load::run(cluster, BEFORE, Duration::ZERO, BEFORE_TIME, next, folder).await?;
        let member = (cluster.leader().await? + 1) % MEMBERS;
        let took = if kind.starts_with("all") {
            cluster.processes.iter_mut().for_each(|process| process.kill());
            let began = Instant::now();
            for process in &mut cluster.processes {
                process.start()?;
            }
            any_serves(cluster).await?;
            began.elapsed()
        } else {
            if kind.contains("TERM") {
                cluster.processes[member].stop().await?;
            } else {
                cluster.processes[member].kill();
            }
            let began = Instant::now();
            cluster.processes[member].start()?;
            cluster.serves(member).await?;
            began.elapsed()
        };
        println!("  {:8} {kind}: {:.2}", cluster.name, took.as_secs_f64());
        results.note(what, kind, took.as_secs_f64());
        for i in 0..MEMBERS {
            cluster.serves(i).await?;
        }
        tokio::time::sleep(REST).await;
    }
    Ok(())
}

/// Reads every group once, spread over all members; answers with the rows.
async fn scan(cluster: &Cluster, groups: &[String]) -> Result<u64, BenchError> {
    let mut lines = Vec::with_capacity(MEMBERS * 2);
    for i in 0..MEMBERS * 2 {
        lines.push(cluster.dial(i % MEMBERS).await?);
    }
    let (next, rows) = (Cell::new(0), Cell::new(0));
    let clients = (0..SCANNERS).map(|i| {
        let (mut line, next, rows) = (lines[i % lines.len()].clone(), &next, &rows);
        async move {
            while let Some(group) = groups.get(next.replace(next.get() + 1)) {
                let told = line.ask(cluster.protocol.scan(group)?).await?;
                rows.set(rows.get() + cluster.protocol.scanned(&told)?);
            }
            Ok::<(), BenchError>(())
        }
    });
    futures::future::try_join_all(clients).await?;
    Ok(rows.get())
}

/// What a million rows take: right after a start, and after all were read.
async fn sizes(
    cluster: &mut Cluster,
    folder: &Path,
    groups: &[String],
    rows: u64,
    what: &str,
    results: &mut Results,
) -> Result<(), BenchError> {
    cluster.stop().await?;
    start_all(cluster).await?;
    tokio::time::sleep(REST).await;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) / MEMBERS as f64;
    let (all, own) = cluster.memory();
    results.note(what, "memory of one member after its start, MiB", mib(all));
    results.note(what, "of it not of files, MiB", mib(own));
    let began = Instant::now();
    let scanned = scan(cluster, groups).await?;
    println!("  {:8} {scanned} rows scanned in {:.1} s", cluster.name, began.elapsed().as_secs_f64());
    if scanned < rows {
        let why = format!("it found {scanned} rows of {rows}");
        return Err(BenchError::Answer { what: "a scan of all".into(), why });
    }
    let (all, own) = cluster.memory();
    results.note(what, "memory of one member after a scan, MiB", mib(all));
    results.note(what, "then not of files, MiB", mib(own));
    results.note(what, "disk of one member, MiB", mib(disk(folder)));
    cluster.is_whole()
}

/// How views are rebuilt, each with its figure.
const REBUILDS: [&str; 3] = [REBUILD_TO, "of a file that is right, events/s", REBUILD_FILE];
/// In memory.
pub const REBUILD_TO: &str = "in memory (--to), events/s";
/// In place, everything written.
pub const REBUILD_FILE: &str = "of a file that lacks a row, events/s";

/// Rebuilds of a stopped member, by the program itself: process start and opening of the file included.
async fn rebuilds(
    program: &Path,
    member: &Path,
    events: u64,
    what: &str,
    results: &mut Results,
) -> Result<(), BenchError> {
    for figure in REBUILDS {
        let mut command = Command::new(program);
        command.args(["server", "rebuild", "--data-dir"]).arg(member);
        if figure == REBUILD_TO {
            command.args(["--to", &events.to_string()]);
        }
        if figure == REBUILD_FILE {
            let path = member.join("state.redb");
            aside(move |_| without_a_row(&path)).await?;
        }
        let began = Instant::now();
        run_program("server rebuild", command, &member.join("rebuild.log")).await?;
        let rate = events as f64 / began.elapsed().as_secs_f64();
        println!("  holdfast rebuild {figure}: {rate:.0}");
        results.note(what, figure, rate);
    }
    Ok(())
}

/// Takes a row of the views away, so that all views must be written anew.
fn without_a_row(path: &Path) -> Result<(), BenchError> {
    let wrong = failed("taking a row away");
    forget_checksums(path)?;
    let damage = || -> Result<(), redb::Error> {
        let views = redb::TableDefinition::<&[u8], &[u8]>::new("views");
        let db = redb::Database::open(path)?;
        let txn = db.begin_write()?;
        txn.open_table(views)?.pop_last()?;
        Ok(txn.commit()?)
    };
    damage().map_err(|e| wrong(&e))
}

/// What is to be measured of long histories, and on what.
pub struct Long {
    /// The `holdfast` program.
    pub holdfast: PathBuf,
    /// The `etcd` program.
    pub etcd: PathBuf,
    /// Where data folders are made.
    pub folder: PathBuf,
    /// Rounds of restarts and rebuilds.
    pub rounds: u32,
    /// Events, and keys of etcd.
    pub events: u64,
    /// Instances.
    pub instances: u64,
    /// Whether Holdfast is measured, and etcd.
    pub systems: (bool, bool),
    /// Whether restarts are measured, sizes, and rebuilds.
    pub parts: (bool, bool, bool),
}

/// What the figures of restarts stand under.
pub fn restarted(events: u64) -> String {
    format!("restart with {events} events or keys → first linearizable read")
}

/// What the figures of rebuilds stand under.
pub fn rebuilt(events: u64) -> String {
    format!("rebuild of all views from {events} events")
}

/// Measures what is asked for. What fails is noted, and the rest goes on.
pub async fn run(long: &Long, found: &mut Found) {
    let (restart, memory, rebuild) = long.parts;
    let sized =
        format!("{} instances, or {} keys of {} bytes", long.instances, long.events, etcd::VALUE_BYTES);
    let fresh = |name: &str| -> Result<PathBuf, BenchError> {
        let folder = long.folder.join(name);
        crate::rounds::remove(&folder)?;
        std::fs::create_dir_all(&folder).map_err(BenchError::file(&folder))?;
        Ok(folder)
    };
    let (mut first, mut second) = (None, None);
    if long.systems.0 && (restart || rebuild) {
        let work = async {
            let folder = fresh("holdfast-long")?;
            let shape = Shape::Tenants { instances: ENV_INSTANCES };
            let (cluster, ..) = filled(&long.holdfast, &folder, shape, Until::Events(long.events)).await?;
            Ok((cluster, folder))
        };
        first = found.failed.tried("a long history of holdfast", FILL_MAX, work).await;
    }
    if long.systems.1 && (restart || memory) {
        let work = async {
            let folder = fresh("etcd-long")?;
            let cluster = etcd::start(&long.etcd, &folder).await?;
            let began = Instant::now();
            let groups = etcd::fill(&cluster, long.events).await?;
            println!("  etcd     {} keys filled in in {:.0} s", long.events, began.elapsed().as_secs_f64());
            Ok((cluster, folder, groups))
        };
        second = found.failed.tried("a long history of etcd", FILL_MAX, work).await;
    }
    if let (true, Some((cluster, folder, groups))) = (memory, &mut second) {
        let work = sizes(cluster, folder, groups, long.events, &sized, &mut found.theirs);
        found.failed.tried("sizes of etcd", ROUND_MAX, work).await;
    }
    let (what, mut next, mut goes_on) = (restarted(long.events), 0, [true; 2]);
    for round in 0..if restart { long.rounds } else { 0 } {
        // Each goes first in every other round.
        let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
        for system in order {
            let (cluster, folder, results) = match (system, &mut first, &mut second) {
                _ if !goes_on[system] => continue,
                (0, Some((cluster, folder)), _) => (cluster, folder, &mut found.ours),
                (1, _, Some((cluster, folder, _))) => (cluster, folder, &mut found.theirs),
                _ => continue,
            };
            let name = format!("restarts of {}, round {}", cluster.name, round + 1);
            let work = restarts(cluster, folder, &mut next, &what, results);
            // After a failure, a later round would only find what this one left.
            goes_on[system] = found.failed.tried(&name, ROUND_MAX, work).await.is_some();
        }
    }
    if let Some((mut cluster, folder, _)) = second {
        found.failed.tried("the end of etcd", ROUND_MAX, cluster.stop()).await;
        found.failed.done(crate::rounds::remove(&folder));
    }
    if let Some((mut cluster, folder)) = first {
        found.failed.tried("the end of holdfast", ROUND_MAX, cluster.stop()).await;
        let member = folder.join("m1");
        for _ in 0..if rebuild { long.rounds } else { 0 } {
            let work = async {
                // What was written before the restarts counts, too.
                let path = member.join("state.redb");
                let opened = aside(move |_| Store::open(&path).map_err(|e| failed("a state")(&e)));
                let events = opened.await?.revision().0;
                rebuilds(&long.holdfast, &member, events, &rebuilt(long.events), &mut found.ours).await
            };
            if found.failed.tried("rebuilds", ROUND_MAX, work).await.is_none() {
                break;
            }
        }
        found.failed.done(crate::rounds::remove(&folder));
    }
    if long.systems.0 && memory {
        let work = async {
            let folder = fresh("holdfast-many")?;
            let shape = Shape::Tenants { instances: MANY_INSTANCES };
            let until = Until::Instances(long.instances);
            let (mut cluster, _, envs) = filled(&long.holdfast, &folder, shape, until).await?;
            sizes(&mut cluster, &folder, &envs, long.instances, &sized, &mut found.ours).await?;
            cluster.stop().await?;
            crate::rounds::remove(&folder)
        };
        found.failed.tried("sizes of holdfast", FILL_MAX + ROUND_MAX, work).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_moved_only_when_it_is_one_that_is_known() {
        let body = [postcard::to_stdvec(&Some((3_u64, 1_u64, 70_u64))).unwrap(), vec![9, 8, 7]].concat();
        let record = [&[RECORD_VERSION], checksum(&body).as_slice(), &body].concat();
        let there = moved(&record, 1_000_000).unwrap();
        assert_eq!(moved(&there, 70).unwrap(), record, "nothing else changed");
        assert_ne!(there, record);
        let mut rotten = record.clone();
        rotten[20] ^= 1;
        assert_eq!(moved(&rotten, 5), None);
        assert_eq!(moved(&[], 5), None);
    }
}
