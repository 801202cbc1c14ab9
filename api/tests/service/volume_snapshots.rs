//! Snapshots of volumes, as tenants ask for them and nodes are told of them.

use crate::agents::{enrolled, node, node_report};
use crate::harness::Rig;
use crate::harness::scene::{Tenant, tenant};
use crate::secrets::sealing;
use crate::volumes::{WRITTEN_TO, deploy_manifest};
use axum::http::{Method, StatusCode};
use data_encoding::BASE64;
use holdfast_identity::{PeerIdentity, Role, SealKey, SealTo};
use holdfast_model::SnapshotId;
use holdfast_model::agent::{Report, ReportDetail};
use holdfast_model::delivery::SnapshotDelivery;
use holdfast_model::volume_snapshot::{Restored, SnapshotNews, SnapshotState};
use holdfast_model::{Digest, VolumeId};
use serde_json::{Value, json};

struct Scene {
    rig: Rig,
    ours: Tenant,
    peer: PeerIdentity,
}

impl Scene {
    /// A database was placed, with a volume.
    async fn new() -> Self {
        // The clockwork makes the key that keys are sealed to.
        let (rig, ours, clock) = sealing().await;
        clock.abort();
        let (_, peer) = node(&rig).await;
        let scene = Self { rig, ours, peer };
        scene.report(SnapshotNews::default()).await;
        deploy_manifest(&scene.rig, &scene.ours, WRITTEN_TO).await;
        scene
    }

    /// What the node is answered when it tells this.
    async fn report(&self, news: SnapshotNews) -> Value {
        self.report_of(&self.peer, news).await
    }

    async fn report_of(&self, peer: &PeerIdentity, news: SnapshotNews) -> Value {
        let mut report: Report = serde_json::from_str(&node_report("kvm")).unwrap();
        let ReportDetail::Node { snapshots, .. } = &mut report.detail else { panic!("not a node") };
        *snapshots = news;
        let text = serde_json::to_string(&report).unwrap();
        let request = self.rig.request(Method::POST, "/v1/agent/report", None, Some(&text));
        let reply = self.rig.send(self.rig.by(request, peer.clone())).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        reply.body["snapshots"].clone()
    }

    async fn volume(&self) -> String {
        let listed = self.rig.get(&format!("/v1/envs/{}/volumes", self.ours.env), &self.ours.owner).await;
        listed.body["items"][0]["id"].as_str().unwrap().to_owned()
    }

    async fn create(&self) -> SnapshotId {
        let path = format!("/v1/volumes/{}/snapshots", self.volume().await);
        let made = self.rig.post(&path, &self.ours.owner, json!({})).await;
        assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
        made.body["item"]["id"].as_str().unwrap().parse().unwrap()
    }

    async fn key(&self, peer: &PeerIdentity, volume: &str, to: &SealTo) -> (StatusCode, Value) {
        let asked = json!({"volume": volume, "recipient": to.to_string()}).to_string();
        let request = self.rig.request(Method::POST, "/v1/agent/snapshots/key", None, Some(&asked));
        let reply = self.rig.send(self.rig.by(request, peer.clone())).await;
        (reply.status, reply.body)
    }
}

fn taken(id: SnapshotId, state: SnapshotState) -> SnapshotNews {
    SnapshotNews { taken: [(id, state)].into(), ..SnapshotNews::default() }
}

const MANIFEST: Digest = Digest([6; 32]);

fn uploaded() -> SnapshotState {
    SnapshotState::Uploaded { manifest: MANIFEST, stored_bytes: 77 }
}

#[tokio::test(flavor = "multi_thread")]
async fn i10_a_snapshot_is_sealed_to_a_key_that_only_the_node_of_its_restore_gets() {
    let scene = Scene::new().await;
    let id = scene.create().await;
    let source = scene.volume().await;
    // The node is told what to take, and to whom to seal it: the public half, and nothing else.
    let work = scene.report(SnapshotNews::default()).await;
    let take = &work["take"][0];
    assert_eq!(take["of"]["snapshot"], json!(id));
    assert_eq!(take["of"]["volume"], json!(scene.volume().await));
    let recipient: SealTo = take["recipient"].as_str().unwrap().parse().unwrap();
    assert_eq!(scene.report(SnapshotNews::default()).await["take"][0]["recipient"], take["recipient"]);
    let sealed = recipient.seal(b"the disk").unwrap();
    let work = scene.report(taken(id, SnapshotState::Snapshotted)).await;
    assert_eq!(work["take"][0]["of"]["snapshot"], json!(id), "it is not uploaded yet");
    assert_eq!(scene.report(taken(id, uploaded())).await["take"], json!([]));
    let path = format!("/v1/snapshots/{id}");
    let shown = scene.rig.get(&path, &scene.ours.owner).await.body["item"].clone();
    assert_eq!(shown["state"]["uploaded"]["stored_bytes"], json!(77));

    // Restored: its node is told from what, and gets the key to it, sealed to itself.
    let restore = format!("{path}/restore");
    let made = scene.rig.post(&restore, &scene.ours.owner, json!({"name": "again"})).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let volume = made.body["item"]["id"].as_str().unwrap().to_owned();
    let under_way = format!("/v1/volumes/{volume}/restore");
    assert_eq!(scene.rig.get(&under_way, &scene.ours.owner).await.body["item"]["snapshot"], json!(id));
    let work = scene.report(SnapshotNews::default()).await;
    assert_eq!(work["restore"][0]["volume"], json!(volume));
    assert_eq!(work["restore"][0]["manifest"], json!(MANIFEST));
    let own = SealKey::generate();
    let (status, body) = scene.key(&scene.peer, &volume, &own.recipient()).await;
    assert_eq!(status, StatusCode::OK, "{body}");
    let delivery = BASE64.decode(body["item"]["sealed"].as_str().unwrap().as_bytes()).unwrap();
    let delivery: SnapshotDelivery = postcard::from_bytes(&own.open(&delivery).unwrap()).unwrap();
    assert_eq!((delivery.snapshot, delivery.node.to_string()), (id, scene.peer.id.clone()));
    let key: SealKey = std::str::from_utf8(delivery.key.reveal()).unwrap().parse().unwrap();
    assert_eq!(&key.open(&sealed).unwrap()[..], b"the disk");

    // Nobody else gets it, and nobody once it is done (I9).
    let joiner = json!({"name": "n2", "capacity": {"memory_mib": 4096, "cpu_milli": 4000}});
    let other = enrolled(&scene.rig, "node", joiner).await;
    let cluster = scene.rig.service.cluster.to_string();
    let other = PeerIdentity::new(&cluster, Role::Node, &other).unwrap();
    assert_eq!(scene.key(&other, &volume, &own.recipient()).await.0, StatusCode::NOT_FOUND);
    assert_eq!(scene.key(&scene.peer, &source, &own.recipient()).await.0, StatusCode::NOT_FOUND);
    let done: VolumeId = volume.parse().unwrap();
    let restored = SnapshotNews { restored: [(done, Restored::Whole)].into(), ..SnapshotNews::default() };
    // Another node's word about it counts nothing.
    scene.report_of(&other, restored.clone()).await;
    assert_eq!(scene.rig.get(&under_way, &scene.ours.owner).await.status, StatusCode::OK);
    assert_eq!(scene.report(restored).await["restore"], json!([]));
    assert_eq!(scene.rig.get(&under_way, &scene.ours.owner).await.status, StatusCode::NOT_FOUND);
    assert_eq!(scene.key(&scene.peer, &volume, &own.recipient()).await.0, StatusCode::NOT_FOUND);

    // Deleted: the node is told to erase it, until it did.
    let request = scene.rig.request(Method::DELETE, &path, Some(&scene.ours.owner), None);
    assert_eq!(scene.rig.send(request).await.status, StatusCode::OK);
    assert_eq!(scene.report(SnapshotNews::default()).await["forget"], json!([id]));
    let forgotten = SnapshotNews { forgotten: [id].into(), ..SnapshotNews::default() };
    scene.report(forgotten).await;
    assert_eq!(scene.report(SnapshotNews::default()).await["forget"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn i09_a_snapshot_is_seen_by_whom_it_belongs_to() {
    let scene = Scene::new().await;
    let theirs = tenant(&scene.rig, "theirs").await;
    let id = scene.create().await;
    let viewer = scene.rig.tenant(&scene.ours.org, "viewer").await;
    let list = format!("/v1/envs/{}/snapshots", scene.ours.env);
    assert_eq!(scene.rig.get(&list, &viewer).await.body["items"][0]["id"], json!(id));
    let (path, create) =
        (format!("/v1/snapshots/{id}"), format!("/v1/volumes/{}/snapshots", scene.volume().await));
    for (token, expected) in [(&viewer, StatusCode::FORBIDDEN), (&theirs.owner, StatusCode::NOT_FOUND)] {
        assert_eq!(scene.rig.post(&create, token, json!({})).await.status, expected);
        let restore = scene.rig.post(&format!("{path}/restore"), token, json!({"name": "x"})).await;
        assert_eq!(restore.status, expected);
        let delete = scene.rig.request(Method::DELETE, &path, Some(token), None);
        assert_eq!(scene.rig.send(delete).await.status, expected);
    }
    assert_eq!(scene.rig.get(&path, &theirs.owner).await.status, StatusCode::NOT_FOUND);
    assert_eq!(scene.rig.get(&list, &theirs.owner).await.status, StatusCode::NOT_FOUND);
}

#[tokio::test(flavor = "multi_thread")]
async fn i11_a_node_that_was_cut_off_is_told_of_no_snapshot() {
    let scene = Scene::new().await;
    scene.create().await;
    assert_eq!(scene.report(SnapshotNews::default()).await["take"].as_array().unwrap().len(), 1);
    let node = scene.peer.id.clone();
    let cut = scene.rig.post(&format!("/v1/nodes/{node}/quarantine"), &scene.rig.operator, json!({})).await;
    assert_eq!(cut.status, StatusCode::OK, "{}", cut.text);
    let request = scene.rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    let reply = scene.rig.send(scene.rig.by(request, scene.peer.clone())).await;
    assert!(reply.status != StatusCode::OK || reply.body["snapshots"]["take"] == json!([]), "{}", reply.text);
}
