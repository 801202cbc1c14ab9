//! Members that leave, vote or stop voting, and a history that goes on with one survivor.
//!
//! What is decided here is what the cluster should come to; the leader's clockwork brings Raft's membership in line
//! with it. Each command is safe to repeat: what is so already makes no event.

use super::admission::cluster_only;
use super::{Decision, Refusal, absent, refuse};
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use holdfast_model::resource::Member;
use holdfast_model::{Actor, Aggregate, Code, EventPayload, Incarnation, MemberId, Output};

/// Members that may vote: more make every write slower and no cluster safer.
const VOTERS_MAX: usize = 7;

fn member(draft: &Draft<'_>, id: MemberId) -> Result<Member, Refusal> {
    cluster_only(draft, "member")?;
    draft.member(id)?.ok_or_else(|| absent("member"))
}

/// Refuses what would leave nobody to vote.
fn keep_a_voter(draft: &Draft<'_>, leaves: MemberId) -> Result<(), Refusal> {
    if draft.voting_members()?.iter().any(|id| *id != leaves) {
        return Ok(());
    }
    Err(refuse(
        Code::FailedPrecondition,
        format!("Member {leaves} is the last one that votes: add or promote another one first."),
    ))
}

pub(super) fn remove(draft: &mut Draft<'_>, id: MemberId) -> Decision {
    if member(draft, id)?.removed {
        return Ok(Output::None);
    }
    keep_a_voter(draft, id)?;
    draft.emit(Filing::cluster(Aggregate::Member(id)), EventPayload::MemberRemoved { member: id })?;
    Ok(Output::None)
}

pub(super) fn set_votes(draft: &mut Draft<'_>, id: MemberId, votes: bool) -> Decision {
    if member(draft, id)?.removed {
        return Err(refuse(
            Code::FailedPrecondition,
            format!("Member {id} was removed for good: let a new one join."),
        ));
    }
    if draft.is_non_voter(id)? != votes {
        return Ok(Output::None);
    }
    if !votes {
        keep_a_voter(draft, id)?;
    } else if draft.voting_members()?.len() >= VOTERS_MAX {
        return Err(refuse(
            Code::QuotaExceeded,
            format!("{VOTERS_MAX} members vote already, which is the most: demote one first."),
        ));
    }
    let payload = EventPayload::MemberVotesChanged { member: id, votes };
    draft.emit(Filing::cluster(Aggregate::Member(id)), payload)?;
    Ok(Output::None)
}

pub(super) fn begin_incarnation(
    draft: &mut Draft<'_>,
    incarnation: Incarnation,
    survivor: MemberId,
) -> Decision {
    let cluster = required(draft.cluster()?, "a cluster")?;
    if cluster.incarnation == incarnation {
        return Ok(Output::None);
    }
    let next = Incarnation(cluster.incarnation.0.saturating_add(1));
    let survives = draft.member(survivor)?.is_some_and(|m| !m.removed);
    if incarnation != next || !survives || draft.context().actor != Actor::System(survivor) {
        return Err(refuse(
            Code::FailedPrecondition,
            format!("Incarnation {incarnation} cannot begin with member {survivor}: the next one is {next}."),
        ));
    }
    let last = draft.revision();
    let payload = EventPayload::IncarnationBegan { incarnation, survivor, last };
    draft.emit(Filing::cluster(Aggregate::Cluster(cluster.id)), payload)?;
    if draft.is_non_voter(survivor)? {
        let payload = EventPayload::MemberVotesChanged { member: survivor, votes: true };
        draft.emit(Filing::cluster(Aggregate::Member(survivor)), payload)?;
    }
    for lost in draft.members()?.into_iter().filter(|m| !m.removed && m.id != survivor) {
        let payload = EventPayload::MemberRemoved { member: lost.id };
        draft.emit(Filing::cluster(Aggregate::Member(lost.id)), payload)?;
    }
    Ok(Output::None)
}
