//! Long histories: how soon a member serves again, what it holds in memory and on disk, how fast views are made anew.
//!
//! Holdfast's state is made offline by its own state machine in a stopped cluster's folders, the same for all three
//! members, and Raft's record in it is moved to the last entry. etcd's is put through its API in its largest transactions.
//! Both then run as always.

use crate::load::{Mix, Pace, Scenario};
use crate::report::Results;
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
use std::time::{Duration, Instant};

/// Instances of each env of a long history.
const ENV_INSTANCES: u32 = 4;
/// Instances of each env where a million of them are wanted.
const MANY_INSTANCES: u32 = 16;
/// Writes before each restart: the log then ends in what no checkpoint may hold yet.
const BEFORE: Scenario = Scenario { mix: Mix::Write, pace: Pace::Closed(64) };
/// For how long.
const BEFORE_TIME: Duration = Duration::from_millis(500);
/// Rest between two restarts.
const REST: Duration = Duration::from_secs(2);
/// Clients of a scan.
const SCANNERS: usize = 32;
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
fn fill_stopped(folder: &Path, shape: Shape, until: Until) -> Result<(u64, Vec<String>), BenchError> {
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
    let filled = fill(&store, shape, until, &meta).map_err(|e| failed("filling a state")(&e))?;
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

/// A running Holdfast cluster with a long history: with its events and its envs.
async fn filled(
    program: &Path,
    folder: &Path,
    shape: Shape,
    until: Until,
) -> Result<(Cluster, u64, Vec<String>), BenchError> {
    let mut cluster = holdfast::start(program, folder).await?;
    cluster.processes.iter_mut().for_each(|process| process.stop());
    let began = Instant::now();
    let (events, envs) = fill_stopped(folder, shape, until)?;
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
    for kind in ["one member, ended by TERM, s", "one member, killed, s", "all members, killed, s"] {
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
                cluster.processes[member].stop();
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

/// Reads every group once, spread over all members.
async fn scan(cluster: &Cluster, groups: &[String]) -> Result<(), BenchError> {
    let mut lines = Vec::with_capacity(MEMBERS * 2);
    for i in 0..MEMBERS * 2 {
        lines.push(cluster.dial(i % MEMBERS).await?);
    }
    let next = Cell::new(0);
    let clients = (0..SCANNERS).map(|i| {
        let (mut line, next) = (lines[i % lines.len()].clone(), &next);
        async move {
            while let Some(group) = groups.get(next.replace(next.get() + 1)) {
                let told = line.ask(cluster.protocol.scan(group)?).await?;
                if !told.status.is_success() {
                    let why = format!("{} {}", told.status, String::from_utf8_lossy(&told.body));
                    return Err(BenchError::Answer { what: format!("a scan of {group}"), why });
                }
            }
            Ok(())
        }
    });
    futures::future::try_join_all(clients).await.map(drop)
}

/// What a million rows take: right after a start, and after all were read.
async fn sizes(
    cluster: &mut Cluster,
    folder: &Path,
    groups: &[String],
    what: &str,
    results: &mut Results,
) -> Result<(), BenchError> {
    cluster.processes.iter_mut().for_each(|process| process.stop());
    start_all(cluster).await?;
    tokio::time::sleep(REST).await;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20) / MEMBERS as f64;
    results.note(what, "memory of one member after its start, MiB", mib(cluster.memory()));
    let began = Instant::now();
    scan(cluster, groups).await?;
    println!("  {:8} scanned in {:.1} s", cluster.name, began.elapsed().as_secs_f64());
    results.note(what, "memory of one member after a scan, MiB", mib(cluster.memory()));
    results.note(what, "disk of one member, MiB", mib(disk(folder)));
    Ok(())
}

/// Rebuilds of a stopped member, by the program itself: process start and opening of the file included.
fn rebuilds(
    program: &Path,
    member: &Path,
    events: u64,
    rounds: u32,
    results: &mut Results,
) -> Result<(), BenchError> {
    let what = format!("rebuild of all views from {events} events");
    let log = member.join("rebuild.log");
    let all = events.to_string();
    for _ in 0..rounds {
        let ways: [(&'static str, Option<&str>); 2] =
            [("in memory (--to), events/s", Some(&all)), ("of a file that is right, events/s", None)];
        for (figure, to) in ways {
            rebuild(program, member, to, &what, figure, events, &log, results)?;
        }
        // With a row less, all of it must be written.
        let wrong = failed("taking a row away");
        let path = member.join("state.redb");
        forget_checksums(&path)?;
        let damage = || -> Result<(), redb::Error> {
            let views = redb::TableDefinition::<&[u8], &[u8]>::new("views");
            let db = redb::Database::open(&path)?;
            let txn = db.begin_write()?;
            txn.open_table(views)?.pop_last()?;
            Ok(txn.commit()?)
        };
        damage().map_err(|e| wrong(&e))?;
        rebuild(program, member, None, &what, "of a file that is wrong, events/s", events, &log, results)?;
    }
    Ok(())
}

#[expect(clippy::too_many_arguments, reason = "each is one word of the sentence that it notes")]
fn rebuild(
    program: &Path,
    member: &Path,
    to: Option<&str>,
    what: &str,
    figure: &'static str,
    events: u64,
    log: &Path,
    results: &mut Results,
) -> Result<(), BenchError> {
    let mut command = Command::new(program);
    command.args(["server", "rebuild", "--data-dir"]).arg(member);
    if let Some(to) = to {
        command.args(["--to", to]);
    }
    let began = Instant::now();
    run_program("server rebuild", &mut command, log)?;
    let rate = events as f64 / began.elapsed().as_secs_f64();
    println!("  holdfast rebuild {figure}: {rate:.0}");
    results.note(what, figure, rate);
    Ok(())
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

/// Measures what is asked for.
pub async fn run(long: &Long, ours: &mut Results, theirs: &mut Results) -> Result<(), BenchError> {
    let (restart, memory, rebuild) = long.parts;
    let restarted = format!("restart with {} events or keys → first linearizable read", long.events);
    let sized = format!("{} instances, or keys of {} bytes", long.instances, etcd::VALUE_BYTES);
    let fresh = |name: &str| -> Result<PathBuf, BenchError> {
        let folder = long.folder.join(name);
        crate::remove(&folder)?;
        std::fs::create_dir_all(&folder).map_err(BenchError::file(&folder))?;
        Ok(folder)
    };
    let mut next = 0;
    let mut first = None;
    if long.systems.0 && (restart || rebuild) {
        let folder = fresh("holdfast-long")?;
        let shape = Shape::Tenants { instances: ENV_INSTANCES };
        let made = filled(&long.holdfast, &folder, shape, Until::Events(long.events)).await?;
        first = Some((made.0, made.1, folder));
    }
    let mut second = None;
    if long.systems.1 && (restart || memory) {
        let folder = fresh("etcd-long")?;
        let mut cluster = etcd::start(&long.etcd, &folder).await?;
        let began = Instant::now();
        let groups = etcd::fill(&cluster, long.events).await?;
        println!("  etcd     {} keys filled in in {:.0} s", long.events, began.elapsed().as_secs_f64());
        if memory {
            sizes(&mut cluster, &folder, &groups, &sized, theirs).await?;
        }
        second = Some((cluster, folder));
    }
    for _ in 0..if restart { long.rounds } else { 0 } {
        if let Some((cluster, _, folder)) = &mut first {
            restarts(cluster, folder, &mut next, &restarted, ours).await?;
        }
        if let Some((cluster, folder)) = &mut second {
            restarts(cluster, folder, &mut next, &restarted, theirs).await?;
        }
    }
    if let Some((mut cluster, folder)) = second {
        cluster.processes.iter_mut().for_each(|process| process.stop());
        crate::remove(&folder)?;
    }
    if let Some((mut cluster, events, folder)) = first {
        cluster.processes.iter_mut().for_each(|process| process.stop());
        if rebuild {
            // What was written before the restarts counts, too.
            let now = Store::open(&folder.join("m1/state.redb")).map_err(|e| failed("a state")(&e))?;
            let events = now.revision().0.max(events);
            drop(now);
            rebuilds(&long.holdfast, &folder.join("m1"), events, long.rounds, ours)?;
        }
        crate::remove(&folder)?;
    }
    if long.systems.0 && memory {
        let folder = fresh("holdfast-many")?;
        let shape = Shape::Tenants { instances: MANY_INSTANCES };
        let (mut cluster, _, envs) =
            filled(&long.holdfast, &folder, shape, Until::Instances(long.instances)).await?;
        sizes(&mut cluster, &folder, &envs, &sized, ours).await?;
        cluster.processes.iter_mut().for_each(|process| process.stop());
        crate::remove(&folder)?;
    }
    Ok(())
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
