//! Exactly once (I4): the first outcome of a command is kept, and answers every repeat.
//!
//! With an idempotency key the scope is (org, actor, operation, key), kept for [`IDEMPOTENCY_KEPT_MS`]; without one it
//! is (request, command), kept for [`REQUEST_KEPT_MS`], which is there for resends within the cluster. Rows that are over
//! are removed a bounded number with each command.
//!
//! Time is log time, which wall clocks cannot move. In cluster version 1 it was what the commands' contexts said; what was
//! kept then stays, from the raise on, for as long in log time as what is kept longest.

use crate::error::StoreError;
use crate::rows::{Rows, RowsMut};
use crate::tables::{Table, Value, decode, encode, key};
use crate::writer::Writer;
use holdfast_model::limits::{IDEMPOTENCY_KEPT_MS, LOG_TIME_STEP_MS_MAX};
use holdfast_model::{ClusterVersion, Code, Command, Context, Digest, Outcome, Proposal, Rejection};
use serde::{Deserialize, Serialize};

/// How long the outcome of a request without an idempotency key is kept, in milliseconds.
pub const REQUEST_KEPT_MS: u64 = 600_000;
/// Outcomes that are over and are removed with one command, of either kind of end: more than one command adds.
const REMOVED_MAX: usize = 4;
/// The bit of an end that is in log time; in one of a wall clock it is not set.
const IN_LOG_TIME: u64 = 1 << 63;
/// Log time that has passed and is not in the log yet: retention is longer by as much, and so never too short.
const UNREPORTED_MS_MAX: u64 = LOG_TIME_STEP_MS_MAX;
/// The log time through which everything is kept that was kept before there was log time.
const WALL_ENDS_KEPT_TO: u64 = IN_LOG_TIME | (IDEMPOTENCY_KEPT_MS + UNREPORTED_MS_MAX);

/// The time by which outcomes are kept, as their ends are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RetentionTime(u64);

impl RetentionTime {
    /// The time that a command meets.
    pub(crate) fn of(version: ClusterVersion, log_time_ms: u64, context: &Context) -> Self {
        match version.has_log_time() {
            true => Self(IN_LOG_TIME | log_time_ms),
            false => Self(context.now.0),
        }
    }

    fn is_log_time(self) -> bool {
        self.0 & IN_LOG_TIME != 0
    }

    /// Whether what is kept to `end` is over.
    fn is_after(self, end: u64) -> bool {
        let is_wall_end = end & IN_LOG_TIME == 0;
        self.0 >= if self.is_log_time() && is_wall_end { WALL_ENDS_KEPT_TO } else { end }
    }

    fn plus_kept(self, kept_ms: u64) -> u64 {
        self.0.saturating_add(kept_ms).saturating_add(if self.is_log_time() { UNREPORTED_MS_MAX } else { 0 })
    }
}

/// The first outcome of a command.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Of the command.
    command: Digest,
    /// When it ends: in log time when the first bit says so, else by wall clocks.
    until: u64,
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
    /// Never seen, or long ago: then with the row that is over.
    First(Option<Value>),
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
            | Command::AdvanceLogTime { .. }
            | Command::ReportInstances { .. }
            | Command::ReportNode { .. }
            | Command::ReportSilence { .. }
    );
    if clockwork && context.idempotency_key.is_none() {
        return Ok(None);
    }
    let bytes = postcard::to_stdvec(&*command.repeated())
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
pub(crate) fn find(writer: &Writer, identity: &Identity, now: RetentionTime) -> Result<Repeat, StoreError> {
    let Some(value) = writer.get(&identity.key)? else { return Ok(Repeat::First(None)) };
    let kept: Kept = decode(Table::Outcome, &value)?;
    if now.is_after(kept.until) {
        return Ok(Repeat::First(Some(value)));
    }
    if kept.command == identity.command {
        return Ok(Repeat::Seen(kept.outcome));
    }
    Ok(Repeat::Seen(Err(Rejection::new(
        Code::IdempotencyKeyReuse,
        "This idempotency key was used with another request: draw a fresh key for each new request.",
    ))))
}

/// Keeps the outcome of a first command, in the place of the row that [`find`] answered.
pub(crate) fn keep(
    writer: &mut Writer,
    identity: Identity,
    old: Option<Value>,
    now: RetentionTime,
    outcome: &Outcome,
) -> Result<(), StoreError> {
    let Identity { key: at, command, kept_ms } = identity;
    if let Some(old) = &old {
        let old: Kept = decode(Table::Outcome, old)?;
        writer.put(end_key(old.until, &at), None)?;
    }
    let until = now.plus_kept(kept_ms);
    writer.set_outcomes_end(writer.outcomes_end().map(|known| known.min(until)));
    let kept = Kept { command, until, outcome: outcome.clone() };
    // An outcome has one end, and if there was one it has just gone.
    writer.replace(end_key(until, &at), None, Some([].as_slice().into()));
    writer.replace(at, old, Some(encode(Table::Outcome, &kept)?));
    Ok(())
}

fn end_key(until: u64, outcome_key: &[u8]) -> Vec<u8> {
    key(Table::OutcomeEnd, &[&until.to_be_bytes(), &outcome_key[1..]])
}

/// Removes a few outcomes that are over. What it removes depends on the commands alone and not on how they were
/// batched (I1): the writer only remembers when there is nothing to look for.
pub(crate) fn forget(writer: &mut Writer, now: RetentionTime) -> Result<(), StoreError> {
    if writer.outcomes_end().is_some_and(|end| end > now.0) {
        return Ok(());
    }
    let mut next = u64::MAX;
    if !now.is_log_time() {
        next = forget_ends(writer, now, None)?;
    } else {
        // Ends in log time come after all others.
        let after = key(Table::OutcomeEnd, &[&IN_LOG_TIME.to_be_bytes()]);
        next = next.min(forget_ends(writer, now, Some(&after))?);
        next = next.min(match now.0 < WALL_ENDS_KEPT_TO {
            true => WALL_ENDS_KEPT_TO,
            false => forget_ends(writer, now, None)?,
        });
    }
    writer.set_outcomes_end(Some(next));
    Ok(())
}

/// Removes the first outcomes whose ends lie after `after` and are over; tells when it is worth to look again.
fn forget_ends(writer: &mut Writer, now: RetentionTime, after: Option<&[u8]>) -> Result<u64, StoreError> {
    const TIME_BYTES: usize = 8;
    let found = writer.scan(&key(Table::OutcomeEnd, &[]), after, REMOVED_MAX)?;
    // After as many as are removed at a time there may be more.
    let mut next = if found.len() == REMOVED_MAX { 0 } else { u64::MAX };
    for (row, _) in found {
        let end = row.get(1..1 + TIME_BYTES).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let end = end.ok_or_else(|| StoreError::corrupt("the end of an outcome has no time"))?;
        if !now.is_after(end) {
            next = end;
            break;
        }
        writer.put(key(Table::Outcome, &[&row[1 + TIME_BYTES..]]), None::<Value>)?;
        writer.put(row, None)?;
    }
    Ok(next)
}
