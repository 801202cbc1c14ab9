//! The whole of it on real disks and a real folder of backups; members are played. Needs root and e2fsprogs.

use super::*;
use crate::secrets::Source;
use crate::volumes::Owner;
use data_encoding::BASE64;
use futures::future::BoxFuture;
use holdfast_client::ClientError;
use holdfast_identity::SealKey;
use holdfast_model::api::{NodeSecrets, SnapshotKey};
use holdfast_model::delivery::SnapshotDelivery;
use holdfast_model::sealed::Recipient;
use holdfast_model::secrets::SecretValue;
use holdfast_model::volume::NodeVolume;
use holdfast_model::volume_snapshot::SnapshotOf;
use holdfast_model::{ClusterId, NodeId, OrgId};

const CLUSTER: ClusterId = ClusterId::from_bits(1);
const NODE: NodeId = NodeId::from_bits(2);
/// A guard against hanging.
const COME_MAX: Duration = Duration::from_secs(60);

fn of(snapshot: u128) -> SnapshotOf {
    SnapshotOf {
        org: OrgId::from_bits(3),
        volume: VolumeId::from_bits(4),
        snapshot: SnapshotId::from_bits(snapshot),
    }
}

/// Gives the key of any snapshot that it is asked for.
struct Member {
    key: SealKey,
    of: SnapshotId,
}

impl Source for Member {
    fn ask(&self, _: InstanceId, _: Recipient) -> BoxFuture<'static, Result<NodeSecrets, ClientError>> {
        Box::pin(async { Err(ClientError::NoEndpoints) })
    }

    fn ask_snapshot_key(
        &self,
        _: VolumeId,
        recipient: Recipient,
    ) -> BoxFuture<'static, Result<SnapshotKey, ClientError>> {
        let key = SecretValue::new(self.key.to_text().as_bytes().to_vec().into());
        let delivery = SnapshotDelivery { cluster: CLUSTER, node: NODE, snapshot: self.of, key };
        let to: SealTo = recipient.0.parse().unwrap();
        let sealed = BASE64.encode(&to.seal(&postcard::to_stdvec(&delivery).unwrap()).unwrap());
        Box::pin(async move { Ok(SnapshotKey { sealed }) })
    }
}

struct Scene {
    folder: tempfile::TempDir,
    volumes: Volumes,
    key: SealKey,
    asked: watch::Sender<Option<SnapshotWork>>,
    news: watch::Receiver<SnapshotNews>,
    _runs: Task,
}

impl Scene {
    async fn new(with_store: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("hfbak").tempdir().unwrap();
        let path = folder.path();
        let volumes = Volumes::open(&path.join("volumes")).unwrap();
        let volume = NodeVolume {
            id: of(0).volume,
            generation: 1,
            size_mib: 16,
            fresh: true,
            path: "/data".into(),
            read_only: false,
        };
        drop(volumes.attach(&volume, Owner { uid: 0, gid: 0 }).await.unwrap());
        let key = SealKey::generate();
        let secrets = Arc::new(NodeSecretsStore::open(path, BTreeSet::new).unwrap());
        let member = Member { key: key.clone(), of: of(9).snapshot };
        secrets.belongs_to(CLUSTER, NODE, Arc::new(member));
        let store = with_store.then(|| Store::open(path.join("store").to_str().unwrap()).unwrap());
        let backups = Backups::new(store, volumes.clone(), secrets, path.join("vms"));
        let (news, asked) = (backups.news(), watch::Sender::new(None));
        let runs = Task(tokio::spawn(backups.run(asked.subscribe())));
        Self { folder, volumes, key, asked, news, _runs: runs }
    }

    fn take(&self, snapshot: u128) -> SnapshotWork {
        let recipient = Recipient(self.key.recipient().to_string());
        let take = TakeSnapshot { of: of(snapshot), size_mib: 16, attached: None, recipient };
        SnapshotWork { take: vec![take], ..SnapshotWork::default() }
    }

    async fn told(&mut self, what: impl Fn(&SnapshotNews) -> bool) -> SnapshotNews {
        let told = tokio::time::timeout(COME_MAX, self.news.wait_for(|news| what(news)));
        told.await.expect("it is told in time").unwrap().clone()
    }

    fn disk(&self, volume: VolumeId) -> Vec<u8> {
        std::fs::read(self.folder.path().join("volumes").join(volume.to_string()).join("disk.img")).unwrap()
    }

    fn clone_of(&self, snapshot: u128) -> PathBuf {
        let name = format!("{}.img", of(snapshot).snapshot);
        self.folder.path().join("volumes").join(of(0).volume.to_string()).join(name)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_uploaded_restored_and_forgotten_as_members_ask() {
    let mut scene = Scene::new(true).await;
    let id = of(9).snapshot;
    scene.asked.send_replace(Some(scene.take(9)));
    let told = scene.told(|news| news.taken.get(&id).is_some_and(SnapshotState::is_good)).await;
    let SnapshotState::Uploaded { manifest, .. } = told.taken[&id] else { panic!("{told:?}") };
    assert!(scene.clone_of(9).exists(), "until members know that it is uploaded");

    // Nobody asks for it any more: it is told no more, and its clone goes.
    let new = VolumeId::from_bits(77);
    let restore = RestoreVolume { volume: new, size_mib: 16, from: of(9), manifest };
    scene.asked.send_replace(Some(SnapshotWork { restore: vec![restore], ..SnapshotWork::default() }));
    let told = scene.told(|news| news.restored.contains_key(&new)).await;
    assert_eq!((&told.restored[&new], told.taken.len()), (&Restored::Whole, 0));
    assert!(!scene.clone_of(9).exists());
    assert!(scene.disk(new) == scene.disk(of(0).volume));

    let forget = SnapshotWork { forget: [id].into(), ..SnapshotWork::default() };
    scene.asked.send_replace(Some(forget));
    scene.told(|news| news.forgotten.contains(&id)).await;
    let left = scene.folder.path().join("store").join(volume::folder(id));
    assert!(!left.exists() || std::fs::read_dir(left).unwrap().next().is_none());
    scene.asked.send_replace(Some(SnapshotWork::default()));
    scene.told(SnapshotNews::is_empty).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_a_store_says_so() {
    let mut scene = Scene::new(false).await;
    scene.asked.send_replace(Some(scene.take(9)));
    let told = scene.told(|news| !news.is_empty()).await;
    let SnapshotState::Failed { detail } = &told.taken[&of(9).snapshot] else { panic!("{told:?}") };
    assert!(detail.contains("--backups"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_says_why() {
    let mut scene = Scene::new(true).await;
    let new = VolumeId::from_bits(77);
    let manifest = holdfast_model::Digest([1; 32]);
    let restore = RestoreVolume { volume: new, size_mib: 16, from: of(9), manifest };
    scene.asked.send_replace(Some(SnapshotWork { restore: vec![restore], ..SnapshotWork::default() }));
    let told = scene.told(|news| !news.is_empty()).await;
    let Restored::Failed { detail } = &told.restored[&new] else { panic!("{told:?}") };
    assert!(detail.contains("is not in the store of backups"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn i07_before_members_asked_nothing_is_removed() {
    let scene = Scene::new(true).await;
    let kept = scene.volumes.snapshot(of(0).volume, of(5).snapshot, None).await.unwrap();
    drop(kept);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(scene.clone_of(5).exists());
    // What was half done before a restart goes on from the clone.
    let before = std::fs::metadata(scene.clone_of(5)).unwrap().modified().unwrap();
    let mut scene = scene;
    scene.asked.send_replace(Some(scene.take(5)));
    scene.told(|news| news.taken.values().any(SnapshotState::is_good)).await;
    assert_eq!(std::fs::metadata(scene.clone_of(5)).unwrap().modified().unwrap(), before);
}
