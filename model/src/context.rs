//! Who asked, when, and the fresh bits that the answer may use. Drawn once, at the API; nothing later may draw them.

use crate::{
    Command, DeploymentId, Digest, EdgeId, EnrolmentId, MemberId, NodeId, OrgId, RequestId, ServiceId,
    Timestamp, TokenId, UserId,
};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Who does something.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// A person who runs the cluster, by their token.
    Operator(TokenId),
    /// A person of a tenant.
    User(UserId),
    /// A machine of a tenant.
    Service(ServiceId),
    /// A bearer token that stands for itself.
    Token(TokenId),
    /// A node agent, by its certificate.
    Node(NodeId),
    /// An edge agent, by its certificate.
    Edge(EdgeId),
    /// Somebody who holds a one-time enrolment secret.
    Enrolling(EnrolmentId),
    /// A member of the control plane, for its own clockwork.
    System(MemberId),
}

impl fmt::Display for Actor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator(id) => write!(f, "operator {id}"),
            Self::User(id) => write!(f, "{id}"),
            Self::Service(id) => write!(f, "{id}"),
            Self::Token(id) => write!(f, "{id}"),
            Self::Node(id) => write!(f, "{id}"),
            Self::Edge(id) => write!(f, "{id}"),
            Self::Enrolling(id) => write!(f, "{id}"),
            Self::System(id) => write!(f, "system (member {id})"),
        }
    }
}

/// What every command carries beside itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Context {
    /// Who asks.
    pub actor: Actor,
    /// The org that the actor's token is bound to; `None` for operators, agents and the system.
    pub actor_org: Option<OrgId>,
    /// From where.
    pub source: Option<IpAddr>,
    /// The request that this command answers. The same for every resend of one request.
    pub request_id: RequestId,
    /// The caller's idempotency key, within (org, actor) (I4).
    pub idempotency_key: Option<String>,
    /// The time, as the member that took the request read it.
    pub now: Timestamp,
    /// 128 random bits, from which fresh ids are derived.
    pub entropy: u128,
}

impl Context {
    /// The bits of the `n`th fresh id of this command: a ULID with this context's time, and randomness derived
    /// from its entropy. Every member derives the same one.
    pub fn fresh_id(&self, n: u32) -> u128 {
        let mut input = [0u8; 20];
        input[..16].copy_from_slice(&self.entropy.to_be_bytes());
        input[16..].copy_from_slice(&n.to_be_bytes());
        let digest = Digest::keyed("holdfast 2026 fresh id v1", &input);
        let mut random = [0u8; 16];
        random.copy_from_slice(&digest.0[..16]);
        // A ULID: 48 bits of milliseconds, 80 bits of randomness (github.com/ulid/spec).
        let time = u128::from(self.now.0 & ((1 << 48) - 1));
        (time << 80) | (u128::from_be_bytes(random) & ((1 << 80) - 1))
    }
}

/// What goes through the Raft log: a command and its context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// Who, when, and fresh bits.
    pub context: Context,
    /// What is asked.
    pub command: Command,
}

/// What ties events of one undertaking together.
pub type Correlation = DeploymentId;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fresh_ids_are_distinct_and_the_same_everywhere() {
        let context = Context {
            actor: Actor::System(MemberId(1)),
            actor_org: None,
            source: None,
            request_id: RequestId::from_bits(1),
            idempotency_key: None,
            now: Timestamp(1_700_000_000_000),
            entropy: 42,
        };
        let ids: std::collections::BTreeSet<u128> = (0..1000).map(|n| context.fresh_id(n)).collect();
        assert_eq!(ids.len(), 1000);
        assert_eq!(context.fresh_id(7), context.clone().fresh_id(7));
        assert!(ids.iter().all(|id| (id >> 80) == 1_700_000_000_000));
    }
}
