//! How a cluster is made: as an operator does it, a first member and then others that enrol. Raft's membership follows by
//! itself, by the members' clockwork.

use std::time::Duration;

use axum::http::StatusCode;
use holdfast_identity::{Token, TokenKind as SecretKind};
use holdfast_model::api::Answer;
use holdfast_model::command::{Joiner, NewCluster, NewMember, NewToken};
use holdfast_model::limits::TOKEN_MS_MAX;
use holdfast_model::resource::{App, Enrolled, Env, Org, Release, Route, TokenKind};
use holdfast_model::{
    Actor, AppId, Command, Context, Digest, EdgeId, EnvId, Incarnation, MemberId, NodeId, OrgId, Output,
    Proposal, RequestId, Scope, Timestamp, TokenId,
};
use holdfast_raft::MemberNode;
use holdfast_store::Views;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::api_member::{self, ApiMember, Cluster};
use crate::client::{self, Account};
use crate::deployer::Estate;
use crate::edges::FIRST_EDGE;
use crate::machine;
use crate::nodes::CAPACITY;

/// How long an enrolment is.
const ENROLMENT_MS: u64 = 24 * 3_600_000;
/// Between two looks at the membership.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The number of the first node's enrolment: beyond those of members.
const FIRST_NODE: u64 = 1_000;
/// The operator's secret.
const SECRET: [u8; 32] = *b"a secret that everyone may know.";

/// Edges of every cluster.
const EDGES: u64 = 2;
/// Routes of the app that has most of them: enough that an edge holds their removal back, whatever clients have made.
const CROWD: usize = 12;
/// What the nodes of the cluster may be told to run, in two releases that differ by a variable.
const SHOP: &str = r#"
schema_version = "v1"
[app]
name = "shop"
[processes.web]
resources = { memory = "64Mi", cpu = 0.5 }
scaling = { min = 0, max = 4 }
restart = { policy = "always", max_retries = 3, backoff = "500ms" }
"#;

/// What was made.
pub(crate) struct Made {
    pub(crate) account: Account,
    /// What there is to deploy, where there are nodes.
    pub(crate) estate: Option<Estate>,
    pub(crate) nodes: Vec<NodeId>,
}

/// Makes the cluster on its first member. Ends when all vote, and so many nodes have enrolled.
pub(crate) async fn make_cluster(
    cluster: Cluster,
    first: ApiMember,
    nodes: Vec<(u64, MemberNode)>,
    agents: usize,
) -> Result<Made, String> {
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
    propose(&first, new.at(cluster.version), 1, Actor::System(MemberId(1))).await?;
    let view = first.consensus.store().view().map_err(|e| failed(&e))?;
    let token =
        view.token_by_digest(&digest).map_err(|e| failed(&e))?.ok_or("the operator's token is missing")?;
    drop(view);
    let secret = secret.reveal().to_string();
    let maker = Maker { first: &first, secret: &secret };
    let org = maker.org("sim").await?;
    let (crowded, crowded_env) = maker.env(org, "crowded").await?;
    for number in 0..CROWD {
        maker.route(crowded_env, &format!("crowd-{number}.example")).await?;
    }
    let rival = maker.org("rival").await?;
    let envs = vec![maker.env(org, "routed").await?.1, maker.env(rival, "routed").await?.1];
    let votes = nodes.len();
    for (id, node) in nodes.into_iter().skip(1) {
        match enrol(&first, token.id, id, Joiner::Member(new_member(id, node)?)).await? {
            Enrolled::Member(given) if given == MemberId(id) => {}
            other => return Err(format!("host {id} enrolled as {other:?}")),
        }
    }
    let mut edges: Vec<EdgeId> = Vec::new();
    for id in FIRST_EDGE..FIRST_EDGE + EDGES {
        let name = format!("edge-{id}").parse().map_err(|_| failed(&"an edge's name"))?;
        match enrol(&first, token.id, id, Joiner::Edge { name }).await? {
            Enrolled::Edge(edge) => edges.push(edge),
            other => return Err(format!("edge {id} enrolled as {other:?}")),
        }
    }
    while first.consensus.status().voters.len() < votes {
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    let mut ids = Vec::new();
    for number in 0..agents {
        let name = format!("node-{number}").parse().map_err(|_| failed(&"a node's name"))?;
        let joiner = Joiner::Node { name, capacity: CAPACITY };
        match enrol(&first, token.id, FIRST_NODE + number as u64, joiner).await? {
            Enrolled::Node(id) => ids.push(id),
            other => return Err(format!("node {number} enrolled as {other:?}")),
        }
    }
    let estate = if agents > 0 { Some(maker.estate(org).await?) } else { None };
    let account = Account { operator: token.id, secret, org, envs, crowded, edges };
    Ok(Made { account, estate, nodes: ids })
}

/// Makes what clients find there, through the API of the first member.
struct Maker<'a> {
    first: &'a ApiMember,
    secret: &'a str,
}

impl Maker<'_> {
    async fn made<T: DeserializeOwned>(&self, path: &str, body: String) -> Result<T, String> {
        let key = Digest::of(format!("{path} {body}").as_bytes()).to_string();
        let request = api_member::request("POST", path, self.secret, Some(&key), Some(body))?;
        let (status, body) = self.first.ask(request).await?;
        if status != StatusCode::CREATED {
            return Err(format!("{path} was not made: {}", String::from_utf8_lossy(&body)));
        }
        let answer: Answer<T> = serde_json::from_slice(&body).map_err(|e| format!("{path}: {e}"))?;
        Ok(answer.item)
    }

    async fn org(&self, name: &str) -> Result<OrgId, String> {
        Ok(self.made::<Org>("/v1/orgs", json!({ "name": name }).to_string()).await?.id)
    }

    /// An app with an env that may have routes.
    async fn env(&self, org: OrgId, name: &str) -> Result<(AppId, EnvId), String> {
        let app: App =
            self.made(&format!("/v1/orgs/{org}/apps"), json!({ "name": name }).to_string()).await?;
        let env: Env =
            self.made(&format!("/v1/apps/{}/envs", app.id), json!({ "name": "prod" }).to_string()).await?;
        let digest = format!("sha256:{}", "ab".repeat(32));
        let image = json!({ "repository": "registry.example/hello", "digest": digest });
        let release = json!({ "image": image, "manifest": manifest(name) }).to_string();
        self.made::<Release>(&format!("/v1/envs/{}/releases", env.id), release).await?;
        Ok((app.id, env.id))
    }

    /// An app with two releases that differ by a variable.
    async fn estate(&self, org: OrgId) -> Result<Estate, String> {
        let app: App =
            self.made(&format!("/v1/orgs/{org}/apps"), json!({ "name": "shop" }).to_string()).await?;
        let env: Env =
            self.made(&format!("/v1/apps/{}/envs", app.id), json!({ "name": "prod" }).to_string()).await?;
        let mut releases = Vec::new();
        for number in 1..=2 {
            let digest = format!("sha256:{}", "ab".repeat(32));
            let manifest = format!("{SHOP}[processes.web.vars]\nRELEASE = \"{number}\"\n");
            let image = json!({ "repository": "registry.example/shop", "digest": digest });
            let body = json!({ "image": image, "manifest": manifest }).to_string();
            let release: Release = self.made(&format!("/v1/envs/{}/releases", env.id), body).await?;
            releases.push(release.id);
        }
        Ok(Estate { env: env.id, releases })
    }

    async fn route(&self, env: EnvId, hostname: &str) -> Result<(), String> {
        self.made::<Route>(&format!("/v1/envs/{env}/routes"), client::route_body(hostname)).await.map(drop)
    }
}

/// What the envs of an app run: a process with a port that routes lead to.
fn manifest(app: &str) -> String {
    format!(
        r#"
schema_version = "v1"
[app]
name = "{app}"
[processes.web]
resources = {{ memory = "64Mi" }}
ports = [{{ name = "https", internal = 8443 }}]
"#
    )
}

fn new_member(id: u64, node: MemberNode) -> Result<NewMember, String> {
    let name = format!("member-{id}").parse().map_err(|_| "a member's name is wrong")?;
    Ok(NewMember { name, raft_addr: node.raft_addr, api_addr: node.api_addr })
}

/// Enrols a host, and says as what.
async fn enrol(first: &ApiMember, operator: TokenId, id: u64, joiner: Joiner) -> Result<Enrolled, String> {
    let digest = Digest::of(format!("enrolment {id}").as_bytes());
    let number = u128::from(id) * 10;
    let create = Command::CreateEnrolment { kind: joiner.kind(), digest, ttl_ms: ENROLMENT_MS };
    propose(first, create, number, Actor::Operator(operator)).await?;
    let key = Digest::of(format!("key {id}").as_bytes());
    let enrol = Command::Enrol { digest, key, joiner };
    match propose(first, enrol, number + 1, Actor::System(MemberId(1))).await? {
        Output::Enrolled(enrolled) => Ok(enrolled),
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
