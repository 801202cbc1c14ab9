//! Volumes, as tenants and nodes meet them.

use crate::agents::{next_frame, node, node_report};
use crate::harness::Rig;
use crate::harness::scene::{Tenant, tenant};
use axum::body::Body;
use axum::http::{Method, StatusCode};
use holdfast_identity::PeerIdentity;
use holdfast_model::agent::{FRAMES_ACCEPTED, Frame, NodeInstance, Report, ReportDetail};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use tower::ServiceExt as _;

const MANIFEST: &str = r#"
schema_version = "v1"
[app]
name = "hello"
[processes.db]
resources = { memory = "64Mi" }
mounts = [{ volume = "data", path = "/data", read_only = true }]
[processes.web]
resources = { memory = "64Mi" }
[[volumes]]
name = "data"
size = "1Gi"
"#;

/// A database alone, that writes to its volume.
pub(crate) const WRITTEN_TO: &str = r#"
schema_version = "v1"
[app]
name = "hello"
[processes.db]
resources = { memory = "64Mi" }
mounts = [{ volume = "data", path = "/data" }]
[[volumes]]
name = "data"
size = "1Gi"
"#;

async fn deploy(rig: &Rig, tenant: &Tenant) {
    deploy_manifest(rig, tenant, MANIFEST).await;
}

pub(crate) async fn deploy_manifest(rig: &Rig, tenant: &Tenant, manifest: &str) {
    let digest = format!("sha256:{}", "ab".repeat(32));
    let release =
        json!({"image": {"repository": "127.0.0.1:5000/hello", "digest": digest}, "manifest": manifest});
    let made = rig.post(&format!("/v1/envs/{}/releases", tenant.env), &tenant.owner, release).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let deployment = json!({"release": made.body["item"]["id"]});
    let made = rig.post(&format!("/v1/envs/{}/deployments", tenant.env), &tenant.owner, deployment).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
}

async fn delete(rig: &Rig, token: &str, volume: &str) -> (StatusCode, Value) {
    let request = rig.request(Method::DELETE, &format!("/v1/volumes/{volume}"), Some(token), None);
    let reply = rig.send(request).await;
    (reply.status, reply.body["code"].clone())
}

/// The first state that a node's agent is told when it accepts this.
async fn told(rig: &Rig, peer: &PeerIdentity, accept: &str) -> Vec<NodeInstance> {
    let mut request = rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
    request.headers_mut().insert("accept", accept.parse().unwrap());
    let mut stream: Body =
        rig.router.clone().oneshot(rig.by(request, peer.clone())).await.unwrap().into_body();
    let (mut pending, mut items) = (Vec::new(), Vec::new());
    loop {
        match next_frame::<NodeInstance>(&mut stream, &mut pending).await {
            Frame::SnapshotBegin { .. } => {}
            Frame::SnapshotItems(some) => items.extend(some),
            Frame::SnapshotEnd => return items,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_seen_and_deleted_by_whom_it_belongs_to() {
    let rig = Rig::start().await;
    let (ours, theirs) = (tenant(&rig, "ours").await, tenant(&rig, "theirs").await);
    let (_, peer) = node(&rig).await;
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    assert_eq!(rig.send(rig.by(request, peer.clone())).await.status, StatusCode::OK);
    deploy(&rig, &ours).await;
    let viewer = rig.tenant(&ours.org, "viewer").await;
    let listed = rig.get(&format!("/v1/envs/{}/volumes", ours.env), &viewer).await;
    let volume = listed.body["items"][0].clone();
    assert_eq!(
        (&volume["name"], &volume["size_mib"], &volume["generation"]),
        (&"data".into(), &1024.into(), &1.into())
    );
    let id = volume["id"].as_str().unwrap();
    let path = format!("/v1/volumes/{id}");
    assert_eq!(rig.get(&path, &viewer).await.body["item"], volume);
    assert_eq!(delete(&rig, &viewer, id).await, (StatusCode::FORBIDDEN, "forbidden".into()));
    // Another org's, and one that never was.
    let absent = "vol_00000000000000000000000000";
    for id in [id, absent] {
        let shown = rig.get(&format!("/v1/volumes/{id}"), &theirs.owner).await;
        assert_eq!((shown.status, &shown.body["code"]), (StatusCode::NOT_FOUND, &"not_found".into()));
        assert_eq!(delete(&rig, &theirs.owner, id).await, (StatusCode::NOT_FOUND, "not_found".into()));
    }
    assert_eq!(delete(&rig, &ours.owner, id).await, (StatusCode::CONFLICT, "failed_precondition".into()));

    // Its node is told of it; an agent of an earlier release is not told of what it could not read.
    let items = told(&rig, &peer, FRAMES_ACCEPTED).await;
    assert_eq!(items.len(), 2);
    let db = items.iter().find(|i| i.process.as_str() == "db").unwrap();
    assert_eq!((db.volumes[0].id.to_string().as_str(), db.volumes[0].read_only), (id, true));
    let earlier = told(&rig, &peer, "application/vnd.holdfast.frames; calls=3").await;
    assert_eq!(earlier.iter().map(|i| i.process.as_str()).collect::<Vec<_>>(), ["web"]);

    // Stopped and deleted: the answer to its node's next report says what to erase, until it is.
    let scale = json!({"counts": {"db": 0}});
    assert_eq!(
        rig.post(&format!("/v1/envs/{}/scale", ours.env), &ours.owner, scale).await.status,
        StatusCode::CREATED
    );
    let stopped = holdfast_model::agent::Observation {
        instance: db.id,
        state: holdfast_model::resource::InstanceState::Stopped,
        reason: None,
        detail: None,
        restarts: 0,
    };
    let report = async |observations: Vec<_>, gone: BTreeSet<_>| {
        let mut report: Report = serde_json::from_str(&node_report("kvm")).unwrap();
        let ReportDetail::Node { observations: told, erased, .. } = &mut report.detail else { panic!() };
        (*told, *erased) = (observations, gone);
        let text = serde_json::to_string(&report).unwrap();
        let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&text));
        let reply = rig.send(rig.by(request, peer.clone())).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        reply.body["erase"].clone()
    };
    assert_eq!(report(vec![stopped], BTreeSet::new()).await, json!([]));
    assert_eq!(delete(&rig, &ours.owner, id).await.0, StatusCode::OK);
    assert_eq!(report(vec![], BTreeSet::new()).await, json!([id]));
    assert_eq!(report(vec![], [id.parse().unwrap()].into()).await, json!([]));
    assert_eq!(report(vec![], BTreeSet::new()).await, json!([]));
}
