//! `holdfast node`: the cluster's hosts of microVMs, as an operator sees them. The agent itself is in `agents`.

use crate::commands::status;
use crate::failure::Failure;
use crate::session::Session;
use holdfast_model::api::NodeStatus;

pub(crate) async fn list(session: &Session) -> Result<(), Failure> {
    let nodes = session.client.nodes().await?.items;
    session.output.show(&nodes, || status::nodes(&nodes))
}

pub(crate) async fn drain(session: &Session, named: &str) -> Result<(), Failure> {
    let node = find(session, named).await?.node;
    let done = session.client.drain_node(node.id).await?;
    session
        .output
        .show(&done, || format!("Node {} drains; `holdfast node list` shows how far it is.", node.name))
}

pub(crate) async fn cordon(session: &Session, named: &str) -> Result<(), Failure> {
    let node = find(session, named).await?.node;
    let done = session.client.cordon_node(node.id).await?;
    session.output.show(&done, || {
        format!(
            "Node {} takes no new instances; `holdfast node uncordon {}` ends that.",
            node.name, node.name
        )
    })
}

pub(crate) async fn quarantine(session: &Session, named: &str) -> Result<(), Failure> {
    let status = find(session, named).await?;
    let (node, instances) = (status.node, status.instances);
    session
        .confirmed(&format!("Cut node {} off for good and replace its {instances} instances?", node.name))?;
    let done = session.client.quarantine_node(node.id).await?;
    session.output.show(&done, || {
        format!("Node {} is cut off; `holdfast status` shows where its instances are now.", node.name)
    })
}

pub(crate) async fn activate(session: &Session, named: &str) -> Result<(), Failure> {
    let node = find(session, named).await?.node;
    let done = session.client.activate_node(node.id).await?;
    session.output.show(&done, || format!("Node {} takes instances again.", node.name))
}

/// The node with this name or id.
pub(crate) async fn find(session: &Session, named: &str) -> Result<NodeStatus, Failure> {
    let nodes = session.client.nodes().await?.items;
    let found = nodes.into_iter().find(|s| s.node.name.as_str() == named || s.node.id.to_string() == named);
    found.ok_or_else(|| Failure::NotFound { what: "node", name: named.to_owned() })
}
