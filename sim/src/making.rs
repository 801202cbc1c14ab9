//! How a cluster is made: as an operator does it, a first member and then others that enrol. Raft's membership follows by
//! itself, by the members' clockwork.

use std::time::Duration;

use axum::http::StatusCode;
use holdfast_identity::{Token, TokenKind as SecretKind};
use holdfast_model::api::Answer;
use holdfast_model::command::{Joiner, NewCluster, NewMember, NewToken};
use holdfast_model::limits::TOKEN_MS_MAX;
use holdfast_model::resource::{Enrolled, EnrolmentKind, Org, TokenKind};
use holdfast_model::{
    Actor, ClusterVersion, Command, Context, Digest, Incarnation, MemberId, Output, Proposal, RequestId,
    Scope, Timestamp, TokenId,
};
use holdfast_raft::MemberNode;
use holdfast_store::Views;

use crate::api_member::{self, ApiMember, Cluster};
use crate::client::Account;
use crate::machine;

/// How long an enrolment is.
const ENROLMENT_MS: u64 = 24 * 3_600_000;
/// Between two looks at the membership.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The operator's secret.
const SECRET: [u8; 32] = *b"a secret that everyone may know.";

/// Makes the cluster on its first member. Ends when all vote.
pub(crate) async fn make_cluster(
    cluster: Cluster,
    first: ApiMember,
    nodes: Vec<(u64, MemberNode)>,
) -> Result<Account, String> {
    let failed = |error: &dyn std::fmt::Display| format!("making the cluster: {error}");
    let (_, node) = nodes[0].clone();
    first.consensus.bootstrap(node.clone()).await.map_err(|e| failed(&e))?;
    let secret = Token::from_secret(SecretKind::Operator, SECRET);
    let digest = Digest(*secret.digest().as_bytes());
    let operator = NewToken {
        name: "operator".parse().map_err(|_| failed(&"a name"))?,
        digest,
        kind: TokenKind::Operator,
        scopes: Scope::ALL.iter().copied().collect(),
        // Longer than clocks jump.
        ttl_ms: TOKEN_MS_MAX,
    };
    let member = new_member(1, node)?;
    let new = NewCluster { cluster: cluster.id, incarnation: Incarnation(1), member, operator };
    propose(&first, new.at(ClusterVersion::NEWEST), 1, Actor::System(MemberId(1))).await?;
    let view = first.consensus.store().view().map_err(|e| failed(&e))?;
    let token =
        view.token_by_digest(&digest).map_err(|e| failed(&e))?.ok_or("the operator's token is missing")?;
    drop(view);
    let secret = secret.reveal().to_string();
    let body = Some("{\"name\":\"sim\"}".to_owned());
    let request = api_member::request("POST", "/v1/orgs", &secret, Some("the-org"), body)?;
    let (status, body) = first.ask(request).await?;
    if status != StatusCode::CREATED {
        return Err(format!("an org was not made: {}", String::from_utf8_lossy(&body)));
    }
    let org: Answer<Org> = serde_json::from_slice(&body).map_err(|e| failed(&e))?;
    let votes = nodes.len();
    for (id, node) in nodes.into_iter().skip(1) {
        enrol(&first, token.id, id, Joiner::Member(new_member(id, node)?)).await?;
    }
    while first.consensus.status().voters.len() < votes {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    Ok(Account { operator: token.id, secret, org: org.item.id })
}

fn new_member(id: u64, node: MemberNode) -> Result<NewMember, String> {
    let name = format!("member-{id}").parse().map_err(|_| "a member's name is wrong")?;
    Ok(NewMember { name, raft_addr: node.raft_addr, api_addr: node.api_addr })
}

/// Enrols a member, which must get this id.
async fn enrol(first: &ApiMember, operator: TokenId, id: u64, joiner: Joiner) -> Result<(), String> {
    let digest = Digest::of(format!("enrolment {id}").as_bytes());
    let number = u128::from(id) * 10;
    let create = Command::CreateEnrolment { kind: EnrolmentKind::Member, digest, ttl_ms: ENROLMENT_MS };
    propose(first, create, number, Actor::Operator(operator)).await?;
    let key = Digest::of(format!("key {id}").as_bytes());
    let enrol = Command::Enrol { digest, key, joiner };
    match propose(first, enrol, number + 1, Actor::System(MemberId(1))).await? {
        Output::Enrolled(Enrolled::Member(given)) if given == MemberId(id) => Ok(()),
        other => Err(format!("host {id} enrolled as {other:?}")),
    }
}

async fn propose(member: &ApiMember, command: Command, number: u128, actor: Actor) -> Result<Output, String> {
    let context = Context {
        actor,
        actor_org: None,
        source: None,
        request_id: RequestId::from_bits(number),
        idempotency_key: None,
        now: Timestamp(machine::wall_ms()),
        entropy: number << 64,
    };
    let proposed = member.consensus.propose(Proposal { context, command }).await;
    let outcome = proposed.map_err(|error| error.to_string())?;
    outcome.map(|accepted| accepted.output).map_err(|rejection| format!("{rejection:?}"))
}
