//! Looks after backends by itself: in an outage of the control plane nobody else can say that one died or came back.
//!
//! A probe is a TCP connection that is closed at once. A backend in rotation that no client's connection proved alive
//! is probed so often that a dead one leaves within ten seconds (SPEC); one out of rotation is probed more often, and
//! comes back with the first answer.

use crate::backend::Backend;
use crate::connect::{dial, note_answer, note_failure};
use crate::edge::Edge;
use rand::RngExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

/// Probes at a time.
pub const PROBES_MAX: usize = 64;
/// How often the prober looks for due probes.
pub const ROUND: Duration = Duration::from_millis(100);

/// Probes the table's backends until `stop`.
pub async fn run(edge: Arc<Edge>, stop: CancellationToken) {
    let began = Instant::now();
    let probes = Arc::new(Semaphore::new(PROBES_MAX));
    let mut rounds = tokio::time::interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = rounds.tick() => {}
        }
        let now_ms = millis(began.elapsed());
        let table = edge.table();
        for backend in table.backends() {
            // All under way: the others are still due in the next round.
            let Ok(permit) = Arc::clone(&probes).try_acquire_owned() else { break };
            if !backend.take_due_probe(now_ms, now_ms + interval_ms(&edge, backend)) {
                continue;
            }
            // Clients' connections have shown that it lives; the next probe still comes in time.
            if backend.take_answered() && backend.in_rotation() {
                continue;
            }
            let (edge, backend) = (Arc::clone(&edge), Arc::clone(backend));
            tokio::spawn(async move {
                probe(&edge, &backend).await;
                drop(permit);
            });
        }
    }
}

async fn probe(edge: &Edge, backend: &Backend) {
    edge.metrics.probes.increment();
    match dial(backend.key().address, edge.limits.connect).await {
        Ok(_answer) => note_answer(backend, &edge.metrics),
        Err(error) => note_failure(backend, &error, &edge.metrics),
    }
}

/// When the next probe follows: the interval give or take a fifth, so that edges do not knock in step.
fn interval_ms(edge: &Edge, backend: &Backend) -> u64 {
    let limits = &edge.limits;
    let interval = if backend.in_rotation() { limits.probe_healthy } else { limits.probe_unhealthy };
    millis(interval.mul_f64(rand::rng().random_range(0.8..1.2)))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
