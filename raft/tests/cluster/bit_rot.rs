//! Bits that rot in a member's files (I1, I2): what is found is healed or keeps the member out, and nothing wrong is served.

use std::path::Path;
use std::time::Duration;

use holdfast_raft::{Compaction, Consensus, Fault, StartError};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::group::{Group, PATIENCE};

/// redb's page.
const BLOCK: usize = 4096;

/// Flips some bits in the file, at random places; many blocks of a young file hold nothing.
fn flip_some(path: &Path, rng: &mut StdRng) {
    let mut bytes = std::fs::read(path).unwrap();
    for _ in 0..6 {
        let at = rng.random_range(0..bytes.len());
        bytes[at] ^= 1 << rng.random_range(0..8);
    }
    std::fs::write(path, bytes).unwrap();
}

/// Flips a bit in every block but the first, in place: the file stays the one that a process has open.
fn flip_everywhere(path: &Path, rng: &mut StdRng) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let blocks = file.metadata().unwrap().len() as usize / BLOCK;
    for block in 1..blocks {
        let at = (block * BLOCK + rng.random_range(0..BLOCK)) as u64;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << rng.random_range(0..8))], at).unwrap();
    }
}

/// A group whose log is purged soon, so that a lost state needs a peer.
async fn group_with_purged_log() -> Group {
    let mut group = Group::new();
    group.compaction = Compaction { snapshot_entries: 40, kept_entries: 5, purge_entries: 1 };
    group.grow(3).await;
    for number in 0..120 {
        group.propose(1, group.write(&format!("org-{number}"))).await;
    }
    group
        .until("the logs to be purged", || {
            group.members.values().all(|member| member.status().purged.is_some()).then_some(())
        })
        .await;
    group
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_bit_that_rots_in_a_closed_state_is_healed_and_never_served() {
    let mut group = group_with_purged_log().await;
    let victim = group.follower().await;
    let mut healed = 0;
    for seed in 0..12 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        group.stop(victim).await;
        let written = group.propose(group.someone(), group.write(&format!("seed-{seed}"))).await;
        let path = group.path(victim).join("state.redb");
        let _closed = group.until("the state to be closed", || redb_is_closed(&path)).await;
        // A new disk for each seed, as far as the count of healings goes.
        drop(std::fs::remove_file(group.path(victim).join("healing.postcard")));
        drop(std::fs::remove_file(group.path(victim).join("state.redb.bad")));
        flip_some(&path, &mut rng);
        start_again(&mut group, victim).await;
        group.members[&victim].linearize().await.unwrap();
        assert!(group.revision(victim) >= written, "seed {seed}");
        // Reads all of it: a rotten block that the start did not need is found here.
        let verified = group.members[&victim].verify(written).await;
        if verified.is_err() {
            let fault = tokio::time::timeout(PATIENCE, group.members[&victim].failed()).await.unwrap();
            assert!(matches!(fault, Fault::StateRotten(_)), "seed {seed}: {fault:?}");
            group.stop(victim).await;
            start_again(&mut group, victim).await;
        }
        group.same_everywhere().await;
        healed += u32::from(group.path(victim).join("state.redb.bad").exists());
    }
    assert!(healed > 3, "only {healed} of 12 rotten files were in use and noticed");
}

fn redb_is_closed(path: &Path) -> Option<()> {
    // The file of checksums is written when the state is closed in order, as the last thing.
    path.with_extension("redb.sums").exists().then_some(())
}

/// Starts a member whose start may find a rotten block that only the start after it heals.
async fn start_again(group: &mut Group, id: u64) {
    for _ in 0..3 {
        match Consensus::start(group.config(id)).await {
            Ok(member) => {
                group.adopt(id, member);
                return;
            }
            Err(error) => println!("a start that healed nothing yet: {error:?}"),
        }
    }
    panic!("member {id} does not come back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_a_bit_that_rots_in_a_closed_log_keeps_its_member_out_or_changes_nothing() {
    let mut group = group_with_purged_log().await;
    let victim = group.follower().await;
    let log = group.path(victim).join("log.redb");
    group.stop(victim).await;
    group.until("the log to be closed", || redb_is_closed(&log)).await;
    let good = tempfile::tempdir().unwrap();
    copy_files(&group.path(victim), good.path());
    let mut refused = 0;
    for seed in 0..20 {
        println!("seed {seed}");
        copy_files(good.path(), &group.path(victim));
        drop(std::fs::remove_file(group.path(victim).join("verdict.postcard")));
        flip_some(&log, &mut StdRng::seed_from_u64(seed));
        if seed % 2 == 1 {
            // As after a crash: nobody knows what the blocks should be, and redb is left with pages that make no sense.
            std::fs::remove_file(log.with_extension("redb.sums")).unwrap();
        }
        match Consensus::start(group.config(victim)).await {
            Err(StartError::OutOfService { fault: Fault::LogRotten(_), .. }) => {
                refused += 1;
                // And again, although the disk may answer rightly by then.
                copy_files(good.path(), &group.path(victim));
                let again = Consensus::start(group.config(victim)).await.map(drop);
                assert!(
                    matches!(again, Err(StartError::OutOfService { fault: Fault::LogRotten(_), .. })),
                    "seed {seed}: {again:?}"
                );
            }
            Err(other) => panic!("seed {seed}: refused for another reason: {other:?}"),
            Ok(member) => {
                // A block that was not read yet, or that holds nothing.
                group.adopt(victim, member);
                let served = group.members[&victim].linearize().await;
                match group.members[&victim].status().fault {
                    None => served.unwrap(),
                    Some(fault) => assert!(matches!(fault, Fault::LogRotten(_)), "seed {seed}: {fault:?}"),
                }
                group.stop(victim).await;
            }
        }
    }
    assert!(refused > 3, "only {refused} of 20 rotten files were in use and noticed");
    group.propose(group.someone(), group.write("after")).await;
}

/// Copies the files of a folder over those of another.
fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Bits rot in cold blocks of a running member's state; nobody reads them but the scrub.
async fn rots_while_it_runs(of_leader: bool) {
    let mut group = group_with_purged_log().await;
    let victim = if of_leader { group.leader().await } else { group.follower().await };
    group.stop(victim).await;
    group.scrub_pass = Duration::from_millis(1);
    group.start(victim).await;
    if of_leader {
        group.members[&victim].transfer_leader(holdfast_model::MemberId(victim)).await.unwrap();
        group.until("the victim to lead", || group.members[&victim].is_leader().then_some(())).await;
    }
    let seed = 7;
    println!("seed {seed}");
    flip_everywhere(&group.path(victim).join("state.redb"), &mut StdRng::seed_from_u64(seed));
    let fault = tokio::time::timeout(PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::StateRotten(_)), "{fault:?}");
    assert!(
        group.members[&victim].linearize().await.is_err(),
        "a member with a rotten state answered a read"
    );
    // The others serve meanwhile.
    let other = *group.members.keys().find(|id| **id != victim).unwrap();
    let written = group.propose(other, group.write("meanwhile")).await;
    group.stop(victim).await;
    group.start(victim).await;
    assert!(group.revision(victim) >= written, "it served before it had caught up");
    group.same_everywhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_rot_in_cold_blocks_of_a_followers_state_is_scrubbed_out_and_healed() {
    rots_while_it_runs(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_rot_in_cold_blocks_of_a_leaders_state_is_scrubbed_out_and_healed() {
    rots_while_it_runs(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i02_rot_in_the_log_of_a_running_member_takes_it_out_for_good() {
    let mut group = Group::of_three().await;
    for number in 0..50 {
        group.propose(1, group.write(&format!("org-{number}"))).await;
    }
    let victim = group.follower().await;
    group.stop(victim).await;
    group.scrub_pass = Duration::from_millis(1);
    group.start(victim).await;
    flip_everywhere(&group.path(victim).join("log.redb"), &mut StdRng::seed_from_u64(3));
    let fault = tokio::time::timeout(PATIENCE, group.members[&victim].failed()).await.unwrap();
    assert!(matches!(fault, Fault::LogRotten(_)), "{fault:?}");
    group.stop(victim).await;
    let again = Consensus::start(group.config(victim)).await.map(drop);
    assert!(
        matches!(again, Err(StartError::OutOfService { fault: Fault::LogRotten(_), .. })),
        "a restart brought it back: {again:?}"
    );
    group.propose(group.someone(), group.write("after")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_state_that_ends_before_its_log_begins_is_filled_anew() {
    let mut group = Group::new();
    group.compaction = Compaction { snapshot_entries: 40, kept_entries: 5, purge_entries: 1 };
    group.grow(3).await;
    let victim = group.follower().await;
    let state = group.path(victim).join("state.redb");
    group.stop(victim).await;
    group.until("the state to be closed", || redb_is_closed(&state)).await;
    let old = std::fs::read(&state).unwrap();
    let end_of_old = group.members[&group.someone()].status().last_log;
    group.start(victim).await;
    for number in 0..120 {
        group.propose(group.someone(), group.write(&format!("org-{number}"))).await;
    }
    group
        .until("the log to be purged", || (group.members[&victim].status().purged > end_of_old).then_some(()))
        .await;
    group.stop(victim).await;
    group.until("the state to be closed", || redb_is_closed(&state)).await;
    std::fs::write(&state, old).unwrap();
    std::fs::remove_file(state.with_extension("redb.sums")).unwrap();
    std::fs::remove_dir_all(group.path(victim).join("snapshots")).unwrap();
    group.start(victim).await;
    assert!(group.path(victim).join("state.redb.bad").exists());
    group.same_everywhere().await;
}

/// After some healings the disk, or whatever makes the states differ, is not believed any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_disk_that_rots_again_and_again_is_given_up() {
    let mut group = group_with_purged_log().await;
    let victim = group.follower().await;
    for time in 1..=4 {
        group.stop(victim).await;
        let path = group.path(victim).join("state.redb");
        group.until("the state to be closed", || redb_is_closed(&path)).await;
        flip_everywhere(&path, &mut StdRng::seed_from_u64(time));
        let started = Consensus::start(group.config(victim)).await;
        match (time, started) {
            (1..=3, Ok(member)) => group.adopt(victim, member),
            (4, Err(StartError::OutOfService { fault: Fault::StateRotten(_), .. })) => {}
            (_, other) => panic!("time {time}: {:?}", other.map(drop)),
        }
    }
    group.propose(group.someone(), group.write("after")).await;
}

/// A state that rotted needs no peer while the own snapshot and log reach: a cluster of one heals as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn i01_a_lonely_member_heals_from_its_own_snapshot_and_log() {
    let mut group = Group::new();
    group.compaction = Compaction { snapshot_entries: 40, kept_entries: 5, purge_entries: 1 };
    group.grow(1).await;
    let mut written = group.revision(1);
    for number in 0..100 {
        written = group.propose(1, group.write(&format!("org-{number}"))).await;
    }
    group.until("the log to be purged", || group.members[&1].status().purged).await;
    group.stop(1).await;
    let path = group.path(1).join("state.redb");
    group.until("the state to be closed", || redb_is_closed(&path)).await;
    flip_everywhere(&path, &mut StdRng::seed_from_u64(1));
    group.start(1).await;
    assert!(group.revision(1) >= written);
    assert!(group.path(1).join("state.redb.bad").exists());
    group.same_everywhere().await;
}
