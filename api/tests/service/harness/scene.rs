//! A tenant and what it has, made through the API.

use super::{Reply, Rig};
use crate::agents::{enrolled, node, node_report};
use axum::Router;
use axum::body::Body;
use axum::http::{Method, StatusCode};
use holdfast_identity::PeerIdentity;
use holdfast_model::agent::FRAMES_ACCEPTED;
use serde_json::{Value, json};
use tower::ServiceExt as _;

const MANIFEST: &str = r#"
schema_version = "v1"
[app]
name = "hello"
[processes.web]
resources = { memory = "64Mi" }
scaling = { min = 2, max = 4 }
ports = [{ name = "https", internal = 8443 }]
"#;

/// An org with an app and an env.
pub(crate) struct Tenant {
    pub(crate) org: String,
    pub(crate) app: String,
    pub(crate) env: String,
    pub(crate) owner: String,
}

pub(crate) async fn tenant(rig: &Rig, name: &str) -> Tenant {
    let org = rig.made("/v1/orgs", json!({"name": name})).await;
    let app = rig.made(&format!("/v1/orgs/{org}/apps"), json!({"name": "hello"})).await;
    let env = rig.made(&format!("/v1/apps/{app}/envs"), json!({"name": "prod"})).await;
    let owner = rig.tenant(&org, "owner").await;
    Tenant { org, app, env, owner }
}

pub(crate) fn release() -> Value {
    let digest = format!("sha256:{}", "ab".repeat(32));
    json!({"image": {"repository": "127.0.0.1:5000/hello", "digest": digest}, "manifest": MANIFEST})
}

pub(crate) async fn route(rig: &Rig, tenant: &Tenant, hostname: &str) -> Reply {
    let body = json!({
        "target": {"tls_passthrough": {"hostname": hostname}}, "listen_port": 443, "process": "web", "port": "https"
    });
    rig.post(&format!("/v1/envs/{}/routes", tenant.env), &tenant.owner, body).await
}

/// A tenant's instance on a node that reports to the first member and follows the second.
pub(crate) struct Elsewhere {
    pub(crate) second: Router,
    pub(crate) ours: Tenant,
    pub(crate) peer: PeerIdentity,
    pub(crate) instance: String,
    /// The node's stream.
    pub(crate) follow: Body,
}

pub(crate) async fn elsewhere(rig: &Rig) -> Elsewhere {
    let (second, address) = rig.second_api().await;
    enrolled(rig, "member", json!({"name": "beta", "api_addr": address, "raft_addr": "127.0.0.1:9"})).await;
    let ours = tenant(rig, "ours").await;
    let (_, peer) = node(rig).await;
    let request = rig.request(Method::POST, "/v1/agent/report", None, Some(&node_report("kvm")));
    assert_eq!(rig.send(rig.by(request, peer.clone())).await.status, StatusCode::OK);
    let mut request = rig.request(Method::GET, "/v1/agent/follow?protocol=1", None, None);
    request.headers_mut().insert("accept", FRAMES_ACCEPTED.parse().unwrap());
    let follow = second.clone().oneshot(rig.by(request, peer.clone())).await.unwrap().into_body();
    let made = rig.post(&format!("/v1/envs/{}/releases", ours.env), &ours.owner, release()).await;
    let deployment = json!({"release": made.body["item"]["id"], "counts": {"web": 1}});
    let made = rig.post(&format!("/v1/envs/{}/deployments", ours.env), &ours.owner, deployment).await;
    assert_eq!(made.status, StatusCode::CREATED, "{}", made.text);
    let instances = rig.get(&format!("/v1/envs/{}/instances", ours.env), &ours.owner).await;
    let instance = instances.body["items"][0]["id"].as_str().expect("nothing was placed").to_owned();
    Elsewhere { second, ours, peer, instance, follow }
}
