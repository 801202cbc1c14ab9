//! `holdfast status`: the cluster, its members, nodes and edges, and what agents hold back.

use crate::failure::Failure;
use crate::output::{age, or_dash, table, word};
use crate::session::Session;
use holdfast_model::api::{ClusterStatus, Contact, EdgeStatus, MemberStatus, NodeStatus};
use serde::Serialize;

#[derive(Serialize)]
struct Status {
    cluster: ClusterStatus,
    nodes: Vec<NodeStatus>,
    edges: Vec<EdgeStatus>,
}

pub(crate) async fn run(session: &Session) -> Result<(), Failure> {
    let status = Status {
        cluster: session.client.cluster().await?.item,
        nodes: session.client.nodes().await?.items,
        edges: session.client.edges().await?.items,
    };
    session.output.show(&status, || text(&status))
}

fn text(status: &Status) -> String {
    let cluster = &status.cluster;
    let mut parts = vec![format!(
        "Cluster {} · incarnation {} · version {} · term {} · applied {} · answered by member {}",
        cluster.cluster, cluster.incarnation, cluster.version, cluster.term, cluster.applied, cluster.member
    )];
    let members = cluster.members.iter().map(|m| member(m, cluster));
    parts.push(table(["MEMBER", "ID", "ROLE", "LEADER", "API", "RAFT", "SUPPORTS"], members));
    parts.push(nodes(&status.nodes));
    parts.push(edges(&status.edges));
    let held = held(status);
    if !held.is_empty() {
        parts.push(held);
    }
    parts.join("\n\n")
}

fn member(status: &MemberStatus, cluster: &ClusterStatus) -> [String; 7] {
    let leads = cluster.leader == Some(status.member.id);
    [
        status.member.name.to_string(),
        status.member.id.to_string(),
        word(&status.role),
        if leads { "leader".into() } else { "-".into() },
        status.member.api_addr.clone(),
        status.member.raft_addr.clone(),
        or_dash(status.supported),
    ]
}

/// The table of nodes, which `holdfast node list` shows too.
pub(crate) fn nodes(nodes: &[NodeStatus]) -> String {
    let rows = nodes.iter().map(|status| {
        [
            status.node.name.to_string(),
            word(&status.node.state),
            status.instances.to_string(),
            format!("{}/{} MiB", status.memory_mib_used, status.node.capacity.memory_mib),
            format!("{}/{} m", status.cpu_milli_used, status.node.capacity.cpu_milli),
            or_dash(status.disk.map(|disk| format!("{}/{} MiB", disk.free_mib, disk.total_mib))),
            heard(status.contact.as_ref()),
            revision(status.contact.as_ref()),
            or_dash(status.node.vmm.as_deref().map(vmm_chosen)),
        ]
    });
    let table =
        table(["NODE", "STATE", "INSTANCES", "MEMORY", "CPU", "DISK FREE", "HEARD", "REVISION", "VMM"], rows);
    // What the probe found is a sentence or more: below the table, not in it.
    let verdicts = nodes.iter().filter_map(|s| Some(format!("\n{}: {}", s.node.name, s.node.vmm.as_ref()?)));
    format!("{table}{}", verdicts.collect::<String>())
}

/// The VMM that a verdict names, which says it before its reasons.
fn vmm_chosen(verdict: &str) -> &str {
    verdict.split_once(": ").map_or(verdict, |(chosen, _)| chosen)
}

/// The table of edges, which `holdfast edge list` shows too.
pub(crate) fn edges(edges: &[EdgeStatus]) -> String {
    let rows = edges.iter().map(|status| {
        [
            status.edge.name.to_string(),
            if status.edge.disabled { "disabled".into() } else { "active".into() },
            heard(status.contact.as_ref()),
            revision(status.contact.as_ref()),
        ]
    });
    table(["EDGE", "STATE", "HEARD", "REVISION"], rows)
}

fn heard(contact: Option<&Contact>) -> String {
    contact.map_or_else(|| "never".into(), |c| format!("{} ago", age(c.at)))
}

fn revision(contact: Option<&Contact>) -> String {
    or_dash(contact.map(|c| c.applied))
}

/// Updates that agents hold back, and how to let them go.
fn held(status: &Status) -> String {
    let nodes = status.nodes.iter().map(|s| ("node", &s.node.name, s.contact));
    let edges = status.edges.iter().map(|s| ("edge", &s.edge.name, s.contact));
    let held = nodes.chain(edges).filter_map(|(kind, name, contact)| Some((kind, name, contact?.held?)));
    let lines = held.map(|(kind, name, held)| {
        format!(
            "{kind} {name} holds back revision {}: it would remove {} of {}. Let it: holdfast confirm {kind} {name} --through {}",
            held.revision, held.removes, held.of, held.revision
        )
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_model::agent::{Disk, Held};
    use holdfast_model::api::MemberRole;
    use holdfast_model::resource::{Capacity, Edge, Member, Node, NodeState};
    use holdfast_model::{
        ClusterId, ClusterVersion, EdgeId, Incarnation, MemberId, NodeId, Revision, SupportedVersions,
        Timestamp,
    };

    fn status() -> Status {
        let contact = Contact {
            at: Timestamp(u64::MAX),
            member: MemberId(1),
            applied: Revision(40),
            held: Some(Held { revision: Revision(41), removes: 9, of: 10 }),
        };
        let member = Member {
            id: MemberId(1),
            name: "alpha".parse().unwrap(),
            raft_addr: "10.0.0.1:7444".into(),
            api_addr: "10.0.0.1:7443".into(),
            removed: false,
            created_at: Timestamp(0),
        };
        let node = Node {
            id: NodeId::from_bits(1),
            name: "n1".parse().unwrap(),
            state: NodeState::Active,
            capacity: Capacity { memory_mib: 4096, cpu_milli: 2000 },
            prefix: holdfast_model::node_prefix::ClusterPrefix::from_entropy(1).node(1),
            addresses_given: 2,
            vmm: Some("qemu-tcg: qemu-kvm fails; qemu-tcg boots in 631 ms".into()),
            confirmed_through: Revision(0),
            silent_since: None,
            version: 1,
            created_at: Timestamp(0),
        };
        let edge = Edge {
            id: EdgeId::from_bits(1),
            name: "e1".parse().unwrap(),
            disabled: false,
            confirmed_through: Revision(0),
            version: 1,
            created_at: Timestamp(0),
        };
        Status {
            cluster: ClusterStatus {
                cluster: ClusterId::from_bits(1),
                incarnation: Incarnation(1),
                version: ClusterVersion(2),
                member: MemberId(1),
                leader: Some(MemberId(1)),
                term: 2,
                applied: 99,
                members: vec![MemberStatus {
                    member,
                    role: MemberRole::Voter,
                    supported: Some(SupportedVersions {
                        oldest: ClusterVersion(1),
                        newest: ClusterVersion(2),
                    }),
                }],
            },
            nodes: vec![NodeStatus {
                node,
                instances: 2,
                memory_mib_used: 256,
                cpu_milli_used: 2000,
                contact: Some(contact),
                disk: Some(Disk { total_mib: 40_000, free_mib: 700 }),
            }],
            edges: vec![EdgeStatus { edge, contact: None }],
        }
    }

    #[test]
    fn golden_text() {
        let expected = "\
Cluster cluster_00000000000000000000000001 · incarnation 1 · version 2 · term 2 · applied 99 · answered by member 1

MEMBER  ID  ROLE   LEADER  API            RAFT           SUPPORTS
alpha   1   voter  leader  10.0.0.1:7443  10.0.0.1:7444  1-2

NODE  STATE   INSTANCES  MEMORY        CPU          DISK FREE      HEARD   REVISION  VMM
n1    active  2          256/4096 MiB  2000/2000 m  700/40000 MiB  0s ago  40        qemu-tcg
n1: qemu-tcg: qemu-kvm fails; qemu-tcg boots in 631 ms

EDGE  STATE   HEARD  REVISION
e1    active  never  -

node n1 holds back revision 41: it would remove 9 of 10. Let it: holdfast confirm node n1 --through 41";
        assert_eq!(text(&status()), expected);
    }
}
