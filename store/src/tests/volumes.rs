//! Volumes: made by a deployment, had by one instance at a time, on one node for ever.

use super::world::*;
use crate::Views;
use crate::agents::{node_instance, node_instances};
use holdfast_model::limits::{
    INSTANCE_START_MS_MAX, REPLACEMENTS_MAX, RESCHEDULE_MS, VOLUMES_ORG_MAX, VOLUMES_ORG_MIB_MAX,
};
use holdfast_model::resource::{
    DeploymentFailure, DeploymentState, Instance, InstanceReason, InstanceState, Unschedulable,
};
use holdfast_model::volume::Volume;
use holdfast_model::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet};

/// A database with a disk, and a web server without.
pub(super) fn database(size_mib: u64, volumes: &str) -> Manifest {
    let text = format!(
        "schema_version = \"v1\"\n[app]\nname = \"hello\"\n\
         [processes.web]\nresources = {{ memory = \"64Mi\", cpu = 0.5 }}\nscaling = {{ min = 1, max = 50 }}\n\
         [processes.db]\nresources = {{ memory = \"64Mi\", cpu = 0.5 }}\n\
         mounts = [{{ volume = \"data\", path = \"/data\" }}]\n\
         [[volumes]]\nname = \"data\"\nsize = \"{size_mib}Mi\"\n{volumes}"
    );
    manifest::parse(&text).unwrap()
}

struct Scene {
    world: World,
    tenant: Tenant,
    nodes: Vec<NodeId>,
}

impl Scene {
    fn new() -> Self {
        let mut world = World::new();
        let nodes = ["n1", "n2", "n3"].map(|name| world.node(name, 8_192)).to_vec();
        let tenant = world.tenant("acme", 10);
        Self { world, tenant, nodes }
    }

    /// The same with the database running.
    fn running() -> Self {
        let mut scene = Self::new();
        scene.deploy(1, database(64, ""));
        scene.world.settle(scene.tenant.env);
        scene
    }

    fn deploy(&mut self, n: u8, manifest: Manifest) -> ReleaseId {
        self.try_deploy(n, manifest).unwrap();
        self.view().deployment(self.env().current.unwrap()).unwrap().unwrap().release
    }

    fn try_deploy(&mut self, n: u8, manifest: Manifest) -> Outcome {
        let env = self.tenant.env;
        let command = Command::CreateRelease { env, image: image(n), manifest };
        let Output::Release(release) = self.world.tenant_asks(&self.tenant, command)?.output else {
            panic!("no release")
        };
        self.world.tenant_asks(&self.tenant, Command::Deploy { env, release, counts: BTreeMap::new() })
    }

    fn scale(&mut self, db: u32) {
        let counts = BTreeMap::from([("db".parse().unwrap(), db)]);
        self.world.tenant_asks(&self.tenant, Command::Scale { env: self.tenant.env, counts }).unwrap();
    }

    fn delete(&mut self) -> Outcome {
        let volume = self.volume().id;
        let command = Command::DeleteVolume { volume, expected_version: None };
        self.world.tenant_asks(&self.tenant, command)
    }

    fn view(&self) -> crate::View {
        self.world.view()
    }

    fn env(&self) -> resource::Env {
        self.view().env(self.tenant.env).unwrap().unwrap()
    }

    fn volume(&self) -> Volume {
        let name = "data".parse().unwrap();
        self.view().volume_by_name(self.tenant.env, &name).unwrap().expect("the volume is there")
    }

    fn blocked(&self) -> Option<Unschedulable> {
        self.view().deployment(self.env().current.unwrap()).unwrap().unwrap().unschedulable
    }

    /// Instances of the database that are not final.
    fn dbs(&self) -> Vec<Instance> {
        self.world.live(self.tenant.env).into_iter().filter(|i| i.process.as_str() == "db").collect()
    }

    fn db(&self) -> Instance {
        let [db] = &self.dbs()[..] else { panic!("{:?}", self.dbs()) };
        db.clone()
    }

    fn silence(&mut self, node: NodeId) {
        let silent = [(node, self.world.now)].into();
        self.world.system(Command::ReportSilence { silent, back: [].into() }).unwrap();
    }

    fn hear(&mut self, node: NodeId) {
        let back = [node].into();
        self.world.system(Command::ReportSilence { silent: [].into(), back }).unwrap();
    }
}

#[test]
fn the_first_deployment_makes_a_volume_and_its_first_instance_chooses_its_home() {
    let mut s = Scene::new();
    s.deploy(1, database(64, ""));
    let (volume, db) = (s.volume(), s.db());
    assert_eq!((volume.org, volume.app, volume.env), (s.tenant.org, s.tenant.app, s.tenant.env));
    assert_eq!((volume.size_mib, volume.home, volume.generation), (64, Some(db.node), 1));
    assert!(volume.is_of(db.id) && volume.attached.unwrap().fresh && !volume.used);
    // Its node is told of it, with the attachment's number.
    let told = node_instance(&s.view(), db.id).unwrap().unwrap();
    let [one] = &told.volumes[..] else { panic!("{told:?}") };
    assert_eq!((one.id, one.generation, one.size_mib, one.fresh), (volume.id, 1, 64, true));
    assert_eq!((one.path.as_str(), one.read_only), ("/data", false));
    for instance in s.world.live(s.tenant.env).iter().filter(|i| i.process.as_str() == "web") {
        assert_eq!(node_instance(&s.view(), instance.id).unwrap().unwrap().volumes, []);
    }
    s.world.settle(s.tenant.env);
    assert_eq!((s.blocked(), s.dbs().len()), (None, 1));
    s.world.check();
}

#[test]
fn an_update_stops_the_old_instance_before_the_new_one_starts_on_the_same_node() {
    let mut s = Scene::running();
    let (old, home) = (s.db(), s.volume().home.unwrap());
    let release = s.deploy(2, database(64, ""));
    assert_eq!((s.db().id, s.db().state), (old.id, InstanceState::Draining), "no second one beside it");
    assert_eq!(s.blocked(), Some(Unschedulable::VolumeInUse));
    assert!(s.volume().is_of(old.id), "it drains, and has its disk still");
    s.world.report(&old, InstanceState::Stopped);
    let new = s.db();
    assert_eq!((new.release, new.node, new.state), (release, home, InstanceState::Booting));
    let volume = s.volume();
    assert!(volume.is_of(new.id) && volume.used && !volume.attached.unwrap().fresh);
    assert_eq!((volume.generation, volume.home), (2, Some(home)));
    s.world.settle(s.tenant.env);
    let deployment = s.view().deployment(s.env().current.unwrap()).unwrap().unwrap();
    assert_eq!((deployment.state, deployment.unschedulable), (DeploymentState::Complete, None));
    s.world.check();
}

#[test]
fn i07_a_silent_home_is_waited_for_with_a_reason_and_its_return_changes_nothing() {
    let mut s = Scene::running();
    let db = s.db();
    s.silence(db.node);
    assert_eq!(s.blocked(), Some(Unschedulable::VolumeLocality), "what is deployed says why it may be gone");
    for _ in 0..5 {
        s.world.tick_after(RESCHEDULE_MS);
        assert_eq!(s.db(), db, "it is neither given up nor replaced");
    }
    // A new release waits as well: the old one may be running.
    s.deploy(2, database(64, ""));
    s.world.tick_after(RESCHEDULE_MS);
    assert_eq!((s.db(), s.blocked()), (db.clone(), Some(Unschedulable::VolumeLocality)));
    s.hear(db.node);
    assert_eq!((s.db().id, s.db().state), (db.id, InstanceState::Draining));
    s.world.tick_after(RESCHEDULE_MS);
    assert_eq!(s.db().id, db.id, "only its node's word that it has stopped lets another start");
    s.world.report(&db, InstanceState::Stopped);
    s.world.settle(s.tenant.env);
    assert_eq!((s.db().node, s.volume().generation, s.blocked()), (db.node, 2, None));
    s.world.check();
}

#[test]
fn i07_a_home_that_comes_back_has_its_instance_as_it_was() {
    let mut s = Scene::running();
    let db = s.db();
    s.silence(db.node);
    s.world.tick_after(RESCHEDULE_MS * 3);
    s.hear(db.node);
    assert_eq!((s.db(), s.blocked()), (db, None));
    s.world.check();
}

#[test]
fn an_instance_is_placed_on_its_home_or_nowhere() {
    let mut s = Scene::running();
    let db = s.db();
    s.world.operator(Command::DrainNode { node: db.node }).unwrap();
    assert_eq!(s.db().state, InstanceState::Draining);
    s.world.report(&db, InstanceState::Stopped);
    assert_eq!((s.dbs(), s.blocked()), (vec![], Some(Unschedulable::VolumeLocality)));
    s.world.tick_after(1_000);
    assert_eq!(s.dbs(), [], "two other nodes have room");
    s.world.operator(Command::ActivateNode { node: db.node }).unwrap();
    assert_eq!((s.db().node, s.blocked()), (db.node, None));
    s.world.check();
}

#[test]
fn one_that_is_not_ready_in_time_is_stopped_first_and_counts_against_the_roll_out() {
    let mut s = Scene::new();
    s.deploy(1, database(64, ""));
    let id = s.env().current.unwrap();
    for n in 0..=REPLACEMENTS_MAX {
        let db = s.db();
        for web in s.world.live(s.tenant.env).iter().filter(|i| i.state == InstanceState::Booting) {
            if web.id != db.id {
                s.world.report(web, InstanceState::Ready);
            }
        }
        s.world.tick_after(INSTANCE_START_MS_MAX + 1);
        let waiting = s.db();
        assert_eq!((waiting.id, waiting.state), (db.id, InstanceState::Draining), "attempt {n}");
        assert_eq!(waiting.reason, Some(InstanceReason::StartTimedOut));
        s.world.report(&db, InstanceState::Stopped);
    }
    let deployment = s.view().deployment(id).unwrap().unwrap();
    assert_eq!(deployment.failure, Some(DeploymentFailure::TooManyReplacements));
    s.world.check();
}

#[test]
fn a_volume_is_deleted_when_nobody_has_or_wants_it_and_its_home_erases_it() {
    let mut s = Scene::running();
    let (volume, db) = (s.volume(), s.db());
    assert_eq!(code(s.delete()), Code::FailedPrecondition, "attached");
    s.scale(0);
    assert_eq!(code(s.delete()), Code::FailedPrecondition, "still stopping");
    let app = Command::DeleteApp { app: s.tenant.app, expected_version: None };
    assert_eq!(code(s.world.tenant_asks(&s.tenant, app.clone())), Code::FailedPrecondition);
    s.world.report(&db, InstanceState::Stopped);
    let stale = Command::DeleteVolume { volume: volume.id, expected_version: Some(1) };
    assert_eq!(code(s.world.tenant_asks(&s.tenant, stale)), Code::VersionConflict);
    s.delete().unwrap();
    assert_eq!(s.view().volume(volume.id).unwrap(), None);
    let to_erase = |s: &Scene| s.view().volumes_to_erase(db.node, 10).unwrap();
    assert_eq!(to_erase(&s), [volume.id]);
    // Another node says nothing of it, and nobody of what was not asked.
    let other = *s.nodes.iter().find(|node| **node != db.node).unwrap();
    for (node, volumes) in [(other, [volume.id].into()), (db.node, [VolumeId::from_bits(9)].into())] {
        let command = Command::ReportVolumesErased { node, volumes };
        s.world.as_actor(Actor::Node(node), None, command).unwrap();
        assert_eq!(to_erase(&s), [volume.id]);
    }
    let command = Command::ReportVolumesErased { node: db.node, volumes: [volume.id].into() };
    assert_eq!(code(s.world.as_actor(Actor::Node(other), None, command.clone())), Code::NotFound);
    s.world.as_actor(Actor::Node(db.node), None, command).unwrap();
    assert_eq!(to_erase(&s), []);
    // The next one is another volume, which may be anywhere.
    s.scale(1);
    assert!(s.volume().id != volume.id && s.volume().generation == 1);
    s.scale(0);
    let db = s.db();
    s.world.report(&db, InstanceState::Stopped);
    s.delete().unwrap();
    s.world.tenant_asks(&s.tenant, app).unwrap();
    s.world.check();
}

#[test]
fn a_volume_that_is_wanted_is_not_deleted_between_two_instances() {
    let mut s = Scene::running();
    let db = s.db();
    s.world.operator(Command::CordonNode { node: db.node }).unwrap();
    s.world.report(&db, InstanceState::Failed);
    assert_eq!((s.volume().attached, s.dbs()), (None, vec![]));
    assert_eq!(code(s.delete()), Code::FailedPrecondition);
    s.world.check();
}

#[test]
fn a_home_that_is_cut_off_keeps_its_disk_until_the_volume_is_given_up() {
    let mut s = Scene::running();
    let db = s.db();
    s.world.operator(Command::QuarantineNode { node: db.node }).unwrap();
    s.world.tick_after(RESCHEDULE_MS);
    assert_eq!((s.dbs(), s.blocked()), (vec![], Some(Unschedulable::VolumeLocality)));
    let stopped =
        Command::ReportInstances { node: db.node, observations: vec![seen(db.id, InstanceState::Stopped)] };
    assert_eq!(code(s.world.as_actor(Actor::Node(db.node), None, stopped)), Code::Unauthenticated);
    assert!(s.volume().is_of(db.id), "nothing that it says counts");
    s.delete().unwrap();
    s.scale(1);
    let (new, volume) = (s.db(), s.volume());
    assert!(new.node != db.node && volume.is_of(new.id) && volume.attached.unwrap().fresh);
    s.world.check();
}

#[test]
fn what_a_release_declares_fits_what_is_there_and_the_orgs_quota() {
    let mut s = Scene::running();
    assert_eq!(code(s.try_deploy(2, database(65, ""))), Code::FailedPrecondition, "it cannot grow");
    s.try_deploy(3, database(32, "")).unwrap();
    assert_eq!(s.volume().size_mib, 64, "and does not shrink");
    let more = |count: usize, size: u64| {
        (0..count).map(|n| format!("[[volumes]]\nname = \"v{n}\"\nsize = \"{size}Mi\"\n")).collect::<String>()
    };
    let error = s.try_deploy(4, database(64, &more(1, VOLUMES_ORG_MIB_MAX)));
    assert_eq!(code(error), Code::QuotaExceeded);
    for n in 0..(VOLUMES_ORG_MAX - 1).div_ceil(15) {
        let text = more(15, 16).replace("name = \"v", &format!("name = \"w{n}v"));
        let outcome = s.try_deploy(5 + n as u8, database(64, &text));
        let full = 1 + (n + 1) * 15 > VOLUMES_ORG_MAX;
        assert_eq!(outcome.is_err(), full, "{n}");
        if full {
            assert_eq!(code(outcome), Code::QuotaExceeded);
        }
    }
    s.world.check();
}

#[test]
fn a_cluster_of_an_earlier_version_has_no_volumes() {
    let mut world = World::at(ClusterVersion::TWO);
    let tenant = world.tenant("acme", 10);
    let command = Command::CreateRelease { env: tenant.env, image: image(1), manifest: database(64, "") };
    assert_eq!(code(world.tenant_asks(&tenant, command)), Code::FailedPrecondition);
    let command = Command::DeleteVolume { volume: VolumeId::from_bits(1), expected_version: None };
    assert_eq!(code(world.tenant_asks(&tenant, command)), Code::FailedPrecondition);
}

#[test]
fn i09_another_orgs_volume_is_absent() {
    let mut s = Scene::running();
    let other = s.world.tenant("other", 11);
    let volume = s.volume().id;
    for volume in [volume, VolumeId::from_bits(1)] {
        let command = Command::DeleteVolume { volume, expected_version: None };
        let rejection = s.world.tenant_asks(&other, command).unwrap_err();
        assert_eq!(rejection, Rejection::not_found("volume"));
    }
}

/// Who has each volume, from the events alone: what any log may say.
fn check_log(view: &crate::View) {
    let mut has: BTreeMap<VolumeId, (InstanceId, NodeId)> = BTreeMap::new();
    let mut last: BTreeMap<VolumeId, (u64, NodeId)> = BTreeMap::new();
    let mut ended_by_its_node = BTreeSet::new();
    for event in view.events(Revision(0), usize::MAX, None).unwrap().events {
        match event.payload {
            EventPayload::VolumeAttached { volume, instance, node, generation, .. } => {
                assert_eq!(has.insert(volume, (instance, node)), None, "{volume} had one already");
                if let Some((before, home)) = last.insert(volume, (generation, node)) {
                    assert!(generation > before, "{volume}: attachment {generation} after {before}");
                    assert_eq!(home, node, "{volume} moved");
                }
            }
            EventPayload::VolumeDetached { volume, instance, .. } => {
                assert!(ended_by_its_node.contains(&instance), "{instance} was not known to be gone");
                assert_eq!(has.remove(&volume).map(|(had, _)| had), Some(instance));
            }
            EventPayload::InstanceStateChanged { instance, state, .. } if state.is_final() => {
                if matches!(event.actor, Actor::Node(_)) {
                    ended_by_its_node.insert(instance);
                }
            }
            _ => {}
        }
    }
}

/// Nodes fall silent, come back, are drained and quarantined; instances fail, stop and start; releases come and go. No log
/// ever has two instances with one volume, or a new one before the old one's own node has told of its end.
#[test]
fn i11_no_log_ever_has_two_instances_attached_to_one_volume() {
    let (mut attachments, mut deleted) = (0, 0);
    for seed in 0..40u64 {
        println!("seed {seed}");
        let mut rng = StdRng::seed_from_u64(seed);
        let mut s = Scene::running();
        for n in 0..120u8 {
            let node = s.nodes[rng.random_range(0..s.nodes.len())];
            match rng.random_range(0..16) {
                0 => drop(s.try_deploy(n.max(2), database(64, ""))),
                1 => {
                    let without = "schema_version = \"v1\"\n[app]\nname = \"hello\"\n[processes.db]\n\
                                   resources = { memory = \"64Mi\" }\n";
                    drop(s.try_deploy(n.max(2), manifest::parse(without).unwrap()));
                }
                2 => {
                    let counts = BTreeMap::from([("db".parse().unwrap(), rng.random_range(0..2))]);
                    drop(s.world.tenant_asks(&s.tenant, Command::Scale { env: s.tenant.env, counts }));
                }
                3 | 4 => s.silence(node),
                5 | 6 => s.hear(node),
                7 => drop(s.world.operator(Command::DrainNode { node })),
                8 => drop(s.world.operator(Command::ActivateNode { node })),
                9 if rng.random_range(0..8) == 0 => {
                    drop(s.world.operator(Command::QuarantineNode { node }));
                }
                10 => s.world.tick_after(rng.random_range(0..200_000)),
                11 => {
                    let volumes = s.view().volumes(s.tenant.env).unwrap();
                    if let Some(volume) = volumes.first() {
                        let command = Command::DeleteVolume { volume: volume.id, expected_version: None };
                        deleted += u32::from(s.world.tenant_asks(&s.tenant, command).is_ok());
                    }
                }
                _ => {
                    let live = s.world.live(s.tenant.env);
                    if !live.is_empty() {
                        let one = &live[rng.random_range(0..live.len())];
                        let states = [
                            InstanceState::Ready,
                            InstanceState::Ready,
                            InstanceState::Stopped,
                            InstanceState::Failed,
                        ];
                        let state = states[rng.random_range(0..states.len())];
                        let command = Command::ReportInstances {
                            node: one.node,
                            observations: vec![seen(one.id, state)],
                        };
                        // A node that is cut off is not heard.
                        drop(s.world.as_actor(Actor::Node(one.node), None, command));
                    }
                }
            }
            for volume in s.view().volumes(s.tenant.env).unwrap() {
                let Some(attached) = volume.attached else { continue };
                let instance = s.view().instance(attached.instance).unwrap();
                assert!(instance.is_none_or(|i| volume.home == Some(i.node)), "seed {seed}");
            }
            for node in &s.nodes {
                // What a node is told is never more than one instance of a volume.
                let told = node_instances(&s.view(), *node).unwrap();
                let all: Vec<_> = told.iter().flat_map(|i| i.volumes.iter().map(|v| v.id)).collect();
                assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len(), "seed {seed}");
            }
        }
        check_log(&s.view());
        let events = s.view().events(Revision(0), usize::MAX, None).unwrap().events;
        attachments += events.iter().filter(|e| e.payload.kind() == "volume_attached").count();
        s.world.check();
    }
    assert!(attachments > 80 && deleted > 5, "{attachments} attachments, {deleted} deletions");
}
