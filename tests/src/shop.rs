//! The tenant of tests and the demo: a small TLS web shop, its manifest, and which microVMs run it.

use crate::cluster::{Cluster, ClusterError};
use serde_json::Value;
use std::io;

/// The shop's hostname.
pub const HOSTNAME: &str = "shop.example";

/// Why nothing is known of the shop.
#[derive(Debug, thiserror::Error)]
pub enum ShopError {
    /// The cluster.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The manifest.
    #[error("the shop's manifest could not be written")]
    Manifest(#[source] io::Error),
    /// The node agent's status.
    #[error("the node agent's status cannot be understood")]
    Status(#[source] serde_json::Error),
}

/// The shop's manifest, with so many instances at first.
pub fn manifest(instances: u32) -> String {
    format!(
        r#"schema_version = "v1"

[app]
name = "shop"

[processes.web]
resources = {{ memory = "64Mi", cpu = 0.5 }}
scaling = {{ min = {instances}, max = 4 }}
ports = [{{ name = "https", internal = 8443 }}]
health = {{ tcp = true, port = "https", interval = "500ms" }}
"#
    )
}

/// Writes the manifest into the cluster's folder, and says where.
///
/// # Errors
/// [`ShopError::Manifest`].
pub fn write_manifest(cluster: &Cluster, instances: u32) -> Result<String, ShopError> {
    let path = cluster.data_dir().join("holdfast.toml");
    std::fs::write(&path, manifest(instances)).map_err(ShopError::Manifest)?;
    Ok(path.display().to_string())
}

/// What the cluster's first node agent says about itself, from its own disk.
///
/// # Errors
/// [`ShopError`].
pub fn node_status(cluster: &Cluster) -> Result<Value, ShopError> {
    let node = cluster.names("node");
    let folder =
        cluster.process(node.first().map_or("node-1", String::as_str))?.data_dir.display().to_string();
    let output = cluster.holdfast(&["node", "status", "--json", "--data-dir", &folder])?;
    serde_json::from_slice(&output.stdout).map_err(ShopError::Status)
}

/// Instances that are ready, and the processes of their VMMs.
///
/// # Errors
/// [`ShopError`].
pub fn machines(cluster: &Cluster) -> Result<Vec<(String, u32)>, ShopError> {
    Ok(machines_of(&node_status(cluster)?))
}

/// The same, of a status.
pub fn machines_of(status: &Value) -> Vec<(String, u32)> {
    let instances = status["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
    let ready = instances.iter().filter(|i| i["state"] == "ready");
    let mut machines: Vec<(String, u32)> = ready
        .filter_map(|i| {
            let pid = u32::try_from(i["pid"].as_u64()?).ok()?;
            Some((i["instance"].as_str()?.to_owned(), pid))
        })
        .collect();
    machines.sort();
    machines
}
