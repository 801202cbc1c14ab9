//! The leader killed, until another takes a write; and a killed member, until it serves again.

use crate::system::{Cluster, Kind, MEMBERS};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_bench::error::BenchError;
use std::time::{Duration, Instant};

/// Between two attempts to write while there is no leader. Each is made whatever became of those before.
const ATTEMPT_EVERY: Duration = Duration::from_millis(10);
/// How long a cluster may be without a leader.
const OUTAGE_MAX: Duration = Duration::from_secs(30);
/// Rest before the next kill.
const REST: Duration = Duration::from_millis(1500);

/// What one kill came to.
#[derive(Clone, Copy, Debug)]
pub struct Failover {
    /// From the kill to the first accepted write that was asked for after it.
    pub outage: Duration,
    /// From the start of the killed member to its first linearizable read.
    pub restart: Duration,
}

/// Kills the leader with SIGKILL, measures, and brings it back.
pub async fn kill_leader(cluster: &mut Cluster, next: &mut u64) -> Result<Failover, BenchError> {
    let leader = cluster.leader().await?;
    let mut lines = Vec::new();
    for i in (0..MEMBERS).filter(|i| *i != leader) {
        lines.push(cluster.dial(i).await?);
    }
    let killed = Instant::now();
    cluster.processes[leader].kill();
    let mut running = FuturesUnordered::new();
    let mut attempts = tokio::time::interval(ATTEMPT_EVERY);
    let shared: &Cluster = cluster;
    let outage = loop {
        if killed.elapsed() > OUTAGE_MAX {
            let what = format!("a write after the leader of {} was killed", shared.name);
            return Err(BenchError::Slow { what, seconds: OUTAGE_MAX.as_secs() });
        }
        tokio::select! {
            Some(accepted) = running.next() => {
                if accepted {
                    break killed.elapsed();
                }
            }
            _ = attempts.tick() => {
                for line in &lines {
                    let kind = Kind::Write(*next);
                    *next += 1;
                    let (mut line, ask) = (line.clone(), shared.protocol.ask(kind)?);
                    running.push(async move {
                        matches!(line.ask(ask).await, Ok(told) if shared.protocol.check(kind, &told).is_ok())
                    });
                }
            }
        }
    };
    drop(running);
    let started = Instant::now();
    cluster.processes[leader].start()?;
    cluster.serves(leader).await?;
    let restart = started.elapsed();
    tokio::time::sleep(REST).await;
    Ok(Failover { outage, restart })
}
