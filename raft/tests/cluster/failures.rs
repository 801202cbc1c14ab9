//! Members that die, come back, lose their disks or fall behind.

use std::time::Duration;

use holdfast_raft::log_store::LogStoreError;
use holdfast_raft::{Compaction, Consensus, Fault, StartError};

use crate::group::{Group, sentence};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_group_goes_on_when_its_leader_is_gone() {
    let mut group = Group::of_three().await;
    let before = group.propose(1, group.write("before")).await;
    let leader = group.leader().await;
    group.stop(leader).await;
    let survivor = *group.members.keys().next().unwrap();
    let after = group.propose(survivor, group.write("after")).await;
    assert!(after > before);
    assert_ne!(group.leader().await, leader);

    group.start(leader).await;
    group.members[&leader].linearize().await.unwrap();
    assert!(group.revision(leader) >= after, "the member that came back has not caught up");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_i03_without_a_majority_nothing_is_acknowledged_or_read() {
    let mut group = Group::of_three().await;
    group.leader().await;
    group.stop(2).await;
    group.stop(3).await;
    let proposal = group.write("alone");
    let alone = &group.members[&1];
    let acknowledged = tokio::time::timeout(Duration::from_secs(3), alone.propose(proposal.clone())).await;
    assert!(!matches!(acknowledged, Ok(Ok(_))), "a write was acknowledged without a majority");
    let read = tokio::time::timeout(Duration::from_secs(3), alone.linearize()).await;
    assert!(!matches!(read, Ok(Ok(()))), "a linearizable read was answered without a majority");

    group.start(2).await;
    let stored = group.propose(1, proposal.clone()).await;
    assert_eq!(group.propose(2, proposal).await, stored, "the write of the lonely time happened twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_restart_of_all_members_keeps_acknowledged_writes() {
    let mut group = Group::of_three().await;
    let mut proposals = Vec::new();
    for number in 0..50 {
        let proposal = group.write(&format!("org-{number}"));
        let revision = group.propose(1 + number % 3, proposal.clone()).await;
        proposals.push((proposal, revision));
    }
    group.stop_all().await;
    for id in 1..=3 {
        group.start(id).await;
    }
    group.leader().await;
    for (proposal, revision) in proposals {
        assert_eq!(group.propose(2, proposal).await, revision, "an acknowledged write was forgotten");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_lost_state_is_rebuilt_from_the_log() {
    let mut group = Group::of_three().await;
    let written = group.propose(1, group.write("kept")).await;
    let victim = group.follower().await;
    group.stop(victim).await;
    std::fs::remove_file(group.path(victim).join("state.redb")).unwrap();
    group.start(victim).await;
    group.members[&victim].linearize().await.unwrap();
    assert!(group.revision(victim) >= written);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_member_that_lost_its_disk_does_not_start_as_itself() {
    let mut group = Group::of_three().await;
    group.propose(1, group.write("kept")).await;
    let victim = group.follower().await;
    group.stop(victim).await;
    let path = group.path(victim);

    let log = path.join("log.redb");
    let (kept, away) = (std::fs::read(&log).unwrap(), path.join("log.away"));
    std::fs::rename(&log, &away).unwrap();
    for _ in 0..2 {
        let lost = Consensus::start(group.config(victim)).await.map(drop);
        assert!(matches!(lost, Err(StartError::Log(LogStoreError::Missing { .. }))), "{lost:?}");
        assert!(!log.exists(), "a log was made in its place");
    }
    // Nothing was found to be wrong with a log that is not there: whoever brings it back has the member back.
    assert!(!path.join("verdict.postcard").exists());

    // A log of the same member that somebody made anew would forget the vote; the folder cannot be prepared again either.
    std::fs::write(&log, kept).unwrap();
    std::fs::remove_file(path.join("member.postcard")).unwrap();
    assert!(matches!(Consensus::start(group.config(victim)).await, Err(StartError::NotPrepared { .. })));
    let identity = holdfast_raft::MemberIdentity {
        cluster: crate::group::CLUSTER.into(),
        member: holdfast_model::MemberId(victim),
        incarnation: 1,
    };
    assert!(matches!(Consensus::prepare(&path, &identity), Err(StartError::MarkerMismatch { .. })));

    std::fs::remove_dir_all(&path).unwrap();
    assert!(matches!(Consensus::start(group.config(victim)).await, Err(StartError::NotPrepared { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_log_that_was_emptied_takes_its_member_out_for_good() {
    let mut group = Group::of_three().await;
    let victim = group.follower().await;
    group.stop(victim).await;
    let log = group.path(victim).join("log.redb");
    let kept = std::fs::read(&log).unwrap();
    std::fs::write(&log, b"").unwrap();
    let refused = Consensus::start(group.config(victim)).await.map(drop).unwrap_err();
    assert!(sentence(&refused).contains("is empty"), "{}", sentence(&refused));
    assert_eq!(std::fs::read(&log).unwrap(), b"", "a new log was made of it");
    // What else the disk lost nobody knows: it is not believed either when it is back.
    std::fs::write(&log, kept).unwrap();
    let again = Consensus::start(group.config(victim)).await.map(drop);
    assert!(matches!(again, Err(StartError::OutOfService { fault: Fault::LogRotten(_), .. })), "{again:?}");
    group.propose(group.someone(), group.write("after")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_follower_behind_the_purged_log_catches_up_by_a_snapshot() {
    let mut group = Group::new();
    group.compaction = Compaction { snapshot_entries: 50, kept_entries: 5, purge_entries: 1 };
    group.grow(3).await;
    let victim = group.follower().await;
    let end_of_victim = group.members[&victim].status().last_log.unwrap();
    group.stop(victim).await;
    let asked = *group.members.keys().next().unwrap();
    let mut written = group.revision(asked);
    for number in 0..200 {
        written = group.propose(asked, group.write(&format!("org-{number}"))).await;
    }
    let leader = group.leader().await;
    group
        .until("the log to be purged", || {
            group.members[&leader].status().purged.filter(|purged| *purged > end_of_victim)
        })
        .await;

    group.start(victim).await;
    group.members[&victim].linearize().await.unwrap();
    assert!(group.revision(victim) >= written);
    assert!(group.members[&victim].status().snapshot.is_some(), "it caught up without a snapshot");

    // What the snapshot brought is durable, and the log after it is whole.
    group.stop(victim).await;
    group.start(victim).await;
    group.members[&victim].linearize().await.unwrap();
    assert!(group.revision(victim) >= written);
}
