//! Recent rows: readers, checkpoints and crashes while the state changes.

use super::history::random_history;
use super::world::*;
use crate::rows::Rows;
use crate::{RowList, Store, StoreError, Table, View, Views};
use holdfast_faulty_disk::{Disk, Faults};
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

/// Every row of the views that this view answers, by scans of a few rows at a time.
fn rows_of(view: &View) -> RowList {
    let mut rows = RowList::new();
    for table in Table::ALL {
        let mut after = None;
        loop {
            let page = view.scan(&[*table as u8], after.as_deref(), 7).unwrap();
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            rows.extend(page);
        }
    }
    rows
}

fn events_of(view: &View) -> Vec<Event> {
    view.events(Revision(0), usize::MAX, None).unwrap().events
}

/// What a view answers agrees with itself: scans with point reads, rows with their digest, events with the chain.
fn check_view(view: &View) {
    let mut sum = crate::tables::RowSum::default();
    for (key, value) in rows_of(view) {
        assert_eq!(view.get(&key).unwrap().as_ref(), Some(&value), "{key:?}");
        sum.add(&key, &value);
    }
    let digest = crate::tables::views_digest(sum, view.chain(), view.revision().0);
    assert_eq!(digest, view.head().views_digest());
    let events = events_of(view);
    assert_eq!(events.len() as u64, view.revision().0);
    assert_eq!(events.last().map(|event| event.chain), (!events.is_empty()).then(|| view.chain()));
    if let Some(last) = events.last() {
        assert_eq!(view.event(view.revision()).unwrap().as_ref(), Some(last));
        assert_eq!(view.event(view.revision().next()).unwrap(), None);
        assert_eq!(view.first_held().unwrap(), Some(Revision(1)));
    }
}

/// The same log in another store, with checkpoints and snapshots in between; `seen` is called after each batch.
fn replayed(log: &[Vec<Proposal>], rng: &mut StdRng, mut seen: impl FnMut(&Store, &mut StdRng)) -> Store {
    let store = memory_store();
    let mut at = 0;
    while at < log.len() {
        let end = (at + rng.random_range(1..8)).min(log.len());
        store.apply(LogIndex(at as u64), &log[at..end], &(end as u64).to_be_bytes()).unwrap();
        at = end;
        seen(&store, rng);
    }
    store
}

#[test]
fn i03_views_keep_answering_the_same_whatever_is_applied_and_written_down() {
    for seed in 300..304u64 {
        let world = random_history(seed, 150);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut pinned = Vec::new();
        let store = replayed(&world.log, &mut rng, |store, rng| {
            if rng.random_bool(0.2) {
                let view = store.view().unwrap();
                check_view(&view);
                pinned.push((view.clone(), rows_of(&view), events_of(&view), view.digest()));
            }
            if rng.random_bool(0.1) {
                store.checkpoint().unwrap();
            }
            if rng.random_bool(0.05) {
                drop(store.snapshot().unwrap());
            }
        });
        assert_eq!(store.digest(), world.store.digest());
        for (view, rows, events, digest) in pinned {
            assert_eq!(rows_of(&view), rows, "seed {seed}, revision {}", view.revision());
            assert_eq!(events_of(&view), events);
            assert_eq!(view.digest(), digest);
            check_view(&view);
        }
        store.verify().unwrap();
    }
}

#[test]
fn i13_a_view_at_a_revision_is_what_a_replay_to_it_comes_to() {
    for seed in 310..313u64 {
        let world = random_history(seed, 120);
        let mut rng = StdRng::seed_from_u64(seed);
        // The ends of commands: where a view can stand.
        let mut ends = vec![Revision(0)];
        let mut checkpoints = 0;
        let mut looked_back = 0;
        let store = memory_store();
        for (at, entry) in world.log.iter().enumerate() {
            store.apply(LogIndex(at as u64), std::slice::from_ref(entry), b"m").unwrap();
            ends.push(store.revision());
            if rng.random_bool(0.04) {
                store.checkpoint().unwrap();
                checkpoints += 1;
            }
            if !rng.random_bool(0.05) {
                continue;
            }
            for _ in 0..6 {
                let asked = Revision(rng.random_range(0..=store.revision().0));
                let end = *ends.iter().rfind(|end| **end <= asked).unwrap();
                match store.view_at(asked) {
                    Ok(view) => {
                        assert_eq!(view.revision(), end, "seed {seed}, asked for {asked}");
                        check_view(&view);
                        // Elsewhere: it would make a checkpoint here.
                        let replayed = world.store.replay_to(end).unwrap();
                        assert_eq!(
                            view.head().views_digest(),
                            replayed.views,
                            "seed {seed}, revision {asked}"
                        );
                        looked_back += u32::from(asked < store.revision());
                    }
                    Err(StoreError::Compacted { asked: of, oldest }) => {
                        assert!(of == asked && asked < oldest, "{of} {asked} {oldest}");
                        assert_eq!(store.view_at(oldest).unwrap().revision(), oldest);
                        assert!(checkpoints > 0);
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        }
        assert!(looked_back > 5, "seed {seed}: only {looked_back}");
        let beyond = store.revision().next();
        assert!(
            matches!(store.view_at(beyond), Err(StoreError::NoSuchRevision { asked, .. }) if asked == beyond)
        );
    }
}

#[test]
fn revisions_of_the_last_checkpoints_can_be_read_and_older_ones_are_told_apart() {
    let mut world = World::new();
    let mut made = Vec::new();
    for n in 0..4 {
        for m in 0..3 {
            world.operator(Command::CreateOrg { name: format!("org-{n}-{m}").parse().unwrap() }).unwrap();
        }
        made.push(world.store.revision());
        world.store.checkpoint().unwrap();
    }
    let Err(StoreError::Compacted { oldest, .. }) = world.store.view_at(made[0]) else { panic!("held") };
    assert_eq!(oldest, made[1]);
    for revision in made[1].0..=made[3].0 {
        let view = world.store.view_at(Revision(revision)).unwrap();
        assert_eq!(view.revision(), Revision(revision));
        assert_eq!(view.orgs(None, 100).unwrap().len() as u64, revision - made[0].0 + 3);
    }
    // A snapshot's history begins with it.
    let mut bytes = Vec::new();
    world.store.snapshot().unwrap().write_to(&mut bytes).unwrap();
    world.store.install(&mut bytes.as_slice()).unwrap();
    assert!(matches!(world.store.view_at(made[2]), Err(StoreError::Compacted { .. })));
    world.store.view_at(made[3]).unwrap();
}

#[test]
fn i02_a_crash_without_a_checkpoint_loses_nothing_that_the_log_has() {
    for seed in 320..323u64 {
        let world = random_history(seed, 60);
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = Disk::default();
        let store = Store::open_with_backend(disk.clone()).unwrap();
        let cut = rng.random_range(0..world.log.len());
        store.apply(LogIndex(0), &world.log[..cut], b"first").unwrap();
        store.checkpoint().unwrap();
        let (digest, revision) = (store.digest(), store.revision());
        store.apply(LogIndex(cut as u64), &world.log[cut..], b"second").unwrap();
        assert_eq!(store.unsaved_entries(), (world.log.len() - cut) as u64);
        assert!(store.unsaved_bytes() > 0);
        drop(store);
        let back = Store::open_with_backend(disk.after_power_loss(&mut rng)).unwrap();
        assert_eq!((back.digest(), back.revision()), (digest, revision), "seed {seed}");
        assert_eq!(back.raft_meta().unwrap().as_deref(), Some(&b"first"[..]));
        assert_eq!((back.unsaved_entries(), back.unsaved_bytes()), (0, 0));
        back.apply(LogIndex(cut as u64), &world.log[cut..], b"second").unwrap();
        assert_eq!(back.digest(), world.store.digest(), "seed {seed}");
        back.verify().unwrap();
    }
}

#[test]
fn i02_i03_checkpoints_beside_applies_lose_nothing_and_readers_see_whole_moments() {
    let world = random_history(330, 400);
    let disk = Disk::default();
    let store = Store::open_with_backend(disk.clone()).unwrap();
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let apply = || {
            for (at, entry) in world.log.iter().enumerate() {
                let meta = (at as u64).to_be_bytes();
                store.apply(LogIndex(at as u64), std::slice::from_ref(entry), &meta).unwrap();
                // Gives the others their turn on a machine with few cores.
                std::thread::yield_now();
            }
            is_done.store(true, Ordering::Release);
        };
        let checkpoint = || {
            while !is_done.load(Ordering::Acquire) {
                let durable = store.checkpoint().unwrap();
                assert!(durable <= store.applied());
            }
        };
        let read = || {
            let mut last = Revision(0);
            while !is_done.load(Ordering::Acquire) {
                let view = store.view().unwrap();
                assert!(view.revision() >= last);
                last = view.revision();
                check_view(&view);
            }
        };
        let snapshot = || {
            while !is_done.load(Ordering::Acquire) {
                let source = store.snapshot().unwrap();
                let mut bytes = Vec::new();
                let summary = source.write_to(&mut bytes).unwrap();
                let other = memory_store();
                assert_eq!(other.install(&mut bytes.as_slice()).unwrap().state, summary.state);
                let meta = source.applied().map(|at| at.0.to_be_bytes().to_vec());
                assert_eq!(other.raft_meta().unwrap(), meta);
                other.verify().unwrap();
            }
        };
        scope.spawn(checkpoint);
        scope.spawn(read);
        scope.spawn(snapshot);
        scope.spawn(apply);
    });
    assert_eq!(store.digest(), world.store.digest());
    check_view(&store.view().unwrap());
    store.verify().unwrap();
    let back = Store::open_with_backend(disk.after_power_loss(&mut StdRng::seed_from_u64(1))).unwrap();
    assert_eq!(back.digest(), store.digest());
}

#[test]
fn i02_a_checkpoint_that_fails_ends_the_service_and_is_not_seen_as_done() {
    let disk = Disk::default();
    let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
    world.store.checkpoint().unwrap();
    let durable = world.store.digest();
    world.operator(Command::CreateOrg { name: "acme".parse().unwrap() }).unwrap();
    let digest = world.store.digest();
    disk.set_faults(Faults { sync_fails: true, ..Faults::default() });
    world.store.checkpoint().unwrap_err();
    disk.set_faults(Faults::default());
    let index = LogIndex(world.log.len() as u64);
    assert!(matches!(world.store.checkpoint(), Err(StoreError::OutOfService)));
    assert!(matches!(world.store.apply(index, &[vec![]], b""), Err(StoreError::OutOfService)));
    assert!(matches!(world.store.snapshot(), Err(StoreError::OutOfService)));
    assert_eq!(world.store.unsaved_entries(), 1);
    // Who reads still sees one whole moment.
    assert_eq!(world.store.digest(), digest);
    check_view(&world.view());
    let back = Store::open_with_backend(disk.after_power_loss(&mut StdRng::seed_from_u64(1))).unwrap();
    assert_eq!(back.digest(), durable);
}

#[test]
fn i14_nothing_of_a_batch_that_fails_is_seen_or_written() {
    let disk = Disk::default();
    let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
    for n in 0..40 {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    world.store.checkpoint().unwrap();
    let (digest, meta) = (world.store.digest(), world.store.raft_meta().unwrap());
    let (at, _) = world.store.recorded_digest().unwrap().unwrap();
    let good = world.context(Actor::Operator(world.operator), None);
    let good = Proposal { context: good, command: Command::CreateOrg { name: "acme".parse().unwrap() } };
    let bad = world.context(Actor::System(MemberId(1)), None);
    let bad = Proposal { context: bad, command: Command::VerifyDigest { at, digest: Digest([3; 32]) } };
    let index = LogIndex(world.log.len() as u64);
    let error = world.store.apply(index, &[vec![good], vec![bad]], b"new").unwrap_err();
    assert!(matches!(error, StoreError::Diverged { .. }));
    assert_eq!((world.store.digest(), world.store.raft_meta().unwrap()), (digest, meta));
    let view = world.view();
    assert_eq!(view.org_by_name(&"acme".parse().unwrap()).unwrap(), None);
    check_view(&view);
    assert!(matches!(world.store.checkpoint(), Err(StoreError::OutOfService)));
    let back = Store::open_with_backend(disk.after_power_loss(&mut StdRng::seed_from_u64(1))).unwrap();
    assert_eq!(back.digest(), digest);
}

#[test]
fn applying_waits_for_a_checkpoint_when_memory_is_full() {
    const BYTES_MAX: usize = 40_000;
    let mut world = World::new();
    world.store.active_bytes_max = BYTES_MAX;
    let (mut checkpoints, mut before) = (0, world.store.unsaved_entries());
    let mut largest = 0;
    for n in 0..300 {
        let held = world.store.unsaved_bytes();
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
        let unsaved = world.store.unsaved_entries();
        checkpoints += u32::from(unsaved < before);
        before = unsaved;
        largest = largest.max(world.store.unsaved_bytes().saturating_sub(held));
        // One command more than the bound at most.
        assert!(world.store.unsaved_bytes() < BYTES_MAX + largest, "{}", world.store.unsaved_bytes());
    }
    assert!(checkpoints > 3, "{checkpoints}");
    world.check();
}

#[test]
fn rows_that_were_removed_hide_those_that_are_written_down() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    world.release(&a, 1);
    world.tenant_asks(&a, route(a.env, "a.example.com")).unwrap();
    world.store.checkpoint().unwrap();
    let before = world.view();
    let written: BTreeMap<_, _> = rows_of(&before).into_iter().collect();
    world.tenant_asks(&a, Command::DeleteApp { app: a.app, expected_version: None }).unwrap();
    let check = |view: &View| {
        assert_eq!(view.app(a.app).unwrap(), None);
        assert_eq!(view.app_by_name(a.org, &"hello".parse().unwrap()).unwrap(), None);
        assert_eq!(view.apps(a.org, None, 10).unwrap(), []);
        assert_eq!(view.all_routes(None, 10).unwrap(), []);
        assert_eq!(view.route_by_hostname(&"a.example.com".parse().unwrap()).unwrap(), None);
        check_view(view);
    };
    check(&world.view());
    // Frozen, and not written yet.
    let source = world.store.snapshot().unwrap();
    check(&world.view());
    let mut bytes = Vec::new();
    source.write_to(&mut bytes).unwrap();
    let other = memory_store();
    other.install(&mut bytes.as_slice()).unwrap();
    check(&other.view().unwrap());
    world.store.checkpoint().unwrap();
    check(&world.view());
    assert_eq!(rows_of(&before).into_iter().collect::<BTreeMap<_, _>>(), written);
    // The name is free again, over what hid it.
    let app = Command::CreateApp { org: a.org, name: "hello".parse().unwrap() };
    world.tenant_asks(&a, app).unwrap();
    assert_eq!(world.view().apps(a.org, None, 10).unwrap().len(), 1);
    world.check();
}

#[test]
fn a_digest_is_known_as_long_as_it_is_kept_wherever_it_stands() {
    let world = World::new();
    let entries = crate::DIGEST_EVERY * (crate::DIGESTS_KEPT + 20);
    let first = world.log.len() as u64;
    let mut recorded = Vec::new();
    for index in first..entries {
        world.store.apply(LogIndex(index), &[vec![]], b"m").unwrap();
        if index % crate::DIGEST_EVERY == 0 {
            recorded.push(LogIndex(index));
        }
        if index % 1_000 == 0 {
            world.store.checkpoint().unwrap();
        }
    }
    let gone = recorded.len() - crate::DIGESTS_KEPT as usize;
    for (n, at) in recorded.iter().enumerate() {
        assert_eq!(world.store.digest_at(*at).unwrap().is_some(), n >= gone, "{at}");
    }
    let known = |store: &Store| {
        let mut bytes = Vec::new();
        store.snapshot().unwrap().write_to(&mut bytes).unwrap();
        bytes
    };
    let unsaved = known(&world.store);
    world.store.checkpoint().unwrap();
    assert_eq!(known(&world.store), unsaved);
}

/// A view that is held keeps its answers when one row changes a thousand times above it.
#[test]
fn i03_a_row_with_many_versions_answers_each_reader_its_own() {
    let mut world = World::new();
    let node = world.node("n1", 4_096);
    let mut held = Vec::new();
    for n in 0..60 {
        let silent = BTreeMap::from([(node, world.now)]);
        let command = match n % 2 {
            0 => Command::ReportSilence { silent, back: [].into() },
            _ => Command::ReportSilence { silent: [].into(), back: [node].into() },
        };
        world.system(command).unwrap();
        let view = world.view();
        held.push((view.node(node).unwrap().unwrap(), rows_of(&view), view));
        if n % 17 == 0 {
            world.node(&format!("later-{n}"), 4_096);
        }
    }
    for (seen, rows, view) in &held {
        assert_eq!(view.node(node).unwrap().as_ref(), Some(seen));
        assert_eq!(&rows_of(view), rows);
        let at = world.store.view_at(view.revision()).unwrap();
        assert_eq!((at.node(node).unwrap().as_ref(), &rows_of(&at)), (Some(seen), rows));
    }
    let versions: std::collections::BTreeSet<_> = held.iter().map(|(node, ..)| node.version).collect();
    assert!(versions.len() > 10, "{versions:?}");
}
