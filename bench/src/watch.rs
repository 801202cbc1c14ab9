//! What is written, sent to many watchers at once: how late each hears of it, and what that costs.
//!
//! The streams share a few connections, spread over all members. Writes come at a fixed rate; a delay counts from when a
//! write was due to when a watcher had it in hand.

use crate::line::Flow;
use crate::load::{LATENCY_US_MAX, cut_key};
use crate::report::Results;
use crate::system::{Cluster, Kind, MEMBERS};
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hdrhistogram::Histogram;
use holdfast_bench::error::BenchError;
use holdfast_bench::history::mixed;
use holdfast_bench::process::cpu_of;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Connections that the watchers share.
const LINES: usize = 30;
/// After the last write, how long a watcher may take to hear of it.
const TAIL: Duration = Duration::from_secs(3);
/// Between the last watch that began and the first write, so that both systems are at rest.
const REST: Duration = Duration::from_secs(1);

struct Shared {
    /// When the write of a key was due. Keys are numbers, see [`mixed`].
    due: RefCell<HashMap<u64, Instant>>,
    delays: RefCell<Histogram<u64>>,
    delivered: Cell<u64>,
}

/// Opens `watchers` streams, writes `rate` times a second, and notes what came of it.
pub async fn run(
    cluster: &Cluster,
    watchers: usize,
    rate: u64,
    time: Duration,
    next: &mut u64,
    results: &mut Results,
) -> Result<(), BenchError> {
    let delays = Histogram::new_with_bounds(1, LATENCY_US_MAX, 3);
    let delays = delays.map_err(|e| BenchError::Answer { what: "a histogram".into(), why: e.to_string() })?;
    let shared =
        Rc::new(Shared { due: RefCell::default(), delays: RefCell::new(delays), delivered: Cell::new(0) });
    let mut lines = Vec::with_capacity(LINES);
    for i in 0..LINES.min(watchers.max(1)) {
        lines.push(cluster.dial(i % MEMBERS).await?);
    }
    let revision = match cluster.protocol.ask_revision()? {
        Some(ask) => Some(lines[0].ask(ask).await?),
        None => None,
    };
    let mut flows = Vec::with_capacity(watchers);
    for i in 0..watchers {
        let place = i % lines.len();
        flows.push(lines[place].open(cluster.protocol.watch(revision.as_ref())?).await?);
    }
    tokio::time::sleep(REST).await;
    let leader = cluster.leader().await?;
    let line = cluster.dial(leader).await?;
    let (cpu, own) = (cluster.cpu(), cpu_of(std::process::id()).unwrap_or_default());
    let began = Instant::now();
    let wanted = Cell::new(u64::MAX);
    let mut listening: FuturesUnordered<_> =
        flows.into_iter().map(|flow| listen(flow, Rc::clone(&shared))).collect();
    let writing = async {
        let mut running = FuturesUnordered::new();
        let writes = rate.saturating_mul(time.as_secs()).max(1);
        for sent in 0..writes {
            let due = began + Duration::from_nanos(sent.saturating_mul(1_000_000_000) / rate.max(1));
            loop {
                tokio::select! {
                    () = tokio::time::sleep_until(due.into()) => break,
                    Some(outcome) = running.next() => outcome?,
                }
            }
            let kind = Kind::Write(*next);
            shared.due.borrow_mut().insert(mixed(*next), due);
            *next += 1;
            let (mut line, ask) = (line.clone(), cluster.protocol.ask(kind)?);
            running.push(async move { cluster.protocol.check(kind, &line.ask(ask).await?) });
        }
        while let Some(outcome) = running.next().await {
            outcome?;
        }
        wanted.set(writes * watchers as u64);
        let until = Instant::now() + TAIL;
        while shared.delivered.get() < wanted.get() && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok::<(), BenchError>(())
    };
    tokio::select! {
        done = writing => done?,
        ended = async {
            loop {
                match listening.next().await {
                    Some(Ok(())) => {}
                    Some(Err(error)) => return error,
                    None => std::future::pending::<()>().await,
                }
            }
        } => return Err(ended),
    }
    let lasted = began.elapsed();
    let per = |cpu: Duration| cpu.as_secs_f64() * 1e6 / shared.delivered.get().max(1) as f64;
    let own = cpu_of(std::process::id()).unwrap_or_default().saturating_sub(own);
    let delays = shared.delays.borrow();
    let what = format!("watch, {watchers} streams, {rate} writes/s");
    println!(
        "  {:8} {what}: {} of {} delivered, p50 {:.2} ms, p99 {:.2} ms",
        cluster.name,
        shared.delivered.get(),
        wanted.get(),
        delays.value_at_quantile(0.5) as f64 / 1e3,
        delays.value_at_quantile(0.99) as f64 / 1e3,
    );
    let mut note = |figure, value| results.note(&what, figure, value);
    note("delivered/s", shared.delivered.get() as f64 / lasted.as_secs_f64());
    note("delivered, share of all", shared.delivered.get() as f64 / wanted.get().max(1) as f64);
    note("write due → delivered, p50 ms", delays.value_at_quantile(0.5) as f64 / 1e3);
    note("write due → delivered, p99 ms", delays.value_at_quantile(0.99) as f64 / 1e3);
    note("members' CPU µs/delivered", per(cluster.cpu().saturating_sub(cpu)));
    note("generator's CPU µs/delivered", per(own));
    Ok(())
}

/// Notes each write that a stream brings. An event may name its key more than once.
async fn listen(mut flow: Flow, shared: Rc<Shared>) -> Result<(), BenchError> {
    let (mut held, mut last) = (Vec::new(), None);
    while let Some(chunk) = flow.next().await? {
        let now = Instant::now();
        held.extend_from_slice(&chunk);
        while let Some(key) = cut_key(&mut held) {
            if last.replace(key) == Some(key) {
                continue;
            }
            // Not of this load, but of one before it.
            let Some(due) = shared.due.borrow().get(&key).copied() else { continue };
            shared.delivered.set(shared.delivered.get() + 1);
            let us = u64::try_from((now - due).as_micros()).unwrap_or(LATENCY_US_MAX);
            shared.delays.borrow_mut().saturating_record(us.max(1));
        }
    }
    Ok(())
}
