//! Load on a cluster, and what came of it.
//!
//! Closed loop: each client asks again as soon as it was answered; this finds the most that a system does. Open loop:
//! requests are due at fixed times whatever the system does, and a latency counts from when its request was due, so
//! that a stall is seen by everyone who would have met it (no coordinated omission).

use crate::line::Line;
use crate::system::{Cluster, Kind, MEMBERS};
use futures::future::join_all;
use hdrhistogram::Histogram;
use holdfast_bench::error::BenchError;
use holdfast_bench::process::{SyncCounter, cpu_of};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Clients that share a connection, up to [`LINES_MAX`]; each member gets at least one once there are enough clients.
const CLIENTS_PER_LINE: usize = 8;
/// Connections of one load at most.
const LINES_MAX: usize = 36;
/// Requests of an open loop that may be under way; more wait, and their latency counts.
const IN_FLIGHT_MAX: usize = 4096;
/// Latencies are kept up to this, in microseconds.
pub const LATENCY_US_MAX: u64 = 60_000_000;
/// After this many errors a load is given up.
const ERRORS_MAX: u64 = 100;

/// What the name of everything that loads write begins with.
const KEY_PREFIX: &[u8] = b"bench-";
/// Digits after it.
const KEY_DIGITS: usize = 26;

/// The number in the first written name that `held` has whole; it and all before it are cut off. Otherwise all is cut off
/// that cannot be the beginning of one.
pub fn cut_key(held: &mut Vec<u8>) -> Option<u64> {
    let found = held.windows(KEY_PREFIX.len()).position(|window| window == KEY_PREFIX);
    let Some(at) = found else {
        held.drain(..held.len().saturating_sub(KEY_PREFIX.len() - 1));
        return None;
    };
    let (from, to) = (at + KEY_PREFIX.len(), at + KEY_PREFIX.len() + KEY_DIGITS);
    let Some(digits) = held.get(from..to) else {
        held.drain(..at);
        return None;
    };
    let key = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
    held.drain(..if key.is_some() { to } else { from });
    // A key that is no number is none of a load's: what comes after it is looked at next.
    key.or_else(|| cut_key(held))
}

/// What clients ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Writes only.
    Write,
    /// Linearizable reads only.
    Read,
    /// One write in five.
    Mixed,
}

impl Mix {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Mix::Write => "write",
            Mix::Read => "linearizable read",
            Mix::Mixed => "80 % read, 20 % write",
        }
    }

    fn kind(self, n: u64) -> Kind {
        match self {
            Mix::Read => Kind::Read,
            Mix::Mixed if !n.is_multiple_of(5) => Kind::Read,
            Mix::Write | Mix::Mixed => Kind::Write(n),
        }
    }
}

/// How hard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// So many clients.
    Closed(usize),
    /// So many requests a second.
    Open(u64),
}

/// One load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// What.
    pub mix: Mix,
    /// How hard.
    pub pace: Pace,
}

impl Scenario {
    /// As reports name it.
    pub fn name(self) -> String {
        match self.pace {
            Pace::Closed(1) => format!("{}, 1 client", self.mix.name()),
            Pace::Closed(clients) => format!("{}, {clients} clients", self.mix.name()),
            Pace::Open(rate) => format!("{}, {rate}/s open loop", self.mix.name()),
        }
    }
}

/// What came of a load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Measured {
    /// Answers a second.
    pub rate: f64,
    /// Median latency.
    pub p50_us: f64,
    /// Latency that one in a hundred exceeds.
    pub p99_us: f64,
    /// CPU time of the three members per answer.
    pub cpu_us: f64,
    /// CPU time of the leader per answer.
    pub leader_cpu_us: f64,
    /// CPU time of the other members per answer, their mean.
    pub follower_cpu_us: f64,
    /// CPU time of this program per answer.
    pub own_cpu_us: f64,
    /// fsyncs of the three members per answer.
    pub syncs: Option<f64>,
    /// Requests that failed.
    pub errors: u64,
}

struct Shared {
    next: Cell<u64>,
    done: Cell<u64>,
    errors: Cell<u64>,
    first_error: RefCell<Option<BenchError>>,
    /// When measuring began.
    began: Cell<Option<Instant>>,
    /// Whether it goes on.
    measuring: Cell<bool>,
    latencies: RefCell<Histogram<u64>>,
}

impl Shared {
    fn take(&self) -> u64 {
        let n = self.next.get();
        self.next.set(n + 1);
        n
    }

    /// The rate counts what is answered while measuring goes on; a latency counts when its request was due then, however
    /// late the answer, so that a stall at the end is not lost.
    fn record(&self, due: Instant, outcome: Result<(), BenchError>) {
        if let Err(error) = outcome {
            self.errors.set(self.errors.get() + 1);
            self.first_error.borrow_mut().get_or_insert(error);
            return;
        }
        if self.measuring.get() {
            self.done.set(self.done.get() + 1);
        }
        if self.began.get().is_some_and(|began| due >= began) {
            let us = u64::try_from(due.elapsed().as_micros()).unwrap_or(LATENCY_US_MAX);
            self.latencies.borrow_mut().saturating_record(us.max(1));
        }
    }
}

async fn ask(cluster: &Cluster, line: &mut Line, kind: Kind) -> Result<(), BenchError> {
    let told = line.ask(cluster.protocol.ask(kind)?).await?;
    cluster.protocol.check(kind, &told)
}

/// Runs one load: `warm` unmeasured, then `time` measured. `next` numbers the writes of a cluster.
pub async fn run(
    cluster: &Cluster,
    scenario: Scenario,
    warm: Duration,
    time: Duration,
    next: &mut u64,
    folder: &Path,
) -> Result<Measured, BenchError> {
    let latencies = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3);
    let latencies =
        latencies.map_err(|e| BenchError::Answer { what: "a histogram".into(), why: e.to_string() })?;
    let shared = Rc::new(Shared {
        next: Cell::new(*next),
        done: Cell::new(0),
        errors: Cell::new(0),
        first_error: RefCell::default(),
        began: Cell::new(None),
        measuring: Cell::new(false),
        latencies: RefCell::new(latencies),
    });
    let clients = match scenario.pace {
        Pace::Closed(clients) => clients,
        Pace::Open(_) => CLIENTS_PER_LINE * MEMBERS,
    };
    // A write takes the shortest way in either system when there is one client: through the leader. Reads are asked of all
    // members, by one client in turn.
    let least = if scenario.mix == Mix::Write { clients.min(MEMBERS) } else { MEMBERS };
    let lines = clients.div_ceil(CLIENTS_PER_LINE).max(least).min(LINES_MAX);
    let leader = cluster.leader().await?;
    let mut connections = Vec::with_capacity(lines);
    for i in 0..lines {
        connections.push(cluster.dial((leader + i) % MEMBERS).await?);
    }
    let stop = Instant::now() + warm + time;
    let measure = async {
        tokio::time::sleep(warm).await;
        let counter = SyncCounter::start(&cluster.pids(), folder);
        let (cpu, own) = (cluster.cpu_each(), cpu_of(std::process::id()).unwrap_or_default());
        let began = Instant::now();
        shared.began.set(Some(began));
        shared.measuring.set(true);
        tokio::time::sleep_until(stop.into()).await;
        shared.measuring.set(false);
        let lasted = began.elapsed();
        let own = cpu_of(std::process::id()).unwrap_or_default().saturating_sub(own);
        let spent =
            cluster.cpu_each().into_iter().zip(cpu).map(|(after, before)| after.saturating_sub(before));
        (lasted, spent.collect::<Vec<_>>(), own, counter.stop())
    };
    let load = async {
        match scenario.pace {
            Pace::Closed(_) => {
                let clients = (0..clients).map(|i| {
                    // Its own connection, or several in turn when there are more of them than clients.
                    let turn = connections.iter().skip(i % lines).step_by(clients.max(1));
                    let mut turn: Vec<Line> = turn.cloned().collect();
                    let shared = Rc::clone(&shared);
                    async move {
                        let mut place = 0;
                        while Instant::now() < stop && shared.errors.get() < ERRORS_MAX {
                            let kind = scenario.mix.kind(shared.take());
                            let began = Instant::now();
                            shared.record(began, ask(cluster, &mut turn[place], kind).await);
                            place = (place + 1) % turn.len();
                        }
                    }
                });
                join_all(clients).await;
            }
            Pace::Open(rate) => open(cluster, scenario.mix, rate, stop, &connections, &shared).await,
        }
    };
    let ((lasted, cpu, own, syncs), ()) = tokio::join!(measure, load);
    *next = shared.next.get();
    if let Some(error) = shared.first_error.borrow_mut().take()
        && (shared.errors.get() >= ERRORS_MAX || shared.done.get() == 0)
    {
        return Err(error);
    }
    if shared.done.get() == 0 {
        return Err(BenchError::Slow {
            what: format!("the first answer to a {}", scenario.name()),
            seconds: time.as_secs(),
        });
    }
    let done = shared.done.get() as f64;
    let us = |time: Duration| time.as_secs_f64() * 1e6 / done;
    let all: Duration = cpu.iter().sum();
    let leading = cpu.get(leader).copied().unwrap_or_default();
    let latencies = shared.latencies.borrow();
    Ok(Measured {
        rate: shared.done.get() as f64 / lasted.as_secs_f64(),
        p50_us: latencies.value_at_quantile(0.5) as f64,
        p99_us: latencies.value_at_quantile(0.99) as f64,
        cpu_us: us(all),
        leader_cpu_us: us(leading),
        follower_cpu_us: us(all.saturating_sub(leading)) / (MEMBERS - 1) as f64,
        own_cpu_us: us(own),
        syncs: syncs.map(|n| n as f64 / done),
        errors: shared.errors.get(),
    })
}

async fn open(
    cluster: &Cluster,
    mix: Mix,
    rate: u64,
    stop: Instant,
    connections: &[Line],
    shared: &Rc<Shared>,
) {
    let places = Semaphore::new(IN_FLIGHT_MAX);
    let began = Instant::now();
    let mut running = futures::stream::FuturesUnordered::new();
    let mut sent: u64 = 0;
    while Instant::now() < stop && shared.errors.get() < ERRORS_MAX {
        let due = began + Duration::from_nanos(sent.saturating_mul(1_000_000_000) / rate.max(1));
        let turn = async {
            tokio::time::sleep_until(due.into()).await;
            places.acquire().await
        };
        // While the next request is not due, those under way go on.
        let place = tokio::select! {
            biased;
            Some(()) = futures::StreamExt::next(&mut running) => continue,
            place = turn => place,
        };
        let Ok(place) = place else { break };
        let kind = mix.kind(shared.take());
        let mut line = connections[usize::try_from(sent).unwrap_or(0) % connections.len()].clone();
        sent += 1;
        running.push(async move {
            let outcome = ask(cluster, &mut line, kind).await;
            shared.record(due, outcome);
            drop(place);
        });
    }
    while futures::StreamExt::next(&mut running).await.is_some() {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_found_however_a_stream_is_cut() {
        let text = b"xbench-00000000000000000000000042\",\"bench-\"bench-00000000000000000000000042 bench-00000018446744073709551615";
        for size in 1..text.len() {
            let (mut held, mut keys) = (Vec::new(), Vec::new());
            for chunk in text.chunks(size) {
                held.extend_from_slice(chunk);
                while let Some(key) = cut_key(&mut held) {
                    keys.push(key);
                }
            }
            assert_eq!(keys, [42, 42, u64::MAX], "in pieces of {size}");
            assert!(held.len() < KEY_PREFIX.len() + KEY_DIGITS);
        }
    }
}
