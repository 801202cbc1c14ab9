//! The real log store over disks that lose, tear, refuse and rot.

// A test that cannot go on says so by a panic.
#![allow(clippy::unwrap_used)]

use std::io;

use bytes::Bytes;
use holdfast_faulty_disk::{Disk, Faults};
use holdfast_model::MemberId;
use holdfast_raft::MemberIdentity;
use holdfast_raft::log_store::{LogStore, LogStoreError};
use holdfast_raft::types::{Entry, LeaderId, LogCommand, LogId, TypeConfig, Vote};
use openraft::EntryPayload;
use openraft::storage::{IOFlushed, RaftLogReader, RaftLogStorage};
use openraft::type_config::TypeConfigExt;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use redb::{ReadableDatabase, ReadableTable, ReadableTableMetadata};

fn identity() -> MemberIdentity {
    MemberIdentity { cluster: "disks".into(), member: MemberId(1), incarnation: 1 }
}

/// Bytes of a log's journal here: few, so that it is full often.
const JOURNAL_BYTES: u64 = 16 * 1024;

fn open(disk: &Disk, identity: Option<&MemberIdentity>) -> Result<LogStore, LogStoreError> {
    let (journal, log) = disk.split(JOURNAL_BYTES).unwrap();
    LogStore::open_with_backend(journal, log, identity)
}

fn entry(index: u64, text: &str) -> Entry {
    let command = LogCommand::from_wire(Bytes::from(text.as_bytes().to_vec())).unwrap();
    Entry {
        log_id: LogId::new(LeaderId { term: 1, node_id: 1 }, index),
        payload: EntryPayload::Normal(command),
    }
}

/// Appends and waits until the store says that it is durable.
async fn append(log: &mut LogStore, entries: Vec<Entry>) -> io::Result<()> {
    let (done, answer) = TypeConfig::oneshot();
    log.append(entries, IOFlushed::signal(done)).await?;
    answer.await.unwrap()
}

/// Writes votes and entries until the crash, and says what was acknowledged by then: the last index and the last term.
async fn write_until_crash(disk: &Disk, rng: &mut StdRng) -> (Option<u64>, u64) {
    let mut log = open(disk, Some(&identity())).unwrap();
    disk.remember_after(rng.random_range(1..400));
    let (mut index, mut term) = (0, 0);
    let (mut last_acknowledged, mut term_acknowledged) = (None, 0);
    loop {
        if rng.random_bool(0.2) {
            term += 1;
            log.save_vote(&Vote::new(term, 1)).await.unwrap();
        } else {
            let count = rng.random_range(1..8);
            let entries = (index..index + count)
                .map(|index| entry(index, &format!("entry {index} {}", "x".repeat(400))));
            append(&mut log, entries.collect()).await.unwrap();
            index += count;
        }
        if disk.crashed().is_some() {
            return (last_acknowledged, term_acknowledged);
        }
        last_acknowledged = index.checked_sub(1);
        term_acknowledged = term;
    }
}

/// Crashes once and says whether everything acknowledged is still there.
async fn survives(seed: u64, lies: bool) -> Result<(), String> {
    let mut rng = StdRng::seed_from_u64(seed);
    let disk = Disk::default();
    // The file exists, durably, before anything is acknowledged.
    drop(open(&disk, Some(&identity())).unwrap());
    disk.set_faults(Faults { lies, ..Faults::default() });
    let (last, term) = write_until_crash(&disk, &mut rng).await;
    let crashed = disk.crashed().unwrap();
    let image = crashed.after_power_loss(&mut rng);
    let mut log = open(&Disk::of(image), None).map_err(|error| format!("it does not open: {error}"))?;
    if log.identity() != Some(&identity()) {
        return Err("the identity is gone".into());
    }
    let vote = log.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
    if vote < term {
        return Err(format!("term {term} was acknowledged, {vote} is there"));
    }
    let Some(last) = last else { return Ok(()) };
    let entries = log.try_get_log_entries(0..=last).await.map_err(|error| error.to_string())?;
    let whole = entries.len() as u64 == last + 1
        && entries
            .iter()
            .enumerate()
            .all(|(at, found)| found == &entry(at as u64, &format!("entry {at} {}", "x".repeat(400))));
    if whole {
        Ok(())
    } else {
        Err(format!("{} of {} acknowledged entries are there", entries.len(), last + 1))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_what_was_acknowledged_survives_power_loss_at_any_write() {
    for seed in 0..60 {
        if let Err(loss) = survives(seed, false).await {
            panic!("seed {seed}: {loss}");
        }
    }
}

/// Appends of a run that crashes at every step.
const APPENDS: u64 = 14;
/// Entries of each.
const ENTRIES_EACH: u64 = 8;
/// Ways in which what was not synced is lost, for each step.
const LOSSES: u64 = 2;

/// Appends to the end on a disk that remembers the moment of one step; tells how many entries and which term were
/// acknowledged by then.
async fn append_until(disk: &Disk, step: u64) -> (u64, u64) {
    let mut log = open(disk, None).unwrap();
    disk.remember_after(step);
    let mut acknowledged = (0, 0);
    for number in 0..APPENDS {
        let first = number * ENTRIES_EACH;
        let entries = (first..first + ENTRIES_EACH).map(long_entry).collect();
        log.save_vote(&Vote::new(number + 1, 1)).await.unwrap();
        append(&mut log, entries).await.unwrap();
        if disk.crashed().is_none() {
            acknowledged = (first + ENTRIES_EACH, number + 1);
        }
    }
    acknowledged
}

fn long_entry(index: u64) -> Entry {
    entry(index, &format!("entry {index} {}", "x".repeat(2000)))
}

/// Every write and every sync of commits that make the file grow, not a sample of them.
#[tokio::test(flavor = "multi_thread")]
async fn i02_power_lost_at_any_step_of_a_growing_commit_loses_nothing_acknowledged() {
    let mut step = 0;
    loop {
        step += 1;
        let disk = Disk::default();
        drop(open(&disk, Some(&identity())).unwrap());
        let (entries, term) = append_until(&disk, step).await;
        let Some(image) = disk.crashed() else { break };
        assert!(disk.growths() > 2, "the file did not grow");
        for loss in 0..LOSSES {
            let mut rng = StdRng::seed_from_u64(step * LOSSES + loss);
            let mut log = open(&Disk::of(image.after_power_loss(&mut rng)), None)
                .unwrap_or_else(|error| panic!("step {step}, loss {loss}: it does not open: {error:?}"));
            assert_eq!(log.identity(), Some(&identity()), "step {step}, loss {loss}");
            let vote = log.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
            assert!(vote >= term, "step {step}, loss {loss}: term {term} was acknowledged, {vote} is there");
            let found = log.try_get_log_entries(0..entries).await.unwrap();
            let whole = found.iter().cloned().eq((0..entries).map(long_entry));
            assert!(whole, "step {step}, loss {loss}: {} of {entries} entries are there", found.len());
        }
    }
    println!("{step} steps");
    assert!(step > 100);
}

/// The same where nothing but entries is written: frames of the journal, and the commits that take them over when it is full.
#[tokio::test(flavor = "multi_thread")]
async fn i02_power_lost_at_any_step_of_filling_a_journal_loses_nothing_acknowledged() {
    const APPENDS: u64 = 40;
    let mut step = 0;
    loop {
        step += 1;
        let disk = Disk::default();
        let mut log = open(&disk, Some(&identity())).unwrap();
        disk.remember_after(step);
        let mut acknowledged = 0;
        for index in 0..APPENDS {
            append(&mut log, vec![long_entry(index)]).await.unwrap();
            if disk.crashed().is_none() {
                acknowledged = index + 1;
            }
        }
        let Some(image) = disk.crashed() else {
            // Most of them cost one write and one sync.
            assert!((APPENDS * 2..APPENDS * 4).contains(&step), "{step} steps");
            break;
        };
        for loss in 0..LOSSES {
            let mut rng = StdRng::seed_from_u64(step * LOSSES + loss);
            let mut log = open(&Disk::of(image.after_power_loss(&mut rng)), None)
                .unwrap_or_else(|error| panic!("step {step}, loss {loss}: it does not open: {error:?}"));
            let found = log.try_get_log_entries(0..acknowledged).await.unwrap();
            let whole = found.iter().cloned().eq((0..acknowledged).map(long_entry));
            assert!(whole, "step {step}, loss {loss}: {} of {acknowledged} entries are there", found.len());
        }
    }
}

/// A later vote must not be found without the entries before it, nor entries of a journal that was cut.
#[tokio::test(flavor = "multi_thread")]
async fn i02_entries_of_the_journal_that_were_truncated_stay_gone() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, (0..6).map(|index| entry(index, "old")).collect()).await.unwrap();
    log.truncate_after(Some(LogId::new(LeaderId { term: 1, node_id: 1 }, 2))).await.unwrap();
    append(&mut log, vec![entry(3, "new")]).await.unwrap();
    let mut again = open(&Disk::of(disk.image().synced()), None).unwrap();
    let expected = [entry(0, "old"), entry(1, "old"), entry(2, "old"), entry(3, "new")];
    assert_eq!(again.try_get_log_entries(0..10).await.unwrap(), expected);
    assert_eq!(log.try_get_log_entries(0..10).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_frame_of_the_journal_that_rots_before_a_start_is_not_taken_for_its_end() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    for index in 0..4 {
        append(&mut log, vec![entry(index, &format!("needle-{index}"))]).await.unwrap();
    }
    let mut image = disk.image().synced();
    let at = (0..JOURNAL_BYTES as usize).find(|at| image[*at..].starts_with(b"needle-1")).unwrap();
    image[at] ^= 1;
    let refused = open(&Disk::of(image), None).map(drop);
    assert!(matches!(refused, Err(LogStoreError::JournalRotten { .. })), "{refused:?}");
}

/// The identity's record has a version that a build without a journal refuses, as long as entries may lie there.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_build_that_knows_no_journal_opens_only_a_log_that_was_closed() {
    const META: redb::TableDefinition<'static, &'static str, &'static [u8]> =
        redb::TableDefinition::new("meta");
    const ENTRIES: redb::TableDefinition<'static, u64, &'static [u8]> = redb::TableDefinition::new("entries");
    let looks = |disk: Disk| {
        let (_, part) = disk.split(JOURNAL_BYTES).unwrap();
        let database = redb::Database::builder().create_with_backend(part).unwrap();
        let transaction = database.begin_read().unwrap();
        let meta = transaction.open_table(META).unwrap();
        let version = meta.get("identity").unwrap().unwrap().value()[0];
        (version, transaction.open_table(ENTRIES).unwrap().len().unwrap())
    };
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, vec![entry(0, "in the journal")]).await.unwrap();
    assert_eq!(looks(Disk::of(disk.image().synced())), (2, 0));
    drop(log);
    assert_eq!(looks(Disk::of(disk.image().synced())), (1, 1));
}

/// The tests above mean something only if it would notice an acknowledgement that came before its fsync.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_disk_that_lies_about_syncing_is_noticed_by_these_tests() {
    let mut noticed = 0;
    for seed in 0..20 {
        noticed += u32::from(survives(seed, true).await.is_err());
    }
    assert!(noticed > 10, "only {noticed} of 20 lies were noticed");
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_after_a_failed_fsync_nothing_is_acknowledged_any_more() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, vec![entry(0, "good")]).await.unwrap();
    disk.set_faults(Faults { sync_fails: true, ..Faults::default() });
    append(&mut log, vec![entry(1, "lost")]).await.unwrap_err();
    disk.set_faults(Faults::default());
    append(&mut log, vec![entry(2, "later")]).await.unwrap_err();
    log.save_vote(&Vote::new(9, 1)).await.unwrap_err();
    assert!(log.failure().is_some());
    assert_ne!(log.read_vote().await.unwrap(), Some(Vote::new(9, 1)));
}

/// A sync that fails once and works when it is tried again: what came before it is lost all the same.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_sync_that_would_work_the_second_time_is_not_tried_again() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    log.save_vote(&Vote::new(1, 1)).await.unwrap();
    append(&mut log, vec![entry(0, "good")]).await.unwrap();
    let syncs = disk.syncs();
    disk.fail_next_sync();
    let (lost, later) =
        (append(&mut log, vec![entry(1, "lost")]).await, append(&mut log, vec![entry(2, "later")]).await);
    let vote = log.save_vote(&Vote::new(9, 1)).await;
    assert!(lost.is_err() && later.is_err() && vote.is_err(), "{lost:?}, {later:?}, {vote:?}");
    assert_eq!(disk.syncs(), syncs, "it was tried again");
    // Whatever is read before the power goes, nothing that was refused was ever promised.
    let mut log = open(&Disk::of(disk.image().synced()), None).unwrap();
    assert_eq!(log.try_get_log_entries(0..3).await.unwrap(), [entry(0, "good")]);
    assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(1, 1)));
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_a_full_disk_stops_the_log_and_loses_nothing() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, vec![entry(0, "good")]).await.unwrap();
    disk.set_faults(Faults { write_fails: true, ..Faults::default() });
    append(&mut log, vec![entry(1, "too much")]).await.unwrap_err();
    append(&mut log, vec![entry(2, "later")]).await.unwrap_err();
    drop(log);
    let image = disk.image().synced();
    let mut log = open(&Disk::of(image), None).unwrap();
    assert_eq!(log.try_get_log_entries(0..=0).await.unwrap(), [entry(0, "good")]);
}

/// Ways in which bits rot in a log that a crash left.
const ROTS: u64 = 300;

/// After a crash no checksums of blocks are left, and redb meets pages that make no sense.
#[tokio::test(flavor = "multi_thread")]
async fn i02_bits_that_rot_in_a_log_while_its_process_is_down_are_refused_or_change_nothing() {
    const COMMITS: u64 = 30;
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    for index in 0..COMMITS {
        log.save_vote(&Vote::new(index + 1, 1)).await.unwrap();
        append(&mut log, vec![long_entry(index)]).await.unwrap();
    }
    let image = disk.image().synced();
    let (mut refused, mut unharmed) = (0, 0);
    for seed in 0..ROTS {
        let mut rng = StdRng::seed_from_u64(seed);
        let rotten = Disk::of(image.clone());
        rotten.flip_bit(rng.random_range(0..rotten.bytes()), rng.random_range(0..8));
        let mut log = match open(&rotten, None) {
            Ok(log) => log,
            Err(_) => {
                refused += 1;
                continue;
            }
        };
        // At most the newest commit is gone: its pages may as well have been torn (`docs/formats/raft-log.md`).
        let end = log.get_log_state().await.unwrap().last_log_id.map_or(0, |last| last.index() + 1);
        assert!(end + 1 >= COMMITS, "seed {seed}: {end} of {COMMITS} entries");
        let term = log.read_vote().await.unwrap().map_or(0, |vote| vote.leader_id.term);
        assert_eq!(term, COMMITS, "seed {seed}");
        match log.try_get_log_entries(0..end).await {
            Ok(entries) => {
                assert!(entries.into_iter().eq((0..end).map(long_entry)), "seed {seed}");
                unharmed += 1;
            }
            Err(_) => refused += 1,
        }
    }
    println!("{refused} refused, {unharmed} unharmed");
    assert!(refused > 20 && unharmed > 20, "{refused} refused, {unharmed} unharmed");
}

/// A page that rotted while nobody knew its checksum can hide a row, and no checksum of ours is in what is not there.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_vote_that_rot_hides_is_never_taken_for_none() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    log.save_vote(&Vote::new(3, 1)).await.unwrap();
    append(&mut log, vec![entry(0, "kept")]).await.unwrap();
    // Closed in order: redb takes every page for sound.
    drop(log);
    let mut image = disk.current();
    let places: Vec<usize> = (0..image.len() - 4).filter(|at| image[*at..].starts_with(b"vote")).collect();
    assert!(!places.is_empty());
    for at in places {
        image[at + 1] ^= 1;
    }
    assert!(open(&Disk::of(image), None).is_err(), "the vote is forgotten");
}

/// openraft takes the log of a new leader for durable (its issue 2118, in versions before this one). It is: who is elected
/// has its own vote stored, and what was appended before is stored with it or before it.
#[tokio::test(flavor = "multi_thread")]
async fn i02_a_vote_is_never_durable_before_the_entries_that_were_appended_before_it() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    let mut answers = Vec::new();
    // The first waits at the disk; the others gather behind it, and the vote after them.
    disk.stall_syncs();
    for index in 0..50 {
        let (done, answer) = TypeConfig::oneshot();
        log.append([long_entry(index)], IOFlushed::signal(done)).await.unwrap();
        answers.push(answer);
        while index == 0 && disk.stalled() == 0 {
            tokio::task::yield_now().await;
        }
    }
    let mut voter = log.clone();
    let voting = tokio::spawn(async move { voter.save_vote(&Vote::new(7, 1)).await });
    tokio::task::yield_now().await;
    assert!(!voting.is_finished(), "a vote was answered before its sync");
    disk.go_on();
    voting.await.unwrap().unwrap();
    let stored = disk.image().synced();
    let mut after = open(&Disk::of(stored), None).unwrap();
    assert_eq!(after.read_vote().await.unwrap(), Some(Vote::new(7, 1)));
    assert_eq!(after.try_get_log_entries(0..50).await.unwrap().len(), 50);
    for answer in answers {
        answer.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn i01_an_entry_that_rotted_is_refused_and_never_applied() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    for index in 0..5 {
        append(&mut log, vec![entry(index, &format!("needle-{index}"))]).await.unwrap();
    }
    drop(log);
    // In memory, before the database had it: its own checksums cover the wrong bytes.
    let entries: redb::TableDefinition<'_, u64, &[u8]> = redb::TableDefinition::new("entries");
    let (_, part) = disk.split(JOURNAL_BYTES).unwrap();
    let database = redb::Database::builder().create_with_backend(part).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(entries).unwrap();
        let mut record = table.get(2).unwrap().unwrap().value().to_vec();
        *record.last_mut().unwrap() ^= 1;
        table.insert(2, record.as_slice()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    let mut log = open(&Disk::of(disk.current()), None).unwrap();
    let error = log.try_get_log_entries(0..5).await.unwrap_err();
    let text = format!("{:?}", error);
    assert!(text.contains("Checksum"), "{text}");
    assert_eq!(log.try_get_log_entries(3..5).await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn purged_entries_leave_the_file_and_stay_gone_after_a_restart() {
    const ENTRIES: u64 = 5000;
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, (0..ENTRIES).map(|index| entry(index, "e")).collect()).await.unwrap();
    log.allow_purge_below(1000);
    let upto = |index| LogId::new(LeaderId { term: 1, node_id: 1 }, index);
    log.purge(upto(1000)).await.unwrap_err();
    log.allow_purge_below(ENTRIES);
    log.purge(upto(4499)).await.unwrap();
    assert_eq!(log.try_get_log_entries(0..ENTRIES).await.unwrap().len(), 500);
    log.flush().await.unwrap();
    drop(log);
    let image = disk.current();
    let mut log = open(&Disk::of(image), None).unwrap();
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, Some(upto(4499)));
    assert_eq!(state.last_log_id, Some(upto(ENTRIES - 1)));
    assert_eq!(log.try_get_log_entries(0..ENTRIES).await.unwrap().len(), 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn i02_what_no_checkpoint_covers_is_not_purged() {
    let disk = Disk::default();
    let mut log = open(&disk, Some(&identity())).unwrap();
    append(&mut log, (0..10).map(|index| entry(index, "kept")).collect()).await.unwrap();
    let upto = |index| LogId::new(LeaderId { term: 1, node_id: 1 }, index);
    // The state machine is durable through entry 3: a crash would need those after it again.
    log.allow_purge_below(4);
    assert!(log.purge(upto(4)).await.is_err());
    append(&mut log, vec![entry(10, "kept")]).await.unwrap();
    assert_eq!(log.try_get_log_entries(0..11).await.unwrap().len(), 11);
    log.purge(upto(3)).await.unwrap();
    append(&mut log, vec![entry(11, "kept")]).await.unwrap();
    drop(log);
    let mut log = open(&disk, None).unwrap();
    assert_eq!(log.get_log_state().await.unwrap().last_purged_log_id, Some(upto(3)));
    assert_eq!(log.try_get_log_entries(4..12).await.unwrap().len(), 8);
}
