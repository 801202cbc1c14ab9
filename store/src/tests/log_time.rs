//! Log time: what ends by it, who moves it, and what the raise to it leaves of what was kept before (I4).

use super::world::*;
use crate::{REQUEST_KEPT_MS, Store};
use holdfast_model::limits::{IDEMPOTENCY_KEPT_MS, LOG_TIME_STEP_MS_MAX};
use holdfast_model::*;

const YEAR_MS: u64 = 365 * 24 * 3_600_000;
const RAISE: Command = Command::RaiseClusterVersion { to: ClusterVersion::TWO };

/// The outcomes that are kept.
fn held(world: &World) -> usize {
    kept_outcomes(&world.store)
}

/// A write with a key and one without, to be repeated.
fn ask(world: &mut World) -> [(Context, Command); 2] {
    [Some("key"), None].map(|key| {
        let context = world.context(Actor::Operator(world.operator), None);
        let name = if key.is_some() { "keyed" } else { "keyless" };
        let context = Context { idempotency_key: key.map(Into::into), ..context };
        (context, Command::CreateOrg { name: name.parse().unwrap() })
    })
}

/// The same proposal again, by a member whose clock says `now`.
fn again(world: &mut World, asked: &(Context, Command), now: Timestamp) -> Outcome {
    world.propose(Context { now, ..asked.0.clone() }, asked.1.clone())
}

#[test]
fn i04_no_wall_clock_ends_what_is_kept() {
    let mut world = World::new();
    let asked = ask(&mut world);
    let first = asked.clone().map(|(context, command)| world.propose(context, command));
    let years = [START.plus_ms(YEAR_MS / 2), Timestamp(0), START.plus_ms(40 * YEAR_MS)];
    for now in years {
        // Whoever has that clock writes too, and with each write outcomes that are over are removed.
        world.now = now;
        for _ in 0..8 {
            world.system(Command::Tick).unwrap();
        }
        for (asked, first) in asked.iter().zip(&first) {
            assert_eq!(again(&mut world, asked, now), *first, "at {now:?}");
        }
    }
    world.check();
}

#[test]
fn i04_log_time_ends_what_is_kept_and_never_early() {
    for (kept_ms, which) in [(IDEMPOTENCY_KEPT_MS, 0), (REQUEST_KEPT_MS, 1)] {
        let mut world = World::new();
        let asked = ask(&mut world);
        let first = world.propose(asked[which].0.clone(), asked[which].1.clone());
        // A step of it may have passed before the write and come into the log after it.
        world.log_time_passes(LOG_TIME_STEP_MS_MAX);
        world.log_time_passes(kept_ms - 1);
        let now = world.now;
        assert_eq!(again(&mut world, &asked[which], now), first);
        world.log_time_passes(1);
        assert_eq!(code(again(&mut world, &asked[which], now)), Code::NameTaken, "it is over and tried anew");
    }
}

#[test]
fn i04_what_was_kept_by_wall_clocks_is_kept_for_its_whole_time_again_from_the_raise_on() {
    let mut world = World::at(ClusterVersion::ONE);
    let asked = ask(&mut world);
    let first = asked.clone().map(|(context, command)| world.propose(context, command));
    let kept_before = held(&world);
    world.system(RAISE).unwrap();
    // Wall clocks count no more, and what ends by log time meanwhile is removed from behind what does not.
    let now = START.plus_ms(YEAR_MS / 2);
    world.now = now;
    for n in 0..50 {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    assert_eq!(held(&world), kept_before + 51);
    world.log_time_passes(REQUEST_KEPT_MS + LOG_TIME_STEP_MS_MAX);
    for _ in 0..20 {
        world.system(Command::Tick).unwrap();
    }
    assert_eq!(held(&world), kept_before, "the raise's own outcome ends by log time too");
    world.log_time_passes(IDEMPOTENCY_KEPT_MS - REQUEST_KEPT_MS - 1);
    for (asked, first) in asked.iter().zip(&first) {
        assert_eq!(again(&mut world, asked, now), *first);
    }
    world.log_time_passes(1);
    for asked in &asked {
        assert_eq!(code(again(&mut world, asked, now)), Code::NameTaken, "it is over and tried anew");
    }
    for _ in 0..20 {
        world.system(Command::Tick).unwrap();
    }
    assert_eq!(held(&world), 2, "what was tried anew is kept anew, and nothing else");
    world.check();
}

#[test]
fn i04_only_the_clockwork_moves_log_time_and_never_far() {
    let mut world = World::at(ClusterVersion::ONE);
    let advance = |by_ms| Command::AdvanceLogTime { by_ms };
    assert_eq!(code(world.system(advance(1))), Code::FailedPrecondition);
    world.system(RAISE).unwrap();
    assert_eq!(code(world.operator(advance(1))), Code::Unauthenticated);
    assert_eq!(code(world.system(advance(LOG_TIME_STEP_MS_MAX + 1))), Code::InvalidRequest);
    assert_eq!(world.store.log_time_ms(), 0);
    let (revision, kept) = (world.store.revision(), held(&world));
    world.system(advance(LOG_TIME_STEP_MS_MAX)).unwrap();
    world.system(advance(7)).unwrap();
    assert_eq!(world.store.log_time_ms(), LOG_TIME_STEP_MS_MAX + 7);
    assert_eq!(
        (world.store.revision(), held(&world)),
        (revision, kept),
        "no event, and no outcome of its own"
    );
    world.check();
}

#[test]
fn log_time_is_there_again_after_a_restart_and_in_a_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let mut world = World::with(Store::open(&path).unwrap());
    world.log_time_passes(12_345);
    world.store.checkpoint().unwrap();
    let mut bytes = Vec::new();
    world.store.snapshot().unwrap().write_to(&mut bytes).unwrap();
    drop(world);
    assert_eq!(Store::open(&path).unwrap().log_time_ms(), 12_345);
    let other = memory_store();
    other.install(&mut bytes.as_slice()).unwrap();
    assert_eq!(other.log_time_ms(), 12_345);
}
