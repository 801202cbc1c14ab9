//! Snapshots of volumes: asked for and daily, kept and pruned, restored into new volumes.

use super::secrets::{CLUSTER, envelope, recipient};
use super::volumes::database;
use super::world::*;
use crate::{SecretViews, SnapshotViews, Views};
use holdfast_model::agent::DETAIL_BYTES_MAX;
use holdfast_model::limits::{
    SNAPSHOT_DAILY_MS, SNAPSHOT_NEWS_MAX, SNAPSHOT_RETRY_MS, SNAPSHOTS_ASKED_MAX, SNAPSHOTS_DAILY_KEPT,
    SNAPSHOTS_FAILED_KEPT, VOLUMES_ORG_MAX,
};
use holdfast_model::resource::Unschedulable;
use holdfast_model::sealed::SealOwner;
use holdfast_model::volume::Volume;
use holdfast_model::volume_snapshot::{Restored, SnapshotCause, SnapshotNews, SnapshotState, VolumeSnapshot};
use holdfast_model::*;
use std::collections::BTreeMap;

struct Scene {
    world: World,
    tenant: Tenant,
    nodes: Vec<NodeId>,
}

impl Scene {
    /// A database runs, with a volume.
    fn new(volumes: &str) -> Self {
        let mut world = World::new();
        let nodes = ["n1", "n2", "n3"].map(|name| world.node(name, 8_192)).to_vec();
        let tenant = world.tenant("acme", 10);
        let mut scene = Self { world, tenant, nodes };
        scene.deploy(1, database(64, volumes));
        scene.world.settle(scene.tenant.env);
        scene
    }

    fn deploy(&mut self, n: u8, manifest: Manifest) {
        let env = self.tenant.env;
        let release = Command::CreateRelease { env, image: image(n), manifest };
        let Output::Release(release) = self.asks(release).unwrap().output else { panic!("no release") };
        self.asks(Command::Deploy { env, release, counts: BTreeMap::new() }).unwrap();
    }

    fn asks(&mut self, command: Command) -> Outcome {
        self.world.tenant_asks(&self.tenant, command)
    }

    fn volume(&self) -> Volume {
        self.named("data")
    }

    fn named(&self, name: &str) -> Volume {
        self.world.view().volume_by_name(self.tenant.env, &name.parse().unwrap()).unwrap().expect("a volume")
    }

    fn home(&self) -> NodeId {
        self.volume().home.unwrap()
    }

    fn create(&mut self) -> Result<SnapshotId, Rejection> {
        let volume = self.volume().id;
        self.asks(Command::CreateSnapshot { volume }).map(|accepted| match accepted.output {
            Output::Snapshot(id) => id,
            other => panic!("{other:?}"),
        })
    }

    fn restore(&mut self, snapshot: SnapshotId, name: &str) -> Result<VolumeId, Rejection> {
        let name = name.parse().unwrap();
        self.asks(Command::RestoreSnapshot { snapshot, name }).map(|accepted| match accepted.output {
            Output::Volume(id) => id,
            other => panic!("{other:?}"),
        })
    }

    fn tell(&mut self, node: NodeId, news: SnapshotNews) -> Outcome {
        self.world.as_actor(Actor::Node(node), None, Command::ReportSnapshots { node, news })
    }

    fn advance(&mut self, id: SnapshotId, state: SnapshotState) {
        let node = self.snapshot(id).expect("a snapshot").node;
        self.tell(node, SnapshotNews { taken: [(id, state)].into(), ..SnapshotNews::default() }).unwrap();
    }

    fn restored(&mut self, node: NodeId, volume: VolumeId, how: Restored) {
        let restored = [(volume, how)].into();
        self.tell(node, SnapshotNews { restored, ..SnapshotNews::default() }).unwrap();
    }

    fn snapshot(&self, id: SnapshotId) -> Option<VolumeSnapshot> {
        self.world.view().volume_snapshot(id).unwrap()
    }

    fn all(&self) -> Vec<VolumeSnapshot> {
        self.world.view().org_snapshots(self.tenant.org).unwrap()
    }

    /// One that can be restored.
    fn good(&mut self) -> SnapshotId {
        let id = self.create().unwrap();
        self.advance(id, uploaded());
        id
    }

    fn blocked(&self) -> Option<Unschedulable> {
        let view = self.world.view();
        let current = view.env(self.tenant.env).unwrap().unwrap().current.unwrap();
        view.deployment(current).unwrap().unwrap().unschedulable
    }
}

fn uploaded() -> SnapshotState {
    SnapshotState::Uploaded { manifest: Digest([5; 32]), stored_bytes: 1 << 20 }
}

fn failed() -> SnapshotState {
    SnapshotState::Failed { detail: "the store is full".into() }
}

#[test]
fn a_snapshot_is_taken_by_the_volumes_home_one_at_a_time() {
    let mut scene = Scene::new("");
    let id = scene.create().unwrap();
    let snapshot = scene.snapshot(id).unwrap();
    assert_eq!((snapshot.node, snapshot.volume), (scene.home(), scene.volume().id));
    assert_eq!((snapshot.cause, &snapshot.state), (SnapshotCause::Asked, &SnapshotState::Requested));
    let view = scene.world.view();
    assert_eq!(view.snapshots_to_take(scene.home(), 9).unwrap(), [snapshot]);
    drop(view);
    assert_eq!(scene.create().unwrap_err().code, Code::FailedPrecondition);
    scene.advance(id, SnapshotState::Snapshotted);
    assert_eq!(scene.create().unwrap_err().code, Code::FailedPrecondition);
    scene.advance(id, uploaded());
    assert!(scene.world.view().snapshots_to_take(scene.home(), 9).unwrap().is_empty());
    // A report that comes late changes nothing.
    scene.advance(id, failed());
    assert_eq!(scene.snapshot(id).unwrap().state, uploaded());
    scene.create().unwrap();
}

#[test]
fn i09_a_node_tells_of_its_own_snapshots_only() {
    let mut scene = Scene::new("");
    let id = scene.create().unwrap();
    let home = scene.home();
    let other = *scene.nodes.iter().find(|node| **node != home).unwrap();
    let news = SnapshotNews { taken: [(id, uploaded())].into(), ..SnapshotNews::default() };
    scene.tell(other, news.clone()).unwrap();
    assert_eq!(scene.snapshot(id).unwrap().state, SnapshotState::Requested);
    // Nor in another's name, nor one that was cut off.
    let command = Command::ReportSnapshots { node: home, news: news.clone() };
    let refused = scene.world.as_actor(Actor::Node(other), None, command).unwrap_err();
    assert_eq!(refused.code, Code::NotFound);
    scene.world.operator(Command::QuarantineNode { node: home }).unwrap();
    assert_eq!(scene.tell(home, news).unwrap_err().code, Code::Unauthenticated);
}

#[test]
fn i09_another_orgs_snapshots_are_absent() {
    let mut scene = Scene::new("");
    let id = scene.good();
    let other = scene.world.tenant("other", 20);
    let volume = scene.volume().id;
    let name: VolumeName = "mine".parse().unwrap();
    for command in [
        Command::CreateSnapshot { volume },
        Command::DeleteSnapshot { snapshot: id },
        Command::RestoreSnapshot { snapshot: id, name },
    ] {
        assert_eq!(scene.world.tenant_asks(&other, command).unwrap_err().code, Code::NotFound);
    }
}

#[test]
fn a_volume_without_anything_on_it_has_no_snapshot() {
    let mut scene = Scene::new("");
    scene.deploy(2, database(64, "[[volumes]]\nname = \"more\"\nsize = \"64Mi\"\n"));
    let volume = scene.named("more").id;
    let refused = scene.asks(Command::CreateSnapshot { volume }).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
}

#[test]
fn a_report_that_says_too_much_is_refused() {
    let mut scene = Scene::new("");
    let home = scene.home();
    let many = (0..=SNAPSHOT_NEWS_MAX as u128).map(|n| SnapshotId::from_bits(n + 1)).collect();
    let long = SnapshotState::Failed { detail: "x".repeat(DETAIL_BYTES_MAX + 1) };
    for news in [
        SnapshotNews { forgotten: many, ..SnapshotNews::default() },
        SnapshotNews { taken: [(SnapshotId::from_bits(1), long)].into(), ..SnapshotNews::default() },
    ] {
        assert_eq!(scene.tell(home, news).unwrap_err().code, Code::InvalidRequest);
    }
}

#[test]
fn a_day_after_the_last_good_one_a_snapshot_is_taken_by_itself() {
    let mut scene = Scene::new("backup = true\n");
    scene.world.tick_after(1_000);
    let [first] = &scene.all()[..] else { panic!("{:?}", scene.all()) };
    assert_eq!((first.cause, &first.state), (SnapshotCause::Daily, &SnapshotState::Requested));
    let first = first.id;
    // While it is under way there is no other, however long that is.
    scene.world.tick_after(2 * SNAPSHOT_DAILY_MS);
    assert_eq!(scene.all().len(), 1);
    scene.advance(first, failed());
    scene.world.tick_after(SNAPSHOT_RETRY_MS);
    assert_eq!(scene.all().len(), 2);
    let second = scene.all()[1].id;
    scene.advance(second, uploaded());
    scene.world.tick_after(SNAPSHOT_DAILY_MS - 2_000);
    assert_eq!(scene.all().len(), 2);
    scene.world.tick_after(2_000);
    assert_eq!(scene.all().len(), 3);
}

#[test]
fn a_failed_daily_one_is_tried_again_after_an_hour_and_not_before() {
    let mut scene = Scene::new("backup = true\n");
    scene.world.tick_after(1_000);
    let first = scene.all()[0].id;
    scene.advance(first, failed());
    scene.world.tick_after(SNAPSHOT_RETRY_MS - 2_000);
    assert_eq!(scene.all().len(), 1);
    scene.world.tick_after(2_000);
    assert_eq!(scene.all().len(), 2);
}

#[test]
fn nothing_is_backed_up_that_nobody_asked_for() {
    let mut scene = Scene::new("");
    scene.world.tick_after(3 * SNAPSHOT_DAILY_MS);
    assert!(scene.all().is_empty());
}

#[test]
fn volumes_from_before_the_version_are_backed_up_after_it() {
    let mut world = World::at(ClusterVersion::THREE);
    let nodes = vec![world.node("n1", 8_192)];
    let tenant = world.tenant("acme", 10);
    let mut scene = Scene { world, tenant, nodes };
    scene.deploy(1, database(64, "backup = true\n"));
    scene.world.settle(scene.tenant.env);
    scene.world.tick_after(1_000);
    assert_eq!(scene.create().unwrap_err().code, Code::FailedPrecondition);
    assert!(scene.all().is_empty());
    scene.world.system(Command::RaiseClusterVersion { to: ClusterVersion::FOUR }).unwrap();
    scene.world.tick_after(1_000);
    assert_eq!(scene.all().len(), 1);
    assert_eq!(scene.nodes, [scene.all()[0].node]);
}

#[test]
fn fourteen_daily_ones_are_kept_and_the_newest_good_one_is_never_pruned() {
    let mut scene = Scene::new("backup = true\n");
    let asked = scene.good();
    let mut newest = None;
    for day in 0..SNAPSHOTS_DAILY_KEPT + 4 {
        scene.world.tick_after(SNAPSHOT_DAILY_MS);
        let id = scene.all().last().unwrap().id;
        scene.advance(id, uploaded());
        newest = Some(id);
        let daily = scene.all().iter().filter(|s| s.cause == SnapshotCause::Daily).count();
        assert_eq!(daily, (day + 1).min(SNAPSHOTS_DAILY_KEPT));
    }
    // From here on everything fails; what is good stays, and only so many of the failed.
    for _ in 0..SNAPSHOTS_FAILED_KEPT + 4 {
        scene.world.tick_after(SNAPSHOT_DAILY_MS);
        let id = scene.all().last().unwrap().id;
        assert_eq!(scene.snapshot(id).unwrap().state, SnapshotState::Requested);
        scene.advance(id, failed());
    }
    assert!(scene.snapshot(newest.unwrap()).unwrap().state.is_good());
    assert!(scene.snapshot(asked).is_some(), "what somebody asked for is theirs to delete");
    let count = |good: bool| scene.all().iter().filter(|s| s.state.is_good() == good).count();
    assert_eq!((count(true), count(false)), (SNAPSHOTS_DAILY_KEPT + 1, SNAPSHOTS_FAILED_KEPT));
    // What is stored of those that went is erased by their node.
    let erase = scene.world.view().snapshots_to_erase(scene.home(), 99).unwrap();
    assert_eq!(erase.len(), 8);
    let home = scene.home();
    let forgotten = erase.iter().copied().collect();
    scene.tell(home, SnapshotNews { forgotten, ..SnapshotNews::default() }).unwrap();
    assert!(scene.world.view().snapshots_to_erase(home, 99).unwrap().is_empty());
}

#[test]
fn only_so_many_are_asked_for() {
    let mut scene = Scene::new("");
    for _ in 0..SNAPSHOTS_ASKED_MAX {
        scene.good();
    }
    assert_eq!(scene.create().unwrap_err().code, Code::QuotaExceeded);
    let first = scene.all()[0].id;
    scene.asks(Command::DeleteSnapshot { snapshot: first }).unwrap();
    scene.create().unwrap();
}

#[test]
fn i10_a_deleted_snapshots_key_goes_with_it() {
    let mut scene = Scene::new("");
    let id = scene.create().unwrap();
    let set = Command::SetClusterRecipient { recipient: recipient(CLUSTER), after: None };
    scene.world.operator(set).unwrap();
    let owner = SealOwner::Snapshot(id);
    let create = Command::CreateEnvelope { owner, envelope: envelope("age1snapshot", CLUSTER) };
    scene.world.system(create.clone()).unwrap();
    assert!(scene.world.view().envelope(owner).unwrap().is_some());
    let page = scene.world.view().envelopes(None, 99).unwrap();
    assert!(page.iter().any(|(known, _)| *known == owner), "a rotation finds it");
    scene.asks(Command::DeleteSnapshot { snapshot: id }).unwrap();
    assert!(scene.world.view().envelope(owner).unwrap().is_none());
    assert_eq!(scene.world.system(create).unwrap_err().code, Code::NotFound);
}

#[test]
fn a_restore_makes_another_volume_that_nothing_mounts_before_it_is_whole() {
    let mut scene = Scene::new("");
    let snapshot = scene.good();
    let restored = scene.restore(snapshot, "again").unwrap();
    let (old, new) = (scene.volume(), scene.named("again"));
    assert_eq!((new.id, new.home, new.size_mib), (restored, old.home, old.size_mib));
    let home = scene.home();
    assert_eq!(scene.world.view().restores_to_do(home, 9).unwrap()[0].snapshot, snapshot);
    // What it is made from stays meanwhile.
    let refused = scene.asks(Command::DeleteSnapshot { snapshot }).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
    // A release that mounts it waits.
    let text = manifest_text("again");
    scene.deploy(2, manifest::parse(&text).unwrap());
    scene.world.settle(scene.tenant.env);
    assert_eq!(scene.blocked(), Some(Unschedulable::VolumeRestoring));
    scene.restored(home, restored, Restored::Whole);
    assert!(scene.world.view().volume_restore(restored).unwrap().is_none());
    scene.world.tick_after(1_000);
    scene.world.settle(scene.tenant.env);
    assert_eq!(scene.blocked(), None);
    let attached = scene.named("again").attached.unwrap();
    assert!(!attached.fresh, "its disk is never made anew");
    scene.asks(Command::DeleteSnapshot { snapshot }).unwrap();
}

fn manifest_text(volume: &str) -> String {
    format!(
        "schema_version = \"v1\"\n[app]\nname = \"hello\"\n[processes.db]\nresources = {{ memory = \"64Mi\" }}\n\
         mounts = [{{ volume = \"{volume}\", path = \"/data\" }}]\n[[volumes]]\nname = \"{volume}\"\nsize = \"64Mi\"\n"
    )
}

#[test]
fn a_restore_that_failed_says_why_and_its_volume_can_be_deleted() {
    let mut scene = Scene::new("");
    let snapshot = scene.good();
    let restored = scene.restore(snapshot, "again").unwrap();
    let home = scene.home();
    scene.restored(home, restored, Restored::Failed { detail: "a part was changed".into() });
    let known = scene.world.view().volume_restore(restored).unwrap().unwrap();
    assert_eq!(known.failed.as_deref(), Some("a part was changed"));
    assert!(scene.world.view().restores_to_do(home, 9).unwrap().is_empty());
    // It does not become whole after that, and has no snapshot.
    scene.restored(home, restored, Restored::Whole);
    assert!(scene.world.view().volume_restore(restored).unwrap().is_some());
    let refused = scene.asks(Command::CreateSnapshot { volume: restored }).unwrap_err();
    assert_eq!(refused.code, Code::FailedPrecondition);
    scene.asks(Command::DeleteVolume { volume: restored, expected_version: None }).unwrap();
    assert!(scene.world.view().volume_restore(restored).unwrap().is_none());
    scene.asks(Command::DeleteSnapshot { snapshot }).unwrap();
}

#[test]
fn what_cannot_be_restored_is_refused() {
    let mut scene = Scene::new("");
    let under_way = scene.create().unwrap();
    assert_eq!(scene.restore(under_way, "again").unwrap_err().code, Code::FailedPrecondition);
    scene.advance(under_way, uploaded());
    assert_eq!(scene.restore(under_way, "data").unwrap_err().code, Code::NameTaken);
    for n in 1..VOLUMES_ORG_MAX {
        scene.restore(under_way, &format!("v{n}")).unwrap();
    }
    assert_eq!(scene.restore(under_way, "again").unwrap_err().code, Code::QuotaExceeded);
}

#[test]
fn a_snapshot_outlives_its_volume_and_its_node() {
    let mut scene = Scene::new("");
    let snapshot = scene.good();
    let home = scene.home();
    scene.world.operator(Command::QuarantineNode { node: home }).unwrap();
    scene.asks(Command::DeleteVolume { volume: scene.volume().id, expected_version: None }).unwrap();
    let restored = scene.restore(snapshot, "data").unwrap();
    let new = scene.volume();
    assert_eq!(new.id, restored);
    assert!(new.home.is_some_and(|node| node != home));
}

#[test]
fn an_app_with_snapshots_is_not_deleted() {
    let mut scene = Scene::new("");
    let snapshot = scene.good();
    let counts = BTreeMap::from([("db".parse().unwrap(), 0)]);
    let env = scene.tenant.env;
    let db = scene.world.live(env).into_iter().find(|i| i.process.as_str() == "db").unwrap();
    scene.asks(Command::Scale { env, counts }).unwrap();
    scene.world.report(&db, resource::InstanceState::Stopped);
    scene.asks(Command::DeleteVolume { volume: scene.volume().id, expected_version: None }).unwrap();
    let delete = Command::DeleteApp { app: scene.tenant.app, expected_version: None };
    assert_eq!(scene.asks(delete.clone()).unwrap_err().code, Code::FailedPrecondition);
    scene.asks(Command::DeleteSnapshot { snapshot }).unwrap();
    scene.asks(delete).unwrap();
}
