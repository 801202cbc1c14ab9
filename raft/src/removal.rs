//! How a removed member learns that it was, and one of an older incarnation that there is a newer.
//!
//! The log that says so is no longer sent to it, and it may have been away. The others refuse everything that it asks
//! with that reason; so every member asks another one something small now and then, and stops for good when that is the
//! answer. A member of a newer incarnation refuses an older one's connections with that reason, which counts alike.
//! Otherwise agents and people would go on reading from a state that nobody keeps up to date.

use std::sync::Arc;
use std::time::Duration;

use rand::RngExt;
use tokio::time::sleep;

use crate::consensus::Inner;
use crate::health::Fault;
use crate::membership;
use crate::transport::message::{Purpose, Refusal, Request, Response};

/// About how long between two questions.
const ASK_EVERY: Duration = Duration::from_secs(3);
/// How long an answer may take.
const ASK_DEADLINE: Duration = Duration::from_secs(2);

/// Asks until the member ends or is told that it was removed.
pub(crate) async fn notice(inner: Arc<Inner>) {
    let mut turn = 0_usize;
    loop {
        let pause = ASK_EVERY.mul_f64(rand::rng().random_range(0.75..1.25));
        tokio::select! {
            () = sleep(pause) => {}
            () = inner.health.failed() => return,
            () = inner.stop.cancelled() => return,
        }
        if let Some(incarnation) = inner.channels.newer_incarnation() {
            inner.health.fail(Fault::Superseded { incarnation });
            return;
        }
        let membership = membership::current(&inner.raft);
        let others: Vec<_> = membership.nodes().filter(|(id, _)| **id != inner.id).collect();
        let Some((other, node)) = others.get(turn % others.len().max(1)) else { continue };
        turn = turn.wrapping_add(1);
        let channel = inner.channels.to(**other, &node.raft_addr, Purpose::Control);
        if let Ok(Response::Refused(Refusal::Removed)) = channel.call(Request::Remembered, ASK_DEADLINE).await
        {
            inner.health.fail(Fault::Removed);
            return;
        }
    }
}
