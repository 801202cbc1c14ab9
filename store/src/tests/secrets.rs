//! Secrets: versions, what is sealed and where, and how a change rolls what runs. Nothing here can open a seal, so any
//! bytes stand for sealed ones.

use super::world::*;
use crate::rows::Rows;
use crate::tables::{Table, key};
use crate::{SecretViews, Views};
use holdfast_model::limits::{SECRET_VERSIONS_KEPT, SECRETS_FILE_BYTES_MAX, SECRETS_MAX};
use holdfast_model::resource::{
    Deployment, DeploymentCause, DeploymentState, Instance, InstanceState, Unschedulable,
};
use holdfast_model::sealed::*;
use holdfast_model::*;
use std::collections::{BTreeMap, BTreeSet};

pub(super) const CLUSTER: &str = "age1cluster";
/// Stands for sealed bytes: no event may hold it.
const SEALED: &[u8] = b"sealed-canary";

pub(super) fn recipient(text: &str) -> Recipient {
    Recipient(text.into())
}

pub(super) fn envelope(key: &str, to: &str) -> Envelope {
    Envelope { recipient: recipient(key), to: recipient(to), key: SealedBytes(SEALED.to_vec()) }
}

fn sealed(n: u32, line_bytes: u32) -> SealedSecret {
    SealedSecret { line_bytes, bytes: SealedBytes([SEALED, &n.to_be_bytes()].concat()) }
}

fn name(text: &str) -> SecretKey {
    text.parse().unwrap()
}

/// Sets these to values that nobody else has, and removes those.
pub(super) fn set(env: EnvId, n: u32, keys: &[&str], unset: &[&str]) -> Command {
    let set = (0..).zip(keys).map(|(i, key)| (name(key), sealed(n * 1_000 + i, 10))).collect();
    Command::SetSecrets {
        env,
        recipient: recipient("age1env"),
        set,
        unset: unset.iter().map(|key| name(key)).collect(),
        replace: false,
        roll: true,
        content: Digest([n as u8; 32]),
    }
}

/// A cluster whose members seal, and an env with its sealing key.
fn sealing() -> (World, Tenant) {
    let mut world = World::new();
    let a = world.tenant("acme", 10);
    seal_for(&mut world, &a);
    (world, a)
}

pub(super) fn seal_for(world: &mut World, tenant: &Tenant) {
    let cluster = Command::SetClusterRecipient { recipient: recipient(CLUSTER), after: None };
    world.system(cluster).unwrap();
    for owner in [SealOwner::Env(tenant.env), SealOwner::Org(tenant.org)] {
        world.system(Command::CreateEnvelope { owner, envelope: envelope("age1env", CLUSTER) }).unwrap();
    }
}

fn keys(world: &World, env: EnvId) -> Vec<String> {
    let view = world.view();
    let head = view.secret_head(env).unwrap();
    let version = view.secret_version(env, head).unwrap();
    version.iter().flat_map(|v| v.secrets.keys().map(ToString::to_string)).collect()
}

fn sealed_rows(world: &World, env: EnvId) -> usize {
    world.view().scan(&key(Table::SealedSecret, &[&env.to_key()]), None, usize::MAX).unwrap().len()
}

#[test]
fn changes_make_versions_and_versions_come_back() {
    let (mut world, a) = sealing();
    world.tenant_asks(&a, set(a.env, 1, &["A", "B"], &[])).unwrap();
    world.tenant_asks(&a, set(a.env, 2, &["B", "C"], &["A"])).unwrap();
    assert_eq!(keys(&world, a.env), ["B", "C"]);
    let view = world.view();
    let second = view.secret_version(a.env, 2).unwrap().unwrap();
    assert!(second.secrets.values().all(|meta| meta.changed_in == 2));
    let mut import = set(a.env, 3, &["D"], &[]);
    if let Command::SetSecrets { replace, .. } = &mut import {
        *replace = true;
    }
    world.tenant_asks(&a, import).unwrap();
    assert_eq!(keys(&world, a.env), ["D"]);
    let back = Command::RollBackSecrets { env: a.env, to: 1, roll: true };
    let made = world.tenant_asks(&a, back).unwrap();
    assert_eq!(made.output, Output::SecretVersion(4));
    let view = world.view();
    let (first, fourth) = (view.secret_version(a.env, 1).unwrap(), view.secret_version(a.env, 4).unwrap());
    assert_eq!(first.unwrap().secrets, fourth.unwrap().secrets);
    for (to, expected) in [(4, Code::FailedPrecondition), (9, Code::NotFound)] {
        let command = Command::RollBackSecrets { env: a.env, to, roll: true };
        assert_eq!(code(world.tenant_asks(&a, command)), expected);
    }
    assert_eq!(code(world.tenant_asks(&a, set(a.env, 5, &[], &["NONE"]))), Code::NotFound);
    assert_eq!(code(world.tenant_asks(&a, set(a.env, 5, &[], &[]))), Code::InvalidRequest);
    world.check();
}

#[test]
fn i10_events_hold_nothing_sealed_and_a_replay_leaves_what_is_sealed_alone() {
    let (mut world, a) = sealing();
    world.tenant_asks(&a, set(a.env, 1, &["A"], &[])).unwrap();
    let host: RegistryHost = "registry.test".parse().unwrap();
    let credential = Command::SetRegistryCredential {
        owner: CredentialOwner::Org(a.org),
        host: host.clone(),
        recipient: recipient("age1env"),
        sealed: SealedBytes(SEALED.to_vec()),
        content: Digest([1; 32]),
    };
    world.tenant_asks(&a, credential).unwrap();
    let events = world.view().events(Revision(0), usize::MAX, None).unwrap().events;
    for event in &events {
        let bytes = postcard::to_stdvec(event).unwrap();
        assert!(!bytes.windows(SEALED.len()).any(|w| w == SEALED), "{event:?}");
    }
    // I13: views come from events alone; what is sealed stays where it is, and is part of the state's digest.
    let before = world.store.digest();
    world.store.rebuild().unwrap();
    assert_eq!(world.store.digest(), before);
    let view = world.view();
    let version = view.secret_version(a.env, 1).unwrap().unwrap();
    let digest = version.secrets[&name("A")].sealed;
    assert_eq!(view.sealed_secret(a.env, &digest).unwrap().unwrap().bytes.digest(), digest);
    assert!(view.sealed_credential(CredentialOwner::Org(a.org), &host).unwrap().is_some());
    world.check();
}

#[test]
fn i09_another_org_and_another_recipient_change_nothing() {
    let (mut world, a) = sealing();
    let b = world.tenant("other", 11);
    world.tenant_asks(&a, set(a.env, 1, &["A"], &[])).unwrap();
    let read = Command::ReadSecrets { env: a.env, number: 1, keys: BTreeSet::from([name("A")]) };
    let back = Command::RollBackSecrets { env: a.env, to: 1, roll: true };
    let host: RegistryHost = "registry.test".parse().unwrap();
    let delete = Command::DeleteRegistryCredential { owner: CredentialOwner::App(a.app), host };
    for command in [set(a.env, 2, &["A"], &[]), read.clone(), back, delete] {
        assert_eq!(code(world.tenant_asks(&b, command)), Code::NotFound);
    }
    // Nor may a tenant say to whom the cluster seals, or with which key.
    let owner = SealOwner::Env(a.env);
    let forged = Command::CreateEnvelope { owner, envelope: envelope("age1mine", CLUSTER) };
    assert_eq!(code(world.tenant_asks(&a, forged)), Code::Unauthenticated);
    let mine =
        Command::SetClusterRecipient { recipient: recipient("age1mine"), after: Some(recipient(CLUSTER)) };
    assert_eq!(code(world.tenant_asks(&a, mine)), Code::NotFound);
    // What is sealed to a key that nobody has is refused.
    let mut wrong = set(a.env, 2, &["A"], &[]);
    if let Command::SetSecrets { recipient: to, .. } = &mut wrong {
        *to = recipient("age1mine");
    }
    assert_eq!(code(world.tenant_asks(&a, wrong)), Code::FailedPrecondition);
    let before = world.view().revision();
    let read = world.tenant_asks(&a, read).unwrap();
    assert!(read.revision > before, "reading is an event (I12)");
    assert_eq!(world.view().secret_head(a.env).unwrap(), 1);
    world.check();
}

#[test]
fn i04_sealing_the_same_anew_is_the_same_command() {
    let (mut world, a) = sealing();
    let mut context = world.context(Actor::Token(a.token), Some(a.org));
    context.idempotency_key = Some("once".into());
    let first = world.propose(context.clone(), set(a.env, 1, &["A"], &[])).unwrap();
    let mut again = set(a.env, 1, &["A"], &[]);
    if let Command::SetSecrets { set, .. } = &mut again {
        set.insert(name("A"), sealed(77, 10));
    }
    assert_eq!(world.propose(context.clone(), again).unwrap(), first);
    // Other content under the same key is another command.
    assert_eq!(code(world.propose(context, set(a.env, 2, &["A"], &[]))), Code::IdempotencyKeyReuse);
    assert_eq!(world.view().secret_head(a.env).unwrap(), 1);
}

#[test]
fn the_limits_hold_over_all_of_an_env() {
    let (mut world, a) = sealing();
    let with = |n: u32, keys: BTreeMap<SecretKey, SealedSecret>| {
        let Command::SetSecrets { env, recipient, unset, content, .. } = set(a.env, n, &["X"], &[]) else {
            unreachable!()
        };
        Command::SetSecrets { env, recipient, set: keys, unset, replace: false, roll: true, content }
    };
    let many = |n: usize| (0..n).map(|i| (name(&format!("K{i}")), sealed(i as u32, 1))).collect();
    assert_eq!(code(world.tenant_asks(&a, with(1, many(SECRETS_MAX + 1)))), Code::InvalidRequest);
    world.tenant_asks(&a, with(2, many(SECRETS_MAX))).unwrap();
    let large = |bytes| BTreeMap::from([(name("K0"), sealed(9_999, bytes))]);
    let left = (SECRETS_FILE_BYTES_MAX - secrets::HEADER.len() - SECRETS_MAX) as u32;
    assert_eq!(code(world.tenant_asks(&a, with(3, large(left + 1)))), Code::InvalidRequest);
    world.tenant_asks(&a, with(4, large(left))).unwrap();
    // A rejection leaves nothing behind (I14): 256 values, and the one that took another's place.
    assert_eq!(sealed_rows(&world, a.env), SECRETS_MAX + 1);
}

fn current(world: &World, tenant: &Tenant) -> Deployment {
    let view = world.view();
    let env = view.env(tenant.env).unwrap().unwrap();
    view.deployment(env.current.unwrap()).unwrap().unwrap()
}

fn versions(world: &World, tenant: &Tenant) -> Vec<u32> {
    let view = world.view();
    let live = world.live(tenant.env).into_iter().filter(|i| i.state != InstanceState::Draining);
    live.map(|i: Instance| view.deployment_secrets(i.deployment).unwrap()).collect()
}

fn running() -> (World, Tenant) {
    let (mut world, a) = sealing();
    for node in ["n1", "n2"] {
        world.node(node, 8_192);
    }
    world.tenant_asks(&a, set(a.env, 1, &["A"], &[])).unwrap();
    let release = world.release(&a, 1);
    world.deploy(&a, release);
    world.settle(a.env);
    (world, a)
}

#[test]
fn a_change_rolls_what_runs_with_a_surge_of_one() {
    let (mut world, a) = running();
    assert_eq!(versions(&world, &a), [1, 1, 1]);
    world.tenant_asks(&a, set(a.env, 2, &["A"], &[])).unwrap();
    let deployment = current(&world, &a);
    assert_eq!((deployment.cause, deployment.state), (DeploymentCause::Secrets, DeploymentState::Rolling));
    let live = world.live(a.env);
    assert_eq!(live.len(), 4, "one more, until it is ready");
    assert_eq!(live.iter().filter(|i| i.state == InstanceState::Ready).count(), 3);
    world.settle(a.env);
    assert_eq!((versions(&world, &a), current(&world, &a).state), (vec![2, 2, 2], DeploymentState::Complete));
    // A change of numbers replaces nobody, and new ones run with what the others do.
    let before: BTreeSet<_> = world.live(a.env).iter().map(|i| i.id).collect();
    world.tenant_asks(&a, Command::Scale { env: a.env, counts: counts(4) }).unwrap();
    world.settle(a.env);
    assert!(before.iter().all(|id| world.live(a.env).iter().any(|i| i.id == *id)));
    assert_eq!(versions(&world, &a), [2, 2, 2, 2]);
    // Without a roll only what is deployed later gets them.
    let mut quiet = set(a.env, 3, &["A"], &[]);
    if let Command::SetSecrets { roll, .. } = &mut quiet {
        *roll = false;
    }
    world.tenant_asks(&a, quiet).unwrap();
    world.tick_after(5_000);
    assert_eq!(versions(&world, &a), [2, 2, 2, 2]);
    let release = current(&world, &a).release;
    world.deploy(&a, release);
    world.settle(a.env);
    assert_eq!(versions(&world, &a), [3, 3, 3, 3]);
    world.check();
}

#[test]
fn secrets_that_break_a_workload_are_rolled_back() {
    let (mut world, a) = running();
    world.tenant_asks(&a, set(a.env, 2, &["A"], &[])).unwrap();
    for _ in 0..20 {
        let booting = world.live(a.env).into_iter().find(|i| i.state == InstanceState::Booting);
        let Some(booting) = booting else { break };
        if world.view().deployment_secrets(booting.deployment).unwrap() == 1 {
            break;
        }
        world.report(&booting, InstanceState::Failed);
        world.tick_after(60_000);
    }
    world.settle(a.env);
    let deployment = current(&world, &a);
    assert_eq!((deployment.cause, versions(&world, &a)), (DeploymentCause::Rollback, vec![1, 1, 1]));
    world.check();
}

#[test]
fn what_is_required_and_missing_waits_for_it() {
    let (mut world, a) = sealing();
    world.node("n1", 8_192);
    let command = Command::CreateRelease {
        env: a.env,
        image: image(1),
        manifest: manifest("hello", "secrets = { required = [\"A\", \"B\"] }"),
    };
    let Output::Release(release) = world.tenant_asks(&a, command).unwrap().output else { panic!() };
    world.deploy(&a, release);
    assert_eq!(current(&world, &a).unschedulable, Some(Unschedulable::SecretsMissing));
    world.tenant_asks(&a, set(a.env, 1, &["A"], &[])).unwrap();
    assert_eq!(current(&world, &a).unschedulable, Some(Unschedulable::SecretsMissing));
    assert!(world.live(a.env).is_empty());
    world.tenant_asks(&a, set(a.env, 2, &["B"], &[])).unwrap();
    assert_eq!(current(&world, &a).unschedulable, None);
    world.settle(a.env);
    assert_eq!(versions(&world, &a), [2, 2, 2]);
    // One that is taken away keeps the new version from being placed, and nothing that runs is harmed.
    world.tenant_asks(&a, set(a.env, 3, &[], &["B"])).unwrap();
    assert_eq!(current(&world, &a).unschedulable, Some(Unschedulable::SecretsMissing));
    assert_eq!(versions(&world, &a), [2, 2, 2]);
    world.check();
}

#[test]
fn old_versions_go_with_what_only_they_had_unless_something_runs_with_them() {
    let (mut world, a) = running();
    for n in 2..40 {
        let mut quiet = set(a.env, n, &["A"], &[]);
        if let Command::SetSecrets { roll, .. } = &mut quiet {
            *roll = false;
        }
        world.tenant_asks(&a, quiet).unwrap();
    }
    let numbers: Vec<_> = world.view().secret_versions(a.env).unwrap().iter().map(|v| v.number).collect();
    assert_eq!((numbers.len(), numbers[0], numbers[1]), (SECRET_VERSIONS_KEPT + 1, 1, 24));
    assert_eq!(sealed_rows(&world, a.env), SECRET_VERSIONS_KEPT + 1);
    world.check();
    let b = world.tenant("other", 11);
    seal_for(&mut world, &b);
    world.tenant_asks(&b, set(b.env, 41, &["A"], &[])).unwrap();
    world.tenant_asks(&a, Command::DeleteApp { app: a.app, expected_version: None }).unwrap();
    let view = world.view();
    assert_eq!(
        (sealed_rows(&world, a.env), sealed_rows(&world, b.env)),
        (0, 1),
        "its own rows and no others"
    );
    assert!(view.envelope(SealOwner::Env(a.env)).unwrap().is_none());
    assert!(view.secret_versions(a.env).unwrap().is_empty());
    for (table, left) in [(Table::SecretVersion, 1), (Table::SecretHead, 1), (Table::DeploymentSecrets, 0)] {
        assert_eq!(view.scan(&key(table, &[]), None, 10).unwrap().len(), left, "{table:?}");
    }
    world.check();
}

#[test]
fn a_rotation_reseals_each_key_once_and_only_to_the_newest_recipient() {
    let (mut world, a) = sealing();
    let owner = SealOwner::Env(a.env);
    let early = Command::ResealEnvelope { owner, envelope: envelope("age1env", "age1next") };
    assert_eq!(code(world.system(early.clone())), Code::FailedPrecondition);
    let next = |after: &str| Command::SetClusterRecipient {
        recipient: recipient("age1next"),
        after: Some(recipient(after)),
    };
    assert_eq!(code(world.operator(next("age1other"))), Code::VersionConflict);
    world.operator(next(CLUSTER)).unwrap();
    let other = Command::ResealEnvelope { owner, envelope: envelope("age1swapped", "age1next") };
    assert_eq!(code(world.system(other)), Code::FailedPrecondition);
    let revision = world.system(early.clone()).unwrap().revision;
    assert_eq!(world.system(early).unwrap().revision, revision, "a repeat makes no event");
    assert_eq!(world.view().envelope(owner).unwrap().unwrap().to, recipient("age1next"));
    world.check();
}

#[test]
fn i01_an_earlier_cluster_version_has_no_secrets() {
    let mut world = World::at(ClusterVersion::TWO);
    let a = world.tenant("acme", 10);
    let cluster = Command::SetClusterRecipient { recipient: recipient(CLUSTER), after: None };
    assert_eq!(code(world.system(cluster)), Code::FailedPrecondition);
    assert_eq!(code(world.tenant_asks(&a, set(a.env, 1, &["A"], &[]))), Code::FailedPrecondition);
    world.system(Command::RaiseClusterVersion { to: ClusterVersion::THREE }).unwrap();
    seal_for(&mut world, &a);
    world.tenant_asks(&a, set(a.env, 1, &["A"], &[])).unwrap();
    world.check();
}
