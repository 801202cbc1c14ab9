//! Version 4: snapshots of volumes, and restores from them.

use super::third::{COMMANDS as COMMANDS_V3, EVENTS as EVENTS_V3, scenario_v3};
use super::*;
use crate::SnapshotViews as _;
use crate::tests::volumes::database;
use holdfast_model::limits::SNAPSHOT_DAILY_MS;
use holdfast_model::volume_snapshot::{Restored, SnapshotNews, SnapshotState};

/// What only version 4 has.
const COMMANDS: &[&str] = &["CreateSnapshot", "DeleteSnapshot", "ReportSnapshots", "RestoreSnapshot"];

/// The kinds of events that only version 4 has.
const EVENTS: &[&str] = &[
    "cluster_version_raised",
    "snapshot_advanced",
    "snapshot_deleted",
    "snapshot_erased",
    "snapshot_requested",
    "volume_restore_began",
    "volume_restore_failed",
    "volume_restored",
];

/// A history at version 4 does all that one at version 3 does, and what only it can.
fn scenario_v4(world: &mut World) {
    scenario_v3(world);
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::FOUR }).unwrap();
    let tenant = world.tenant("fourth", 50);
    let manifest = database(64, "backup = true\n");
    let release = Command::CreateRelease { env: tenant.env, image: image(4), manifest };
    let Output::Release(release) = world.tenant_asks(&tenant, release).unwrap().output else {
        panic!("no release")
    };
    world.deploy(&tenant, release);
    world.settle(tenant.env);
    let volume = world.view().volume_by_name(tenant.env, &"data".parse().unwrap()).unwrap().unwrap();
    let home = volume.home.unwrap();
    let tell = |world: &mut World, news| {
        let command = Command::ReportSnapshots { node: home, news };
        world.as_actor(Actor::Node(home), None, command).unwrap();
    };
    let taken = |id, state| SnapshotNews { taken: [(id, state)].into(), ..SnapshotNews::default() };
    let ask = Command::CreateSnapshot { volume: volume.id };
    let Output::Snapshot(good) = world.tenant_asks(&tenant, ask.clone()).unwrap().output else {
        panic!("no snapshot")
    };
    world.tenant_asks(&tenant, ask).unwrap_err();
    tell(world, taken(good, SnapshotState::Snapshotted));
    tell(world, taken(good, SnapshotState::Uploaded { manifest: Digest([4; 32]), stored_bytes: 4_096 }));
    world.tick_after(SNAPSHOT_DAILY_MS);
    let daily = world.view().snapshots_of_volume(volume.id).unwrap().pop().unwrap().id;
    tell(world, taken(daily, SnapshotState::Failed { detail: "no store".into() }));
    for (name, how) in [("whole", Restored::Whole), ("broken", Restored::Failed { detail: "changed".into() })]
    {
        let restore = Command::RestoreSnapshot { snapshot: good, name: name.parse().unwrap() };
        let Output::Volume(made) = world.tenant_asks(&tenant, restore).unwrap().output else {
            panic!("no volume")
        };
        tell(world, SnapshotNews { restored: [(made, how)].into(), ..SnapshotNews::default() });
    }
    world.tenant_asks(&tenant, Command::DeleteSnapshot { snapshot: daily }).unwrap();
    tell(world, SnapshotNews { forgotten: [daily].into(), ..SnapshotNews::default() });
}

#[test]
fn i01_what_version_4_writes_stays_as_it_is() {
    let mut world = World::at(ClusterVersion::THREE);
    scenario_v4(&mut world);
    let commands = COMMANDS_V2.iter().chain(COMMANDS_V3).chain(COMMANDS);
    check_version("v4", &world, commands, EVENTS_V1.iter().chain(EVENTS_V3).chain(EVENTS));
}

#[test]
fn i01_i13_a_state_of_version_3_is_raised_to_version_4() {
    let store = raised_by(&read_commands("v3"), ClusterVersion::FOUR, &[]);
    assert_eq!(store.cluster_version(), ClusterVersion::FOUR);
    check_raised("v4", &store);
}
