//! Members: taking one out, who votes, who leads, and whether their states are sound and the same.

use crate::endpoint::{Endpoint, Need, Table};
use crate::membership;
use crate::problem::{Refusal, sentence};
use crate::request::{Body, Call, done, found};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{
    Answer, Done, Leader, MemberFinding, Problem, RebuildViews, RebuiltViews, TransferLeader, Verification,
    VerifiedMember, VerifyMember,
};
use holdfast_model::resource::Member;
use holdfast_model::{Code, Command, MemberId, Revision, Scope};
use holdfast_raft::ConsensusError;
use holdfast_store::{StoreError, Views};
use std::sync::Arc;

/// Where members ask each other to verify themselves.
const VERIFY_PATH: &str = "/v1/members/verify";

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    let admin = Need::Operator(Scope::ClusterAdmin);
    table.add(
        Endpoint::delete("/v1/members/{member}", admin, "Remove a member for good")
            .query(&[("force", "true: also when the members that stay have no majority that answers.")])
            .answers::<Done>(200),
        remove,
    );
    table.add(
        Endpoint::post("/v1/members/{member}/promote", admin, "Make a member a voter").answers::<Done>(200),
        promote,
    );
    table.add(
        Endpoint::post(
            "/v1/members/{member}/demote",
            admin,
            "Make a member one that follows and does not vote",
        )
        .answers::<Done>(200),
        demote,
    );
    table.add(
        Endpoint::post("/v1/cluster/leader", admin, "Hand the leadership over")
            .body::<TransferLeader>()
            .answers::<Answer<Leader>>(200),
        transfer,
    );
    // Reading everything again may take longer than an ordinary request.
    table.add(
        Endpoint::post("/v1/cluster/verify", admin, "Have every member check its state, and compare them")
            .streams()
            .answers::<Answer<Verification>>(200),
        verify,
    );
    table.add(
        Endpoint::post("/v1/cluster/rebuild", admin, "Replay the history up to a revision on every member")
            .body::<RebuildViews>()
            .streams()
            .answers::<Answer<RebuiltViews>>(200),
        rebuild,
    );
    table.add(
        Endpoint::post(VERIFY_PATH, Need::Member, "Check the member's own state, for another member")
            .body::<VerifyMember>()
            .streams()
            .answers::<Answer<VerifiedMember>>(200),
        verify_own,
    );
}

async fn carry_out(call: &Call, command: Command) -> Result<Response, Refusal> {
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn remove(call: Call) -> Result<Response, Refusal> {
    let member: MemberId = call.id("member", "member")?;
    check_majority(&call, member).await?;
    carry_out(&call, Command::RemoveMember { member }).await
}

async fn promote(call: Call) -> Result<Response, Refusal> {
    carry_out(&call, Command::SetMemberVotes { member: call.id("member", "member")?, votes: true }).await
}

async fn demote(call: Call) -> Result<Response, Refusal> {
    let member: MemberId = call.id("member", "member")?;
    check_majority(&call, member).await?;
    carry_out(&call, Command::SetMemberVotes { member, votes: false }).await
}

/// Refuses to take a voter out when those that stay could not decide anything.
async fn check_majority(call: &Call, member: MemberId) -> Result<(), Refusal> {
    let force = call.query::<bool>("force").ok().flatten().unwrap_or(false);
    if force || membership::keeps_a_majority(&call.service, member).await {
        return Ok(());
    }
    Err(Refusal::new(
        Code::FailedPrecondition,
        format!(
            "Without member {member} too few of the members that vote would answer, and nothing could be decided any \
             more: bring another one back, or let a new one join, before this one leaves."
        ),
    ))
}

async fn transfer(call: Call, Body(body): Body<TransferLeader>) -> Result<Response, Refusal> {
    // Who may do this is judged in the state as a majority has it, as for every other change.
    let view = call.view().await?;
    let consensus = &call.service.consensus;
    let heir = match body.to {
        Some(to) => view
            .member(to)?
            .filter(|m| !m.removed)
            .map(|m| m.id)
            .ok_or_else(|| Refusal::not_found("member"))?,
        None => {
            let leader = consensus.status().leader;
            membership::heir(&call.service, leader).await.ok_or_else(|| {
                Refusal::new(Code::FailedPrecondition, "No other member that votes answers; none can lead.")
            })?
        }
    };
    consensus.transfer_leader(heir).await?;
    tracing::info!(to = %heir, by = %call.caller.request().actor, "the leadership was handed over");
    Ok(found(view.revision(), Leader { member: heir }))
}

async fn verify(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let at = view.revision();
    let members = present(&view)?;
    drop(view);
    Ok(found(at, compare(&call.service, &members, at).await))
}

/// What the views were at a revision: by a replay of this member's events, and of every other's to compare.
async fn rebuild(call: Call, Body(body): Body<RebuildViews>) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let (asked, head) = (body.to, view.revision());
    if asked > head {
        return Err(StoreError::NoSuchRevision { asked, head }.into());
    }
    let members = present(&view)?;
    drop(view);
    let replayed = call.service.consensus.replay_to(asked).await?;
    let members = compare(&call.service, &members, asked).await;
    let rows = replayed.rows.into_iter().map(|(table, count)| (table.to_owned(), count)).collect();
    let (revision, views) = (replayed.rebuilt.revision, replayed.rebuilt.views);
    Ok(found(head, RebuiltViews { revision, views, rows, members }))
}

fn present(view: &impl Views) -> Result<Vec<Member>, Refusal> {
    Ok(view.members()?.into_iter().filter(|m| !m.removed).collect())
}

/// Has every member check itself, and compares what their histories lead to at a revision.
async fn compare(service: &Service, members: &[Member], at: Revision) -> Verification {
    let findings = futures::future::join_all(members.iter().map(|m| finding(service, m, at))).await;
    let verification = judge(at, findings);
    if !verification.sound {
        tracing::error!(%at, "the members' states are not sound, or not the same");
    }
    verification
}

/// Marks every member whose views are not those of the most, and says whether all is well.
fn judge(at: Revision, mut members: Vec<MemberFinding>) -> Verification {
    let digests: Vec<_> = members.iter().filter_map(|m| m.verified.as_ref().map(|v| v.views)).collect();
    let count = |digest| digests.iter().filter(|other| **other == digest).count();
    let most = digests.iter().copied().max_by_key(|digest| count(*digest));
    for member in &mut members {
        if let Some(verified) = &member.verified
            && Some(verified.views) != most
        {
            member.problem =
                Some(format!("At revision {at} it has other views than the other members (I1)."));
        }
    }
    Verification { at, sound: members.iter().all(|m| m.problem.is_none()), members }
}

async fn finding(service: &Service, member: &Member, at: Revision) -> MemberFinding {
    let verified =
        if member.id == service.member { own(service, at).await } else { ask(service, member, at).await };
    match verified {
        Ok(verified) => MemberFinding { member: member.id, verified: Some(verified), problem: None },
        Err(refusal) => MemberFinding { member: member.id, verified: None, problem: Some(refusal.detail) },
    }
}

async fn ask(service: &Service, member: &Member, at: Revision) -> Result<VerifiedMember, Refusal> {
    let body = serde_json::to_vec(&VerifyMember { at }).map_err(|e| Refusal::internal(&e))?;
    let (status, bytes) = service.peers.post(&member.api_addr, VERIFY_PATH, body).await?;
    if status == 200 {
        let answer: Answer<VerifiedMember> =
            serde_json::from_slice(&bytes).map_err(|e| Refusal::internal(&e))?;
        return Ok(answer.item);
    }
    let problem: Option<Problem> = serde_json::from_slice(&bytes).ok();
    let detail =
        problem.map_or_else(|| format!("It answered with status {status}."), |problem| problem.detail);
    Err(Refusal::new(Code::Unavailable, detail))
}

async fn verify_own(call: Call, Body(body): Body<VerifyMember>) -> Result<Response, Refusal> {
    let verified = own(&call.service, body.at).await?;
    Ok(found(verified.revision, verified))
}

async fn own(service: &Service, at: Revision) -> Result<VerifiedMember, Refusal> {
    let (verified, views) = service.consensus.verify(at).await.map_err(|error| match &error {
        // What was found is for the operator who asked, and names nothing of a tenant's.
        ConsensusError::Stopped(fault) => Refusal::new(Code::Diverged, sentence(fault)),
        _ => error.into(),
    })?;
    Ok(VerifiedMember { member: service.member, revision: verified.revision, rows: verified.rows, views })
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::Digest;

    fn has(member: u64, digest: u8) -> MemberFinding {
        let (member, views) = (MemberId(member), Digest([digest; 32]));
        let verified = VerifiedMember { member, revision: Revision(9), rows: 1, views };
        MemberFinding { member, verified: Some(verified), problem: None }
    }

    #[test]
    fn i01_the_member_that_differs_is_named_and_a_silent_one_is_not_taken_for_sound() {
        let sound = judge(Revision(9), vec![has(1, 7), has(2, 7), has(3, 7)]);
        assert!(sound.sound);
        let one_differs = judge(Revision(9), vec![has(1, 7), has(2, 8), has(3, 7)]);
        let blamed: Vec<_> = one_differs.members.iter().map(|m| m.problem.is_some()).collect();
        assert_eq!((one_differs.sound, blamed), (false, vec![false, true, false]));
        let silent =
            MemberFinding { member: MemberId(3), verified: None, problem: Some("It is silent.".into()) };
        assert!(!judge(Revision(9), vec![has(1, 7), has(2, 7), silent]).sound);
    }
}
