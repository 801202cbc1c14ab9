//! `holdfast server list|remove|promote|demote|transfer-leader|verify|rebuild`: the members of the control plane.
//!
//! Each command states what should be so; the leader brings the group in line with it. So each is safe to repeat, and a
//! command that stopped waiting has not failed.

use crate::args::operator::{Invite, ListMembers, RemoveMember};
use crate::failure::Failure;
use crate::output::{or_dash, table, word};
use crate::server::offline::views_at;
use crate::session::Session;
use holdfast_model::api::{
    ClusterStatus, MemberFinding, MemberRole, MemberStatus, RebuildViews, TransferLeader, Verification,
};
use holdfast_model::resource::EnrolmentKind;
use holdfast_model::{MemberId, Revision};
use std::time::{Duration, Instant};

/// How long a command waits for the leader to bring the group in line.
const IN_LINE_MAX: Duration = Duration::from_secs(45);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// How long a verification may take: it reads everything.
const VERIFY_MAX: Duration = Duration::from_secs(120);

pub(crate) async fn list(session: &Session, arguments: ListMembers) -> Result<(), Failure> {
    let mut cluster = session.client.cluster().await?.item;
    cluster.members.retain(|m| arguments.all || m.role != MemberRole::Removed);
    session.output.show(&cluster, || members(&cluster))
}

fn members(cluster: &ClusterStatus) -> String {
    let rows = cluster.members.iter().map(|status| {
        let leads = cluster.leader == Some(status.member.id);
        [
            status.member.id.to_string(),
            status.member.name.to_string(),
            word(&status.role),
            if leads { "leader".into() } else { "-".into() },
            status.member.api_addr.clone(),
            status.member.raft_addr.clone(),
            or_dash(status.supported),
        ]
    });
    let members = table(["ID", "MEMBER", "ROLE", "LEADER", "API", "RAFT", "SUPPORTS"], rows);
    format!("Cluster version {}\n\n{members}", cluster.version)
}

/// The member with this id, or the present one with this name.
async fn find(session: &Session, named: &str) -> Result<MemberStatus, Failure> {
    let members = session.client.cluster().await?.item.members;
    let id: Option<MemberId> = named.parse().ok();
    let by_name = |m: &MemberStatus| m.member.name.as_str() == named && !m.member.removed;
    let found = members.into_iter().find(|m| Some(m.member.id) == id || by_name(m));
    found.ok_or_else(|| Failure::NotFound { what: "member", name: named.to_owned() })
}

pub(crate) async fn remove(session: &Session, arguments: RemoveMember) -> Result<(), Failure> {
    let member = find(session, &arguments.member).await?.member;
    session.confirmed(&format!("Remove member {} ({}) for good?", member.id, member.name))?;
    session.client.remove_member(member.id, arguments.force).await?;
    in_line(session, member.id, MemberRole::Removed).await
}

pub(crate) async fn set_votes(session: &Session, named: &str, votes: bool) -> Result<(), Failure> {
    let member = find(session, named).await?.member;
    session.client.set_member_votes(member.id, votes).await?;
    in_line(session, member.id, if votes { MemberRole::Voter } else { MemberRole::Learner }).await
}

/// Waits until the member stands as it should. It is decided already: this only looks.
async fn in_line(session: &Session, id: MemberId, role: MemberRole) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        // While the leader changes nobody answers for a moment.
        if let Ok(cluster) = session.client.cluster().await {
            let found = cluster.item.members.into_iter().find(|m| m.member.id == id);
            if let Some(status) = found.filter(|m| m.role == role) {
                return session.output.show(&status, || format!("Member {id} is now: {}.", word(&role)));
            }
        }
        if began.elapsed() >= IN_LINE_MAX {
            let what = format!("It is decided that member {id} becomes {}, but that", word(&role));
            return Err(Failure::WaitTimedOut { what, after: IN_LINE_MAX });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

pub(crate) async fn transfer_leader(session: &Session, named: Option<String>) -> Result<(), Failure> {
    let to = match named {
        Some(named) => Some(find(session, &named).await?.member.id),
        None => None,
    };
    let leader = session.client.transfer_leader(&TransferLeader { to }).await?.item;
    session.output.show(&leader, || format!("Member {} leads.", leader.member))
}

pub(crate) async fn verify(session: &Session) -> Result<(), Failure> {
    let found = session.client.with_deadline(VERIFY_MAX).verify().await?.item;
    session.output.show(&found, || findings(&found))?;
    if found.sound {
        return Ok(());
    }
    Err(Failure::Host(
        "Not every member is sound and the same. Take the ones that are named out of service, and let new ones join."
            .into(),
    ))
}

/// Tells what the views were at a revision, by a replay on every running member.
pub(crate) async fn rebuild(session: &Session, to: Option<Revision>) -> Result<(), Failure> {
    let to = to.ok_or_else(|| Failure::Usage("Say up to which revision: --to REVISION.".into()))?;
    let found = session.client.with_deadline(VERIFY_MAX).rebuild(&RebuildViews { to }).await?.item;
    session.output.show(&found, || {
        let rows = found.rows.iter().map(|(table, count)| (table.as_str(), *count));
        let views = views_at(found.revision, &found.views.to_string(), rows);
        format!("{}\n\n{views}", findings(&found.members))
    })?;
    if found.members.sound {
        return Ok(());
    }
    Err(Failure::Host(
        "The members' histories do not lead to the same views, or not every member answered.".into(),
    ))
}

fn findings(found: &Verification) -> String {
    let rows = found.members.iter().map(|finding: &MemberFinding| {
        let verified = finding.verified.as_ref();
        [
            finding.member.to_string(),
            finding.problem.as_ref().map_or("sound".into(), |_| "PROBLEM".into()),
            or_dash(verified.map(|v| v.revision)),
            or_dash(verified.map(|v| v.rows)),
            or_dash(verified.map(|v| v.views)),
        ]
    });
    let header = ["MEMBER".to_owned(), "STATE".into(), "CHECKED TO".into(), "ROWS".into()];
    let [member, state, checked, rows_header] = header.each_ref().map(String::as_str);
    let views = format!("VIEWS AT {}", found.at);
    let mut text = table([member, state, checked, rows_header, &views], rows);
    for finding in &found.members {
        if let Some(problem) = &finding.problem {
            text.push_str(&format!("\nmember {}: {problem}", finding.member));
        }
    }
    text
}

/// What an invitation lets in, when it is for a learner.
pub(crate) fn enrolment_kind(arguments: &Invite) -> Result<EnrolmentKind, Failure> {
    match (arguments.kind.into(), arguments.learner) {
        (EnrolmentKind::Member, true) => Ok(EnrolmentKind::Learner),
        (_, true) => Err(Failure::Usage("Only a member can be a learner: leave --learner out.".into())),
        (kind, false) => Ok(kind),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::Digest;
    use holdfast_model::api::VerifiedMember;

    #[test]
    fn golden_verification() {
        let views = Digest([0xab; 32]);
        let member = MemberId(1);
        let verified = VerifiedMember { member, revision: Revision(12), rows: 34, views };
        let found = Verification {
            at: Revision(11),
            sound: false,
            members: vec![
                MemberFinding { member, verified: Some(verified), problem: None },
                MemberFinding { member: MemberId(2), verified: None, problem: Some("It is silent.".into()) },
            ],
        };
        let digest = views.to_string();
        let expected = format!(
            "\
MEMBER  STATE    CHECKED TO  ROWS  VIEWS AT 11
1       sound    12          34    {digest}
2       PROBLEM  -           -     -
member 2: It is silent."
        );
        assert_eq!(findings(&found), expected);
    }
}
