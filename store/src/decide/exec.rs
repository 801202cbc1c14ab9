//! Exec grants: made for one caller, used once in log order, ended by whoever sees the session end or takes it away.
//!
//! A grant is fenced by its row, never by a clock or a lock alone: a use finds it unused in the log or is refused, and
//! whoever holds a session open looks for the row at every revision (I11). What lies outside the caller's org, and what
//! was granted to somebody else, does not exist for the caller (I9).

use super::admission::{asking_token, sees};
use super::{Decision, Refusal, absent, refuse};
use crate::error::StoreError;
use crate::overlay::{Draft, Filing};
use crate::views::{EXEC_GRANTS_MAX, Views};
use holdfast_model::exec::{ExecClass, ExecEnd, ExecGrant, ExecUse};
use holdfast_model::limits::{
    EXEC_ENV_MAX, EXEC_INSTANCE_MAX, EXEC_ORG_HOUR_MAX, EXEC_SESSION_MS_MAX, EXEC_SESSION_MS_MIN,
    EXEC_SILENCE_MS, EXEC_USE_WITHIN_MS_MAX,
};
use holdfast_model::{
    Actor, Aggregate, AppId, Code, Digest, EnvName, EventPayload, ExecGrantId, InstanceId, MemberId, Output,
    Timestamp,
};

/// Envs that are looked at together.
const ENVS_PAGE: usize = 100;

/// What is asked of a new grant.
pub(super) struct Asked {
    pub(super) instance: InstanceId,
    pub(super) class: ExecClass,
    pub(super) terminal: bool,
    pub(super) digest: Digest,
    pub(super) use_within_ms: u64,
    pub(super) session_ms: u64,
}

/// What a use shows.
pub(super) struct Shown {
    pub(super) grant: ExecGrantId,
    pub(super) digest: Digest,
    pub(super) class: ExecClass,
    pub(super) terminal: bool,
    pub(super) member: MemberId,
}

fn filing(grant: &ExecGrant) -> Filing {
    Filing::org(Aggregate::ExecGrant(grant.id), grant.org)
}

/// Ends a grant, and its session, if it had one.
fn close(
    draft: &mut Draft<'_>,
    grant: &ExecGrant,
    end: ExecEnd,
    code: Option<i32>,
    lasted_ms: u64,
) -> Result<(), StoreError> {
    draft.emit(filing(grant), EventPayload::ExecEnded { grant: grant.id, end, code, lasted_ms })
}

/// Takes a grant away. How long its session lasted is by the clocks of two members, and for people.
fn revoke(draft: &mut Draft<'_>, grant: &ExecGrant) -> Result<(), StoreError> {
    let lasted_ms = grant.used.map_or(0, |used| draft.context().now.since(used.at));
    close(draft, grant, ExecEnd::Revoked, None, lasted_ms)
}

/// Only somebody with a token can be given a grant: it dies with the token.
fn principal(draft: &Draft<'_>) -> Result<Actor, Refusal> {
    match asking_token(draft)? {
        Some(_) => Ok(draft.context().actor),
        None => Err(refuse(Code::Unauthenticated, "Only the holder of a token can run programs: log in.")),
    }
}

pub(super) fn create(draft: &mut Draft<'_>, asked: &Asked) -> Decision {
    let principal = principal(draft)?;
    let instance = draft.instance(asked.instance)?.filter(|i| sees(draft, i.org));
    let instance = instance.ok_or_else(|| absent("instance"))?;
    if instance.state.is_final() {
        let message = "The instance has ended: `holdfast instances` lists those that run.";
        return Err(refuse(Code::FailedPrecondition, message));
    }
    if !(1..=EXEC_USE_WITHIN_MS_MAX).contains(&asked.use_within_ms)
        || !(EXEC_SESSION_MS_MIN..=EXEC_SESSION_MS_MAX).contains(&asked.session_ms)
    {
        let message = "A grant waits a minute at most, and its session lasts from a second to a day.";
        return Err(refuse(Code::InvalidRequest, message));
    }
    let now = draft.context().now;
    let mut open = draft.exec_grants_of(instance.env)?;
    open.retain(|grant| !is_over(grant, now));
    let here = open.iter().filter(|grant| grant.instance == instance.id).count();
    within("exec sessions of an instance", here, EXEC_INSTANCE_MAX)?;
    within("exec sessions of an env", open.len(), EXEC_ENV_MAX)?;
    let hour = draft.exec_hour(instance.org)?;
    let this_hour = if hour.hour == hour_of(now) { hour.grants } else { 0 };
    within("exec sessions of an org in an hour", this_hour as usize, EXEC_ORG_HOUR_MAX as usize)?;
    let id = ExecGrantId::from_bits(draft.fresh_id());
    let grant = ExecGrant {
        id,
        instance: instance.id,
        node: instance.node,
        env: instance.env,
        app: instance.app,
        org: instance.org,
        principal,
        class: asked.class,
        terminal: asked.terminal,
        digest: asked.digest,
        use_before: now.plus_ms(asked.use_within_ms),
        session_ms: asked.session_ms,
        used: None,
        created_at: now,
    };
    draft.emit(filing(&grant), EventPayload::ExecGranted(Box::new(grant)))?;
    Ok(Output::ExecGrant(id))
}

fn within(dimension: &str, usage: usize, limit: usize) -> Result<(), Refusal> {
    if usage < limit {
        return Ok(());
    }
    Err(refuse(
        Code::QuotaExceeded,
        format!("The quota of {limit} {dimension} is used up ({usage} now, 1 more asked): end one, or wait."),
    ))
}

/// The hour of the clock that a time lies in.
pub(crate) const fn hour_of(time: Timestamp) -> u64 {
    time.0 / 3_600_000
}

/// Whether a grant was not used in time, or its session must have ended, whatever its member says.
fn is_over(grant: &ExecGrant, now: Timestamp) -> bool {
    let end = grant.used.map_or(grant.use_before, |used| used.ends_at);
    now >= end.plus_ms(EXEC_SILENCE_MS) || (grant.used.is_none() && now >= end)
}

pub(super) fn use_up(draft: &mut Draft<'_>, shown: &Shown) -> Decision {
    let actor = draft.context().actor;
    let found = draft.exec_grant(shown.grant)?;
    // Somebody else's grant, and a wrong secret, look as if nothing were there.
    let found = found.filter(|g| sees(draft, g.org) && g.principal == actor && g.digest == shown.digest);
    let grant = found.ok_or_else(|| absent("exec grant"))?;
    let now = draft.context().now;
    let over = |what| refuse(Code::FailedPrecondition, what);
    if grant.used.is_some() {
        return Err(over("The exec grant was used already, and is good for one session: ask for another."));
    }
    if now >= grant.use_before {
        return Err(over("The exec grant was not used in time: ask for another."));
    }
    if (grant.class, grant.terminal) != (shown.class, shown.terminal) {
        return Err(over("The exec grant is for something else: ask for one for what you want to run."));
    }
    if draft.instance(grant.instance)?.is_none_or(|i| i.state.is_final()) {
        return Err(over("The instance has ended: `holdfast instances` lists those that run."));
    }
    let used = ExecUse { at: now, ends_at: now.plus_ms(grant.session_ms), member: shown.member };
    draft.emit(filing(&grant), EventPayload::ExecStarted { grant: grant.id, used })?;
    Ok(Output::ExecGrant(grant.id))
}

pub(super) fn end(
    draft: &mut Draft<'_>,
    id: ExecGrantId,
    end: ExecEnd,
    code: Option<i32>,
    lasted_ms: u64,
) -> Decision {
    let grant = draft.exec_grant(id)?;
    if matches!(draft.context().actor, Actor::System(_)) {
        // It may have been revoked meanwhile.
        if let Some(grant) = grant {
            close(draft, &grant, end, code, lasted_ms)?;
        }
        return Ok(Output::None);
    }
    let grant = grant.filter(|g| sees(draft, g.org)).ok_or_else(|| absent("exec grant"))?;
    revoke(draft, &grant)?;
    Ok(Output::None)
}

/// Ends every grant of an app that goes, so that each session has its end in the history (I12).
pub(super) fn end_all_of_app(draft: &mut Draft<'_>, app: AppId) -> Result<(), StoreError> {
    let mut after: Option<EnvName> = None;
    loop {
        let envs = draft.envs(app, after.as_ref(), ENVS_PAGE)?;
        let Some(last) = envs.last() else { return Ok(()) };
        after = Some(last.name.clone());
        for env in &envs {
            for grant in draft.exec_grants_of(env.id)? {
                revoke(draft, &grant)?;
            }
        }
    }
}

/// Ends grants that nobody used in time, and sessions whose member is silent after their end.
pub(super) fn end_overdue(draft: &mut Draft<'_>) -> Result<(), StoreError> {
    let now = draft.context().now;
    for grant in draft.exec_grants(EXEC_GRANTS_MAX)? {
        if !is_over(&grant, now) {
            continue;
        }
        let (end, lasted_ms) = match grant.used {
            None => (ExecEnd::ConnectTimeout, 0),
            Some(used) => (ExecEnd::Lost, used.ends_at.since(used.at)),
        };
        close(draft, &grant, end, None, lasted_ms)?;
    }
    Ok(())
}
