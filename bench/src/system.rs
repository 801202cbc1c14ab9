//! What a measured system must offer: three members on loopback, one kind of write, one kind of read.

use crate::line::{Ask, Dialler, Line, Told};
use holdfast_bench::error::BenchError;
use holdfast_bench::process::Process;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

/// Members of each cluster.
pub const MEMBERS: usize = 3;
/// How long a cluster may take to get ready.
pub const READY_MAX: Duration = Duration::from_secs(60);
/// Between two looks while something is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// What is asked of a system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The `n`th write; no two runs of a cluster share a number.
    Write(u64),
    /// A linearizable read of one resource.
    Read,
}

/// How requests look and what a good answer is. Shared by all clients of a load.
pub trait Protocol {
    /// A request.
    fn ask(&self, kind: Kind) -> Result<Ask, BenchError>;

    /// Whether the answer is what the request was for.
    fn check(&self, kind: Kind, told: &Told) -> Result<(), BenchError>;

    /// A question to a member for who leads.
    fn ask_leader(&self) -> Result<Ask, BenchError>;

    /// The leader's place among the members, if the answer names one.
    fn leader(&self, told: &Told) -> Option<usize>;

    /// A question for the revision after which a watch is to begin; `None` when a watch begins by itself with what
    /// comes.
    fn ask_revision(&self) -> Result<Option<Ask>, BenchError>;

    /// A request for everything that is written from now on, or after the revision that was asked for, without an end.
    fn watch(&self, revision: Option<&Told>) -> Result<Ask, BenchError>;

    /// A request for the rows of one of the groups that a full scan is made of.
    fn scan(&self, group: &str) -> Result<Ask, BenchError>;

    /// How many rows an answer to a scan has.
    fn scanned(&self, told: &Told) -> Result<u64, BenchError>;
}

/// A running cluster.
pub struct Cluster {
    /// As reports name it.
    pub name: &'static str,
    /// The members' processes.
    pub processes: Vec<Process>,
    /// Where clients reach the members, in the same order.
    pub addresses: Vec<SocketAddr>,
    /// How to connect.
    pub dialler: Dialler,
    /// How to talk.
    pub protocol: Box<dyn Protocol>,
}

impl Cluster {
    /// CPU time of all members.
    pub fn cpu(&self) -> Duration {
        self.processes.iter().map(Process::cpu).sum()
    }

    /// CPU time of each member.
    pub fn cpu_each(&self) -> Vec<Duration> {
        self.processes.iter().map(Process::cpu).collect()
    }

    /// Resident memory of all members, in bytes: all of it, and what is not of files.
    pub fn memory(&self) -> (u64, u64) {
        let each = self.processes.iter().map(Process::memory);
        each.fold((0, 0), |(all, own), member| (all + member.0, own + member.1))
    }

    /// Asks all members to end, one after the other, and waits until they did.
    pub async fn stop(&mut self) -> Result<(), BenchError> {
        let mut outcome = Ok(());
        for process in &mut self.processes {
            // The others are to end, too, whatever became of one.
            outcome = outcome.and(process.stop().await);
        }
        outcome
    }

    /// That no member ended by itself.
    pub fn is_whole(&mut self) -> Result<(), BenchError> {
        for process in &mut self.processes {
            if let Some(status) = process.ended() {
                let what = format!("{}, by itself,", process.name());
                let log = process.log().to_owned();
                return Err(BenchError::Ended { what, status: status.to_string(), log });
            }
        }
        Ok(())
    }

    /// The living members' process ids.
    pub fn pids(&self) -> Vec<u32> {
        self.processes.iter().filter_map(Process::pid).collect()
    }

    /// Connects to a member.
    pub async fn dial(&self, member: usize) -> Result<Line, BenchError> {
        Line::dial(&self.dialler, self.addresses[member]).await
    }

    /// One request through a member over a connection of its own.
    pub async fn once(&self, member: usize, kind: Kind) -> Result<(), BenchError> {
        let told = self.dial(member).await?.ask(self.protocol.ask(kind)?).await?;
        self.protocol.check(kind, &told)
    }

    /// The leader, by its own word: a member that was just started may still name the one before.
    pub async fn leader(&self) -> Result<usize, BenchError> {
        let until = Instant::now() + READY_MAX;
        while Instant::now() < until {
            for member in 0..MEMBERS {
                if self.led_by(member).await? == Some(member) {
                    return Ok(member);
                }
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        Err(BenchError::Slow { what: format!("a leader of {}", self.name), seconds: READY_MAX.as_secs() })
    }

    /// Who leads, as a member knows it; `None` when it knows of none or does not answer.
    async fn led_by(&self, member: usize) -> Result<Option<usize>, BenchError> {
        if self.processes[member].pid().is_none() {
            return Ok(None);
        }
        let Ok(mut line) = self.dial(member).await else { return Ok(None) };
        let told = line.ask(self.protocol.ask_leader()?).await;
        Ok(told.ok().and_then(|told| self.protocol.leader(&told)))
    }

    /// Waits until a member answers a linearizable read; returns how long that took.
    pub async fn serves(&self, member: usize) -> Result<Duration, BenchError> {
        let began = Instant::now();
        while began.elapsed() < READY_MAX {
            if self.once(member, Kind::Read).await.is_ok() {
                return Ok(began.elapsed());
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        let what = format!("member {} of {} to serve", member + 1, self.name);
        Err(BenchError::Slow { what, seconds: READY_MAX.as_secs() })
    }
}

/// Loopback ports that were free a moment ago, in the order asked for.
pub fn free_addresses(count: usize) -> Result<Vec<SocketAddr>, BenchError> {
    // All are held until all are known, so that none is given twice.
    let held: Result<Vec<_>, _> = (0..count).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect();
    let held = held.map_err(BenchError::file("a loopback port"))?;
    held.iter().map(|l| l.local_addr().map_err(BenchError::file("a loopback port"))).collect()
}

/// Bytes of a folder with everything in it.
pub fn disk(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk(&entry.path()),
        Ok(metadata) => metadata.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}
