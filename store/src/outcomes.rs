//! Exactly once (I4): the first outcome of a command is kept, and answers every repeat.
//!
//! With an idempotency key the scope is (org, actor, operation, key), kept for [`IDEMPOTENCY_KEPT_MS`]; without one it
//! is (request, command), kept for [`REQUEST_KEPT_MS`], which is there for resends within the cluster. Time is what
//! the commands' contexts say. Rows that are over are removed a bounded number with each command.

use crate::error::StoreError;
use crate::overlay::Batch;
use crate::rows::{Rows, RowsMut};
use crate::tables::{Table, Value, decode, encode, key};
use holdfast_model::limits::IDEMPOTENCY_KEPT_MS;
use holdfast_model::{Code, Command, Context, Digest, Outcome, Proposal, Rejection, Timestamp};
use serde::{Deserialize, Serialize};

/// How long the outcome of a request without an idempotency key is kept, in milliseconds.
pub const REQUEST_KEPT_MS: u64 = 600_000;
/// Outcomes that are over and are removed with one command: more than one command adds.
const REMOVED_MAX: usize = 4;

/// The first outcome of a command.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of the command.
    command: Digest,
    /// When it ends.
    until: Timestamp,
    /// What it came to.
    outcome: Outcome,
}

/// What a repeat of a command is known by.
pub(crate) struct Identity {
    key: Vec<u8>,
    command: Digest,
    kept_ms: u64,
}

/// What is known of a command before it is decided.
pub(crate) enum Repeat {
    /// Never seen, or long ago.
    First,
    /// Seen: this is its outcome.
    Seen(Outcome),
}

/// What repeats of a proposal are known by; `None` for the clockwork's, which change nothing when they are repeated.
pub(crate) fn identity(proposal: &Proposal) -> Result<Option<Identity>, StoreError> {
    let Proposal { context, command } = proposal;
    let clockwork = matches!(
        command,
        Command::Tick
            | Command::VerifyDigest { .. }
            | Command::ReportInstances { .. }
            | Command::ReportNode { .. }
            | Command::ReportSilence { .. }
    );
    if clockwork && context.idempotency_key.is_none() {
        return Ok(None);
    }
    let bytes = postcard::to_stdvec(command)
        .map_err(|source| StoreError::Encode { table: Table::Outcome.name(), source })?;
    let digest = Digest::keyed("holdfast 2026 command v1", &bytes);
    // The number of the operation is the first thing in a command's bytes.
    let operation = bytes.first().copied().unwrap_or_default();
    let (scope, kept_ms) = scope(context, operation, digest)?;
    Ok(Some(Identity { key: key(Table::Outcome, &[&scope.0]), command: digest, kept_ms }))
}

fn scope(context: &Context, operation: u8, command: Digest) -> Result<(Digest, u64), StoreError> {
    let encoded = match &context.idempotency_key {
        Some(key) => postcard::to_stdvec(&(&context.actor_org, &context.actor, operation, key)),
        None => postcard::to_stdvec(&(&context.request_id, command)),
    };
    let bytes = encoded.map_err(|source| StoreError::Encode { table: Table::Outcome.name(), source })?;
    Ok(match context.idempotency_key {
        Some(_) => (Digest::keyed("holdfast 2026 idempotency scope v1", &bytes), IDEMPOTENCY_KEPT_MS),
        None => (Digest::keyed("holdfast 2026 request scope v1", &bytes), REQUEST_KEPT_MS),
    })
}

/// Looks for an earlier command of this identity.
pub(crate) fn find(batch: &Batch<'_>, identity: &Identity, now: Timestamp) -> Result<Repeat, StoreError> {
    let Some(value) = batch.get(&identity.key)? else { return Ok(Repeat::First) };
    let kept: Kept = decode(Table::Outcome, &value)?;
    if kept.until <= now {
        return Ok(Repeat::First);
    }
    if kept.command == identity.command {
        return Ok(Repeat::Seen(kept.outcome));
    }
    Ok(Repeat::Seen(Err(Rejection::new(
        Code::IdempotencyKeyReuse,
        "This idempotency key was used with another request: draw a fresh key for each new request.",
    ))))
}

/// Keeps the outcome of a first command.
pub(crate) fn keep(
    batch: &mut Batch<'_>,
    identity: Identity,
    now: Timestamp,
    outcome: &Outcome,
) -> Result<(), StoreError> {
    let Identity { key: at, command, kept_ms } = identity;
    if let Some(old) = batch.get(&at)? {
        let old: Kept = decode(Table::Outcome, &old)?;
        batch.put(end_key(old.until, &at), None)?;
    }
    let until = now.plus_ms(kept_ms);
    batch.set_outcomes_end(batch.outcomes_end().map(|known| known.min(until)));
    let kept = Kept { command, until, outcome: outcome.clone() };
    batch.put(end_key(until, &at), Some([].as_slice().into()))?;
    batch.put(at, Some(encode(Table::Outcome, &kept)?))
}

fn end_key(until: Timestamp, outcome_key: &[u8]) -> Vec<u8> {
    key(Table::OutcomeEnd, &[&until.0.to_be_bytes(), &outcome_key[1..]])
}

/// Removes a few outcomes that are over. What it removes depends on the commands alone and not on how they were
/// batched (I1): a batch only remembers when there is nothing to look for.
pub(crate) fn forget(batch: &mut Batch<'_>, now: Timestamp) -> Result<(), StoreError> {
    const TIME_BYTES: usize = 8;
    if batch.outcomes_end().is_some_and(|end| end > now) {
        return Ok(());
    }
    let mut known = Some(Timestamp(u64::MAX));
    let found = batch.scan(&key(Table::OutcomeEnd, &[]), None, REMOVED_MAX)?;
    // After as many as are removed at a time there may be more.
    if found.len() == REMOVED_MAX {
        known = None;
    }
    for (end, _) in found {
        let until =
            end.get(1..1 + TIME_BYTES).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let until = until.ok_or_else(|| StoreError::corrupt("the end of an outcome has no time"))?;
        if until > now.0 {
            known = Some(Timestamp(until));
            break;
        }
        batch.put(key(Table::Outcome, &[&end[1 + TIME_BYTES..]]), None::<Value>)?;
        batch.put(end, None)?;
    }
    batch.set_outcomes_end(known);
    Ok(())
}
