//! Writes, reads and messages, through any member.

use std::sync::Arc;

use holdfast_model::MemberId;
use holdfast_raft::ConsensusError;

use crate::group::Group;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i03_a_write_through_a_follower_is_read_on_every_member() {
    let group = Group::of_three().await;
    for round in 0..5 {
        let follower = group.follower().await;
        let written = group.propose(follower, group.write(&format!("org-{round}"))).await;
        for (id, member) in &group.members {
            member.linearize().await.unwrap();
            assert!(group.revision(*id) >= written, "member {id} read an older state than was acknowledged");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i04_a_repeated_proposal_has_its_first_outcome() {
    let group = Group::of_three().await;
    let proposal = group.write("once");
    let first = group.propose(1, proposal.clone()).await;
    let before = group.revision(1);
    for at in [2, 3, 1] {
        assert_eq!(group.propose(at, proposal.clone()).await, first);
    }
    group.members[&1].linearize().await.unwrap();
    assert_eq!(group.revision(1), before, "a repeated proposal changed the state again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_proposals_share_an_fsync() {
    const PROPOSALS: u64 = 512;
    let group = Arc::new(Group::of_three().await);
    let leader = group.leader().await;
    let before = group.members[&leader].log_commits();
    let writes = (0..PROPOSALS).map(|number| {
        let group = group.clone();
        tokio::spawn(async move { group.propose(leader, group.write(&format!("org-{number}"))).await })
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap();
    }
    let commits = group.members[&leader].log_commits() - before;
    assert!(commits < PROPOSALS / 2, "{PROPOSALS} proposals took {commits} fsyncs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn messages_of_the_api_reach_the_member_and_name_their_sender() {
    let group = Group::of_three().await;
    for (id, member) in &group.members {
        let id = *id;
        member.set_app_handler(Arc::new(move |from, message| {
            Box::pin(
                async move { format!("{from}>{id}: {}", String::from_utf8(message).unwrap()).into_bytes() },
            )
        }));
    }
    let answer = group.members[&1].app_to(MemberId(3), b"hello".to_vec()).await.unwrap();
    assert_eq!(answer, b"1>3: hello");
    let own = group.members[&2].app_to(MemberId(2), b"me".to_vec()).await.unwrap();
    assert_eq!(own, b"2>2: me");
    let leader = group.leader().await;
    let answer = group.members[&2].app_to_leader(b"up".to_vec()).await.unwrap();
    assert_eq!(answer, format!("2>{leader}: up").into_bytes());
    let unknown = group.members[&1].app_to(MemberId(9), vec![]).await;
    assert_eq!(unknown, Err(ConsensusError::UnknownMember(MemberId(9))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_equal_states_are_compared_and_found_equal() {
    let group = Group::of_three().await;
    for round in 0..3 {
        group.propose(2, group.write(&format!("org-{round}"))).await;
        let leader = group.leader().await;
        group.members[&leader].compare_states().await.unwrap();
    }
    for member in group.members.values() {
        member.linearize().await.unwrap();
        assert!(member.status().healthy);
    }
}
