//! What handlers stand on: reads at a revision, proposals with their context, and the few things that only the edge of
//! the system may do – read the clock and draw randomness.

use crate::caller::Caller;
use crate::contacts::Contacts;
use crate::exec::Desk;
use crate::problem::Refusal;
use holdfast_identity::{Authority, KeyRing, Token, TokenKind};
use holdfast_model::api::Consistency;
use holdfast_model::limits::IDEMPOTENCY_KEY_BYTES_MAX;
use holdfast_model::{
    Accepted, Actor, ClusterId, Code, Command, Context, Digest, MemberId, OrgId, Proposal, RequestId,
    Revision, Timestamp,
};
use holdfast_raft::Consensus;
use holdfast_store::{Store, View};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// How long a member waits to have applied what it was just told is committed.
pub const CATCH_UP_MS_MAX: u64 = 5_000;

/// What secrets that the API hands out are derived from. The same on every member, so that a retry on another member
/// shows the same secret; known to no one else.
pub struct SecretSeed(Zeroizing<[u8; 32]>);

impl SecretSeed {
    /// Derived from the CA's key, which only members hold.
    pub fn of(authority: &Authority) -> Self {
        let pem = authority.to_pem();
        Self(Zeroizing::new(Digest::keyed("holdfast 2026 secret seed v1", pem.as_bytes()).0))
    }

    /// A digest of bytes that may be guessed, of use to members only.
    pub(crate) fn fingerprint(&self, bytes: &[u8]) -> Digest {
        let mut input = Zeroizing::new(Vec::with_capacity(self.0.len() + bytes.len()));
        input.extend_from_slice(&self.0[..]);
        input.extend_from_slice(bytes);
        Digest::keyed("holdfast 2026 asked content v1", &input)
    }

    /// The secret that belongs to this request: to this caller and idempotency key, or to the request alone.
    pub fn token(&self, kind: TokenKind, request: &RequestInfo) -> Token {
        let mut input = Zeroizing::new(Vec::with_capacity(256));
        input.extend_from_slice(&self.0[..]);
        let whose = match &request.idempotency_key {
            Some(key) => format!("{kind:?} {:?} {:?} key {key}", request.actor, request.actor_org),
            None => format!("{kind:?} request {} {}", request.request_id, request.entropy),
        };
        input.extend_from_slice(whose.as_bytes());
        Token::from_secret(kind, Digest::keyed("holdfast 2026 derived secret v1", &input).0)
    }
}

/// A request, as far as a command's context needs it.
#[derive(Clone, Debug)]
pub struct RequestInfo {
    /// Who asks.
    pub actor: Actor,
    /// Within which org.
    pub actor_org: Option<OrgId>,
    /// From where.
    pub source: Option<IpAddr>,
    /// Its id.
    pub request_id: RequestId,
    /// The caller's key.
    pub idempotency_key: Option<String>,
    /// When it came in.
    pub now: Timestamp,
    /// Fresh bits for its ids.
    pub entropy: u128,
}

impl RequestInfo {
    /// A request of the member's own clockwork.
    pub fn of_member(member: MemberId) -> Self {
        let now = now();
        Self {
            actor: Actor::System(member),
            actor_org: None,
            source: None,
            request_id: fresh_request_id(now),
            idempotency_key: None,
            now,
            entropy: entropy(),
        }
    }
}

impl RequestInfo {
    /// The command with this request's context.
    fn proposal(&self, command: Command) -> Proposal {
        let context = Context {
            actor: self.actor,
            actor_org: self.actor_org,
            source: self.source,
            request_id: self.request_id,
            idempotency_key: self.idempotency_key.clone(),
            now: self.now,
            entropy: self.entropy,
        };
        Proposal { context, command }
    }
}

/// The service behind every handler.
pub struct Service {
    /// The cluster.
    pub cluster: ClusterId,
    /// This member.
    pub member: MemberId,
    /// The replicated log.
    pub consensus: Arc<Consensus>,
    /// The cluster's CA.
    pub authority: Arc<Authority>,
    /// What is heard of agents.
    pub contacts: Arc<Contacts>,
    /// Exec sessions that this member passes on.
    pub exec: Arc<Desk>,
    /// Where handed-out secrets come from.
    pub seed: SecretSeed,
    /// The keys that open what is sealed to the cluster; a simulated member has none.
    pub keys: Option<Arc<KeyRing>>,
    /// The registries that it asks for people who deploy; none in a simulation.
    pub registries: Option<crate::registries::Inquiries>,
    /// How this member reaches the API of others.
    pub peers: crate::peers::Peers,
    /// Becomes true when the member stops: streams end.
    pub stopping: watch::Receiver<bool>,
}

impl Service {
    /// The store of this member.
    pub fn store(&self) -> &Arc<Store> {
        self.consensus.store()
    }

    /// A view that is as fresh as asked for (I3).
    ///
    /// # Errors
    /// When no majority answers, or the store fails.
    pub async fn read(&self, consistency: Consistency) -> Result<View, Refusal> {
        if consistency == Consistency::Linearizable {
            self.consensus.linearize().await?;
        }
        self.view()
    }

    /// What this member has now.
    ///
    /// # Errors
    /// When the store fails.
    pub fn view(&self) -> Result<View, Refusal> {
        Ok(self.store().view()?)
    }

    /// Proposes a command and waits until it is decided.
    ///
    /// # Errors
    /// The command's rejection, or that the cluster could not decide.
    pub async fn propose(&self, request: &RequestInfo, command: Command) -> Result<Accepted, Refusal> {
        // Here already: in the log it would stop the members that cannot read it.
        command.allowed_at(self.store().cluster_version())?;
        Ok(self.consensus.propose(request.proposal(command)).await??)
    }

    /// Proposes what this member concluded as leader. Refused when it no longer leads (I7).
    ///
    /// # Errors
    /// As [`propose`](Self::propose).
    pub async fn propose_as_leader(&self, command: Command) -> Result<Accepted, Refusal> {
        let request = RequestInfo::of_member(self.member);
        Ok(self.consensus.propose_as_leader(request.proposal(command)).await??)
    }

    /// Proposes on behalf of a caller, and answers a view that holds what was made.
    ///
    /// # Errors
    /// As [`propose`](Self::propose).
    pub async fn write(&self, caller: &Caller, command: Command) -> Result<(Accepted, View), Refusal> {
        let accepted = self.propose(caller.request(), command).await?;
        Ok((accepted.clone(), self.view_at_least(accepted.revision).await?))
    }

    /// A view that holds everything up to `revision`: this member may lag behind the one that decided.
    ///
    /// # Errors
    /// When this member does not catch up in time.
    pub async fn view_at_least(&self, revision: Revision) -> Result<View, Refusal> {
        let mut revisions = self.consensus.revisions();
        let caught_up = revisions.wait_for(|r| *r >= revision);
        match tokio::time::timeout(Duration::from_millis(CATCH_UP_MS_MAX), caught_up).await {
            Ok(Ok(_)) => self.view(),
            _ => Err(Refusal::new(
                Code::Timeout,
                format!(
                    "The change was made at revision {revision}, which this member has not applied yet; read again."
                ),
            )),
        }
    }
}

/// Resolves when the member stops. The guard that `watch` lends is dropped here, so that callers stay `Send`.
pub async fn told_to_stop(stopping: &mut watch::Receiver<bool>) {
    // An error means that the member is gone already.
    let _ = stopping.wait_for(|stop| *stop).await;
}

/// Resolves when the revision has passed `sent`; false when it never will.
pub async fn moved_past(revisions: &mut watch::Receiver<Revision>, sent: Revision) -> bool {
    revisions.wait_for(|r| *r > sent).await.is_ok()
}

/// The time, in milliseconds since the Unix epoch.
pub fn now() -> Timestamp {
    at(SystemTime::now())
}

/// A time as the state has times.
pub(crate) fn at(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// 128 random bits.
pub fn entropy() -> u128 {
    rand::random()
}

/// A fresh request id.
pub fn fresh_request_id(now: Timestamp) -> RequestId {
    let time = u128::from(now.0 & ((1 << 48) - 1)) << 80;
    RequestId::from_bits(time | (entropy() & ((1 << 80) - 1)))
}

/// Checks the form of a caller's idempotency key.
///
/// # Errors
/// When it is empty, too long, or holds anything but visible ASCII.
pub fn idempotency_key(text: &[u8]) -> Result<String, Refusal> {
    let ok = (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&text.len())
        && text.iter().all(|b| (0x21..0x7f).contains(b));
    match std::str::from_utf8(text) {
        Ok(key) if ok => Ok(key.to_owned()),
        _ => Err(Refusal::invalid("The Idempotency-Key header must be 1–128 visible ASCII characters.")),
    }
}
