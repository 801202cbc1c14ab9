//! A tenant and what it has, made through the API.

use super::{Reply, Rig};
use serde_json::{Value, json};

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
