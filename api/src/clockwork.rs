//! What members do by themselves. Every member passes on which agents it heard. The leader also lets time pass in the
//! state machine, judges silent nodes (I7), and brings Raft's membership in line with the members that enrolled.
//! Everything here may stop at any point and be taken up by another leader.

use crate::contacts::Heard;
use crate::liveness::{Watched, judge};
use crate::membership;
use crate::sealing;
use crate::service::{RequestInfo, Service, now, told_to_stop};
use holdfast_model::command::AgentRef;
use holdfast_model::exec::{ExecEnd, ExecGrant};
use holdfast_model::limits::{HEARTBEAT_MS, UNREACHABLE_MS};
use holdfast_model::{Command, MemberId, Timestamp};
use holdfast_store::Views;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{MissedTickBehavior, interval};

/// Between two passes, in milliseconds.
const PASS_MS: u64 = 1_000;
/// Between two ticks of the state machine, in milliseconds.
const TICK_MS: u64 = 2_000;
/// The longest between two passes before the leader listens anew: well below what makes a node silent, and longer than
/// a proposal is tried. In milliseconds.
const PAUSE_MS_MAX: u64 = 20_000;
/// Exec sessions of an earlier process that are looked for at most: others end by their time.
const LOST_SESSIONS_MAX: usize = 10_000;
/// For a message to another member, in milliseconds.
const MESSAGE_MS_MAX: u64 = 1_000;

/// Runs until the member stops.
pub async fn run(service: Arc<Service>) {
    let mut stopping = service.stopping.clone();
    tokio::select! {
        () = told_to_stop(&mut stopping) => {}
        () = pass_on(&service) => {}
        () = forget_lost_sessions(&service) => {}
        () = lead(&service) => {}
        () = membership::keep(&service) => {}
        () = sealing::keep(&service) => {}
    }
}

/// What another member passed on. Unknown bytes are ignored: a newer build may say more.
pub fn take_in(service: &Service, message: &[u8]) {
    match postcard::take_from_bytes::<Heard>(message) {
        // Builds that know nothing of news tell none, and do not look behind the contacts.
        Ok((heard, more)) => service.contacts.merge(heard, postcard::from_bytes(more).unwrap_or_default()),
        Err(error) => tracing::debug!(%error, "a message of another member was not understood"),
    }
}

/// Ends the exec sessions that an earlier process of this member passed on: they ended with it.
async fn forget_lost_sessions(service: &Service) {
    let mut passes = interval(Duration::from_millis(PASS_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        passes.tick().await;
        if end_lost_sessions(service).await.is_ok() {
            std::future::pending::<()>().await;
        }
    }
}

async fn end_lost_sessions(service: &Service) -> Result<(), crate::problem::Refusal> {
    // Everything that the earlier process wrote down is here.
    service.consensus.linearize().await?;
    let view = service.view()?;
    let began = now();
    let own = |grant: &ExecGrant| grant.used.is_some_and(|used| used.member == service.member);
    let mut lost = view.exec_grants(LOST_SESSIONS_MAX)?;
    lost.retain(|grant| own(grant) && !service.exec.has(grant.id));
    drop(view);
    for grant in lost {
        let lasted_ms = grant.used.map_or(0, |used| began.since(used.at));
        let (grant, end, code) = (grant.id, ExecEnd::Lost, None);
        let command = Command::EndExecGrant { grant, end, code, lasted_ms };
        service.propose(&RequestInfo::of_member(service.member), command).await?;
    }
    Ok(())
}

async fn pass_on(service: &Service) {
    let mut passes = interval(Duration::from_millis(PASS_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        passes.tick().await;
        let (heard, news) = service.contacts.own_within(Duration::from_millis(2 * HEARTBEAT_MS));
        if heard.contacts.is_empty() {
            continue;
        }
        let Ok(message) = postcard::to_stdvec(&(heard, news)) else { continue };
        let others: Vec<MemberId> = match service.view().map(|v| v.members()) {
            Ok(Ok(members)) => {
                members.iter().filter(|m| !m.removed && m.id != service.member).map(|m| m.id).collect()
            }
            _ => continue,
        };
        let sends = others.into_iter().map(|id| {
            let send = service.consensus.app_to(id, message.clone());
            tokio::time::timeout(Duration::from_millis(MESSAGE_MS_MAX), send)
        });
        // A member that cannot be told now is told again at the next pass.
        let _ = futures::future::join_all(sends).await;
    }
}

/// Since when the leader has been listening.
struct Listening {
    since: Option<Instant>,
    passed: Instant,
}

impl Listening {
    fn new(now: Instant) -> Self {
        Self { since: None, passed: now }
    }

    /// A pass at `now`: since when we have been listening as leader without a break, or `None` when we do not lead. It
    /// begins anew with every leadership, and whenever this process stood still for so long that silence around it may
    /// have been its own (I7).
    fn pass(&mut self, leads: bool, now: Instant) -> Option<Instant> {
        let stood_still = now.saturating_duration_since(self.passed) > Duration::from_millis(PAUSE_MS_MAX);
        self.passed = now;
        if !leads || stood_still {
            self.since = None;
        }
        leads.then(|| *self.since.get_or_insert(now))
    }
}

/// The leader's part.
async fn lead(service: &Service) {
    let mut passes = interval(Duration::from_millis(PASS_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut listening = Listening::new(Instant::now());
    let mut ticked: Option<Instant> = None;
    loop {
        passes.tick().await;
        let Some(since) = listening.pass(service.consensus.is_leader(), Instant::now()) else { continue };
        if let Err(refusal) = judge_nodes(service, since).await {
            tracing::warn!(%refusal, "nodes could not be judged; the next pass tries again");
        }
        // Time-outs are judged by what agents report, so they too wait until the leader has listened (I7).
        let listened = since.elapsed() >= Duration::from_millis(UNREACHABLE_MS);
        if listened && ticked.is_none_or(|at| at.elapsed() >= Duration::from_millis(TICK_MS)) {
            ticked = Some(Instant::now());
            propose(service, Command::Tick).await;
        }
    }
}

async fn propose(service: &Service, command: Command) {
    if let Err(refusal) = service.propose_as_leader(command).await {
        tracing::warn!(%refusal, "the clockwork could not propose; the next pass tries again");
    }
}

async fn judge_nodes(service: &Service, since: Instant) -> Result<(), crate::problem::Refusal> {
    let time = now();
    // How long ago is measured; when that was by the wall clock is only how it is written down.
    let before =
        |age: Duration| Timestamp(time.0.saturating_sub(age.as_millis().try_into().unwrap_or(u64::MAX)));
    let nodes = service.view()?.nodes()?;
    let watched: Vec<_> = nodes
        .iter()
        .filter(|n| n.is_trusted())
        .map(|n| Watched {
            node: n.id,
            heard_at: service.contacts.age(AgentRef::Node(n.id)).map(before),
            unreachable: n.silent_since.is_some(),
        })
        .collect();
    let verdict = judge(&watched, before(since.elapsed()), time);
    if verdict.suspects_itself {
        tracing::warn!(nodes = watched.len(), "most nodes are silent at once: the fault is taken to be ours");
    }
    if !verdict.silent.is_empty() || !verdict.back.is_empty() {
        propose(service, Command::ReportSilence { silent: verdict.silent, back: verdict.back }).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i07_a_leader_that_stood_still_listens_anew() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut listening = Listening::new(start);
        assert_eq!(listening.pass(false, at(1_000)), None);
        assert_eq!(listening.pass(true, at(2_000)), Some(at(2_000)));
        assert_eq!(listening.pass(true, at(2_000 + PAUSE_MS_MAX)), Some(at(2_000)));
        // Stopped like this its contacts are as old as the pause, and nobody was silent but itself.
        let woken = 2_001 + 2 * PAUSE_MS_MAX;
        assert_eq!(listening.pass(true, at(woken)), Some(at(woken)));
        assert_eq!(listening.pass(false, at(woken + 1)), None);
        assert_eq!(listening.pass(true, at(woken + 2)), Some(at(woken + 2)));
    }
}
