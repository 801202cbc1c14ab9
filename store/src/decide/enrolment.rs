//! How a cluster begins, and how members, nodes and edges join it.

use super::admission::cluster_only;
use super::{Decision, Refusal, refuse, token};
use crate::overlay::{Draft, Filing};
use crate::views::{Views, required};
use holdfast_model::command::{Joiner, NewMember, NewToken};
use holdfast_model::limits::ENROLMENT_MS_MAX;
use holdfast_model::node_prefix::ClusterPrefix;
use holdfast_model::resource::{
    Capacity, Cluster, Edge, Enrolled, Enrolment, EnrolmentKind, Member, Node, NodeState, TokenKind,
};
use holdfast_model::{
    AgentName, Aggregate, ClusterId, ClusterVersion, Code, Digest, EdgeId, EnrolmentId, EventPayload,
    Incarnation, MemberId, NodeId, Output, Revision,
};

/// The longest address of a member, in bytes.
const ADDRESS_BYTES_MAX: usize = 300;

pub(super) fn init_cluster(
    draft: &mut Draft<'_>,
    version: ClusterVersion,
    id: ClusterId,
    incarnation: Incarnation,
    member: &NewMember,
    operator: &NewToken,
) -> Decision {
    if draft.cluster()?.is_some() {
        return Err(refuse(
            Code::AlreadyInitialised,
            "The cluster exists already: use its tokens, or join it with an enrolment.",
        ));
    }
    if operator.kind != TokenKind::Operator {
        return Err(refuse(Code::InvalidRequest, "The first token must be an operator's."));
    }
    let cluster = Cluster {
        id,
        incarnation,
        prefix: ClusterPrefix::from_entropy(draft.fresh_id() << 48),
        nodes_enrolled: 0,
        members_enrolled: 0,
        version,
        created_at: draft.context().now,
    };
    let filing = Filing::cluster(Aggregate::Cluster(id));
    draft.emit(filing, EventPayload::ClusterInitialised(cluster))?;
    let enrolled = join_member(draft, member)?;
    token::issue(draft, operator)?;
    Ok(Output::Enrolled(enrolled))
}

pub(super) fn create(draft: &mut Draft<'_>, kind: EnrolmentKind, digest: Digest, ttl_ms: u64) -> Decision {
    cluster_only(draft, "cluster")?;
    let now = draft.context().now;
    if ttl_ms == 0 || ttl_ms > ENROLMENT_MS_MAX {
        return Err(refuse(
            Code::InvalidRequest,
            "An enrolment lasts between a millisecond and 24 hours: give another duration.",
        ));
    }
    if draft.enrolment_by_digest(&digest)?.is_some() {
        return Err(refuse(Code::InvalidRequest, "This enrolment secret was used before: draw a fresh one."));
    }
    let id = EnrolmentId::from_bits(draft.fresh_id());
    let expires_at = now.plus_ms(ttl_ms);
    let enrolment = Enrolment { id, kind, digest, expires_at, used: None, enrolled: None, created_at: now };
    let filing = Filing::cluster(Aggregate::Enrolment(id));
    draft.emit(filing, EventPayload::EnrolmentCreated(enrolment))?;
    Ok(Output::Enrolment(id))
}

pub(super) fn enrol(draft: &mut Draft<'_>, digest: Digest, key: Digest, joiner: &Joiner) -> Decision {
    let invalid = || {
        refuse(
            Code::EnrolmentInvalid,
            "The enrolment is unknown, used or over: ask an operator for a new one (`holdfast enrol create`).",
        )
    };
    let enrolment = draft.enrolment_by_digest(&digest)?.ok_or_else(invalid)?;
    let fits = match enrolment.kind {
        EnrolmentKind::Learner => joiner.kind() == EnrolmentKind::Member,
        kind => joiner.kind() == kind,
    };
    if !fits {
        return Err(invalid());
    }
    // The joiner may not have got the answer: the same key asks again and gets the same one.
    if let (Some((_, used_by)), Some(enrolled)) = (enrolment.used, enrolment.enrolled) {
        return if used_by == key { Ok(Output::Enrolled(enrolled)) } else { Err(invalid()) };
    }
    if enrolment.expires_at <= draft.context().now {
        return Err(invalid());
    }
    let enrolled = match joiner {
        Joiner::Member(member) => {
            let enrolled = join_member(draft, member)?;
            if let (EnrolmentKind::Learner, Enrolled::Member(member)) = (enrolment.kind, enrolled) {
                let filing = Filing::cluster(Aggregate::Member(member));
                draft.emit(filing, EventPayload::MemberVotesChanged { member, votes: false })?;
            }
            enrolled
        }
        Joiner::Node { name, capacity } => join_node(draft, name, *capacity)?,
        Joiner::Edge { name } => join_edge(draft, name)?,
    };
    let filing = Filing::cluster(Aggregate::Enrolment(enrolment.id));
    draft.emit(filing, EventPayload::EnrolmentUsed { enrolment: enrolment.id, key, enrolled })?;
    Ok(Output::Enrolled(enrolled))
}

fn taken(what: &str, name: &AgentName) -> Refusal {
    refuse(Code::NameTaken, format!("There is {what} called «{name}» already: choose another name."))
}

fn join_member(draft: &mut Draft<'_>, new: &NewMember) -> Result<Enrolled, Refusal> {
    if draft.member_by_name(&new.name)?.is_some() {
        return Err(taken("a member", &new.name));
    }
    let fits = |address: &str| {
        let port = address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then_some(port));
        address.len() <= ADDRESS_BYTES_MAX && port.is_some_and(|port| port.parse::<u16>().is_ok())
    };
    if !fits(&new.raft_addr) || !fits(&new.api_addr) {
        return Err(refuse(Code::InvalidRequest, "A member's addresses must have the form `host:port`."));
    }
    let cluster = required(draft.cluster()?, "a cluster")?;
    // Never reused: an id that came back with an empty log could vote twice.
    let id = MemberId(cluster.members_enrolled + 1);
    let member = Member {
        id,
        name: new.name.clone(),
        raft_addr: new.raft_addr.clone(),
        api_addr: new.api_addr.clone(),
        removed: false,
        created_at: draft.context().now,
    };
    draft.emit(Filing::cluster(Aggregate::Member(id)), EventPayload::MemberEnrolled(member))?;
    Ok(Enrolled::Member(id))
}

fn join_node(draft: &mut Draft<'_>, name: &AgentName, capacity: Capacity) -> Result<Enrolled, Refusal> {
    if draft.node_by_name(name)?.is_some() {
        return Err(taken("a node", name));
    }
    let cluster = required(draft.cluster()?, "a cluster")?;
    let Some(number) = cluster.nodes_enrolled.checked_add(1) else {
        return Err(refuse(
            Code::FailedPrecondition,
            "The cluster's address space has no room for another node: begin a second cluster.",
        ));
    };
    let id = NodeId::from_bits(draft.fresh_id());
    let node = Node {
        id,
        name: name.clone(),
        state: NodeState::Active,
        capacity,
        prefix: cluster.prefix.node(number),
        addresses_given: 0,
        vmm: None,
        confirmed_through: Revision(0),
        silent_since: None,
        version: 1,
        created_at: draft.context().now,
    };
    draft.emit(Filing::cluster(Aggregate::Node(id)), EventPayload::NodeEnrolled(node))?;
    Ok(Enrolled::Node(id))
}

fn join_edge(draft: &mut Draft<'_>, name: &AgentName) -> Result<Enrolled, Refusal> {
    if draft.edge_by_name(name)?.is_some() {
        return Err(taken("an edge", name));
    }
    let id = EdgeId::from_bits(draft.fresh_id());
    let edge = Edge {
        id,
        name: name.clone(),
        disabled: false,
        confirmed_through: Revision(0),
        version: 1,
        created_at: draft.context().now,
    };
    draft.emit(Filing::cluster(Aggregate::Edge(id)), EventPayload::EdgeEnrolled(edge))?;
    Ok(Enrolled::Edge(id))
}
