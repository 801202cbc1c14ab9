//! Raft's membership, brought in line with what the state says: the leader adds who enrolled, lets vote who should,
//! and takes out who was removed. Safe to repeat and to stop half-way; another leader takes it up.
//!
//! Members that do not answer are the reason to change a membership, and a membership that loses its majority cannot
//! be changed any more: [`keeps_a_majority`] is asked before a voter is taken out.

use crate::service::Service;
use holdfast_model::MemberId;
use holdfast_model::resource::Member;
use holdfast_raft::{ConsensusError, MemberNode};
use holdfast_store::Views;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval};

/// Between two looks at the membership, in milliseconds.
const LOOK_MS: u64 = 500;
/// Between two attempts to change the membership for one member, in milliseconds; up to half as long again.
const PAUSE_MS: u64 = 5_000;
/// For a member to show that it is there, in milliseconds.
const ANSWER_MS_MAX: u64 = 1_500;

/// What is next to be done for one member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// It becomes one that receives the log.
    Add,
    /// It becomes a voter.
    Promote,
    /// It votes no more.
    Demote,
    /// It is taken out for good.
    Remove,
}

/// How a member is to stand, and how it stands in Raft.
#[derive(Clone, Copy, Debug)]
struct Standing {
    removed: bool,
    should_vote: bool,
    votes: bool,
    learns: bool,
}

fn next_step(standing: Standing) -> Option<Step> {
    let Standing { removed, should_vote, votes, learns } = standing;
    match (votes, learns) {
        (true, _) | (_, true) if removed => Some(Step::Remove),
        _ if removed => None,
        (true, _) => (!should_vote).then_some(Step::Demote),
        (false, true) => should_vote.then_some(Step::Promote),
        (false, false) => Some(Step::Add),
    }
}

/// Runs for as long as the member does. Each member has a task of its own, because one that enrolled and never came
/// must not keep the others waiting; openraft makes one change after the other.
pub(crate) async fn keep(service: &Arc<Service>) {
    let mut passes = interval(Duration::from_millis(LOOK_MS));
    passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut tasks = JoinSet::new();
    let mut under_way: BTreeMap<MemberId, AbortHandle> = BTreeMap::new();
    loop {
        passes.tick().await;
        while tasks.try_join_next().is_some() {}
        under_way.retain(|_, task| !task.is_finished());
        if !service.consensus.is_leader() {
            continue;
        }
        for (member, step) in steps(service).unwrap_or_default() {
            if !under_way.contains_key(&member.id) {
                let id = member.id;
                under_way.insert(id, tasks.spawn(take(Arc::clone(service), member, step)));
            }
        }
    }
}

fn steps(service: &Service) -> Option<Vec<(Member, Step)>> {
    let view = service.view().ok()?;
    let raft = service.consensus.status();
    let mut steps = Vec::new();
    for member in view.members().ok()? {
        let standing = Standing {
            removed: member.removed,
            should_vote: !view.is_non_voter(member.id).ok()?,
            votes: raft.voters.iter().any(|(id, _)| *id == member.id),
            learns: raft.learners.iter().any(|(id, _)| *id == member.id),
        };
        steps.extend(next_step(standing).map(|step| (member, step)));
    }
    Some(steps)
}

async fn take(service: Arc<Service>, member: Member, step: Step) {
    let id = member.id;
    let result = match step {
        // A leader that took itself out could not tell anybody; its heir does it.
        Step::Demote | Step::Remove if id == service.member => hand_leadership_on(&service).await,
        Step::Demote => service.consensus.demote(id).await,
        Step::Remove => service.consensus.remove(id).await,
        Step::Promote => service.consensus.promote(id).await,
        Step::Add => {
            let node = MemberNode { raft_addr: member.raft_addr, api_addr: member.api_addr };
            service.consensus.add_learner(id, node).await
        }
    };
    if let Err(error) = result {
        tracing::info!(member = %id, ?step, %error, "the membership could not be changed yet");
        let pause = rand::random_range(PAUSE_MS..PAUSE_MS * 3 / 2);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
}

async fn hand_leadership_on(service: &Service) -> Result<(), ConsensusError> {
    match heir(service, Some(service.member)).await {
        Some(heir) => service.consensus.transfer_leader(heir).await,
        None => Err(ConsensusError::Invalid("no other voter answers".to_owned())),
    }
}

/// A voter that answers and is not `leader`.
pub(crate) async fn heir(service: &Service, leader: Option<MemberId>) -> Option<MemberId> {
    let voters = service.consensus.status().voters.into_iter().map(|(id, _)| id);
    let candidates: Vec<_> = voters.filter(|id| Some(*id) != leader).collect();
    answering(service, &candidates).await.first().copied()
}

/// Whether the voters that stay, when `leaves` is taken out, have a majority that answers now.
pub(crate) async fn keeps_a_majority(service: &Service, leaves: MemberId) -> bool {
    let voters: Vec<_> = service.consensus.status().voters.into_iter().map(|(id, _)| id).collect();
    if !voters.contains(&leaves) {
        return true;
    }
    let stay: Vec<_> = voters.into_iter().filter(|id| *id != leaves).collect();
    answering(service, &stay).await.len() > stay.len() / 2
}

/// Those of `members` that answer.
async fn answering(service: &Service, members: &[MemberId]) -> Vec<MemberId> {
    let asked = members.iter().map(|id| async move {
        // An empty message says nothing and is answered all the same.
        let asking = service.consensus.app_to(*id, Vec::new());
        let answer = tokio::time::timeout(Duration::from_millis(ANSWER_MS_MAX), asking).await;
        (*id == service.member || matches!(answer, Ok(Ok(_)))).then_some(*id)
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_standing_leads_to_the_one_that_is_wanted_and_then_rests() {
        for wanted in 0..3 {
            for (votes, learns) in [(false, false), (false, true), (true, false)] {
                let (removed, should_vote) = (wanted == 0, wanted == 2);
                let mut at = Standing { removed, should_vote, votes, learns };
                for _ in 0..3 {
                    match next_step(at) {
                        Some(Step::Add | Step::Demote) => (at.votes, at.learns) = (false, true),
                        Some(Step::Promote) => (at.votes, at.learns) = (true, false),
                        Some(Step::Remove) => (at.votes, at.learns) = (false, false),
                        None => break,
                    }
                }
                assert_eq!(next_step(at), None, "{at:?} does not rest");
                let expected = [(false, false), (false, true), (true, false)][wanted];
                assert_eq!((at.votes, at.learns), expected, "{at:?}");
            }
        }
    }
}
