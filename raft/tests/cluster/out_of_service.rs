//! Members that must not come back by a restart: removed ones, and those whose disk is not what they acknowledged with.

use std::path::Path;
use std::time::Duration;

use holdfast_model::MemberId;
use holdfast_raft::{Consensus, ConsensusError, Fault, StartError, Timing};

use crate::group::{Group, PATIENCE};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

async fn refused(group: &Group, id: u64) -> Fault {
    match Consensus::start(group.config(id)).await {
        Err(StartError::OutOfService { fault, .. }) => fault,
        Err(other) => panic!("refused for another reason: {other:?}"),
        Ok(_) => panic!("member {id} started"),
    }
}

/// Three members whose leader stays, also on a machine that is busy with other tests: only it remembers what the others
/// acknowledged, and when it loses its office the loss is not found, as `lost_memory` says.
async fn group_with_a_lasting_leader() -> Group {
    let mut group = Group::new();
    group.timing = Timing {
        heartbeat: Duration::from_millis(250),
        election_min: Duration::from_secs(3),
        election_max: Duration::from_secs(4),
    };
    group.grow(3).await;
    group
}

/// A follower whose disk is an image from before writes that it acknowledged.
async fn set_back(group: &mut Group) -> u64 {
    let victim = group.follower().await;
    let leader = group.leader().await;
    group.propose(leader, group.write("before")).await;
    group.stop(victim).await;
    group.closed(victim).await;
    let image = tempfile::tempdir().unwrap();
    copy(&group.path(victim), image.path());
    group.start(victim).await;
    let mut written = group.revision(leader);
    for number in 0..20 {
        written = group.propose(leader, group.write(&format!("later-{number}"))).await;
    }
    group.until("the follower to have it all", || (group.revision(victim) >= written).then_some(())).await;
    assert_eq!(group.leader().await, leader, "the leader changed, so nobody remembers");
    group.stop(victim).await;
    group.closed(victim).await;
    std::fs::remove_dir_all(group.path(victim)).unwrap();
    copy(image.path(), &group.path(victim));
    victim
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_an_older_image_of_a_disk_is_refused_at_the_start_and_from_then_on() {
    let mut group = group_with_a_lasting_leader().await;
    let victim = set_back(&mut group).await;
    assert!(matches!(refused(&group, victim).await, Fault::WentBack { .. }));
    // The others may be gone or have forgotten by the next start; the member has not.
    group.stop_all().await;
    assert!(matches!(refused(&group, victim).await, Fault::WentBack { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_log_that_goes_back_under_a_leader_stops_its_member_and_nobody_else() {
    let mut group = group_with_a_lasting_leader().await;
    let victim = set_back(&mut group).await;
    // Without its state a member knows no one whom it could ask at its start.
    for lost in ["state.redb", "state.redb.sums", "peers.postcard"] {
        drop(std::fs::remove_file(group.path(victim).join(lost)));
    }
    group.start(victim).await;
    let fault = tokio::time::timeout(PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::WentBack { .. }), "{fault:?}");
    group.stop(victim).await;
    assert!(matches!(refused(&group, victim).await, Fault::WentBack { .. }));
    let asked = *group.members.keys().next().unwrap();
    group.propose(asked, group.write("after")).await;
    for member in group.members.values() {
        assert!(member.status().healthy, "a member stopped although it is right");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_removed_member_stops_and_does_not_start_again() {
    for votes in [true, false] {
        let mut group = Group::of_three().await;
        group.prepare(4);
        group.start(4).await;
        group.members[&1].add_learner(MemberId(4), group.node(4)).await.unwrap();
        if votes {
            group.members[&1].promote(MemberId(4)).await.unwrap();
        }
        group.members[&4].linearize().await.unwrap();
        group.members[&1].remove(MemberId(4)).await.unwrap();
        let fault = tokio::time::timeout(PATIENCE, group.members[&4].failed()).await.unwrap();
        assert_eq!(fault, Fault::Removed, "votes: {votes}");
        assert!(group.members[&4].propose(group.write("from-outside")).await.is_err());
        group.stop(4).await;
        assert_eq!(refused(&group, 4).await, Fault::Removed);
        group.propose(1, group.write("after")).await;
    }
}

/// Rows of the views: see `docs/formats/state.md`.
const VIEWS: redb::TableDefinition<'static, &[u8], &[u8]> = redb::TableDefinition::new("views");

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_state_that_contradicts_itself_stops_its_member_when_it_is_verified() {
    let mut group = Group::of_three().await;
    let written = group.propose(1, group.write("shared")).await;
    let views = |group: &Group| {
        let members: Vec<_> = group.members.values().cloned().collect();
        async move {
            let verified = members.iter().map(|member| member.verify(written));
            futures::future::join_all(verified).await
        }
    };
    let sound = views(&group).await;
    let digests: Vec<_> = sound.into_iter().map(|verified| verified.unwrap().1).collect();
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "{digests:?}");

    let victim = group.follower().await;
    group.stop(victim).await;
    let path = group.path(victim).join("state.redb");
    let database = group.until("the state to be closed", || redb::Database::open(&path).ok()).await;
    let transaction = database.begin_write().unwrap();
    // A row that no event made.
    transaction.open_table(VIEWS).unwrap().insert([170_u8, 1].as_slice(), [1_u8].as_slice()).unwrap();
    transaction.commit().unwrap();
    drop(database);
    drop(std::fs::remove_file(holdfast_checked_file::sidecar_of(&path)));
    group.start(victim).await;
    let found = group.members[&victim].verify(written).await;
    assert!(matches!(found, Err(ConsensusError::Stopped(Fault::Damaged(_)))), "{found:?}");
    let fault = tokio::time::timeout(PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::Damaged(_)), "{fault:?}");
    group.stop(victim).await;
    assert!(views(&group).await.iter().all(Result::is_ok), "the others are sound");
    group.start(victim).await;
    assert!(views(&group).await.iter().all(Result::is_ok), "it was filled anew");
    group.same_everywhere().await;
}
