//! The cluster: members, nodes, edges, and what operators do with them.

use crate::endpoint::{CONSISTENCY, Endpoint, Need, Table};
use crate::problem::Refusal;
use crate::request::{Body, Call, done, found, page};
use crate::service::Service;
use axum::response::Response;
use holdfast_model::api::{
    Answer, ClusterStatus, ConfirmRemovals, Done, EdgeStatus, MemberRole, MemberStatus, NodeStatus, Page,
};
use holdfast_model::command::AgentRef;
use holdfast_model::limits::VMM_OVERHEAD_MIB;
use holdfast_model::{Command, Scope};
use holdfast_store::Views;
use std::sync::Arc;

pub(super) fn add(table: &mut Table<Arc<Service>>) {
    table.add(
        Endpoint::get("/v1/cluster", Need::Operator(Scope::ClusterRead), "How the cluster stands")
            .query(&[CONSISTENCY])
            .answers::<Answer<ClusterStatus>>(200),
        cluster,
    );
    table.add(
        Endpoint::get("/v1/nodes", Need::Operator(Scope::ClusterRead), "List nodes")
            .reads()
            .answers::<Page<NodeStatus>>(200),
        nodes,
    );
    table.add(
        Endpoint::get("/v1/edges", Need::Operator(Scope::ClusterRead), "List edges")
            .reads()
            .answers::<Page<EdgeStatus>>(200),
        edges,
    );
    let nodes_admin = Need::Operator(Scope::NodesAdmin);
    table.add(
        Endpoint::post("/v1/nodes/{node}/drain", nodes_admin, "Move a node's instances away")
            .answers::<Done>(200),
        drain,
    );
    table.add(
        Endpoint::post("/v1/nodes/{node}/activate", nodes_admin, "Take a node back into use")
            .answers::<Done>(200),
        activate,
    );
    table.add(
        Endpoint::post("/v1/nodes/{node}/cordon", nodes_admin, "Place nothing more on a node")
            .answers::<Done>(200),
        cordon,
    );
    table.add(
        Endpoint::post("/v1/nodes/{node}/quarantine", nodes_admin, "Cut a node off for good")
            .answers::<Done>(200),
        quarantine,
    );
    table.add(
        Endpoint::post("/v1/nodes/{node}/confirm", nodes_admin, "Confirm removals that a node holds back")
            .body::<ConfirmRemovals>()
            .answers::<Done>(200),
        confirm_node,
    );
    table.add(
        Endpoint::post(
            "/v1/edges/{edge}/confirm",
            Need::Operator(Scope::EdgesAdmin),
            "Confirm removals that an edge holds back",
        )
        .body::<ConfirmRemovals>()
        .answers::<Done>(200),
        confirm_edge,
    );
}

async fn cluster(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let cluster = view.cluster()?.ok_or_else(|| Refusal::not_found("cluster"))?;
    let raft = call.service.consensus.status();
    let mut members = Vec::new();
    for member in view.members()? {
        let votes = raft.voters.iter().any(|(id, _)| *id == member.id);
        let learns = raft.learners.iter().any(|(id, _)| *id == member.id);
        let role = match () {
            () if member.removed && (votes || learns) => MemberRole::Leaving,
            () if member.removed => MemberRole::Removed,
            () if votes => MemberRole::Voter,
            () if learns => MemberRole::Learner,
            () => MemberRole::Joining,
        };
        members.push((member, role));
    }
    let supported = members.iter().map(|(member, role)| async {
        match role {
            MemberRole::Removed => None,
            _ if member.id == call.service.member => Some(call.service.store().supported_versions()),
            _ => call.service.consensus.supported_by(member.id).await,
        }
    });
    let supported = futures::future::join_all(supported).await;
    let members = members.into_iter().zip(supported);
    let members = members.map(|((member, role), supported)| MemberStatus { member, role, supported });
    let status = ClusterStatus {
        cluster: cluster.id,
        incarnation: cluster.incarnation,
        version: cluster.version,
        member: call.service.member,
        leader: raft.leader,
        term: raft.term,
        applied: raft.last_applied.unwrap_or(0),
        members: members.collect(),
    };
    Ok(found(view.revision(), status))
}

async fn nodes(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let mut items = Vec::new();
    for node in view.nodes()? {
        let live = view.node_instances_live(node.id)?;
        items.push(NodeStatus {
            instances: live.len() as u64,
            memory_mib_used: live.iter().map(|i| i.memory_mib + VMM_OVERHEAD_MIB).sum(),
            cpu_milli_used: live.iter().map(|i| i.cpu_milli).sum(),
            contact: call.service.contacts.contact(AgentRef::Node(node.id)),
            disk: call.service.contacts.disk(node.id),
            node,
        });
    }
    Ok(page(view.revision(), items, None))
}

async fn edges(call: Call) -> Result<Response, Refusal> {
    let view = call.view().await?;
    let status = |edge: holdfast_model::resource::Edge| EdgeStatus {
        contact: call.service.contacts.contact(AgentRef::Edge(edge.id)),
        edge,
    };
    Ok(page(view.revision(), view.edges()?.into_iter().map(status).collect(), None))
}

async fn carry_out(call: &Call, command: Command) -> Result<Response, Refusal> {
    Ok(done(call.service.propose(call.caller.request(), command).await?.revision))
}

async fn drain(call: Call) -> Result<Response, Refusal> {
    carry_out(&call, Command::DrainNode { node: call.id("node", "node")? }).await
}

async fn activate(call: Call) -> Result<Response, Refusal> {
    carry_out(&call, Command::ActivateNode { node: call.id("node", "node")? }).await
}

async fn cordon(call: Call) -> Result<Response, Refusal> {
    carry_out(&call, Command::CordonNode { node: call.id("node", "node")? }).await
}

async fn quarantine(call: Call) -> Result<Response, Refusal> {
    carry_out(&call, Command::QuarantineNode { node: call.id("node", "node")? }).await
}

async fn confirm_node(call: Call, Body(body): Body<ConfirmRemovals>) -> Result<Response, Refusal> {
    let agent = AgentRef::Node(call.id("node", "node")?);
    carry_out(&call, Command::ConfirmRemovals { agent, through: body.through }).await
}

async fn confirm_edge(call: Call, Body(body): Body<ConfirmRemovals>) -> Result<Response, Refusal> {
    let agent = AgentRef::Edge(call.id("edge", "edge")?);
    carry_out(&call, Command::ConfirmRemovals { agent, through: body.through }).await
}
