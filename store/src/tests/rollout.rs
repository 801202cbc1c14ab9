//! Roll-outs, step by step and at random.

use super::world::*;
use crate::{REPLACE_PAUSE_MS, Views};
use holdfast_model::limits::{INSTANCE_START_MS_MAX, REPLACEMENTS_MAX, ROLLOUT_MS_MAX};
use holdfast_model::resource::{
    Capacity, Deployment, DeploymentCause, DeploymentFailure, DeploymentState, Instance, InstanceReason,
    InstanceState, Unschedulable,
};
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

fn current(world: &World, tenant: &Tenant) -> Deployment {
    let view = world.view();
    let env = view.env(tenant.env).unwrap().unwrap();
    view.deployment(env.current.unwrap()).unwrap().unwrap()
}

fn in_state(world: &World, tenant: &Tenant, state: InstanceState) -> Vec<Instance> {
    world.live(tenant.env).into_iter().filter(|i| i.state == state).collect()
}

/// A cluster with room, and an env with three ready instances of release 1.
fn running() -> (World, Tenant, ReleaseId) {
    let mut world = World::new();
    for name in ["n1", "n2", "n3"] {
        world.node(name, 8_192);
    }
    let tenant = world.tenant("acme", 10);
    let release = world.release(&tenant, 1);
    world.deploy(&tenant, release);
    assert_eq!(world.live(tenant.env).len(), 3, "a first deployment starts all at once");
    world.settle(tenant.env);
    assert_eq!(current(&world, &tenant).state, DeploymentState::Complete);
    (world, tenant, release)
}

#[test]
fn an_update_surges_by_one_and_never_has_fewer_ready_than_wanted() {
    let (mut world, a, old) = running();
    let release = world.release(&a, 2);
    let id = world.deploy(&a, release);
    for step in 0..3 {
        let booting = in_state(&world, &a, InstanceState::Booting);
        assert_eq!(booting.len(), 1, "step {step}");
        assert_eq!(in_state(&world, &a, InstanceState::Ready).len(), 3);
        assert_eq!(booting[0].release, release);
        world.report(&booting[0], InstanceState::Ready);
        assert_eq!(in_state(&world, &a, InstanceState::Ready).len(), 3);
        let draining = in_state(&world, &a, InstanceState::Draining);
        assert_eq!((draining.len(), draining[0].release), (1, old));
        world.report(&draining[0], InstanceState::Stopped);
        assert_eq!(
            world.view().instance(draining[0].id).unwrap().unwrap().reason,
            Some(InstanceReason::Replaced)
        );
    }
    let done = current(&world, &a);
    assert_eq!((done.id, done.state, done.number), (id, DeploymentState::Complete, 2));
    assert_eq!(world.view().env(a.env).unwrap().unwrap().last_good, Some(id));
    assert!(!world.view().is_unsettled(a.env).unwrap());
    world.check();
}

#[test]
fn a_release_that_fails_goes_back_to_the_last_good_one_and_does_not_loop() {
    let (mut world, a, old) = running();
    let release = world.release(&a, 2);
    let id = world.deploy(&a, release);
    for _ in 0..=REPLACEMENTS_MAX {
        let booting = in_state(&world, &a, InstanceState::Booting);
        world.report(&booting[0], InstanceState::Failed);
        assert_eq!(in_state(&world, &a, InstanceState::Ready).len(), 3, "the old ones go on serving");
    }
    let failed = world.view().deployment(id).unwrap().unwrap();
    assert_eq!(failed.state, DeploymentState::Failed);
    assert_eq!(failed.failure, Some(DeploymentFailure::TooManyReplacements));
    assert!(failed.finished_at.is_some());
    let back = current(&world, &a);
    assert_eq!(
        (back.cause, back.release, back.state),
        (DeploymentCause::Rollback, old, DeploymentState::Complete)
    );
    assert_eq!(in_state(&world, &a, InstanceState::Ready).len(), 3);
    world.check();
}

#[test]
fn a_rollback_that_fails_stays_and_keeps_trying_slowly() {
    let (mut world, a, _) = running();
    let release = world.release(&a, 2);
    world.deploy(&a, release);
    let first = in_state(&world, &a, InstanceState::Booting)[0].clone();
    world.report(&first, InstanceState::Ready);
    for _ in 0..=REPLACEMENTS_MAX {
        let booting = in_state(&world, &a, InstanceState::Booting);
        world.report(&booting[0], InstanceState::Failed);
    }
    assert_eq!(current(&world, &a).cause, DeploymentCause::Rollback);
    for _ in 0..=REPLACEMENTS_MAX {
        let booting = in_state(&world, &a, InstanceState::Booting);
        world.report(&booting[0], InstanceState::Failed);
    }
    let back = current(&world, &a);
    assert_eq!((back.cause, back.state), (DeploymentCause::Rollback, DeploymentState::Failed));
    assert_eq!(back.number, 3, "no further deployment");
    assert_eq!(in_state(&world, &a, InstanceState::Booting).len(), 0, "it pauses");
    for _ in 0..100 {
        world.tick_after(REPLACE_PAUSE_MS);
    }
    assert_eq!(in_state(&world, &a, InstanceState::Booting).len(), 1, "and tries again");
    world.settle(a.env);
    assert!(!world.view().is_unsettled(a.env).unwrap());
    world.check();
}

#[test]
fn a_first_release_that_fails_has_nothing_to_go_back_to() {
    let mut world = World::new();
    world.node("n1", 8_192);
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    let id = world.deploy(&a, release);
    for _ in 0..=REPLACEMENTS_MAX {
        let booting = in_state(&world, &a, InstanceState::Booting);
        world.report(&booting[0], InstanceState::Failed);
    }
    let deployment = current(&world, &a);
    assert_eq!((deployment.id, deployment.state), (id, DeploymentState::Failed));
    world.check();
}

#[test]
fn a_start_and_a_roll_out_have_their_time() {
    let (mut world, a, old) = running();
    let release = world.release(&a, 2);
    let id = world.deploy(&a, release);
    let slow = in_state(&world, &a, InstanceState::Booting)[0].clone();
    world.tick_after(INSTANCE_START_MS_MAX);
    assert_eq!(in_state(&world, &a, InstanceState::Booting), std::slice::from_ref(&slow));
    world.tick_after(1);
    let ended = world.view().instance(slow.id).unwrap().unwrap();
    assert_eq!(ended.reason, Some(InstanceReason::StartTimedOut));
    assert_eq!(world.view().deployment(id).unwrap().unwrap().replacements, counts(1));
    world.now = START.plus_ms(ROLLOUT_MS_MAX + 1);
    world.system(Command::Tick).unwrap();
    let failed = world.view().deployment(id).unwrap().unwrap();
    assert_eq!(failed.failure, Some(DeploymentFailure::TimedOut));
    assert_eq!((current(&world, &a).release, current(&world, &a).state), (old, DeploymentState::Complete));
    world.check();
}

#[test]
fn scaling_keeps_what_matches_and_drains_the_oldest() {
    let (mut world, a, _) = running();
    let before = world.live(a.env);
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(5) }).unwrap();
    assert_eq!(in_state(&world, &a, InstanceState::Booting).len(), 2);
    world.settle(a.env);
    let deployment = current(&world, &a);
    assert_eq!((deployment.cause, deployment.state), (DeploymentCause::Scale, DeploymentState::Complete));
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(2) }).unwrap();
    let mut oldest: Vec<_> = before.iter().map(|i| (i.created_at, i.id)).collect();
    oldest.sort();
    let mut drained: Vec<_> =
        in_state(&world, &a, InstanceState::Draining).iter().map(|i| (i.created_at, i.id)).collect();
    drained.sort();
    assert_eq!(drained, oldest);
    world.settle(a.env);
    // A deployment keeps the numbers.
    let release = world.release(&a, 2);
    world.deploy(&a, release);
    assert_eq!(current(&world, &a).counts, counts(2));
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(0) }).unwrap();
    world.settle(a.env);
    assert_eq!(world.live(a.env), []);
    assert_eq!(current(&world, &a).state, DeploymentState::Complete);
    world.check();
}

#[test]
fn a_newer_deployment_takes_over() {
    let (mut world, a, _) = running();
    let (second, third) = (world.release(&a, 2), world.release(&a, 3));
    let id = world.deploy(&a, second);
    world.deploy(&a, third);
    assert_eq!(world.view().deployment(id).unwrap().unwrap().state, DeploymentState::Superseded);
    assert_eq!(in_state(&world, &a, InstanceState::Ready).len(), 3);
    world.settle(a.env);
    assert!(world.live(a.env).iter().all(|i| i.release == third));
    world.check();
}

#[test]
fn what_fails_after_a_roll_out_is_replaced_with_growing_pauses() {
    let (mut world, a, _) = running();
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let victim = in_state(&world, &a, InstanceState::Ready)[0].clone();
        world.report(&victim, InstanceState::Failed);
        let failed_at = world.now;
        while world.live(a.env).len() < 3 {
            world.tick_after(100);
        }
        pauses.push(world.now.since(failed_at));
        world.settle(a.env);
    }
    assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000]);
    assert_eq!(current(&world, &a).state, DeploymentState::Complete);
    assert_eq!(current(&world, &a).number, 1);
    world.check();
}

#[test]
fn without_room_it_says_so_and_goes_on_when_there_is() {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    let release = world.release(&a, 1);
    let id = world.deploy(&a, release);
    let blocked = |world: &World| world.view().deployment(id).unwrap().unwrap().unschedulable;
    assert_eq!(blocked(&world), Some(Unschedulable::NoNodesActive));
    world.node("n1", 2 * (64 + limits::VMM_OVERHEAD_MIB));
    world.tick_after(1_000);
    assert_eq!(blocked(&world), Some(Unschedulable::NoCapacityMemory));
    assert_eq!(world.live(a.env).len(), 2);
    let revision = world.store.revision();
    world.tick_after(1_000);
    assert_eq!(world.store.revision(), revision, "waiting makes no events");
    world.node("n2", 1_024);
    world.tick_after(1_000);
    assert_eq!((blocked(&world), world.live(a.env).len()), (None, 3));
    world.settle(a.env);
    assert_eq!(current(&world, &a).state, DeploymentState::Complete);
    world.check();
}

#[test]
fn draining_a_node_moves_its_instances_one_by_one() {
    let (mut world, a, _) = running();
    let node = world.live(a.env)[0].node;
    world.operator(Command::DrainNode { node }).unwrap();
    for _ in 0..100 {
        let ready = in_state(&world, &a, InstanceState::Ready);
        assert!(ready.len() >= 3);
        if let Some(booting) = in_state(&world, &a, InstanceState::Booting).first() {
            world.report(booting, InstanceState::Ready);
        } else if let Some(draining) = in_state(&world, &a, InstanceState::Draining).first() {
            world.report(draining, InstanceState::Stopped);
        } else {
            break;
        }
    }
    let live = world.live(a.env);
    assert_eq!(live.len(), 3);
    assert!(live.iter().all(|i| i.node != node && i.state == InstanceState::Ready));
    assert!(!world.view().is_unsettled(a.env).unwrap());
    assert_eq!(current(&world, &a).number, 1, "no deployment was needed");
    world.check();
}

/// Updates, scalings and time at random; instances become ready or drain out in any order, none fails. The wanted
/// number, or the smaller of the last two while it changes, is always ready once it ever was.
#[test]
fn healthy_updates_never_have_fewer_ready_than_wanted_whatever_the_order() {
    for seed in 0..20u64 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut world, a, first) = running();
        let mut releases = vec![first];
        let mut floor = 3;
        for _ in 0..120 {
            match rng.random_range(0..12) {
                0 => {
                    let release = world.release(&a, releases.len() as u8 + 1);
                    releases.push(release);
                    world.deploy(&a, release);
                }
                1 => {
                    let release = releases[rng.random_range(0..releases.len())];
                    world.deploy(&a, release);
                }
                2 => {
                    let count = rng.random_range(1..6);
                    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(count) }).unwrap();
                    floor = floor.min(count as usize);
                }
                3 => world.tick_after(1_000),
                _ => {
                    let moving: Vec<_> =
                        world.live(a.env).into_iter().filter(|i| i.state != InstanceState::Ready).collect();
                    if !moving.is_empty() {
                        let instance = &moving[rng.random_range(0..moving.len())];
                        let next = if instance.state == InstanceState::Booting {
                            InstanceState::Ready
                        } else {
                            InstanceState::Stopped
                        };
                        world.report(instance, next);
                    }
                }
            }
            let ready = in_state(&world, &a, InstanceState::Ready).len();
            assert!(ready >= floor, "seed {seed}: {ready} ready, {floor} wanted");
            let deployment = current(&world, &a);
            if deployment.state == DeploymentState::Complete {
                floor = deployment.counts.values().sum::<u32>() as usize;
                assert_eq!(ready, floor, "seed {seed}");
            }
        }
        world.settle(a.env);
        assert_eq!(current(&world, &a).state, DeploymentState::Complete, "seed {seed}");
        world.check();
    }
}

/// Any instance may fail at any time, and nodes come and go. Whatever happens, once failures end the env converges.
#[test]
fn whatever_fails_the_env_converges_once_failures_end() {
    for seed in 0..20u64 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut world, a, _) = running();
        let nodes: Vec<NodeId> = world.view().nodes().unwrap().iter().map(|n| n.id).collect();
        for n in 0..150u32 {
            match rng.random_range(0..14) {
                0 => {
                    let release = world.release(&a, n as u8);
                    world.deploy(&a, release);
                }
                1 => {
                    let count = rng.random_range(0..8);
                    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(count) }).unwrap();
                }
                2 => world.tick_after(rng.random_range(0..200_000)),
                3 => {
                    let node = nodes[rng.random_range(0..nodes.len())];
                    world.operator(Command::DrainNode { node }).unwrap();
                }
                4 | 5 => {
                    let node = nodes[rng.random_range(0..nodes.len())];
                    world.operator(Command::ActivateNode { node }).unwrap();
                }
                6 => {
                    let silent = [(nodes[rng.random_range(0..nodes.len())], world.now)].into();
                    world.system(Command::ReportSilence { silent, back: [].into() }).unwrap();
                }
                7 => {
                    let back = [nodes[rng.random_range(0..nodes.len())]].into();
                    world.system(Command::ReportSilence { silent: [].into(), back }).unwrap();
                }
                _ => {
                    let live = world.live(a.env);
                    if !live.is_empty() {
                        let instance = &live[rng.random_range(0..live.len())];
                        let states = [
                            InstanceState::Booting,
                            InstanceState::Ready,
                            InstanceState::Ready,
                            InstanceState::Stopped,
                            InstanceState::Failed,
                        ];
                        world.report(instance, states[rng.random_range(0..states.len())]);
                    }
                }
            }
        }
        for node in &nodes {
            world.operator(Command::ActivateNode { node: *node }).unwrap();
        }
        let back = nodes.iter().copied().collect();
        world.system(Command::ReportSilence { silent: [].into(), back }).unwrap();
        for _ in 0..20 {
            world.settle(a.env);
            world.tick_after(60_000);
        }
        world.settle(a.env);
        let deployment = current(&world, &a);
        let wanted = deployment.counts.values().sum::<u32>() as usize;
        let live = world.live(a.env);
        assert_eq!(live.len(), wanted, "seed {seed}");
        assert!(live.iter().all(|i| i.state == InstanceState::Ready && i.release == deployment.release));
        assert!(!world.view().is_unsettled(a.env).unwrap(), "seed {seed}");
        world.check();
    }
}

#[test]
fn a_node_that_gets_room_takes_what_waited_for_it_without_a_tick() {
    let mut world = World::new();
    let node = world.node("n1", 0);
    let tenant = world.tenant("acme", 10);
    let release = world.release(&tenant, 1);
    world.deploy(&tenant, release);
    assert!(world.live(tenant.env).is_empty());
    let capacity = Capacity { memory_mib: 8_192, cpu_milli: 8_000 };
    world
        .as_actor(Actor::Node(node), None, Command::ReportNode { node, capacity, vmm: "qemu".into() })
        .unwrap();
    assert_eq!(world.live(tenant.env).len(), 3);
    world.check();
}
