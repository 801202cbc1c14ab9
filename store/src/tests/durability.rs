//! What a crash leaves: the state of the last checkpoint, with Raft's bytes of that moment.

use super::world::*;
use crate::{Store, Views};
use holdfast_faulty_disk::{Disk, Faults};
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Work of some size: orgs, and now and then a deployment.
fn work(world: &mut World, rng: &mut StdRng, name: &str) {
    for n in 0..rng.random_range(1..20) {
        world.operator(Command::CreateOrg { name: format!("{name}-{n}").parse().unwrap() }).unwrap();
    }
}

#[test]
fn i02_a_crash_reverts_to_the_last_checkpoint_with_its_raft_bytes() {
    for seed in 0..25u64 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let disk = Disk::default();
        let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
        work(&mut world, &mut rng, "first");
        let durable = world.store.checkpoint().unwrap();
        let (digest, meta) = (world.store.digest(), world.store.raft_meta().unwrap());
        assert_eq!(durable, world.store.applied());
        work(&mut world, &mut rng, "second");
        assert_ne!(world.store.digest(), digest);
        // Taken while the store lives: dropping it would be a clean shutdown.
        let left = disk.after_power_loss(&mut rng);
        let back = Store::open_with_backend(left).unwrap();
        // Nothing else was synced, so it is that very state.
        assert_eq!((back.digest(), back.applied()), (digest, durable), "seed {seed}");
        assert_eq!(back.raft_meta().unwrap(), meta);
        back.verify().unwrap();
        // The log replays the rest.
        let next = durable.unwrap().next();
        back.apply(next, &world.log[next.0 as usize..], b"").unwrap();
        assert_eq!(back.digest(), world.store.digest(), "seed {seed}");
    }
}

#[test]
fn applying_never_touches_the_disk_and_a_checkpoint_syncs() {
    let disk = Disk::default();
    let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
    let (syncs, growths) = (disk.syncs(), disk.growths());
    for n in 0..300 {
        world.operator(Command::CreateOrg { name: format!("org-{n}").parse().unwrap() }).unwrap();
    }
    assert_eq!((disk.syncs(), disk.growths()), (syncs, growths));
    world.store.checkpoint().unwrap();
    let synced = disk.syncs();
    assert!(synced > syncs);
    // With nothing new there is nothing to write.
    world.store.checkpoint().unwrap();
    assert_eq!(disk.syncs(), synced);
}

#[test]
fn i02_a_failed_sync_is_never_retried_as_if_it_had_worked() {
    let disk = Disk::default();
    let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
    world.store.checkpoint().unwrap();
    let digest = world.store.digest();
    world.operator(Command::CreateOrg { name: "acme".parse().unwrap() }).unwrap();
    disk.set_faults(Faults { sync_fails: true, ..Faults::default() });
    world.store.checkpoint().unwrap_err();
    disk.set_faults(Faults::default());
    world.store.checkpoint().unwrap_err();
    let index = LogIndex(world.log.len() as u64);
    world.store.apply(index, &[vec![]], b"").unwrap_err();
    let mut rng = StdRng::seed_from_u64(1);
    let back = Store::open_with_backend(disk.after_power_loss(&mut rng)).unwrap();
    assert_eq!(back.digest(), digest);
}

#[test]
fn a_file_is_opened_again_as_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.redb");
    let mut world = World::with(Store::open(&path).unwrap());
    world.tenant("acme", 10);
    world.store.checkpoint().unwrap();
    let digest = world.store.digest();
    drop(world);
    let back = Store::open(&path).unwrap();
    assert_eq!(back.digest(), digest);
    assert!(back.view().unwrap().org_by_name(&"acme".parse().unwrap()).unwrap().is_some());
    std::fs::write(dir.path().join("other"), b"not a database, but long enough to be looked at").unwrap();
    let error = Store::open(&dir.path().join("other")).unwrap_err();
    assert!(error.to_string().contains("other"), "{error}");
}
