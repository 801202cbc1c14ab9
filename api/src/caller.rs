//! Who calls, and the one place where that is decided (I9, I11).
//!
//! A token is looked up by its digest in this member's state. Requests that change something may rely on a member that
//! lags: the command itself is refused, in log order, once the token was revoked. Requests that only read look the
//! token up again in the view that they read from, so a linearizable read sees every acknowledged revocation.

use crate::endpoint::Need;
use crate::problem::Refusal;
use crate::service::{RequestInfo, Service};
use holdfast_identity::{PeerIdentity, Role as PeerRole, Token as Secret, TokenKind as SecretKind};
use holdfast_model::command::AgentRef;
use holdfast_model::resource::{Token, TokenKind};
use holdfast_model::{Actor, Code, Digest, MemberId, OrgId, RequestId, Timestamp};
use holdfast_store::{View, Views};
use std::net::IpAddr;

/// Whom a verified certificate names, and for how long. A connection may outlive the certificate that it began with;
/// the trust in it does not (I11).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its holder.
    pub identity: PeerIdentity,
    /// When the certificate ends.
    pub not_after: Timestamp,
}

/// What a connection and a request say of themselves, before any of it is believed.
#[derive(Clone, Debug)]
pub struct Claims {
    /// Whom the peer's verified certificate names, if it showed one.
    pub peer: Option<Peer>,
    /// The peer's address.
    pub source: Option<IpAddr>,
    /// The digest of the bearer token, if there is one that has a token's form.
    pub token: Option<Digest>,
    /// The request's id.
    pub request_id: RequestId,
    /// The caller's idempotency key.
    pub idempotency_key: Option<String>,
    /// When the request came in.
    pub now: Timestamp,
}

/// Somebody who may call what they call.
#[derive(Clone, Debug)]
pub struct Caller {
    request: RequestInfo,
    kind: CallerKind,
    /// When the certificate ends, for callers that are known by one.
    certified_until: Option<Timestamp>,
}

/// What kind of caller it is.
#[derive(Clone, Debug)]
pub enum CallerKind {
    /// Nobody in particular: the endpoint needs nothing.
    Anyone,
    /// The holder of a token.
    Token(Box<Token>),
    /// An agent.
    Agent(AgentRef),
    /// A member.
    Member(MemberId),
}

impl Caller {
    /// The request.
    pub const fn request(&self) -> &RequestInfo {
        &self.request
    }

    /// What kind of caller it is.
    pub const fn kind(&self) -> &CallerKind {
        &self.kind
    }

    /// The token, for endpoints that need one.
    ///
    /// # Errors
    /// When the endpoint was declared without.
    pub fn token(&self) -> Result<&Token, Refusal> {
        match &self.kind {
            CallerKind::Token(token) => Ok(token),
            _ => Err(unauthenticated()),
        }
    }

    /// The agent, for endpoints that need one.
    ///
    /// # Errors
    /// When the endpoint was declared without.
    pub fn agent(&self) -> Result<AgentRef, Refusal> {
        match self.kind {
            CallerKind::Agent(agent) => Ok(agent),
            _ => Err(unauthenticated()),
        }
    }

    /// The org that the caller is bound to; `None` for operators, who may see all.
    pub const fn org(&self) -> Option<OrgId> {
        self.request.actor_org
    }

    /// Whether something of this org exists for the caller. Every read of a resource passes here (I9).
    pub fn sees(&self, org: OrgId) -> bool {
        match &self.kind {
            CallerKind::Token(token) => match token.kind {
                TokenKind::Operator => true,
                TokenKind::Org(own) => own == org,
            },
            _ => false,
        }
    }

    /// `resource`, if it exists and the caller sees its org; else the same answer for both (I9).
    ///
    /// # Errors
    /// Not found.
    pub fn visible<T>(
        &self,
        what: &'static str,
        resource: Option<T>,
        org: impl Fn(&T) -> OrgId,
    ) -> Result<T, Refusal> {
        resource.filter(|r| self.sees(org(r))).ok_or_else(|| Refusal::not_found(what))
    }
}

/// The digest under which a bearer token is stored, if the text has a token's form.
pub fn bearer_digest(header: &str) -> Option<Digest> {
    let (scheme, text) = header.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let secret = Secret::parse(text.trim()).ok()?;
    match secret.kind() {
        SecretKind::Operator | SecretKind::Access => Some(Digest(*secret.digest().as_bytes())),
        _ => None,
    }
}

/// Decides whether `claims` satisfy `need`, by this member's state.
///
/// # Errors
/// [`Code::Unauthenticated`] or [`Code::Forbidden`].
pub async fn admit(service: &Service, need: Need, claims: &Claims) -> Result<Caller, Refusal> {
    let request = |actor, actor_org| RequestInfo {
        actor,
        actor_org,
        source: claims.source,
        request_id: claims.request_id,
        idempotency_key: claims.idempotency_key.clone(),
        now: claims.now,
        entropy: crate::service::entropy(),
    };
    match need {
        Need::Nothing | Need::EnrolmentSecret => {
            let request = request(Actor::System(service.member), None);
            Ok(Caller { request, kind: CallerKind::Anyone, certified_until: None })
        }
        Need::AnyToken | Need::Scope(_) | Need::Operator(_) => {
            let digest = claims.token.ok_or_else(unauthenticated)?;
            let token = match find_token(&service.view()?, &digest, claims.now)? {
                Some(token) => token,
                // Perhaps it was made a moment ago and this member has not seen it yet.
                None => {
                    service.consensus.linearize().await?;
                    find_token(&service.view()?, &digest, claims.now)?.ok_or_else(unauthenticated)?
                }
            };
            check_scope(need, &token)?;
            let (actor, org) = match token.kind {
                TokenKind::Operator => (Actor::Operator(token.id), None),
                TokenKind::Org(org) => (Actor::Token(token.id), Some(org)),
            };
            let kind = CallerKind::Token(Box::new(token));
            Ok(Caller { request: request(actor, org), kind, certified_until: None })
        }
        Need::Agent => {
            let peer = certified(service, claims)?;
            let agent = agent_of(&peer.identity)?;
            if welcome_agent(&service.view()?, agent).is_err() {
                service.consensus.linearize().await?;
                welcome_agent(&service.view()?, agent)?;
            }
            let actor = match agent {
                AgentRef::Node(id) => Actor::Node(id),
                AgentRef::Edge(id) => Actor::Edge(id),
            };
            let (request, kind) = (request(actor, None), CallerKind::Agent(agent));
            Ok(Caller { request, kind, certified_until: Some(peer.not_after) })
        }
        Need::Member => {
            let peer = certified(service, claims)?;
            if peer.identity.role != PeerRole::Member {
                return Err(unauthenticated());
            }
            let member = peer.identity.id.parse().map_err(|_| unauthenticated())?;
            if !member_is_welcome(&service.view()?, member)? {
                service.consensus.linearize().await?;
                if !member_is_welcome(&service.view()?, member)? {
                    return Err(unauthenticated());
                }
            }
            let (request, kind) = (request(Actor::System(member), None), CallerKind::Member(member));
            Ok(Caller { request, kind, certified_until: Some(peer.not_after) })
        }
    }
}

/// Checks again, in a view that the caller is about to be answered from, that its token still holds (I11).
///
/// # Errors
/// [`Code::Unauthenticated`] when it was revoked, ended, or its agent or member is no longer welcome;
/// [`Code::Quarantined`] when an operator cut its agent off.
pub fn still_holds(caller: &Caller, view: &View, now: Timestamp) -> Result<(), Refusal> {
    let holds = match &caller.kind {
        CallerKind::Anyone => true,
        CallerKind::Member(member) => member_is_welcome(view, *member)?,
        CallerKind::Token(token) => view.token(token.id)?.is_some_and(|t| is_valid(&t, now)),
        CallerKind::Agent(agent) => {
            welcome_agent(view, *agent)?;
            true
        }
    };
    let certified = caller.certified_until.is_none_or(|until| now < until);
    if holds && certified { Ok(()) } else { Err(unauthenticated()) }
}

fn unauthenticated() -> Refusal {
    Refusal::new(
        Code::Unauthenticated,
        "The request carries no credential that is valid now; run `holdfast login` with a current token.",
    )
}

fn find_token(view: &View, digest: &Digest, now: Timestamp) -> Result<Option<Token>, Refusal> {
    Ok(view.token_by_digest(digest)?.filter(|t| is_valid(t, now)))
}

fn is_valid(token: &Token, now: Timestamp) -> bool {
    token.revoked_at.is_none() && now < token.expires_at
}

fn check_scope(need: Need, token: &Token) -> Result<(), Refusal> {
    let scope = match need {
        Need::Scope(scope) => scope,
        Need::Operator(scope) if token.kind == TokenKind::Operator => scope,
        Need::Operator(scope) => return Err(forbidden(scope.as_str())),
        _ => return Ok(()),
    };
    if token.scopes.contains(scope) { Ok(()) } else { Err(forbidden(scope.as_str())) }
}

fn forbidden(scope: &str) -> Refusal {
    Refusal::new(Code::Forbidden, format!("The token does not carry the scope {scope}; use one that does."))
        .with("scope", scope)
}

/// The peer, if it showed a certificate of this cluster that has not ended since.
fn certified<'c>(service: &Service, claims: &'c Claims) -> Result<&'c Peer, Refusal> {
    let own = service.cluster.to_string();
    let peer = claims.peer.as_ref().filter(|p| p.identity.cluster == own && claims.now < p.not_after);
    peer.ok_or_else(unauthenticated)
}

fn agent_of(peer: &PeerIdentity) -> Result<AgentRef, Refusal> {
    match peer.role {
        PeerRole::Node => peer.id.parse().map(AgentRef::Node).map_err(|_| unauthenticated()),
        PeerRole::Edge => peer.id.parse().map(AgentRef::Edge).map_err(|_| unauthenticated()),
        _ => Err(unauthenticated()),
    }
}

/// Whether a member may ask, by its resource.
fn member_is_welcome(view: &View, member: MemberId) -> Result<bool, Refusal> {
    Ok(view.member(member)?.is_some_and(|m| !m.removed))
}

/// Lets an agent in, by its resource.
fn welcome_agent(view: &View, agent: AgentRef) -> Result<(), Refusal> {
    use holdfast_model::resource::NodeState;
    let welcome = match agent {
        AgentRef::Node(id) => match view.node(id)?.map(|node| node.state) {
            // Said to the agent itself, which has shown its certificate: an honest one cuts its instances off.
            Some(NodeState::Quarantined) => {
                let detail = "This host was quarantined; keep it for who looks into it, then wipe it and join it under another name.";
                return Err(Refusal::new(Code::Quarantined, detail));
            }
            state => state.is_some_and(|state| state != NodeState::Disabled),
        },
        AgentRef::Edge(id) => view.edge(id)?.is_some_and(|e| !e.disabled),
    };
    if welcome { Ok(()) } else { Err(unauthenticated()) }
}
