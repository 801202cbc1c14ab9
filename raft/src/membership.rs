//! Changes of the membership, as the leader makes them. Each is safe to ask for again, and none is begun while the one
//! before is under way: openraft refuses that, and the caller waits a little and asks again.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::raft::VoteRequest;
use openraft::{ChangeMembers, Instant as _};
use rand::RngExt;
use tokio::time::{Instant, sleep, timeout_at};

use crate::service::MemberRaft;
use crate::transport::message::{AdminRequest, Refusal};
use crate::types::{MemberNode, Membership, Vote};

/// How long one change may take, waiting for the one before it included.
pub(crate) const CHANGE_DEADLINE: Duration = Duration::from_secs(30);
/// Entries that a learner may be behind when it becomes a voter: what a LAN replicates in an instant.
const PROMOTE_LAG_ENTRIES_MAX: u64 = 1000;
/// How long ago a learner may have answered when it becomes a voter.
const PROMOTE_SILENCE_MAX: Duration = Duration::from_secs(2);
/// How long a transfer of the leadership may take.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(5);
/// How long a member has to take the leadership before it is told once more.
const TRANSFER_ASKED_EVERY: Duration = Duration::from_millis(500);
/// About how long to wait before looking again.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Voters that a cluster may have: more make every write slower and no cluster safer.
pub(crate) const VOTERS_MAX: usize = 7;

type Change = ChangeMembers<u64, MemberNode>;

/// Makes a change on this member, which must lead.
pub(crate) async fn change(
    raft: &MemberRaft,
    former: &BTreeSet<u64>,
    request: AdminRequest,
) -> Result<(), Refusal> {
    let until = Instant::now() + CHANGE_DEADLINE;
    let membership = effective(raft).await?;
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    // A leader that ended half-way left two configurations in force: asking again completes the change.
    let half_way = membership.get_joint_config().len() > 1;
    let only = |id: u64| BTreeSet::from([id]);
    match request {
        AdminRequest::AddLearner { id, node } => match membership.get_node(&id) {
            Some(known) if *known == node => Ok(()),
            Some(_) => Err(Refusal::Invalid(format!(
                "member {id} has other addresses in the cluster; remove it and join again under a new id"
            ))),
            None if former.contains(&id) => Err(Refusal::Invalid(format!(
                "member {id} was removed from the cluster, and ids are never used again; join under a new id"
            ))),
            None => apply(raft, ChangeMembers::AddNodes(BTreeMap::from([(id, node)])), false, until).await,
        },
        AdminRequest::Promote { id } if voters.contains(&id) && !half_way => Ok(()),
        AdminRequest::Promote { id } => {
            known(&membership, id)?;
            if voters.len() >= VOTERS_MAX && !voters.contains(&id) {
                return Err(Refusal::Invalid(format!(
                    "the cluster has {VOTERS_MAX} voters already; demote one first"
                )));
            }
            caught_up(raft, id, until).await?;
            apply(raft, ChangeMembers::AddVoterIds(only(id)), true, until).await
        }
        AdminRequest::Demote { id } => {
            known(&membership, id)?;
            if !voters.contains(&id) && !half_way {
                return Ok(());
            }
            keep_a_voter(&voters, id)?;
            apply(raft, ChangeMembers::RemoveVoters(only(id)), true, until).await
        }
        AdminRequest::Remove { id } if membership.get_node(&id).is_none() => Ok(()),
        AdminRequest::Remove { id } => {
            if voters.contains(&id) {
                keep_a_voter(&voters, id)?;
                apply(raft, ChangeMembers::RemoveVoters(only(id)), false, until).await
            } else {
                apply(raft, ChangeMembers::RemoveNodes(only(id)), false, until).await
            }
        }
        AdminRequest::TransferLeader { to } if !voters.contains(&to) => {
            Err(Refusal::Invalid(format!("member {to} is no voter; promote it first")))
        }
        AdminRequest::TransferLeader { to } => transfer(raft, to).await,
    }
}

/// The newest membership in this member's log. Asked of the core, because the metrics lag behind it, and a change that
/// was just made must be seen by the next.
async fn effective(raft: &MemberRaft) -> Result<Membership, Refusal> {
    raft.with_raft_state(|state| state.membership_state.effective().membership().clone())
        .await
        .map_err(|error| Refusal::Unavailable(error.to_string()))
}

/// The membership that this member last told of.
pub(crate) fn current(raft: &MemberRaft) -> Membership {
    raft.metrics().borrow_watched().membership_config.membership().clone()
}

/// Where a member is, as this one last told.
pub(crate) fn node(raft: &MemberRaft, id: u64) -> Option<MemberNode> {
    raft.metrics().borrow_watched().membership_config.membership().get_node(&id).cloned()
}

fn known(membership: &Membership, id: u64) -> Result<(), Refusal> {
    match membership.get_node(&id) {
        Some(_) => Ok(()),
        None => Err(Refusal::Invalid(format!("member {id} is not in the cluster; add it first"))),
    }
}

fn keep_a_voter(voters: &BTreeSet<u64>, id: u64) -> Result<(), Refusal> {
    if voters.len() == 1 && voters.contains(&id) {
        return Err(Refusal::Invalid(format!("member {id} is the last voter; promote another one first")));
    }
    Ok(())
}

/// Asks openraft for a change until it is made, is refused for good, or time is up.
async fn apply(raft: &MemberRaft, change: Change, retain: bool, until: Instant) -> Result<(), Refusal> {
    loop {
        let attempt = timeout_at(until, raft.change_membership(change.clone(), retain)).await;
        let Ok(result) = attempt else {
            return Err(Refusal::Unknown("the change of the membership took too long".to_owned()));
        };
        match result {
            Ok(_) => return Ok(()),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(forward))) => {
                return Err(Refusal::NotLeader { leader: forward.leader_id });
            }
            Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_),
            ))) if Instant::now() < until => pause().await,
            Err(RaftError::APIError(ClientWriteError::LogEntryDiscarded(_))) => {
                return Err(Refusal::Unknown("the leader changed".to_owned()));
            }
            Err(RaftError::APIError(error)) => return Err(Refusal::Invalid(error.to_string())),
            Err(RaftError::Fatal(error)) => return Err(Refusal::Unknown(error.to_string())),
        }
    }
}

/// Who votes in every configuration that is in force: one that is on its way in or out does not count yet.
pub(crate) fn settled_voters(membership: &Membership) -> BTreeSet<u64> {
    let configs = membership.get_joint_config();
    membership.voter_ids().filter(|id| configs.iter().all(|config| config.contains(id))).collect()
}

/// Waits until a learner has nearly the whole log, and answers: a voter that does neither would only make the majority
/// harder to reach.
async fn caught_up(raft: &MemberRaft, id: u64, until: Instant) -> Result<(), Refusal> {
    loop {
        let (lag, answers) = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow_watched();
            let Some(replication) = &metrics.replication else {
                return Err(Refusal::NotLeader { leader: metrics.current_leader });
            };
            let end = metrics.last_log_index.map_or(0, |last| last + 1);
            let matched = replication.get(&id).and_then(|matched| matched.as_ref());
            // The last match is kept when the learner is long gone; only the time of its last answer tells.
            let heard = metrics.heartbeat.as_ref().and_then(|heard| heard.get(&id).copied().flatten());
            let answers = heard.is_some_and(|at| at.elapsed() <= PROMOTE_SILENCE_MAX);
            (matched.map(|matched| end.saturating_sub(matched.index() + 1)), answers)
        };
        if answers && lag.is_some_and(|lag| lag <= PROMOTE_LAG_ENTRIES_MAX) {
            return Ok(());
        }
        if Instant::now() >= until {
            let text = match lag {
                Some(lag) if answers => format!("is {lag} entries behind"),
                _ => "does not answer".to_owned(),
            };
            return Err(Refusal::Unavailable(format!("member {id} {text}")));
        }
        pause().await;
    }
}

/// Hands the leadership over, once: when it does not work, whoever asked is told, and looks before they ask again. It is a
/// task of its own: whoever asked may go away, and a hand-over that nobody follows to its
/// end would leave a leader that takes no writes.
async fn transfer(raft: &MemberRaft, to: u64) -> Result<(), Refusal> {
    let raft = raft.clone();
    let followed = tokio::spawn(async move { hand_over(&raft, to).await });
    followed.await.map_err(|error| Refusal::Unavailable(error.to_string()))?
}

async fn hand_over(raft: &MemberRaft, to: u64) -> Result<(), Refusal> {
    let until = Instant::now() + TRANSFER_DEADLINE;
    let now = |raft: &MemberRaft| {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        (metrics.state.is_leader().then_some(metrics.vote), metrics.current_leader)
    };
    let (vote, leader) = now(raft);
    if leader == Some(to) {
        return Ok(());
    }
    let Some(vote) = vote else { return Err(Refusal::NotLeader { leader }) };
    // To somebody who is silent it is not tried at all: meanwhile nobody would take writes.
    match caught_up(raft, to, until).await {
        Err(Refusal::Unavailable(text)) => {
            return Err(Refusal::Invalid(format!("{text}, so the leadership stays where it is")));
        }
        other => other?,
    }
    let until = Instant::now() + TRANSFER_DEADLINE;
    // Asked again as long as this member leads in the term in which it was told to hand over: a later term is another
    // leader's, or this one's by an election that came after.
    while Instant::now() < until && now(raft).0 == Some(vote) {
        if !effective(raft).await?.voter_ids().any(|voter| voter == to) {
            step_down(raft, &vote, to).await?;
            return Err(Refusal::Invalid(format!("member {to} is no voter; promote it first")));
        }
        raft.trigger().transfer_leader(to).await.map_err(|error| Refusal::Unavailable(error.to_string()))?;
        let pause_until = Instant::now() + TRANSFER_ASKED_EVERY;
        while now(raft).0 == Some(vote) && Instant::now() < pause_until {
            pause().await;
        }
    }
    if now(raft).0 == Some(vote) {
        step_down(raft, &vote, to).await?;
        return Err(Refusal::Invalid(format!("member {to} did not take the leadership in time")));
    }
    while now(raft).1.is_none() && Instant::now() < until {
        pause().await;
    }
    match now(raft).1 {
        Some(leader) if leader == to => Ok(()),
        Some(leader) => Err(Refusal::Invalid(format!("member {leader} took the leadership instead"))),
        None => Err(Refusal::Invalid(format!("member {to} did not take the leadership in time"))),
    }
}

/// Gives the leadership up. openraft's leader takes no writes from the moment that it was told to hand over, for as long as
/// it leads, also when nobody takes it; its heartbeats meanwhile keep everybody else from standing. Its vote for the heir in
/// the term that follows, as the heir would have asked for it, ends its own term, and an election makes a leader that takes
/// writes, most often of the same member.
pub(crate) async fn step_down(raft: &MemberRaft, vote: &Vote, heir: u64) -> Result<(), Refusal> {
    tracing::warn!(
        heir,
        "the leadership was not taken over; stepping down, so that an election makes a leader that takes writes"
    );
    let last = raft.with_raft_state(|state| state.log_ids.last().copied()).await;
    let last_log_id = last.map_err(|error| Refusal::Unavailable(error.to_string()))?;
    let vote = Vote::new(vote.leader_id.term + 1, heir);
    let request = VoteRequest { vote, last_log_id, leadership_transfer: true };
    raft.vote(request).await.map_err(|error| Refusal::Unavailable(error.to_string()))?;
    Ok(())
}

async fn pause() {
    let pause = POLL_INTERVAL.mul_f64(rand::rng().random_range(0.5..1.5));
    sleep(pause).await;
}
