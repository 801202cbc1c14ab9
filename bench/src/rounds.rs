//! A round of one system: a fresh cluster, every load, the watchers, the kills, and its end.
//!
//! A part that fails is noted and takes its cluster with it; the next part gets a fresh one. So no part is measured on what
//! another left broken.

use crate::load::{Mix, Pace, Scenario};
use crate::report::{Failed, Results};
use crate::system::Cluster;
use crate::{Arguments, etcd, failover, holdfast, load, system, watch};
use holdfast_bench::error::BenchError;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Loads before each measurement, unmeasured.
const WARM: Duration = Duration::from_secs(1);
/// How long the start of a cluster may take.
const START_MAX: Duration = Duration::from_secs(120);
/// How long a part may take beyond what is measured.
const PART_MAX: Duration = Duration::from_secs(60);
/// How long a kill with all that follows may take.
const KILL_MAX: Duration = Duration::from_secs(60);
/// Clusters that may fail in a round before the rest of it is given up.
const CLUSTERS_MAX: usize = 3;

/// What is measured on one cluster, in this order.
enum Part {
    Load(Scenario),
    Watch,
    Failover,
}

fn parts(arguments: &Arguments) -> Vec<Part> {
    let closed = |part: &str, mix, clients: &[usize]| -> Vec<Part> {
        let clients = clients.iter().filter(|_| arguments.wants(part));
        clients.map(|c| Part::Load(Scenario { mix, pace: Pace::Closed((*c).clamp(1, 4096)) })).collect()
    };
    let mut all = closed("writes", Mix::Write, &arguments.clients);
    all.extend(closed("reads", Mix::Read, &arguments.clients));
    all.extend(closed("mixed", Mix::Mixed, &arguments.mixed_clients));
    let rates = arguments.rates.iter().filter(|_| arguments.wants("open"));
    all.extend(rates.map(|r| Part::Load(Scenario { mix: Mix::Write, pace: Pace::Open((*r).max(1)) })));
    all.extend(arguments.wants("watch").then_some(Part::Watch));
    all.extend(arguments.wants("failover").then_some(Part::Failover));
    all
}

/// One round of one system.
pub async fn run(arguments: &Arguments, system: &str, results: &mut Results, failed: &mut Failed) {
    let folder = arguments.folder.join(system);
    let mut round = Round { arguments, system, folder, next: 0, results };
    let (mut cluster, mut lost, mut ended) = (None, 0, false);
    for part in parts(arguments) {
        let name = match &part {
            Part::Load(scenario) => format!("{system}, {}", scenario.name()),
            Part::Watch => format!("{system}, watchers"),
            Part::Failover => format!("{system}, kills of the leader"),
        };
        if lost == CLUSTERS_MAX {
            failed.note(format!("{name}: not tried, after {lost} failures in this round"));
            continue;
        }
        if cluster.is_none() {
            cluster = failed.tried(&format!("{name}: a fresh cluster"), START_MAX, round.start()).await;
        }
        let Some(running) = &mut cluster else {
            lost += 1;
            continue;
        };
        if matches!(part, Part::Failover) && lost == 0 {
            round.end(running);
            ended = true;
        }
        let seconds = Duration::from_secs(arguments.seconds) + PART_MAX;
        let most = if matches!(part, Part::Failover) {
            KILL_MAX * arguments.kills_of(system).max(1)
        } else {
            seconds
        };
        if failed.tried(&name, most, round.part(running, &part)).await.is_none() {
            lost += 1;
            cluster = None;
            round.keep_logs(lost);
        }
    }
    if let Some(mut running) = cluster {
        if !ended && lost == 0 {
            round.end(&running);
        }
        failed.tried(&format!("{system}, the end"), START_MAX, running.stop()).await;
    }
    failed.done(remove(&round.folder));
}

struct Round<'a> {
    arguments: &'a Arguments,
    system: &'a str,
    folder: PathBuf,
    /// The number of the next write.
    next: u64,
    results: &'a mut Results,
}

impl Round<'_> {
    async fn start(&mut self) -> Result<Cluster, BenchError> {
        remove(&self.folder)?;
        std::fs::create_dir_all(&self.folder).map_err(BenchError::file(&self.folder))?;
        if self.system == "etcd" {
            etcd::start(&self.arguments.etcd, &self.folder).await
        } else {
            holdfast::start(&self.arguments.holdfast, &self.folder).await
        }
    }

    async fn part(&mut self, cluster: &mut Cluster, part: &Part) -> Result<(), BenchError> {
        match part {
            Part::Load(scenario) => self.load(cluster, *scenario).await?,
            Part::Watch => {
                let watchers = usize::try_from(self.arguments.watchers).unwrap_or(1);
                let (rate, time) = (self.arguments.watch_rate, Duration::from_secs(self.arguments.seconds));
                watch::run(cluster, watchers, rate, time, &mut self.next, self.results).await?;
            }
            Part::Failover => {
                for _ in 0..self.arguments.kills_of(self.system) {
                    let failover = failover::kill_leader(cluster, &mut self.next).await?;
                    println!(
                        "  {:8} leader killed: {:5.0} ms to a write; member started: {:5.0} ms to serve",
                        self.system,
                        failover.outage.as_secs_f64() * 1e3,
                        failover.restart.as_secs_f64() * 1e3
                    );
                    self.results.failovers.push(failover);
                }
            }
        }
        cluster.is_whole()
    }

    async fn load(&mut self, cluster: &Cluster, scenario: Scenario) -> Result<(), BenchError> {
        let time = Duration::from_secs(self.arguments.seconds);
        let measured = load::run(cluster, scenario, WARM, time, &mut self.next, &self.folder).await?;
        println!(
            "  {:8} {:34} {:8.0}/s  p50 {:8.2} ms  p99 {:8.2} ms  cpu {:6.0} µs/op  own {:4.0} µs/op  fsyncs/op {}  errors {}",
            self.system,
            scenario.name(),
            measured.rate,
            measured.p50_us / 1e3,
            measured.p99_us / 1e3,
            measured.cpu_us,
            measured.own_cpu_us,
            measured.syncs.map_or("?".into(), |s| format!("{s:.3}")),
            measured.errors,
        );
        self.results.add(scenario, measured);
        Ok(())
    }

    /// Notes what all loads left, before members are killed.
    fn end(&mut self, cluster: &Cluster) {
        if self.results.loads.is_empty() {
            return;
        }
        self.results.ends.push((cluster.memory().0, system::disk(&self.folder)));
    }

    /// Keeps what the members of a failed cluster said: their folder is made anew.
    fn keep_logs(&self, lost: usize) {
        let to = self.arguments.folder.join("failed");
        let Ok(entries) = std::fs::read_dir(&self.folder) else { return };
        for from in entries.filter_map(|entry| entry.ok().map(|e| e.path())) {
            if let (Some("log"), Some(name)) = (from.extension().and_then(|e| e.to_str()), from.file_name()) {
                let name = format!("{}-{lost}-{}", self.system, name.to_string_lossy());
                // A log that cannot be kept is no reason to lose a figure.
                let _ = std::fs::create_dir_all(&to).and_then(|()| std::fs::copy(&from, to.join(name)));
            }
        }
    }
}

/// Removes a folder, if it is there.
pub fn remove(folder: &Path) -> Result<(), BenchError> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(BenchError::file(folder)(error)),
        _ => Ok(()),
    }
}
