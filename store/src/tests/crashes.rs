//! The power goes at every single step of checkpoints that make the file grow (I2).

use super::world::*;
use crate::Store;
use holdfast_faulty_disk::Disk;
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::BTreeSet;

/// Checkpoints of one run.
const CHECKPOINTS: u32 = 5;
/// Ways in which what was not synced is lost, for each step.
const LOSSES: u64 = 2;

/// Runs to its end on a disk that remembers the moment of one step, and tells what each checkpoint made durable, with the
/// number of checkpoints that had returned by that step.
fn run(disk: &Disk, step: u64) -> (Vec<Digest>, usize) {
    let mut world = World::with(Store::open_with_backend(disk.clone()).unwrap());
    world.store.checkpoint().unwrap();
    disk.remember_after(step);
    let (mut durable, mut before_crash) = (vec![world.store.digest()], 1);
    for checkpoint in 0..CHECKPOINTS {
        for n in 0..40 {
            let name = format!("org-{checkpoint}-{n}").parse().unwrap();
            world.operator(Command::CreateOrg { name }).unwrap();
        }
        world.store.checkpoint().unwrap();
        durable.push(world.store.digest());
        before_crash = if disk.crashed().is_none() { durable.len() } else { before_crash };
    }
    (durable, before_crash)
}

#[test]
fn i02_power_lost_at_any_step_of_a_growing_checkpoint_leaves_a_whole_one() {
    let mut found = BTreeSet::new();
    let mut step = 0;
    loop {
        step += 1;
        let disk = Disk::default();
        let (durable, before_crash) = run(&disk, step);
        let Some(image) = disk.crashed() else { break };
        assert!(disk.growths() > 2, "the file did not grow");
        for loss in 0..LOSSES {
            let mut rng = StdRng::seed_from_u64(step * LOSSES + loss);
            let back = Store::open_with_backend(Disk::of(image.after_power_loss(&mut rng)))
                .unwrap_or_else(|error| panic!("step {step}, loss {loss}: {error:?}"));
            let at = durable.iter().rposition(|digest| *digest == back.digest());
            // The one that was under way may be there as well.
            let whole = at.is_some_and(|at| at + 1 >= before_crash && at <= before_crash);
            assert!(whole, "step {step}, loss {loss}: {at:?} of {before_crash} is there");
            back.verify().unwrap_or_else(|error| panic!("step {step}, loss {loss}: {error:?}"));
            found.extend(at);
        }
    }
    println!("{step} steps");
    assert!(found.len() > CHECKPOINTS as usize, "only {found:?} were met");
}

/// Ways in which bits rot in a file that a crash left.
const ROTS: u64 = 400;

#[test]
fn i01_bits_that_rot_while_a_process_is_down_are_found_when_the_file_is_opened() {
    let disk = Disk::default();
    let digest = run(&disk, u64::MAX).0.pop().unwrap();
    // Not closed in order: no checksums of blocks are left. Dropping the image's own store would close it.
    let image = disk.image().synced();
    let (mut refused, mut unharmed) = (0, 0);
    for seed in 0..ROTS {
        let mut rng = StdRng::seed_from_u64(seed);
        let rotten = Disk::of(image.clone());
        rotten.flip_bit(rng.random_range(0..rotten.bytes()), rng.random_range(0..8));
        match Store::open_with_backend(rotten) {
            Err(_) => refused += 1,
            Ok(store) => {
                // It hit what nothing refers to, or what came before was found whole.
                store.verify().unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
                unharmed += u32::from(store.digest() == digest);
            }
        }
    }
    println!("{refused} refused, {unharmed} unharmed");
    assert!(refused > 20 && unharmed > 20, "{refused} refused, {unharmed} unharmed");
}
