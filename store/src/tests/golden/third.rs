//! Version 3: nodes that are cordoned and cut off, programs in instances, volumes, secrets.

use super::*;
use crate::tests::exec;
use crate::tests::secrets::{self, CLUSTER, envelope, recipient};
use crate::tests::volumes::database;
use holdfast_model::exec::ExecEnd;
use holdfast_model::limits::RESCHEDULE_MS;
use holdfast_model::sealed::{CredentialOwner, RegistryHost, SealOwner, SealedBytes};

/// What only version 3 has.
pub(super) const COMMANDS: &[&str] = &[
    "CordonNode",
    "CreateEnvelope",
    "CreateExecGrant",
    "DeleteRegistryCredential",
    "DeleteVolume",
    "EndExecGrant",
    "QuarantineNode",
    "ReadSecrets",
    "ReportVolumesErased",
    "ResealEnvelope",
    "RollBackSecrets",
    "SetClusterRecipient",
    "SetRegistryCredential",
    "SetSecrets",
    "UseExecGrant",
];

/// The kinds of events that only version 3 has.
pub(super) const EVENTS: &[&str] = &[
    "cluster_recipient_changed",
    "envelope_resealed",
    "exec_ended",
    "exec_granted",
    "exec_started",
    "registry_credential_deleted",
    "registry_credential_set",
    "secrets_changed",
    "secrets_read",
    "volume_attached",
    "volume_created",
    "volume_deleted",
    "volume_detached",
    "volume_erased",
];

/// A history at version 3 does all that one at version 2 does, and what only it can.
pub(super) fn scenario_v3(world: &mut World) {
    scenario_v2(world);
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::THREE }).unwrap();
    let tenant = world.tenant("third", 30);
    let [first, second] = ["n3", "n4"].map(|name| world.node(name, 8_192));
    let capacity = Capacity { memory_mib: 8_192, cpu_milli: 16_000 };
    let describe = Command::ReportNode { node: first, capacity, vmm: "firecracker 1.16".into() };
    world.as_actor(Actor::Node(first), None, describe).unwrap();
    of_secrets(world, &tenant);
    let ended = of_volumes(world, &tenant);
    of_programs(world, &tenant);
    world.operator(Command::CordonNode { node: first }).unwrap();
    world.operator(Command::CordonNode { node: first }).unwrap();
    world.operator(Command::ActivateNode { node: first }).unwrap();
    world.operator(Command::QuarantineNode { node: second }).unwrap();
    world.operator(Command::ActivateNode { node: second }).unwrap_err();
    world.tick_after(RESCHEDULE_MS);
    world.settle(tenant.env);
    assert!(world.live(tenant.env).iter().all(|i| i.node != second && i.id != ended));
}

fn of_secrets(world: &mut World, tenant: &Tenant) {
    let (env, org) = (tenant.env, tenant.org);
    world.tenant_asks(tenant, secrets::set(env, 1, &["A"], &[])).unwrap_err();
    secrets::seal_for(world, tenant);
    world.tenant_asks(tenant, secrets::set(env, 1, &["A", "B"], &[])).unwrap();
    world.tenant_asks(tenant, secrets::set(env, 2, &["C"], &["A"])).unwrap();
    world.tenant_asks(tenant, Command::RollBackSecrets { env, to: 1, roll: false }).unwrap();
    let keys: BTreeSet<SecretKey> = ["A", "B"].map(|key| key.parse().unwrap()).into();
    world.tenant_asks(tenant, Command::ReadSecrets { env, number: 3, keys }).unwrap();
    let next = recipient("age1next");
    let rotate = Command::SetClusterRecipient { recipient: next, after: Some(recipient(CLUSTER)) };
    world.operator(rotate).unwrap();
    let owner = SealOwner::Env(env);
    world.system(Command::ResealEnvelope { owner, envelope: envelope("age1env", "age1next") }).unwrap();
    let host: RegistryHost = "registry.example:5000".parse().unwrap();
    for owner in [CredentialOwner::Org(org), CredentialOwner::App(tenant.app)] {
        let set = Command::SetRegistryCredential {
            owner,
            host: host.clone(),
            recipient: recipient("age1env"),
            sealed: SealedBytes(b"user and password".to_vec()),
            content: Digest([7; 32]),
        };
        world.tenant_asks(tenant, set).unwrap();
    }
    let owner = CredentialOwner::Org(org);
    world.tenant_asks(tenant, Command::DeleteRegistryCredential { owner, host }).unwrap();
}

/// An instance with a volume comes and goes, and the volume after it.
fn of_volumes(world: &mut World, tenant: &Tenant) -> InstanceId {
    let release = Command::CreateRelease { env: tenant.env, image: image(3), manifest: database(64, "") };
    let Output::Release(release) = world.tenant_asks(tenant, release).unwrap().output else {
        panic!("no release")
    };
    world.deploy(tenant, release);
    world.settle(tenant.env);
    let database = |world: &World| {
        let live = world.live(tenant.env);
        live.into_iter().find(|i| i.process.as_str() == "db").unwrap()
    };
    let db = database(world);
    let volume = world.view().volume_by_name(tenant.env, &"data".parse().unwrap()).unwrap().unwrap().id;
    let delete = Command::DeleteVolume { volume, expected_version: None };
    world.tenant_asks(tenant, delete.clone()).unwrap_err();
    let none = BTreeMap::from([("db".parse().unwrap(), 0)]);
    world.tenant_asks(tenant, Command::Scale { env: tenant.env, counts: none }).unwrap();
    world.report(&db, InstanceState::Stopped);
    world.tenant_asks(tenant, delete).unwrap();
    let erased = Command::ReportVolumesErased { node: db.node, volumes: [volume].into() };
    world.as_actor(Actor::Node(db.node), None, erased).unwrap();
    db.id
}

fn of_programs(world: &mut World, tenant: &Tenant) {
    let instance = world.live(tenant.env)[0].id;
    for digest in [40, 41] {
        let made = world.tenant_asks(tenant, exec::create(instance, digest)).unwrap();
        let Output::ExecGrant(grant) = made.output else { panic!("no grant") };
        world.tenant_asks(tenant, exec::use_up(grant, digest)).unwrap();
        world.tenant_asks(tenant, exec::use_up(grant, digest)).unwrap_err();
        world.system(exec::end(grant, ExecEnd::Exited)).unwrap();
    }
}

#[test]
fn i01_what_version_3_writes_stays_as_it_is() {
    let mut world = World::at(ClusterVersion::THREE);
    scenario_v3(&mut world);
    check_version("v3", &world, COMMANDS_V2.iter().chain(COMMANDS), EVENTS_V1.iter().chain(EVENTS));
}

#[test]
fn i01_i13_a_state_of_version_2_is_raised_to_version_3() {
    let store = raised_by(&read_commands("v2"), ClusterVersion::THREE, &[]);
    assert_eq!(store.cluster_version(), ClusterVersion::THREE);
    check_raised("v3", &store);
}
