//! Members that come and go.

use holdfast_model::MemberId;
use holdfast_raft::{ConsensusError, MemberState};

use crate::group::Group;

fn voters(group: &Group, at: u64) -> Vec<u64> {
    group.members[&at].status().voters.iter().map(|(id, _)| id.0).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_change_can_be_repeated_and_asked_of_any_member() {
    let mut group = Group::of_three().await;
    let asked = group.follower().await;
    group.prepare(4);
    group.start(4).await;
    let four = MemberId(4);
    for _ in 0..2 {
        group.members[&asked].add_learner(four, group.node(4)).await.unwrap();
    }
    group.members[&4].linearize().await.unwrap();
    assert_eq!(group.members[&4].status().state, MemberState::Learner);
    for _ in 0..2 {
        group.members[&asked].promote(four).await.unwrap();
    }
    group.until("four voters", || (voters(&group, asked) == [1, 2, 3, 4]).then_some(())).await;
    for _ in 0..2 {
        group.members[&asked].demote(four).await.unwrap();
    }
    group.until("three voters", || (voters(&group, asked) == [1, 2, 3]).then_some(())).await;
    for _ in 0..2 {
        group.members[&asked].remove(four).await.unwrap();
    }
    group.until("no learner", || group.members[&asked].status().learners.is_empty().then_some(())).await;
    group.propose(asked, group.write("after")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_used_member_id_is_never_given_again() {
    let mut group = Group::of_three().await;
    group.prepare(4);
    group.start(4).await;
    group.members[&1].add_learner(MemberId(4), group.node(4)).await.unwrap();
    group.members[&1].remove(MemberId(4)).await.unwrap();
    let again = group.members[&1].add_learner(MemberId(4), group.node(4)).await;
    assert!(matches!(again, Err(ConsensusError::Invalid(_))), "{again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_last_voter_cannot_leave() {
    let mut group = Group::new();
    group.grow(1).await;
    let refused = group.members[&1].remove(MemberId(1)).await;
    assert!(matches!(refused, Err(ConsensusError::Invalid(_))), "{refused:?}");
    group.propose(1, group.write("still-here")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_leadership_goes_where_it_is_sent() {
    let group = Group::of_three().await;
    let leader = group.leader().await;
    let heir = group.follower().await;
    group.members[&heir].transfer_leader(MemberId(heir)).await.unwrap();
    assert_ne!(heir, leader);
    group
        .until("the new leader", || group.members[&leader].status().leader.filter(|now| now.0 == heir))
        .await;
    group.propose(leader, group.write("after")).await;
}
