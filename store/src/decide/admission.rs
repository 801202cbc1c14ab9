//! Who may ask for anything at all, as the log sees it: a token that was revoked before this entry is refused here,
//! even if the member that took the request did not know yet (I11). Scopes are the API's to check.

use super::{Refusal, absent, refuse};
use crate::error::StoreError;
use crate::overlay::Draft;
use crate::views::Views;
use holdfast_model::resource::{App, Env, Token, TokenKind};
use holdfast_model::{Actor, AppId, Code, Command, EnvId, OrgId, TokenId};

/// Refuses callers that the state does not know, or no longer trusts, and what the cluster's version does not have.
pub(super) fn admit(draft: &Draft<'_>, command: &Command) -> Result<(), Refusal> {
    if matches!(command, Command::InitCluster { .. } | Command::BeginCluster { .. }) {
        return Ok(());
    }
    let Some(cluster) = draft.cluster()? else {
        return Err(refuse(
            Code::FailedPrecondition,
            "The cluster is not initialised yet: run `holdfast server init` on its first member.",
        ));
    };
    admit_actor(draft, command)?;
    Ok(command.allowed_at(cluster.version)?)
}

fn admit_actor(draft: &Draft<'_>, command: &Command) -> Result<(), Refusal> {
    let clockwork = matches!(
        command,
        Command::Tick
            | Command::ReportSilence { .. }
            | Command::VerifyDigest { .. }
            | Command::BeginIncarnation { .. }
            | Command::AdvanceLogTime { .. }
            | Command::RaiseClusterVersion { .. }
            | Command::CreateEnvelope { .. }
            | Command::ResealEnvelope { .. }
    );
    match draft.context().actor {
        Actor::System(_) => Ok(()),
        _ if clockwork => Err(unknown_caller()),
        Actor::Operator(token) | Actor::Token(token) => admit_token(draft, token),
        Actor::Node(id) => {
            let node = draft.node(id)?;
            let trusted = node.is_some_and(|n| n.is_trusted());
            let own = matches!(
                command,
                Command::ReportInstances { .. }
                    | Command::ReportNode { .. }
                    | Command::ReportVolumesErased { .. }
                    | Command::ReportSnapshots { .. }
            );
            if trusted && own { Ok(()) } else { Err(unknown_caller()) }
        }
        Actor::Edge(_) | Actor::User(_) | Actor::Service(_) => Err(unknown_caller()),
        Actor::Enrolling(_) if matches!(command, Command::Enrol { .. }) => Ok(()),
        Actor::Enrolling(_) => Err(unknown_caller()),
    }
}

fn unknown_caller() -> Refusal {
    refuse(Code::Unauthenticated, "The credential is not valid for this: log in again, or enrol again.")
}

fn admit_token(draft: &Draft<'_>, id: TokenId) -> Result<(), Refusal> {
    let context = draft.context();
    let Some(token) = draft.token(id)? else { return Err(unknown_caller()) };
    let org = match token.kind {
        TokenKind::Operator => None,
        TokenKind::Org(org) => Some(org),
    };
    let valid = token.revoked_at.is_none() && token.expires_at > context.now && org == context.actor_org;
    if valid { Ok(()) } else { Err(unknown_caller()) }
}

/// The token that asks, if a token does.
pub(super) fn asking_token(draft: &Draft<'_>) -> Result<Option<Token>, StoreError> {
    match draft.context().actor {
        Actor::Operator(token) | Actor::Token(token) => draft.token(token),
        _ => Ok(None),
    }
}

/// Whether the caller may know of an org's things.
pub(super) fn sees(draft: &Draft<'_>, org: OrgId) -> bool {
    draft.context().actor_org.is_none_or(|own| own == org)
}

/// The app, if the caller may know of it.
pub(super) fn app(draft: &Draft<'_>, id: AppId) -> Result<App, Refusal> {
    draft.app(id)?.filter(|app| sees(draft, app.org)).ok_or_else(|| absent("app"))
}

/// The env, if the caller may know of it.
pub(super) fn env(draft: &Draft<'_>, id: EnvId) -> Result<Env, Refusal> {
    draft.env(id)?.filter(|env| sees(draft, env.org)).ok_or_else(|| absent("env"))
}

/// Refuses tenants what is the cluster's own: to them it does not exist (I9).
pub(super) fn cluster_only(draft: &Draft<'_>, what: &'static str) -> Result<(), Refusal> {
    if draft.context().actor_org.is_none() { Ok(()) } else { Err(absent(what)) }
}
