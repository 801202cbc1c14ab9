//! Many proposals at once: each is carried out once and has its own outcome, also when the leader changes meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;

use holdfast_raft::ConsensusError;

use crate::group::Group;

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i04_proposals_that_share_an_entry_keep_their_outcomes() {
    const PROPOSALS: u64 = 600;
    let group = Arc::new(Group::of_three().await);
    let leader = group.leader().await;
    let before = group.members[&leader].status().last_log.unwrap();
    let writes: Vec<_> = (0..PROPOSALS)
        .map(|number| {
            let (group, proposal) = (group.clone(), group.write(&format!("org-{number}")));
            tokio::spawn(async move {
                let revision = group.propose(1 + number % 3, proposal.clone()).await;
                (proposal, revision)
            })
        })
        .collect();
    let mut revisions = BTreeSet::new();
    let mut written = Vec::new();
    for write in writes {
        let (proposal, revision) = write.await.unwrap();
        assert!(revisions.insert(revision), "two proposals were told the same revision");
        written.push((proposal, revision));
    }
    let entries = group.members[&leader].status().last_log.unwrap() - before;
    assert!(entries < PROPOSALS / 2, "{PROPOSALS} proposals took {entries} entries");
    for (number, (proposal, revision)) in (0..).zip(written) {
        let again = group.propose(1 + (number + 1) % 3, proposal).await;
        assert_eq!(again, revision, "a repeated proposal was told another outcome");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i04_batches_through_a_change_of_the_leader_are_carried_out_once() {
    const PROPOSALS: u64 = 400;
    let mut group = Group::of_three().await;
    let leader = group.leader().await;
    let proposals: Vec<_> = (0..PROPOSALS).map(|number| group.write(&format!("org-{number}"))).collect();
    let survivors: Vec<_> =
        group.members.iter().filter(|(id, _)| **id != leader).map(|(_, member)| member.clone()).collect();
    // Each through both survivors at once, while the leader goes.
    let writes: Vec<_> = proposals
        .iter()
        .flat_map(|proposal| survivors.iter().map(move |member| (member.clone(), proposal.clone())))
        .map(|(member, proposal)| {
            tokio::spawn(async move {
                loop {
                    match member.propose(proposal.clone()).await {
                        Ok(outcome) => return outcome.unwrap().revision,
                        Err(error @ (ConsensusError::Unknown | ConsensusError::NoLeader)) => drop(error),
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    group.stop(leader).await;
    let mut revisions = Vec::new();
    for write in writes {
        revisions.push(write.await.unwrap());
    }
    let mut distinct = BTreeSet::new();
    for pair in revisions.chunks(2) {
        assert_eq!(pair[0], pair[1], "one proposal was carried out twice");
        assert!(distinct.insert(pair[0]), "two proposals were told the same revision");
    }
    group.start(leader).await;
    group.members[&leader].linearize().await.unwrap();
    assert_eq!(group.propose(leader, proposals[0].clone()).await, revisions[0]);
}
