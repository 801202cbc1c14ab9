//! States that differ (I1). The difference is made by flipping a bit of the digest chain in a stopped member's file.

use holdfast_model::MemberId;
use holdfast_raft::Fault;
use redb::{ReadableTable, TableDefinition};

use crate::group::Group;

/// Where the store keeps the head of its state: see `docs/formats/state.md`.
const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");

async fn corrupt(group: &mut Group, id: u64) {
    group.stop(id).await;
    let path = group.path(id).join("state.redb");
    let database = group.until("the state to be closed", || redb::Database::open(&path).ok()).await;
    let transaction = database.begin_write().unwrap();
    {
        let mut meta = transaction.open_table(META).unwrap();
        let mut head = meta.get("head").unwrap().unwrap().value().to_vec();
        // The revision is a few bytes at most; after it comes the chain.
        head[20] ^= 1;
        meta.insert("head", head.as_slice()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    // The checksums of the blocks are those of before; the difference is not in the disk.
    drop(std::fs::remove_file(holdfast_checked_file::sidecar_of(&path)));
    group.start(id).await;
}

/// The member that stopped is started again: it heals by itself, and has what the others have.
async fn heals(group: &mut Group, victim: u64) {
    group.stop(victim).await;
    let written = group.propose(group.someone(), group.write("while-it-was-away")).await;
    group.start(victim).await;
    assert!(group.revision(victim) >= written, "it served before it had caught up");
    assert!(group.path(victim).join("state.redb.bad").exists(), "nothing was kept for the report");
    group.same_everywhere().await;
}

async fn write_past_a_recorded_digest(group: &Group, at: u64) {
    for number in 0..40 {
        group.propose(at, group.write(&format!("more-{number}"))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_follower_with_another_state_stops_and_the_others_go_on() {
    let mut group = Group::of_three().await;
    group.propose(1, group.write("shared")).await;
    let leader = group.leader().await;
    let victim = group.follower().await;
    corrupt(&mut group, victim).await;
    assert_eq!(group.leader().await, leader);
    write_past_a_recorded_digest(&group, leader).await;
    group.members[&leader].compare_states().await.unwrap();

    let fault = tokio::time::timeout(crate::group::PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::Diverged { .. }), "{fault:?}");
    assert!(group.members[&victim].linearize().await.is_err(), "a diverged member answered a read");
    assert!(!group.members[&victim].status().healthy);
    group.propose(leader, group.write("after")).await;
    for (id, member) in group.members.iter().filter(|(id, _)| **id != victim) {
        assert!(member.status().healthy, "member {id} stopped although it is right");
    }
    heals(&mut group, victim).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_leader_with_another_state_stops_and_is_replaced() {
    let mut group = Group::of_three().await;
    group.propose(1, group.write("shared")).await;
    let victim = group.leader().await;
    corrupt(&mut group, victim).await;
    group.leader().await;
    group.members[&victim].transfer_leader(MemberId(victim)).await.unwrap();
    write_past_a_recorded_digest(&group, victim).await;
    group.members[&victim].compare_states().await.unwrap();

    let fault = tokio::time::timeout(crate::group::PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::Diverged { .. }), "{fault:?}");
    let right = *group.members.keys().find(|id| **id != victim).unwrap();
    group.propose(right, group.write("after")).await;
    for (id, member) in group.members.iter().filter(|(id, _)| **id != victim) {
        assert!(member.status().healthy, "member {id} stopped although it is right");
    }
    heals(&mut group, victim).await;
}

/// With one against one, nobody knows whose state is right, so nobody is filled by the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_without_a_majority_for_one_state_nobody_is_filled() {
    let mut group = Group::new();
    group.grow(2).await;
    group.propose(1, group.write("shared")).await;
    let victim = group.follower().await;
    corrupt(&mut group, victim).await;
    let leader = group.leader().await;
    write_past_a_recorded_digest(&group, leader).await;
    group.members[&leader].compare_states().await.unwrap();
    let fault = tokio::time::timeout(crate::group::PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::Undecided { .. }), "{fault:?}");
    group.stop(victim).await;
    let again = holdfast_raft::Consensus::start(group.config(victim)).await.map(drop);
    assert!(
        matches!(again, Err(holdfast_raft::StartError::OutOfService { fault: Fault::Undecided { .. }, .. })),
        "a restart brought it back: {again:?}"
    );
}
