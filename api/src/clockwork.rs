//! What members do by themselves. Every member passes on which agents it heard. The leader also lets time pass in the
//! state machine, judges silent nodes (I7), and brings Raft's membership in line with the members that enrolled.
//! Everything here may stop at any point and be taken up by another leader.

use crate::contacts::Heard;
use crate::liveness::{Watched, judge};
use crate::service::{RequestInfo, Service, now, told_to_stop};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::{HEARTBEAT_MS, UNREACHABLE_MS};
use holdfast_model::resource::NodeState;
use holdfast_model::{Command, MemberId, Timestamp};
use holdfast_raft::MemberNode;
use holdfast_store::Views;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// Between two passes, in milliseconds.
const PASS_MS: u64 = 1_000;
/// Between two ticks of the state machine, in milliseconds.
const TICK_MS: u64 = 2_000;
/// Between two looks at the membership, in milliseconds.
const MEMBERSHIP_MS: u64 = 500;
/// For a message to another member, in milliseconds.
const MESSAGE_MS_MAX: u64 = 1_000;

/// Runs until the member stops.
pub async fn run(service: Arc<Service>) {
    let mut stopping = service.stopping.clone();
    tokio::select! {
        () = told_to_stop(&mut stopping) => {}
        () = pass_on(&service) => {}
        () = lead(&service) => {}
        () = keep_membership(&service) => {}
    }
}

/// What another member passed on. Unknown bytes are ignored: a newer build may say more.
pub fn take_in(service: &Service, message: &[u8]) {
    match postcard::from_bytes::<Heard>(message) {
        Ok(heard) => service.contacts.merge(heard),
        Err(error) => tracing::debug!(%error, "a message of another member was not understood"),
    }
}

async fn pass_on(service: &Service) {
    let mut passes = interval(Duration::from_millis(PASS_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        passes.tick().await;
        let since = Timestamp(now().0.saturating_sub(2 * HEARTBEAT_MS));
        let heard = service.contacts.own_since(since);
        if heard.contacts.is_empty() {
            continue;
        }
        let Ok(message) = postcard::to_stdvec(&heard) else { continue };
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

/// The leader's part. `listening_since` begins anew with every leadership.
async fn lead(service: &Service) {
    let mut passes = interval(Duration::from_millis(PASS_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut listening_since: Option<Timestamp> = None;
    let mut ticked = Timestamp(0);
    loop {
        passes.tick().await;
        if !service.consensus.is_leader() {
            listening_since = None;
            continue;
        }
        let time = now();
        let since = *listening_since.get_or_insert(time);
        if let Err(refusal) = judge_nodes(service, since, time).await {
            tracing::warn!(%refusal, "nodes could not be judged; the next pass tries again");
        }
        // Time-outs are judged by what agents report, so they too wait until the leader has listened (I7).
        if time.since(since) >= UNREACHABLE_MS && time.since(ticked) >= TICK_MS {
            ticked = time;
            propose(service, Command::Tick).await;
        }
    }
}

async fn propose(service: &Service, command: Command) {
    let request = RequestInfo::of_member(service.member);
    if let Err(refusal) = service.propose(&request, command).await {
        tracing::warn!(%refusal, "the clockwork could not propose; the next pass tries again");
    }
}

async fn judge_nodes(
    service: &Service,
    since: Timestamp,
    time: Timestamp,
) -> Result<(), crate::problem::Refusal> {
    let nodes = service.view()?.nodes()?;
    let watched: Vec<_> = nodes
        .iter()
        .filter(|n| matches!(n.state, NodeState::Active | NodeState::Draining | NodeState::Unreachable))
        .map(|n| Watched {
            node: n.id,
            heard_at: service.contacts.contact(AgentRef::Node(n.id)).map(|c| c.at),
            unreachable: n.state == NodeState::Unreachable,
        })
        .collect();
    let verdict = judge(&watched, since, time);
    if verdict.suspects_itself {
        tracing::warn!(nodes = watched.len(), "most nodes are silent at once: the fault is taken to be ours");
    }
    if !verdict.silent.is_empty() || !verdict.back.is_empty() {
        propose(service, Command::ReportSilence { silent: verdict.silent, back: verdict.back }).await;
    }
    Ok(())
}

/// Members that enrolled become learners, then voters; safe to repeat, safe to stop half-way.
async fn keep_membership(service: &Service) {
    let mut passes = interval(Duration::from_millis(MEMBERSHIP_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        passes.tick().await;
        if !service.consensus.is_leader() {
            continue;
        }
        let members = match service.view().map(|v| v.members()) {
            Ok(Ok(members)) => members,
            _ => continue,
        };
        let raft = service.consensus.status();
        // One change at a time: each is a log entry that must be committed before the next.
        let next = members.into_iter().find(|m| !m.removed && !raft.voters.iter().any(|(id, _)| *id == m.id));
        let Some(member) = next else { continue };
        let result = if raft.learners.iter().any(|(id, _)| *id == member.id) {
            service.consensus.promote(member.id).await
        } else {
            let node = MemberNode { raft_addr: member.raft_addr, api_addr: member.api_addr };
            service.consensus.add_learner(member.id, node).await
        };
        if let Err(error) = result {
            tracing::info!(member = %member.id, %error, "the membership could not be changed yet");
        }
    }
}
