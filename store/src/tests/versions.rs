//! The cluster version: how it rises, and what a build does that does not know it.

use super::world::*;
use crate::{Store, StoreError, Views};
use holdfast_model::*;

const TWO: ClusterVersion = ClusterVersion::TWO;
const RAISE: Command = Command::RaiseClusterVersion { to: TWO };

fn apply(store: &Store, world: &mut World, command: Command) -> Result<Outcome, StoreError> {
    let proposal = Proposal { context: world.context(Actor::System(MemberId(1)), None), command };
    let next = store.applied().map_or(LogIndex(0), LogIndex::next);
    Ok(store.apply(next, &[vec![proposal]], b"")?.remove(0).remove(0))
}

#[test]
fn i01_the_version_rises_one_step_at_a_time_and_by_nobody_elses_word() {
    let mut world = World::at(ClusterVersion::ONE);
    assert_eq!(world.store.cluster_version(), ClusterVersion::ONE);
    let tenant = world.tenant("acme", 2);
    assert_eq!(code(world.tenant_asks(&tenant, RAISE)), Code::Unauthenticated);
    assert_eq!(code(world.operator(RAISE)), Code::Unauthenticated);
    let skip = Command::RaiseClusterVersion { to: TWO.next() };
    assert_eq!(code(world.system(skip)), Code::FailedPrecondition);
    assert_eq!(world.store.cluster_version(), ClusterVersion::ONE);

    let raised = world.system(RAISE).unwrap().revision;
    assert_eq!(world.store.cluster_version(), TWO);
    let event = world.view().event(raised).unwrap().unwrap();
    assert_eq!(event.payload, EventPayload::ClusterVersionRaised { to: TWO });
    // It never goes down, and asking again changes nothing.
    assert_eq!(world.system(RAISE).unwrap().revision, raised);
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::ONE }).unwrap();
    assert_eq!(world.store.cluster_version(), TWO);
    assert_eq!(world.view().cluster_version().unwrap(), TWO);
    world.check();
}

#[test]
fn i01_a_cluster_begins_at_the_version_that_its_first_command_says() {
    for version in [ClusterVersion::ONE, TWO] {
        let mut world = World::at(ClusterVersion::ONE);
        let store = memory_store();
        apply(&store, &mut world, begin(version)).unwrap().unwrap();
        assert_eq!(store.cluster_version(), version);
        store.verify().unwrap();
        let again = apply(&store, &mut world, begin(version)).unwrap();
        assert_eq!(code(again), Code::AlreadyInitialised);
    }
}

#[test]
fn i01_a_member_that_does_not_know_the_version_stops_and_changes_nothing() {
    let mut world = World::at(ClusterVersion::ONE);
    let before = world.store.digest();
    world.store.support_up_to(ClusterVersion::ONE).unwrap();
    let next = world.store.applied().unwrap().next();
    let raise = Proposal { context: world.context(Actor::System(MemberId(1)), None), command: RAISE };
    let refused = world.store.apply(next, &[vec![raise]], b"");
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("version 2") && told.contains("supports 1"), "{told}");
    assert_eq!((world.store.digest(), world.store.cluster_version()), (before, ClusterVersion::ONE));
    // Nor does it go on with the next entry as if nothing had been there.
    assert!(matches!(world.store.apply(next.next(), &[vec![]], b""), Err(StoreError::OutOfService)));
    let newer = memory_store();
    newer.support_up_to(ClusterVersion::ONE).unwrap();
    let begun = apply(&newer, &mut world, begin(TWO));
    assert!(matches!(begun, Err(StoreError::UnsupportedVersion { .. })), "{begun:?}");
}

#[test]
fn i01_a_member_that_does_not_know_the_version_takes_no_snapshot_of_it() {
    let world = World::at(TWO);
    let mut bytes = Vec::new();
    world.store.snapshot().unwrap().write_to(&mut bytes).unwrap();
    let limited = memory_store();
    limited.support_up_to(ClusterVersion::ONE).unwrap();
    let refused = limited.install(&mut bytes.as_slice());
    assert!(matches!(refused, Err(StoreError::UnsupportedVersion { .. })), "{refused:?}");
    assert_eq!(limited.revision(), Revision(0));

    let follows = memory_store();
    follows.install(&mut bytes.as_slice()).unwrap();
    assert_eq!(follows.cluster_version(), TWO);
    let refused = follows.support_up_to(ClusterVersion::ONE);
    assert!(matches!(refused, Err(StoreError::UnsupportedVersion { .. })), "{refused:?}");
}

#[test]
fn the_version_is_there_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.redb");
    let world = World::with(Store::open(&path).unwrap());
    world.store.checkpoint().unwrap();
    drop(world);
    assert_eq!(Store::open(&path).unwrap().cluster_version(), ClusterVersion::NEWEST);
}
